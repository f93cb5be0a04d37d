"""Digits told apart by a small Terminator and by a residual network of as many parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.bench.datasets import split_digits
from assay.bench.evidence import Bench, Evidence, Rows, at_least, at_most
from assay.bench.models import accuracy
from assay.nn.hyperzzw.hyperzzw import Terminator, slow_neural_loss

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EPOCHS, EARLY, BATCH, WEIGHT = 12, 3, 64, 1.0
OURS, RESIDUAL, ONES, LOSS = "Terminator", "residual", "kernel of ones", "Terminator, slow loss"
BEST = {OURS: 0.1, RESIDUAL: 0.01, ONES: 0.1, LOSS: 0.1}


def claim(
    bench: Bench,
    *,
    method: Callable[..., Any] = Terminator,
    seeds: int = 3,
    arms: tuple[str, ...] = (OURS, RESIDUAL, ONES, LOSS),
) -> Evidence:
    """Accuracy of each arm at its best learning rate, early and at the end, and what the parts do.

    The rate is from 0.003, 0.01, 0.03, 0.1, by accuracy on seeds 1 and 2; the last two arms have the Terminator's.
    """
    rows = bench.rows(functools.partial(measure, method=method, bench=bench), arms, bench.seeds(seeds))
    checks = [at_most("largest mean of a standardized channel", rows.values(OURS, "largest mean").max(), 1e-3)]
    if RESIDUAL in arms:
        checks += [
            at_least("accuracy, Terminator, %", 100 * rows.values(OURS, "accuracy"), 96.0),
            at_least("accuracy, Terminator - residual, points", points(rows, OURS, RESIDUAL, "accuracy"), -1.0),
            at_least("after three epochs, Terminator - residual, points", points(rows, OURS, RESIDUAL, "early"), -1.0),
        ]
    if ONES in arms:
        gain = points(rows, ONES, OURS, "accuracy")
        checks.append(at_most("accuracy, kernel of ones - Terminator, points", gain, 0.5))
    if LOSS in arms:
        checks.append(at_most("slow loss, end / start, where trained", rows.values(LOSS, "slow loss"), 0.9))
    return Evidence(rows, checks, [note(rows, arm) for arm in arms])


def points(rows: Rows, arm: str, other: str, metric: str) -> Any:
    return 100 * rows.difference(arm, other, metric)


def note(rows: Rows, arm: str) -> str:
    final, early, parameters = (rows.values(arm, name).mean() for name in ("accuracy", "early", "parameters"))
    said = f"{arm}: accuracy {final:.1%}, after {EARLY} epochs {early:.1%}; {parameters:.0f} parameters"
    return f"{said}; slow loss {rows.values(arm, 'slow loss').mean():.2f} times" if arm in (OURS, LOSS) else said


def measure(
    arm: str, seed: int, *, method: Callable[..., Any], bench: Bench, rate: float | None = None
) -> dict[str, Any]:
    """1,200 digits, the other 597 to test on; AdamW, 12 epochs in batches of 64, a cosine to 0."""
    (x, y), (test_x, test_y) = ((pixels.view(-1, 1, 8, 8), labels) for pixels, labels in split_digits(seed))
    torch.manual_seed(seed)
    model = network(arm, method)
    kernels = model.hyper_kernels if arm in (OURS, LOSS) else None
    first = slow_neural_loss(kernels()).item() if kernels else 1.0
    epochs = bench.scale(EPOCHS, least=2)
    optimizer = torch.optim.AdamW(model.parameters(), BEST[arm] if rate is None else rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    order, curve = torch.Generator().manual_seed(seed), []
    for _ in range(epochs):
        for chosen in torch.randperm(len(x), generator=order).split(BATCH):
            optimizer.zero_grad()
            loss = F.cross_entropy(model.train()(x[chosen]), y[chosen])
            if arm == LOSS:
                loss = loss + WEIGHT * slow_neural_loss(kernels())
            loss.backward()
            optimizer.step()
        schedule.step()
        curve.append(accuracy(model, test_x, test_y))
    return {
        "accuracy": curve[-1],
        "early": curve[min(EARLY, epochs) - 1],
        "parameters": size(model),
        "largest mean": largest_mean(model, x[:256]) if arm == OURS else None,
        "slow loss": slow_neural_loss(kernels()).item() / first if kernels else None,
        "curve": curve,
    }


def network(arm: str, method: Callable[..., Any]) -> Any:
    build = method if arm != ONES else functools.partial(KernelOfOnes, method)
    options = {"hidden": 16, "local_hidden": 16, "num_layers": (2, 2), "local_kernel_sizes": (3, 5, 3, 5)}
    if arm != RESIDUAL:
        return build(10, 1, 8, (6, 3), (0.0, 0.0), **options)
    with torch.random.fork_rng():
        wanted = size(Terminator(10, 1, 8, (6, 3), (0.0, 0.0), **options))
        width = min(range(8, 64), key=lambda channels: abs(size(residual(channels)) - wanted))
    return residual(width)


def KernelOfOnes(method: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """The network whose large kernels are 1 everywhere, whatever their slow networks say."""
    model = method(*arguments, **options)
    for block in model.blocks:
        output = block.zzw.slow_net.output.requires_grad_(False)
        nn.init.zeros_(output.weight)
        nn.init.ones_(output.bias)
    return model


def residual(width: int) -> nn.Module:
    """Two residual blocks of two 3x3 convolutions behind a first one."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), Residual(width), Residual(width), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(width, 10),
    )  # fmt: skip


class Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.one, self.two = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norm_one, self.norm_two = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm_two(self.two(F.relu(self.norm_one(self.one(x))))))


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def largest_mean(model: Any, x: Tensor) -> float:
    """Largest absolute mean of a channel over a training batch and its pixels, after each block's standardization."""
    found: list[float] = []
    handles = [
        block.norm.register_forward_hook(lambda _, __, y: found.append(y.mean((0, 2, 3)).abs().max().item()))
        for block in model.blocks
    ]
    model.train()(x)
    for handle in handles:
        handle.remove()
    return max(found)


def figure(evidence: Evidence) -> Figure:
    """Test accuracy over the epochs for each arm, mean over seeds."""
    import numpy as np
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(6, 3.5), layout="constrained")
    axes = drawing.subplots()
    for arm, style in zip(BEST, ("o-", "s--", "^:", "d-."), strict=True):
        curves = np.array([row["curve"] for row in evidence.rows if row["variant"] == arm])
        if len(curves):
            axes.plot(np.arange(1, curves.shape[1] + 1), 100 * curves.mean(0), style, label=arm, markersize=4)
    axes.set_xlabel("epoch")
    axes.set_ylabel("test accuracy, %")
    axes.set_title("Digits, networks of as many parameters, mean over seeds", fontsize="medium")
    axes.legend()
    return drawing
