"""The utility view's claim: maximum likelihood is utility learning, and utilities make probabilities to decide by."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from assay.bench.evidence import Bench, Check, Evidence, Rows, at_least, at_most
from assay.bench.statistics import mean_interval
from assay.losses import decide, fit_temperature, revealed_preference_loss, sequence_utility, utility_to_probability
from assay.losses.utility_probability.claim_transduction import (
    PAD,
    STEPS,
    Pairs,
    Transducer,
    accuracy,
    beam,
    edit_distance,
    pairs,
    sample,
    scores_of,
    train,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRAIN, FIT, TEST, CANDIDATES = 20_000, 200, 300, 20
# What all rules share was chosen on seeds 0 to 2: at the rate 1e-2, greedy decoding was 11.2 points ahead of sampling
# after 400 steps and 10.6 after 500 (on seed 0, 11.6 after 250 and 2.4 after 800). The rate 3e-3 left 13 to 14 points
# after 325 to 400 steps, with a much worse network. In these settings the third check gave at most 9.6 on seed 0.
RATE, TRAINING = 1e-2, 400
ANCESTRAL, WHOLE, PER_TOKEN = "sampling, softmax", "sampling, whole outputs", "sampling, cold tokens"
UNIFORM, SOFTMAX, TRANSFORMED = "MBR, equal weights", "MBR, softmax", "MBR, whole outputs"
BEAMS = {"greedy": 1, "beam 4": 4, "beam 16": 16, "beam 64": 64}
VARIANTS = (ANCESTRAL, PER_TOKEN, WHOLE, UNIFORM, SOFTMAX, TRANSFORMED, *BEAMS)
COOLED = (PER_TOKEN, WHOLE)
Loss = Callable[[Tensor, Tensor], Tensor]
Transform = Callable[[Tensor, Tensor, float], Tensor]


def whole_outputs(scores: Tensor, outputs: Tensor, temperature: float) -> Tensor:
    """The transform under test: the probability of each output among its input's candidates."""
    return utility_to_probability(utility(scores, outputs), temperature=temperature, candidates=outputs)


def tokens_first(scores: Tensor, outputs: Tensor, temperature: float) -> Tensor:
    """The first broken variant: the temperature inside each token's normalisation, not that of the whole output."""
    log_p = sequence_utility(scores / temperature, outputs, mask=outputs != PAD)
    return utility_to_probability(log_p, candidates=outputs)


def through_the_probabilities(scores: Tensor, target: Tensor) -> Tensor:
    """The second broken variant: a gradient also through the probabilities of the alternatives."""
    ahead = scores - scores.gather(-1, target.unsqueeze(-1))
    return (F.softmax(scores, -1) * ahead).sum(-1).mean()


def claim(
    bench: Bench,
    *,
    loss: Loss = revealed_preference_loss,
    transform: Transform = whole_outputs,
    variants: Sequence[str] = VARIANTS,
    seeds: int = 20,
    steps: int = TRAINING,
) -> Evidence:
    """``loss`` and ``transform`` are the pieces under test. The temperatures are fitted on other inputs."""
    run = functools.partial(measure, loss=loss, transform=transform, steps=bench.scale(steps, 20))
    rows = bench.rows(run, variants, bench.seeds(seeds))
    return Evidence(rows, checks_of(rows), notes_of(rows) if set(VARIANTS) <= set(variants) else [])


def checks_of(rows: Rows) -> list[Check]:
    def gain(one: str, other: str) -> Any:
        return rows.difference(one, other, "accuracy")

    checks = [
        at_most("largest gap to the gradient of cross-entropy", rows.values(WHOLE, "gradient").max(), 1e-12),
        at_most("largest gap of log-odds to utilities / T", rows.values(WHOLE, "odds").max(), 1e-9),
        at_least(f"accuracy: {WHOLE} - softmax (points)", gain(WHOLE, ANCESTRAL), 10.0),
    ]
    if any(row["variant"] == TRANSFORMED for row in rows):
        checks.append(at_least("accuracy: MBR, whole outputs - equal weights", gain(TRANSFORMED, UNIFORM), 0.0))
    return checks


def notes_of(rows: Rows) -> list[str]:
    def compared(one: str, other: str, metric: str) -> str:
        mean, low, high = mean_interval(rows.difference(one, other, metric))
        return f"not gated: {metric}, {one} - {other}: {mean:+.1f} [{low:+.1f}, {high:+.1f}] points"

    temperatures = ", ".join(f"{variant} {rows.values(variant, 'temperature').mean():.2f}" for variant in COOLED)
    return [
        "at best consistent with the paper: its equation is not tested, only that sharpened utilities decide better",
        f"mean fitted temperature: {temperatures}",
        compared(WHOLE, ANCESTRAL, "right"),
        compared(WHOLE, PER_TOKEN, "accuracy"),
        compared("greedy", ANCESTRAL, "accuracy"),
        compared(TRANSFORMED, "greedy", "accuracy"),
        compared(TRANSFORMED, SOFTMAX, "accuracy"),
        compared("beam 64", "beam 4", "accuracy"),
    ]


class Trained(NamedTuple):
    """A network, pairs to fit temperatures on and pairs to test on, with samples of the network for both."""

    model: Transducer
    fitting: Pairs
    testing: Pairs
    fitting_samples: Tensor
    testing_samples: Tensor


@functools.lru_cache(maxsize=2)
def trained(seed: int, steps: int) -> Trained:
    draw = torch.Generator().manual_seed(seed)
    data, fitting, testing = (pairs(count, draw) for count in (TRAIN, FIT, TEST))
    torch.manual_seed(seed)
    model = train(data, steps, RATE)
    samples = (sample(model, part.source, CANDIDATES, draw) for part in (fitting, testing))
    return Trained(model, fitting, testing, *samples)


def measure(variant: str, seed: int, *, loss: Loss, transform: Transform, steps: int) -> dict[str, float]:
    """Per cent of right words, and of outputs that are right as a whole, under a rule; for samples, expected."""
    run = trained(seed, steps)
    samples, target = run.testing_samples, run.testing.target
    if variant in BEAMS:
        return measures(beam(run.model, run.testing.source, BEAMS[variant]), target)
    if variant == ANCESTRAL:
        return measures(samples, target)
    if variant == PER_TOKEN:
        temperature = token_temperature(run)
        draw = torch.Generator().manual_seed(seed)
        cold = sample(run.model, run.testing.source, CANDIDATES, draw, temperature)
        return measures(cold, target) | {"temperature": temperature}
    scores = scores_of(run.model, run.testing.source, samples)
    temperature = output_temperature(run)
    probability = {
        UNIFORM: lambda: torch.full(samples.shape[:2], 1 / CANDIDATES),
        SOFTMAX: lambda: utility_to_probability(log_score(scores, samples), candidates=samples),
    }.get(variant, lambda: transform(scores, samples, temperature))()
    if variant == WHOLE:
        mechanism = {"gradient": gradient_gap(run, loss), "odds": odds_gap(run, transform, temperature)}
        return measures(samples, target, probability) | {"temperature": temperature} | mechanism
    between = edit_distance(samples.unsqueeze(2), samples.unsqueeze(1))
    chosen = decide(utility(scores, samples), rule="mbr", probability=probability, loss_matrix=between)
    return measures(samples[torch.arange(TEST), chosen], target)


def measures(outputs: Tensor, target: Tensor, probability: Tensor | None = None) -> dict[str, float]:
    """The means over the outputs, or over draws from them by ``probability``."""
    right = accuracy(outputs, target)
    weight = torch.ones_like(right) / right[0].numel() if probability is None else probability
    means = {"accuracy": right, "right": 100.0 * (right == 100)}
    return {name: (weight * values).sum().item() / len(target) for name, values in means.items()}


def log_score(scores: Tensor, outputs: Tensor) -> Tensor:
    return sequence_utility(scores, outputs, mask=outputs != PAD)


def utility(scores: Tensor, outputs: Tensor) -> Tensor:
    """Mean log-probability of the words, END included."""
    return sequence_utility(scores, outputs, mask=outputs != PAD, length_penalty=1.0)


def output_temperature(run: Trained) -> float:
    """Fitted on other inputs: the reference is what was chosen, the network's samples are the alternatives."""
    reference = F.pad(run.fitting.target, (0, STEPS - run.fitting.target.shape[1])).unsqueeze(1)
    outputs = torch.cat([reference, run.fitting_samples], 1)
    scores = scores_of(run.model, run.fitting.source, outputs)
    return fit_temperature(utility(scores, outputs), torch.zeros(FIT, dtype=torch.long), candidates=outputs)


@torch.no_grad()
def token_temperature(run: Trained) -> float:
    """The same fit with the words as candidates, as in ordinary temperature scaling."""
    words = run.fitting.target != PAD
    return fit_temperature(run.model(*run.fitting)[words], run.fitting.target[words])


def gradient_gap(run: Trained, loss: Loss) -> float:
    """Largest difference of a weight's gradient under ``loss`` and under cross-entropy, in float64."""
    model = copy.deepcopy(run.model).double()
    target = run.fitting.target[run.fitting.target != PAD]
    scores = model(*run.fitting)[run.fitting.target != PAD]
    ours, theirs = (
        torch.autograd.grad(of(scores, target), list(model.parameters()), retain_graph=True)
        for of in (loss, F.cross_entropy)
    )
    return max((one - other).abs().max().item() for one, other in zip(ours, theirs, strict=True))


def odds_gap(run: Trained, transform: Transform, temperature: float) -> float:
    """Largest difference of log(p_c / p_best) and (utility_c - utility_best) / T in float64, where p is no dust."""
    outputs = run.testing_samples
    scores = scores_of(copy.deepcopy(run.model).double(), run.testing.source, outputs)
    p, u = transform(scores, outputs, temperature), utility(scores, outputs)
    best = p.argmax(1, keepdim=True)
    expected = (u - u.gather(1, best)) / temperature
    counted = p > math.exp(-30)
    return ((p / p.gather(1, best)).log() - expected)[counted].abs().max().item()


def figure(evidence: Evidence) -> Figure:
    """Right words and right outputs under every rule: a dot per seed, and the mean with its 95 % interval."""
    from matplotlib import pyplot

    rows = evidence.rows
    drawn, panels = pyplot.subplots(1, 2, figsize=(7.5, 3.8), sharey=True, layout="constrained")
    labels = {"accuracy": "right words, %", "right": "outputs right as a whole, %"}
    for axes, (metric, label) in zip(panels, labels.items(), strict=True):
        for place, variant in enumerate(VARIANTS):
            values = rows.values(variant, metric)
            mean, low, high = mean_interval(values)
            color = "black" if variant in (ANCESTRAL, WHOLE, UNIFORM, TRANSFORMED) else "0.45"
            axes.plot(values, [place] * len(values), "o", color="0.75", markersize=3)
            axes.errorbar(mean, place, xerr=[[mean - low], [high - mean]], fmt="s", color=color, capsize=4)
        axes.set_xlabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(VARIANTS)), VARIANTS)
    panels[0].invert_yaxis()
    return drawn
