"""Plain, dynamic and frequency dynamic convolutions that tell textures apart, pixel by pixel."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.bench.evidence import Bench, Evidence, Rows, at_least, at_most
from assay.nn.fdconv.fdconv import FDConv2d

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIDE, CHANNELS, CLASSES, KERNELS = 32, 24, 5, 8
TRAIN, TEST, BATCH, STEPS = 256, 128, 8, 250
WAVES = ((0.05, 0.3), (0.15, 1.2), (0.25, 2.2), (0.35, 0.8), (0.45, 1.7))  # cycles per pixel, direction in radians
CONV, DY, FD, BARE = "Conv2d", "DY-Conv", "FDConv2d", "FDConv2d without bands"
RATES = (0.003, 0.01, 0.03)
BEST = {CONV: 0.01, DY: 0.01, FD: 0.01, BARE: 0.01}


def claim(
    bench: Bench,
    *,
    method: Callable[..., nn.Module] = FDConv2d,
    seeds: int = 4,
    arms: tuple[str, ...] = (CONV, DY, FD),
    reported: bool = True,
) -> Evidence:
    """Mean intersection over union of each arm at its best learning rate, and how alike its kernels' responses are.

    The rate is from 0.003, 0.01, 0.03, by mIoU on seeds 1 and 2. Reported: the layer without the bands' factors.
    """
    run = functools.partial(measure, method=method, bench=bench)
    rows = bench.rows(run, arms, bench.seeds(seeds))
    rows += bench.rows(run, [BARE] if reported else [], bench.seeds(2))
    checks = [at_least("mIoU, FDConv2d - Conv2d, points", 100 * rows.difference(FD, CONV, "mIoU"), 1.0)]
    if DY in arms:
        share = (rows.values(FD, "weights") / rows.values(DY, "weights")).max()
        checks += [
            at_least("mIoU, FDConv2d - DY-Conv, points", 100 * rows.difference(FD, DY, "mIoU"), -0.5),
            at_most("weights, FDConv2d / DY-Conv", share, 0.4),
            at_least("likeness of the kernels' responses, DY-Conv", rows.values(DY, "likeness"), 0.5),
        ]
    checks.append(at_most("likeness of the kernels' responses, FDConv2d", rows.values(FD, "likeness"), 0.5))
    return Evidence(rows, checks, [note(rows, arm) for arm in dict.fromkeys(row["variant"] for row in rows)])


def note(rows: Rows, arm: str) -> str:
    found, parameters = rows.values(arm, "mIoU"), rows.values(arm, "parameters").mean()
    said = f"{arm}: mIoU {found.mean():.1%}, from {found.min():.1%} to {found.max():.1%}; {parameters:.0f} parameters"
    if arm == CONV:
        return said
    like, size = rows.values(arm, "likeness").mean(), rows.values(arm, "likeness in size").mean()
    return f"{said}; likeness of the kernels {like:.2f}, mean of its absolute values {size:.2f}"


def measure(
    arm: str, seed: int, *, method: Callable[..., nn.Module], bench: Bench, rate: float | None = None
) -> dict[str, Any]:
    """Two 3x3 layers of 24 channels behind a plain one; Adam with a cosine to 0, batches of 8 images."""
    (x, y), (test_x, test_y) = scenes(TRAIN, seed), scenes(TEST, 10_000 + seed)
    torch.manual_seed(seed)
    layers = [layer(arm, method) for _ in range(2)]
    parts = [[inner, nn.BatchNorm2d(CHANNELS), nn.ReLU()] for inner in (nn.Conv2d(1, CHANNELS, 3, padding=1), *layers)]
    model = nn.Sequential(*(module for part in parts for module in part), nn.Conv2d(CHANNELS, CLASSES, 1))
    steps = bench.scale(STEPS)
    optimizer = torch.optim.Adam(model.parameters(), BEST[arm] if rate is None else rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(x), (BATCH,), generator=order)
        optimizer.zero_grad()
        F.cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        guess = torch.cat([model.eval()(part).argmax(1) for part in test_x.split(32)])
        kernels = [parallel(part) for part in layers]
        alike = torch.stack([likeness(part) for part in kernels])
        return {
            "mIoU": overlap(guess, test_y),
            "weights": sum(weight(part).numel() for part in layers),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "likeness": alike.mean(),
            "likeness in size": alike.abs().mean(),
            "responses": [response(kernel).round(decimals=3).tolist() for kernel in kernels[0]],
        }


def layer(arm: str, method: Callable[..., nn.Module]) -> nn.Module:
    if arm in (FD, BARE):
        return method(CHANNELS, CHANNELS, 3, padding=1, kernel_num=KERNELS, fbm=arm == FD)
    return (DynamicConv2d if arm == DY else nn.Conv2d)(CHANNELS, CHANNELS, 3, padding=1)


class DynamicConv2d(nn.Module):
    """DY-Conv (Chen et al., 2020): for each example a mean of four kernels, weighed by a softmax of its mean pixel."""

    def __init__(self, inputs: int, outputs: int, size: int, padding: int, number: int = 4, temperature: float = 30):
        super().__init__()
        self.kernels = nn.Parameter(torch.empty(number, outputs, inputs, size, size))
        for kernel in self.kernels:
            nn.init.kaiming_uniform_(kernel, a=5**0.5)
        hidden = max(inputs // 4, 4)
        self.attention = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, number))
        self.bias, self.padding, self.temperature = nn.Parameter(torch.zeros(outputs)), padding, temperature

    def forward(self, x: Tensor) -> Tensor:
        shares = (self.attention(x.mean((2, 3))) / self.temperature).softmax(1)
        weight = torch.einsum("bn,noikl->boikl", shares, self.kernels).flatten(0, 1)
        y = F.conv2d(x.flatten(0, 1).unsqueeze(0), weight, padding=self.padding, groups=len(x))
        return y.view(len(x), -1, *y.shape[2:]) + self.bias.view(-1, 1, 1)


def weight(part: Any) -> Tensor:
    """The parameter that kernels are made of."""
    return next(getattr(part, name) for name in ("dft_weight", "kernels", "weight") if hasattr(part, name))


def parallel(part: Any) -> Tensor:
    """The kernels that a layer mixes, (n, Cout, Cin, k, k)."""
    if hasattr(part, "dft_weight"):
        return part._mixed(torch.eye(KERNELS))
    return part.kernels if hasattr(part, "kernels") else part.weight.unsqueeze(0).expand(2, -1, -1, -1, -1)


def response(kernel: Tensor) -> Tensor:
    """Logarithm of the magnitude at 16 x 9 spatial frequencies, mean over the pairs of channels, less its own mean."""
    size = torch.fft.rfft2(kernel.double(), s=(16, 16)).abs().clamp(min=1e-12).log().mean((0, 1))
    return size - size.mean()


def likeness(kernels: Tensor) -> Tensor:
    """Cosine of the responses for each pair of kernels: 1 for equal ones, -1 for a low-pass and a high-pass filter."""
    flat = F.normalize(torch.stack([response(kernel).flatten() for kernel in kernels]), dim=1)
    return (flat @ flat.T)[tuple(torch.triu_indices(len(flat), len(flat), 1))]


def scenes(number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 32, 32) of up to six patches, each a wave of random phase, with noise and a gain, and labels."""
    draw = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    seeds = torch.rand(number, 6, 2, generator=draw) * SIDE
    nearest = torch.cdist(torch.stack([y, x], -1).view(1, -1, 2).float(), seeds).argmin(2).view(number, SIDE, SIDE)
    kinds = torch.randint(CLASSES, (number, 6), generator=draw)
    labels = kinds.gather(1, nearest.flatten(1)).view_as(nearest)
    phases = torch.rand(number, 6, generator=draw).mul(2 * torch.pi).gather(1, nearest.flatten(1)).view_as(nearest)
    frequency, angle = torch.tensor(WAVES).T
    along = x * angle[labels].cos() + y * angle[labels].sin()
    wave = torch.sin(2 * torch.pi * frequency[labels] * along + phases)
    gain = torch.rand(number, 1, 1, generator=draw).mul(3).exp() / 4
    noise = torch.randn(number, SIDE, SIDE, generator=draw)
    return (gain * (wave + noise)).unsqueeze(1), labels


def overlap(guess: Tensor, truth: Tensor) -> float:
    """Mean over the classes of intersection over union."""
    both = [(((guess == c) & (truth == c)).sum(), ((guess == c) | (truth == c)).sum()) for c in range(CLASSES)]
    return sum((inter / union).item() for inter, union in both) / CLASSES


def figure(evidence: Evidence) -> Figure:
    """mIoU of each arm over seeds, and the responses of the kernels that the first dynamic layer mixes."""
    import numpy as np
    from matplotlib.figure import Figure

    from assay.bench.figures import by_variant

    arms = list(dict.fromkeys(row["variant"] for row in evidence.rows))
    drawing = Figure(figsize=(8, 4), layout="constrained")
    left, right = drawing.subfigures(1, 2, width_ratios=(1, 1.4))
    axes = left.subplots()
    by_variant(axes, evidence.rows, arms, "mIoU", scale=100)
    axes.tick_params("x", labelsize="small", rotation=20)
    axes.set_ylabel("mIoU, %")
    axes.set_title("Texture of each pixel, seeds and mean", fontsize="medium")
    shown = [(arm, evidence.rows[arms.index(arm)]["responses"]) for arm in arms if arm in (DY, FD)]
    grid = right.subplots(len(shown), KERNELS, squeeze=False)
    for line, (arm, responses) in zip(grid, shown, strict=True):
        for panel in line:
            panel.set_axis_off()
        for panel, values in zip(line, responses, strict=False):
            panel.imshow(np.fft.fftshift(np.array(values), axes=0), cmap="RdBu_r", vmin=-2, vmax=2, origin="lower")
        line[0].set_title(arm, fontsize="small", loc="left")
    right.suptitle("Responses of the kernels of one layer, log scale", fontsize="medium")
    return drawing
