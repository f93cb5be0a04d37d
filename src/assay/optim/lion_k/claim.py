"""Does Lion-K solve the constrained problem that its kappa stands for? Ten kappas beside proximal gradient descent."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.bench.evidence import Bench, Evidence, Rows, at_least, at_most
from assay.optim.lion_k.kappas import L1, HalfSquare, Huber, Kappa, LogCosh, SoftThreshold
from assay.optim.lion_k.lion_k import LionK, lion_constraint_violation
from assay.optim.lion_k.norms import L2, L2Rows, Lp, Nuclear, TopK

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Make = Callable[..., torch.optim.Optimizer]
STEPS, LR, FIRST = 4000, 1e-2, 3.0
"""Full-batch steps from ``FIRST`` * N(0, 1), far outside; the rate falls tenfold after a half and three quarters."""
EVERY = 50


@dataclass(frozen=True)
class Problem:
    """min f(w) + K*(lam w) / lam, with f smooth: its gradient changes by at most ``smooth`` times the distance."""

    f: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor], Tensor]
    shape: tuple[int, ...]
    smooth: float

    def objective(self, w: Tensor, kappa: Kappa, lam: float) -> float:
        """With the penalty at the nearest point of its domain: how far w is outside is measured apart."""
        return (self.f(w) + kappa.penalty(kappa.project(lam * w)) / lam).item()


def logistic() -> Problem:
    """Breast cancer, 30 standardized features, no intercept: mean logistic loss."""
    from sklearn.datasets import load_breast_cancer

    x, labels = map(torch.as_tensor, load_breast_cancer(return_X_y=True))
    signed = (2 * labels - 1)[:, None] * (x - x.mean(0)) / x.std(0)

    def gradient(w: Tensor) -> Tensor:
        return -(torch.sigmoid(-signed @ w) @ signed) / len(signed)

    smooth = torch.linalg.matrix_norm(signed, 2).item() ** 2 / 4 / len(signed)
    return Problem(lambda w: F.softplus(-signed @ w).mean(), gradient, (30,), smooth)


def least_squares() -> Problem:
    """Wine, 13 standardized features, the indicators of three classes: half the mean squared error of a matrix."""
    from sklearn.datasets import load_wine

    x, labels = map(torch.as_tensor, load_wine(return_X_y=True))
    x, y = (x - x.mean(0)) / x.std(0), F.one_hot(labels).double()
    y = y - y.mean(0)
    smooth = torch.linalg.matrix_norm(x, 2).item() ** 2 / len(x)
    return Problem(
        lambda w: (x @ w - y).square().sum() / 2 / len(x), lambda w: x.T @ (x @ w - y) / len(x), (13, 3), smooth
    )


LION = ("l1, decay 5", "l1, decay 10")
CASES: dict[str, tuple[Callable[[], Problem], Kappa, float]] = {
    LION[0]: (logistic, L1(), 5.0),
    LION[1]: (logistic, L1(), 10.0),
    "soft threshold": (logistic, SoftThreshold(0.03), 10.0),
    "top k": (logistic, TopK(5), 10.0),
    "Huber": (logistic, Huber(0.05), 10.0),
    "log cosh": (logistic, LogCosh(), 10.0),
    "l1.5": (logistic, Lp(1.5), 10.0),
    "l2": (logistic, L2(), 10.0),
    "half square": (logistic, HalfSquare(), 10.0),
    "l2 of rows": (least_squares, L2Rows(), 20.0),
    "nuclear": (least_squares, Nuclear(None), 10.0),
}
LOOSE = "nuclear, 5 steps of Newton and Schulz"
ADAMW = "AdamW, decay 10"
UNGATED = {LOOSE: (least_squares, Nuclear(5), 10.0), ADAMW: (logistic, L1(), 10.0)}


def claim(
    bench: Bench, *, method: Make = LionK, cases: Collection[str] = (*CASES, *UNGATED), seeds: int = 5,
    steps: int = STEPS,
) -> Evidence:  # fmt: skip
    """``method`` is called as LionK is: with parameters, ``lr``, ``weight_decay`` and ``kappa``."""
    best = {name: solved(name) for name in cases}
    run = functools.partial(descend, best, method, bench.scale(steps, least=600))
    rows = bench.rows(run, cases, bench.seeds(seeds))
    gated = [name for name in cases if name in CASES]
    family = [name for name in gated if name not in LION]
    checks = []
    for name in gated:
        bound = 1e-6 if name in LION else 1e-4
        checks.append(at_most(f"{name}: distance of the objective from its minimum", rows.values(name, "gap"), bound))
    for name in gated:
        if name in LION:
            checks += [
                at_most(f"{name}: violation of the constraint", rows.values(name, "violation"), 1e-9),
                at_least(f"{name}: largest weight, in units of the bound", rows.values(name, "largest"), 1 - 1e-6),
            ]
    if family:
        checks.append(at_most("the others: largest violation", worst(rows, family, "violation"), 1e-6))
    checks.append(
        at_most(f"violation after / before {EVERY} steps, in units of theory's", worst(rows, gated, "shrinks"), 1.05)
    )
    notes = [
        f"not gated: {name}: violation {rows.values(name, 'violation').mean():.2g}, objective off its minimum by "
        f"{rows.values(name, 'gap').mean():.2g}"
        for name in cases
        if name in UNGATED
    ]
    return Evidence(rows, checks, notes)


def worst(rows: Rows, names: Collection[str], metric: str) -> Any:
    """The largest value over the cases, for every seed."""
    return torch.stack([torch.as_tensor(rows.values(name, metric)) for name in names]).amax(0).numpy()


def descend(best: dict[str, float], method: Make, steps: int, variant: str, seed: int) -> dict[str, Any]:
    """One descent; the violation is read every 50 steps, and its shrinking while the rate is constant."""
    build, kappa, lam = {**CASES, **UNGATED}[variant]
    problem = build()
    generator = torch.Generator().manual_seed(seed)
    w = nn.Parameter(FIRST * torch.randn(problem.shape, generator=generator, dtype=torch.float64))
    if variant == ADAMW:
        optimizer: torch.optim.Optimizer = torch.optim.AdamW([w], lr=LR, weight_decay=lam)
    else:
        optimizer = method([w], lr=LR, weight_decay=lam, kappa=kappa)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [steps // 2, steps * 3 // 4], gamma=0.1)
    judge, violations = LionK([w], weight_decay=lam, kappa=kappa), []
    for step in range(steps):
        if step % EVERY == 0:
            violations.append(lion_constraint_violation(judge))
        w.grad = problem.gradient(w.detach())
        optimizer.step()
        schedule.step()
    early = violations[: steps // 2 // EVERY]
    shrinks = [after / before for before, after in itertools.pairwise(early) if before > 1e-9]
    found = w.detach()
    return {
        "gap": abs(problem.objective(found, kappa, lam) - best[variant]),
        "violation": lion_constraint_violation(judge),
        "shrinks": max(shrinks, default=0.0) / (1 - LR * lam) ** EVERY,
        "largest": lam * found.abs().max().item(),
        "violations": [float(f"{value:.3g}") for value in violations[:16]],
        "weights": [round(value, 5) for value in found.flatten().tolist()] if seed == 100 else [],
    }


def solved(name: str) -> float:
    """The minimum, by proximal gradient descent with Nesterov's momentum until nothing moves."""
    build, kappa, lam = {**CASES, **UNGATED}[name]
    problem = build()
    w = ahead = torch.zeros(problem.shape, dtype=torch.float64)
    t = 1.0
    for _ in range(5000):
        new = proximal(kappa, ahead - problem.gradient(ahead) / problem.smooth, 1 / problem.smooth, lam)
        t, previous_t = (1 + math.sqrt(1 + 4 * t * t)) / 2, t
        ahead, w, moved = new + (previous_t - 1) / t * (new - w), new, (new - w).norm()
        if moved < 1e-14:
            break
    return problem.objective(w, kappa, lam)


def proximal(kappa: Kappa, v: Tensor, s: float, lam: float) -> Tensor:
    """The minimum over x of ``|x - v|^2 / 2s + K*(lam x) / lam``; where K* is 0 or infinite, the projection."""
    if isinstance(kappa, LogCosh):  # x + s atanh(lam x) = v: by bisection
        low, high = torch.full_like(v, -1 / lam), torch.full_like(v, 1 / lam)
        for _ in range(60):
            x = (low + high) / 2
            small = x + s * torch.atanh(lam * x) < v
            low, high = torch.where(small, x, low), torch.where(small, high, x)
        return (low + high) / 2
    if isinstance(kappa, SoftThreshold):
        v = v.sign() * (v.abs() - s * kappa.e).clamp(min=0)
    if isinstance(kappa, Huber):
        v = v / (1 + s * kappa.e * lam)
    if isinstance(kappa, HalfSquare):
        v = v / (1 + s * lam)
    return kappa.project(lam * v) / lam


def figure(evidence: Evidence) -> Figure:
    """The violation over the steps beside theory's line, and the 30 weights that four kappas end with."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = drawing.subplots(1, 2)
    for place, (name, lam) in enumerate(zip(LION, (5, 10), strict=True)):
        curves = [row["violations"] for row in evidence.rows if row["variant"] == name]
        for i, curve in enumerate(curves):
            steps = [EVERY * k for k, value in enumerate(curve) if value > 1e-12]
            label = f"Lion, {name.partition(', ')[2]}" if i == 0 else None
            left.plot(steps, curve[: len(steps)], f"C{place}.-", alpha=0.6, linewidth=0.8, label=label)
            theory = [curve[0] * (1 - LR * lam) ** step for step in steps]
            left.plot(steps, theory, "k:", linewidth=0.8, label="theory's bound" if i == place == 0 else None)
    left.set(xlabel="step", ylabel="distance from the box, times the decay", yscale="log")
    left.legend(fontsize="small")
    for place, name in enumerate((LION[1], "soft threshold", "top k", "l2")):
        weights = next((row["weights"] for row in evidence.rows if row["variant"] == name and row["weights"]), [])
        right.plot(sorted(weights), f"C{place}.-", linewidth=0.7, markersize=4, label=name)
    right.axhline(0.1, color="0.8", linewidth=0.8)
    right.axhline(-0.1, color="0.8", linewidth=0.8)
    right.set(xlabel="weights in order", ylabel="weight at the end, decay 10")
    right.legend(fontsize="small", title="kappa")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return drawing
