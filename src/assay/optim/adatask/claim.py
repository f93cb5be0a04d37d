"""Digits for two tasks, one with a loss that is far too large: Adam, Adam at twice the rate, and AdaTask."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from assay.bench.datasets import split_digits
from assay.bench.evidence import Bench, Evidence, at_least, at_most
from assay.bench.statistics import mean_interval
from assay.optim.adatask.adatask import AdaTask
from assay.optim.adatask.dominance import task_update_au

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EPOCHS, BATCH, HALF = 15, 64, 898
SCALE, SCALES = 1e3, (1.0, 1e3, 1e5)
ADAM, TWICE, ADATASK = "Adam", "Adam, trunk at twice the rate", "AdaTask"
ARMS = (ADAM, TWICE, ADATASK)
COMMON = 1e-3
# Each the best of 1e-3, 3e-3, 1e-2 and 3e-2 by mean accuracy with the loss times 1000, seeds 0 to 4.
BEST = {ADAM: 1e-2, ADATASK: 3e-2}
PARTS = ("common rate", "own rates", "scales")

Make = Callable[..., torch.optim.Optimizer]


def claim(
    bench: Bench,
    *,
    method: Make = AdaTask,
    parts: Collection[str] = PARTS,
    arms: Sequence[str] = ARMS,
    seeds: int = 10,
) -> Evidence:
    """Accuracy of the small task and error of the large one, at one rate and at each arm's best; then other factors."""

    def variants(arms: Collection[str], scale: float, rates: dict[str, float]) -> list[str]:
        return [label(arm, scale, rates[arm]) for arm in arms]

    common = dict.fromkeys(arms, COMMON)
    wanted = variants(arms, SCALE, common) if "common rate" in parts else []
    # AdaTask at Adam's best rate is reported, not gated.
    own = [*variants((ADAM, ADATASK), SCALE, BEST), label(ADATASK, SCALE, BEST[ADAM])]
    wanted += own if "own rates" in parts else []
    wanted += [name for s in SCALES for name in variants(arms, s, common)] if "scales" in parts else []
    rows = bench.rows(functools.partial(train, method=method), dict.fromkeys(wanted), bench.seeds(seeds))
    checks, notes = [], []
    if "common rate" in parts:
        adam, *_, ours = variants(arms, SCALE, common)
        for arm in arms[:-1]:
            gain = rows.difference(ours, label(arm, SCALE, COMMON), "accuracy")
            checks.append(at_least(f"accuracy at rate {COMMON:g}, AdaTask - {arm} (points)", gain, 15))
        checks.append(at_most(f"error at rate {COMMON:g}, AdaTask / Adam", rows.ratio(ours, adam, "error"), 1.05))
    if "own rates" in parts:
        adam, ours, _ = own
        gain = rows.difference(ours, adam, "accuracy")
        checks.append(at_least("accuracy at each one's best rate, AdaTask - Adam (points)", gain, 2))
        checks.append(at_most("error at each one's best rate, AdaTask / Adam", rows.ratio(ours, adam, "error"), 1.05))
    if "scales" in parts:
        one, *others = (label(ADATASK, scale, COMMON) for scale in SCALES)
        for scale, other in zip(SCALES[1:], others, strict=True):
            shift = abs(rows.difference(other, one, "accuracy"))
            checks.append(at_most(f"accuracy of AdaTask, factor {scale:g} against 1 (points)", shift, 1))
    for name in dict.fromkeys(wanted):
        shown = ", ".join(
            f"{what} {mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
            for what, digits in (("accuracy", 1), ("error", 4), ("share", 2))
            for mean, low, high in [mean_interval(rows.values(name, what))]
        )
        notes.append(f"{name}: {shown}")
    return Evidence(rows, checks, notes)


def label(arm: str, scale: float, lr: float) -> str:
    return f"{arm}; factor {scale:g}; rate {lr:g}"


class TwoTasks(nn.Module):
    """A trunk 64-32-16, a head for ten classes and a head for the 64 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU())
        self.digit, self.pixels = nn.Linear(16, 10), nn.Linear(16, 64)

    def losses(self, x: torch.Tensor, y: torch.Tensor, scale: float) -> list[torch.Tensor]:
        hidden = self.trunk(x)
        return [F.cross_entropy(self.digit(hidden), y), scale * F.mse_loss(self.pixels(hidden), x)]


def train(variant: str, seed: int, *, method: Make = AdaTask, epochs: int = EPOCHS) -> dict[str, Any]:
    """Accuracy in percent and squared error on the test half, and the first task's share in the trunk's updates."""
    arm, factor, rate = variant.split("; ")
    scale, lr = float(factor.split()[1]), float(rate.split()[1])
    (x, y), (x_test, y_test) = split_digits(1000 + seed, train=HALF)
    torch.manual_seed(seed)
    model = TwoTasks()
    trunk, heads = list(model.trunk.parameters()), [*model.digit.parameters(), *model.pixels.parameters()]
    groups = [{"params": trunk, "lr": 2 * lr if arm == TWICE else lr}, {"params": heads}]
    optimizer = method(groups, 2, lr, track_au=True) if arm == ADATASK else torch.optim.Adam(groups, lr)
    memory: dict[nn.Parameter, Any] = {}
    found: dict[nn.Parameter, torch.Tensor] = {}
    shares = []
    for _ in range(epochs):
        for chosen in torch.randperm(len(x)).split(BATCH):
            losses = model.losses(x[chosen], y[chosen], scale)
            if arm == ADATASK:
                optimizer.step(losses)
            else:
                found = ordinary_step(optimizer, [*trunk, *heads], losses, memory)
        shares.append(mean_share(optimizer.dominance() if arm == ADATASK else found, trunk))
    with torch.no_grad():
        hidden = model.trunk(x_test)
        accuracy = 100 * (model.digit(hidden).argmax(1) == y_test).double().mean().item()
        error = F.mse_loss(model.pixels(hidden), x_test).item()
    return {"accuracy": accuracy, "error": error, "share": shares[-1], "shares": shares}


def ordinary_step(
    optimizer: torch.optim.Optimizer, params: list[nn.Parameter], losses: list[torch.Tensor], memory: Any
) -> dict[nn.Parameter, torch.Tensor]:
    """A step on the sum of the losses, and each task's share in it."""
    gradients = [torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True) for loss in losses]
    for p, *parts in zip(params, *gradients, strict=True):
        p.grad = torch.stack([g for g in parts if g is not None]).sum(0)
    optimizer.step()
    return task_update_au(optimizer, gradients, memory)


def mean_share(shares: dict[nn.Parameter, torch.Tensor], params: list[nn.Parameter]) -> float:
    """The first task's share, averaged over tensors."""
    return sum(shares[p][0].item() for p in params) / len(params) if shares else math.nan


def figure(evidence: Evidence) -> Figure:
    """Accuracy and error of each seed with the factor 1000; and the shares over training."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = drawing.subplots(1, 2)
    colours = {ADAM: "C0", TWICE: "C2", ADATASK: "C1"}
    markers = {COMMON: "o", BEST[ADAM]: "^", BEST[ADATASK]: "s"}
    for variant in dict.fromkeys(row["variant"] for row in evidence.rows):
        arm, factor, rate = variant.split("; ")
        lr = float(rate.split()[1])
        if factor != f"factor {SCALE:g}":
            continue
        chosen = [row for row in evidence.rows if row["variant"] == variant]
        look = {"color": colours[arm], "marker": markers[lr], "linestyle": "none", "alpha": 0.5, "markersize": 5}
        errors, accuracies = ([row[metric] for row in chosen] for metric in ("error", "accuracy"))
        left.plot(errors, accuracies, label=f"{arm}; {rate}", **look)
        if lr == COMMON and arm != TWICE:
            curves = torch.tensor([row["shares"] for row in chosen])
            epochs = range(1, curves.shape[1] + 1)
            right.plot(epochs, curves.mean(0), color=colours[arm], label=arm)
            right.fill_between(epochs, curves.amin(0), curves.amax(0), color=colours[arm], alpha=0.15, linewidth=0)
    left.set_xlabel("mean squared error of the pixels (test)")
    left.set_ylabel("accuracy on digits, % (test)")
    left.set_ylim(0, 100)
    left.legend(fontsize="x-small", loc="lower left")
    right.set_xlabel(f"epoch, at rate {COMMON:g}")
    right.set_ylabel("share of the digits in the trunk's updates")
    right.set_ylim(-0.02, 1)
    right.axhline(0.5, color="0.8", zorder=0)
    right.legend(fontsize="small")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    drawing.suptitle("Digits and pixels from one trunk, the pixels' loss times 1000", fontsize="medium")
    return drawing
