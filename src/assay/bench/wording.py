"""How results are said: the answer in one sentence, numbers with their intervals, units. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from assay.bench.comparison import FAILED, Comparison
from assay.bench.statistics import BETTER, OPEN, WORSE, seeds_to_settle

NONE = "–"
NO_EFFECT, PENDING, BASELINE = "no effect", "not measured", "baseline"
"""Outcomes of an arm besides the verdicts and FAILED: the very weights of the baseline, not run, being it."""

_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_NAMED_AT_MOST = 3


def answer(comparison: Comparison) -> str:
    """What the comparison found, in one sentence made from the verdicts."""
    settings = comparison.settings
    base, *rows = comparison.table
    so_far = "" if comparison.complete else "So far: "
    tuned = "the tuned" if settings.trials > 1 else "the untuned"
    against = f"{tuned} {settings.baseline} on {settings.task}"
    if not rows:
        return f"{so_far}Only the baseline, {settings.baseline}, was measured on {settings.task}."
    if not base["seeds"]:
        failed = base["failed_seeds"] or base["failed_trials"]
        reason = "finished no run" if failed else "has not been measured yet"
        return f"{so_far}The baseline, {settings.baseline}, {reason} on {settings.task}, so nothing can be compared."
    seeds = f"{count(settings.seeds)} seeds" if comparison.complete else "the seeds"
    if len(rows) == 1:
        (row,) = rows
        return (
            so_far
            + {
                BETTER: f"{row['method']} is better than {against}.",
                WORSE: f"{row['method']} is worse than {against}.",
                OPEN: f"{seeds.capitalize()} cannot tell {row['method']} from {against}.",
                FAILED: f"{row['method']} finished no run on {settings.task}.",
                NO_EFFECT: f"{row['method']} had no effect on {settings.task}: it ended in the weights of {against}.",
                PENDING: f"{row['method']} has not been measured yet against {against}.",
            }[outcome(row)]
        )
    parts, kinds = _tally(rows, "", seeds, against)
    if kinds == [OPEN]:
        return f"{so_far}{seeds.capitalize()} cannot tell any of {len(rows)} methods from {against}."
    return f"{so_far}Of {len(rows)} methods, {parts}."


def answer_at_equal_seconds(comparison: Comparison) -> str:
    """The verdicts at equal seconds, a sentence to stand after :func:`answer`; empty where nothing was compared."""
    suffix, said = "_equal_seconds", (BETTER, WORSE, OPEN, PENDING)
    rows = [row for row in comparison.table[1:] if outcome(row, suffix) in said]
    if not comparison.settings.equal_seconds or all(outcome(row, suffix) == PENDING for row in rows):
        return ""
    seeds = f"{count(comparison.settings.seeds)} seeds" if comparison.complete else "the seeds"
    parts, kinds = _tally(rows, suffix, seeds)
    if len(rows) == 1:
        parts = f"{seeds} cannot tell {rows[0]['method']}" if kinds == [OPEN] else f"{rows[0]['method']} is {kinds[0]}"
    elif kinds == [OPEN]:
        parts = f"{seeds} cannot tell any of them"
    return f"At equal seconds, {parts}."


def _tally(rows: list[dict[str, Any]], suffix: str, seeds: str, against: str = "") -> tuple[str, list[str]]:
    """How many methods had which outcome, few of them by name; the first comparison says against what."""
    parts, kinds = [], []
    for kind, (one, many) in _GROUPS.items():
        found = [row["method"] for row in rows if outcome(row, suffix) == kind]
        if not found:
            continue
        number = str(len(found)) if len(found) < len(rows) else "both" if len(rows) == 2 else f"all {len(rows)}"
        if len(found) <= _NAMED_AT_MOST and kind != OPEN and len(found) < len(rows):
            number += f" ({', '.join(found)})"
        said = (one if len(found) == 1 else many).format(n=number, seeds=seeds)
        if against and kind in _LINK:
            said, against = f"{said} {_LINK[kind]} {against}", ""
        parts.append(said)
        kinds.append(kind)
    return _list(parts), kinds


_GROUPS = {
    BETTER: ("{n} is better", "{n} are better"),
    WORSE: ("{n} is worse", "{n} are worse"),
    OPEN: ("for {n} of them {seeds} cannot tell",) * 2,
    NO_EFFECT: ("{n} had no effect",) * 2,
    FAILED: ("{n} finished no run",) * 2,
    PENDING: ("{n} is not measured yet", "{n} are not measured yet"),
}
_LINK = {BETTER: "than", WORSE: "than", OPEN: "the difference to"}


def outcome(row: Mapping[str, Any], suffix: str = "") -> str:
    """One word for a row of the table: its verdict, or why there is none; ``suffix`` as in the table's columns."""
    verdict = row.get(f"verdict{suffix}")
    if verdict is None:
        return BASELINE
    if verdict in (BETTER, WORSE):
        return str(verdict)
    if row["no_effect"] and row[f"gain{suffix}"] == 0:
        return NO_EFFECT
    if row["seeds"]:
        return PENDING if suffix and row[f"gain{suffix}"] is None else OPEN
    return FAILED if row["failed_seeds"] or (row["failed_trials"] and row["selected_trial"] is None) else PENDING


def flags(row: Mapping[str, Any]) -> list[str]:
    """What a reader of the row must know besides its numbers: failures, no effect."""
    found = []
    if row["no_effect"]:
        found.append("no effect: the baseline's very weights")
    if row["failed_seeds"]:
        found.append(f"{row['failed_seeds']} of {_plural(row['failed_seeds'] + row['seeds'], 'seed')} failed")
    if row["failed_trials"]:
        every = row["selected_trial"] is None
        found.append("every trial failed" if every else f"{_plural(row['failed_trials'], 'trial')} failed")
    return found


def metric(value: float | None, low: float | None = None, high: float | None = None) -> str:
    """A mean and half the width of its interval, to two digits of that width.

    >>> metric(0.96213, 0.95793, 0.96633), metric(0.9621), metric(None)
    ('0.9621 ± 0.0042', '0.9621', '–')
    """
    if value is None:
        return NONE
    if low is None or high is None or high == low:
        return _plain(value, _decimals(value, digits=4))
    decimals = _decimals((high - low) / 2)
    return f"{_plain(value, decimals)} ± {_plain((high - low) / 2, decimals)}"


def gain(value: float | None, low: float | None = None, high: float | None = None) -> str:
    """A signed difference and its interval; a side without an end is infinite.

    >>> gain(0.0042, 0.0011, 0.0073), gain(-0.03, None, 0.01), gain(0.0, 0.0, 0.0)
    ('+0.0042 [+0.0011, +0.0073]', '−0.030 [−∞, +0.010]', '0')
    """
    if value is None:
        return NONE
    return f"{gain_value(value, low, high)} {gain_interval(value, low, high)}".strip()


def gain_value(value: float | None, low: float | None = None, high: float | None = None) -> str:
    """The first part of :func:`gain`: the signed difference alone."""
    return NONE if value is None else _signed(value, _gain_decimals(value, low, high))


def gain_interval(value: float | None, low: float | None = None, high: float | None = None) -> str:
    """The second part of :func:`gain`: the interval in brackets; nothing where there is none or it has no width."""
    if value is None or (low is not None and low == high):
        return ""
    decimals = _gain_decimals(value, low, high)
    return f"[{'−∞' if low is None else _signed(low, decimals)}, {'+∞' if high is None else _signed(high, decimals)}]"


def ratio(value: float | None) -> str:
    """
    >>> ratio(1.234), ratio(12.34), ratio(0.031)
    ('1.23×', '12×', '0.03×')
    """
    return NONE if value is None else f"{value:.0f}×" if value >= 9.995 else f"{value:.2f}×"


def bytes_(value: float | None) -> str:
    """
    >>> bytes_(512), bytes_(12_900_000), bytes_(3 * 2**30)
    ('512 B', '12.3 MiB', '3.0 GiB')
    """
    if value is None:
        return NONE
    power = min(4, max(0, math.floor(math.log2(max(value, 1)) / 10)))
    value, unit = value / 1024**power, ("B", "KiB", "MiB", "GiB", "TiB")[power]
    return f"{value:.0f} {unit}" if power == 0 or value >= 99.95 else f"{value:.1f} {unit}"


def per_parameter(state: float | None, parameters: float | None) -> str:
    """Bytes of optimizer state for each parameter of the model.

    >>> per_parameter(80_044, 10_000), per_parameter(0, 10_000)
    ('8.0', '0')
    """
    if state is None or not parameters:
        return NONE
    return f"{state / parameters:.1f}" if state else "0"


def seconds(value: float | None) -> str:
    """
    >>> seconds(0.0421), seconds(3.21), seconds(75), seconds(4000)
    ('42 ms', '3.2 s', '75 s', '67 min')
    """
    if value is None:
        return NONE
    if value < 0.9995:
        return f"{value * 1000:.0f} ms"
    if value < 9.95:
        return f"{value:.1f} s"
    return f"{value:.0f} s" if value < 120 else f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


def options(selected: Mapping[str, Any]) -> str:
    """Selected options in one line; the part an option belongs to is named where two parts have it.

    >>> options({"adamw.lr": 0.00316228, "ps-kd.alpha_T": 0.8}), options({"a.lr": 0.1, "b.lr": 1})
    ('lr=0.00316, alpha_T=0.8', 'a.lr=0.1, b.lr=1')
    """
    return ", ".join(option_words(selected))


def option_words(selected: Mapping[str, Any]) -> list[str]:
    """The same as a list."""
    last = [name.rpartition(".")[2] for name in selected]
    words = {word if last.count(word) == 1 else name: selected[name] for name, word in zip(selected, last, strict=True)}
    return [f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value}" for name, value in words.items()]


def seeds_needed(comparison: Comparison, arm: str, phase: str = "report") -> int | None:
    """How many seeds would settle an open comparison if gain and spread stayed; None if settled or not computable."""
    found = comparison.paired(arm, phase)
    finite = all(map(math.isfinite, (found.gain, found.low, found.high)))
    if found.missed or not finite or excludes_zero(found.low, found.high):
        return None
    return seeds_to_settle(found.n, (found.high - found.low) / 2, found.gain)


def excludes_zero(low: float | None, high: float | None) -> bool:
    """Whether an interval lies on one side of zero; an end that is None is infinite."""
    return (low is not None and low > 0) or (high is not None and high < 0)


def whole(number: float) -> str:
    """A whole number with its thousands set apart.

    >>> whole(19200) == "19\\u202f200"
    True
    """
    return _plain(number, 0)


def count(number: int) -> str:
    """A small number as a word.

    >>> count(5), count(40)
    ('five', '40')
    """
    return _WORDS[number] if 0 <= number < len(_WORDS) else str(number)


def _gain_decimals(value: float, low: float | None, high: float | None) -> int:
    halves = [abs(value - end) for end in (low, high) if end is not None and end != value]
    return _decimals(halves[0]) if halves else _decimals(value, digits=4)


def _decimals(size: float, digits: int = 2) -> int:
    """Decimal places that show ``digits`` significant digits of a size."""
    if not size or not math.isfinite(size):
        return digits
    return max(0, digits - 1 - math.floor(math.log10(abs(size))))


def _plain(value: float, decimals: int) -> str:
    far = abs(value) >= 1e9 or (decimals > 8 and value != 0)
    text = f"{value:.3g}" if far else f"{value:,.{min(decimals, 8)}f}"
    return text.replace("-", "−").replace(",", "\u202f")


def _signed(value: float, decimals: int) -> str:
    text = _plain(value, decimals)
    zero = not float(f"{value:.{decimals}f}")
    return ("0" if value == 0 else text.lstrip("−")) if zero else text if value < 0 else f"+{text}"


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _list(parts: Iterable[str]) -> str:
    *head, last = parts
    return f"{', '.join(head)}{',' if len(head) > 1 else ''} and {last}" if head else last
