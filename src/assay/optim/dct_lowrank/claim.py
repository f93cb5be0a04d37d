"""Columns of a cosine basis beside singular vectors and random subspaces: what they lose, train to, cost and keep."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from assay.bench.evidence import Bench, Evidence, Rows, at_least, at_most
from assay.bench.models import ByteTransformer
from assay.bench.tasks import byte_loss, resolve_task
from assay.optim._lowrank import Projector, RandomProjector, SVDProjector
from assay.optim.dct_lowrank.dct import dct_matrix
from assay.optim.dct_lowrank.dct_lowrank import DCTProjector, LowRankAdamW

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Choice = Callable[..., Projector]
PARTS = ("errors", "training", "time")
STEPS, LENGTH, WIDTH, BATCH = 300, 32, 64, 8
QUARTER, EIGHTH = 1 / 4, 1 / 8
SIDE, RANKS = 1024, (64, 512)
# Each the best of 1e-3, 3e-3 and 1e-2 by training loss on seed 0.
RATES = {"AdamW": 3e-3, "DCT": 3e-3, "SVD": 3e-3, "random": 3e-3}


class FirstColumns(DCTProjector):
    """The r lowest frequencies, whatever the gradient."""

    def update(self, G: Tensor) -> Tensor:
        self.memory["indices"] = torch.arange(self.rank, dtype=torch.int32)
        return self.project(G)


def claim(
    bench: Bench,
    *,
    projector: Choice = DCTProjector,
    parts: Collection[str] = PARTS,
    seeds: int = 6,
    steps: int = STEPS,
) -> Evidence:
    """``projector`` is under test, called with a shape and a rank (and a transform, for its time)."""
    choices: dict[str, Choice] = {"DCT": projector, "SVD": SVDProjector, "random": RandomProjector}
    evidence = Evidence(Rows(), [])
    if "errors" in parts:
        run = functools.partial(errors, {**choices, "first": FirstColumns}, bench.scale(steps))
        found = bench.rows(run, ["gradients"], bench.seeds(seeds // 2))
        for other in ("random", "first"):
            gap = found.values("gradients", "DCT") - found.values("gradients", other)
            evidence.checks.append(at_most(f"relative error of the projection at m/4, DCT - {other}", gap, 0))
        evidence.rows += found
        means = ", ".join(f"{name} {found.values('gradients', name).mean():.3f}" for name in (*choices, "first"))
        evidence.notes.append(f"relative error of the projection at m/4: {means}")
    if "training" in parts:
        evidence = _training(bench, choices, seeds, steps, evidence)
    if "time" in parts:
        found = bench.rows(functools.partial(times, projector), ["time"], bench.seeds(seeds))
        for transform, bound in (("fft", 10), ("matmul", 5)):
            for rank in RANKS:
                ratio = found.values("time", "SVD") / found.values("time", f"{transform} {rank}")
                name = f"time at {SIDE} x {SIDE}, rank {rank}, SVD / DCT by {transform}"
                evidence.checks.append(at_least(name, ratio, bound))
            growth = found.values("time", f"{transform} {RANKS[1]}") / found.values("time", f"{transform} {RANKS[0]}")
            evidence.checks.append(
                at_most(f"time of DCT by {transform}, rank {RANKS[1]} / rank {RANKS[0]}", growth, 1.5)
            )
        evidence.rows += found
    return evidence


def _training(bench: Bench, choices: dict[str, Choice], seeds: int, steps: int, evidence: Evidence) -> Evidence:
    low = functools.partial(LowRankAdamW, error_feedback=False)
    makers: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "AdamW": functools.partial(torch.optim.AdamW, lr=RATES["AdamW"], weight_decay=0.0)
    }
    for name, choice in choices.items():
        makers[name] = functools.partial(low, lr=RATES[name], projector=choice, rank=QUARTER)
    # What is only reported, on fewer seeds.
    reported = {f"{name}, m/8": functools.partial(makers[name], rank=EIGHTH) for name in choices}
    reported["DCT, feedback"] = functools.partial(makers["DCT"], error_feedback=True)
    reported["DCT, 4-bit feedback"] = functools.partial(reported["DCT, feedback"], ef_bits=4)
    run = functools.partial(training, makers | reported, bench.scale(steps))
    found = bench.rows(run, makers, bench.seeds(seeds))
    dct, svd, random = (found.values(name, "loss") for name in choices)
    name = "training loss at m/4, DCT - (SVD + 0.35 (random - SVD))"
    evidence.checks.append(at_most(name, dct - svd - 0.35 * (random - svd), 0))
    size = {name: found.values(name, "bytes")[0] for name in ("DCT", "SVD")}
    evidence.checks.append(at_most("bytes of state at m/4, DCT with its basis / SVD", size["DCT"] / size["SVD"], 0.999))
    found += bench.rows(run, reported, bench.seeds(2))
    for name in (*makers, *reported):
        loss, held_out, kept = (found.values(name, metric) for metric in ("loss", "held out", "bytes"))
        evidence.notes.append(
            f"{name}, {len(loss)} seeds: training loss {loss.mean():.3f} ({loss.min():.3f} to {loss.max():.3f}), "
            f"held out {held_out.mean():.3f}, {kept[0] / 1024:.0f} KiB of state"
        )
    evidence.rows += found
    return evidence


def errors(choices: dict[str, Choice], steps: int, variant: str, seed: int) -> dict[str, Any]:
    """Mean ||G - lift(update(G))|| / ||G|| of all gradients of matrices along AdamW's path, every tenth step."""
    found: dict[str, list[float]] = {name: [] for name in choices}

    def look(model: nn.Module, step: int) -> None:
        if step % 10 == 0:
            for G in (p.grad for p in model.parameters() if p.dim() == 2 and p.grad is not None):
                for name, choice in choices.items():
                    projector = choice(G.shape, QUARTER)
                    lost = G - projector.lift(projector.update(G))
                    found[name].append((lost.norm() / G.norm()).item())

    train(functools.partial(torch.optim.AdamW, lr=RATES["AdamW"], weight_decay=0.0), steps, seed, look)
    return {name: sum(values) / len(values) for name, values in found.items()}


def training(
    makers: dict[str, Callable[..., torch.optim.Optimizer]], steps: int, variant: str, seed: int
) -> dict[str, Any]:
    """Training loss, mean of the last 50 steps; loss on held-out text; bytes of state, with the bases."""
    model, optimizer, losses = train(makers[variant], steps, seed)
    inputs, targets = resolve_task(f"text(length={LENGTH})").validation.tensors
    with torch.no_grad():
        held_out = byte_loss(model(inputs), targets).item()
    curve = [sum(part) / len(part) for part in (losses[i : i + 10] for i in range(0, len(losses), 10))]
    kept = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
    if variant.startswith("DCT"):
        kept.append(dct_matrix(WIDTH))  # all matrices of this network have WIDTH as their smaller side
    return {
        "loss": sum(losses[-50:]) / len(losses[-50:]),
        "held out": held_out,
        "bytes": sum(x.numel() * x.element_size() for x in kept),
        "curve": curve,
    }


def train(
    make: Callable[..., torch.optim.Optimizer],
    steps: int,
    seed: int,
    look: Callable[[nn.Module, int], None] = lambda model, step: None,
) -> tuple[nn.Module, torch.optim.Optimizer, list[float]]:
    """A small transformer on bytes of Python's standard library; ``look(model, step)`` sees every gradient."""
    inputs, targets = resolve_task(f"text(length={LENGTH})").train.tensors
    torch.manual_seed(seed)
    model = ByteTransformer(LENGTH, width=WIDTH)
    optimizer, draw, losses = make(model.parameters()), torch.Generator().manual_seed(seed), []
    for step in range(steps):
        chosen = torch.randint(len(inputs), (BATCH,), generator=draw)
        optimizer.zero_grad()
        loss = byte_loss(model(inputs[chosen]), targets[chosen])
        loss.backward()
        look(model, step)
        optimizer.step()
        losses.append(loss.item())
    return model, optimizer, losses


def times(projector: Choice, variant: str, seed: int, repeats: int = 10) -> dict[str, Any]:
    """Processor seconds of one choice and projection, the best of a few; torch.linalg.svd without the projection."""
    G = torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    found = {"SVD": _best(functools.partial(torch.linalg.svd, G, full_matrices=False), 2)}
    for transform in ("fft", "matmul"):
        for rank in RANKS:
            made = projector((SIDE, SIDE), rank, transform=transform)
            made.update(G)  # makes the basis
            found[f"{transform} {rank}"] = _best(functools.partial(made.update, G), repeats)
    return found


def _best(run: Callable[[], Any], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)
    return min(seconds)


def figure(evidence: Evidence) -> Figure:
    """Training loss over the steps, mean over seeds."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(6, 3.5), layout="constrained")
    axes = drawing.subplots()
    styles = {"AdamW": "k-", "SVD": "C0-", "DCT": "C1-", "random": "C2-", "SVD, m/8": "C0:", "DCT, m/8": "C1:"}
    for variant, style in {**styles, "random, m/8": "C2:"}.items():
        curves = torch.tensor([row["curve"] for row in evidence.rows if row["variant"] == variant])
        if len(curves):
            axes.plot(torch.arange(curves.shape[1]) * 10 + 5, curves.mean(0), style, label=variant)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss, nats per byte")
    axes.set_ylim(top=3.6)
    axes.set_title("A small transformer on bytes, moments in m/4 or m/8 dimensions", fontsize="medium")
    axes.legend(ncols=2)
    return drawing
