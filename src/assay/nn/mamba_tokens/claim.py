"""Criteria against simulated tokens; a small language model under each spectrum; digits with their pixels reordered."""

from __future__ import annotations

import functools
import math
import sysconfig
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.bench.datasets import split_digits
from assay.bench.evidence import Bench, Evidence, Rows, at_least, at_most
from assay.nn import SelectiveSSM, TokenReorder, constrain_dynamics
from assay.nn.token_dynamics import classify, input_output_spectrum, simulate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS = ("simulation", "language", "digits")
ENDS = {"convergence": "converged", "slow-divergence": "diverging", "fast-divergence": "blow-up"}
SPECTRA = ("positive", "negative", "unconstrained")
ORDERS = ("soft order", "hard order", "as they are")
BEST = dict.fromkeys(SPECTRA, 3e-2) | dict.fromkeys(ORDERS, 1e-2)
SOURCES = ("argparse", "ast", "doctest", "inspect", "mailbox", "pickle", "subprocess", "tarfile", "turtle", "typing")
WIDTH, WINDOW, STEPS = 48, 48, 200
Constrain = Callable[..., SelectiveSSM]


def claim(
    bench: Bench, *, method: Constrain = constrain_dynamics, parts: Collection[str] = PARTS, seeds: int = 3
) -> Evidence:
    """Learning rates are from 0.003, 0.01, 0.03, for each arm the best on seed 0."""
    rows, checks, notes = Rows(), [], []
    if "simulation" in parts:
        rows += bench.rows(scenario, ["simulation"], bench.seeds(40))
        checks.append(
            at_least("share of systems that end as predicted", rows.values("simulation", "right").mean(), 0.95)
        )
    if "language" in parts:
        rows += bench.rows(functools.partial(language, method=method, bench=bench), SPECTRA, bench.seeds(seeds))
        least = rows.values("positive", "least eigenvalue").min()
        checks += [
            at_least("least eigenvalue after training, positive", least, 0.0),
            at_most("bits per byte, positive - negative", rows.difference("positive", "negative", "bits"), 0.0),
            at_most(
                "bits per byte, positive - unconstrained", rows.difference("positive", "unconstrained", "bits"), 0.05
            ),
        ]
        notes += [f"{name}: {rows.values(name, 'bits').mean():.3f} bits per byte" for name in SPECTRA]
    if "digits" in parts:
        rows += bench.rows(functools.partial(pixels, bench=bench), ORDERS, bench.seeds(seeds))
        notes += [
            f"digits, tokens {name}: accuracy {rows.values(name, 'accuracy').mean():.1%} "
            f"(from {rows.values(name, 'accuracy').min():.1%} to {rows.values(name, 'accuracy').max():.1%}), "
            f"training loss at half time {rows.values(name, 'half').mean():.3f}"
            for name in ORDERS
        ]
    return Evidence(rows, checks, notes)


def scenario(variant: str, seed: int) -> dict[str, Any]:
    """One system of four tokens in one dimension, all on one side of the origin, followed to t = 100."""
    draw = torch.Generator().manual_seed(seed)
    sign = torch.randint(2, (3,), generator=draw).double() * 2 - 1
    size = torch.rand(7, generator=draw, dtype=torch.float64) * 1.2 + 0.4
    mu, S_delta, x0 = sign[0] * size[0], sign[1] * size[1], sign[2] * size[3:, None]
    one = torch.ones(1, 1, dtype=torch.float64)
    predicted = classify(mu * one, one, S_delta * one, x0)
    found = simulate(x0, mu * one, one, S_delta * one, size[2:3], t_max=100.0)
    return {"right": ENDS[predicted] == found.status, "predicted": predicted, "status": found.status}


@functools.cache
def text() -> Tensor:
    """About a million bytes of Python's own source."""
    library = Path(sysconfig.get_paths()["stdlib"])
    joined = "".join((library / f"{name}.py").read_text(encoding="utf-8") for name in SOURCES)
    return torch.tensor(list(joined.encode("ascii", "ignore")))


class Language(nn.Module):
    """Two residual layers over bytes."""

    def __init__(self, variant: str, method: Constrain) -> None:
        super().__init__()
        self.embed = nn.Embedding(128, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.mixers = nn.ModuleList(SelectiveSSM(WIDTH, d_state=8) for _ in range(2))
        if variant != "unconstrained":
            for mixer in self.mixers:
                method(mixer, variant)
        self.head = nn.Linear(WIDTH, 128)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for norm, mixer in zip(self.norms, self.mixers, strict=False):
            x = x + mixer(norm(x))
        return self.head(self.norms[-1](x))


def language(
    variant: str, seed: int, *, method: Constrain, bench: Bench, rate: float | None = None
) -> dict[str, float]:
    """200 steps on 8 windows of 48 bytes; bits per byte on 300 windows of the last tenth of the text."""
    windows = text().unfold(0, WINDOW + 1, 1)
    held_out = len(windows) * 9 // 10
    torch.manual_seed(seed)
    model = Language(variant, method)
    order = torch.Generator().manual_seed(seed)
    steps = bench.scale(STEPS)
    optimizer = torch.optim.AdamW(model.parameters(), rate or BEST[variant], fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate or BEST[variant], steps)

    def loss(chosen: Tensor) -> Tensor:
        return F.cross_entropy(model(chosen[:, :-1]).flatten(0, 1), chosen[:, 1:].flatten())

    for _ in range(steps):
        optimizer.zero_grad()
        loss(windows[torch.randint(held_out - WINDOW, (8,), generator=order)]).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        bits = loss(windows[torch.linspace(held_out, len(windows) - 1, 300).long()]).item() / math.log(2)
        least = min(input_output_spectrum(mixer).real.min().item() for mixer in model.mixers)
    return {"bits": bits, "least eigenvalue": least}


def pixels(variant: str, seed: int, *, bench: Bench, rate: float | None = None) -> dict[str, float]:
    """Digits as 64 pixels in one random order: a layer over 16 channels, the mean of its tokens, 150 steps."""
    (x, y), (test_x, test_y) = split_digits(1000 + seed)
    shuffled = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(seed)
    reorder = None if variant == "as they are" else TokenReorder(32, hard=variant == "hard order")
    place = nn.Parameter(0.5 * torch.randn(64, 16))
    embed, norm, head = nn.Linear(1, 16), nn.LayerNorm(16), nn.Linear(16, 10)
    ssm = SelectiveSSM(16, d_state=4, reorder=reorder)
    model = nn.ModuleList([embed, norm, head, ssm])

    def scores(x: Tensor) -> Tensor:
        tokens = embed(x[:, shuffled, None]) + place
        return head(norm(ssm(tokens).mean(1)))

    steps, losses, order = bench.scale(150), [], torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW([*model.parameters(), place], rate or BEST[variant], fused=True)
    for _ in range(steps):
        chosen = torch.randint(len(x), (32,), generator=order)
        optimizer.zero_grad()
        loss = F.cross_entropy(scores(x[chosen]), y[chosen])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        accuracy = (scores(test_x).argmax(1) == test_y).double().mean().item()
    middle = losses[max(0, steps // 2 - 10) : steps // 2 + 1]
    return {"accuracy": accuracy, "half": sum(middle) / len(middle)}


def figure(evidence: Evidence) -> Figure:
    """Bits per byte under each spectrum, one point per seed."""
    from matplotlib.figure import Figure

    from assay.bench.figures import by_variant

    drawing = Figure(figsize=(5, 3), layout="constrained")
    axes = drawing.subplots()
    by_variant(axes, evidence.rows, SPECTRA, "bits")
    axes.set_ylabel("bits per byte")
    axes.set_xlabel("eigenvalues of $S_C^T S_B$")
    axes.set_title("A language model of two layers on Python source", fontsize="medium")
    return drawing
