"""AdamP and SGDP beside AdamW and SGD: how much weights grow under a normalization, and what accuracy it costs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.bench.datasets import split_digits
from assay.bench.evidence import Bench, Evidence, Rows, at_least, at_most
from assay.optim.adamp.adamp import SGDP, AdamP

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EPOCHS, BATCH_SIZE = 15, 64
PAIRS = {"SGDP": "SGD", "AdamP": "AdamW"}
PARTS = ("digits", "sphere")

Make = Callable[..., torch.optim.Optimizer]


def claim(bench: Bench, *, sgdp: Make = SGDP, adamp: Make = AdamP, parts: Collection[str] = PARTS) -> Evidence:
    """Growth of the normalized weights and test accuracy on digits; growth on the sphere, which is exact."""
    rows, checks = Rows(), []
    if "digits" in parts:
        makers = {
            "SGD": functools.partial(torch.optim.SGD, lr=0.3, momentum=0.9, nesterov=True),
            "SGDP": functools.partial(sgdp, lr=0.3, momentum=0.9, nesterov=True),
            "AdamW": functools.partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.0),
            "AdamP": functools.partial(adamp, lr=1e-2),
        }
        rows = bench.rows(functools.partial(digits, makers, bench.scale(EPOCHS)), makers, bench.seeds(10))
        for method, bound in (("SGDP", 0.75), ("AdamP", 0.8)):
            base = PAIRS[method]
            growth, gain = rows.ratio(method, base, "growth"), rows.difference(method, base, "accuracy")
            checks.append(at_most(f"growth of the weights, {method} / {base}", growth, bound))
            checks.append(at_least(f"test accuracy, {method} - {base}", gain, -0.005))
    if "sphere" in parts:
        plain = sphere(functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9))
        projected = sphere(functools.partial(sgdp, lr=0.1, momentum=0.9))
        checks.append(at_least("growth of the squared norm on the sphere, SGD / SGDP", plain / projected, 2.0))
    return Evidence(rows, checks)


def digits(makers: dict[str, Make], epochs: int, variant: str, seed: int) -> dict[str, Any]:
    """Train an MLP whose hidden layers are normalized; growth of the middle matrix's norm, and test accuracy."""
    train, test = split_digits(1000 + seed)
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Linear(64, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU()),
        *(nn.Linear(64, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU()),
        nn.Linear(64, 10),
    )
    middle: Tensor = model[3].weight
    optimizer = makers[variant](model.parameters())
    steps = epochs * (len(train[0]) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.Generator().manual_seed(seed)
    norms = [middle.norm().item()]
    for _ in range(epochs):
        for chosen in torch.randperm(len(train[0]), generator=order).split(BATCH_SIZE)[: steps // epochs]:
            optimizer.zero_grad()
            F.cross_entropy(model(train[0][chosen]), train[1][chosen]).backward()
            optimizer.step()
            schedule.step()
        norms.append(middle.norm().item())
    with torch.no_grad():
        accuracy = (model.eval()(test[0]).argmax(1) == test[1]).double().mean().item()
    return {"growth": norms[-1] / norms[0], "accuracy": accuracy, "norms": [norm / norms[0] for norm in norms]}


def sphere(make: Make, steps: int = 200) -> float:
    """Growth of |w|^2 on h(w) = <a, w / |w|>, from w orthogonal to a: no data, no chance."""
    w = nn.Parameter(torch.eye(1, 10, dtype=torch.float64))
    a = torch.ones(10, dtype=torch.float64) / math.sqrt(10)
    optimizer = make([w])
    for _ in range(steps):
        optimizer.zero_grad()
        ((w[0] / w[0].norm()) @ a).backward()
        optimizer.step()
    return w.detach().square().sum().item() - 1


def figure(evidence: Evidence) -> Figure:
    """The norm of the middle matrix over the epochs, mean and range over seeds."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(6, 3.5), layout="constrained")
    axes = drawing.subplots()
    for variant, style in zip(("SGD", "SGDP", "AdamW", "AdamP"), ("C0--", "C0-", "C1--", "C1-"), strict=True):
        curves = torch.tensor([row["norms"] for row in evidence.rows if row["variant"] == variant])
        if len(curves):
            epochs = range(curves.shape[1])
            axes.plot(epochs, curves.mean(0), style, label=variant)
            axes.fill_between(epochs, curves.amin(0), curves.amax(0), color=style[:2], alpha=0.15, linewidth=0)
    axes.set_xlabel("epoch")
    axes.set_ylabel("norm of the middle matrix / at the start")
    axes.set_title("Weights before a batch normalization, on digits", fontsize="medium")
    axes.legend(ncols=2, loc="center right", bbox_to_anchor=(1, 0.38))
    return drawing
