"""Digits in three modalities and uneven classes: a phase on masked images and then fine-tuning, against none."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Beta

from assay.bench.datasets import digits
from assay.bench.evidence import Bench, Check, Evidence, Rows, at_least, at_most
from assay.bench.statistics import mean_interval
from assay.data import NoiseMaskPolicy, average_checkpoints, noise_mask
from assay.data.noise_mask.noise_mask import feature_extractor
from assay.losses import noise_mask_loss

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLAIN, DROPOUT, RANDOM = "no masks", "dropout and weight decay", "random masks"
LEARNED, REFERENCE = "learned masks", "learned masks, authors' estimator"
FIXED, FIXED_OWN = "learned masks, fixed network", "learned masks, fixed network, baseline per image"
FIXED_REFERENCE = "learned masks, fixed network, authors' estimator"
ALONE = (FIXED, FIXED_OWN, FIXED_REFERENCE)
GATED, SHOWN = (PLAIN, RANDOM, LEARNED), (DROPOUT, REFERENCE, *ALONE)
VARIANTS = (*GATED, *SHOWN)
TRAIN, CLASSES, SIDE, BATCH, AVERAGED = 600, 10, 16, 64, 3
GRID, BLUR = 8, {"kernel_size": 3, "sigma": 1.0}
# (rate while heating, rate of fine-tuning relative to it), the best of four pairs for each by balanced accuracy on
# seeds 0 to 2; for dropout the best of four pairs of dropout and weight decay.
RATES = {PLAIN: (0.1, 1.0), DROPOUT: (0.1, 1.0), RANDOM: (0.1, 1.0), LEARNED: (0.1, 1.0), REFERENCE: (0.03, 0.3)}
REGULARIZED = {"dropout": 0.25, "weight_decay": 5e-3}
POLICY_RATE = 1e-3  # of 1e-3, 3e-3 and 1e-2, what lowers the loss of a fixed network most on seeds 0 and 2
# Seeds 200 to 211 were a first run, which could tell none of the checks on accuracy (0.31 points above no masks, from
# -0.14 to 0.75). It set the number of seeds; the verdict is read on seeds that it did not use.
FIRST_SEED = 300
Loss = Callable[..., Tensor]
Examples = tuple[Tensor, Tensor]


def reversed_sign(log_density: Tensor, per_sample_loss: Tensor, **options: Any) -> Tensor:
    """The broken variant: masks of high loss become likelier."""
    return noise_mask_loss(-log_density, per_sample_loss, **options)


def claim(
    bench: Bench,
    *,
    loss: Loss = noise_mask_loss,
    fine_tune: bool = True,
    masked_test: bool = False,
    variants: Sequence[str] = VARIANTS,
    seeds: int = 60,
    heating: int = 24,
    tuning: int = 8,
) -> Evidence:
    """``loss`` is the piece under test; ``heating`` and ``tuning`` are epochs, of as many steps for every variant."""
    run = functools.partial(
        train,
        loss=loss,
        masked_test=masked_test,
        heating=bench.scale(heating, AVERAGED),
        tuning=bench.scale(tuning, 2) if fine_tune else 0,
    )
    rows = Rows()
    for chosen, count in ((GATED, seeds), (SHOWN, max(3, seeds // 5))):  # an accuracy on 1,197 images takes more seeds
        wanted = [variant for variant in variants if variant in chosen]
        rows += bench.rows(run, wanted, bench.seeds(count, first=FIRST_SEED))
    notes = [note(rows, variant) for variant in variants if PLAIN in variants]
    return Evidence(rows, checks_of(rows, variants), notes)


def checks_of(rows: Rows, variants: Sequence[str]) -> list[Check]:
    checks = []
    if PLAIN in variants:
        gain = rows.difference(LEARNED, PLAIN, "balanced")
        checks += [
            at_least("balanced accuracy, learned masks - none (points)", gain, 0.5),
            at_least("share of the seeds on which learned masks are better than none", gain > 0, 0.8),
        ]
    if RANDOM in variants:
        gain = rows.difference(LEARNED, RANDOM, "balanced")
        checks.append(at_least("balanced accuracy, learned - random masks (points)", gain, -0.2))
    for variant, network in ((LEARNED, "own"), (FIXED, "a fixed")):
        if variant in variants:
            name = f"log(loss under learned / untrained masks), new images, {network} network"
            checks.append(at_most(name, change(rows, variant), 0.0))
    return checks


def change(rows: Rows, variant: str) -> np.ndarray:
    """log(loss under fresh masks of the trained policy / under those of the untrained one), on new images."""
    return np.log(rows.values(variant, "trained") / rows.values(variant, "untrained"))


def note(rows: Rows, variant: str) -> str:
    def interval(values: np.ndarray) -> str:
        mean, low, high = mean_interval(values)
        return f"{mean:.3f} [{low:.3f}, {high:.3f}]"

    if variant in ALONE:
        return f"{variant}: log(loss under learned / untrained masks) {interval(change(rows, variant))}"
    accuracy, f1 = (interval(rows.values(variant, metric)) for metric in ("balanced", "f1"))
    said = f"{variant}: balanced accuracy {accuracy}, macro F1 {f1}"
    if variant == PLAIN:
        return said
    seeds = {row["seed"] for row in rows if row["variant"] == variant}
    shared = Rows(row for row in rows if row["seed"] in seeds)
    return f"{said}; above {PLAIN}: {interval(shared.difference(variant, PLAIN, 'balanced'))}"


# --- training ---


def train(
    variant: str, seed: int, *, loss: Loss, heating: int, tuning: int, masked_test: bool = False
) -> dict[str, float]:
    """Heat a small network and fine-tune it; measured on the images left, and so is what the policy has learned."""
    if variant in ALONE:
        return learn_alone(variant, seed, loss, heating)
    train_set, (x, y) = modalities(seed)
    heated, masks = heat(variant, seed, loss, heating)
    model, (rate, share) = copy.deepcopy(heated), RATES[variant]
    epochs(
        model, train_set, plain, sgd(model, variant, rate * share), tuning, lambda t: min(1, (t + 1 / 8) / 0.7), seed
    )
    model.eval()
    with torch.no_grad():
        seen = x * masks.policy.sample(x, **BLUR, generator=drawing(seed))[0] if masks and masked_test else x
        return measures(model(seen), y) | (masks.losses(heated, x, y) if masks else {})


@functools.lru_cache(maxsize=3)
def heat(variant: str, seed: int, loss: Loss, count: int) -> tuple[nn.Module, LearnedMasks | None]:
    """The mean of the last checkpoints of the first phase, and the masks if they were learned."""
    train_set, _ = modalities(seed)
    torch.manual_seed(seed)
    model, rate = network(REGULARIZED["dropout"] if variant == DROPOUT else 0.0), RATES[variant][0]
    steps = count * (TRAIN // BATCH)
    masks = LearnedMasks(variant, loss, rate, steps, drawing(seed)) if variant in (LEARNED, REFERENCE) else None
    objective = masks or (functools.partial(random_masks, draw=drawing(seed)) if variant == RANDOM else plain)
    checkpoints = epochs(
        model, train_set, objective, sgd(model, variant, rate), count, lambda t: 0.1 ** int(3 * t), seed
    )
    model.load_state_dict(average_checkpoints(checkpoints))
    return model, masks


def learn_alone(variant: str, seed: int, loss: Loss, count: int) -> dict[str, float]:
    """The policy against a network that was heated by random masks and now stays as it is.

    It learns from half of the images that the network has not seen, as the network's loss on those that it has is next
    to nothing, and is measured on the other half.
    """
    model = copy.deepcopy(heat(RANDOM, seed, loss, count)[0]).eval().requires_grad_(False)
    masks = LearnedMasks(variant, loss, RATES[REFERENCE][0], count * (TRAIN // BATCH), drawing(seed))
    x, y = modalities(seed)[1]
    seen, held_out = torch.randperm(len(x), generator=drawing(seed)).split(TRAIN)
    order = drawing(seed)
    for _ in range(count):
        for index in batches(order):
            index = seen[index]
            masks(model, x[index], y[index]).backward()
            masks.step()
    return masks.losses(model, x[held_out], y[held_out])


def sgd(model: nn.Module, variant: str, rate: float) -> torch.optim.SGD:
    weight_decay = REGULARIZED["weight_decay"] if variant == DROPOUT else 1e-4
    return torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=weight_decay)


def drawing(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def epochs(
    model: nn.Module,
    data: Examples,
    objective: Callable[..., Tensor],
    optimizer: torch.optim.Optimizer,
    count: int,
    factor: Callable[[float], float],
    seed: int,
) -> list[dict[str, Any]]:
    """Train; the rate is multiplied by ``factor`` of the share of the epochs done. Returns the last checkpoints."""
    x, y = data
    order, rate, checkpoints = drawing(seed), optimizer.param_groups[0]["lr"], []
    model.train()
    for epoch in range(count):
        optimizer.param_groups[0]["lr"] = rate * factor(epoch / count)
        for index in batches(order):
            optimizer.zero_grad()
            objective(model, x[index], y[index]).backward()
            optimizer.step()
            if isinstance(objective, LearnedMasks):
                objective.step()
        checkpoints = [*checkpoints, copy.deepcopy(model.state_dict())][-AVERAGED:]
    return checkpoints


def batches(order: torch.Generator) -> tuple[Tensor, ...]:
    """One epoch, the remainder left out."""
    return torch.randperm(TRAIN, generator=order)[: TRAIN // BATCH * BATCH].split(BATCH)


def plain(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(images), labels)


def random_masks(model: nn.Module, images: Tensor, labels: Tensor, *, draw: torch.Generator) -> Tensor:
    """Masks from Beta(1, 1)."""
    ones = torch.ones(len(images), GRID**2)
    return plain(model, images * noise_mask(Beta(ones, ones), SIDE, grid=GRID, **BLUR, generator=draw), labels)


class LearnedMasks:
    """The policy beside the classifier: one loss, one backward pass, two optimizers."""

    def __init__(self, variant: str, loss: Loss, rate: float, steps: int, draw: torch.Generator) -> None:
        self.policy = NoiseMaskPolicy(*feature_extractor(1), grid=GRID)
        self.initial = copy.deepcopy(self.policy)
        self.reinforce, self.per_image = variant not in (REFERENCE, FIXED_REFERENCE), variant == FIXED_OWN
        self.loss, self.steps, self.draw = loss, steps, draw
        parameters = self.policy.parameters()
        if self.reinforce:
            self.optimizer: torch.optim.Optimizer = torch.optim.Adam(parameters, POLICY_RATE)
        else:  # as in the paper: a tenth of the classifier's rate
            self.optimizer = torch.optim.SGD(parameters, rate / 10, momentum=0.9, weight_decay=1e-4)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        mask, log_density = self.policy.sample(images, **BLUR, generator=self.draw)
        losses = F.cross_entropy(model(images * mask), labels, reduction="none")
        if not self.reinforce:
            return self.loss(log_density, losses)
        baseline = losses.detach().mean()
        if self.per_image:  # its loss under a constant mask
            baseline = F.cross_entropy(model(0.5 * images), labels, reduction="none").detach()
        return self.loss(log_density, losses, estimator="reinforce", baseline=baseline)

    def step(self) -> None:
        self.optimizer.step()
        self.schedule.step()

    @torch.no_grad()
    def losses(self, model: nn.Module, x: Tensor, y: Tensor, draws: int = 4) -> dict[str, float]:
        """Mean loss of a classifier under fresh masks, of the policy as it is and as it would be untrained."""
        model = copy.deepcopy(model).eval()
        found = {}
        for name, policy in (("untrained", self.untrained(x)), ("trained", copy.deepcopy(self.policy))):
            # Batch statistics for both: the running ones of the untrained policy have seen nothing.
            dist, draw = policy.train()(x), drawing(0)
            masks = [noise_mask(dist, SIDE, grid=GRID, **BLUR, generator=draw) for _ in range(draws)]
            found[name] = sum(F.cross_entropy(model(x * mask), y).item() for mask in masks) / draws
        return found

    def untrained(self, x: Tensor) -> NoiseMaskPolicy:
        """The initial weights, with the bases where as many steps would have moved them, which widens the masks."""
        policy = copy.deepcopy(self.initial).train()
        policy.base_momentum **= self.steps
        policy(x)
        return policy


def network(dropout: float) -> nn.Module:
    layers = [nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    layers += [nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.AvgPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(dropout), nn.Linear(512, CLASSES))


@functools.lru_cache(maxsize=2)
def modalities(seed: int) -> tuple[Examples, Examples]:
    """Digits of 16x16 pixels, each as it is, inverted or as its edges; 600 to train on, the others to test on.

    Each class has three quarters as many to train on as the one before it, from 159 zeros to 12 nines.
    """
    pixels, labels = digits()
    draw = torch.Generator().manual_seed(seed)
    images = F.interpolate(pixels.view(-1, 1, 8, 8), SIDE, mode="bilinear")
    across, down = torch.gradient(images, dim=(3, 2))
    edges = (across**2 + down**2).sqrt()
    edges = edges / edges.amax((1, 2, 3), keepdim=True)
    kind = torch.randint(3, (len(images),), generator=draw)
    images = torch.stack([images, 1 - images, edges])[kind, torch.arange(len(images))]
    shares = 0.75 ** torch.arange(CLASSES)
    wanted = (TRAIN * F.pad(shares.cumsum(0) / shares.sum(), (1, 0))).round().int().diff()
    order = torch.randperm(len(images), generator=draw)
    chosen = torch.cat([order[labels[order] == c][: wanted[c]] for c in range(CLASSES)])
    rest = torch.ones(len(images), dtype=torch.bool).index_fill(0, chosen, False)
    images = (images - images[chosen].mean()) / images[chosen].std()
    return (images[chosen], labels[chosen]), (images[rest], labels[rest])


def measures(logits: Tensor, labels: Tensor) -> dict[str, float]:
    from sklearn.metrics import balanced_accuracy_score, f1_score

    said = logits.argmax(1)
    return {
        "balanced": 100 * float(balanced_accuracy_score(labels, said)),
        "f1": 100 * float(f1_score(labels, said, average="macro")),
    }


def figure(evidence: Evidence) -> Figure:
    """Balanced accuracy of every variant, a dot per seed; and what learning does to the loss under masks."""
    from matplotlib import pyplot

    rows = evidence.rows
    variants = [v for v in VARIANTS if v not in ALONE and any(row["variant"] == v for row in rows)]
    drawn, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
    for place, variant in enumerate(variants):
        values = rows.values(variant, "balanced")
        mean, low, high = mean_interval(values)
        left.plot(values, [place] * len(values), "o", color="0.7", markersize=4)
        left.errorbar(mean, place + 0.2, xerr=[[mean - low], [high - mean]], fmt="s", color="black", capsize=4)
    left.set_yticks(range(len(variants)), variants)
    left.set_ylim(len(variants) - 0.5, -0.5)
    left.set_xlabel("balanced accuracy on new images, %")
    for place, variant in enumerate((LEARNED, *ALONE)):
        values = change(rows, variant)
        mean, low, high = mean_interval(values)
        right.plot(values, [place] * len(values), "o", color="0.7", markersize=4)
        right.errorbar(mean, place + 0.2, xerr=[[mean - low], [high - mean]], fmt="s", color="black", capsize=4)
    right.axvline(0, color="0.7", linewidth=1)
    names = ["own network", "fixed network", "baseline\nper image", "authors'\nestimator"]
    right.set_yticks(range(len(names)), names)
    right.set_ylim(len(names) - 0.5, -0.5)
    right.set_xlabel("log(loss under learned / untrained masks)")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return drawn
