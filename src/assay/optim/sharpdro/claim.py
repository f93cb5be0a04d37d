"""SharpDRO's claim on digits that few photons reached: better than risk, and than Group DRO, on the rare dark ones."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.bench.datasets import split_digits
from assay.bench.evidence import Bench, Evidence, Rows, at_least, at_most
from assay.bench.statistics import mean_interval
from assay.data import photon_limited, poisson_severities
from assay.losses import GroupDRO
from assay.optim import SAM, SharpDRO

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WORST, RATE, DRAWS, BATCH = 3, 0.6, 5, 64
ERM, DOUBLE, GROUP, FLAT = "ERM", "ERM, twice the lr", "GroupDRO", "SAM"
AWARE, AGNOSTIC, FROZEN = "SharpDRO", "SharpDRO, agnostic", "SharpDRO, q uniform"
VARIANTS = (ERM, DOUBLE, GROUP, AWARE, FLAT, FROZEN, AGNOSTIC)


@dataclass(frozen=True)
class Setting:
    lr: float
    rho: float = 0.0
    step_size: float = 0.0


SETTINGS = {
    ERM: Setting(0.05),
    DOUBLE: Setting(0.1),
    GROUP: Setting(0.05, step_size=0.05),
    FLAT: Setting(0.05, 0.2),
    AWARE: Setting(0.05, 0.2, 0.05),
    FROZEN: Setting(0.05, 0.2, 0.0),
    AGNOSTIC: Setting(0.05, 0.2),
}


def train(
    variant: str, seed: int, *, method: Callable[..., Any] = SharpDRO, epochs: int = 40, setting: Setting | None = None
) -> dict[str, Any]:
    """An MLP 64-128-128-10 on half of the digits, one draw of noise each; tested on the others at every severity."""
    setting = setting or SETTINGS[variant]
    x, y, groups, tests = photon_limited_digits(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer, criterion = make(variant, model, setting, method)
    order, batches = torch.Generator().manual_seed(seed), len(y) // BATCH
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    for _ in range(epochs):
        for index in torch.randperm(len(y), generator=order)[: batches * BATCH].split(BATCH):
            update(model, optimizer, criterion, x[index], y[index], groups[index])
            schedule.step()
    accuracy = [100 * (model(noisy).argmax(1) == y_test).double().mean().item() for noisy, y_test in tests]
    worst = groups == WORST
    measured = {f"severity {s}": value for s, value in enumerate(accuracy)}
    measured["sharpness"] = sharpness(model, x[worst], y[worst], seed)
    q = optimizer.q if isinstance(optimizer, SharpDRO) else criterion.q if criterion else None
    return measured | ({"q": q.tolist()} if q is not None else {})


def make(
    variant: str, model: nn.Module, setting: Setting, method: Callable[..., Any]
) -> tuple[torch.optim.Optimizer, GroupDRO | None]:
    sgd: dict[str, Any] = {"lr": setting.lr, "momentum": 0.9, "weight_decay": 5e-4}
    if variant in (AWARE, FROZEN, AGNOSTIC):
        groups = {"mode": "agnostic"} if variant == AGNOSTIC else {"n_groups": WORST + 1}
        return method(model, torch.optim.SGD, setting.rho, step_size=setting.step_size, **groups, **sgd), None
    if variant == FLAT:
        return SAM(model, torch.optim.SGD, setting.rho, **sgd), None
    criterion = GroupDRO(WORST + 1, setting.step_size) if variant == GROUP else None
    return torch.optim.SGD(model.parameters(), **sgd), criterion


def update(model: nn.Module, optimizer: Any, criterion: GroupDRO | None, x: Tensor, y: Tensor, groups: Tensor) -> None:
    def losses() -> tuple[Tensor, Tensor]:
        logits = model(x)
        return F.cross_entropy(logits, y, reduction="none"), logits

    def by_group() -> tuple[Tensor, Tensor]:
        loss, logits = losses()
        return loss, logits if optimizer.mode == "agnostic" else groups

    def whole() -> Tensor:
        optimizer.zero_grad()
        loss, _ = losses()
        total = criterion(loss, groups) if criterion else loss.mean()
        total.backward()
        return total

    optimizer.step(by_group if isinstance(optimizer, SharpDRO) else whole)


def sharpness(model: nn.Module, x: Tensor, y: Tensor, seed: int, radius: float = 0.2, directions: int = 20) -> float:
    """How far a step of this length raises the loss at most: along its gradient, or in one of some random directions."""
    params = list(model.parameters())
    loss = F.cross_entropy(model(x), y)
    grads = torch.autograd.grad(loss, params)
    draw = torch.Generator().manual_seed(seed)
    tried = [grads, *([torch.randn(p.shape, generator=draw) for p in params] for _ in range(directions))]
    rises = []
    with torch.no_grad():
        before = [p.clone() for p in params]
        for direction in tried:
            norm = math.sqrt(sum(d.square().sum().item() for d in direction))
            for p, d in zip(params, direction, strict=True):
                p.add_(d, alpha=radius / max(norm, 1e-30))
            rises.append((F.cross_entropy(model(x), y) - loss).item())
            for p, w in zip(params, before, strict=True):
                p.copy_(w)
    return max(rises)


@functools.lru_cache(maxsize=2)
def photon_limited_digits(seed: int) -> tuple[Tensor, Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """Half of the digits, one draw of noise each, with labels and severities; the others at every severity."""
    (x, y), (x_test, y_test) = split_digits(seed, train=898)
    draw = torch.Generator().manual_seed(seed)
    severity = poisson_severities(len(x), RATE, WORST, draw)
    tests = [(x_test, y_test)]
    for s in range(1, WORST + 1):
        several = x_test.repeat(DRAWS, 1)
        tests.append((photon_limited(several, s, draw), y_test.repeat(DRAWS)))
    return photon_limited(x, severity, draw), y, severity, tests
