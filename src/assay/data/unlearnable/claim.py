"""Noise against an adversarial trainer on digits: what its loss comes to, and what it still learns."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from assay.bench.datasets import split_digits
from assay.bench.evidence import Bench, Check, Evidence, Rows, at_most
from assay.bench.statistics import mean_interval
from assay.data import Noise, error_minimizing_noise, pgd, robust_error_minimizing_noise, robust_noise_step

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLEAN, PLAIN, ROBUST, FIXED = "clean", "EM", "REM", "weights fixed"
PARTS = ("weights fixed", "loss", "accuracy")
RADIUS, ADV_RADIUS, BATCH = 0.3, 0.15, 64
Method = Callable[..., Noise]


def claim(
    bench: Bench,
    *,
    method: Method = robust_error_minimizing_noise,
    step: Callable[..., Tensor] = robust_noise_step,
    seeds: int = 10,
    steps: int = 300,
    parts: Sequence[str] = PARTS,
) -> Evidence:
    """``method`` and ``step`` are the pieces under test: the noise of a dataset, and of a batch with weights fixed.

    The parts: the loss that is left with weights fixed, that of victims, and what these have learned all the same.
    Nothing is tuned. Seeds below 100 showed how many steps either noise needs to converge with weights fixed.
    """
    chosen, steps = bench.seeds(seeds), bench.scale(steps)
    evidence = Evidence(Rows(), [])
    if "weights fixed" in parts:
        evidence.rows += bench.rows(functools.partial(fixed, step=step, steps=steps), [FIXED], chosen)
        evidence.checks += fixed_checks(evidence.rows)
        evidence.notes += fixed_notes(evidence.rows)
    if "loss" in parts or "accuracy" in parts:
        victims = functools.partial(victim, method=method, steps=steps)
        evidence.rows += bench.rows(victims, [CLEAN, PLAIN, ROBUST], chosen)
        evidence.notes += victim_notes(evidence.rows)
    if "loss" in parts:
        evidence.checks += loss_checks(evidence.rows)
    if "accuracy" in parts:
        evidence.checks += accuracy_checks(evidence.rows)
    return evidence


def fixed_checks(rows: Rows) -> list[Check]:
    ratio = rows.values(FIXED, "robust") / rows.values(FIXED, "plain")
    return [at_most("adversarial loss, weights fixed: REM / EM", ratio, 0.97)]


def loss_checks(rows: Rows) -> list[Check]:
    return [
        at_most("adversarial training loss: REM / EM", rows.ratio(ROBUST, PLAIN, "loss"), 1.05),
        at_most("adversarial training loss: REM / clean", rows.ratio(ROBUST, CLEAN, "loss"), 0.5),
    ]


def accuracy_checks(rows: Rows) -> list[Check]:
    def gap(variant: str, baseline: str, training: str) -> Any:
        return rows.difference(variant, baseline, training)

    return [
        at_most("accuracy after standard training: EM - clean (points)", gap(PLAIN, CLEAN, "standard"), -8),
        at_most("accuracy after adversarial training: REM - clean (points)", gap(ROBUST, CLEAN, "adversarial"), -8),
        at_most("accuracy after adversarial training: REM - EM (points)", gap(ROBUST, PLAIN, "adversarial"), 0),
    ]


def fixed_notes(rows: Rows) -> list[str]:
    few = rows.values(FIXED, "robust, 10 steps") / rows.values(FIXED, "plain, 10 steps")
    return ["not gated: adversarial loss, weights fixed, ten steps of radius / 5: REM / EM " + _interval(few)]


def victim_notes(rows: Rows) -> list[str]:
    found = []
    for variant in (CLEAN, PLAIN, ROBUST):
        standard, adversarial, loss = (rows.values(variant, name) for name in ("standard", "adversarial", "loss"))
        accuracies = f"accuracy {standard.mean():.1f} % standard, {adversarial.mean():.1f} % adversarial"
        found.append(f"{variant}: {accuracies}; adversarial training loss {loss.mean():.4f}")
    for name in ("standard", "adversarial"):
        for variant, baseline in ((PLAIN, CLEAN), (ROBUST, CLEAN), (ROBUST, PLAIN)):
            gap = _interval(rows.difference(variant, baseline, name))
            found.append(f"accuracy after {name} training, points: {variant} - {baseline} {gap}")
    return found


def _interval(values: Any) -> str:
    mean, low, high = mean_interval(values)
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def fixed(variant: str, seed: int, *, step: Callable[..., Tensor], steps: int) -> dict[str, float]:
    """The adversarial loss that noise leaves on 64 images, for the weights of an adversarially trained network.

    Noise of either kind starts at 0 and takes 100 steps of a fiftieth of the radius, or ten of a fifth; the adversary
    takes ten steps, from no random start.
    """
    (x, y), _ = digits(seed)
    model = trained(x, y, seed, steps, ADV_RADIUS)
    x, y = x[:BATCH], y[:BATCH]
    losses = {"clean": adversarial_loss(model, x, y)}
    for name, adv_radius in (("plain", 0.0), ("robust", ADV_RADIUS)):
        for count, label in ((100, name), (10, f"{name}, 10 steps")):
            noise = step(
                model,
                x,
                y,
                radius=RADIUS,
                adv_radius=adv_radius,
                steps=count,
                step_size=2 * RADIUS / count,
                adv_steps=10,
                adv_step_size=ADV_RADIUS / 5,
                samples=1,
                random_start=False,
            )
            losses[label] = adversarial_loss(model, (x + noise).clamp(0, 1), y)
    return losses


def victim(variant: str, seed: int, *, method: Method, steps: int) -> dict[str, float]:
    """What networks trained on a variant's images, in the standard way and adversarially, come to."""
    (x, y), (x_test, y_test) = digits(seed)
    if variant != CLEAN:
        x = protected(variant, x, y, seed, method, steps)
    standard, adversarial = (trained(x, y, 1000 + seed, steps, radius) for radius in (0.0, ADV_RADIUS))
    with torch.no_grad():
        right = {
            name: 100 * (model(x_test).argmax(1) == y_test).float().mean().item()
            for name, model in (("standard", standard), ("adversarial", adversarial))
        }
    return {**right, "loss": adversarial_loss(adversarial, x, y)}


def protected(variant: str, x: Tensor, y: Tensor, seed: int, method: Method, steps: int) -> Tensor:
    """The images with noise. Both kinds start from the same weights and see the same batches."""
    torch.manual_seed(seed)
    generate, adversary = error_minimizing_noise, {}
    if variant == ROBUST:
        generate = method
        adversary = {"adv_radius": ADV_RADIUS, "adv_steps": 5, "adv_step_size": ADV_RADIUS / 2.5, "samples": 1}
    dataset = TensorDataset(x, y)
    noise = generate(
        mlp(),
        dataset,
        radius=RADIUS,
        steps=5,
        step_size=RADIUS / 2.5,
        train_steps=steps,
        optimizer=sgd,
        batch_size=BATCH,
        generator=torch.Generator().manual_seed(seed),
        **adversary,
    )
    images = noise.apply(dataset)
    return torch.stack([images[i][0] for i in range(len(x))])


def trained(x: Tensor, y: Tensor, seed: int, steps: int, adv_radius: float) -> nn.Module:
    """A network after ``steps`` steps, against an adversary of five steps where there is a radius."""
    torch.manual_seed(seed)
    model, draw = mlp(), torch.Generator().manual_seed(seed)
    optimizer = sgd(model.parameters())
    order: list[Tensor] = []
    for _ in range(steps):
        order = order or list(torch.randperm(len(x), generator=draw)[: len(x) // BATCH * BATCH].split(BATCH))
        chosen = order.pop()
        z = pgd(
            model,
            x[chosen],
            y[chosen],
            radius=adv_radius,
            steps=5,
            step_size=adv_radius / 2.5,
            random_start=True,
            generator=draw,
        )
        optimizer.zero_grad()
        F.cross_entropy(model(z), y[chosen]).backward()
        optimizer.step()
    return model


def adversarial_loss(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Mean cross-entropy at the ends of ten steps of ascent."""
    z = pgd(model, x, y, radius=ADV_RADIUS, steps=10, step_size=ADV_RADIUS / 5)
    with torch.no_grad():
        return F.cross_entropy(model(z), y).item()


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-4)


@functools.lru_cache(maxsize=2)
def digits(seed: int) -> Any:
    """1,200 digits to train on and 597 to test on; the pixels in 255ths, as the images that noise is made for."""
    return tuple(((255 * x).round() / 255, y) for x, y in split_digits(seed))


def figure(evidence: Evidence) -> Figure:
    """Loss and accuracies of the victims, a dot per seed, with the mean and its 95 % interval."""
    from matplotlib import pyplot

    drawn, panels = pyplot.subplots(1, 3, figsize=(8, 3.4), layout="constrained")
    titles = {
        "loss": "adversarial training loss",
        "adversarial": "test accuracy after\nadversarial training, %",
        "standard": "test accuracy after\nstandard training, %",
    }
    for axes, (metric, title) in zip(panels, titles.items(), strict=True):
        for place, variant in enumerate((CLEAN, PLAIN, ROBUST)):
            values = evidence.rows.values(variant, metric)
            mean, low, high = mean_interval(values)
            axes.plot([place] * len(values), values, "o", color="0.65", markersize=4, alpha=0.6)
            axes.errorbar(place + 0.2, mean, [[mean - low], [high - mean]], fmt="s", color="black", capsize=4)
        axes.set_xticks(range(3), ["clean", "EM", "REM"])
        axes.set_xlim(-0.5, 2.7)
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yscale("log")
    return drawn
