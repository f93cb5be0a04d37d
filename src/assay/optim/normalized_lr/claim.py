"""Steps until all training examples are right, with and without the normalization, where one class is rare."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from assay.bench.datasets import digits
from assay.bench.evidence import Bench, Check, Evidence, Rows, at_least, at_most
from assay.optim import NormalizedLRGD

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Make = Callable[..., Any]
PARTS = ("table", "imbalance", "oscillation", "digits")
GAMMA, MOST = 100.0, 400
TABLE = {100.0: 2, 10.0: 2, 1.0: 16, 0.1: 157}
"""The paper's Table 1: steps of Normalized LR+GD on the worst case, for each step size."""
PLAIN = 308
"""Steps of LR+GD there, with step size 100."""
SIZES = (100, 500, 1000)
PAIRS = ((8, 3), (9, 3), (8, 1), (5, 9))


class PlainGD(torch.optim.SGD):
    """LR+GD, the baseline, with a step that is given the margins as that of NormalizedLRGD is."""

    def loss(self, margins: Tensor) -> Tensor:
        return -F.logsigmoid(margins).mean()

    def step(self, closure: Callable[[], Tensor]) -> None:
        self.zero_grad()
        self.loss(closure()).backward()
        super().step()


def claim(bench: Bench, *, method: Make = NormalizedLRGD, seeds: int = 20, parts: Sequence[str] = PARTS) -> Evidence:
    """``method`` is the optimizer under test, called with the parameters and the step size."""
    arms = {"plain": PlainGD, "normalized": method}
    evidence = Evidence(Rows(), [])
    if "table" in parts:
        evidence.rows += table(arms)
        evidence.checks += table_checks(evidence.rows)
    if "imbalance" in parts:
        evidence.rows += bench.rows(functools.partial(imbalance, arms=arms), list(arms), bench.seeds(seeds))
        for rare in (1, 3):
            ratio = evidence.rows.ratio("normalized", "plain", f"rare {rare}")
            evidence.checks.append(at_most(f"{rare} rare of 500, steps normalized / plain", ratio, 0.2))
    if "oscillation" in parts:
        evidence.rows.append(oscillation())
        evidence.checks += oscillation_checks(evidence.rows[-1])
    if "digits" in parts:
        evidence.rows += bench.rows(
            functools.partial(on_digits, arms=arms), [f"digits, {a}" for a in arms], bench.seeds(5)
        )
        evidence.notes = notes(evidence.rows)
    return evidence


def steps_until_right(signed: Tensor, make: Make, lr: float) -> int:
    """Steps from theta = 0 until <row, theta> > 0 for every row y_i a_i; ``MOST`` if it takes longer."""
    theta = torch.zeros(signed.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = make([theta], lr)
    for step in range(MOST):
        if (signed @ theta.detach() > 0).all():
            return step
        optimizer.step(lambda: signed @ theta)
    return MOST


def worst_case(n: int) -> Tensor:
    """One example (0.5, -1) of label +1, n - 1 of (-0.5, -1) of label -1, each times its label."""
    return torch.tensor([[0.5, -1.0]] + (n - 1) * [[0.5, 1.0]], dtype=torch.float64)


def table(arms: dict[str, Make]) -> list[dict[str, Any]]:
    settings = [("normalized", 1000, lr) for lr in TABLE]
    settings += [(arm, n, GAMMA) for arm in arms for n in SIZES if (arm, n) != ("normalized", 1000)]
    return [
        {"variant": f"worst case, {arm}", "n": n, "lr": lr, "steps": steps_until_right(worst_case(n), arms[arm], lr)}
        for arm, n, lr in settings
    ]


def table_checks(rows: Rows) -> list[Check]:
    normalized, plain = (
        {(row["n"], row["lr"]): row["steps"] for row in rows if row["variant"] == f"worst case, {arm}"}
        for arm in ("normalized", "plain")
    )
    off = max(abs(normalized[1000, lr] - steps) for lr, steps in TABLE.items())
    return [
        at_most("worst case, normalized: furthest from the paper's 2, 2, 16, 157 steps", off, 0),
        at_most(f"worst case, plain: distance from {PLAIN} steps", abs(plain[1000, GAMMA] - PLAIN), 0),
        at_most(
            "worst case, normalized: most steps for n = 100, 500, 1000", max(normalized[n, GAMMA] for n in SIZES), 5
        ),
        at_least("worst case, plain: steps for n = 1000 / n = 100", plain[1000, GAMMA] / plain[100, GAMMA], 5),
    ]


def imbalance(variant: str, seed: int, *, arms: dict[str, Make]) -> dict[str, int]:
    """20 dimensions, 500 examples, 1 or 3 of them around (0.5, -1, 0, ...), the others around (-0.5, -1, 0, ...)."""
    steps = {}
    for rare in (1, 3):
        x = 0.05 * torch.randn(500, 20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        signs = torch.where(torch.arange(500) < rare, 1.0, -1.0).double()
        x[:, 0] += 0.5 * signs
        x[:, 1] -= 1
        steps[f"rare {rare}"] = steps_until_right(signs[:, None] * x, arms[variant], GAMMA)
    return steps


def oscillation() -> dict[str, Any]:
    """Theorem 4.1's two examples, (1, -1) of label +1 and (-1, -4) of label -1: the loss over two plain steps."""
    signed = torch.tensor([[1.0, -1.0], [1.0, 4.0]], dtype=torch.float64)
    theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer, losses, right = PlainGD([theta], GAMMA), [], []
    for _ in range(3):
        margins = (signed @ theta).detach()
        losses.append(optimizer.loss(margins).item())
        right.append(int((margins > 0).sum()))
        if len(right) < 3:
            optimizer.step(lambda: signed @ theta)
    return {"variant": "theorem 4.1, plain", "losses": losses, "right": right, "theta": theta.tolist()}


def oscillation_checks(row: dict[str, Any]) -> list[Check]:
    before, after, _ = row["losses"]
    away = max(abs(found / GAMMA - limit) for found, limit in zip(row["theta"], (1, 0.25), strict=True))
    return [
        at_least("theorem 4.1: loss after one plain step / at the start", after / before, 12.5 / math.log(2) - 1e-9),
        at_least("theorem 4.1: examples right after two plain steps, of 2", row["right"][2], 2),
        at_most("theorem 4.1: distance of theta / 100 from (1, 1/4) then", away, 1e-6),
    ]


def on_digits(variant: str, seed: int, *, arms: dict[str, Make]) -> dict[str, list[int]]:
    """Pairs of digits, pixels standardized over all ten: 10 of the first and all of the second, and all of both."""
    pixels, labels = digits()
    x = pixels.flatten(1).double()
    x = (x - x.mean(0)) / x.std(0).clamp(min=1e-9)
    make, generator = arms[variant.removeprefix("digits, ")], torch.Generator().manual_seed(seed)
    steps: dict[str, list[int]] = {"rare": [], "balanced": []}
    for one, other in PAIRS:
        mine, others = x[labels == one], -x[labels == other]
        few = mine[torch.randperm(len(mine), generator=generator)[:10]]
        steps["rare"].append(steps_until_right(torch.cat([few, others]), make, GAMMA))
        steps["balanced"].append(steps_until_right(torch.cat([mine, others]), make, GAMMA))
    return steps


def notes(rows: Rows) -> list[str]:
    """Not gated: real data, where balance takes the advantage away."""
    lines = []
    for place, pair in enumerate(PAIRS):
        said = []
        for kind, words in (("rare", f"10 of digit {pair[0]}, all of {pair[1]}"), ("balanced", "all of both")):
            counts = {
                arm: sorted(row[kind][place] for row in rows if row["variant"] == f"digits, {arm}")
                for arm in ("normalized", "plain")
            }
            spans = [
                f"{arm} {found[0]}" + (f" to {found[-1]}" if found[-1] > found[0] else "")
                for arm, found in counts.items()
            ]
            said.append(f"{words}: {', '.join(spans)} steps")
        lines.append("not gated: " + "; ".join(said))
    return lines


def figure(evidence: Evidence) -> Figure:
    """Steps on the worst case over n, and on generated data for every seed."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(7.5, 3.4), layout="constrained")
    left, right = drawing.subplots(1, 2)
    for place, (arm, colour) in enumerate((("plain", "C0"), ("normalized", "C1"))):
        worst = [row for row in evidence.rows if row["variant"] == f"worst case, {arm}" and row["lr"] == GAMMA]
        points = sorted((row["n"], row["steps"]) for row in worst)
        left.plot(*zip(*points, strict=True), "o-", color=colour, label=arm)
        for group, rare in enumerate((1, 3)):
            counts = evidence.rows.values(arm, f"rare {rare}")
            middle = group + 0.3 * (place - 0.5)
            offsets = torch.linspace(-0.08, 0.08, len(counts)).tolist()
            right.plot([middle + offset for offset in offsets], counts, "o", color=colour, markersize=4, alpha=0.6)
    left.set_xlabel("n, one example of them of the rare class")
    left.set_ylabel("steps until all are right")
    left.set_title("Worst case, step size 100", fontsize="medium")
    left.legend()
    right.set_xticks((0, 1), ("1 rare of 500", "3 rare of 500"))
    right.set_xlim(-0.5, 1.5)
    right.set_title("Generated data, a dot per seed", fontsize="medium")
    for axes in (left, right):
        axes.set_yscale("log")
        axes.set_ylim(1, 500)
    return drawing
