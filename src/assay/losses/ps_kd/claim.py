"""PS-KD's claim on few, noisy digits: better confidence than hard targets give, and no less accuracy."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.bench.datasets import digits
from assay.bench.evidence import Bench, Check, Evidence, Rows, at_least, at_most
from assay.bench.statistics import mean_interval
from assay.losses import PSKD

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRAIN, CLASSES, NOISE, WRONG = 300, 10, 0.25, 0.1
HARD, SMOOTH, PROGRESSIVE = "hard targets", "label smoothing", "PS-KD"
CONSTANT, OWN = "PS-KD, alpha constant", "hard targets, loss times 1 - alpha"
FASTER, PROGRESSIVE_FASTER = "hard targets, lr 0.2", "PS-KD, lr 0.2"
VARIANTS = (HARD, PROGRESSIVE, SMOOTH, CONSTANT, OWN, FASTER, PROGRESSIVE_FASTER)
COMPARED = ((PROGRESSIVE, OWN), (PROGRESSIVE, SMOOTH), (PROGRESSIVE, CONSTANT), (PROGRESSIVE_FASTER, FASTER))


class Constant(PSKD):
    """alpha_T from the first epoch on."""

    @property
    def alpha(self) -> float:
        return self.alpha_T


class ZeroStart(Constant):
    """The first broken variant: alpha constant, and predictions that start as zeros instead of one-hot."""

    def _predictions(self, labels: Tensor, indices: Any) -> tuple[Tensor, Tensor]:
        rows, known = super()._predictions(labels, indices)
        return rows * known.unsqueeze(-1), torch.ones_like(known)


class OwnTeacher(PSKD):
    """The second broken variant: the batch's own prediction as teacher, so the gradient is that of (1 - alpha) CE."""

    def loss(self, logits: Tensor, labels: Tensor, indices: Any, **options: Any) -> Tensor:
        self.update(logits, indices)
        return super().loss(logits, labels, indices, **options)


def claim(
    bench: Bench,
    *,
    method: Callable[..., PSKD] = PSKD,
    variants: Sequence[str] = VARIANTS,
    seeds: int = 20,
    epochs: int = 150,
) -> Evidence:
    """Nothing is tuned on any side: one recipe for all, alpha_T and smoothing as in the paper."""
    run = functools.partial(train, epochs=bench.scale(epochs, 20), method=method)
    rows = bench.rows(run, variants, bench.seeds(seeds))
    comparisons = [pair for pair in COMPARED if set(pair) <= set(variants)]
    notes = [note(rows, variant) for variant in variants] + [comparison(rows, *pair) for pair in comparisons]
    return Evidence(rows, checks_of(rows), notes)


def checks_of(rows: Rows) -> list[Check]:
    def difference(metric: str) -> np.ndarray:
        return rows.difference(PROGRESSIVE, HARD, metric)

    return [
        at_most("NLL, PS-KD / hard targets", rows.ratio(PROGRESSIVE, HARD, "nll"), 0.97),
        at_most("ECE, PS-KD - hard targets", difference("ece"), 0.0),
        at_most("AURC, PS-KD - hard targets", difference("aurc"), 0.002),
        at_least("accuracy, PS-KD - hard targets (points)", difference("accuracy"), -0.5),
        at_least("rank correlation of progress lacked and gradient kept", rows.values(PROGRESSIVE, "correlation"), 0.1),
        at_least("least sum of a target", rows.values(PROGRESSIVE, "mass"), 1 - 1e-5),
    ]


def note(rows: Rows, variant: str) -> str:
    def mean(metric: str) -> float:
        return float(rows.values(variant, metric).mean())

    measured = f"accuracy {mean('accuracy'):.1f} %, NLL {mean('nll'):.3f}, ECE {mean('ece'):.3f}"
    memorised = f"{100 * mean('memorised'):.0f} % of the wrong labels memorised"
    return f"{variant}: {measured}, AURC {mean('aurc'):.4f}, {memorised}"


def comparison(rows: Rows, one: str, other: str) -> str:
    mean, low, high = mean_interval(rows.ratio(one, other, "nll"))
    return f"not gated: NLL, {one} / {other}: {mean:.3f} [{low:.3f}, {high:.3f}]"


def train(variant: str, seed: int, *, epochs: int, method: Callable[..., PSKD]) -> dict[str, float]:
    """An MLP 64-128-128-10 on 300 digits with noise and wrong labels; measured on the other 1,497 with noise."""
    x, y, x_test, y_test, wrong = noisy_digits(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, CLASSES))
    lr = 0.2 if variant in (FASTER, PROGRESSIVE_FASTER) else 0.1
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [epochs // 2, epochs * 3 // 4])
    make = {PROGRESSIVE: method, PROGRESSIVE_FASTER: method, CONSTANT: Constant, OWN: OwnTeacher}.get(variant)
    criterion = make(TRAIN, CLASSES, total_epochs=epochs) if make else None
    cross_entropy = nn.CrossEntropyLoss(label_smoothing=0.1 if variant == SMOOTH else 0.0)
    order, everything = torch.Generator().manual_seed(seed), torch.arange(TRAIN)
    mechanism = {"mass": math.inf, "correlation": 0.0} if criterion else {}
    for epoch in range(1, epochs + 1):
        if criterion:
            criterion.set_epoch(epoch)
            mechanism["mass"] = min(mechanism["mass"], criterion.targets(y, everything).sum(1).min().item())
        if criterion and epoch == epochs // 2:
            mechanism["correlation"] = hard_example_mining(criterion, model, x, y)
        for index in torch.randperm(TRAIN, generator=order).split(128):
            logits = model(x[index])
            loss = criterion.loss(logits, y[index], index) if criterion else cross_entropy(logits, y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    with torch.no_grad():
        memorised = (model(x).argmax(1) == y)[wrong].float().mean().item()
        return measures(model(x_test), y_test) | {"memorised": memorised} | mechanism


def hard_example_mining(criterion: PSKD, model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Over the training examples, rank correlation of 1 - (recent improvement) with the share of the gradient kept.

    Recent improvement is what the label's probability gained since the stored prediction. The share is the size of
    the gradient with respect to the logits (sum of absolute values) relative to that of hard targets, to three digits;
    where all examples have the same share, that is no correlation.
    """
    from scipy.stats import spearmanr

    index = torch.arange(TRAIN)
    logits = model(x).detach().requires_grad_()
    now, before = F.softmax(logits.detach(), 1), criterion.table.read(index)[0]
    improvement = (now - before).gather(1, y[:, None]).squeeze(1)
    losses = (
        copy.deepcopy(criterion).loss(logits, y, index, reduction="sum"),
        F.cross_entropy(logits, y, reduction="sum"),
    )
    soft, hard = (torch.autograd.grad(loss, logits)[0].abs().sum(1) for loss in losses)
    share = (soft / hard).round(decimals=3)
    return 0.0 if (share == share[0]).all() else float(spearmanr(1 - improvement, share).statistic)


def measures(logits: Tensor, labels: Tensor) -> dict[str, float]:
    confidence, predicted = F.softmax(logits.double(), 1).max(1)
    right = (predicted == labels).double()
    return {
        "accuracy": 100 * right.mean().item(),
        "nll": F.cross_entropy(logits.double(), labels).item(),
        "ece": calibration_error(confidence.numpy(), right.numpy()),
        "aurc": risk_coverage(confidence.numpy(), right.numpy()),
    }


def calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = 15) -> float:
    """ECE: | sum of (right - confidence) | in each of ``bins`` equal intervals (lo, hi], summed, per example."""
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    return float(np.abs(np.bincount(place, weights=right - confidence, minlength=bins)).sum() / len(right))


def risk_coverage(confidence: np.ndarray, right: np.ndarray) -> float:
    """AURC: the error rate among the k most confident examples, averaged over k = 1, ..., n."""
    wrong = 1 - right[np.argsort(-confidence, kind="stable")]
    return float((wrong.cumsum() / np.arange(1, len(wrong) + 1)).mean())


@functools.lru_cache(maxsize=2)
def noisy_digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Inputs and labels to train on, a tenth of the labels another class, and to test on; which labels are wrong."""
    images, labels = digits()
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=draw)
    inputs = images[order] + NOISE * torch.randn(images.shape, generator=draw)
    labels = labels[order]
    wrong = torch.randperm(TRAIN, generator=draw)[: round(WRONG * TRAIN)]
    given = labels[:TRAIN].clone()
    given[wrong] = (given[wrong] + torch.randint(1, CLASSES, (len(wrong),), generator=draw)) % CLASSES
    return inputs[:TRAIN], given, inputs[TRAIN:], labels[TRAIN:], wrong


def figure(evidence: Evidence) -> Figure:
    """Accuracy, NLL and ECE of every variant: a dot per seed, and the mean with its 95 % interval."""
    from matplotlib import pyplot

    rows = evidence.rows
    variants = [variant for variant in VARIANTS if any(row["variant"] == variant for row in rows)]
    drawn, panels = pyplot.subplots(1, 3, figsize=(7.5, 3.5), sharey=True, layout="constrained")
    labels = {"accuracy": "test accuracy, %", "nll": "negative log-likelihood", "ece": "calibration error"}
    for axes, (metric, label) in zip(panels, labels.items(), strict=True):
        for place, variant in enumerate(variants):
            values = rows.values(variant, metric)
            mean, low, high = mean_interval(values)
            color = "black" if variant in (HARD, PROGRESSIVE) else "0.45"
            axes.plot(values, [place] * len(values), "o", color="0.75", markersize=3)
            axes.errorbar(mean, place, xerr=[[mean - low], [high - mean]], fmt="s", color=color, capsize=4)
        axes.set_xlabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(variants)), variants)
    panels[0].invert_yaxis()
    return drawn
