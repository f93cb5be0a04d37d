"""Batch group normalization at batch sizes from 2 to 600, beside batch and group normalization, on real digits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from assay.bench.datasets import split_digits
from assay.bench.evidence import Bench, Evidence, Rows, at_least, at_most
from assay.nn.batch_group_norm.batch_group_norm import BatchGroupNorm2d, suggest_groups

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EPOCHS = {2: 3, 4: 4, 32: 12, 600: 60}
PARTS = {
    "small batch": [("dense", 2)],
    "large batch": [("conv", 600)],
    "all batches": [("dense", 2), ("dense", 4), ("dense", 32), ("dense", 600)],
    "reported": [("conv", 2)],
}
VARIANTS = ("BN", "GN", "BGN")
Norm = Callable[[int, int], nn.Module]


def claim(
    bench: Bench, *, method: Callable[..., nn.Module] = BatchGroupNorm2d, parts: Collection[str] = tuple(PARTS)
) -> Evidence:
    """Test accuracy after equally many epochs for every normalization, at one learning rate per batch size."""
    runs = sorted({run for part in parts for run in PARTS[part]})
    rows = bench.rows(functools.partial(measure, runs=runs, method=method, bench=bench), VARIANTS, bench.seeds(10))
    checks = []
    if "small batch" in parts:
        gain = rows.difference("BGN", "BN", "dense 2")
        checks.append(at_least("accuracy at batch size 2, dense: BGN - BN", gain, 0.03))
    if "large batch" in parts:
        gain = rows.difference("BGN", "BN", "conv 600")
        checks.append(at_least("accuracy at batch size 600, conv: BGN - BN", gain, -0.007))
    if "all batches" in parts:
        ratio = spread(rows, "BGN") / spread(rows, "BN")
        checks.append(at_most("best - worst batch size, dense: BGN / BN", ratio, 0.5))
    notes = [
        f"{net}, batch size {size}: " + ", ".join(f"{v} {rows.values(v, f'{net} {size}').mean():.1%}" for v in VARIANTS)
        for net, size in runs
    ]
    return Evidence(rows, checks, notes)


def spread(rows: Rows, variant: str) -> np.ndarray:
    """Best minus worst accuracy over the batch sizes of the dense net, one value per seed."""
    accuracies = np.stack([rows.values(variant, f"dense {size}") for size in EPOCHS])
    return np.ptp(accuracies, axis=0)


def measure(variant: str, seed: int, *, runs: list[tuple[str, int]], method: Any, bench: Bench) -> dict[str, float]:
    return {f"{net} {size}": accuracy(net, size, variant, seed, method, bench) for net, size in runs}


def accuracy(net: str, size: int, variant: str, seed: int, method: Any, bench: Bench) -> float:
    """Train on 1,200 of the digits that come with scikit-learn, drawn by ``seed``; accuracy on the other 597."""
    train, test = split_digits(1000 + seed)
    torch.manual_seed(seed)
    model = (dense if net == "dense" else conv)(functools.partial(norm, variant, size, method))
    optimizer = torch.optim.SGD(model.parameters(), lr=min(0.4, 0.004 * size / 2), momentum=0.9)
    order = torch.Generator().manual_seed(seed)
    for _ in range(bench.scale(EPOCHS[size])):
        for chosen in torch.randperm(len(train[0]), generator=order).split(size):
            optimizer.zero_grad()
            F.cross_entropy(model(train[0][chosen]), train[1][chosen]).backward()
            optimizer.step()
    with torch.no_grad():
        return (model.eval()(test[0]).argmax(1) == test[1]).double().mean().item()


def norm(variant: str, batch_size: int, method: Any, channels: int, pixels: int) -> nn.Module:
    if variant == "BN":
        return nn.BatchNorm2d(channels)
    if variant == "GN":
        return nn.GroupNorm(4, channels)
    return method(channels, suggest_groups(batch_size, channels, pixels))


def dense(norm: Norm) -> nn.Module:
    """Fully connected 64-64-64-10; its normalized maps are 1x1, so a statistic of BN has N values."""

    def block() -> list[nn.Module]:
        return [nn.Flatten(), nn.Linear(64, 64), nn.Unflatten(1, (64, 1, 1)), norm(64, 1), nn.ReLU()]

    return nn.Sequential(*block(), *block(), nn.Flatten(), nn.Linear(64, 10))


def conv(norm: Norm) -> nn.Module:
    """Three 3x3 convolutions with 16, 32 and 32 channels, on 8x8 pixels and then on 4x4."""

    def block(inputs: int, outputs: int, pixels: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1), norm(outputs, pixels), nn.ReLU()]

    body = [nn.Unflatten(1, (1, 8, 8)), *block(1, 16, 64), nn.MaxPool2d(2), *block(16, 32, 16), *block(32, 32, 16)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def figure(evidence: Evidence) -> Figure:
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(6, 3.5), layout="constrained")
    axes = drawing.subplots()
    sizes = [size for size in EPOCHS if f"dense {size}" in evidence.rows[0]]
    for variant, style in zip(VARIANTS, ("o--", "s:", "D-"), strict=True):
        values = 100 * np.stack([evidence.rows.values(variant, f"dense {size}") for size in sizes])
        axes.errorbar(sizes, values.mean(1), values.std(1), fmt=style, capsize=3, label=variant)
    axes.set_xscale("log")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set_xlabel("batch size")
    axes.set_ylabel("test accuracy, %")
    axes.set_title("Fully connected net on digits, mean and spread over seeds", fontsize="medium")
    axes.legend()
    return drawing
