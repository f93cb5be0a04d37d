"""What a batch does to the spectrum and to the largest rate, and whether rates read off the spectrum train."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.bench.datasets import digits
from assay.bench.evidence import Bench, Check, Evidence, Rows, at_least, at_most
from assay.bench.statistics import mean_interval
from assay.optim import LanczosLR, batch_eigenvalue, curvature_operator, estimate_noise, lanczos, scale_lr

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS = ("spectrum", "rules", "learner")
STEPS = 300
BATCHES = (16, 32, 64, 128, 256, 512)
"""Of the spectrum; the last one, near the size of the data, is reported and not gated."""
DRAWS, LANCZOS = 12, 12
LANCZOS_LR, SAFER = "LanczosLR", "LanczosLR, safety 0.03"
RULE_BATCHES = (2, 4, 8, 16, 32, 64, 128)
RULE_RATES = {
    "SGD": [0.005 * 2**k for k in range(11)],
    "Adam": [0.005 * 2**k for k in range(9)],
}
RULES = {"SGD": "linear", "Adam": "sqrt"}
NOTHING, LEARNS = math.log(10), 1.0
"""Full training loss of a network that has learnt nothing, as which a diverged one counts; and of one that has."""
GRID = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
LEARNER_BATCH = 64
SAFE = 0.03
"""Of 1, 0.3, 0.1 and 0.03 the safety with the least loss on seeds 0 to 3; reported, while the default is judged."""


def claim(
    bench: Bench,
    *,
    operator: Callable[..., Any] = curvature_operator,
    scale: Callable[..., float] = scale_lr,
    learner: Callable[..., Any] = LanczosLR,
    parts: Collection[str] = PARTS,
    sizes: Sequence[int] = BATCHES,
    seeds: int = 8,
) -> Evidence:
    """``operator``, ``scale`` and ``learner`` are the pieces under test, one for each part."""
    evidence = Evidence(Rows(), [])
    if "spectrum" in parts:
        run = functools.partial(spectrum, operator=operator, sizes=sizes)
        evidence.rows += bench.rows(run, ["spectrum"], bench.seeds(seeds))
        evidence.checks += spectrum_checks(evidence.rows, sizes)
        evidence.notes += spectrum_notes(evidence.rows, sizes)
    if "rules" in parts:
        evidence.rows += bench.rows(largest_rates, list(RULES), bench.seeds(seeds))
        evidence.checks += rule_checks(evidence.rows, scale)
    if "learner" in parts:
        makers = {"grid": None, LANCZOS_LR: learner, SAFER: functools.partial(learner, safety=SAFE)}
        evidence.rows += bench.rows(functools.partial(learned, makers), makers, bench.seeds(seeds))
        evidence.checks += learner_checks(evidence.rows)
        evidence.notes += learner_notes(evidence.rows)
    return evidence


def data(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    pixels, labels = digits()
    return pixels.to(dtype), labels


def network(hidden: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, hidden), nn.Tanh(), nn.Linear(hidden, 10))


def indices(size: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Batches of one size, epoch after epoch, each drawn without replacement."""
    order = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(size, generator=order)[: size // batch * batch].split(batch)


# --- the spectrum


def spectrum(variant: str, seed: int, *, operator: Callable[..., Any], sizes: Sequence[int]) -> dict[str, Any]:
    """Extreme eigenvalues of a trained 64-8-10 network: of all data, and the mean over batches of each size."""
    x, y = data(torch.float64)
    model = network(8, seed).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    drawn = indices(len(x), 64, seed)
    for _ in range(STEPS):
        chosen = next(drawn)
        optimizer.zero_grad()
        F.cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()

    def extremes(chosen: Tensor) -> list[float]:
        values, _ = lanczos(operator(model, F.cross_entropy, [(x[chosen], y[chosen])]), LANCZOS)
        return [values[-1].item(), values[0].item()]

    full = extremes(torch.arange(len(x)))
    found = [
        np.mean([extremes(next(drawn)) for _ in range(DRAWS)], axis=0)
        for drawn in (indices(len(x), batch, 1000 + seed) for batch in sizes)
    ]
    largest, smallest = np.array(found).T
    return {"full": full[0], "full smallest": full[1], "largest": largest, "smallest": smallest, "N": len(x)}


def spectrum_checks(rows: Rows, sizes: Sequence[int]) -> list[Check]:
    gated = [size for size in sizes if size <= 256]
    largest, smallest, slopes = [], [], []
    for row in rows:
        ends = [np.array(row[which])[: len(gated)] for which in ("largest", "smallest")]
        largest.append(min(ends[0] / row["full"]))
        smallest.append(max(ends[1] - row["full smallest"]) / row["full"])
        slopes.append(slope(gated, ends[0] - row["full"]))
    span = f"B = {gated[0]} to {gated[-1]}"
    return [
        at_least(f"largest eigenvalue, batch / full, the least of {span}", largest, 1.01),
        at_most(f"smallest eigenvalue, (batch - full) / largest, the most of {span}", smallest, -0.002),
        at_least("excess of the largest over B, log-log slope", slopes, -1.5),
        at_most("excess of the largest over B, log-log slope, from above", slopes, -0.4),
    ]


def spectrum_notes(rows: Rows, sizes: Sequence[int]) -> list[str]:
    """Not gated: how far the formula carries, with its noise fitted at B = 64 and to all data."""
    place, errors = sizes.index(64), []
    for row in rows:
        if not row["largest"][place] > row["full"]:
            return ["not gated: at B = 64 the largest eigenvalue is not above that of all data: no noise to be fitted"]
        noise = estimate_noise([row["largest"][place], row["full"]], [64, row["N"]], row["N"])
        found = [batch_eigenvalue(*noise, 1, batch, row["N"]) for batch in sizes]
        errors.append(np.array(found) / row["largest"])
    said = ", ".join(f"B = {b}: {e:.2f}" for b, e in zip(sizes, np.mean(errors, axis=0), strict=True))
    return [f"not gated: predicted / measured largest eigenvalue, noise fitted at B = 64: {said}"]


def slope(sizes: Collection[float], values: Any) -> float:
    """Of a straight line through the logarithms; nan where a value has none."""
    values = np.asarray(values)
    return float(np.polyfit(np.log(list(sizes)), np.log(values), 1)[0]) if (values > 0).all() else math.nan


# --- the rules


def largest_rates(variant: str, seed: int) -> dict[str, Any]:
    """For each batch size the largest of the rates with which a 64-32-10 network has learnt after 300 steps."""
    found = [largest_rate(variant, batch, seed) for batch in RULE_BATCHES]
    return {"largest rate": found, "slope": slope(RULE_BATCHES, found)}


def largest_rate(variant: str, batch: int, seed: int) -> float:
    """All rates at once: one network for each, from the same weights on the same batches."""
    x, y = data()
    rates = RULE_RATES[variant]
    factors = torch.tensor(rates)[:, None, None]
    start = [p.detach() for p in network(32, seed).parameters()]
    params = [nn.Parameter(p.view(-1, p.shape[-1]).repeat(len(rates), 1, 1)) for p in start]
    w1, b1, w2, b2 = params
    # Neither optimizer's state knows the rate: a step of rate 1, shortened to each network's own, is its step.
    optimizer: torch.optim.Optimizer = (
        torch.optim.SGD(params, lr=1.0, momentum=0.9) if variant == "SGD" else torch.optim.Adam(params, lr=1.0)
    )

    def losses(inputs: Tensor, targets: Tensor) -> Tensor:
        logits = torch.tanh(inputs @ w1.mT + b1) @ w2.mT + b2
        every = F.cross_entropy(logits.flatten(0, 1), targets.repeat(len(rates)), reduction="none")
        return every.view(len(rates), -1).mean(1)

    drawn = indices(len(x), batch, seed)
    for _ in range(STEPS):
        chosen = next(drawn)
        optimizer.zero_grad()
        losses(x[chosen], y[chosen]).sum().backward()
        before = [p.detach().clone() for p in params]
        optimizer.step()
        with torch.no_grad():
            for p, old in zip(params, before, strict=True):
                p.copy_(torch.lerp(old, p, factors))
    with torch.no_grad():
        learnt = losses(x, y) < LEARNS  # False for what is not a number
    return max((rate for rate, fine in zip(rates, learnt.tolist(), strict=True) if fine), default=0.0)


def rule_checks(rows: Rows, scale: Callable[..., float]) -> list[Check]:
    ends = RULE_BATCHES[0], RULE_BATCHES[-1]
    checks = []
    for variant, rule in RULES.items():
        said = math.log(scale(1.0, *ends, rule=rule)) / math.log(ends[1] / ends[0])
        off = rows.values(variant, "slope") - said
        least, most = (-0.25, 0.2) if variant == "SGD" else (-0.2, 0.2)
        checks += [
            at_least(f"{variant}: log-log slope of the largest rate - the rule's {said:g}", off, least),
            at_most(f"{variant}: log-log slope of the largest rate - the rule's {said:g}, from above", off, most),
        ]
    return [*checks, at_least("slope, SGD - Adam", rows.difference("SGD", "Adam", "slope"), 0.25)]


# --- the learner


def learned(makers: dict[str, Any], variant: str, seed: int) -> dict[str, Any]:
    """Full training loss of a 64-32-10 network after 300 steps of SGD, with each fixed rate or with the learner."""
    if variant == "grid":
        return {"losses": [train(seed, rate, None)["loss"] for rate in GRID]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a network that has diverged: its loss says so
        return train(seed, GRID[0], makers[variant])


def train(seed: int, rate: float, learner: Callable[..., Any] | None) -> dict[str, Any]:
    x, y = data()
    model = network(32, seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    drawn, fresh = indices(len(x), LEARNER_BATCH, seed), indices(len(x), LEARNER_BATCH, 1000 + seed)

    def operator() -> Any:
        chosen = next(fresh)
        return curvature_operator(model, F.cross_entropy, [(x[chosen], y[chosen])])

    scheduler = learner(optimizer, operator, interval=len(x) // LEARNER_BATCH) if learner else None
    path = []
    for _ in range(STEPS):
        chosen = next(drawn)
        optimizer.zero_grad()
        F.cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
        if scheduler:
            path.append([optimizer.param_groups[0][name] for name in ("lr", "momentum")])
            scheduler.step()
    with torch.no_grad():
        loss = F.cross_entropy(model(x), y).item()
    return {"loss": loss if math.isfinite(loss) else math.inf, "path": path[:: len(x) // LEARNER_BATCH]}


def grids(rows: Rows) -> np.ndarray:
    """Losses with fixed rates, a row for each seed."""
    return np.array([row["losses"] for row in sorted(rows, key=lambda row: row["seed"]) if row["variant"] == "grid"])


def learner_checks(rows: Rows) -> list[Check]:
    mine = rows.values(LANCZOS_LR, "loss").clip(max=NOTHING)
    return [
        at_most("training loss, LanczosLR / median of seven fixed rates", mine / np.median(grids(rows), axis=1), 1.0),
        at_most("runs of LanczosLR that have not learnt", int((mine >= LEARNS).sum()), 0),
    ]


def learner_notes(rows: Rows) -> list[str]:
    fixed, safer = grids(rows), rows.values(SAFER, "loss")
    said = ", ".join(f"{rate:g}: {loss:.3f}" for rate, loss in zip(GRID, fixed.mean(0), strict=True))
    path = np.mean([row["path"] for row in rows if row["variant"] == SAFER], axis=0)
    shares = [mean_interval(safer / reference) for reference in (np.median(fixed, axis=1), fixed.min(1))]
    median, best = (f"{mean:.2f} [{low:.2f}, {high:.2f}]" for mean, low, high in shares)
    return [
        f"not gated: training loss with fixed rates: {said}; {LANCZOS_LR} {rows.values(LANCZOS_LR, 'loss').mean():.3g}",
        f"not gated: {SAFER}: training loss {safer.mean():.3f}, / median of the fixed rates {median}, / best {best}; "
        f"learning rate {path[0][0]:.2f} at first, {path[-1][0]:.2f} at last, momentum {path[0][1]:.2f}, "
        f"{path[-1][1]:.2f}",
    ]


def figure(evidence: Evidence) -> Figure:
    """The spectrum over the batch size, the largest rates over it, and the learner beside fixed rates."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(10, 3.3), layout="constrained")
    left, middle, right = drawing.subplots(1, 3)
    spectra = [row for row in evidence.rows if row["variant"] == "spectrum"]
    for row in spectra:
        left.plot(BATCHES, np.array(row["largest"]) / row["full"], "o-", color="C0", ms=3, lw=0.6, alpha=0.6)
    left.axhline(1, color="0.6", lw=0.8)
    left.set(xscale="log", yscale="log", xlabel="batch size", title="largest eigenvalue, batch / full")
    left.set_xticks(BATCHES, map(str, BATCHES))
    left.set_yticks((1, 1.5, 2, 3), ("1", "1.5", "2", "3"))
    left.minorticks_off()
    for variant, power, colour in (("SGD", 1.0, "C0"), ("Adam", 0.5, "C1")):
        found = np.array([row["largest rate"] for row in evidence.rows if row["variant"] == variant])
        if len(found):
            mean = np.exp(np.log(found).mean(0))
            middle.plot(RULE_BATCHES, mean, "o", color=colour, ms=4, label=variant)
            line = np.array(RULE_BATCHES, dtype=float) ** power
            middle.plot(RULE_BATCHES, line * np.exp(np.log(mean / line).mean()), color=colour, lw=1)
    middle.set(xscale="log", yscale="log", xlabel="batch size", title="largest rate; lines: the rules")
    middle.legend(fontsize="small")
    for row in evidence.rows:
        if row["variant"] == "grid":
            right.plot(GRID, row["losses"], ".-", color="0.6", ms=3, lw=0.6)
        elif row["variant"] == SAFER:
            right.axhline(row["loss"], color="C0", lw=0.6)
    right.set(xscale="log", yscale="log", xlabel="fixed rate", title="training loss; lines: the learner, safety 0.03")
    for axes in (left, middle, right):
        axes.title.set_fontsize("medium")
    return drawing
