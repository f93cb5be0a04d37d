"""TrAct and the plain first layer: on raw pixels, over learning rates on patches of photographs, and both tuned."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.bench.datasets import split_digits
from assay.bench.evidence import Bench, Evidence, Rows, at_least, at_most
from assay.nn.tract.tract import TrAct

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLAIN, TRACT = "plain", "TrAct"
RAW_RATES = (0.003, 0.01)
RATES = (0.01, 0.03, 0.1, 0.3)  # of the patches and of the tuned digits alike
BEST = {4: {PLAIN: 0.3, TRACT: 0.3}, 8: {PLAIN: 0.2, TRACT: 0.2}}  # by epochs; of 0.03 to 0.6, tuned on seeds 0 to 4
CONTRAST, PATCHES, TUNED = "raw pixels", "patches", "tuned"
Data = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]
Method = Callable[[nn.Module], nn.Module]


def claim(
    bench: Bench, *, method: Method = TrAct, parts: tuple[str, ...] = (CONTRAST, PATCHES, TUNED), seeds: int = 10
) -> Evidence:
    """Accuracies after a few epochs of SGD with momentum; the arms differ in the first layer's gradient alone."""
    run = functools.partial(measure, method=method, parts=parts, bench=bench)
    rows = bench.rows(run, [PLAIN, TRACT], bench.seeds(seeds))
    checks = []
    if CONTRAST in parts:
        for rate, least in zip(RAW_RATES, (0.04, 0.4), strict=True):
            gain = rows.difference(TRACT, PLAIN, f"raw, lr {rate:g}")
            checks.append(at_least(f"raw pixels, lr {rate:g}: accuracy over the plain layer's", gain, least))
    if PATCHES in parts:
        worst = np.min([rows.values(TRACT, f"patches, lr {rate:g}") for rate in RATES], axis=0)
        checks.append(at_least("patches: accuracy at the worst of four rates, TrAct", worst, 0.88))
        plain = rows.values(PLAIN, f"patches, lr {RATES[-1]:g}")
        checks.append(at_most(f"patches: accuracy at lr {RATES[-1]:g}, plain", plain, 0.75))
    if TUNED in parts:
        gain = rows.difference(TRACT, PLAIN, "4 epochs")
        checks.append(
            at_least("standardized digits, 4 epochs, both tuned: accuracy over the plain layer's", gain, -0.005)
        )
    return Evidence(rows, checks, notes(rows) if TUNED in parts else [])


def notes(rows: Rows) -> list[str]:
    """What the paper's speed-up would show in, accuracy at equal epochs, here where both are tuned."""
    pairs = [(epochs, *(rows.values(arm, f"{epochs} epochs").mean() for arm in (PLAIN, TRACT))) for epochs in BEST]
    return [f"{epochs} epochs, both tuned: plain {plain:.3f}, TrAct {ours:.3f}" for epochs, plain, ours in pairs]


def measure(variant: str, seed: int, *, method: Method, parts: tuple[str, ...], bench: Bench) -> dict[str, Any]:
    first = method if variant == TRACT else lambda layer: layer
    found: dict[str, Any] = {}
    if CONTRAST in parts:
        for rate in RAW_RATES:
            curve = list(train(mlp(seed, first, 64, 64, 64, 10), raw_digits(seed), rate, bench.scale(8), 128, seed))
            found[f"raw, lr {rate:g}"] = curve[-1]
    if PATCHES in parts:
        for rate in RATES:
            curve = list(train(mlp(seed, first, 432, 128, 64, 2), photographs(seed), rate, bench.scale(6), 128, seed))
            found[f"patches, lr {rate:g}"] = curve[-1]
    if TUNED in parts:
        for epochs, rates in BEST.items():
            curve = on_standardized(first, rates[variant], epochs, seed, bench)
            found |= {f"{epochs} epochs": curve[-1], f"curve of {epochs}": [round(share, 4) for share in curve]}
    return found


def on_standardized(first: Method, rate: float, epochs: int, seed: int, bench: Bench) -> list[float]:
    """Test accuracy after each epoch on standardized digits."""
    data = standardized(raw_digits(seed))
    return list(train(mlp(seed, first, 64, 64, 64, 10), data, rate, bench.scale(epochs), 128, seed))


def train(model: nn.Module, data: Data, rate: float, epochs: int, batch: int, seed: int) -> Iterator[float]:
    """Test accuracy after each epoch of SGD with momentum 0.9 and a cosine to 0."""
    (x, y), (unseen, labels) = data
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(y) // batch))
    for _ in range(epochs):
        for chosen in torch.randperm(len(y), generator=order).split(batch):
            optimizer.zero_grad()
            F.cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            yield (model(unseen).argmax(1) == labels).double().mean().item()


def mlp(seed: int, first: Method, inputs: int, one: int, two: int, classes: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Linear(inputs, one), nn.ReLU(), nn.Linear(one, two), nn.ReLU(), nn.Linear(two, classes)]
    return nn.Sequential(first(layers[0]), *layers[1:])


def raw_digits(seed: int) -> Data:
    """Pixels from 0 to 255."""
    (x, y), (unseen, labels) = split_digits(seed)
    return (255 * x, y), (255 * unseen, labels)


def standardized(data: Data) -> Data:
    """All inputs less one mean, over one standard deviation, as is usual with images."""
    (x, y), (unseen, labels) = data
    mean, std = x.mean(), x.std()
    return ((x - mean) / std, y), ((unseen - mean) / std, labels)


def photographs(seed: int) -> Data:
    """Which of two photographs a patch of 12 x 12 pixels is from: the left 70 % to train on, the right 28 % to test."""
    order = torch.Generator().manual_seed(seed)
    sets = []
    for low, high, count in ((0.0, 0.7, 2000), (0.72, 1.0, 750)):
        x = torch.cat([_patches(image, low, high, count, order) for image in _images()])
        sets.append((x, torch.arange(2).repeat_interleave(count)))
    return standardized((sets[0], sets[1]))


@functools.cache
def _images() -> list[Tensor]:
    from sklearn.datasets import load_sample_images

    return [torch.tensor(image, dtype=torch.float32) for image in load_sample_images().images]


def _patches(image: Tensor, low: float, high: float, count: int, order: torch.Generator) -> Tensor:
    """Patches whose columns are between two shares of the width."""
    height, width, _ = image.shape
    rows = torch.randint(height - 11, (count,), generator=order)
    columns = torch.randint(int(low * width), int(high * width) - 11, (count,), generator=order)
    return torch.stack([image[i : i + 12, j : j + 12].flatten() for i, j in zip(rows, columns, strict=True)])


def figure(evidence: Evidence) -> Figure:
    """Accuracy over the learning rate on patches, and over epochs with both tuned."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(8, 3.5), layout="constrained")
    left, right = drawing.subplots(1, 2)
    for arm, style in ((PLAIN, "o--"), (TRACT, "D-")):
        shares = np.stack([evidence.rows.values(arm, f"patches, lr {rate:g}") for rate in RATES])
        left.plot(RATES, shares.mean(1), style, label=arm)
        left.fill_between(RATES, shares.min(1), shares.max(1), alpha=0.15, linewidth=0)
        for epochs, rates in BEST.items():
            curve = np.mean([row[f"curve of {epochs}"] for row in evidence.rows if row["variant"] == arm], axis=0)
            right.plot(range(1, len(curve) + 1), curve, style, label=f"{arm}, {epochs} epochs, lr {rates[arm]:g}")
    left.set_xscale("log")
    left.set_xlabel("learning rate")
    left.set_ylabel("test accuracy")
    left.set_title("Patches of photographs, 6 epochs", fontsize="medium")
    right.set_xlabel("epoch")
    right.set_title("Standardized digits, both tuned", fontsize="medium")
    for axes in (left, right):
        axes.legend()
    return drawing
