"""A small inpainting network with region, instance and batch normalization on patches of photographs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.bench.evidence import Bench, Evidence, Rows, at_least, at_most
from assay.nn._swap import swap
from assay.nn.region_norm.generator import InpaintingGenerator
from assay.nn.region_norm.layers import RegionNormB, RegionNormL, region_norm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REGION, INSTANCE, BATCH = "region", "instance", "batch"
RATES = {REGION: 0.001, INSTANCE: 0.001, BATCH: 0.001}  # of Adam, tuned on seed 0 among 0.0005, 0.001, 0.003
STEPS, SIDE = 200, 32
BINS = ((0.1, 0.2), (0.2, 0.3), (0.3, 0.4), (0.4, 0.5))
FILLING, SHIFT = "filling", "shift"
Normalize = Callable[[Tensor, Tensor], Tensor]


def claim(
    bench: Bench, *, method: Normalize = region_norm, parts: tuple[str, ...] = (FILLING, SHIFT), seeds: int = 3
) -> Evidence:
    """PSNR in the holes of unseen patches; and how far the hole moves the statistics of what is valid."""
    run = functools.partial(measure, method=method, parts=parts, steps=bench.scale(STEPS))
    rows = bench.rows(run, [REGION, INSTANCE, BATCH], bench.seeds(seeds))
    checks = []
    if FILLING in parts:
        for other, least in ((INSTANCE, 0.2), (BATCH, -0.1)):
            gain = rows.difference(REGION, other, "psnr")
            checks.append(at_least(f"PSNR in the hole over that of {other} normalization, dB", gain, least))
        lost = rows.difference(REGION, INSTANCE, "lost")
        checks.append(at_most("PSNR lost from the smallest holes to the largest, region - instance, dB", lost, 0.0))
    if SHIFT in parts:
        checks.append(
            at_most("change of valid outputs by what is in the hole", rows.values(REGION, "shift").max(), 1e-5)
        )
        checks.append(at_least("the same, instance normalization", rows.values(INSTANCE, "shift"), 0.1))
    return Evidence(rows, checks, notes(rows) if FILLING in parts else [])


def notes(rows: Rows) -> list[str]:
    return [f"{arm}: {rows.values(arm, 'psnr').mean():.2f} dB" for arm in RATES]


def measure(variant: str, seed: int, *, method: Normalize, parts: tuple[str, ...], steps: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if FILLING in parts:
        found |= train(variant, seed, RATES[variant], steps)
    if SHIFT in parts:
        found["shift"] = shift(variant, seed, method)
    return found


class Plain(nn.Module):
    """A normalization that is told the mask and does not look at it."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.norm(x)


def generator(arm: str) -> nn.Module:
    """The same network and first weights, with the normalization of the arm; all are shown the mask."""
    model = InpaintingGenerator(width=16, blocks=2, mask_channel=True)
    if arm == REGION:
        return model
    kind = {INSTANCE: nn.InstanceNorm2d, BATCH: nn.BatchNorm2d}[arm]
    return swap(model, (RegionNormB, RegionNormL), lambda _, norm: Plain(kind(norm.num_features, affine=True)))


def train(arm: str, seed: int, rate: float, steps: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = generator(arm)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, betas=(0.5, 0.9))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        images, masks = patches(16, draw, unseen=False), holes(16, draw, (0.1, 0.5))
        optimizer.zero_grad()
        F.l1_loss(model(images, masks), images).backward()
        optimizer.step()
        schedule.step()
    each = []
    with torch.no_grad():
        model.eval()
        for ratios in BINS:
            images, masks = patches(64, draw, unseen=True), holes(64, draw, ratios)
            error = (model(images, masks) - images).square() * masks
            mean = error.sum((1, 2, 3)) / (3 * masks.sum((1, 2, 3)))
            each.append(-10 * mean.clamp_min(1e-10).log10().mean().item())
    return {"psnr": float(np.mean(each)), "lost": each[0] - each[-1], "by size": each}


@torch.no_grad()
def shift(arm: str, seed: int, method: Normalize) -> float:
    """Largest change of a normalized valid pixel where the hole is filled with 1 in place of the image."""
    draw = torch.Generator().manual_seed(seed)
    images, masks = patches(8, draw, unseen=True), holes(8, draw, (0.3, 0.4))
    filled = torch.where(masks.bool(), 1.0, images)

    def normalize(x: Tensor) -> Tensor:
        if arm == REGION:
            return method(x, masks.bool())
        return F.instance_norm(x) if arm == INSTANCE else F.batch_norm(x, None, None, training=True)

    return ((normalize(images) - normalize(filled)) * (1 - masks)).abs().max().item()


@functools.cache
def _photographs() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_sample_images

    china, flower = (torch.tensor(i, dtype=torch.float32).permute(2, 0, 1) / 255 for i in load_sample_images().images)
    return china, flower


def patches(count: int, draw: torch.Generator, unseen: bool) -> Tensor:
    """Patches of 32 x 32 pixels: of the left four fifths of one photograph, or of the rest of it and of another."""
    china, flower = _photographs()
    edge = int(0.8 * china.shape[2])
    sources = [china[:, :, edge:], flower] if unseen else [china[:, :, :edge]]
    found = []
    for i in range(count):
        source = sources[i % len(sources)]
        top, left = (int(torch.randint(size - SIDE + 1, (), generator=draw)) for size in source.shape[1:])
        found.append(source[:, top : top + SIDE, left : left + SIDE])
    return torch.stack(found)


def holes(count: int, draw: torch.Generator, ratios: tuple[float, float]) -> Tensor:
    """Masks of random rectangles, added until a share of the pixels drawn from ``ratios`` is covered."""
    masks = torch.zeros(count, 1, SIDE, SIDE)
    for mask in masks[:, 0]:
        share = ratios[0] + (ratios[1] - ratios[0]) * torch.rand((), generator=draw).item()
        while mask.mean() < share:
            top, left = torch.randint(SIDE - 2, (2,), generator=draw).tolist()
            height, width = torch.randint(2, 9, (2,), generator=draw).tolist()
            mask[top : top + height, left : left + width] = 1
    return masks


def figure(evidence: Evidence) -> Figure:
    """PSNR in the hole over its size."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(6, 3.5), layout="constrained")
    axes = drawing.subplots()
    centres = [100 * sum(ratios) / 2 for ratios in BINS]
    for arm, style in ((REGION, "D-"), (INSTANCE, "o--"), (BATCH, "s--")):
        values = np.array([row["by size"] for row in evidence.rows if row["variant"] == arm])
        axes.plot(centres, values.mean(0), style, label=f"{arm} normalization")
        axes.fill_between(centres, values.min(0), values.max(0), alpha=0.15, linewidth=0)
    axes.set_xlabel("hole, % of the patch")
    axes.set_ylabel("PSNR in the hole, dB")
    axes.legend()
    return drawing
