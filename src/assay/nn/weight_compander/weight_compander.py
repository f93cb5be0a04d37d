"""Weight compander: weights that are a bounded function of what is trained, so that they spread instead of growing."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from assay._checks import in_range
from assay.nn._swap import NoEffectWarning

if TYPE_CHECKING:
    from assay.bench.recipe import Recipe, Run

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_EXPONENT = 30.0  # how far exp(alpha) may take a or b: beyond, float32 would come to 0 or infinity


def _psi(v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    # The nearest number to pi/2 may lie above it; two units less in the last place keep every weight below a pi/2.
    return torch.atan(v / b) * (a * (1 - 2 * torch.finfo(a.dtype).eps))


class WeightCompander(nn.Module):
    """A weight as an odd, increasing, bounded function of a latent one, for ``torch.nn.utils.parametrize``.

    ::

        w = a arctan(v / b)                     |w| < a pi/2,  dw/dv = (a/b) / (1 + (v/b)^2)
        v = b tan(w / a)                        ``right_inverse``, with |w| clamped at 0.99 a pi/2

    v is what is stored and trained. Small weights move a/b times as far as v does, large ones hardly move.

    With ``learnable``, a = a0 exp(alpha) and b = b0 exp(beta): alpha and beta are parameters that start at 0, act
    within [-30, 30], and have their gradients divided by sqrt(number of weights that share them), without which the sum
    over all weights makes training diverge. They should have no weight decay: :func:`compander_groups`.

    Args:
        a, b: > 0, numbers or tensors that broadcast to ``shape``.
        learnable: train them.
        shape: of a and b; () is one pair for all weights, (C, 1) one for each row of (C, K).
        dtype: of a and b; None: that of a tensor, float64 for a number.

    Input and output have the shape and dtype of the weight; half precision is computed in float32.

    Raises:
        ValueError: a or b is not > 0 and finite.

    Source: R. Cakaj, J. Mehnert, B. Yang, Weight Compander, 2023, arXiv 2306.16993.

    >>> import torch
    >>> from assay.nn import WeightCompander
    >>> psi = WeightCompander(a=2.0, b=1.0)
    >>> psi(torch.tensor([-100.0, 0.0, 0.1, 100.0]))
    tensor([-3.1216,  0.0000,  0.1993,  3.1216])
    """

    a0: Tensor
    b0: Tensor
    alpha: nn.Parameter | None
    beta: nn.Parameter | None

    def __init__(
        self,
        a: float | Tensor,
        b: float | Tensor,
        *,
        learnable: bool = False,
        shape: tuple[int, ...] = (),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.learnable = learnable
        for name, value in (("a", a), ("b", b)):
            scale = value.detach() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
            in_range(name, value, bool(((scale > 0) & scale.isfinite()).all()), "> 0 and finite")
            self.register_buffer(f"{name}0", scale.to(device, dtype).expand(shape).clone())
        for name, like in (("alpha", self.a0), ("beta", self.b0)):
            self.register_parameter(name, nn.Parameter(torch.zeros_like(like)) if learnable else None)

    @property
    def a(self) -> Tensor:
        """a as it is now."""
        return self._scale(self.a0, self.alpha)

    @property
    def b(self) -> Tensor:
        """b as it is now."""
        return self._scale(self.b0, self.beta)

    def _scale(self, start: Tensor, exponent: Tensor | None, share: float = 1.0) -> Tensor:
        if exponent is None:
            return start
        exponent = share * exponent + (1 - share) * exponent.detach()  # the same value, ``share`` of the gradient
        return start * exponent.clamp(-_EXPONENT, _EXPONENT).exp()

    def forward(self, v: Tensor) -> Tensor:
        share = (self.a0.numel() / max(1, v.numel())) ** 0.5
        dtype = torch.promote_types(v.dtype, torch.float32)
        a, b = (self._scale(*pair, share).to(dtype) for pair in ((self.a0, self.alpha), (self.b0, self.beta)))
        return _psi(v.to(dtype), a, b).to(v.dtype)

    def right_inverse(self, w: Tensor) -> Tensor:
        """v with ``forward(v) = w``; a weight beyond 0.99 a pi/2 counts as that."""
        a, b, edge = self.a.detach(), self.b.detach(), 0.99 * math.pi / 2
        return (b * torch.tan((w / a).clamp(-edge, edge))).to(w.dtype)

    def extra_repr(self) -> str:
        sizes = f"shape={tuple(self.a0.shape)}" if self.a0.dim() else f"a={self.a.item():.3g}, b={self.b.item():.3g}"
        return f"{sizes}, learnable={self.learnable}" if not self.a0.is_meta else f"learnable={self.learnable}"


def weight_compander(
    module: nn.Module,
    name: str = "weight",
    *,
    a: float | Tensor | None = None,
    b: float | Tensor | None = None,
    learnable: bool = False,
    granularity: str = "layer",
    init: str = "standard",
) -> nn.Module:
    """Make a parameter of ``module`` a companded one: ``w = a arctan(v / b)``, trained through v.

    v takes the parameter's place in ``module.parameters()``, as the same object; ``module.weight`` is w, computed anew
    at each use (within ``torch.nn.utils.parametrize.cached()`` once). Weight decay acts on v.

    Args:
        module: any layer, in place. A parameter that has a parametrization already (weight norm) gets this one on top.
        name: of the parameter.
        a, b: > 0; None for twice and once the standard deviation of the weights, for a bound of 3.14 of them.
        learnable: train a and b, see :class:`WeightCompander`.
        granularity: "layer": one pair; "channel": one for each index of the first dimension.
        init: "standard": v starts as the weights were, so that small ones become a/b times as large; "preserve": w
            does, and the module computes what it did before, up to weights beyond 0.99 a pi/2.

    Returns:
        ``module``.

    Raises:
        ValueError: an argument out of range, weights without spread where a or b is None, or a companded parameter.

    Source: R. Cakaj, J. Mehnert, B. Yang, Weight Compander, 2023, arXiv 2306.16993.

    >>> import torch
    >>> from assay.nn import weight_compander
    >>> layer = weight_compander(torch.nn.Linear(64, 32), a=0.1, b=0.05)
    >>> bool((layer.weight.abs() < 0.1 * torch.pi / 2).all()), [name for name, _ in layer.named_parameters()]
    (True, ['bias', 'parametrizations.weight.original'])
    """
    in_range("granularity", granularity, granularity in ("layer", "channel"), "layer or channel")
    in_range("init", init, init in ("standard", "preserve"), "standard or preserve")
    in_range("name", name, isinstance(getattr(module, name, None), Tensor), "a parameter of the module")
    in_range("name", name, compander_of(module, name) is None, "a parameter that is not companded yet")
    weight = getattr(module, name).detach()
    shape: tuple[int, ...] = ()
    spread = weight.std() if weight.numel() > 1 else weight.new_zeros(())
    if granularity == "channel":
        shape = (len(weight), *[1] * (weight.dim() - 1))
        spread = weight.flatten(1).std(1).view(shape) if weight[0].numel() > 1 else weight.new_zeros(shape)
    a, b = 2 * spread if a is None else a, spread if b is None else b
    compander = WeightCompander(a, b, learnable=learnable, shape=shape, device=weight.device, dtype=weight.dtype)
    return _register(module, name, compander, None if init == "preserve" else weight.clone())


def _register(module: nn.Module, name: str, compander: WeightCompander, latent: Tensor | None) -> nn.Module:
    """Put the compander on the parameter; ``latent`` are the values of v, None for those that keep the weights."""
    before = getattr(module, name).detach().clone()
    stacked = parametrize.is_parametrized(module, name)
    parametrize.register_parametrization(module, name, compander)
    if stacked and latent is None:
        setattr(module, name, before)  # goes through all inverses
    elif not stacked and latent is not None:
        with torch.no_grad():
            getattr(module.parametrizations, name).original.copy_(latent)
    return module


def compander_of(module: nn.Module, name: str = "weight") -> WeightCompander | None:
    """The compander of a module's parameter, if there is one."""
    if not parametrize.is_parametrized(module, name):
        return None
    chain = module.get_submodule(f"parametrizations.{name}").children()
    return next((part for part in chain if isinstance(part, WeightCompander)), None)


def compand(
    model: nn.Module,
    *,
    types: type[nn.Module] | tuple[type[nn.Module], ...] = LAYERS,
    skip: Collection[str | nn.Module] = (),
    **kw: Any,
) -> int:
    """:func:`weight_compander` for the weight of every linear and convolution layer of ``model``, in place.

    Biases, normalization and embeddings are left alone. Layers that share a weight share its compander. Call it before
    or after the optimizer is made, but before with ``learnable``.

    Args:
        model: any module.
        types: classes of the layers, subclasses included.
        skip: layers to leave alone, as modules or by their dotted names.
        kw: a, b, learnable, granularity and init of :func:`weight_compander`.

    Returns:
        How many layers were changed; those that are companded already are not.

    Raises:
        ValueError: as :func:`weight_compander`.

    Warns:
        NoEffectWarning: none was.

    >>> from torch import nn
    >>> from assay.nn import compand
    >>> compand(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 4)), skip=["3"])
    1
    """
    changed, shared = 0, dict[nn.Parameter, WeightCompander]()
    for layer in _layers(model, types, skip):
        weight = layer._parameters.get("weight")
        if weight is not None and weight in shared:
            _register(layer, "weight", shared[weight], weight.detach().clone())
        else:
            weight_compander(layer, **kw)
            if weight is not None and (compander := compander_of(layer)):
                shared[weight] = compander
        changed += 1
    if not changed:
        warnings.warn("compand changed nothing: no layer to compand that is not yet", NoEffectWarning, stacklevel=2)
    return changed


def _layers(
    model: nn.Module, types: type[nn.Module] | tuple[type[nn.Module], ...], skip: Collection[str | nn.Module]
) -> Iterator[nn.Module]:
    for name, layer in list(model.named_modules()):
        skipped = any(layer is left or name == left for left in skip)
        if isinstance(layer, types) and not skipped and compander_of(layer) is None:
            yield layer


def fuse_compander(model: nn.Module) -> nn.Module:
    """Turn every companded parameter of ``model`` into a plain one that holds w, in place, for inference.

    The outputs stay the same, and ``state_dict`` has the keys of the plain model. Parametrizations that the parameter
    has beside the compander are fused with it. A v shared by several layers becomes one w shared by them.

    Returns:
        ``model``.

    >>> import torch
    >>> from assay.nn import fuse_compander, weight_compander
    >>> list(fuse_compander(weight_compander(torch.nn.Linear(4, 2))).state_dict())
    ['weight', 'bias']
    """
    found = [
        (module, name, getattr(module, name).detach().clone())
        for module in model.modules()
        if parametrize.is_parametrized(module)
        for name, _ in module.get_submodule("parametrizations").named_children()
        if compander_of(module, name) is not None
    ]
    # Two steps: fusing one layer changes a shared v, which the others would then take for theirs.
    for module, name, _ in found:
        order = list(module._parameters)
        parametrize.remove_parametrizations(module, name, leave_parametrized=True)
        for other in order:
            module._parameters[other] = module._parameters.pop(other)  # first as ever, the bias after it
    with torch.no_grad():
        for module, name, weight in found:
            getattr(module, name).copy_(weight)
    return model


def compander_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: ``weight_decay`` for all parameters but those of a and b, which get 0.

    Args:
        model: any module.
        weight_decay: >= 0 and finite.

    Returns:
        One group, or two if there are learnable a and b.

    Raises:
        ValueError: weight_decay out of range.

    >>> import torch
    >>> from assay.nn import compander_groups, weight_compander
    >>> layer = weight_compander(torch.nn.Linear(4, 2), learnable=True)
    >>> [(len(group["params"]), group["weight_decay"]) for group in compander_groups(layer, 1e-2)]
    [(2, 0.01), (2, 0.0)]
    """
    in_range("weight_decay", weight_decay, 0 <= weight_decay < math.inf, ">= 0 and finite")
    free = {id(p) for m in model.modules() if isinstance(m, WeightCompander) for p in m.parameters()}
    kept, scales = ([p for p in model.parameters() if (id(p) in free) is inside] for inside in (False, True))
    groups = [{"params": kept, "weight_decay": weight_decay}, {"params": scales, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def apply(recipe: Recipe, *, bound: float = 2.0, gain: float = 2.0, init: str = "standard") -> Recipe:
    """The recipe with all linear and convolution weights companded.

    ``a`` is ``bound`` standard deviations of a layer's weights, and ``a / b`` is ``gain``.
    """
    for name, value in (("bound", bound), ("gain", gain)):
        in_range(name, value, 0 < value < math.inf, "> 0 and finite")
    in_range("init", init, init in ("standard", "preserve"), "standard or preserve")

    def model(run: Run) -> nn.Module:
        network = recipe.model(run)
        for layer in _layers(network, LAYERS, ()):
            a = bound * layer.weight.detach().std()  # type: ignore[operator]
            weight_compander(layer, a=a, b=a / gain, init=init)
        return network

    return replace(recipe, model=model)
