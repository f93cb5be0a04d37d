"""Regret where the mean gradient flips slowly, where it flips every round, and under noise of two sizes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from assay.bench.evidence import Bench, Evidence, Rows, at_most
from assay.online import Ball, DynamicOMD, SEAEnvironment, regret
from assay.optim import OptimisticOMD

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Make = Callable[..., Any]
ROUNDS, DIM, DIAMETER = 4000, 4, 2.0
OMD, OGD, ADAGRAD, DYNAMIC = "optimistic OMD", "OGD", "AdaGrad", "dynamic OMD"
STRONG = "optimistic OMD, strongly convex"
SLOW, SLOW_NOISY, FAST = "flips every 64", "flips every 64, sigma 0.3", "flips every round"
QUIET, LOUD, DRIFT = "quadratic, sigma 0.05", "quadratic, sigma 1", "quadratic, flips every 64"
SETTINGS: dict[str, dict[str, Any]] = {
    SLOW: {"flip_every": 64},
    SLOW_NOISY: {"flip_every": 64, "sigma": 0.3},
    FAST: {"flip_every": 1},
    QUIET: {"loss": "quadratic", "amplitude": 0.5, "flip_every": None, "sigma": 0.05},
    LOUD: {"loss": "quadratic", "amplitude": 0.5, "flip_every": None, "sigma": 1.0},
    DRIFT: {"loss": "quadratic", "amplitude": 0.5, "flip_every": 64},
}
BOUNDED, REPORTED = (OMD, OGD, ADAGRAD), (STRONG, DYNAMIC)


class GradientDescent:
    """Projected online gradient descent; ``total`` says what eta_t divides by after the gradients so far."""

    def __init__(self, lipschitz: float, adaptive: bool) -> None:
        self.decision = torch.zeros(DIM, dtype=torch.float64)
        self.lipschitz, self.adaptive, self.t, self.squares, self.cost = lipschitz, adaptive, 0, 0.0, 0.0

    def update(self, g: Tensor) -> None:
        self.t += 1
        self.squares += float(g @ g)
        total = self.squares if self.adaptive else self.lipschitz**2 * self.t
        self.eta = DIAMETER / math.sqrt(max(total, 1e-12))
        self.cost += self.eta * float(g @ g)
        self.decision = Ball().project(self.decision - self.eta * g)

    def regret_bound(self) -> float:
        """The bound of OptimisticOMD for guesses of 0."""
        return DIAMETER**2 / (2 * self.eta) + self.cost


class Learner:
    """An optimizer as a learner that is handed gradients."""

    def __init__(self, make: Make, **options: Any) -> None:
        self.x = torch.nn.Parameter(torch.zeros(DIM, dtype=torch.float64))
        self.optimizer = make([self.x], diameter=DIAMETER, domain=Ball(), **options)
        self.regret_bound = self.optimizer.regret_bound

    @property
    def decision(self) -> Tensor:
        return self.x.detach().clone()

    def update(self, g: Tensor) -> None:
        self.x.grad = g
        self.optimizer.step()


def claim(
    bench: Bench,
    *,
    method: Make = OptimisticOMD,
    settings: Iterable[str] = tuple(SETTINGS),
    reported: Sequence[str] = REPORTED,
    seeds: int = 10,
) -> Evidence:
    """``method`` is the optimizer under test; nothing is tuned: all learners take the constants of their theory."""
    run = functools.partial(play, method=method, rounds=bench.scale(ROUNDS, 2000))
    rows, settings = Rows(), set(settings)
    for setting in (s for s in SETTINGS if s in settings):
        noisy, quadratic = "sigma" in SETTINGS[setting], "loss" in SETTINGS[setting]
        gated, others = ((OMD,), (OGD, ADAGRAD, *reported)) if quadratic else ((OMD, OGD, ADAGRAD), ())
        rows += bench.rows(run, [f"{arm} | {setting}" for arm in gated], bench.seeds(seeds if noisy else 1))
        rows += bench.rows(run, [f"{arm} | {setting}" for arm in others], bench.seeds(3 if noisy else 1))
    return Evidence(rows, checks(rows, settings, bench.scale(ROUNDS, 2000)), notes(rows))


def play(variant: str, seed: int, *, method: Make, rounds: int) -> dict[str, float]:
    """One game, all of it in float64: regret against the best fixed point, and against the best of every round."""
    arm, setting = variant.split(" | ")
    options = SETTINGS[setting]
    environment = SEAEnvironment(rounds, DIM, seed=seed, **options)
    quadratic, sigma = options.get("loss") == "quadratic", options.get("sigma", 0.0)
    lipschitz = (1 + options["amplitude"] if quadratic else 1.0) + 3 * sigma
    learner = {
        OMD: lambda: Learner(method, lipschitz=lipschitz),
        STRONG: lambda: Learner(method, mode="strongly_convex", strong_convexity=1.0),
        OGD: lambda: GradientDescent(lipschitz, adaptive=False),
        ADAGRAD: lambda: GradientDescent(lipschitz, adaptive=True),
        DYNAMIC: lambda: DynamicOMD(DIM, diameter=DIAMETER, lipschitz=lipschitz, smoothness=1.0, rounds=rounds),
    }[arm]()
    decisions, gradients = [], []
    for f in environment:
        decisions.append(learner.decision)
        gradients.append(f.grad(decisions[-1]))
        learner.update(gradients[-1])
    x, g = torch.stack(decisions), torch.stack(gradients)
    found = {
        "regret": regret(environment, x, environment.best_fixed(Ball())).item(),
        # Of the losses <g_t, x>, against the best point of the ball: what the bound is for.
        "linear regret": ((x * g).sum() + g.sum(0).norm()).item(),
        "curve": (x * g).sum(1).cumsum(0)[:: max(1, rounds // 100)].tolist() if seed == 100 else [],
        "outside": max(0.0, x.norm(dim=1).max().item() - 1),
    }
    if quadratic:
        found["dynamic regret"] = regret(environment, x, Ball().project(environment.means)).item()
    if arm in BOUNDED:
        found["bound"] = learner.regret_bound()
    return found


def checks(rows: Rows, settings: set[str], rounds: int) -> list[Any]:
    def values(arm: str, setting: str, metric: str = "regret") -> Any:
        found = rows.values(f"{arm} | {setting}", metric)
        return found if "sigma" in SETTINGS[setting] else float(found[0])

    found = []
    for setting in sorted(settings & {SLOW, SLOW_NOISY}):
        for arm in (OGD, ADAGRAD):
            gap = values(OMD, setting) - values(arm, setting)
            found.append(at_most(f"{setting}: regret of OMD minus that of {arm}", gap, -rounds / 4))
    if FAST in settings:
        excess = values(OMD, FAST) - 2 * values(OGD, FAST)
        found.append(at_most(f"{FAST}: regret of OMD minus twice that of OGD", excess, 50))
    if SLOW in settings:
        ratio = values(OMD, SLOW, "bound") / values(OGD, SLOW, "bound")
        found.append(at_most(f"{SLOW}: bound of OMD / bound of OGD", ratio, 0.3))
    if settings >= {QUIET, LOUD}:
        ratio = values(OMD, QUIET) / values(OMD, LOUD)
        found.append(at_most("quadratic: regret of OMD with sigma 0.05 / with sigma 1", ratio, 0.15))
    games = [row for row in rows if row["variant"].startswith(f"{OMD} |")]
    used = max(row["linear regret"] / row["bound"] for row in games)
    found.append(at_most("OMD, all games: largest share of the deterministic bound that was used", used, 1))
    return found


def notes(rows: Rows) -> list[str]:
    """Not gated: the losses' own curvature, and a comparator that moves."""
    lines = []
    for setting in (QUIET, LOUD, DRIFT):
        if variants := [row["variant"] for row in rows if row["variant"].endswith(f"| {setting}")]:
            said = []
            for variant in dict.fromkeys(variants):
                fixed, moving = (rows.values(variant, metric).mean() for metric in ("regret", "dynamic regret"))
                said.append(f"{variant.split(' | ')[0]} {fixed:.1f} and {moving:.1f}")
            lines.append(f"not gated: {setting}, regret and dynamic regret of {', '.join(said)}")
    return lines


def figure(evidence: Evidence) -> Figure:
    """What the learners lost so far, over the rounds, with slow and with fast flips."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(9, 3.3), layout="constrained")
    panels = drawing.subplots(1, 3)
    for axes, setting in zip(panels, (SLOW, SLOW_NOISY, FAST), strict=True):
        for arm, style in zip((OGD, ADAGRAD, OMD), ("C0--", "C2:", "C1-"), strict=True):
            curve = next(row["curve"] for row in evidence.rows if row["variant"] == f"{arm} | {setting}")
            axes.plot([ROUNDS / len(curve) * place for place in range(len(curve))], curve, style, label=arm)
        axes.set_title(setting, fontsize="medium")
        axes.set_xlabel("round")
    panels[0].set_ylabel("sum of losses so far")
    panels[0].legend(fontsize="small")
    return drawing
