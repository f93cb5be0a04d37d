"""Addition modulo 59 without weight decay: AdamW, and AdamW given gradients orthogonal to the weights."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from assay.bench.datasets import modular_addition
from assay.bench.evidence import Bench, Evidence, Rows, at_least, at_most
from assay.bench.models import accuracy
from assay.optim.perpgrad.perpgrad import PerpGrad, nlm_alignment, softmax_collapse_fraction

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODULUS, WIDTH, EVERY = 59, 200, 20
LR = 0.01
PLAIN, PERP = "AdamW", "PerpGrad"
DECAY, UNSCALED, ONE_VECTOR = "AdamW, weight decay 1", "PerpGrad, rescale=False", "PerpGrad on one vector"
REPORTED = (DECAY, UNSCALED, ONE_VECTOR)

Wrap = Callable[[torch.optim.Optimizer], torch.optim.Optimizer]


class OneVector(PerpGrad):
    """The paper's definition to the letter: all parameters are one vector, and have one radial part."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        params = [p for _, p, _ in self.with_gradients()]
        w = torch.cat([p.flatten() for p in params])
        g = torch.cat([p.grad.flatten() for p in params if p.grad is not None])
        perp = g - (w @ g) / (w @ w + self.eps) * w
        perp *= g.norm() / (perp.norm() + self.eps)
        for p, part in zip(params, perp.split([p.numel() for p in params]), strict=True):
            p.grad = part.view_as(p)
        return self.base.step()


def claim(
    bench: Bench, *, method: Wrap = PerpGrad, reported: Sequence[str] = REPORTED, seeds: int = 10, epochs: int = 200
) -> Evidence:
    """Test accuracy of both at one learning rate, constant, each step on all pairs; AdamW gets half as many again.

    The rate is from {0.003, 0.01, 0.03}, on seed 1: PerpGrad then reaches 0.95, 1.00 and 0.77 on test pairs in 200
    epochs, AdamW 0.00 at each of them in 300.
    """
    short, long = (functools.partial(grok, method=method, epochs=n) for n in (epochs, bench.scale(300)))
    rows = bench.rows(short, [PERP], bench.seeds(seeds))
    rows += bench.rows(long, [PLAIN], bench.seeds(seeds))
    for variant in reported:
        rows += bench.rows(long if variant == DECAY else short, [variant], bench.seeds(3))
    checks = [
        at_least("test accuracy, PerpGrad", rows.values(PERP, "test"), 0.95),
        at_most("test accuracy, AdamW", rows.values(PLAIN, "test"), 0.1),
        at_least("largest |cos(w, -g)| of a layer, AdamW", rows.values(PLAIN, "alignment"), 0.5),
    ]
    return Evidence(rows, checks, [note(rows, variant) for variant in (PERP, PLAIN, *reported)])


def note(rows: Rows, variant: str) -> str:
    def spread(metric: str, places: int = 2) -> str:
        values = rows.values(variant, metric)
        return f"{values.mean():.{places}f} ({values.min():.{places}f} to {values.max():.{places}f})"

    accuracies = f"accuracy on training pairs {spread('train', 3)}, on test pairs {spread('test', 3)}"
    collapsed = f"collapsed {100 * rows.values(variant, 'collapsed').mean():.0f} %"
    epochs = int(rows.values(variant, "epochs")[0])
    return f"{variant}, {epochs} epochs: {accuracies}, largest alignment {spread('alignment')}, {collapsed}"


def grok(variant: str, seed: int, *, epochs: int, method: Wrap) -> dict[str, Any]:
    """An MLP 118-200-200-59 without biases on half of the pairs, tested on the others, every 20 epochs."""
    (x, y), (x_test, y_test) = modular_addition(seed, MODULUS)
    torch.manual_seed(seed)
    widths = (2 * MODULUS, WIDTH, WIDTH, MODULUS)
    layers = [nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(widths)]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    decay = 1.0 if variant == DECAY else 0.0
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=decay)
    if variant not in (PLAIN, DECAY):
        wraps = {PERP: method, UNSCALED: functools.partial(PerpGrad, rescale=False), ONE_VECTOR: OneVector}
        optimizer = wraps[variant](optimizer)
    curve = []
    for epoch in range(1, epochs + 1):
        optimizer.zero_grad()
        logits = model(x)
        F.cross_entropy(logits, y).backward()
        aligned = nlm_alignment(model.parameters())
        optimizer.step()
        if epoch % EVERY == 0:
            curve.append(round(accuracy(model, x_test, y_test), 4))
    return {
        "epochs": epochs,
        "train": accuracy(model, x, y),
        "test": accuracy(model, x_test, y_test),
        "alignment": aligned.max().item(),
        "collapsed": softmax_collapse_fraction(logits.detach(), y).item(),
        "curve": curve,
    }


def figure(evidence: Evidence) -> Figure:
    """Test accuracy over the epochs, mean and range over seeds."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(6, 3.5), layout="constrained")
    axes = drawing.subplots()
    variants = dict.fromkeys(row["variant"] for row in evidence.rows)
    for variant, style in zip(variants, ("C0-", "C1-", "C2--", "C3--", "C4:"), strict=False):
        curves = 100 * torch.tensor([row["curve"] for row in evidence.rows if row["variant"] == variant])
        epochs = EVERY * torch.arange(1, curves.shape[1] + 1)
        axes.plot(epochs, curves.mean(0), style, label=variant)
        axes.fill_between(epochs, curves.amin(0), curves.amax(0), color=style[:2], alpha=0.15, linewidth=0)
    axes.set_xlabel("epoch")
    axes.set_ylabel("accuracy on unseen pairs, %")
    axes.set_title("Addition modulo 59, half of the pairs to train on", fontsize="medium")
    axes.legend(fontsize="small", loc="center right")
    return drawing
