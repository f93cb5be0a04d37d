"""FerKD's claim on digits in clutter: doubtful labels replaced and hopeless ones dropped, against FKD and hard labels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay._modes import evaluating
from assay.bench.datasets import digits
from assay.bench.evidence import Bench, Check, Evidence, Rows, at_least, at_most
from assay.bench.statistics import mean_interval
from assay.data import random_crops, replay_crops, self_mix
from assay.losses import adapt_labels, ferkd_thresholds, soft_target_cross_entropy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLASSES, SIDE, CROP, PIECES = 10, 14, 12, 4
TEACHER, STUDENT, CROPS, PER_IMAGE, IMAGES = 1300, 300, 16, 4, 8
QUANTILES, DOUBTFUL = (0.02, 0.17, 1.0), (0.02, 0.32, 1.0)
HARD, FKD, FERKD = "hard labels", "FKD", "FerKD"
FERKD_SELFMIX, FKD_SELFMIX, FKD_CUTMIX = "FerKD + SelfMix", "FKD + SelfMix", "FKD + CutMix"
FKD_WRONG, FERKD_WRONG = "FKD, wrong teacher", "FerKD, wrong teacher"
VARIANTS = (HARD, FKD, FERKD, FERKD_SELFMIX, FKD_SELFMIX, FKD_CUTMIX, FKD_WRONG, FERKD_WRONG)
Adapt = Callable[..., tuple[Tensor, Tensor, Tensor]]


def with_the_teachers_own(probs: Tensor, targets: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The first broken variant: doubtful labels are replaced by the teacher's favourite class, not by the truth."""
    return adapt_labels(probs, probs.argmax(1), **options)


def without_discarding(
    probs: Tensor, targets: Tensor, *, t_low: float, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The second broken variant: hopeless crops are calibrated along with the doubtful ones."""
    return adapt_labels(probs, targets, t_low=0.0, **options)


class Crops(NamedTuple):
    """Of 300 images 16 crops each, one after the other: pixels (n, 1, 12, 12), the teacher's view, labels; and tests."""

    pixels: Tensor
    probs: Tensor
    targets: Tensor
    tests: Tensor
    answers: Tensor


def train(variant: str, seed: int, *, epochs: int, steps: int, adapt: Adapt, lr: float = 3e-3) -> dict[str, Any]:
    """A small CNN on the stored crops of 300 canvases, 4 of each image in a batch; tested on whole canvases."""
    crops = labelled(seed, steps)
    labels, keep = labels_of(variant, crops, adapt)
    torch.manual_seed(seed)
    model, draw = network(8), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    batches = STUDENT // IMAGES
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, epochs * batches)
    curve = []
    for _ in range(epochs):
        order = torch.randperm(STUDENT, generator=draw)
        for images in order[: batches * IMAGES].split(IMAGES):
            chosen = torch.rand(IMAGES, CROPS, generator=draw).argsort(1)[:, :PER_IMAGE]
            index = (images.unsqueeze(1) * CROPS + chosen).flatten()
            x, soft, used = crops.pixels[index], labels[index], keep[index]
            if variant.endswith("Mix"):
                x, soft = mixed(variant, x, soft, used, draw)
            loss = soft_target_cross_entropy(model(x), soft.masked_fill(~used.unsqueeze(1), -1.0), ignore_index=-1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        curve.append(accuracy(model, crops))
    measured = {"accuracy": curve[-1], "area": float(np.mean(curve)), "curve": [round(value, 2) for value in curve]}
    return measured | (mechanism(crops, adapt) if variant == FERKD else {})


def mixed(variant: str, x: Tensor, soft: Tensor, used: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    place = torch.arange(len(x))
    groups = torch.zeros_like(place) if variant == FKD_CUTMIX else place // PER_IMAGE
    return self_mix(x, soft, torch.where(used, groups, len(x) + place), generator=draw)


def labels_of(variant: str, crops: Crops, adapt: Adapt) -> tuple[Tensor, Tensor]:
    """Labels (n, C) of all stored crops, and which of them count."""
    everything = torch.ones(len(crops.targets), dtype=torch.bool)
    if variant == HARD:
        return F.one_hot(crops.targets, CLASSES).float(), everything
    probs, quantiles = crops.probs, QUANTILES
    if variant in (FKD_WRONG, FERKD_WRONG):
        probs, quantiles = misled(crops), DOUBTFUL
    if variant.startswith(FKD):
        return probs, everything
    t_low, t_mid, t_top = ferkd_thresholds(probs.amax(1), quantiles)
    labels, keep, _ = adapt(probs, crops.targets, t_low=t_low, t_mid=t_mid, t_top=t_top)
    return labels, keep


def misled(crops: Crops) -> Tensor:
    """The teacher's probabilities, but in the doubtful 30 % its favourite is always the class after the true one.

    The two classes exchange their probabilities, so that every confidence stays as it is.
    """
    low, mid, _ = ferkd_thresholds(crops.probs.amax(1), DOUBTFUL)
    sure, favourite = crops.probs.max(1)
    wrong, row = (crops.targets + 1) % CLASSES, torch.arange(len(sure))
    swapped = crops.probs.clone()
    swapped[row, favourite], swapped[row, wrong] = crops.probs[row, wrong], sure
    return torch.where(((sure >= low) & (sure < mid)).unsqueeze(1), swapped, crops.probs)


def mechanism(crops: Crops, adapt: Adapt) -> dict[str, float]:
    """What the labels do, and how much the mixed label of one crop varies from draw to draw."""
    t_low, t_mid, t_top = ferkd_thresholds(crops.probs.amax(1), QUANTILES)
    labels, keep, group = adapt(crops.probs, crops.targets, t_low=t_low, t_mid=t_mid, t_top=t_top)
    hopeless, doubtful = crops.probs.amax(1) < t_low, group == 1
    own = torch.arange(IMAGES * CROPS) // CROPS
    probs, pixels = crops.probs[: len(own)], crops.pixels[: len(own)]
    spread = [
        torch.stack(
            [
                self_mix(pixels, probs, groups, prob=1.0, generator=torch.Generator().manual_seed(k))[1]
                for k in range(50)
            ]
        )
        .var(0)
        .sum(1)
        .mean()
        .item()
        for groups in (own, torch.zeros_like(own))
    ]
    return {
        "hopeless used": keep[hopeless].float().mean().item(),
        "calibrated right": (labels.argmax(1) == crops.targets)[doubtful].float().mean().item(),
        "spread": spread[0] / spread[1],
    }


@torch.no_grad()
def accuracy(model: nn.Module, crops: Crops) -> float:
    with evaluating(model):
        return 100 * (model(crops.tests).argmax(1) == crops.answers).float().mean().item()


@functools.lru_cache(maxsize=1)
def labelled(seed: int, steps: int) -> Crops:
    """A teacher trained on random crops of 1,300 canvases labels 16 crops of each of the first 300."""
    draw = torch.Generator().manual_seed(seed)
    images, labels = canvases(draw)
    torch.manual_seed(seed)
    teacher = network(16)
    optimizer = torch.optim.AdamW(teacher.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    for _ in range(steps):
        index = torch.randint(TEACHER, (64,), generator=draw)
        loss = F.cross_entropy(teacher(cropped(images[index], 1, draw)), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    pixels = cropped(images[:STUDENT], CROPS, draw)
    with torch.no_grad(), evaluating(teacher):
        probs = teacher(pixels).softmax(1)
    tests = F.interpolate(images[TEACHER:], (CROP, CROP), mode="bilinear", antialias=True)
    return Crops(pixels, probs, labels[:STUDENT].repeat_interleave(CROPS), tests, labels[TEACHER:])


def cropped(images: Tensor, count: int, draw: torch.Generator) -> Tensor:
    """``count`` random crops of each image, one after the other, at 12x12."""
    boxes, flips = random_crops(len(images) * count, scale=(0.1, 1.0), flip=0.0, generator=draw)
    return replay_crops(images, boxes.view(-1, count, 4), flips.view(-1, count), CROP).flatten(0, 1)


def canvases(draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """All digits in a new order, each at a random place of a canvas 14x14 among 3x3 pieces of others.

    The last 497, which are to test on, come three times, each time at another place.
    """
    pixels, labels = digits()
    order = torch.randperm(len(pixels), generator=draw)
    order = torch.cat([order, order[TEACHER:], order[TEACHER:]])
    images = pixels.view(-1, 8, 8)
    canvas = torch.zeros(len(order), SIDE, SIDE)
    for _ in range(PIECES):
        others = images[torch.randint(len(pixels), (len(order),), generator=draw)]
        paste(canvas, others[window(others, 3, draw)], draw)
    paste(canvas, images[order], draw)
    return canvas.unsqueeze(1), labels[order]


def paste(canvas: Tensor, pieces: Tensor, draw: torch.Generator) -> None:
    place = window(canvas, pieces.shape[1], draw)
    canvas[place] = torch.maximum(canvas[place], pieces)


def window(images: Tensor, side: int, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The index of a square at a random place of each image."""
    count, steps = len(images), torch.arange(side)
    y, x = torch.randint(images.shape[1] - side + 1, (2, count, 1, 1), generator=draw)
    return torch.arange(count).view(-1, 1, 1), y + steps.view(1, -1, 1), x + steps.view(1, 1, -1)


def network(width: int) -> nn.Module:
    def block(fan_in: int, fan_out: int) -> list[nn.Module]:
        return [nn.Conv2d(fan_in, fan_out, 3, padding=1, bias=False), nn.BatchNorm2d(fan_out), nn.ReLU()]

    return nn.Sequential(
        *block(1, width),
        *block(width, 2 * width),
        nn.MaxPool2d(2),
        *block(2 * width, 2 * width),
        nn.AdaptiveMaxPool2d(3),
        nn.Flatten(),
        nn.Linear(18 * width, CLASSES),
    )


def claim(
    bench: Bench, *, adapt: Adapt = adapt_labels, seeds: int = 12, epochs: int = 15, steps: int = 600
) -> Evidence:
    """``adapt`` is the piece under test."""
    raise NotImplementedError


def figure(evidence: Evidence) -> Figure:
    raise NotImplementedError
