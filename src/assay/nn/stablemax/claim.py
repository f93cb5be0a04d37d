"""Softmax and StableMax on logits that have grown, from weights of zero, and (by request) as the loss to grok with."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.bench.datasets import Examples, digits, modular_addition
from assay.bench.evidence import Bench, Evidence, Rows, at_least, at_most
from assay.bench.models import accuracy
from assay.nn.stablemax.stablemax import stablemax_cross_entropy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODULUS, WIDTH, LR = 59, 200, 0.01
GROWTH = (1, 2, 3, 5, 10, 30, 100)
SOFTMAX, STABLE = "softmax", "StableMax"
GROWN, ZERO, LONG = "grown logits", "weights of zero", "long run"
Loss = Callable[..., Tensor]


def claim(
    bench: Bench, *, method: Loss = stablemax_cross_entropy, parts: Collection[str] = (GROWN, ZERO), seeds: int = 5
) -> Evidence:
    """What is left to learn from a trained network's logits times 1 to 100, and what weights of zero learn.

    Both losses are computed in float32. There is nothing to tune: the logits are the same for both. The part ``LONG``,
    20,000 epochs of training with each loss as it is offered, takes an hour or more on one core.
    """
    run = functools.partial(measure, method=method, parts=parts, bench=bench)
    rows = bench.rows(run, [SOFTMAX, STABLE], bench.seeds(seeds))
    checks = []
    if GROWN in parts:
        checks += [
            at_least(
                "share of examples with loss 0 at 10 times the logits, softmax", rows.values(SOFTMAX, "0 x10"), 0.9
            ),
            at_most("share with loss or gradient 0 at 1 to 100 times, StableMax", rows.values(STABLE, "stopped"), 0.0),
        ]
    if ZERO in parts:
        checks.append(at_least("accuracy after weights of zero, StableMax", rows.values(STABLE, "from zero"), 0.99))
    if LONG in parts:
        checks += [
            at_least("accuracy on unseen pairs, StableMax", rows.values(STABLE, "unseen"), 0.9),
            at_most("accuracy on unseen pairs, softmax", rows.values(SOFTMAX, "unseen"), 0.2),
        ]
    return Evidence(rows, checks, notes(rows) if GROWN in parts else [])


def notes(rows: Rows) -> list[str]:
    fitted, first = (rows.values(SOFTMAX, metric).mean() for metric in ("fitted", "0 x1"))
    least = rows.values(STABLE, "smallest gradient").min()
    return [
        f"the network has {fitted:.1%} of its training pairs right; with softmax {first:.1%} of them have loss 0",
        f"smallest gradient of a right class with StableMax, at 100 times the logits: {least:.1e}",
    ]


def measure(variant: str, seed: int, *, method: Loss, parts: Collection[str], bench: Bench) -> dict[str, Any]:
    loss = softmax_loss if variant == SOFTMAX else method
    found: dict[str, Any] = {}
    if GROWN in parts:
        found |= on_grown_logits(loss, *trained(seed, bench.scale(200)))
    if ZERO in parts:
        found["from zero"] = from_zero(loss, seed)
    if LONG in parts:
        model, _, unseen = train(loss, seed, bench.scale(20_000))
        found["unseen"] = accuracy(model, *unseen)
    return found


def softmax_loss(input: Tensor, target: Tensor, *, reduction: str = "mean", dtype: None = None) -> Tensor:
    return F.cross_entropy(input, target, reduction=reduction)


def on_grown_logits(loss: Loss, logits: Tensor, y: Tensor) -> dict[str, float]:
    """Shares of the examples whose loss, or whose gradient at the right class, is exactly 0."""
    found = {"fitted": (logits.argmax(1) == y).double().mean().item()}
    stopped = []
    for factor in GROWTH:
        grown = (factor * logits).requires_grad_()
        losses = loss(grown, y, reduction="none", dtype=None)
        right = torch.autograd.grad(losses.sum(), grown)[0].gather(1, y[:, None])[:, 0]
        found[f"0 x{factor}"] = (losses == 0).double().mean().item()
        stopped.append(((losses == 0) | (right == 0)).double().mean().item())
        found["smallest gradient"] = right.abs().min().item()
    return found | {"stopped": max(stopped)}


def from_zero(loss: Loss, seed: int) -> float:
    """200 steps of SGD on the digits 0 and 1, all weights 0 at first; accuracy on these digits."""
    pixels, labels = digits()
    x, y = pixels[labels < 2], labels[labels < 2]
    w = torch.zeros(2, 64, requires_grad=True)
    optimizer, order = torch.optim.SGD([w], lr=0.1), torch.Generator().manual_seed(seed)
    for _ in range(200):
        chosen = torch.randperm(len(y), generator=order)[:64]
        optimizer.zero_grad()
        loss(x[chosen] @ w.T, y[chosen], dtype=None).backward()
        optimizer.step()
    # Where nothing has moved all logits are equal, and argmax would call every digit a 0.
    return ((x @ w.T).diff(dim=1)[:, 0].sign() == 2 * y - 1).double().mean().item()


@functools.lru_cache(16)
def trained(seed: int, epochs: int) -> tuple[Tensor, Tensor]:
    """The logits of a network that has learned its training pairs with softmax, and their classes."""
    model, (x, y), _ = train(softmax_loss, seed, epochs)
    return model(x).detach(), y


def train(loss: Loss, seed: int, epochs: int) -> tuple[nn.Module, Examples, Examples]:
    """An MLP 118-200-200-59 without biases or weight decay, by AdamW on all pairs of one half at each step."""
    (x, y), unseen = modular_addition(seed, MODULUS)
    torch.manual_seed(seed)
    layers = [nn.Linear(a, b, bias=False) for a, b in itertools.pairwise((2 * MODULUS, WIDTH, WIDTH, MODULUS))]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.99), eps=1e-25, weight_decay=0.0)
    for _ in range(epochs):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
    return model, (x, y), unseen


def figure(evidence: Evidence) -> Figure:
    """Share of the examples with nothing left to learn, over the growth of the logits."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(6, 3.5), layout="constrained")
    axes = drawing.subplots()
    for variant, style in ((SOFTMAX, "o--"), (STABLE, "D-")):
        shares = 100 * np.stack([evidence.rows.values(variant, f"0 x{factor}") for factor in GROWTH])
        axes.plot(GROWTH, shares.mean(1), style, label=variant)
        axes.fill_between(GROWTH, shares.min(1), shares.max(1), alpha=0.15, linewidth=0)
    axes.set_xscale("log")
    axes.set_xticks(GROWTH, [str(factor) for factor in GROWTH])
    axes.minorticks_off()
    axes.set_xlabel("factor on the logits of a trained network")
    axes.set_ylabel("examples with loss exactly 0, %")
    axes.set_title("Addition modulo 59 in float32, mean and range over seeds", fontsize="medium")
    axes.legend()
    return drawing
