"""A small network for digits that expands while it trains, beside networks of its first and of its last structure."""

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
from assay.nn.self_expanding_cnn.self_expanding_cnn import Expander, SelfExpandingCNN

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRAIN, EPOCHS, BATCH, SCORED = 1000, 45, 64, 512
CHANNELS, COOLDOWN = (2, 2), 5
START, EXPANDED, SCRATCH, RANDOM = "start", "expanded", "from scratch", "expanded at random"
BEST = {START: 1e-2, EXPANDED: 3e-3, SCRATCH: 3e-3, RANDOM: 3e-3}
THRESHOLD, OTHERS = 1.0, (1.1, 2.0)


def claim(
    bench: Bench, *, method: Callable[..., Expander] = Expander, seeds: int = 6, reported: bool = True
) -> Evidence:
    """Accuracy of each arm at its best learning rate, and what an expansion does to the training loss.

    The rates are from 0.001, 0.003, 0.01, by accuracy on seeds 0 and 1. The threshold is the largest of 2, 1.1 and 1
    at which the network expands on each of seeds 0 to 3; what the others do on fresh seeds is reported.
    """
    run = functools.partial(measure, method=method, bench=bench)
    rows = bench.rows(run, BEST, bench.seeds(seeds))
    rows += bench.rows(run, [f"threshold {t}" for t in OTHERS] if reported else [], bench.seeds(3))
    checks = [
        at_least("fewest expansions of a seed", rows.values(EXPANDED, "expansions").min(), 1),
        at_most("largest relative change of the training loss at once", rows.values(EXPANDED, "jump").max(), 0.05),
        at_least("accuracy, expanded - start, points", 100 * rows.difference(EXPANDED, START, "accuracy"), 2.0),
        at_least(
            "accuracy, expanded - from scratch, points", 100 * rows.difference(EXPANDED, SCRATCH, "accuracy"), -1.5
        ),
        at_most("accuracy, at random - expanded, points", 100 * rows.difference(RANDOM, EXPANDED, "accuracy"), 1.0),
    ]
    return Evidence(rows, checks, [note(rows, variant) for variant in dict.fromkeys(row["variant"] for row in rows)])


def note(rows: Rows, variant: str) -> str:
    accuracy, parameters, expansions = (rows.values(variant, name) for name in ("accuracy", "parameters", "expansions"))
    layers, ratio = rows.values(variant, "layers").sum(), rows.values(variant, "ratio").max()
    grown = f"{expansions.mean():.1f} expansions, {layers:.0f} of {expansions.sum():.0f} by a layer" if ratio else ""
    found = f", largest score {ratio:.2f} times the network's" if ratio else ""
    return f"{variant}: accuracy {accuracy.mean():.1%}, {parameters.mean():.0f} parameters; {grown}{found}".strip("; ")


def measure(variant: str, seed: int, *, method: Callable[..., Expander], bench: Bench) -> dict[str, Any]:
    """1,000 digits, the other 797 to test on; two blocks of two channels; Adam, 45 epochs, batches of 64."""
    return _train(variant, seed, method, bench)[0]


@functools.lru_cache(maxsize=4)  # two arms need what the expanded network came to
def _train(
    variant: str, seed: int, method: Callable[..., Expander], bench: Bench
) -> tuple[dict[str, Any], SelfExpandingCNN]:
    (x, y), (test_x, test_y) = ((p.view(-1, 1, 8, 8), labels) for p, labels in split_digits(seed, TRAIN))
    # Before the seed is set, so that it makes no difference whether that run is still in the cache.
    grown = _train(EXPANDED, seed, method, bench)[1] if variant in (SCRATCH, RANDOM) else None
    torch.manual_seed(seed)
    model, expander = SelfExpandingCNN(1, 10, CHANNELS, image_size=8), None
    threshold = float(variant.rpartition(" ")[2]) if variant.startswith("threshold") else THRESHOLD
    if variant == EXPANDED or variant.startswith("threshold"):
        expander = method(model, threshold=threshold, cooldown=COOLDOWN)
    elif grown is not None and variant == SCRATCH:
        model = afresh(grown)
    elif grown is not None:
        final = grown.num_parameters()
        expander = Expander(model, threshold=1e-9, cooldown=COOLDOWN, max_params=final, score=Chance(seed))
    optimizer = torch.optim.Adam(model.parameters(), BEST.get(variant, BEST[EXPANDED]), fused=True)
    order, scored = torch.Generator().manual_seed(seed), [(x[:SCORED], y[:SCORED])]
    jumps, curve = [0.0], []
    for _ in range(bench.scale(EPOCHS, least=10)):
        model.train()
        for chosen in torch.randperm(TRAIN, generator=order).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
        before = loss(model, x, y)
        if expander is not None and expander.maybe_expand(scored, F.cross_entropy, optimizer):
            jumps.append(abs(loss(model, x, y) / before - 1))
        curve.append([model.num_parameters(), accuracy(model, test_x, test_y)])
    history = [] if expander is None else expander.history
    ratios = [max(event.scores.values()) / event.scores["none", -1] for event in history]
    found = {
        "accuracy": curve[-1][1],
        "parameters": curve[-1][0],
        "expansions": len(history),
        "layers": sum(event.kind == "layer" for event in history),
        "jump": max(jumps),
        "ratio": max(ratios, default=0.0),
        "curve": curve,
    }
    return found, model


class Chance:
    """A score that knows nothing."""

    def __init__(self, seed: int) -> None:
        self.draw = torch.Generator().manual_seed(seed)

    def __call__(self, *_: Any, **__: Any) -> float:
        return 1 + torch.rand((), generator=self.draw).item()


def afresh(model: SelfExpandingCNN) -> SelfExpandingCNN:
    """A network of the same structure with first weights as torch draws them."""
    fresh = SelfExpandingCNN.from_state_dict(model.state_dict()).train()
    for module in fresh.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d)):
            module.reset_parameters()
    return fresh


@torch.no_grad()
def loss(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return F.cross_entropy(model.eval()(x), y).item()


def figure(evidence: Evidence) -> Figure:
    """Test accuracy over the epochs for each arm, and the parameters of the expanding one, means over seeds."""
    import numpy as np
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(8, 3.5), layout="constrained")
    left, right = drawing.subplots(1, 2)
    for arm in BEST:
        curves = np.array([row["curve"] for row in evidence.rows if row["variant"] == arm])
        epochs = np.arange(1, curves.shape[1] + 1)
        left.plot(epochs, 100 * curves[..., 1].mean(0), label=arm)
        right.plot(epochs, curves[..., 0].mean(0), label=arm)
    left.set_ylabel("test accuracy, %")
    right.set_ylabel("parameters")
    for axes in (left, right):
        axes.set_xlabel("epoch")
    left.legend(fontsize="small")
    drawing.suptitle("A network for digits that expands itself", fontsize="medium")
    return drawing
