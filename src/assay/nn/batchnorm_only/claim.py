"""Small residual networks on digits: batch normalization alone, as many weights at random, the output layer alone."""

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
from assay.nn.batchnorm_only.batchnorm_only import batchnorm_only, disabled_features
from assay.nn.batchnorm_only.random_subset import random_per_channel
from assay.nn.batchnorm_only.report import freeze

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NORMS, RANDOM, OUTPUT = "normalization alone", "random weights", "output layer alone"
DEPTHS = (2, 5)  # blocks in each of three stages: ResNet-14 and ResNet-32
RATES = {NORMS: 1.0, RANDOM: 3.0, OUTPUT: 3.0}  # of 0.1, 0.3, 1, 3, 10; tuned on seeds 0 and 1, lesser depth
EPOCHS = 25


def claim(
    bench: Bench,
    *,
    method: Callable[[nn.Module], Any] = batchnorm_only,
    arms: tuple[str, ...] = (NORMS, RANDOM, OUTPUT),
    depths: tuple[int, ...] = DEPTHS,
    epochs: int = EPOCHS,
    seeds: int = 4,
) -> Evidence:
    """Test accuracies with all weights frozen at their random first values but those of the arm."""
    run = functools.partial(measure, method=method, epochs=bench.scale(epochs))
    variants = [f"{arm}, {depth} blocks" for depth in depths for arm in arms]
    rows = bench.rows(run, variants, bench.seeds(seeds))
    checks = []
    for depth in depths if RANDOM in arms else ():
        gain = rows.difference(f"{NORMS}, {depth} blocks", f"{RANDOM}, {depth} blocks", "accuracy")
        checks.append(at_least(f"{depth} blocks: accuracy over that of random weights", gain, 0.2))
    first, last = (rows.values(f"{NORMS}, {depth} blocks", "accuracy") for depth in (depths[0], depths[-1]))
    checks.append(at_least(f"{depths[0]} blocks: accuracy", first, 0.8))
    if len(depths) > 1:
        checks.append(at_least("accuracy of the deeper over the shallower network", last - first, 0.0))
    lost = [rows.values(f"{NORMS}, {depth} blocks", "lost by pruning").max() for depth in depths]
    checks.append(at_most("most accuracy lost by setting weights below 0.01 to 0", max(lost), 0.005))
    return Evidence(rows, checks, notes(rows, depths))


def notes(rows: Rows, depths: tuple[int, ...]) -> list[str]:
    found = []
    for depth in depths:
        share, trained = (rows.values(f"{NORMS}, {depth} blocks", name).mean() for name in ("disabled", "trained"))
        total = rows.values(f"{NORMS}, {depth} blocks", "parameters").mean()
        found.append(
            f"{depth} blocks: {trained:.0f} of {total:.0f} trained; {share:.1%} of the weights below 0.01 in size"
        )
    return found


def measure(variant: str, seed: int, *, method: Callable[[nn.Module], Any], epochs: int) -> dict[str, Any]:
    arm, _, depth = variant.partition(", ")
    return train(arm, int(depth.split()[0]), seed, RATES[arm], epochs, method)


def train(
    arm: str, depth: int, seed: int, rate: float, epochs: int, method: Callable[[nn.Module], Any] = batchnorm_only
) -> dict[str, Any]:
    (x, y), test = split_digits(seed, 1300)
    x, test = x.view(-1, 1, 8, 8), (test[0].view(-1, 1, 8, 8), test[1])
    torch.manual_seed(seed)
    model = ResNet(depth)
    total = sum(p.numel() for p in model.parameters())
    batchnorm_only(model)  # the same first values for all arms
    if arm == NORMS:
        method(model)
    elif arm == RANDOM:
        random_per_channel(model)
    else:
        freeze(model, {id(p) for p in model.output.parameters()})
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=rate, momentum=0.9, weight_decay=1e-4)
    drops = [epochs // 2, 3 * epochs // 4]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, drops, 0.1)
    for _ in range(epochs):
        for chosen in torch.randperm(len(y)).split(128):
            optimizer.zero_grad()
            F.cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
        schedule.step()
    found = {"accuracy": accuracy(model, *test), "trained": sum(p.numel() for p in trained), "parameters": total}
    if arm == NORMS:
        disabled = disabled_features(model)
        disabled.prune_()
        found |= {"disabled": disabled.share, "lost by pruning": found["accuracy"] - accuracy(model, *test)}
    return found


class ResNet(nn.Module):
    """Three stages of ``depth`` blocks of two 3x3 convolutions, of 8, 16 and 32 channels, for digits."""

    def __init__(self, depth: int, width: int = 8) -> None:
        super().__init__()
        widths = [width * 2**stage for stage in range(3) for _ in range(depth)]
        blocks = [Block(a, b, 1 if a == b else 2) for a, b in zip([width, *widths[:-1]], widths, strict=True)]
        self.body = nn.Sequential(*convolution(1, width, 3, 1), nn.ReLU(), *blocks)
        self.output = nn.Linear(widths[-1], 10)
        nn.init.kaiming_normal_(self.output.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.body(x).mean((2, 3)))


class Block(nn.Module):
    def __init__(self, fan_in: int, fan_out: int, stride: int) -> None:
        super().__init__()
        first, second = convolution(fan_in, fan_out, 3, stride), convolution(fan_out, fan_out, 3, 1)
        self.body = nn.Sequential(*first, nn.ReLU(), *second)
        self.shortcut = nn.Sequential(*([] if stride == 1 else convolution(fan_in, fan_out, 1, stride)))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def convolution(fan_in: int, fan_out: int, kernel: int, stride: int) -> list[nn.Module]:
    conv = nn.Conv2d(fan_in, fan_out, kernel, stride, kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight)
    return [conv, nn.BatchNorm2d(fan_out)]


def figure(evidence: Evidence) -> Figure:
    """Accuracy of each arm, over seeds."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(6, 3.5), layout="constrained")
    axes = drawing.subplots()
    depths = sorted({int(row["variant"].split(", ")[1].split()[0]) for row in evidence.rows})
    for place, arm in enumerate((NORMS, RANDOM, OUTPUT)):
        values = [100 * evidence.rows.values(f"{arm}, {depth} blocks", "accuracy") for depth in depths]
        spread = [[v.mean() - v.min() for v in values], [v.max() - v.mean() for v in values]]
        at = [i + 0.12 * (place - 1) for i in range(len(depths))]
        axes.errorbar(at, [v.mean() for v in values], spread, fmt="Dos"[place], capsize=3, label=arm)
    axes.set_xticks(range(len(depths)), [f"{depth} blocks a stage" for depth in depths])
    axes.set_ylabel("test accuracy on digits, %")
    axes.set_title("Everything else at its random first values, mean and range over seeds", fontsize="medium")
    axes.legend()
    return drawing
