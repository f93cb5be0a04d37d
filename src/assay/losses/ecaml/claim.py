"""ECAML's claim on digits: with energy confusion a metric trained on five classes retrieves the other five better."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.bench.datasets import digits
from assay.bench.evidence import Bench, Check, Evidence, Rows, at_least, at_most
from assay.bench.statistics import mean_interval
from assay.data import PairBatchSampler
from assay.losses import ECAML, binomial_deviance, energy_confusion, n_pair_loss, triplet_margin_loss
from assay.metrics import nmi, recall_at_k, same_label_pairs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEEN, PER_CLASS, DIMENSIONS, DROPPED = 5, 12, 8, 0.2
BASES: dict[str, Callable[..., Tensor]] = {
    "binomial": binomial_deviance,
    "N-pair": n_pair_loss,
    "triplet": triplet_margin_loss,
}
# Chosen on the class splits of seeds 0 to 7, by R@1 on their unseen classes: the rate for each base loss alone, among
# 1e-3 and 3e-3, and at this rate the weight of EC, among 0.01, 0.03, 0.1 and 0.3. The outcome is the same for all.
RATE, WEIGHT = 1e-3, 0.01
CONFUSED, INTO = "{} + EC", "{} + EC into the backbone"
VARIANTS = (*BASES, *map(CONFUSED.format, BASES), INTO.format("binomial"))


class IntoBackbone(ECAML):
    """The broken variant: energy confusion of weight 1, whose gradient goes on into the backbone."""

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        embeddings = self.embedding(features)
        return self.base_loss(embeddings, labels) + energy_confusion(embeddings, labels)


def claim(
    bench: Bench,
    *,
    method: Callable[..., nn.Module] = ECAML,
    variants: Sequence[str] = VARIANTS,
    seeds: int = 30,
    steps: int = 400,
) -> Evidence:
    """``method(base_loss, embedding, weight=...)`` is the piece under test."""
    run = functools.partial(train, steps=bench.scale(steps, 20), method=method)
    rows = bench.rows(run, variants, bench.seeds(seeds))
    bases = [base for base in BASES if base in variants]
    notes = [note(rows, variant) for variant in variants]
    return Evidence(rows, checks_of(rows, bases), notes + [f"not gated: {part}" for part in further(rows, bases)])


def checks_of(rows: Rows, bases: Sequence[str]) -> list[Check]:
    def difference(base: str, metric: str) -> np.ndarray:
        return rows.difference(CONFUSED.format(base), base, metric)

    def average(metric: str) -> np.ndarray:
        return np.mean([difference(base, metric) for base in bases], axis=0)

    def ratio(metric: str) -> np.ndarray:
        return np.mean([rows.ratio(CONFUSED.format(base), base, metric) for base in bases], axis=0)

    checks = [
        at_least(f"R@1 on unseen classes, with EC - without (points): {base}", difference(base, "unseen"), -0.2)
        for base in bases
    ]
    checks += [
        at_least("the same, mean of the base losses", average("unseen"), 0.5),
        at_most("R@1, seen - unseen classes, with EC - without (points)", average("gap"), 0.0),
        at_most("distance between / within seen classes, with EC / without", ratio("spread"), 1.0),
        at_least("effective rank on unseen classes, with EC - without", average("rank"), 0.0),
    ]
    broken = INTO.format("binomial")
    if any(row["variant"] == broken for row in rows):
        falls = rows.difference(broken, "binomial", "seen")
        checks.append(at_most("R@1 on seen classes, EC into the backbone - without (points): binomial", falls, -5.0))
    return checks


def note(rows: Rows, variant: str) -> str:
    mean = {metric: float(rows.values(variant, metric).mean()) for metric in ("seen", "unseen", "nmi", "rank")}
    recalls = f"R@1 on seen classes {mean['seen']:.1f} %, on unseen {mean['unseen']:.1f} %"
    return f"{variant}: {recalls}, NMI on unseen {mean['nmi']:.3f}, effective rank {mean['rank']:.2f}"


def further(rows: Rows, bases: Sequence[str]) -> list[str]:
    found = [(base, *mean_interval(rows.difference(CONFUSED.format(base), base, "nmi"))) for base in bases]
    return [
        f"NMI on unseen classes, {base}, with EC - without: {mean:+.3f} [{low:+.3f}, {high:+.3f}]"
        for base, mean, low, high in found
    ]


def train(variant: str, seed: int, *, steps: int, method: Callable[..., nn.Module]) -> dict[str, float]:
    """A variant with the rate and the weight chosen for it."""
    base = next(name for name in BASES if variant.startswith(name))
    makes = {
        base: functools.partial(ECAML, weight=0),
        CONFUSED.format(base): functools.partial(method, weight=WEIGHT),
        INTO.format(base): IntoBackbone,
    }
    return fit(base, seed, steps=steps, rate=RATE, method=makes[variant])


def fit(base: str, seed: int, *, steps: int, rate: float, method: Callable[..., nn.Module]) -> dict[str, float]:
    """An MLP 64-128-64 and an embedding of 8 numbers, trained on five classes; measured on these and on the others."""
    inputs, labels, seen = split(seed)
    draw = torch.Generator().manual_seed(seed)
    kept = torch.rand(inputs.shape, generator=draw) > DROPPED
    torch.manual_seed(seed)
    backbone = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())
    embedding = nn.Linear(64, DIMENSIONS)
    criterion = method(BASES[base], embedding)
    optimizer = torch.optim.Adam([*backbone.parameters(), *embedding.parameters()], rate)
    x, y = inputs[seen], labels[seen]
    for index in itertools.islice(batches(y, seed), steps):
        noisy = x[index] * (torch.rand(len(index), 64, generator=draw) > DROPPED)
        optimizer.zero_grad()
        criterion(backbone(noisy), y[index]).backward()
        optimizer.step()
    with torch.no_grad():
        return measures(embedding(backbone(inputs * kept)), labels, seen)


def batches(labels: Tensor, seed: int) -> Iterator[list[int]]:
    """Without end, 12 examples of each of the five classes."""
    sampler = PairBatchSampler(labels, SEEN, PER_CLASS, seed)
    for epoch in itertools.count():
        sampler.set_epoch(epoch)
        yield from sampler


def measures(embeddings: Tensor, labels: Tensor, seen: Tensor) -> dict[str, float]:
    recalls = [100 * recall_at_k(*same_label_pairs(embeddings[part], labels[part])) for part in (seen, ~seen)]
    return {
        "seen": recalls[0],
        "unseen": recalls[1],
        "gap": recalls[0] - recalls[1],
        "nmi": nmi(F.normalize(embeddings[~seen], dim=1), labels[~seen]),
        "spread": spread(embeddings[seen], labels[seen]),
        "rank": effective_rank(embeddings[~seen]),
        "length": embeddings.norm(dim=1).mean().item(),
    }


def spread(embeddings: Tensor, labels: Tensor) -> float:
    """Mean squared distance between embeddings of two classes over that within a class."""
    distances = torch.cdist(embeddings, embeddings).square()
    same = labels[:, None] == labels
    return (distances[~same].mean() / distances[same & ~torch.eye(len(same), dtype=torch.bool)].mean()).item()


def effective_rank(embeddings: Tensor) -> float:
    """exp of the entropy of the singular values, of the centred embeddings, as shares."""
    values = torch.linalg.svdvals(embeddings - embeddings.mean(0))
    shares = values / values.sum()
    return torch.special.entr(shares).sum().exp().item()


def split(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """All digits, and which are of the five classes to train on; each pair of seeds has both halves of one split."""
    inputs, labels = digits()
    half = torch.randperm(10, generator=torch.Generator().manual_seed(seed // 2)).view(2, SEEN)[seed % 2]
    return inputs, labels, torch.isin(labels, half)


def figure(evidence: Evidence) -> Figure:
    """What energy confusion changes, for each base loss: a dot per seed, and the mean with its 95 % interval."""
    from matplotlib import pyplot

    rows = evidence.rows
    bases = [base for base in BASES if any(row["variant"] == base for row in rows)]
    labels = {
        "unseen": "R@1, unseen classes\n(points)",
        "seen": "R@1, seen classes\n(points)",
        "nmi": "NMI, unseen classes",
        "rank": "effective rank,\nunseen classes",
    }
    drawn, panels = pyplot.subplots(1, 4, figsize=(9, 2.8), sharey=True, layout="constrained")
    for axes, (metric, label) in zip(panels, labels.items(), strict=True):
        axes.axvline(0, color="0.6", linewidth=1)
        for place, base in enumerate(bases):
            values = rows.difference(CONFUSED.format(base), base, metric)
            mean, low, high = mean_interval(values)
            axes.plot(values, [place] * len(values), "o", color="0.75", markersize=3)
            axes.errorbar(mean, place, xerr=[[mean - low], [high - mean]], fmt="s", color="black", capsize=4)
        axes.set_xlabel(label)
        axes.locator_params(axis="x", nbins=4)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(bases)), bases)
    panels[0].set_ylim(len(bases) - 0.6, -0.4)
    drawn.suptitle("with energy confusion minus without", fontsize="medium")
    return drawn
