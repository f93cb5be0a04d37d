"""FerKD's claim on digits in clutter: replacing doubtful labels and dropping hopeless ones, against FKD's labels."""

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

CLASSES, SIDE, PIECES = 10, 12, 3
TEACHER, STUDENT, CROPS, PER_IMAGE, IMAGES = 1300, 300, 16, 4, 8
QUANTILES, PEAK = (0.02, 0.17, 1.0), 0.4
HARD, FKD, FERKD = "hard labels", "FKD", "FerKD"
FERKD_SELFMIX, FKD_SELFMIX, FKD_CUTMIX = "FerKD + SelfMix", "FKD + SelfMix", "FKD + CutMix"
FKD_WRONG, FERKD_WRONG = "FKD, wrong teacher", "FerKD, wrong teacher"
FKD_TELLING, FERKD_TELLING = "FKD, telling clutter", "FerKD, telling clutter"
DISCARDING = "FerKD, discarding alone"
MAIN = (HARD, FKD, FERKD)
MIXED, WRONG = (FERKD_SELFMIX, FKD_SELFMIX, FKD_CUTMIX), (FKD_WRONG, FERKD_WRONG)
VARIANTS = (*MAIN, DISCARDING, *MIXED, *WRONG, FKD_TELLING, FERKD_TELLING)
# The best mean accuracy over seeds 0 to 3, of 0.005, 0.01 and 0.02 for all three and 0.04 for FKD.
RATES = {HARD: 0.01, FKD: 0.02, FERKD: 0.01}
COMPARED = (
    (FERKD, FKD, 0.3),
    (FERKD, HARD, 1.0),
    (FKD_SELFMIX, FKD_CUTMIX, -0.3),
    (FERKD_WRONG, FKD_WRONG, 2.0),
)
NOTED = (
    (FERKD, FKD, "area"),
    (DISCARDING, FKD, "accuracy"),
    (FERKD_SELFMIX, FERKD, "accuracy"),
    (FKD_SELFMIX, FKD, "accuracy"),
    (FERKD_TELLING, FKD_TELLING, "accuracy"),
)
Adapt = Callable[..., tuple[Tensor, Tensor, Tensor]]


def with_the_teachers_own(probs: Tensor, targets: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The first broken variant: doubtful labels are replaced by the teacher's favourite class, not by the truth."""
    return adapt_labels(probs, probs.argmax(1), **options)


def without_discarding(
    probs: Tensor, targets: Tensor, *, t_low: float, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The second broken variant: hopeless crops are calibrated along with the doubtful ones."""
    return adapt_labels(probs, targets, t_low=0.0, **options)


def claim(
    bench: Bench,
    *,
    adapt: Adapt = adapt_labels,
    variants: Sequence[str] = VARIANTS,
    seeds: int = 16,
    epochs: int = 15,
    steps: int = 1000,
) -> Evidence:
    """``adapt`` is the piece under test. Half of the seeds run the arms of the side questions as well."""
    run = functools.partial(train, epochs=bench.scale(epochs, 3), steps=bench.scale(steps), adapt=adapt)
    few = bench.seeds(max(2, seeds // 2))
    rows = bench.rows(run, variants, few)
    main = [variant for variant in MAIN if variant in variants]
    rows += bench.rows(run, main, [seed for seed in bench.seeds(seeds) if seed not in few])
    notes = [note(rows, variant) for variant in variants]
    for one, other, metric in NOTED:
        if {one, other} <= set(variants):
            mean, low, high = mean_interval(gap(rows, one, other, metric))
            notes.append(f"not gated: {metric}, {one} - {other}: {mean:+.2f} points [{low:+.2f}, {high:+.2f}]")
    return Evidence(rows, checks_of(rows, variants), notes)


def checks_of(rows: Rows, variants: Sequence[str]) -> list[Check]:
    checks = [
        at_most("share of the hopeless crops that are used", rows.values(FERKD, "hopeless used"), 0.0),
        at_least("share of the calibrated labels that are right", rows.values(FERKD, "calibrated right"), 1.0),
        at_most("variance of mixed labels, SelfMix / CutMix", rows.values(FERKD, "spread"), 0.9),
    ]
    for one, other, bound in COMPARED:
        if {one, other} <= set(variants):
            checks.append(at_least(f"accuracy: {one} - {other} (points)", gap(rows, one, other, "accuracy"), bound))
    return checks


def gap(rows: Rows, one: str, other: str, metric: str) -> np.ndarray:
    """One variant minus the other, over the seeds that both have."""
    ones, others = ({row["seed"] for row in rows if row["variant"] == variant} for variant in (one, other))
    both = ones & others
    return Rows(row for row in rows if row["seed"] in both).difference(one, other, metric)


def note(rows: Rows, variant: str) -> str:
    mean, low, high = mean_interval(rows.values(variant, "accuracy"))
    area = rows.values(variant, "area").mean()
    return f"{variant}: accuracy {mean:.1f} % [{low:.1f}, {high:.1f}], {area:.1f} % over training"


class Crops(NamedTuple):
    """16 crops of each of 300 images, one after the other, the teacher's view of them, their labels; test images."""

    pixels: Tensor
    probs: Tensor
    targets: Tensor
    tests: Tensor
    answers: Tensor


def train(variant: str, seed: int, *, epochs: int, steps: int, adapt: Adapt) -> dict[str, Any]:
    """A small CNN on the stored crops of 300 canvases, 4 of each image in a batch; tested on whole canvases."""
    crops = labelled(seed, steps, telling=variant in (FKD_TELLING, FERKD_TELLING))
    labels, keep = labels_of(variant, crops, adapt)
    torch.manual_seed(seed)
    model, draw = network(8), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), rate_of(variant))
    batches = STUDENT // IMAGES
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, epochs * batches)
    curve = []
    for epoch in range(epochs):
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
        if (epochs - 1 - epoch) % 3 == 0:
            curve.append(accuracy(model, crops))
    measured = {"accuracy": curve[-1], "area": float(np.mean(curve))}
    return measured | (mechanism(crops, adapt) if variant == FERKD else {})


def rate_of(variant: str) -> float:
    return RATES[HARD if variant == HARD else FKD if variant.startswith(FKD) else FERKD]


def mixed(variant: str, x: Tensor, soft: Tensor, used: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    place = torch.arange(len(x))
    groups = torch.zeros_like(place) if variant == FKD_CUTMIX else place // PER_IMAGE
    return self_mix(x, soft, torch.where(used, groups, len(x) + place), generator=draw)


def labels_of(variant: str, crops: Crops, adapt: Adapt) -> tuple[Tensor, Tensor]:
    """Labels (n, C) of all stored crops, and which of them count."""
    everything = torch.ones(len(crops.targets), dtype=torch.bool)
    if variant == HARD:
        return F.one_hot(crops.targets, CLASSES).float(), everything
    t_low, t_mid, t_top = ferkd_thresholds(crops.probs.amax(1), QUANTILES)
    probs = crops.probs
    if variant in (FKD_WRONG, FERKD_WRONG):
        probs, t_mid = misled(crops), PEAK + 0.01
    if variant == DISCARDING:
        t_mid = t_low
    if variant.startswith(FKD):
        return probs, everything
    labels, keep, _ = adapt(probs, crops.targets, t_low=t_low, t_mid=t_mid, t_top=t_top)
    return labels, keep


def misled(crops: Crops) -> Tensor:
    """A teacher that is unsure and wrong about three of ten classes: 0.4 for the next class, the rest spread evenly."""
    wrong = F.one_hot((crops.targets + 1) % CLASSES, CLASSES)
    unsure = PEAK * wrong + (1 - PEAK) / (CLASSES - 1) * (1 - wrong)
    return torch.where((crops.targets < 3).unsqueeze(1), unsure, crops.probs)


def mechanism(crops: Crops, adapt: Adapt) -> dict[str, float]:
    """What the rule does with the labels, and how much a crop's mixed label varies, SelfMix's relative to CutMix's."""
    t_low, t_mid, t_top = ferkd_thresholds(crops.probs.amax(1), QUANTILES)
    labels, keep, group = adapt(crops.probs, crops.targets, t_low=t_low, t_mid=t_mid, t_top=t_top)
    hopeless, doubtful = crops.probs.amax(1) < t_low, group == 1
    image = torch.arange(IMAGES * CROPS) // CROPS
    return {
        "hopeless used": keep[hopeless].float().mean().item(),
        "calibrated right": (labels.argmax(1) == crops.targets)[doubtful].float().mean().item(),
        "spread": spread(crops, image) / spread(crops, torch.zeros_like(image)),
    }


def spread(crops: Crops, groups: Tensor) -> float:
    """Variance of a crop's mixed label over 50 batches that differ in partners and boxes alone."""
    pixels, probs = crops.pixels[: len(groups)], crops.probs[: len(groups)]
    draws = [torch.Generator().manual_seed(k) for k in range(50)]
    labels = torch.stack([self_mix(pixels, probs, groups, prob=1.0, generator=draw)[1] for draw in draws])
    return labels.var(0).sum(1).mean().item()


@torch.no_grad()
def accuracy(model: nn.Module, crops: Crops) -> float:
    with evaluating(model):
        return 100 * (model(crops.tests).argmax(1) == crops.answers).float().mean().item()


@functools.lru_cache(maxsize=2)
def labelled(seed: int, steps: int, telling: bool = False) -> Crops:
    """A teacher trained on random crops of 1,300 canvases labels 16 crops of each of the first 300."""
    draw = torch.Generator().manual_seed(seed)
    images, labels = canvases(draw, telling)
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
    return Crops(pixels, probs, labels[:STUDENT].repeat_interleave(CROPS), images[TEACHER:], labels[TEACHER:])


def cropped(images: Tensor, count: int, draw: torch.Generator) -> Tensor:
    """``count`` random crops of each image, one after the other, at the size of a canvas."""
    boxes, flips = random_crops(len(images) * count, scale=(0.1, 1.0), flip=0.0, generator=draw)
    return replay_crops(images, boxes.view(-1, count, 4), flips.view(-1, count), SIDE).flatten(0, 1)


def canvases(draw: torch.Generator, telling: bool) -> tuple[Tensor, Tensor]:
    """All digits in a new order, each at a random place of a canvas 12x12 among 3x3 pieces of others.

    The pieces are of any digits, or with ``telling`` of digits of the same class. The last 497, which are to test on,
    come three times, each time at another place.
    """
    pixels, labels = digits()
    order = torch.randperm(len(pixels), generator=draw)
    order = torch.cat([order, order[TEACHER:], order[TEACHER:]])
    images = pixels.view(-1, 8, 8)
    canvas, places = torch.zeros(len(order), SIDE, SIDE), torch.arange(len(order))
    for _ in range(PIECES):
        weights = torch.ones(CLASSES, len(pixels))
        if telling:
            weights = F.one_hot(labels, CLASSES).T.float()
        others = images[weights.multinomial(len(order), replacement=True, generator=draw)[labels[order], places]]
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
    return nn.Sequential(
        nn.Conv2d(1, width, 5, padding=2, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(18 * width, CLASSES),
    )


def figure(evidence: Evidence) -> Figure:
    """Accuracy of every variant: a dot per seed, and the mean with its 95 % interval."""
    from matplotlib import pyplot

    rows = evidence.rows
    variants = [variant for variant in VARIANTS if any(row["variant"] == variant for row in rows)]
    drawn, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    for place, variant in enumerate(variants):
        values = rows.values(variant, "accuracy")
        mean, low, high = mean_interval(values)
        color = "black" if variant in (FKD, FERKD) else "0.45"
        axes.plot(values, [place] * len(values), "o", color="0.75", markersize=3)
        axes.errorbar(mean, place, xerr=[[mean - low], [high - mean]], fmt="s", color=color, capsize=4)
    axes.set_yticks(range(len(variants)), variants)
    axes.invert_yaxis()
    axes.set_xlabel("test accuracy, %")
    axes.spines[["top", "right"]].set_visible(False)
    return drawn
