"""MECO beside NCE: the landscape of a Gaussian's mean, steps to find it, and densities in the plane."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.bench.evidence import Bench, Check, Evidence, Rows, at_least, at_most
from assay.losses import nce_loss
from assay.optim.meco.meco import MECO

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Make = Callable[..., Any]
PARTS = ("landscape", "mean", "plane")
MEAN, TOLERANCE, STEPS, BATCH = 16.0, 0.25, 2000, 32
WIDTHS = (8.0, 16.0)
LEARNED, KNOWN = "NCE", "NCE, Z known"
METHODS = ("MECO", LEARNED, KNOWN)
EQUAL = 0.01
# Each the best of 0.01, 0.03, 0.1, 0.3 and 1, decaying linearly to 0, by mean steps on seeds 0 and 1.
BEST = {
    ("MECO", 8.0): 0.03, (LEARNED, 8.0): 0.03, (KNOWN, 8.0): 0.1,
    ("MECO", 16.0): 0.03, (LEARNED, 16.0): 0.3, (KNOWN, 16.0): 0.1,
}  # fmt: skip
PLANE_STEPS, PLANE_BATCH = 1000, 128
SHAPES = ("eight Gaussians", "two moons")
# Each the best of 3e-3, 1e-2, 3e-2 and 1e-1 by mean negative log-likelihood on seeds 0 and 1.
PLANE_RATES = {
    ("MECO", SHAPES[0]): 3e-2, (LEARNED, SHAPES[0]): 1e-1,
    ("MECO", SHAPES[1]): 1e-1, (LEARNED, SHAPES[1]): 1e-1,
}  # fmt: skip


def claim(
    bench: Bench,
    *,
    method: Make = MECO,
    parts: Collection[str] = PARTS,
    widths: Collection[float] = WIDTHS,
    tuned: Collection[bool] = (False, True),
    seeds: int = 5,
) -> Evidence:
    """``method`` is the optimizer under test; tuned rates are each method's own, the equal ones everybody's."""
    evidence = Evidence(Rows(), [])
    if "landscape" in parts:
        evidence.rows += landscape()
        evidence.checks += landscape_checks(evidence.rows)
        evidence.notes += landscape_notes(evidence.rows)
    if "mean" in parts:
        for best in tuned:
            run = functools.partial(find_mean, method, best, tuple(widths))
            evidence.rows += bench.rows(run, [name_of(which, best) for which in METHODS], bench.seeds(seeds))
            evidence.checks += mean_checks(evidence.rows, widths, best)
    if "plane" in parts:
        run = functools.partial(density, method, bench.scale(PLANE_STEPS))
        evidence.rows += bench.rows(run, [f"plane, {which}" for which in ("MECO", LEARNED)], bench.seeds(seeds))
        evidence.checks += plane_checks(evidence.rows)
    return evidence


# --- the landscape


def landscape() -> Rows:
    """Gradient descent on the exact objectives, by quadrature: data N(16, 1), noise N(0, 1), from theta = 0."""
    x = torch.linspace(-14, 30, 4401, dtype=torch.float64)
    weigh = {mean: torch.exp(-((x - mean) ** 2) / 2) / math.sqrt(2 * math.pi) * (x[1] - x[0]) for mean in (0.0, MEAN)}

    def likelihood(theta: Tensor) -> Tensor:
        log_p = -((x - theta) ** 2) / 2
        return -(weigh[MEAN] * log_p).sum() + torch.logsumexp(log_p, 0)

    def contrast(theta: Tensor) -> Tensor:
        ratio = theta * x - theta**2 / 2  # log p - log q, both normalized
        return -(weigh[MEAN] * F.logsigmoid(ratio)).sum() - (weigh[0.0] * F.logsigmoid(-ratio)).sum()

    rows = Rows()
    for variant, objective in (("likelihood", likelihood), ("contrast", contrast)):

        def gradient(at: float, objective: Callable[[Tensor], Tensor] = objective) -> float:
            theta = torch.tensor(at, dtype=torch.float64, requires_grad=True)
            return torch.autograd.grad(objective(theta), theta)[0].item()

        place, path = 0.0, [0.0]
        for _ in range(STEPS):
            place -= 0.1 * gradient(place)
            path.append(place)
        close = [step for step, value in enumerate(path) if abs(value - MEAN) < 0.1]
        slopes = {str(at): gradient(at) for at in (0.0, 4.0, 8.0, 12.0)}
        rows.append(
            {
                "variant": variant,
                "steps": close[0] if close else STEPS,
                "away": abs(place - MEAN),
                "gradients": slopes,
                "path": path[:101],
            }
        )
    return rows


def landscape_checks(rows: Rows) -> list[Check]:
    found = {row["variant"]: row for row in rows if row["variant"] in ("likelihood", "contrast")}
    return [
        at_most("exact gradient descent, likelihood: steps until within 0.1", found["likelihood"]["steps"], 100),
        at_least("exact gradient descent, NCE: distance after 2000 steps", found["contrast"]["away"], 8),
    ]


def landscape_notes(rows: Rows) -> list[str]:
    return [
        f"gradient of the {row['variant']} at theta = "
        + ", ".join(f"{float(at):g}: {value:.3g}" for at, value in row["gradients"].items())
        for row in rows
        if "gradients" in row
    ]


# --- the mean


def name_of(which: str, tuned: bool) -> str:
    return f"{which}, tuned" if tuned else which


def find_mean(method: Make, tuned: bool, widths: tuple[float, ...], variant: str, seed: int) -> dict[str, Any]:
    """Steps after which theta stays within 0.25 of 16, for each width of the noise; all of them if it never does."""
    which = variant.removesuffix(", tuned")
    found: dict[str, Any] = {}
    for width in widths:
        path = descend(which, method, BEST[which, width] if tuned else EQUAL, tuned, width, seed)
        found[f"steps {width:g}"], found[f"end {width:g}"] = settled(path), path[-1]
        found[f"path {width:g}"] = path[::40]
    return found


def settled(path: list[float]) -> int:
    """The first step from which on theta stays within the tolerance; the number of all steps if there is none."""
    outside = [step for step, theta in enumerate(path) if not abs(theta - MEAN) <= TOLERANCE]
    return min(outside[-1] + 1, len(path) - 1)


def descend(which: str, method: Make, rate: float, decay: bool, width: float, seed: int) -> list[float]:
    """The path of theta; the noise is N(0, width^2), and all methods average their directions alike."""
    draw = torch.Generator().manual_seed(seed)
    x, z = (torch.randn(STEPS, BATCH, generator=draw, dtype=torch.float64) for _ in range(2))
    x, z = MEAN + x, width * z
    noise = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), width)
    q_x, q_z = noise.log_prob(x), noise.log_prob(z)
    theta, c = (torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in range(2))
    if which == "MECO":
        optimizer = method([theta], lr=rate)
    else:
        optimizer = torch.optim.SGD([theta, c] if which == LEARNED else [theta], rate, momentum=0.9, dampening=0.9)
    minus_log_z = c if which == LEARNED else -0.5 * math.log(2 * math.pi)
    path = [0.0]

    def closure() -> Any:
        step = len(path) - 1
        p_x, p_z = -((x[step] - theta) ** 2) / 2, -((z[step] - theta) ** 2) / 2
        if which == "MECO":
            return p_x, p_z - q_z[step]
        optimizer.zero_grad()
        loss = nce_loss(p_x + minus_log_z - q_x[step], p_z + minus_log_z - q_z[step])
        loss.backward()
        return loss

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few effective samples: what comes of it is what is measured
        for step in range(STEPS):
            if decay:
                optimizer.param_groups[0]["lr"] = rate * (1 - step / STEPS)
            try:
                optimizer.step(closure)
            except ValueError:  # theta is lost: no ratio is a number
                return path + [math.nan] * (STEPS - step)
            path.append(theta.item())
    return path


def mean_checks(rows: Rows, widths: Collection[float], tuned: bool) -> list[Check]:
    """Half of NCE's steps where all have one rate; no more than NCE's where each has its best."""
    bound, at = (1.0, "each at its best rate") if tuned else (0.5, f"all at rate {EQUAL:g}")
    return [
        at_most(
            f"steps, noise {width:g} wide, {at}: MECO / {other}",
            rows.ratio(name_of("MECO", tuned), name_of(other, tuned), f"steps {width:g}"),
            bound,
        )
        for width in widths
        for other in METHODS[1:]
    ]


# --- densities in the plane


def points(shape: str, n: int, draw: torch.Generator) -> Tensor:
    """Samples of a density in the square from -4 to 4."""
    turn = torch.rand(n, generator=draw)
    spread = torch.randn(n, 2, generator=draw)
    if shape == "eight Gaussians":
        angle = 2 * math.pi / 8 * (8 * turn).floor()
        return 2.5 * torch.stack([angle.cos(), angle.sin()], 1) + 0.25 * spread
    upper = torch.rand(n, generator=draw) < 0.5
    angle = math.pi * turn
    x = torch.where(upper, angle.cos(), 1 - angle.cos()) - 0.5
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin()) - 0.25
    return 1.7 * torch.stack([x, y], 1) + 0.15 * spread


def density(method: Make, steps: int, variant: str, seed: int) -> dict[str, Any]:
    """Negative log-likelihood, Z by quadrature on a grid, of networks trained with MECO and NCE."""
    which = variant.removeprefix("plane, ")
    return {shape: likelihood(which, method, shape, PLANE_RATES[which, shape], steps, seed) for shape in SHAPES}


def likelihood(which: str, method: Make, shape: str, rate: float, steps: int, seed: int) -> float:
    draw = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    layers = [nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1)]
    model = nn.Sequential(*layers)
    c = torch.zeros((), requires_grad=True)
    noise = torch.distributions.MultivariateNormal(torch.zeros(2), 6 * torch.eye(2))
    adam = torch.optim.Adam([*model.parameters(), c], rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - step / steps)
    optimizer = method(None, base=adam) if which == "MECO" else adam

    def log_p(x: Tensor) -> Tensor:
        return model(x).squeeze(1) - x.square().sum(1) / 12  # the network tilts the noise, whose tails it keeps

    def closure() -> Any:
        x = points(shape, PLANE_BATCH, draw)
        z = 6**0.5 * torch.randn(PLANE_BATCH, 2, generator=draw)
        p_x, p_z = log_p(torch.cat([x, z])).split(PLANE_BATCH)
        if which == "MECO":
            return p_x, p_z - noise.log_prob(z)
        optimizer.zero_grad()
        loss = nce_loss(p_x + c - noise.log_prob(x), p_z + c - noise.log_prob(z))
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
        schedule.step()
    line = torch.linspace(-8, 8, 161)
    grid = torch.cartesian_prod(line, line)
    with torch.no_grad():
        log_z = torch.logsumexp(log_p(grid), 0) + 2 * math.log((line[1] - line[0]).item())
        fresh = points(shape, 4000, torch.Generator().manual_seed(10_000 + seed))
        return (log_z - log_p(fresh).mean()).item()


def plane_checks(rows: Rows) -> list[Check]:
    return [
        at_most(
            f"{shape}, negative log-likelihood, MECO - NCE",
            rows.difference("plane, MECO", f"plane, {LEARNED}", shape),
            0.0,
        )
        for shape in SHAPES
    ]


def figure(evidence: Evidence) -> Figure:
    """Exact descent, and the paths at equal and at each method's best rate, a line for each seed."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(10, 3.3), layout="constrained")
    left, *others = drawing.subplots(1, 3, sharey=True)
    for place, variant in enumerate(("likelihood", "contrast")):
        for row in evidence.rows:
            if row["variant"] == variant:
                left.plot(row["path"], color=f"C{place}", label=("MECO's", "NCE's")[place])
    left.set(xlabel="step", ylabel="theta", title="exact objective, noise N(0, 1)")
    left.legend(fontsize="small")
    steps = np.arange(0, STEPS + 1, 40)
    for axes, tuned in zip(others, (False, True), strict=True):
        for place, which in enumerate(METHODS):
            found = [row["path 8"] for row in evidence.rows if row["variant"] == name_of(which, tuned)]
            for path in found:
                axes.plot(steps, path, color=f"C{place}", lw=0.7, label=which if path is found[0] else None)
        axes.axhspan(MEAN - TOLERANCE, MEAN + TOLERANCE, color="0.85")
        axes.set(xlabel="step", xscale="log", xlim=(40, STEPS), ylim=(-1, 20))
        axes.set_title("noise N(0, 64), " + ("each at its best rate" if tuned else f"rate {EQUAL:g}"))
    others[0].legend(fontsize="small")
    for axes in drawing.axes:
        axes.title.set_fontsize("medium")
    return drawing
