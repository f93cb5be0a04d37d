"""The error of long and of far rows, beside torch's softmax; the time of two and of three passes, compiled."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from assay.bench.evidence import Bench, Evidence, at_most
from assay.nn.two_pass_softmax.two_pass_softmax import three_pass_softmax, two_pass_softmax

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZES = (2**12, 2**16, 2**20, 2**22, 2**24)
FAR = 2**16  # elements of the rows of large numbers
SUM, RANGE = "largest error of rows N(0, 9), two passes", "largest error of rows far from 0, two passes"
TIME = "time out of the cache: two passes / three passes (recompute), kernels of one make"
TORCH, TWO = "torch", "two passes"
Softmax = Callable[[Tensor], Tensor]

two_pass = functools.partial(two_pass_softmax, backend="reference")
PASSES: dict[str, Softmax] = {
    "compiled two passes": two_pass,
    "compiled recompute": three_pass_softmax,
    "compiled reload": functools.partial(three_pass_softmax, variant="reload"),
}


def claim(
    bench: Bench,
    *,
    method: Softmax = two_pass,
    sizes: Sequence[int] = SIZES,
    parts: Collection[str] = ("accuracy", "time"),
    seeds: int = 5,
) -> Evidence:
    """Relative errors of float32 rows to the softmax in float64. There is nothing to tune.

    The paper's comparison is one of kernels that share their exponential. As long as the library has none, the check
    of it has no samples and stays open; what a compiler makes of the three algorithms is reported beside it.
    """
    reporting = bench.seeds(seeds)
    run = functools.partial(errors, method=method, sizes=sizes, bench=bench)
    rows = bench.rows(run, [TORCH, TWO], reporting)
    checks = [
        at_most(SUM, rows.values(TWO, "sum"), 1e-6),
        at_most(RANGE, rows.values(TWO, "range"), 1e-6),
        at_most(TIME, [], 0.97),
    ]
    notes = [
        f"{n:,} elements: error of torch {rows.values(TORCH, f'error {n}').mean():.1e}, of two passes "
        f"{rows.values(TWO, f'error {n}').mean():.1e}"
        for n in sizes
    ]
    if "time" in parts and not bench.quick:
        timed = bench.rows(functools.partial(milliseconds, n=max(sizes)), [TORCH, *PASSES], reporting)
        notes.append(
            f"milliseconds of {max(sizes):,} elements on one core (median), no part of the verdict: "
            + ", ".join(
                f"{name} {sorted(timed.values(name, 'ms'))[len(reporting) // 2]:.0f}" for name in (TORCH, *PASSES)
            )
        )
        rows.extend({**row, "variant": f"time of {row['variant']}"} for row in timed)
    return Evidence(rows, checks, notes)


def errors(variant: str, seed: int, *, method: Softmax, sizes: Sequence[int], bench: Bench) -> dict[str, float]:
    softmax = method if variant == TWO else functools.partial(torch.softmax, dim=-1)
    draw = torch.Generator().manual_seed(seed)
    found = {f"error {n}": error(softmax, 3 * torch.randn(bench.scale(n), generator=draw)) for n in sizes}
    far = (
        2e4 * torch.rand(FAR, generator=draw) - 1e4,
        torch.full((FAR,), 3e4),
        torch.randn(FAR, generator=draw) - 5e4,
    )
    return {**found, "sum": max(found.values()), "range": max(error(softmax, x) for x in far)}


def error(softmax: Softmax, x: Tensor) -> float:
    """Largest relative error where the softmax is above 1e-30; what is not finite, or worse than 100 %, counts as 1."""
    exact = x.double().softmax(-1)
    worst = ((softmax(x) - exact).abs() / exact)[exact > 1e-30].max().item()
    return min(worst, 1.0) if math.isfinite(worst) else 1.0


def milliseconds(variant: str, seed: int, *, n: int) -> dict[str, float]:
    """The faster of two calls that write to a given tensor, after one that does not count."""
    x = 3 * torch.randn(n, generator=torch.Generator().manual_seed(seed))
    out, taken = torch.empty(n), []
    for _ in range(3):
        start = time.perf_counter()
        torch.softmax(x, -1, out=out) if variant == TORCH else compiled(variant)(x, out)
        taken.append(1000 * (time.perf_counter() - start))
    return {"ms": min(taken[1:])}


@functools.cache
def compiled(variant: str) -> Callable[[Tensor, Tensor], Tensor]:
    softmax = PASSES[variant]
    return torch.compile(lambda x, out: out.copy_(softmax(x)), fullgraph=True, dynamic=False)


def figure(evidence: Evidence) -> Figure:
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(6, 3.5), layout="constrained")
    axes = drawing.subplots()
    sizes = [int(key.split()[1]) for key in evidence.rows[0] if key.startswith("error ")]
    for variant, style in ((TORCH, "o--"), (TWO, "D-")):
        means = [evidence.rows.values(variant, f"error {n}").mean() for n in sizes]
        axes.loglog(sizes, means, style, label="torch.softmax" if variant == TORCH else "two passes")
    axes.axhline(1e-6, color="gray", linewidth=0.8, linestyle=":", label="bound for two passes")
    axes.set_xlabel("elements of the row")
    axes.set_ylabel("largest relative error")
    axes.set_title("Softmax of one float32 row, N(0, 9)", fontsize="medium")
    axes.legend()
    return drawing
