"""Layers that are put into a network, and channels into its layers, while what it computes stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from assay._checks import in_range

PRESERVE = ("exact", "paper")


@dataclass
class Growth:
    """What an expansion did to the parameters, for an optimizer to follow.

    ``replaced``: a parameter, the larger one in its place, and a function that puts a tensor of the first shape where
    its entries now are, zeros elsewhere. ``added``: new parameters, each with one that was there before it.
    """

    replaced: list[tuple[nn.Parameter, nn.Parameter, Callable[[Tensor], Tensor]]] = field(default_factory=list)
    added: list[tuple[nn.Parameter, nn.Parameter]] = field(default_factory=list)

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Put the new parameters into the optimizer's groups, and grow its state: old entries kept, new ones zero."""
        for old, new, embed in self.replaced:
            for group in optimizer.param_groups:
                group["params"] = [new if p is old else p for p in group["params"]]
            if (state := optimizer.state.pop(old, None)) is not None:
                optimizer.state[new] = {
                    key: embed(value) if isinstance(value, Tensor) and value.shape == old.shape else value
                    for key, value in state.items()
                }
        for new, neighbour in self.added:
            for group in optimizer.param_groups:
                if any(p is neighbour for p in group["params"]):
                    group["params"].append(new)


def insert_identity_conv(
    seq: nn.Sequential,
    index: int,
    channels: int,
    *,
    kernel_size: int = 3,
    noise: float = 1e-4,
    preserve: str = "exact",
    negative_slope: float = 0.2,
    calibration: Tensor | None = None,
) -> Growth:
    """Put a convolution that does nothing yet into ``seq`` before its module ``index``, in place.

    ::

        exact   conv with 1 in the middle of channel c's kernel for c, 0 elsewhere -> batch norm that undoes itself
                -> PReLU with slope 1 for each channel
        paper   the same kernel + noise N(0, 1) -> a fresh batch norm -> LeakyReLU

    The batch norm undoes itself by weight = sqrt(var + eps) and bias = mean of the calibration batch, which are its
    running statistics too: in evaluation the layer is the identity for any input, in training for that batch.

    Args:
        seq: the sequence that gets one module more, of three.
        index: 0 <= index <= len(seq).
        channels: > 0, of what arrives there, (N, channels, H, W).
        kernel_size: odd.
        noise: >= 0, for "paper".
        preserve: "exact" or "paper".
        negative_slope: of the LeakyReLU, for "paper".
        calibration: what arrives there for a batch in training, for "exact"; None: mean 0 and variance 1 are taken.

    Returns:
        The :class:`Growth`: call its ``follow(optimizer)`` if there is one already.

    Raises:
        ValueError: an argument out of range.

    Source: B. Appolinary, A. Deaconu, S. Yang, Q. Li, Self Expanding Convolutional Neural Networks, 2024,
    arXiv 2401.05686.

    >>> import torch
    >>> from assay.nn.expand import insert_identity_conv
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU()).eval()
    >>> x = torch.randn(2, 1, 8, 8)
    >>> before, growth = net(x), insert_identity_conv(net, 2, channels=4)
    >>> len(net), torch.allclose(net.eval()(x), before, atol=1e-6)
    (3, True)
    """
    in_range("index", index, 0 <= index <= len(seq), f"0 to {len(seq)}")
    in_range("channels", channels, channels > 0, "an integer > 0")
    in_range("kernel_size", kernel_size, kernel_size > 0 and kernel_size % 2 == 1, "odd and > 0")
    in_range("noise", noise, noise >= 0, ">= 0")
    in_range("preserve", preserve, preserve in PRESERVE, " or ".join(PRESERVE))
    neighbour = next(iter(seq.parameters()), None)
    factory = {} if neighbour is None else {"device": neighbour.device, "dtype": neighbour.dtype}
    conv = nn.Conv2d(channels, channels, kernel_size, padding="same", bias=False, **factory)  # type: ignore[arg-type]
    norm: nn.BatchNorm2d = nn.BatchNorm2d(channels, **factory)  # type: ignore[arg-type]
    nn.init.dirac_(conv.weight)
    with torch.no_grad():
        if preserve == "paper":
            conv.weight.add_(torch.randn_like(conv.weight), alpha=noise)
        else:
            _undo(norm, calibration)
    slopes = nn.PReLU(channels, init=1.0, **factory)
    act = slopes if preserve == "exact" else nn.LeakyReLU(negative_slope)
    layer = nn.Sequential(conv, norm, act).train(seq.training)
    seq.insert(index, layer)
    return Growth(added=[] if neighbour is None else [(p, neighbour) for p in layer.parameters()])


def _undo(norm: nn.BatchNorm2d, calibration: Tensor | None) -> None:
    assert norm.running_var is not None and norm.running_mean is not None
    if calibration is not None:
        var, mean = torch.var_mean(calibration, (0, 2, 3), correction=0)
        norm.running_var.copy_(var)
        norm.running_mean.copy_(mean)
    norm.weight.copy_((norm.running_var + norm.eps).sqrt())
    norm.bias.copy_(norm.running_mean)


def widen_conv(
    conv: nn.Conv2d,
    next_modules: Sequence[nn.Module | tuple[nn.Module, int]],
    n: int,
    *,
    noise: float = 1e-4,
    preserve: str = "exact",
) -> Growth:
    """Give a convolution ``n`` output channels more, and what follows the inputs for them, in place.

    New filters are noise N(0, 1), new biases 0; new entries of a batch norm have weight 1, bias 0, mean 0, variance 1,
    those of a PReLU slope 1; a following convolution or linear layer weighs the new channels with 0 ("exact": its
    output stays the same) or with noise N(0, 1) ("paper").

    Args:
        conv: with ``groups=1``.
        next_modules: those that see the new channels: batch norms and PReLUs on the way, and the layers that consume
            them. ``(layer, start)`` for one that consumes several tensors side by side, ``conv``'s from channel
            ``start`` on. Modules without parameters may be among them.
        n: > 0.
        noise: >= 0.
        preserve: "exact" or "paper".

    Returns:
        The :class:`Growth`: call its ``follow(optimizer)`` if there is one already. Parameters become other objects.

    Raises:
        ValueError: an argument out of range, or a layer that cannot take more channels.

    Source: B. Appolinary, A. Deaconu, S. Yang, Q. Li, Self Expanding Convolutional Neural Networks, 2024,
    arXiv 2401.05686.

    >>> import torch
    >>> from assay.nn.expand import widen_conv
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 3))
    >>> x = torch.randn(2, 1, 8, 8)
    >>> before, growth = net(x), widen_conv(net[0], net[1:], 3)
    >>> net[0].out_channels, net[2].in_channels, torch.allclose(net(x), before, atol=1e-6)
    (7, 7, True)
    """
    in_range("n", n, n > 0, "an integer > 0")
    in_range("noise", noise, noise >= 0, ">= 0")
    in_range("preserve", preserve, preserve in PRESERVE, " or ".join(PRESERVE))
    in_range("conv.groups", conv.groups, conv.groups == 1, "1")
    growth, width = Growth(), conv.out_channels
    following = [entry if isinstance(entry, tuple) else (entry, 0) for entry in next_modules]
    for module, start in following:
        _check(module, start, width)
    _grow(growth, conv, "weight", 0, width, n, noise)
    _grow(growth, conv, "bias", 0, width, n, 0.0)
    conv.out_channels += n
    for module, start in following:
        _take(growth, module, start, width, n, noise if preserve == "paper" else 0.0)
    return growth


def _check(module: nn.Module, start: int, width: int) -> None:
    seen = {"Conv2d": "in_channels", "Linear": "in_features", "PReLU": "num_parameters"}
    name = "num_features" if isinstance(module, _BatchNorm) else seen.get(type(module).__name__, "")
    size = getattr(module, name, None)
    if size is None:
        in_range("next_modules", module, next(module.parameters(), None) is None, "Conv2d, Linear, batch norm or PReLU")
    elif isinstance(module, nn.Conv2d):
        in_range("next_modules", module, module.groups == 1 and start + width <= size, f"takes {width} channels")
    elif isinstance(module, nn.Linear):
        in_range("next_modules", module, start == 0 and size % width == 0, f"all its inputs are of {width} channels")
    else:
        in_range("next_modules", module, size == width or (size == 1 and name == "num_parameters"), f"of {width}")


def _take(growth: Growth, module: nn.Module, start: int, width: int, n: int, noise: float) -> None:
    if isinstance(module, nn.Conv2d):
        _grow(growth, module, "weight", 1, start + width, n, noise)
        module.in_channels += n
    elif isinstance(module, nn.Linear):
        each = module.in_features // width  # one channel's places, side by side after flattening
        _grow(growth, module, "weight", 1, module.in_features, n * each, noise)
        module.in_features += n * each
    elif isinstance(module, nn.PReLU) and module.num_parameters > 1:
        _grow(growth, module, "weight", 0, width, n, 0.0, 1.0)
        module.num_parameters += n
    elif isinstance(module, _BatchNorm):
        for name, fill in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            _grow(growth, module, name, 0, width, n, 0.0, fill)
        module.num_features += n


def _grow(
    growth: Growth, module: nn.Module, name: str, dim: int, position: int, n: int, noise: float, fill: float = 0.0
) -> None:
    """Put ``n`` entries of ``fill`` + noise into a parameter or buffer before ``position`` of ``dim``."""
    old = getattr(module, name)
    if old is None:
        return
    shape = [n if d == dim else size for d, size in enumerate(old.shape)]
    kept = old.shape[dim] - position

    def embed(tensor: Tensor, between: Tensor | None = None) -> Tensor:
        middle = tensor.new_zeros(shape) if between is None else between
        return torch.cat([tensor.narrow(dim, 0, position), middle, tensor.narrow(dim, position, kept)], dim)

    entries = old.detach().new_full(shape, fill)
    if noise:
        entries += noise * torch.randn_like(entries)
    value = embed(old.detach(), entries)
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(value, requires_grad=old.requires_grad)
        growth.replaced.append((old, new, embed))
        setattr(module, name, new)
    else:
        setattr(module, name, value)
