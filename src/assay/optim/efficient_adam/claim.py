"""One bit a weight in both directions: digits with four workers, and least squares with eight different ones."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.bench.datasets import split_digits
from assay.bench.evidence import Bench, Evidence, Rows, at_least, at_most
from assay.optim.efficient_adam.compressors import LogQuantizer
from assay.optim.efficient_adam.efficient_adam import SimulatedEfficientAdam

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Make = Callable[..., Any]
PARTS = ("digits", "squares")
SEEDS = {"digits": 8, "reported": 2, "squares": 5}
EPOCHS, WORKERS, EACH = 12, 4, 16
ROUNDS, DIMENSION, MACHINES, NOISE, APART = 400, 10, 8, 0.3, 0.1
FULL, SIGN, NO_FEEDBACK, LOG = "full precision", "signs", "signs, no feedback", "log levels"
LOG_NO_FEEDBACK, ONE_SIDE = "log levels, no feedback", "signs, workers' feedback"


def claim(
    bench: Bench, *, method: Make = SimulatedEfficientAdam, parts: Collection[str] = PARTS,
    seeds: Mapping[str, int] = SEEDS,
) -> Evidence:  # fmt: skip
    """Accuracy and bytes on digits, distance to the solution on least squares; nothing is tuned."""
    rows, checks, notes = Rows(), [], []
    log = {"worker_compressor": LogQuantizer(3), "server_compressor": LogQuantizer(3)}
    arms = {
        FULL: {"worker_compressor": "identity", "server_compressor": "identity"},
        SIGN: {},
        NO_FEEDBACK: {"error_feedback": False},
        LOG: log,
        LOG_NO_FEEDBACK: {**log, "error_feedback": False},
        ONE_SIDE: {"error_feedback": "worker"},
    }
    makers = {arm: functools.partial(method, **how) for arm, how in arms.items()}
    if "digits" in parts:
        run = functools.partial(digits, makers, bench.scale(EPOCHS))
        found = bench.rows(run, [FULL, SIGN, NO_FEEDBACK, LOG], bench.seeds(seeds["digits"]))
        for arm, bound in ((SIGN, -0.015), (LOG, -0.005)):
            gain = found.difference(arm, FULL, "accuracy")
            checks.append(at_least(f"digits: accuracy, {arm} - {FULL}", gain, bound))
        for way in ("sent", "received"):
            share = found.ratio(SIGN, FULL, way)[0]
            checks.append(at_most(f"digits: bytes {way} by a worker, {SIGN} / {FULL}", share, 1 / 25))
        lost = found.difference(NO_FEEDBACK, FULL, "accuracy")
        checks.append(at_most(f"digits: accuracy, {NO_FEEDBACK} - {FULL}", lost, -0.05))
        found += bench.rows(run, [LOG_NO_FEEDBACK, ONE_SIDE], bench.seeds(min(seeds["digits"], seeds["reported"])))
        notes += [f"digits, {arm}: {summary(found, arm)}" for arm in arms]
        rows += found
    if "squares" in parts:
        run = functools.partial(squares, makers, bench.scale(ROUNDS))
        found = bench.rows(run, [FULL, SIGN, NO_FEEDBACK], bench.seeds(seeds["squares"]))
        for arm, check, bound in ((SIGN, at_most, 1.5), (NO_FEEDBACK, at_least, 3.0)):
            checks.append(check(f"least squares: distance, {arm} / {FULL}", found.ratio(arm, FULL, "distance"), bound))
        rows += [row | {"variant": f"least squares: {row['variant']}"} for row in found]
    return Evidence(rows, checks, notes)


def summary(rows: Rows, arm: str) -> str:
    accuracy, loss, sent = (rows.values(arm, metric).mean() for metric in ("accuracy", "loss", "sent"))
    return f"accuracy {100 * accuracy:.1f} %, training loss {loss:.3f}, {sent / 1e6:.3f} MB sent by a worker"


def digits(makers: dict[str, Make], epochs: int, variant: str, seed: int) -> dict[str, Any]:
    """Train an MLP 64-64-64-10 on half of the digits; each worker sees 16 of them in a round."""
    train, test = split_digits(1000 + seed, train=898)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    params = list(model.parameters())
    optimizer = makers[variant](params, WORKERS, lr=1e-3)
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for chosen in torch.randperm(len(train[0]), generator=order).split(WORKERS * EACH):
            if len(chosen) == WORKERS * EACH:
                losses = [F.cross_entropy(model(train[0][part]), train[1][part]) for part in chosen.split(EACH)]
                optimizer.step([torch.autograd.grad(loss, params) for loss in losses])
    with torch.no_grad():
        accuracy = (model(test[0]).argmax(1) == test[1]).double().mean().item()
        loss = F.cross_entropy(model(train[0]), train[1]).item()
    return {"accuracy": accuracy, "loss": loss, **optimizer.traffic._asdict()}


def squares(makers: dict[str, Make], rounds: int, variant: str, seed: int) -> dict[str, Any]:
    """``f_i(x) = ||A_i x - b_i||^2 / 2`` with noisy gradients; the distance to the solution of their sum at the end.

    No worker's own gradient is 0 there: what the workers send must cancel in the mean.
    """
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(MACHINES, 20, DIMENSION, generator=generator, dtype=torch.float64) / 20**0.5
    wanted = torch.randn(DIMENSION, 1, generator=generator, dtype=torch.float64)
    b = A @ wanted + APART * torch.randn(MACHINES, 20, 1, generator=generator, dtype=torch.float64)
    solution = torch.linalg.lstsq(A.flatten(0, 1), b.flatten(0, 1)).solution
    x = nn.Parameter(torch.zeros(DIMENSION, 1, dtype=torch.float64))
    optimizer = makers[variant]([x], MACHINES, lr=0.1, lr_decay="sqrt")
    distances = []
    for _ in range(rounds):
        noise = NOISE * torch.randn(MACHINES, DIMENSION, 1, generator=generator, dtype=torch.float64)
        grads: Tensor = A.mT @ (A @ x.detach() - b) + noise
        optimizer.step([[g] for g in grads])
        distances.append((x.detach() - solution).norm().item())
    return {"distance": sum(distances[-rounds // 5 :]) / len(distances[-rounds // 5 :])}


def figure(evidence: Evidence) -> Figure:
    """Accuracy on digits over the bytes that a worker sends, and the distance on least squares, run by run."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(8, 3.8), layout="constrained")
    left, right = drawing.subplots(1, 2)
    for axes, metric in ((left, "accuracy"), (right, "distance")):
        rows = [row for row in evidence.rows if metric in row]
        variants = list(dict.fromkeys(row["variant"] for row in rows))
        for height, variant in enumerate(variants):
            chosen = [row for row in rows if row["variant"] == variant]
            values = [100 * row[metric] if metric == "accuracy" else row[metric] for row in chosen]
            axes.plot(values, [height] * len(values), f"C{height}o", alpha=0.5)
        names = [variant.removeprefix("least squares: ") for variant in variants]
        sent = [next(row for row in rows if row["variant"] == variant).get("sent") for variant in variants]
        labels = [
            f"{name}\n{bytes_ / 1e6:.2f} MB" if bytes_ else name for name, bytes_ in zip(names, sent, strict=True)
        ]
        axes.set_yticks(range(len(variants)), labels, fontsize="small")
        axes.invert_yaxis()
    left.set_xlabel("test accuracy on digits, %")
    right.set_xlabel("distance to the solution, least squares")
    right.set_xscale("log")
    return drawing
