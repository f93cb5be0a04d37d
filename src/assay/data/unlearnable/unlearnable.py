"""Unlearnable examples: noise on images from which a network that trains on them, or on their worst neighbours, learns
little, because the noise has lowered the loss already."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from assay.data._checks import count
from assay.data.unlearnable.crop_flip import random_crop_flip
from assay.data.unlearnable.generation import Checkpoint, Generation, Optimizer
from assay.data.unlearnable.noise import Noise
from assay.data.unlearnable.noise_step import Transform, check_step, robust_noise_step, transformed
from assay.data.unlearnable.pgd import Bounds, amount, clip, pgd, whole

__all__ = [
    "Noise",
    "error_minimizing_noise",
    "pgd",
    "random_crop_flip",
    "robust_error_minimizing_noise",
    "robust_noise_step",
]


def error_minimizing_noise(
    model: nn.Module,
    dataset: Any,
    *,
    radius: float = 8 / 255,
    steps: int = 10,
    step_size: float | None = None,
    train_steps: int = 5000,
    optimizer: Optimizer = None,
    batch_size: int = 128,
    random_start: bool = True,
    generator: torch.Generator | None = None,
    perturb_freq: int = 1,
    checkpoint: Checkpoint = None,
    checkpoint_every: int = 500,
) -> Noise:
    """Error-minimizing noise (EM): a network that is trained on images with it finds its loss low, and learns little.

    Approximately ::

        min over the weights of the mean over i of  min over ||d_i||_inf <= radius of  CE(model(x_i + d_i), y_i)

    It is :func:`robust_error_minimizing_noise` without adversary and transform, step for step: that with
    ``adv_radius=0, transform=None, samples=1``. Training on the result by adversarial training undoes it.

    Args:
        step_size: of the noise; None: ``radius / 5``.
        model, dataset, radius, steps, train_steps, optimizer, batch_size, random_start, generator, perturb_freq,
            checkpoint, checkpoint_every: as in :func:`robust_error_minimizing_noise`.

    Returns:
        The :class:`Noise` of the dataset.

    Raises:
        ValueError, FloatingPointError: as in :func:`robust_error_minimizing_noise`.

    Source:
        Huang et al.: Unlearnable Examples, ICLR 2021, arXiv 2101.04898; the baseline of Fu et al., arXiv 2203.14533.

    Example:
        >>> import torch
        >>> from assay.data import error_minimizing_noise
        >>> _ = torch.manual_seed(0)
        >>> dataset = torch.utils.data.TensorDataset(torch.rand(10, 1, 4, 4), torch.arange(10) % 2)
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2))
        >>> noise = error_minimizing_noise(model, dataset, train_steps=20, batch_size=4)
        >>> noise.shape, noise.dtype, noise.max_abs
        (torch.Size([10, 1, 4, 4]), torch.int8, 8)
        >>> protected = noise.apply(dataset)
    """
    return _generated(
        model,
        dataset,
        {
            "radius": radius,
            "adv_radius": 0.0,
            "steps": steps,
            "step_size": radius / 5 if step_size is None else step_size,
            "adv_steps": 0,
            "adv_step_size": 0.0,
            "samples": 1,
            "random_start": random_start,
        },
        transform=None,
        generator=generator,
        train_steps=train_steps,
        optimizer=optimizer,
        lr_schedule=None,
        batch_size=batch_size,
        regenerate=True,
        perturb_freq=perturb_freq,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
    )


def robust_error_minimizing_noise(
    model: nn.Module,
    dataset: Any,
    *,
    radius: float = 8 / 255,
    adv_radius: float = 4 / 255,
    steps: int = 10,
    step_size: float = 1.6 / 255,
    adv_steps: int = 10,
    adv_step_size: float = 0.8 / 255,
    transform: Transform = None,
    samples: int = 5,
    train_steps: int = 5000,
    optimizer: Optimizer = None,
    lr_schedule: Callable[[int], float] | None = None,
    batch_size: int = 128,
    random_start: bool = True,
    generator: torch.Generator | None = None,
    regenerate: bool = True,
    adv_bounds: Bounds = (0, 1),
    perturb_freq: int = 1,
    checkpoint: Checkpoint = None,
    checkpoint_every: int = 500,
) -> Noise:
    """Robust error-minimizing noise (REM): images with it leave little to learn to adversarial training as well.

    Approximately, with t drawn from ``transform`` ::

        min over the weights of the mean over i of  min over ||d_i||_inf <= radius of
            E_t max over ||a||_inf <= adv_radius of  CE(model(t(x_i + d_i) + a), y_i)

    Noise and weights take turns. Each of ``train_steps`` steps, on a batch of a shuffled pass over the data,

    1. makes the batch's noise anew for the weights as they are (:func:`robust_noise_step`), every ``perturb_freq``
       steps, and keeps it rounded to 255ths;
    2. trains the weights by one step of the optimizer on the worst neighbours (PGD ascent within ``adv_radius``) of
       the transformed images with noise.

    Then every image, also those of the last, incomplete batch, gets its noise for the final weights. ``model`` is
    the network that the noise is made with, and is trained in place; its modules' modes are put back.

    Args:
        model: a network of images in [0, 1], any normalization included, that returns logits.
        dataset: map-style, of examples (image, label, ...), without augmentation; images (C, H, W), or of any other
            one shape, uint8 or floating point in [0, 1].
        radius: of the noise, in [0, 127/255].
        adv_radius: of the adversary, >= 0; above ``radius`` it warns, since the adversary can then undo the noise.
        steps, step_size, adv_steps, adv_step_size, transform, samples, random_start, adv_bounds: as in
            :func:`robust_noise_step`, the adversary's also for the training of the weights.
        train_steps: an integer >= 0.
        optimizer: of the model's parameters, or a function of them that makes one; None: SGD, learning rate 0.1,
            momentum 0.9, weight decay 5e-4.
        lr_schedule: factor on the learning rates in step 0, 1, ...; None: a tenth after every 2,000 steps with the
            default optimizer, else 1. Afterwards the optimizer has its own rates back.
        batch_size: at least 1.
        generator: draws the order and the starts; None: torch's global one. With equal generators (the transform's
            included) the noise is the same.
        regenerate: whether to make the final noise; without, an image has the noise of its last visit, if any.
        perturb_freq: at least 1.
        checkpoint: a file to write the state to, every ``checkpoint_every`` steps and at the end, and to go on from
            if it exists: weights, optimizer, noise, order and random states (torch's, the generator's, and that of
            the transform's attribute ``generator``). The result is that of a run without a break, to the bit.

    Returns:
        The :class:`Noise` of the dataset.

    Raises:
        ValueError: an argument out of range, images of another kind, or a checkpoint of another run.
        FloatingPointError: the model's loss is not finite.

    Source:
        Fu et al.: Robust Unlearnable Examples, ICLR 2022, arXiv 2203.14533.

    Example:
        >>> import torch
        >>> from assay.data import random_crop_flip, robust_error_minimizing_noise
        >>> _ = torch.manual_seed(0)
        >>> dataset = torch.utils.data.TensorDataset(torch.rand(10, 1, 4, 4), torch.arange(10) % 2)
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2))
        >>> noise = robust_error_minimizing_noise(
        ...     model, dataset, transform=random_crop_flip(1), samples=2, train_steps=5, batch_size=4
        ... )
        >>> noise.shape, noise.max_abs
        (torch.Size([10, 1, 4, 4]), 8)
    """
    return _generated(
        model,
        dataset,
        {
            "radius": radius,
            "adv_radius": adv_radius,
            "steps": steps,
            "step_size": step_size,
            "adv_steps": adv_steps,
            "adv_step_size": adv_step_size,
            "samples": samples,
            "random_start": random_start,
        },
        adv_bounds=adv_bounds,
        transform=transform,
        generator=generator,
        train_steps=train_steps,
        optimizer=optimizer,
        lr_schedule=lr_schedule,
        batch_size=batch_size,
        regenerate=regenerate,
        perturb_freq=perturb_freq,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
    )


def _generated(
    model: nn.Module,
    dataset: Any,
    step: dict[str, Any],
    *,
    transform: Transform,
    generator: torch.Generator | None,
    train_steps: int,
    batch_size: int,
    perturb_freq: int,
    regenerate: bool,
    checkpoint: Checkpoint,
    checkpoint_every: int,
    adv_bounds: Bounds = (0, 1),
    **training: Any,
) -> Noise:
    """``step`` holds the numbers of :func:`robust_noise_step`, of which the adversary of the weights takes its own."""
    check_step(**step)
    amount("radius", step["radius"], 127 / 255, "[0, 127/255]")
    if step["adv_radius"] > step["radius"]:
        sizes = f"adv_radius = {step['adv_radius']:.4g} is above radius = {step['radius']:.4g}"
        warnings.warn(f"{sizes}: the adversary can undo the noise", stacklevel=3)
    whole("train_steps", train_steps)
    count("batch_size", batch_size)
    count("perturb_freq", perturb_freq)
    count("checkpoint_every", checkpoint_every)
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise ValueError(f"dataset is a {type(dataset).__name__}, not a map-style dataset (__len__ and __getitem__)")
    if len(dataset) == 0:
        raise ValueError("dataset is empty: there is nothing to protect")
    attack = functools.partial(
        pgd,
        model,
        radius=step["adv_radius"],
        steps=step["adv_steps"],
        step_size=step["adv_step_size"],
        random_start=step["random_start"],
        bounds=adv_bounds,
        generator=generator,
    )
    generation = Generation(
        model,
        dataset,
        noise_step=functools.partial(
            robust_noise_step, model, transform=transform, generator=generator, adv_bounds=adv_bounds, **step
        ),
        view=lambda x, y: attack(clip(transformed(x, transform), adv_bounds), y),
        numbers={**step, "train_steps": train_steps, "perturb_freq": perturb_freq, "regenerate": regenerate},
        batch_size=batch_size,
        generator=generator,
        transform_generator=getattr(transform, "generator", None),
        **training,
    )
    return generation.run(checkpoint, checkpoint_every)
