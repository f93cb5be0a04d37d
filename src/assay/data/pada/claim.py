"""PA&DA on a cell search space over digits: the gradient's variance, and how well the super-network ranks."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from assay.bench.datasets import split_digits
from assay.bench.evidence import Bench, Evidence, Rows, at_least, at_most
from assay.bench.statistics import mean_interval
from assay.data import CellSuperNetwork, GradNormSampler, PathSampler, Zero, grand_scores, pada_mix, path_grad_norms

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS = ("variance", "ranking")
# For each arm, whether paths and whether data are drawn by importance.
ARMS = {"uniform": (False, False), "paths": (True, False), "data": (False, True), "PA&DA": (True, True)}
TRAIN, VALIDATION, BATCH, WIDTH, NETWORKS = 900, 300, 64, 32, 24
PARAMETRIC = [False, False, True, True]


def claim(
    bench: Bench,
    *,
    sampler: Callable[..., GradNormSampler] = GradNormSampler,
    parts: Collection[str] = PARTS,
    seeds: int = 12,
    steps: int = 1500,
) -> Evidence:
    """``sampler`` is the piece under test; nothing is tuned, all arms train by the one recipe of the paper's scale."""
    rows, checks, notes = Rows(), [], []
    if "variance" in parts:
        run = functools.partial(variance, sampler=sampler, steps=min(steps, 750))
        rows += bench.rows(run, ["variance"], bench.seeds(seeds))
        checks += [
            at_most("variance, exact norms / uniform", rows.values("variance", "exact"), 1.0),
            at_most("variance, recorded errors / uniform", rows.values("variance", "recorded"), 0.95),
            at_most("variance, recorded errors / losses of whole batches", rows.values("variance", "to batches"), 0.5),
        ]
    if "ranking" in parts:
        run = functools.partial(rank, sampler=sampler, steps=bench.scale(steps, 30))
        found = bench.rows(run, list(ARMS), bench.seeds(seeds))
        rows += found
        tau, best = (found.difference("PA&DA", "uniform", metric) for metric in ("tau", "best"))
        checks += [
            at_least("Kendall's tau, PA&DA - uniform", tau, -0.02),
            at_least("accuracy of the path ranked best, PA&DA - uniform (points)", best, -0.5),
        ]
        notes = [note(found, arm) for arm in ARMS]
        overhead = mean_interval(found.ratio("PA&DA", "uniform", "seconds"))
        notes.append("not gated: seconds, PA&DA / uniform: {:.2f} [{:.2f}, {:.2f}]".format(*overhead))
    return Evidence(rows, checks, notes)


def note(rows: Rows, arm: str) -> str:
    tau, best = (rows.values(arm, metric).mean() for metric in ("tau", "best"))
    said = f"{arm}: Kendall's tau {tau:.3f}, accuracy of the path ranked best {best:.1f} %"
    if arm == "uniform":
        return said
    gain, low, high = mean_interval(rows.difference(arm, "uniform", "tau"))
    return f"{said}; tau - uniform's {gain:+.3f} [{low:+.3f}, {high:+.3f}]"


def super_network() -> CellSuperNetwork:
    """Three edges and four operations (zero, identity, a layer, a wider one): 64 networks."""

    def narrow() -> nn.Module:
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())

    def wide() -> nn.Module:
        return nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.ReLU(), nn.Linear(4 * WIDTH, WIDTH))

    stem = nn.Sequential(nn.Linear(64, WIDTH), nn.ReLU())
    return CellSuperNetwork(stem, [Zero, nn.Identity, narrow, wide], nn.Linear(WIDTH, 10), nodes=3)


def train(
    model: CellSuperNetwork,
    data: TensorDataset,
    steps: int,
    *,
    total: int,
    examples: GradNormSampler,
    paths: PathSampler | None = None,
    by_path: bool = False,
    by_data: bool = False,
    fixed: Sequence[int] | None = None,
) -> None:
    """SGD with momentum, a cosine over ``total`` steps, gradients clipped at 5; importance as the arm says."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=2.5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    inputs, targets = data.tensors
    per_epoch = len(inputs) // BATCH
    epochs = -(-total // per_epoch)
    for step in range(steps):
        epoch, place = divmod(step, per_epoch)
        if place == 0:
            if epoch and by_data:
                examples.step((epoch - 1) / epochs)
            if epoch and by_path and paths:
                paths.step((epoch - 1) / epochs)
            order = torch.tensor(list(examples))
        chosen = order[place * BATCH : (place + 1) * BATCH]
        path = fixed or paths.sample(model.num_edges)  # type: ignore[union-attr]
        optimizer.zero_grad()
        logits = model(inputs[chosen], path)
        F.cross_entropy(logits, targets[chosen]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        if by_data:
            examples.record(chosen, logits, targets[chosen])
        if by_path and paths:
            paths.record(path, path_grad_norms(model.active(path)))
        optimizer.step()
        schedule.step()


def drawing(seed: int, stream: int) -> torch.Generator:
    return torch.Generator().manual_seed(100 * seed + stream)


@functools.lru_cache(maxsize=2)
def digits(seed: int) -> tuple[TensorDataset, TensorDataset, TensorDataset]:
    """900 digits to train on, 300 to rank on and 597 to test on."""
    (x, y), test = split_digits(seed, TRAIN + VALIDATION)
    return TensorDataset(x[:TRAIN], y[:TRAIN]), TensorDataset(x[TRAIN:], y[TRAIN:]), TensorDataset(*test)


def accuracy(model: CellSuperNetwork, path: Sequence[int], data: TensorDataset) -> float:
    inputs, targets = data.tensors
    with torch.no_grad():
        return 100 * (model(inputs, path).argmax(1) == targets).double().mean().item()


def variance(variant: str, seed: int, *, sampler: Callable[..., GradNormSampler], steps: int) -> dict[str, float]:
    """Trace of the covariance of one example's reweighted gradient, over that of uniform sampling.

    Halfway through a training of a super-network, on the path of wide layers; the norms are exact, over all weights.
    Recorded errors are those of the last epoch, mixed half and half with the uniform distribution, as they are then.
    """
    data = digits(seed)[0]
    torch.manual_seed(seed)
    model, path = super_network(), [3, 3, 3]
    examples = sampler(TRAIN, generator=drawing(seed, 0))
    train(model, data, steps, total=2 * steps, examples=examples, paths=PathSampler(4, generator=drawing(seed, 1)))
    batched = GradNormSampler(TRAIN)  # the control: an example gets the loss of the batch that it happens to be in
    with torch.no_grad():
        for chosen in torch.arange(TRAIN).split(BATCH):
            logits, targets = model(data.tensors[0][chosen], path), data.tensors[1][chosen]
            examples.record(chosen, logits, targets)
            batched.record_norms(chosen, F.cross_entropy(logits, targets).expand(len(chosen)))
    examples.step(0.5)
    batched.step(0.5)
    norms = grand_scores(OnPath(model, path), data, batch_size=100).double()
    whole = mean_gradient(model, data, path)

    def trace(q: Tensor) -> float:
        return ((norms.square() / q).sum() / TRAIN**2 - whole).item()

    uniform = trace(torch.full((TRAIN,), 1 / TRAIN, dtype=torch.float64))
    exact = trace(pada_mix(norms, 1 / TRAIN, 1.0))
    recorded = trace(examples.probabilities)
    return {
        "exact": exact / uniform,
        "recorded": recorded / uniform,
        "to batches": recorded / trace(batched.probabilities),
    }


class OnPath(nn.Module):
    """A super-network as one of its networks."""

    def __init__(self, model: CellSuperNetwork, path: Sequence[int]) -> None:
        super().__init__()
        self.model, self.path = model, path

    def forward(self, input: Tensor) -> Tensor:
        return self.model(input.flatten(1), self.path)


def mean_gradient(model: CellSuperNetwork, data: TensorDataset, path: Sequence[int]) -> float:
    """|| mean over examples of the gradient ||^2."""
    inputs, targets = data.tensors
    loss = F.cross_entropy(model(inputs, path), targets)
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return sum(g.double().square().sum().item() for g in gradients if g is not None)


@functools.lru_cache(maxsize=2)
def stand_alone(seed: int, steps: int) -> dict[tuple[int, ...], float]:
    """Test accuracy of 24 of the 64 networks, each trained by itself for a tenth of the steps, mean of two runs."""
    data, _, test = digits(seed)
    every = list(super_network().paths())
    chosen = torch.randperm(len(every), generator=drawing(seed, 2))[:NETWORKS].tolist()
    found = {}
    for path in (every[i] for i in chosen):
        accuracies = []
        for run in range(2):
            torch.manual_seed(10 * seed + run)
            model = super_network()
            examples = GradNormSampler(TRAIN, replacement=False, generator=drawing(seed, 10 + run))
            train(model, data, steps // 10, total=steps // 10, examples=examples, fixed=path)
            accuracies.append(accuracy(model, path, test))
        found[path] = float(np.mean(accuracies))
    return found


def rank(variant: str, seed: int, *, sampler: Callable[..., GradNormSampler], steps: int) -> dict[str, Any]:
    """Train a super-network as the arm says; rank networks by validation accuracy with its weights."""
    from scipy.stats import kendalltau

    by_path, by_data = ARMS[variant]
    data, validation, test = digits(seed)
    truth = stand_alone(seed, steps)
    torch.manual_seed(seed)
    model = super_network()
    start = time.process_time()
    train(
        model,
        data,
        steps,
        total=steps,
        examples=sampler(TRAIN, generator=drawing(seed, 0)),
        paths=PathSampler(4, parametric=PARAMETRIC, generator=drawing(seed, 1)),
        by_path=by_path,
        by_data=by_data,
    )
    seconds = time.process_time() - start
    inherited = {path: accuracy(model, path, validation) for path in model.paths()}
    tau = kendalltau([inherited[path] for path in truth], list(truth.values())).statistic
    best = max(inherited, key=inherited.__getitem__)
    return {"tau": float(tau), "best": accuracy(model, best, test), "seconds": seconds}


def figure(evidence: Evidence) -> Figure:
    """Kendall's tau of each arm, a dot per seed, with the mean and its 95 % interval."""
    from matplotlib.figure import Figure

    drawing_, arms = Figure(figsize=(6, 3.2), layout="constrained"), list(ARMS)
    axes = drawing_.subplots()
    for place, arm in enumerate(arms):
        values = evidence.rows.values(arm, "tau")
        mean, low, high = mean_interval(values)
        axes.plot([place] * len(values), values, "o", color="0.7", markersize=4)
        axes.errorbar(place + 0.15, mean, [[mean - low], [high - mean]], fmt="s", color="black", capsize=4)
        axes.annotate(f"{mean:.2f}", (place + 0.15, mean), xytext=(7, 0), textcoords="offset points", va="center")
    axes.set_xticks(range(len(arms)), ["uniform", "paths by\nimportance", "data by\nimportance", "both (PA&DA)"])
    axes.set_xlim(-0.4, len(arms) - 0.3)
    axes.set_ylabel("Kendall's tau with\nstand-alone accuracy")
    axes.spines[["top", "right"]].set_visible(False)
    return drawing_
