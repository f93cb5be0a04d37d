"""Intervals, corrections and verdicts; numpy and scipy only, no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import special  # not scipy.stats, which takes most of a second to import

BETTER, WORSE, OPEN = "better", "worse", "cannot tell"


def mean_interval(values: Any, level: float = 0.95, least_spread: float = 0.0) -> tuple[float, float, float]:
    """Mean and Student interval of the mean; one value, or a value that is not finite, has the whole line.

    Values without spread have an interval of no width, unless ``least_spread``, a standard deviation below which
    none is believed, says otherwise.
    """
    values = np.asarray(values, dtype=float)
    if len(values) == 0:
        return math.nan, -math.inf, math.inf
    mean = float(values.mean())
    if len(values) < 2 or not np.isfinite(values).all():
        return mean, -math.inf, math.inf
    spread = max(float(values.std(ddof=1)), least_spread)
    half = float(special.stdtrit(len(values) - 1, (1 + level) / 2) * spread / math.sqrt(len(values)))
    return mean, mean - half, mean + half


def seeds_to_settle(n: int, half_width: float, gap: float) -> int | None:
    """How many seeds shrink a half width, seen with ``n`` seeds, below ``gap``; None if no number would."""
    if not (math.isfinite(half_width) and math.isfinite(gap)) or n < 2 or gap == 0:
        return None
    scale = half_width * math.sqrt(n) / special.stdtrit(n - 1, 0.975)
    seeds = np.arange(n + 1, 100_000)
    enough = special.stdtrit(seeds - 1, 0.975) * scale / np.sqrt(seeds) < abs(gap)
    return int(seeds[enough.argmax()]) if enough.any() else None


def p_value(differences: Any, least_spread: float = 0.0) -> float:
    """Two-sided p-value of Student's test that paired differences have mean zero (see :func:`mean_interval`)."""
    values = np.asarray(differences, dtype=float)
    if len(values) < 2:
        return 1.0
    spread = max(float(values.std(ddof=1)), least_spread)
    if spread == 0:
        return 1.0 if values.mean() == 0 else 0.0
    return float(2 * special.stdtr(len(values) - 1, -abs(values.mean()) / (spread / math.sqrt(len(values)))))


def step_of(values: Sequence[float], examples: int) -> float:
    """The step in which a metric over ``examples`` comes: 1 / examples if all values are multiples of it, else 0.

    >>> step_of([0.95, 0.94], 100), step_of([0.9512, 0.94], 100)
    (0.01, 0.0)
    """
    counts = np.asarray(values, dtype=float) * examples
    return 1 / examples if len(counts) and np.abs(counts - counts.round()).max() < 1e-3 else 0.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: adjusted p-values in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


@dataclass(frozen=True)
class Paired:
    """A method against the baseline over paired seeds; ``gain`` is positive where the method is better."""

    gain: float
    low: float
    high: float
    p: float
    n: int
    missed: int


def paired(
    method: Sequence[float | None], baseline: Sequence[float | None], direction: str, examples: int = 0
) -> Paired:
    """Compare metric values seed by seed; None marks a failed run.

    A run that failed where the baseline's finished is worse than any value: it is counted in ``missed`` and leaves
    no lower end to the interval. A seed on which the baseline failed says nothing about the method and is left out.

    An accuracy over ``examples`` comes in steps of 1 / examples: a few seeds then often differ by exactly as much,
    which must not pass for certainty. No spread below one step is believed.
    """
    sign = 1.0 if direction == "max" else -1.0
    pairs = [(m, b) for m, b in zip(method, baseline, strict=True) if b is not None]
    gains = [sign * (m - b) for m, b in pairs if m is not None]
    missed = sum(m is None for m, _ in pairs)
    least = step_of([value for pair in pairs for value in pair if value is not None], examples) if examples else 0.0
    mean, low, high = mean_interval(gains, least_spread=least)
    p = p_value(gains, least)
    if missed:
        return Paired(mean, -math.inf, high, p if high < 0 else 1.0, len(pairs), missed)
    return Paired(mean, low, high, p, len(pairs), 0)


def verdicts(results: Sequence[Paired], level: float = 0.95) -> list[str]:
    """*better*, *worse* or *cannot tell* for each method, Holm-corrected over all of them.

    A method that failed on every seed on which the baseline finished is *worse*; one that failed on some can be
    *worse* but never *better*.
    """
    answers = []
    for result, p in zip(results, holm([result.p for result in results]), strict=True):
        all_missed = result.n > 0 and result.missed == result.n
        real = p < 1 - level
        if all_missed or (real and result.gain < 0):
            answers.append(WORSE)
        elif real and result.gain > 0 and not result.missed:
            answers.append(BETTER)
        else:
            answers.append(OPEN)
    return answers
