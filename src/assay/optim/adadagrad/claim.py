"""AdAdaGrad's claim on handwritten digits: nearly the accuracy of small batches in far fewer steps."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from assay.bench import Bench, Evidence, at_least, at_most
from assay.bench.datasets import split_digits
from assay.optim import AdaptiveBatchSampler, AdaptiveBatchSize, per_sample_grads

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXAMPLES, SMALL, ETA, RATE = 1300, 8, 1.0, 0.05


def claim(
    bench: Bench, *, controller: Any = AdaptiveBatchSize, parts: tuple[str, ...] = ("steps", "accuracy", "growth")
) -> Evidence:
    """AdaGrad on equally many examples, in batches of fixed sizes and in batches from ``controller``."""
    needed = {"steps": ["small"], "accuracy": ["small", "middle", "matched", "full"]}
    variants = ["adaptive", *dict.fromkeys(variant for part in parts for variant in needed.get(part, []))]
    run = functools.partial(train, epochs=bench.scale(40), controller=controller)
    rows = bench.rows(run, variants, bench.seeds(20))
    checks = []
    if "steps" in parts:
        checks += [at_most("steps, adaptive / batches of 8", rows.ratio("adaptive", "small", "steps"), 0.10)]
    if "accuracy" in parts:
        points = functools.partial(rows.difference, "adaptive", metric="accuracy")
        checks += [
            at_least("test accuracy, adaptive - full batch (points)", points("full"), 0.3),
            at_least("test accuracy, adaptive - constant at the mean size (points)", points("matched"), -0.5),
        ]
    if "growth" in parts:
        checks += [
            at_least("share of runs whose batches never shrank", rows.values("adaptive", "monotone"), 1.0),
            at_least("last batch size / first", rows.values("adaptive", "last_size") / SMALL, 8.0),
        ]
    notes = [
        f"{variant}: accuracy {rows.values(variant, 'accuracy').mean():.1f} %, training loss "
        f"{rows.values(variant, 'loss').mean():.3f}, {rows.values(variant, 'steps').mean():.0f} steps of "
        f"{rows.values(variant, 'mean_size').mean():.0f} examples on average"
        for variant in variants
    ]
    return Evidence(rows, checks, notes)


def train(variant: str, seed: int, *, epochs: int, controller: Any) -> dict[str, Any]:
    """An MLP 64-32-10 trained on ``epochs`` times 1300 digits, tested on the other 497."""
    (x, y), (x_test, y_test) = split_digits(seed, EXAMPLES)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    if variant == "adaptive":
        batch_size = controller(SMALL, max_batch_size=EXAMPLES, eta=ETA)
    else:
        fixed = {"small": SMALL, "middle": 128, "full": EXAMPLES}
        size = fixed.get(variant) or _mean_size(seed, epochs, controller)
        batch_size = AdaptiveBatchSize(size, max_batch_size=size)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=RATE)
    sampler = AdaptiveBatchSampler(x, batch_size, generator=torch.Generator().manual_seed(seed))
    sizes: list[int] = []  # the size that every batch was meant to have
    curve: list[int] = []  # the size at the end of every epoch
    for _ in range(epochs):
        for index in sampler:
            step, inputs, targets = len(sizes), x[index], y[index]
            sizes.append(batch_size.size)
            if batch_size.due(step):
                batch_size.update(per_sample_grads(model, F.cross_entropy, inputs, targets))
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
        curve.append(batch_size.size)
    with torch.no_grad():
        accuracy = (model(x_test).argmax(1) == y_test).float().mean().item()
        loss = F.cross_entropy(model(x), y).item()
    return {
        "accuracy": 100 * accuracy,
        "loss": loss,
        "steps": len(sizes),
        "mean_size": epochs * EXAMPLES / len(sizes),
        "last_size": batch_size.size,
        "monotone": float(sizes == sorted(sizes)),
        "sizes": curve,
    }


@functools.cache
def _mean_size(seed: int, epochs: int, controller: Any) -> int:
    return round(train("adaptive", seed, epochs=epochs, controller=controller)["mean_size"])


def figure(evidence: Evidence) -> Figure:
    """Left: the adaptive batch size over the epochs, one line a seed. Right: what steps buy, mean and spread."""
    import matplotlib.pyplot as plt

    rows = evidence.rows
    drawn, (left, right) = plt.subplots(1, 2, figsize=(7.5, 3.5), layout="constrained")
    for row in rows:
        if row["variant"] == "adaptive":
            left.plot(range(1, len(row["sizes"]) + 1), row["sizes"], color="black", alpha=0.3, linewidth=1)
    left.set(xlabel="epoch", ylabel="batch size", yscale="log", title="adaptive batches, one line per seed")
    labels = {"small": "8", "middle": "128", "matched": "adaptive's mean", "full": f"all {EXAMPLES}"}
    for variant, marker in zip(("adaptive", "small", "middle", "matched", "full"), "*osD^", strict=True):
        if not any(row["variant"] == variant for row in rows):
            continue
        steps, accuracy = rows.values(variant, "steps"), rows.values(variant, "accuracy")
        style = {"color": "black", "markersize": 10} if variant == "adaptive" else {"color": "0.5", "markersize": 6}
        label = labels.get(variant, variant)
        right.errorbar(steps.mean(), accuracy.mean(), accuracy.std(ddof=1), fmt=marker, capsize=3, label=label, **style)
    right.set(xlabel="steps", ylabel="test accuracy (%), ± 1 s.d.", xscale="log", title="equally many examples")
    right.legend(title="batch size", fontsize=8)
    return drawn
