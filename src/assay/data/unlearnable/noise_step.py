"""Noise for one batch, with the weights as they are: what the generation does over and over."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.data._checks import count
from assay.data.unlearnable.pgd import (
    Bounds,
    Loss,
    amount,
    check_inputs,
    clip,
    in_evaluation_mode,
    input_gradient,
    pgd,
    uniform,
    whole,
)

Transform = Callable[[Tensor], Tensor] | None


def robust_noise_step(
    model: nn.Module | Callable[[Tensor], Any],
    x: Tensor,
    y: Any,
    *,
    radius: float = 8 / 255,
    adv_radius: float = 4 / 255,
    steps: int = 10,
    step_size: float = 1.6 / 255,
    adv_steps: int = 10,
    adv_step_size: float = 0.8 / 255,
    transform: Transform = None,
    samples: int = 5,
    random_start: bool = True,
    bounds: Bounds = (0, 1),
    adv_bounds: Bounds = (0, 1),
    loss_fn: Loss = F.cross_entropy,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Noise d for a batch that lowers the loss which an adversary of ``adv_radius`` can still reach, weights fixed.

    From d drawn evenly from [-radius, radius], or 0, ``steps`` times ::

        for each of ``samples`` draws t of ``transform``:
            z  = t(clip(x + d, bounds))
            z' = the end of PGD ascent from z, at most adv_radius away (linf), in adv_bounds
            g += d loss_fn(model(z'), y) / d z', carried back from z to d as if z' - z were a constant
        d = clip(d - step_size * sign(g), -radius, radius)

    It approximates min over d of E_t max over ||a|| <= adv_radius of loss(model(t(x + d) + a), y). With
    ``adv_radius=0`` there is no adversary. The model is left as :func:`pgd` leaves it.

    Args:
        model, y, loss_fn: as in :func:`pgd`.
        x: inputs (b, ...), floating point, in ``bounds``.
        radius, adv_radius: >= 0.
        steps, adv_steps: integers >= 0; ``steps=0`` gives d = 0.
        step_size, adv_step_size: >= 0.
        transform: a differentiable function of a batch, which draws for every image on its own, such as
            :func:`random_crop_flip`; None: none.
        samples: draws of the transform for one step, at least 1.
        random_start: whether d and the adversary start from an even draw.
        bounds: (low, high) of the images, or None.
        adv_bounds: the same behind ``transform``, if that normalizes.
        generator: draws the starts; None: torch's global one. The transform has a generator of its own.

    Returns:
        d, a tensor like ``x``, in [-radius, radius], not rounded.

    Raises:
        ValueError: an argument out of range, or a transform through which no gradient passes.

    Source:
        Fu et al.: Robust Unlearnable Examples, ICLR 2022, arXiv 2203.14533, section 4.

    Example:
        >>> import torch
        >>> from assay.data import robust_noise_step
        >>> def model(x):
        ...     return torch.cat([-x, x], 1)
        >>> x, y = torch.tensor([[0.5], [0.5]]), torch.tensor([0, 1])
        >>> robust_noise_step(model, x, y, radius=0.1, adv_radius=0.05, step_size=0.02).flatten()
        tensor([-0.1000,  0.1000])
    """
    check_step(radius, adv_radius, steps, step_size, adv_steps, adv_step_size, samples)
    check_inputs(x, bounds)
    check_inputs(x, adv_bounds, "adv_bounds")
    x = x.detach()
    noise = torch.zeros_like(x)
    if steps == 0 or radius == 0:
        return noise
    if random_start:
        noise = radius * uniform(x, generator)
    attack = functools.partial(
        pgd,
        model,
        radius=adv_radius,
        steps=adv_steps,
        step_size=adv_step_size,
        random_start=random_start,
        bounds=adv_bounds,
        loss_fn=loss_fn,
        generator=generator,
    )
    with in_evaluation_mode(model), torch.enable_grad():
        for _ in range(steps):
            d = noise.requires_grad_()
            slope = torch.zeros_like(x)
            for _ in range(samples):
                z = transformed(clip(x + d, bounds), transform)
                if not z.requires_grad:
                    raise ValueError(
                        f"transform = {transform!r} is out of range: a function through which gradients pass"
                    )
                gradient = input_gradient(model, attack(z.detach(), y), y, loss_fn)
                slope += torch.autograd.grad(z, d, gradient)[0]
            noise = (d.detach() - step_size * slope.sign()).clamp(-radius, radius)
    return noise


def transformed(x: Tensor, transform: Transform) -> Tensor:
    return x if transform is None else transform(x)


def check_step(
    radius: float,
    adv_radius: float,
    steps: int,
    step_size: float,
    adv_steps: int,
    adv_step_size: float,
    samples: int,
    random_start: bool = True,
) -> None:
    sizes = {"radius": radius, "adv_radius": adv_radius, "step_size": step_size, "adv_step_size": adv_step_size}
    for name, value in sizes.items():
        amount(name, value)
    whole("steps", steps)
    whole("adv_steps", adv_steps)
    count("samples", samples)
