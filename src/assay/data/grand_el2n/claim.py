"""Half of the data, chosen by EL2N after three epochs, against all of it, a random half and the easiest half."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from assay.bench import models
from assay.bench.datasets import split_digits
from assay.bench.evidence import Bench, Check, Evidence, Rows, at_least, at_most
from assay.bench.statistics import mean_interval
from assay.data import (
    ForgettingTracker,
    PruningSampler,
    average_scores,
    el2n_scores,
    grand_scores,
    keep_by_score,
    margin_scores,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ARMS = {"all": "all data", "hardest": "hardest half", "random": "random half", "easiest": "easiest half"}
INITIAL = "hardest half by GraNd at initialization"
MARGIN, FORGOTTEN, GRADUAL = "hardest half by margin", "hardest half by forgetting", "gradually to the hardest half"
PARTS = ("prune", "noise", "agree", "others")
TRAIN, KEEP, NOISE, BATCH, RUNS = 1200, 0.5, 0.1, 64, 10
FORGETTING_STEPS = 300  # 16 epochs: in three there is hardly time to forget
# Seeds 100 to 119 were a first run, whose interval for the first check still held the bound (0.63 points, from 0.29 to
# 0.97, against 0.3). It set the number of seeds; the verdict is read on seeds that it did not use.
FIRST_SEED = 200
Score = Callable[[nn.Module, Any], Tensor]


def claim(
    bench: Bench,
    *,
    score: Score = el2n_scores,
    score_steps: int = 60,
    noise_steps: int = 100,
    steps: int = 1500,
    seeds: int = 40,
    parts: Sequence[str] = PARTS,
) -> Evidence:
    """``score`` is the piece under test: read after ``score_steps``, or ``noise_steps`` where labels are wrong."""
    pruned = functools.partial(prune, score=score, score_steps=score_steps, steps=bench.scale(steps))
    runs = {
        "prune": (pruned, [*ARMS, INITIAL]),
        "noise": (functools.partial(noise, score=score, score_steps=noise_steps), ["wrong labels"]),
        "agree": (functools.partial(agree, score=score, score_steps=score_steps), ["agreement"]),
        "others": (pruned, [MARGIN, FORGOTTEN, GRADUAL]),
    }
    checks: dict[str, Callable[[Rows], list[Check]]] = {
        "prune": prune_checks,
        "noise": noise_checks,
        "agree": agree_checks,
        "others": lambda rows: [],
    }
    evidence = Evidence(Rows(), [])
    for part in parts:
        run, variants = runs[part]
        # Accuracies on 597 test images spread more than the other two, and need more seeds.
        count = seeds if part == "prune" else max(2, seeds // 4)
        evidence.rows += bench.rows(run, variants, bench.seeds(count, first=FIRST_SEED))
        evidence.checks += checks[part](evidence.rows)
    if "prune" in parts:
        evidence.notes = notes(evidence.rows, [MARGIN, FORGOTTEN, GRADUAL] if "others" in parts else [])
    return evidence


def prune_checks(rows: Rows) -> list[Check]:
    def gap(variant: str, baseline: str) -> Any:
        return rows.difference(variant, baseline, "accuracy")

    return [
        at_least("accuracy: hardest half - random half", gap("hardest", "random"), 0.003),
        at_least("accuracy: hardest half - all data", gap("hardest", "all"), -0.01),
        at_most("accuracy: easiest half - random half", gap("easiest", "random"), -0.03),
    ]


def noise_checks(rows: Rows) -> list[Check]:
    return [at_least("ROC-AUC for wrong labels", rows.values("wrong labels", "auc"), 0.97)]


def agree_checks(rows: Rows) -> list[Check]:
    return [
        at_least("rank correlation of two groups of 5 runs", rows.values("agreement", "groups"), 0.9),
        at_least("rank correlation of MLP and CNN", rows.values("agreement", "architectures"), 0.6),
    ]


def notes(rows: Rows, others: Sequence[str]) -> list[str]:
    """Accuracy against a random half; the first is not expected to hold."""
    said = []
    for variant in (INITIAL, *others):
        there = {row["seed"] for row in rows if row["variant"] == variant}
        shared = Rows(row for row in rows if row["seed"] in there)
        mean, low, high = mean_interval(shared.difference(variant, "random", "accuracy"))
        said.append(f"not gated: {variant} - random half, accuracy {mean:+.4f} [{low:+.4f}, {high:+.4f}]")
    return said


def prune(variant: str, seed: int, *, score: Score, score_steps: int, steps: int) -> dict[str, float]:
    """Test accuracy after ``steps`` steps on what a variant keeps: equal steps, initial weights and batch size."""
    train, test = digits(seed)
    if variant == "all":
        kept = torch.arange(TRAIN)
    elif variant == "random":
        kept = keep_by_score(torch.zeros(TRAIN), KEEP, mode="random", generator=drawing(seed))
    elif variant == INITIAL:
        kept = keep_by_score(scores(seed, mlp, functools.partial(grand_scores, method="ghost"), 0), KEEP)
    elif variant == MARGIN:
        kept = keep_by_score(scores(seed, mlp, margin_scores, score_steps), KEEP)
    elif variant == FORGOTTEN:
        kept = keep_by_score(forgetting(seed), KEEP)
    elif variant == GRADUAL:
        kept = torch.arange(TRAIN)
    else:
        chosen = scores(seed, mlp, score, score_steps)
        kept = keep_by_score(chosen, KEEP, mode="max" if variant == "hardest" else "min")
    torch.manual_seed(seed)
    model = mlp()
    if variant == GRADUAL:
        fit_gradually(model, train, scores(seed, mlp, score, score_steps), steps)
    else:
        fit(model, TensorDataset(*train[kept]), steps)
    with torch.no_grad():
        outputs, targets = model(test.tensors[0]), test.tensors[1]
    return {"accuracy": (outputs.argmax(1) == targets).float().mean().item()}


def noise(variant: str, seed: int, *, score: Score, score_steps: int) -> dict[str, float]:
    """How well the score tells the examples whose label was replaced by another class."""
    from sklearn.metrics import roc_auc_score

    train, _ = digits(seed)
    inputs, labels = train.tensors
    generator = drawing(seed)
    wrong = torch.randperm(TRAIN, generator=generator)[: round(NOISE * TRAIN)]
    labels = labels.clone()
    labels[wrong] = (labels[wrong] + torch.randint(1, 10, (len(wrong),), generator=generator)) % 10
    flipped = torch.zeros(TRAIN).index_fill(0, wrong, 1)
    found = average_scores(mlp, trainer(score_steps), TensorDataset(inputs, labels), score=score, seeds=own(seed))
    return {"auc": float(roc_auc_score(flipped.numpy(), found.numpy()))}


def agree(variant: str, seed: int, *, score: Score, score_steps: int) -> dict[str, float]:
    """Rank correlation of two disjoint groups of runs, and of two architectures."""
    from scipy.stats import spearmanr

    train, _ = digits(seed)
    train_fn = trainer(score_steps)
    halves = [average_scores(mlp, train_fn, train, score=score, seeds=part) for part in (own(seed)[:5], own(seed)[5:])]
    return {
        "groups": float(spearmanr(*halves).statistic),
        "architectures": float(spearmanr(sum(halves), scores(seed, cnn, score, score_steps)).statistic),
    }


@functools.lru_cache(maxsize=4)
def scores(seed: int, make_model: Callable[[], nn.Module], score: Score, steps: int) -> Tensor:
    """The mean of ``RUNS`` runs, each ``steps`` steps long."""
    return average_scores(make_model, trainer(steps), digits(seed)[0], score=score, seeds=own(seed))


def forgetting(seed: int) -> Tensor:
    """Mean count over ``RUNS`` runs of how often each example was forgotten in the batches that it was trained on."""
    found = []
    for run in own(seed):
        torch.manual_seed(run)
        tracker = ForgettingTracker(TRAIN)
        fit(mlp(), digits(seed)[0], FORGETTING_STEPS, visit=tracker.update)
        found.append(tracker.scores())
    return torch.stack(found).mean(0)


def fit_gradually(model: nn.Module, data: TensorDataset, chosen_by: Tensor, steps: int) -> None:
    """As many steps as ``fit``, on fewer and fewer examples: down to ``KEEP`` at about half of the steps."""
    epochs = round(steps / (TRAIN // BATCH))
    sampler = PruningSampler(chosen_by, epochs, KEEP, schedule="cubic", end=epochs // 2)
    optimizer, left, epoch = torch.optim.Adam(model.parameters(), lr=1e-3), steps, 0
    while left:
        sampler.set_epoch(epoch)
        visited = torch.tensor(list(sampler))
        for chosen in visited[: len(visited) // BATCH * BATCH].split(BATCH)[:left]:
            descend(model, optimizer, data, chosen)
            left -= 1
        epoch += 1


def own(seed: int) -> list[int]:
    """Seeds of the scoring runs that belong to a seed of the experiment, and to no other."""
    return [1000 * seed + k for k in range(RUNS)]


def drawing(seed: int) -> torch.Generator:
    """Draws subsets and wrong labels, independently of the split and of the runs."""
    return torch.Generator().manual_seed(1000 * seed + RUNS)


def mlp() -> nn.Module:
    hidden = [nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(128, 10))


def cnn() -> nn.Module:
    return models.cnn(10)


def trainer(steps: int) -> Callable[[nn.Module, Any], None]:
    return functools.partial(fit, steps=steps)


def fit(
    model: nn.Module, data: TensorDataset, steps: int, visit: Callable[[Tensor, Tensor], None] | None = None
) -> None:
    """Adam at 1e-3 on batches of 64, each epoch in a new order, as far as whole batches go.

    ``visit(positions, correct)`` is told the answers to each batch.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    order: list[Tensor] = []
    for _ in range(steps):
        order = order or list(torch.randperm(len(data))[: len(data) // BATCH * BATCH].split(BATCH))
        chosen = order.pop()
        logits = descend(model, optimizer, data, chosen)
        if visit:
            visit(chosen, logits.argmax(1) == data.tensors[1][chosen])


def descend(model: nn.Module, optimizer: torch.optim.Optimizer, data: TensorDataset, chosen: Tensor) -> Tensor:
    """One step on the chosen examples; their logits before it."""
    inputs, targets = data.tensors
    optimizer.zero_grad()
    logits = model(inputs[chosen])
    F.cross_entropy(logits, targets[chosen]).backward()
    optimizer.step()
    return logits.detach()


@functools.lru_cache(maxsize=2)
def digits(seed: int) -> tuple[TensorDataset, TensorDataset]:
    """1,200 of scikit-learn's handwritten digits to train on and 597 to test on, cut by the seed."""
    train, test = (TensorDataset(x.view(-1, 1, 8, 8), y) for x, y in split_digits(seed, TRAIN))
    return train, test


def figure(evidence: Evidence) -> Figure:
    """Test accuracy of every variant, a dot per seed, with the mean and its 95 % interval."""
    from matplotlib import pyplot

    names = {key: name.replace(" ", "\n") for key, name in ARMS.items()}
    names |= {INITIAL: "by GraNd\nat init", MARGIN: "by\nmargin", FORGOTTEN: "by\nforgetting", GRADUAL: "gradually"}
    names = {key: name for key, name in names.items() if any(row["variant"] == key for row in evidence.rows)}
    drawn, axes = pyplot.subplots(figsize=(8, 3.5), layout="constrained")
    for place, variant in enumerate(names):
        accuracies = 100 * evidence.rows.values(variant, "accuracy")
        mean, low, high = mean_interval(accuracies)
        axes.plot([place] * len(accuracies), accuracies, "o", color="0.65", markersize=4, alpha=0.6)
        axes.errorbar(place + 0.2, mean, [[mean - low], [high - mean]], fmt="s", color="black", capsize=4)
        axes.annotate(f"{mean:.1f}", (place + 0.2, mean), xytext=(7, 0), textcoords="offset points", va="center")
    axes.set_xticks(range(len(names)), list(names.values()))
    axes.set_xlim(-0.5, len(names) - 0.2)
    axes.set_ylabel("test accuracy after 1,500 steps, %")
    axes.spines[["top", "right"]].set_visible(False)
    return drawn
