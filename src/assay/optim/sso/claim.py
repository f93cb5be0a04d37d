"""Training loss of logistic regression after equally many gradients in the outputs, of five optimizers."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from assay.bench.evidence import Bench, Evidence, Rows, at_least, at_most
from assay.optim import SSO

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Make = Callable[..., torch.optim.Optimizer]
EXAMPLES, CALLS, BATCH, BATCH_CALLS = 400, 50, 25, 100
STEPS = (1, 10, 50)
"""Inner steps m."""
RATES = {"SGD": (0.3, 1.0, 3.0, 10.0, 30.0, 100.0), "Adam": (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)}
RATES |= {f"SSO({m})": (4.0, 16.0, 64.0) for m in STEPS}
"""Grids that were tuned on: step sizes; for SSO eta where the loss is a sum, so lr = n eta for a mean. 1/L is 4."""
THEORY = ", eta = 1/L"
CHOSEN = {"SGD": 3.0, "Adam": 0.1, "SSO(1)": 16.0, "SSO(10)": 64.0, "SSO(50)": 64.0}
DECAY, CONSTANT = "SSO(10) on batches, 1/sqrt(t)", "SSO(10) on batches, constant"
BATCHES = {"SGD on batches": 3.0, "SSO(1) on batches": 4.0, CONSTANT: 64.0, DECAY: 64.0}
PARTS = ("guarantee", "all data", "batches")


def claim(
    bench: Bench,
    *,
    method: Make = SSO,
    parts: Sequence[str] = PARTS,
    careful: Sequence[int] = (10, 50),
    seeds: int = 10,
) -> Evidence:
    """``method`` is the optimizer under test; the rates in CHOSEN were the best of RATES on seeds 0 to 2.

    ``careful`` are the inner steps that are taken with eta = 1/L, where the loss must not rise.
    """
    run = functools.partial(train, method=method)
    rows, checks = Rows(), []
    if "guarantee" in parts:
        rows += bench.rows(run, [f"SSO({m}){THEORY}" for m in careful], bench.seeds(3))
        rises = max(row["largest rise"] for row in rows)
        checks.append(at_most("eta = 1/L, all data: largest rise of the loss in a step", rises, 1e-12))
        checks.append(at_least("steps for each gradient in the outputs", min(row["pace"] for row in rows), 1))
    if "all data" in parts:
        rows += bench.rows(run, list(RATES), bench.seeds(seeds))
        for better, worse, bound in (("SSO(50)", "SGD", 0.7), ("SSO(50)", "SSO(10)", 1), ("SSO(10)", "SSO(1)", 1)):
            ratio = rows.ratio(better, worse, "loss")
            checks.append(at_most(f"loss after 50 gradients: {better} / {worse}", ratio, bound))
    if "batches" in parts:
        rows += bench.rows(run, list(BATCHES), bench.seeds(seeds))
        ratio = rows.ratio(DECAY, CONSTANT, "loss")
        checks.append(at_most("loss after 100 batches of 25: eta / sqrt(t) / constant eta, m = 10", ratio, 1))
    return Evidence(rows, checks, notes(rows))


@functools.cache
def examples(seed: int) -> tuple[Tensor, Tensor]:
    """400 of the 569 tumours of scikit-learn's breast cancer data, standardized, with a constant feature."""
    from sklearn.datasets import load_breast_cancer

    X, y = load_breast_cancer(return_X_y=True)
    chosen = np.random.default_rng(seed).permutation(len(X))[:EXAMPLES]
    X = (X[chosen] - X[chosen].mean(0)) / X[chosen].std(0)
    return torch.tensor(np.column_stack([X, np.ones(EXAMPLES)])), torch.tensor(y[chosen]).double()


def train(variant: str, seed: int, *, method: Make, rate: float | None = None) -> dict[str, Any]:
    """From zero weights, in float64, until the gradients in the outputs are used up."""
    on_batches = "on batches" in variant
    X, y = examples(seed)
    most, size = (BATCH_CALLS, BATCH) if on_batches else (CALLS, EXAMPLES)
    if rate is None:
        rate = BATCHES[variant] if on_batches else 4.0 if variant.endswith(THEORY) else CHOSEN[variant]
    w = torch.zeros(X.shape[1], dtype=torch.float64, requires_grad=True)
    draws, calls = torch.Generator().manual_seed(seed), 0
    if variant.startswith("SSO"):
        m = int(variant.partition("(")[2].partition(")")[0])
        schedule = {"schedule": "stochastic"} if variant == DECAY else {}
        optimizer = method([w], rate * size, m, **schedule)
    else:
        optimizer = {"SGD": torch.optim.SGD, "Adam": torch.optim.Adam}[variant.split()[0]]([w], rate)

    def full_loss() -> float:
        with torch.no_grad():
            return F.binary_cross_entropy_with_logits(X @ w, y).item()

    curve, steps, start = [(0, full_loss())], 0, time.process_time()
    while calls < most:
        batch = torch.randperm(EXAMPLES, generator=draws)[:size]
        rows, labels = X[batch], y[batch]

        def loss_fn(z: Tensor, labels: Tensor = labels) -> Tensor:
            nonlocal calls
            calls += 1
            return F.binary_cross_entropy_with_logits(z, labels)

        def closure(rows: Tensor = rows, loss_fn: Any = loss_fn) -> Any:
            if variant.startswith("SSO"):
                return rows @ w, loss_fn
            optimizer.zero_grad()
            loss = loss_fn(rows @ w)
            loss.backward()
            return loss

        optimizer.step(closure)
        steps += 1
        curve.append((calls, full_loss()))
    rise = max(after - before for (_, before), (_, after) in itertools.pairwise(curve))
    curve = [(n, loss) for n, loss in curve if n <= most]
    found = {"loss": curve[-1][1], "loss after 20": [loss for n, loss in curve if n <= 20][-1], "rate": rate}
    found |= {"pace": steps / calls, "largest rise": rise, "seconds": time.process_time() - start}
    return found | {"curve": curve if seed == 100 else []}


def tune(seeds: Sequence[int] = (0, 1, 2)) -> dict[str, dict[float, float]]:
    """Mean loss after all gradients of every rate on its grid: how CHOSEN was found."""
    return {
        arm: {rate: float(np.mean([train(arm, s, method=SSO, rate=rate)["loss"] for s in seeds])) for rate in grid}
        for arm, grid in RATES.items()
    }


def notes(rows: Rows) -> list[str]:
    """Not gated: all losses, and the processor seconds that a run took."""
    lines = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        last, early, seconds = (rows.values(variant, name).mean() for name in ("loss", "loss after 20", "seconds"))
        lines.append(f"{variant}: loss {early:.4f} after 20 gradients, {last:.4f} at the end, {seconds:.2f} s a run")
    return lines


def figure(evidence: Evidence) -> Figure:
    """Training loss over the gradients in the outputs, of the first seed."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(8, 3.5), layout="constrained")
    panels = drawing.subplots(1, 2)
    for axes, title in zip(panels, ("400 examples in each step", "batches of 25"), strict=True):
        shown = [
            row for row in evidence.rows if row["curve"] and ("on batches" in row["variant"]) == (axes is panels[1])
        ]
        for row in shown:
            label = row["variant"].replace(" on batches", "")
            axes.plot(*zip(*row["curve"], strict=True), "--" if "SSO" not in label else "-", label=label)
        axes.set_yscale("log")
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("gradients in the outputs")
        axes.legend(fontsize="small")
    panels[0].set_ylabel("mean logistic loss, training data")
    return drawing
