"""Norms of single examples' gradients, in three ways that give the same numbers.

``vmap`` is one vectorized backward pass and holds a batch times the parameters; ``loop`` holds one gradient and takes
one pass per example; ``ghost`` is one ordinary pass and forms no gradient where a layer has a closed form.
The parameters that count are those of the network that require a gradient.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map

from assay.optim import per_sample_grads

Loss = Callable[[Any, Any], Tensor]


def chosen_parameters(model: nn.Module, params: str | Sequence[str]) -> list[nn.Parameter]:
    named = dict(model.named_parameters())
    if params == "all":
        chosen = [p for p in named.values() if p.requires_grad]
    elif params == "last_layer":
        owners = [own for module in model.modules() if (own := list(module.parameters(recurse=False)))]
        chosen = owners[-1] if owners else []
    elif isinstance(params, str):
        raise ValueError(f"params = {params!r} is out of range: 'all', 'last_layer' or a list of names")
    else:
        for name in params:
            if not any(_within(known, name) for known in named):
                raise ValueError(f"params names {name!r}, which the model lacks; it has {', '.join(named)}")
        chosen = [p for known, p in named.items() if any(_within(known, name) for name in params)]
    if not chosen:
        raise ValueError(f"params = {params!r} leaves no parameter to differentiate by")
    return chosen


def _within(parameter: str, name: str) -> bool:
    return parameter == name or parameter.startswith(f"{name}.")


@contextlib.contextmanager
def training_only(network: nn.Module, chosen: Iterable[nn.Parameter]) -> Iterator[None]:
    """Only ``chosen`` require a gradient; afterwards each parameter has its own flag back."""
    keys = {id(parameter) for parameter in chosen}
    flags = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(id(parameter) in keys)
        yield
    finally:
        for parameter, required in flags:
            parameter.requires_grad_(required)


def vmap_norms(network: nn.Module, loss_fn: Loss, inputs: Any, targets: Any) -> Tensor:
    """All gradients of the batch at once."""
    grads = per_sample_grads(network, loss_fn, inputs, targets)
    return torch.stack([_square(grad.flatten(1)) for grad in grads.values()]).sum(0).sqrt()


def loop_norms(network: nn.Module, loss_fn: Loss, inputs: Any, targets: Any) -> Tensor:
    """One backward pass per example."""
    wanted = _trained(network)
    norms = []
    for i in range(_size(targets)):
        x, y = tree_map(lambda leaf, i=i: leaf[i : i + 1], (inputs, targets))
        loss = loss_fn(network(x), y)
        # A loss that none of them reaches has no graph to go back through.
        grads = torch.autograd.grad(loss, wanted, allow_unused=True) if loss.requires_grad else ()
        squares = [_square(grad.flatten()) for grad in grads if grad is not None]
        norms.append(torch.stack(squares).sum().sqrt() if squares else torch.zeros_like(loss))
    return torch.stack(norms)


class GhostNorms:
    """One pass for the batch; every layer's part of the squared norm from its input and its output's gradient.

    A layer ``y_t = W a_t + c`` has, for one example, ``grad W = sum_t d_t a_t'`` and ``grad c = sum_t d_t`` with
    ``d_t = grad y_t`` at positions t (pixels, tokens, repeated calls), so that ::

        ||grad W||^2 = sum_{s,t} (a_s . a_t) (d_s . d_t)        (||a||^2 ||d||^2 for a single position)

    which is summed over positions or over the entries of W, whichever takes less. Groups of a convolution are such
    layers side by side; the scales of a normalization are groups of width one on the normalized input; an embedding
    is such a layer on one-hot vectors. Parameters of other modules, and shared ones, take the way of ``vmap``.

    Hooks cannot see a weight that is also used outside its module's call, or inputs whose first dimension is not the
    batch. The first batch therefore compares one example with its plain gradient; where they differ the whole network
    takes the way of ``vmap``, with a warning.
    """

    def __init__(self, network: nn.Module) -> None:
        wanted = {id(parameter) for parameter in _trained(network)}
        owners = Counter(id(p) for module in network.modules() for p in _own(module).values())
        self.layers = [
            module
            for module in network.modules()
            if _factors_of(module) is not None
            and any(id(p) in wanted for p in _own(module).values())
            and all(owners[id(p)] == 1 for p in _own(module).values())
        ]
        covered = {id(p) for module in self.layers for p in _own(module).values()}
        self.rest = [parameter for parameter in _trained(network) if id(parameter) not in covered]
        self.checked = False

    def __call__(self, network: nn.Module, loss_fn: Loss, inputs: Any, targets: Any) -> Tensor:
        if not self.layers:
            return vmap_norms(network, loss_fn, inputs, targets)
        norms = self._norms(network, loss_fn, inputs, targets)
        if not self.checked:
            self.checked = True
            if not self._agrees(norms, network, loss_fn, inputs, targets):
                warnings.warn(
                    "method='ghost': the layers' closed forms do not add up to this model's gradient (a weight used "
                    "outside its module, or inputs whose first dimension is not the batch); using 'vmap'",
                    stacklevel=5,
                )
                self.layers = []
                return vmap_norms(network, loss_fn, inputs, targets)
        return norms

    def _norms(self, network: nn.Module, loss_fn: Loss, inputs: Any, targets: Any) -> Tensor:
        calls: dict[nn.Module, list[tuple[Tensor, Any]]] = defaultdict(list)

        def remember(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            # The edge, not the output: an activation that works in place gives the tensor a new place in the graph.
            if args and output.requires_grad:
                calls[module].append((args[0].detach(), torch.autograd.graph.get_gradient_edge(output)))

        hooks = [module.register_forward_hook(remember) for module in self.layers]
        try:
            output = network(inputs)
        finally:
            for hook in hooks:
                hook.remove()
        size = _size(targets)
        each = zip(output.split(1), _examples(targets), strict=True)
        total = torch.stack([loss_fn(z, y) for z, y in each]).sum()
        edges = [edge for made in calls.values() for _, edge in made]
        grads = iter(torch.autograd.grad(total, edges, allow_unused=True) if edges else ())
        squares = torch.zeros(size, dtype=torch.promote_types(output.dtype, torch.float32), device=output.device)
        for module, made in calls.items():
            used = [(a, d) for a, _ in made if (d := next(grads)) is not None]
            if any(len(a) != size for a, _ in used):
                return squares + torch.nan
            if used:
                squares += _layer_square(module, used)
        if self.rest:
            with training_only(network, self.rest):
                squares += vmap_norms(network, loss_fn, inputs, targets).square()
        return squares.clamp(min=0).sqrt()

    def _agrees(self, norms: Tensor, network: nn.Module, loss_fn: Loss, inputs: Any, targets: Any) -> bool:
        i = int(norms.argmax())  # the largest gradient is the one least blurred by rounding
        x, y = tree_map(lambda leaf: leaf[i : i + 1], (inputs, targets))
        rtol = max(1e-2, 10 * torch.finfo(_trained(network)[0].dtype).eps)
        return torch.allclose(norms[i], loop_norms(network, loss_fn, x, y)[0].to(norms), rtol=rtol, atol=0)


def _layer_square(module: nn.Module, calls: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Squared norm (b,) of the gradient of a module's own trained parameters, over all its calls."""
    factors = _factors_of(module)
    assert factors is not None
    made = [factors(module, a, d) for a, d in calls]
    dtype = torch.promote_types(made[0][1].dtype, torch.float32)
    a, d = (torch.cat(part, dim=2).to(dtype) for part in zip(*made, strict=True))
    trained = {name for name, parameter in _own(module).items() if parameter.requires_grad}
    square = torch.zeros(len(d), dtype=dtype, device=d.device)
    if "weight" in trained:
        positions, fan_in, fan_out = a.shape[2], a.shape[3], d.shape[3]
        if positions * (fan_in + fan_out) < fan_in * fan_out:
            square += ((a @ a.mT) * (d @ d.mT)).flatten(1).sum(1)
        else:
            square += _square((d.mT @ a).flatten(1))
    if "bias" in trained:
        square += _square(d.sum(2).flatten(1))
    return square


# Each of the following turns a layer's input (b, ...) and its output's gradient into a (b, groups, positions, fan_in)
# and d (b, groups, positions, fan_out), with grad W = d' a in each group.


def _linear(module: Any, a: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    return (
        a.reshape(len(a), 1, -1, module.in_features),
        d.reshape(len(d), 1, -1, module.out_features),
    )


def _conv(module: Any, a: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    spans = [step * (size - 1) for size, step in zip(module.kernel_size, module.dilation, strict=True)]
    if module.padding == "same":
        sides = [(span // 2, span - span // 2) for span in spans]
    else:
        sides = [(0, 0) if module.padding == "valid" else (pad, pad) for pad in _pads(module)]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    patches = F.pad(a, [side for pair in reversed(sides) for side in pair], mode=mode)
    for axis, (span, stride, step) in enumerate(zip(spans, module.stride, module.dilation, strict=True), start=2):
        patches = patches.unfold(axis, span + 1, stride)[..., ::step]
    groups, fan_in = module.groups, module.in_channels // module.groups
    patches = patches.reshape(len(a), groups, fan_in, d[0, 0].numel(), -1)  # (b, groups, channels, positions, kernel)
    return patches.transpose(2, 3).flatten(3), d.reshape(len(d), groups, -1, d[0, 0].numel()).mT


def _pads(module: Any) -> tuple[int, ...]:
    return (0,) * len(module.kernel_size) if isinstance(module.padding, str) else module.padding


def _embedding(module: Any, a: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    tokens = a.reshape(len(a), -1)
    d = d.reshape(len(d), 1, -1, module.embedding_dim)
    if module.padding_idx is not None:
        d = d * (tokens != module.padding_idx)[:, None, :, None]
    # One-hot over the first position of the same token: inner products as over the vocabulary, in far less room.
    first = (tokens[:, :, None] == tokens[:, None, :]).to(torch.uint8).argmax(-1)
    return F.one_hot(first, tokens.shape[1])[:, None].to(d.dtype), d


def _channel_norm(module: Any, a: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(module, _BatchNorm):
        normed = F.batch_norm(a, module.running_mean, module.running_var, eps=module.eps)
    else:
        normed = F.group_norm(a, module.num_groups, eps=module.eps)
    return tuple(t.reshape(*t.shape[:2], -1, 1) for t in (normed, d))  # type: ignore[return-value]


def _last_norm(module: Any, a: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    norm = F.layer_norm if isinstance(module, nn.LayerNorm) else F.rms_norm
    normed = norm(a, module.normalized_shape, eps=module.eps)
    features = module.weight.numel()
    return tuple(t.reshape(len(t), -1, features).mT[..., None] for t in (normed, d))  # type: ignore[return-value]


_FACTORS: dict[type[nn.Module], Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    nn.Linear: _linear,
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _conv),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm), _channel_norm),
    **dict.fromkeys((nn.LayerNorm, nn.RMSNorm), _last_norm),
    nn.Embedding: _embedding,
}


def _factors_of(module: nn.Module) -> Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """The closed form of exactly this type of module, if it holds no more than a weight and a bias of its own."""
    if not _own(module).keys() <= {"weight", "bias"} or getattr(module, "scale_grad_by_freq", False):
        return None
    return _FACTORS.get(type(module))


def _own(module: nn.Module) -> dict[str, nn.Parameter]:
    return dict(module.named_parameters(recurse=False))


def _trained(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def _square(values: Tensor) -> Tensor:
    """Squared norm over the last dimension, in single precision at least."""
    return values.to(torch.promote_types(values.dtype, torch.float32)).square().sum(-1)


def _examples(targets: Any) -> Iterator[Any]:
    for i in range(_size(targets)):
        yield tree_map(lambda leaf, i=i: leaf[i : i + 1], targets)


def _size(targets: Any) -> int:
    return len(tree_leaves(targets)[0])
