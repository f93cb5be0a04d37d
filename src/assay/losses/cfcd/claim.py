"""CFCD's two claims on hard digits: adaptive scale and margin against fixed ones, and what the local term adds."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.bench.datasets import split_digits
from assay.bench.evidence import Bench, Check, Evidence, Rows, at_least, at_most
from assay.bench.statistics import mean_interval
from assay.data import TupleSampler
from assay.losses import MadaCos, local_descriptor_triplet, local_descriptors
from assay.metrics import mean_average_precision, same_label_pairs
from assay.nn import GlobalDescriptor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLASSES, FEATURES, CHANNELS, TRAIN, BATCH, TUPLE = 10, 32, 64, 1200, 120, 8
OCCLUDED, PATCH, NOISE = 0.3, (4, 5), 0.2
SECOND_RATE = 0.3  # stage 2 starts from a trained network
PLAIN, COSFACE, ARCFACE, MADACOS = "plain softmax", "CosFace", "ArcFace", "MadaCos"
TUNED = "MadaCos, tuned"
USUAL = {"plain softmax, 16": PLAIN, "CosFace, 32 and 0.2": COSFACE, "ArcFace, 32 and 0.15": ARCFACE}
FIRST, CONTINUED, LOCAL, STRONG = "stage 1", "stage 1 continued", "local term", "local term, weight 1"
HEADS, STAGES = (PLAIN, COSFACE, ARCFACE, MADACOS, TUNED), (FIRST, CONTINUED, LOCAL)
WEIGHTS = {LOCAL: 0.05, STRONG: 1.0}
# Coordinate ascent on the mAP of seeds 0 and 1, over scales from 2 (4 with a margin) to 32, margins from 0.05 to 0.7
# (0.15 to 0.9 for ArcFace), and rates of 3e-3, 1e-2 and 3e-2. MadaCos has its paper's constants and the rate alone is
# tuned; "tuned", it has had the same search over rho from 0.5 to 1 - 1e-7 and alpha from 0.005 to 0.5.
SETTINGS: dict[str, dict[str, float]] = {
    PLAIN: {"rate": 3e-2, "scale": 2.0},
    COSFACE: {"rate": 3e-2, "scale": 4.0, "cosface": 0.7},
    ARCFACE: {"rate": 1e-2, "scale": 4.0, "arcface": 0.7},
    MADACOS: {"rate": 1e-2},
    TUNED: {"rate": 3e-2, "alpha": 0.3, "rho": 0.5, "min_scale": 1.0},
    "plain softmax, 16": {"rate": 1e-2, "scale": 16.0},
    "CosFace, 32 and 0.2": {"rate": 3e-2, "scale": 32.0, "cosface": 0.2},
    "ArcFace, 32 and 0.15": {"rate": 1e-2, "scale": 32.0, "arcface": 0.15},
}


class FixedMargin(nn.Module):
    """A cosine softmax with constants: of the true class, scale * (c - cosface) or scale * cos(arccos(c) + arcface)."""

    def __init__(self, features: int, classes: int, *, scale: float, cosface: float = 0.0, arcface: float = 0.0):
        super().__init__()
        self.scale, self.cosface, self.arcface = scale, cosface, arcface
        self.weight = nn.Parameter(torch.empty(classes, features).uniform_(-(features**-0.5), features**-0.5))

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        cosine, own = F.linear(F.normalize(features), F.normalize(self.weight)), labels[:, None]
        right = cosine.gather(1, own) - self.cosface
        if self.arcface:
            right = torch.cos(torch.acos(right.clamp(-1 + 1e-6, 1 - 1e-6)) + self.arcface)
        return self.scale * cosine.scatter(1, own, right)


class WrongSign(MadaCos):
    """The first broken variant: the margin is added where it should be taken off."""

    def logits(self, cosine: Tensor, labels: Tensor | None = None) -> Tensor:
        logits = super().logits(cosine, labels)
        twice = (2 * self.last_scale * self.last_margin).expand(len(cosine), 1)
        return logits.scatter_add(1, labels[:, None], twice)


class ThroughScale(MadaCos):
    """The second broken variant: the scale carries a gradient to the median example."""

    def logits(self, cosine: Tensor, labels: Tensor | None = None) -> Tensor:
        logits = super().logits(cosine, labels)
        m50 = cosine.gather(1, labels[:, None]).median()
        odds = math.log(self.rho / (1 - self.rho) * (1 - self.alpha) / self.alpha)
        scale = (odds / (1 - m50).clamp(min=1e-6)).clamp(min=self.min_scale)
        return logits * scale / scale.detach()


def claim(
    bench: Bench,
    *,
    method: type[MadaCos] = MadaCos,
    local: Callable[..., Tensor] = local_descriptor_triplet,
    heads: Sequence[str] = (*HEADS, *USUAL),
    stages: Sequence[str] = (*STAGES, STRONG),
    seeds: int = 10,
    epochs: int = 40,
) -> Evidence:
    """``method`` and ``local`` are the pieces under test. What does not gate the verdict has half of the seeds."""
    epochs = bench.scale(epochs, 4)
    by_head = functools.partial(train_head, epochs=epochs, method=method)
    by_stage = functools.partial(train_stage, epochs=epochs, method=method, local=local)
    rows = Rows()
    for run, variants, gating in ((by_head, heads, HEADS), (by_stage, stages, STAGES)):
        rows += bench.rows(run, [variant for variant in variants if variant in gating], bench.seeds(seeds))
        rows += bench.rows(run, [variant for variant in variants if variant not in gating], bench.seeds(seeds // 2))
    return Evidence(rows, checks_of(rows, heads, stages), [note(rows, variant) for variant in (*heads, *stages)])


def checks_of(rows: Rows, heads: Sequence[str], stages: Sequence[str]) -> list[Check]:
    def gain(variant: str, baseline: str, metric: str = "map") -> np.ndarray:
        return rows.difference(variant, baseline, metric)

    bounds = {PLAIN: 0.5, COSFACE: -0.5, ARCFACE: -0.5}
    checks = [
        at_least(f"mAP, {adaptive} - {fixed} (points)", gain(adaptive, fixed), bound)
        for adaptive in (MADACOS, TUNED)
        for fixed, bound in bounds.items()
        if {adaptive, fixed} <= set(heads)
    ]
    checks += [
        at_least("compactness, MadaCos - plain softmax", gain(MADACOS, PLAIN, "compactness"), 0.0),
        at_least("rank correlation of scale and epoch", rows.values(MADACOS, "scale_rises"), 0.8),
        at_least("rank correlation of margin and epoch", rows.values(MADACOS, "margin_rises"), 0.8),
        at_most("median example's probability, distance from alpha", rows.values(MADACOS, "from_alpha").max(), 1e-3),
        at_most("gradient at the cosines, relative error", rows.values(MADACOS, "of_gradient").max(), 1e-3),
    ]
    if LOCAL in stages:
        checks.append(at_least("mAP, local term - stage 1 continued (points)", gain(LOCAL, CONTINUED), -0.5))
    return checks


def note(rows: Rows, variant: str) -> str:
    """A variant's measures, and its mAP less that of the one it is to be compared with."""
    (precision, *_), compactness = mean_interval(rows.values(variant, "map")), rows.values(variant, "compactness")
    said = f"{variant}: mAP {precision:.1f}, compactness {compactness.mean():.3f}"
    other = {LOCAL: FIRST, STRONG: CONTINUED} | dict.fromkeys(USUAL, MADACOS)
    if variant not in other:
        return said
    seeds = {row["seed"] for row in rows if row["variant"] == variant}
    mean, low, high = mean_interval(
        Rows(row for row in rows if row["seed"] in seeds).difference(variant, other[variant], "map")
    )
    return f"{said}; mAP less that of {other[variant]}: {mean:+.2f} [{low:+.2f}, {high:+.2f}]"


class Network(nn.Module):
    """Three convolutions, one or two halvings, and CFCD's global descriptor; returns the last map as well."""

    def __init__(self, halvings: int) -> None:
        super().__init__()

        def block(fan_in: int, fan_out: int, halved: bool) -> list[nn.Module]:
            layers = [nn.Conv2d(fan_in, fan_out, 3, padding=1, bias=False), nn.BatchNorm2d(fan_out), nn.ReLU()]
            return [*layers, nn.MaxPool2d(2)] if halved else layers

        self.maps = nn.Sequential(*block(1, 16, True), *block(16, 32, halvings > 1), *block(32, CHANNELS, False))
        self.descriptor = GlobalDescriptor(CHANNELS, FEATURES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.maps(images)
        return maps, self.descriptor(maps)


class Digits:
    """1,200 digits to train on and 597 to search among, drawn by the seed, on a canvas of ``side`` pixels."""

    def __init__(self, seed: int, side: int) -> None:
        (self.pixels, self.labels), (pixels, self.test_labels) = split_digits(seed, TRAIN)
        self.side, self.draw = side, torch.Generator().manual_seed(seed)
        self.test_images = self.disturbed(pixels)

    def disturbed(self, pixels: Tensor) -> Tensor:
        """Images (N, 1, side, side) of pixels (N, 64), other ones at every call.

        Three in ten have a patch of a third of their pixels wiped out; all are moved, by a pixel at most or to any
        place of a larger canvas, and noisy.
        """
        n, edge = len(pixels), max(1, self.side - 8)
        hidden = self.window(n, 8, PATCH[0])[:, :, None] & self.window(n, 8, PATCH[1])[:, None, :]
        hidden &= (torch.rand(n, generator=self.draw) < OCCLUDED)[:, None, None]
        padded = F.pad(pixels.view(n, 8, 8).masked_fill(hidden, 0.0), (edge,) * 4)
        seen = self.window(n, 8 + 2 * edge, self.side)[:, :, None] & self.window(n, 8 + 2 * edge, self.side)[:, None, :]
        images = padded[seen].view(n, 1, self.side, self.side)
        return images + NOISE * torch.randn(images.shape, generator=self.draw)

    def window(self, n: int, length: int, size: int) -> Tensor:
        """(n, length) masks of ``size`` places in a row, anywhere."""
        start = torch.randint(length - size + 1, (n, 1), generator=self.draw)
        return (torch.arange(length) >= start) & (torch.arange(length) < start + size)


def train_head(
    variant: str,
    seed: int,
    *,
    epochs: int,
    method: type[MadaCos],
    settings: Mapping[str, Mapping[str, float]] = SETTINGS,
) -> dict[str, Any]:
    """A network trained under one of the heads on 8x8 images; measured on held-out ones."""
    digits, constants = Digits(seed, 8), dict(settings[variant])
    rate = constants.pop("rate")
    torch.manual_seed(seed)
    network = Network(halvings=1)
    head = (method if variant in (MADACOS, TUNED) else FixedMargin)(FEATURES, CLASSES, **constants)
    trace = optimize(network, head, digits, shuffled(digits, epochs), epochs, rate)
    return measures(network, digits, trace) | trace.summary()


def train_stage(
    variant: str, seed: int, *, epochs: int, method: type[MadaCos], local: Callable[..., Tensor]
) -> dict[str, Any]:
    """Stage 1 on a 12x12 canvas; then half as long on tuples, with the local term or without."""
    network, head, digits, trace = copy.deepcopy(first_stage(seed, epochs, method))
    if variant != FIRST:
        with torch.no_grad():
            predictions = head.cosine(network.eval()(digits.disturbed(digits.pixels))[1]).argmax(1)
        sampler = TupleSampler(digits.labels, predictions, tuple_size=TUPLE, batch_size=BATCH, seed=seed)
        weight, rate = WEIGHTS.get(variant, 0.0), SETTINGS[MADACOS]["rate"] * SECOND_RATE
        term = functools.partial(tuples_loss, local, weight) if weight else None
        trace = optimize(network, head, digits, passes(sampler, epochs // 2), epochs // 2, rate, term)
    return measures(network, digits, trace)


@functools.lru_cache(maxsize=1)
def first_stage(seed: int, epochs: int, method: type[MadaCos]) -> tuple[Network, MadaCos, Digits, Trace]:
    digits = Digits(seed, 12)
    torch.manual_seed(seed)
    network, head = Network(halvings=2), method(FEATURES, CLASSES)
    trace = optimize(network, head, digits, shuffled(digits, epochs), epochs, SETTINGS[MADACOS]["rate"])
    return network, head, digits, trace


def shuffled(digits: Digits, epochs: int) -> Iterator[Iterable[Tensor]]:
    for _ in range(epochs):
        yield torch.randperm(TRAIN, generator=digits.draw)[: TRAIN // BATCH * BATCH].split(BATCH)


def passes(sampler: TupleSampler, epochs: int) -> Iterator[Iterable[list[int]]]:
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        yield sampler


@dataclass
class Trace:
    """What happened on the way: mean scale and margin of each epoch, largest distances of the mechanism; divergence."""

    scales: list[float] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    distances: np.ndarray = field(default_factory=lambda: np.zeros(2))
    finite: bool = True

    def summary(self) -> dict[str, Any]:
        if not self.scales:
            return {}
        tenth = max(1, len(self.scales) // 10)
        curves = {"scales": self.scales[::tenth], "margins": self.margins[::tenth]}
        rounded = {name: [round(value, 3) for value in values] for name, values in curves.items()}
        rising = {"scale_rises": rises(self.scales), "margin_rises": rises(self.margins)}
        distances = dict(zip(("from_alpha", "of_gradient"), self.distances.tolist(), strict=True))
        return distances | rising | rounded


def optimize(
    network: Network,
    head: nn.Module,
    digits: Digits,
    epochs: Iterable[Iterable[Any]],
    count: int,
    rate: float,
    term: Callable[[Tensor], Tensor] | None = None,
) -> Trace:
    """AdamW with a cosine schedule; the loss is cross-entropy, plus ``term`` of the batch's maps."""
    optimizer, trace = torch.optim.AdamW([*network.parameters(), *head.parameters()], rate, fused=True), Trace()
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, count)
    network.train()
    for batches in epochs:
        images, states = digits.disturbed(digits.pixels), []
        for index in batches:
            maps, descriptors = network(images[index])
            labels = digits.labels[index]
            logits = head(descriptors, labels)
            loss = F.cross_entropy(logits, labels)
            if isinstance(head, MadaCos):
                states.append((head.last_scale.item(), head.last_margin.item()))
                if len(states) == 1:  # once an epoch
                    found = mechanism(head, descriptors, labels)
                    trace.distances = np.maximum(trace.distances, found)
            if term:
                loss = loss + term(maps)
            if not loss.isfinite():
                trace.finite = False
                return trace
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        if states:
            scale, margin = np.mean(states, axis=0)
            trace.scales.append(float(scale))
            trace.margins.append(float(margin))
    return trace


def tuples_loss(local: Callable[..., Tensor], weight: float, maps: Tensor) -> Tensor:
    groups = zip(*(rows.split(TUPLE) for rows in local_descriptors(maps)), strict=True)
    return weight * torch.stack([local(*group) for group in groups]).sum()


def mechanism(head: MadaCos, descriptors: Tensor, labels: Tensor) -> tuple[float, float]:
    """Two distances of the head from what it promises, on a batch and without a trace in the training.

    Of the median example's probability from alpha, where the margin is active (else 0); and of the gradient at the
    cosines from scale * (p - onehot) / b, relative to its size.
    """
    cosine = head.cosine(descriptors).detach().requires_grad_()
    logits = head.logits(cosine, labels)
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, labels), cosine)
    p, own = F.softmax(logits.detach(), 1), labels[:, None]
    middle = cosine.detach().gather(1, own).squeeze(1).argsort(stable=True)[(len(labels) - 1) // 2]
    from_alpha = (p[middle, labels[middle]] - head.alpha).abs() * (head.last_margin > 0)
    promised = head.last_scale * (p - F.one_hot(labels, CLASSES)) / len(labels)
    return from_alpha.item(), ((gradient - promised).norm() / promised.norm().clamp(min=1e-9)).item()


def measures(network: Network, digits: Digits, trace: Trace) -> dict[str, float]:
    """mAP (%) of leave-one-out retrieval, and mean cosine to the class centre; a run that diverged found nothing."""
    if not trace.finite:
        return {"map": 0.0, "compactness": -1.0}
    with torch.no_grad():
        found, labels = network.eval()(digits.test_images)[1], digits.test_labels
    centres = torch.stack([F.normalize(found[labels == c].mean(0), dim=0) for c in range(CLASSES)])
    precision = mean_average_precision(*same_label_pairs(found, labels))
    return {"map": 100 * precision, "compactness": (found * centres[labels]).sum(1).mean().item()}


def rises(curve: list[float]) -> float:
    """Rank correlation with the epoch; 0 for a curve that does not move."""
    from scipy.stats import spearmanr

    return 0.0 if len(set(curve)) < 2 else float(spearmanr(range(len(curve)), curve).statistic)


def figure(evidence: Evidence) -> Figure:
    """mAP of heads and stages, compactness of heads: a dot per seed, the mean and its interval; scale and margin."""
    from matplotlib import pyplot

    rows = evidence.rows
    drawn, ((heads, stages), (compact, curves)) = pyplot.subplots(2, 2, figsize=(8.5, 6), layout="constrained")
    dots(heads, rows, (*HEADS, *USUAL), "map", "mAP, 8x8 images, %")
    dots(stages, rows, (*STAGES, STRONG), "map", "mAP, 12x12 canvas, %")
    dots(compact, rows, (*HEADS, *USUAL), "compactness", "mean cosine to the class centre")
    of_margin = curves.twinx()
    for row in (row for row in rows if row["variant"] == MADACOS):
        place = np.linspace(0, 1, len(row["scales"]), endpoint=False)
        curves.plot(place, row["scales"], color="black", linewidth=0.6)
        of_margin.plot(place, row["margins"], color="tab:red", linewidth=0.6)
    curves.set_xlabel("share of the training")
    curves.set_ylabel("scale")
    of_margin.set_ylabel("margin", color="tab:red")
    return drawn


def dots(axes: Any, rows: Rows, variants: Sequence[str], metric: str, label: str) -> None:
    present = [variant for variant in variants if any(row["variant"] == variant for row in rows)]
    for place, variant in enumerate(present):
        values = rows.values(variant, metric)
        mean, low, high = mean_interval(values)
        axes.plot(values, [place] * len(values), "o", color="0.75", markersize=3)
        axes.errorbar(mean, place, xerr=[[mean - low], [high - mean]], fmt="s", color="black", capsize=4)
    axes.set_yticks(range(len(present)), present)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.spines[["top", "right"]].set_visible(False)
