"""Projected gradient steps on a model's inputs, up or down its loss, inside a ball around them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay._modes import evaluating
from assay.data._checks import one_of

NORMS = ("linf", "l2", "l1")
Bounds = tuple[Any, Any] | None
Loss = Callable[[Any, Any], Tensor]


def pgd(
    model: nn.Module | Callable[[Tensor], Any],
    x: Tensor,
    y: Any,
    *,
    radius: float | Tensor,
    steps: int,
    step_size: float | Tensor,
    norm: str = "linf",
    direction: int = +1,
    random_start: bool = False,
    bounds: Bounds = (0, 1),
    loss_fn: Loss = F.cross_entropy,
    generator: torch.Generator | None = None,
    projection: str = "radial",
) -> Tensor:
    """Projected gradient ascent (``direction=1``) or descent (-1) of the loss, over inputs near ``x``.

    From z = x, or a point drawn evenly from the ball, ``steps`` times ::

        g = d loss_fn(model(z), y) / d z
        z = z + direction * step_size * u(g)      u = sign(g) for linf, g / ||g||_2 for l2, g / ||g||_1 for l1
        z = x + (z - x brought back into the ball of ``radius``), clipped to ``bounds``

    each example in a ball of its own, for which all of its entries count. Only the inputs are differentiated: the
    model's weights, gradients, ``requires_grad`` and buffers stay as they are. It runs in evaluation mode, and every
    module gets its own mode back.

    Args:
        model: maps a batch to what ``loss_fn`` takes; a module, or any function.
        x: inputs (b, ...), floating point, inside ``bounds``; not changed.
        y: targets for ``loss_fn``.
        radius: of the ball, >= 0; a number, or a tensor (b,) with one for each example. At 0 the result is ``x``.
        steps: an integer >= 0; 0 gives the start.
        step_size: >= 0; a number, or a tensor (b,).
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        direction: +1 raises the loss, -1 lowers it.
        random_start: start from an even draw out of the ball.
        bounds: (low, high) for every entry, numbers or tensors that broadcast; None: no limits.
        loss_fn: ``loss_fn(output, y)``; summed where it is not a scalar.
        generator: draws the start; None: torch's global one.
        projection: for l1, ``"radial"``: straight towards x, as the authors do; ``"euclidean"``: onto the nearest point
            of the ball, which keeps fewer entries. The two are the same for l2, and linf knows the second alone.

    Returns:
        A tensor like ``x``, without gradient.

    Raises:
        ValueError: an argument out of range.

    Source:
        Madry et al., arXiv 1706.06083; as used in Fu et al.: Robust Unlearnable Examples, ICLR 2022, arXiv 2203.14533.
        The euclidean projection onto the l1 ball is that of Duchi et al., ICML 2008.

    Example:
        >>> import torch
        >>> from assay.data import pgd
        >>> def model(x):  # two logits: the first falls with x, the second rises
        ...     return torch.stack([-x, x], 1)
        >>> x, y = torch.tensor([0.5, 0.5]), torch.tensor([0, 1])
        >>> pgd(model, x, y, radius=0.1, steps=5, step_size=0.04)
        tensor([0.6000, 0.4000])
        >>> pgd(model, x, y, radius=0.1, steps=2, step_size=0.04, direction=-1)
        tensor([0.4200, 0.5800])
    """
    one_of("norm", norm, NORMS)
    one_of("direction", direction, (1, -1))
    one_of("projection", projection, ("euclidean", "radial"))
    whole("steps", steps)
    check_inputs(x, bounds)
    if not isinstance(radius, Tensor) and radius == 0:
        return x.detach().clone()
    radius, step_size = _per_example("radius", radius, x), _per_example("step_size", step_size, x)

    def nearest(z: Tensor) -> Tensor:
        return clip(x + _projected(z - x, radius, norm, projection), bounds)

    x = z = x.detach()
    if random_start:
        z = nearest(x + radius * _in_unit_ball(x, norm, generator))
    with in_evaluation_mode(model):
        for _ in range(steps):
            gradient = input_gradient(model, z, y, loss_fn)
            z = nearest(z + direction * step_size * _unit(gradient, norm))
    return z.clone() if z is x else z


def input_gradient(model: Callable[[Tensor], Any], z: Tensor, y: Any, loss_fn: Loss) -> Tensor:
    """d loss / d z, also where the caller records no gradients."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        return torch.autograd.grad(loss_fn(model(z), y).sum(), z)[0]


def in_evaluation_mode(model: Any) -> contextlib.AbstractContextManager[None]:
    return evaluating(model) if isinstance(model, nn.Module) else contextlib.nullcontext()


def clip(x: Tensor, bounds: Bounds) -> Tensor:
    return x if bounds is None else x.clamp(*bounds)


def uniform(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Even draws from [-1, 1), on the generator's device and then on that of ``like``."""
    return 2 * torch.rand(like.shape, dtype=like.dtype, **_place(like, generator)).to(like.device) - 1


def _place(like: Tensor, generator: torch.Generator | None) -> dict[str, Any]:
    return {"generator": generator, "device": like.device if generator is None else generator.device}


def _in_unit_ball(like: Tensor, norm: str, generator: torch.Generator | None) -> Tensor:
    """Even draws from the unit ball of each example."""
    if norm == "linf":
        return uniform(like, generator)
    place = _place(like, generator)
    # Two further normal, or one further exponential, coordinates that are dropped make the draw even in the ball.
    size = (len(like), math.prod(like.shape[1:]) + (2 if norm == "l2" else 1))
    if norm == "l2":
        drawn = torch.randn(size, dtype=like.dtype, **place)
        drawn = (drawn / drawn.norm(dim=1, keepdim=True))[:, :-2]
    else:
        drawn = torch.empty(size, dtype=like.dtype, device=place["device"]).exponential_(generator=generator)
        signs = torch.randint(0, 2, (size[0], size[1] - 1), **place) * 2 - 1
        drawn = signs * (drawn / drawn.sum(1, keepdim=True))[:, :-1]
    return drawn.to(like.device).view_as(like)


def _unit(gradient: Tensor, norm: str) -> Tensor:
    """The direction of a step; a gradient of zero has none."""
    if norm == "linf":
        return gradient.sign()
    length = _length(gradient, norm)
    return gradient / length.where(length > 0, 1)


def _projected(delta: Tensor, radius: Any, norm: str, projection: str) -> Tensor:
    if norm == "linf":
        return delta.clamp(-radius, radius)
    if norm == "l1" and projection == "euclidean":
        delta = _onto_l1_ball(delta, radius)
    length = _length(delta, norm)  # after the l1 projection, this takes back no more than its rounding
    return delta * (radius / length.clamp(min=torch.finfo(length.dtype).tiny)).clamp(max=1)


def _onto_l1_ball(delta: Tensor, radius: Any) -> Tensor:
    """Nearest point in the l1 ball: all sizes shrink by one threshold, at which they sum to the radius."""
    sizes = delta.reshape(len(delta), -1).abs()
    radius = radius.view(-1, 1) if isinstance(radius, Tensor) else radius
    falling = sizes.sort(dim=1, descending=True).values
    excess = falling.cumsum(1) - radius
    rank = torch.arange(1, sizes.shape[1] + 1, device=sizes.device)
    kept = (falling * rank > excess).sum(1, keepdim=True).clamp(min=1)
    threshold = (excess.gather(1, kept - 1) / kept).clamp(min=0)  # below 0 where delta is inside already
    return delta.sign() * (sizes - threshold).clamp(min=0).view_as(delta)


def _length(delta: Tensor, norm: str) -> Tensor:
    """Each example's norm, shaped to broadcast."""
    flat = delta.reshape(len(delta), -1)
    length = flat.norm(dim=1) if norm == "l2" else flat.abs().sum(1)
    return length.view(-1, *[1] * (delta.dim() - 1))


def _per_example(name: str, value: float | Tensor, x: Tensor) -> Any:
    if not isinstance(value, Tensor) or value.dim() == 0:
        return amount(name, float(value))
    if value.shape != x.shape[:1]:
        raise ValueError(f"{name}.shape = {tuple(value.shape)} is out of range: ({len(x)},)")
    if not bool((value >= 0).all()):
        raise ValueError(f"{name} = {value} is out of range: >= 0")
    return value.to(x).view(-1, *[1] * (x.dim() - 1))


def amount(name: str, value: float, most: float = math.inf, allowed: str = ">= 0") -> float:
    if isinstance(value, bool) or not (0 <= value <= most and math.isfinite(value)):
        raise ValueError(f"{name} = {value!r} is out of range: {allowed}")
    return value


def whole(name: str, value: int, least: int = 0) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} = {value!r} is out of range: an integer >= {least}")


def check_inputs(x: Tensor, bounds: Bounds, name: str = "bounds") -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 1:
        found = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x = {found} is out of range: a floating point tensor (b, ...)")
    if bounds is not None and not (len(bounds) == 2 and bool(torch.as_tensor(bounds[0] < bounds[1]).all())):
        raise ValueError(f"{name} = {bounds!r} is out of range: (low, high) with low < high, or None")
