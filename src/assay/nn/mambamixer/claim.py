"""Forecasts of series that follow others with a lag, among distractors: what mixes the variates decides."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.bench.evidence import Bench, Evidence, at_least, at_most
from assay.nn import TSM2, selective_scan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOOKBACK, HORIZON, SOURCES, FOLLOWERS, DISTRACTORS = 32, 8, 4, 4, 4
VARIATES, LENGTH, TRAIN = SOURCES + FOLLOWERS + DISTRACTORS, 3000, 2200
TARGETS = slice(SOURCES, SOURCES + FOLLOWERS)
BOTH, TOKENS, MLP = "tokens and channels", "tokens alone", "channels by an MLP"
BEST = {BOTH: 3e-2, TOKENS: 3e-2, MLP: 3e-2}
SIZES = {"depth": 2, "d_state": 4}
STEPS, BATCH = 200, 32
Make = Callable[..., nn.Module]


def claim(
    bench: Bench, *, method: Make = TSM2, seeds: int = 4, variants: tuple[str, ...] = (BOTH, TOKENS, MLP)
) -> Evidence:
    """Error on the followers, for three ways to mix variates in networks of equally many parameters.

    Learning rates are from 0.003, 0.01, 0.03, 0.1, each arm's best on seed 0.
    """
    rows = bench.rows(functools.partial(reach, method=method), ["reach"], bench.seeds(1))
    share = rows.values("reach", "share").min()
    checks = [at_least("share of the variates that the channel mixers bring to each", share, 1.0)]
    if variants:
        rows += bench.rows(functools.partial(measure, method=method, bench=bench), variants, bench.seeds(seeds))
        checks.append(at_most("error, both / tokens alone", rows.ratio(BOTH, TOKENS, "error"), 0.85))
        checks.append(at_most("error, both / channels by an MLP", rows.ratio(BOTH, MLP, "error"), 1.05))
        rows += bench.rows(loop_over_scan, ["speed"], bench.seeds(2))
        checks.append(at_least("time of a loop / scan, smallest", rows.values("speed", "ratio").min(), 8))
    notes = [
        f"{variant}: error {rows.values(variant, 'error').mean():.3f} of the followers' variance, "
        f"{rows.values(variant, 'parameters').mean():.0f} parameters"
        for variant in variants
    ]
    return Evidence(rows, checks, notes)


def reach(variant: str, seed: int, *, method: Make) -> dict[str, float]:
    """Of all pairs of variates, those where one has a say in what the channel mixers make of the other, untrained."""
    torch.manual_seed(seed)
    model, x = network(BOTH, method), torch.randn(1, VARIATES, LOOKBACK, requires_grad=True)
    moved = []
    for block in model.mixer.blocks:
        for y in block.channel_mixer(x)[0].sum(1):
            moved.append(torch.autograd.grad(y, x, retain_graph=True)[0].abs().amax((0, 2)) > 0)
    return {"share": torch.stack(moved).double().mean().item()}


def series(seed: int) -> Tensor:
    """(VARIATES, LENGTH): sources with their noise, followers that repeat two of them 8 to 16 steps later, noise.

    A source is an autoregression of order 2 that swings with one of two periods and changes over at random.
    """
    draw = torch.Generator().manual_seed(seed)
    periods = torch.rand(SOURCES, 2, generator=draw) * 30 + 6
    lags = torch.randint(8, 17, (FOLLOWERS, 2), generator=draw).tolist()
    regime, steps = torch.zeros(SOURCES, dtype=torch.long), torch.zeros(LENGTH + 216, SOURCES)
    for t in range(2, len(steps)):
        regime = (regime + (torch.rand(SOURCES, generator=draw) < 0.02)) % 2
        turn = 2 * 0.97 * torch.cos(2 * torch.pi / periods.gather(1, regime[:, None])[:, 0])
        steps[t] = turn * steps[t - 1] - 0.97**2 * steps[t - 2] + torch.randn(SOURCES, generator=draw)
    sources = steps.T[:, 200:] / steps[200:].std(0)[:, None]
    followers = [
        sources[i % SOURCES].roll(first) + sources[(i + 1) % SOURCES].roll(second)
        for i, (first, second) in enumerate(lags)
    ]
    clean = torch.cat([sources, torch.stack(followers) / 2**0.5])[:, -LENGTH:]
    seen = clean + 0.2 * torch.randn(clean.shape, generator=draw)
    return torch.cat([seen, 2 * torch.randn(DISTRACTORS, LENGTH, generator=draw)])


def measure(variant: str, seed: int, *, method: Make, bench: Bench, rate: float | None = None) -> dict[str, Any]:
    """200 steps of AdamW; the mean square error over the last 800 steps of time, over the followers' variance."""
    x = series(seed)
    windows = x.unfold(1, LOOKBACK + HORIZON, 1).transpose(0, 1)
    train, test = windows[: TRAIN - LOOKBACK - HORIZON], windows[TRAIN::3]
    torch.manual_seed(seed)
    model = network(variant, method)
    parameters = sum(p.numel() for p in model.parameters())
    steps = bench.scale(STEPS, least=60)
    optimizer = torch.optim.AdamW(model.parameters(), rate or BEST[variant], fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate or BEST[variant], steps)
    order = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        batch = train[torch.randint(len(train), (BATCH,), generator=order)]
        optimizer.zero_grad()
        F.mse_loss(model(batch[..., :LOOKBACK])[:, TARGETS], batch[:, TARGETS, LOOKBACK:]).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        found, wanted = model.eval()(test[..., :LOOKBACK])[:, TARGETS], test[:, TARGETS, LOOKBACK:]
    return {"error": (F.mse_loss(found, wanted) / wanted.var()).item(), "parameters": parameters}


def network(variant: str, method: Make) -> Any:
    """The method as it is, or TSM2 without a channel mixer or with an MLP for it, as many parameters added back."""
    if variant == BOTH:
        return method(LOOKBACK, HORIZON, VARIATES, expand=1, **SIZES)
    budget = sum(p.numel() for p in TSM2(LOOKBACK, HORIZON, VARIATES, expand=1, **SIZES).parameters())

    def of_size(size: int) -> nn.Module:
        model = TSM2(LOOKBACK, HORIZON, VARIATES, expand=size if variant == TOKENS else 1, **SIZES)
        for block in model.mixer.blocks:
            block.channel_mixer = nn.Identity() if variant == TOKENS else AcrossVariates(size)
        return model

    counts = [sum(p.numel() for p in of_size(size).parameters()) for size in (1, 2)]
    return of_size(1 + round((budget - counts[0]) / (counts[1] - counts[0])))


class AcrossVariates(nn.Module):
    """The same two linear layers over the variates at every step of time."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(VARIATES, hidden), nn.GELU(), nn.Linear(hidden, VARIATES))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.transpose(1, 2)).transpose(1, 2)


def loop_over_scan(variant: str, seed: int) -> dict[str, float]:
    """Time of forward and backward pass at batch 8, length 256, 64 channels, 16 states; a loop, over the scan."""
    torch.manual_seed(seed)
    u, delta, B, C = (torch.randn(8, size, 256, requires_grad=True) for size in (64, 64, 16, 16))
    A = (-torch.rand(64, 16)).requires_grad_()

    def loop() -> Tensor:
        step = F.softplus(delta)
        decay = torch.exp(step[..., None] * A[:, None])
        inputs = (step * u)[..., None] * B.transpose(1, 2)[:, None]
        state, outputs = torch.zeros(8, 64, 16), []
        for t in range(256):
            state = decay[:, :, t] * state + inputs[:, :, t]
            outputs.append((state * C[:, None, :, t]).sum(-1))
        return torch.stack(outputs, 2)

    def seconds(call: Callable[[], Tensor]) -> float:
        start = time.process_time()
        call().sum().backward()
        return time.process_time() - start

    def scan() -> Tensor:
        return selective_scan(u, delta, A, B, C, delta_softplus=True)

    return {"ratio": min(seconds(loop) for _ in range(2)) / min(seconds(scan) for _ in range(4))}


def figure(evidence: Evidence) -> Figure:
    """Error of each way to mix the variates, one point per seed."""
    from matplotlib.figure import Figure

    from assay.bench.figures import by_variant

    drawing = Figure(figsize=(5.5, 3), layout="constrained")
    axes = drawing.subplots()
    by_variant(axes, evidence.rows, list(BEST), "error")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("squared error / variance")
    axes.set_title("Forecasts of followers among distractors", fontsize="medium")
    return drawing
