"""The plots of a report, each a function or a method that returns SVG; an empty string where nothing is to be drawn."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

from assay.bench import svg, wording
from assay.bench.comparison import FINISHED, SELECTIONS, Comparison, seconds_factor
from assay.bench.statistics import BETTER, WORSE
from assay.bench.svg import BAD, BASELINE, GOOD, METHOD, MUTED, PAPER, Plot

Run = dict[str, Any]
_MARKS = {BETTER: ("^", GOOD), WORSE: ("v", BAD), wording.BASELINE: ("s", BASELINE)}
_OPEN_MARK = ("o", MUTED)


def _lines(comparison: Comparison, arm: str) -> dict[str, dict[str, Any]]:
    """How the lines of a method's panel look: the baseline dashed, the method over it."""
    dashed = {"color": BASELINE, "linestyle": (0, (4, 2)), "linewidth": 1.8}
    solid = {"color": METHOD, "linestyle": "-", "linewidth": 2.0}
    baseline = comparison.settings.baseline
    return {baseline: dashed} if arm == baseline else {baseline: dashed, arm: solid}


@svg.drawn
def gains(comparison: Comparison, suffix: str = "") -> Plot | None:
    """Forest plot: the gain of each method with its interval; the name above its line, the verdict at the right."""
    rows = comparison.table[1:]
    if not any(row.get(f"gain{suffix}") is not None for row in rows):
        return None
    clock = "seconds" if suffix else "examples"
    step = 36
    figure, axes = svg.canvas(
        f"Gain over {comparison.settings.baseline} at equal {clock}", step * len(rows) + 44, left=4, top=4
    )
    low, high = _gain_limits(comparison)
    axes.set(xlim=(low, high), ylim=(-len(rows), 0.06))
    axes.grid(False)
    axes.set_yticks([])
    axes.axvline(0, color=MUTED, linewidth=1)
    said = []
    under = {"facecolor": PAPER, "edgecolor": "none", "pad": 1.5}  # the line at 0 must not strike names through
    for place, row in enumerate(rows):
        value, ends = row.get(f"gain{suffix}"), (row.get(f"low{suffix}"), row.get(f"high{suffix}"))
        marker, colour = _MARKS.get(wording.outcome(row, suffix), _OPEN_MARK)
        axes.text(low, -place - 0.3, svg.short(row["method"]), va="center", fontsize=11.5, bbox=under)
        word = wording.outcome(row, suffix)
        ends = (value, value) if word == wording.NO_EFFECT else ends
        words = f"{wording.gain_value(value, *ends)}\u2002{word}" if value is not None else word
        axes.text(high, -place - 0.3, words, va="center", ha="right", color=colour, fontsize=11, bbox=under)
        said.append(f"{row['method']}: {wording.gain(value, *ends)}, {word}")
        if value is not None:
            _interval(axes, -place - 0.68, value, *ends, marker, colour)
    svg.ticks(axes)
    axes.yaxis.set_ticks([])
    svg.label(axes, f"← worse\u2003gain in {svg.short(comparison.settings.metric, 20)}\u2003better →")
    figure.description = "; ".join(said)
    return figure


def _gain_limits(comparison: Comparison) -> tuple[float, float]:
    """One range for both clocks. A method far off does not squeeze the others: its interval ends in an arrow."""
    table = comparison.table[1:]
    found = [
        [value for part in ("gain", "low", "high") if (value := row.get(part + suffix)) is not None]
        for row in table
        for suffix in ("", "_equal_seconds")
        if row.get("gain" + suffix) is not None
    ]
    reach = 4 * statistics.median(max(map(abs, values)) for values in found) or max(abs(v) for vs in found for v in vs)
    values = [max(-reach, min(reach, value)) for values in found for value in values] + [0.0]
    spread = (max(values) - min(values)) or 1.0
    return min(values) - 0.06 * spread, max(values) + 0.06 * spread


def _interval(
    axes: Axes, y: float, value: float, low: float | None, high: float | None, marker: str, colour: str
) -> None:
    left, right = axes.get_xlim()
    ends = [-math.inf if low is None else low, math.inf if high is None else high]
    shown = [min(right, max(left, end)) for end in ends]
    axes.plot(shown, [y, y], color=colour, linewidth=2, solid_capstyle="butt")
    for end, x in zip(ends, shown, strict=True):
        cap, edge = ("|", 1.5) if end == x else ("<", 0) if end < x else (">", 0)
        axes.plot([x], [y], marker=cap, markeredgewidth=edge, markersize=6, color=colour, clip_on=False)
    if left <= value <= right:
        axes.plot([value], [y], marker=marker, markersize=9, color=colour, markeredgecolor=PAPER, markeredgewidth=1.0)


class Curves:
    """Validation curves of one comparison against ``"examples"`` or ``"seconds"``, all on the same axes' ranges."""

    def __init__(self, comparison: Comparison, against: str) -> None:
        self.comparison, self.against = comparison, against
        self.runs = {arm: self._runs(arm) for arm in comparison.settings.arms}
        finished = [[r for r in runs if r["status"] == FINISHED] for runs in self.runs.values()]
        # Diverged runs may end anywhere; only where nothing finished do they set the range.
        chosen = finished if any(finished) else list(self.runs.values())
        curves = [[points for run in runs if (points := _points(run, against))] for runs in chosen]
        ends = [statistics.median(points[-1][0] for points in arm) for arm in curves if arm]
        later = [[y for points in arm for _, y in points[len(points) // 4 :]] for arm in curves]
        self.limits = (0.0, 1.02 * max(ends, default=1.0)), _range(later, comparison.settings.direction)

    def _runs(self, arm: str) -> list[Run]:
        """Those on fresh seeds; against seconds, those that had the baseline's seconds, where there are such."""
        timed = self.comparison.of(arm, "seconds") if self.against == "seconds" else []
        same_speed = seconds_factor(self.comparison, arm) == 1.0
        return timed if timed and not same_speed else self.comparison.of(arm, "report")

    def svg(self, arm: str) -> str:
        return str(_curve(self, arm))


@svg.drawn
def _curve(curves: Curves, arm: str) -> Plot | None:
    """One method's curve over the baseline's."""
    settings = curves.comparison.settings
    if not any(_points(run, curves.against) for run in curves.runs[arm]):
        return None
    figure, axes = svg.canvas(f"{arm}: validation {settings.metric} against {curves.against}", 200, left=44)
    said = []
    for name, line in _lines(curves.comparison, arm).items():
        x, middle, least, most = _band(curves.runs[name], curves.against)
        if not x:
            continue
        axes.fill_between(x, least, most, color=line["color"], alpha=0.18, linewidth=0)
        axes.plot(x, middle, marker="o" if len(x) == 1 else None, **line)
        said.append(f"{name} ends at {wording.metric(middle[-1])} (median)")
        for run in curves.runs[name]:
            if run["status"] != FINISHED and (points := _points(run, curves.against)):
                axes.plot(*points[-1], marker="x", markersize=7, markeredgewidth=2, color=BAD, zorder=5)
    axes.set(xlim=curves.limits[0], ylim=curves.limits[1])
    svg.ticks(axes, y=4)
    svg.label(
        axes,
        "seconds of training" if curves.against == "seconds" else "training examples",
        f"validation {settings.metric}",
    )
    figure.description = "; ".join(said)
    return figure


def _points(run: Run, against: str) -> list[tuple[float, float]]:
    """(x, validation) wherever both are numbers."""
    pairs = [(point.get(against), point.get("validation")) for point in run.get("curve") or []]
    return [(x, y) for x, y in pairs if x is not None and y is not None]


def _band(runs: Iterable[Run], against: str) -> tuple[list[float], list[float], list[float], list[float]]:
    """Median, smallest and largest value over the runs at each evaluation."""
    columns: list[list[tuple[float, float]]] = []
    for run in runs:
        for i, point in enumerate(_points(run, against)):
            columns[i:] = columns[i:] or [[]]
            columns[i].append(point)
    ys = [[y for _, y in column] for column in columns]
    x = [statistics.median(x for x, _ in column) for column in columns]
    return x, [statistics.median(y) for y in ys], [min(y) for y in ys], [max(y) for y in ys]


def _range(values: Iterable[Sequence[float]], direction: str) -> tuple[float, float]:
    """A range for all arms' values from the best one down; an arm far off does not squeeze the others."""
    groups = [group for group in values if group]
    if not groups:
        return 0.0, 1.0
    best = max(map(max, groups)) if direction == "max" else min(map(min, groups))
    reaches = [max(abs(best - value) for value in group) for group in groups]
    reach = min(max(reaches), 4 * statistics.median(reaches) or math.inf) or 0.05 * abs(best) or 0.5
    low, high = (best - reach, best) if direction == "max" else (best, best + reach)
    return low - 0.08 * reach, high + 0.08 * reach


class Tuning:
    """How the best validation value grew with the number of trials; one range for all panels."""

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        score, direction = SELECTIONS[comparison.settings.select], comparison.settings.direction
        self.scores = {
            arm: [
                (run["trial"] + 1, score(run, direction) if run["status"] == FINISHED else None)
                for run in comparison.of(arm, "tune")
            ]
            for arm in comparison.settings.arms
        }
        self.limits = _range([[value for _, value in self.best(arm)] for arm in self.scores], direction)

    def best(self, arm: str) -> list[tuple[int, float]]:
        """(trials made, best value so far)."""
        pick = max if self.comparison.settings.direction == "max" else min
        found: list[tuple[int, float]] = []
        for trial, value in self.scores[arm]:
            seen = [v for v in (found[-1][1] if found else None, value) if v is not None]
            if seen:
                found.append((trial, pick(seen)))
        return found

    def svg(self, arm: str) -> str:
        return str(_tuning(self, arm))


@svg.drawn
def _tuning(tuning: Tuning, arm: str) -> Plot | None:
    settings = tuning.comparison.settings
    if not tuning.scores[arm]:
        return None
    figure, axes = svg.canvas(f"{arm}: best validation {settings.metric} against number of trials", 180, left=44)
    low, high = tuning.limits
    axes.set(xlim=(0.6, settings.trials + 0.4), ylim=(low, high))
    said = []
    for name, line in _lines(tuning.comparison, arm).items():
        best = tuning.best(name)
        if best:
            axes.step(*zip(*best, strict=True), where="post", **line)
            said.append(f"{name}: best {wording.metric(best[-1][1])} after {len(tuning.scores[name])} trials")
    on_top: dict[str, Any] = {"zorder": 5, "clip_on": False}
    for trial, value in tuning.scores[arm]:
        if value is None:
            axes.plot([trial], [low + 0.05 * (high - low)], marker="x", markersize=7, mew=2, color=BAD, **on_top)
        else:
            axes.plot([trial], [min(high, max(low, value))], marker="o", markersize=5, color=line["color"], **on_top)
    svg.ticks(axes, x=min(8, settings.trials), y=4, whole=True)
    svg.label(axes, "trials", f"best validation {settings.metric}")
    figure.description = "; ".join(said)
    return figure


@svg.drawn
def cost(comparison: Comparison, of: str) -> Plot | None:
    """Test metric with its interval against a column of costs: ``time_ratio`` or ``peak_memory``."""
    unit = {"time_ratio": 1.0, "peak_memory": 2.0**20}[of]
    label = {"time_ratio": "training time, in multiples of the baseline's", "peak_memory": "peak memory, MiB"}[of]
    rows = [row for row in comparison.table if row["test"] is not None and row[of] is not None]
    if not rows:
        return None
    metric = comparison.settings.metric
    figure, axes = svg.canvas(f"Test {metric} against {label}", max(230, 14 * len(rows) + 90), left=44)
    xs, ys = [row[of] / unit for row in rows], [row["test"] for row in rows]
    wide = min(xs) > 0 and max(xs) / min(xs) > 8
    axes.set_xscale("log" if wide else "linear")
    spread = (max(xs) - min(xs)) or max(xs) or 1.0
    axes.set_xlim((min(xs) / 1.6, max(xs) * 1.6) if wide else (min(xs) - 0.12 * spread, max(xs) + 0.12 * spread))
    bars = []
    for row, x in zip(rows, xs, strict=True):
        marker, colour = _MARKS.get(wording.outcome(row), _OPEN_MARK)
        low, high = row["test_low"], row["test_high"]
        if low is not None and high is not None:
            axes.plot([x, x], [low, high], color=colour, linewidth=1.2, alpha=0.7)
            bars.append((x, low, high))
        axes.plot([x], [row["test"]], marker=marker, markersize=8, color=colour, markeredgecolor=PAPER)
    axes.margins(y=0.1)
    axes.set_ylim(axes.get_ylim())  # as drawn so far: names are placed by it
    svg.ticks(axes)
    if wide:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.minorticks_off()
    _name_points(axes, [row["method"] for row in rows], xs, ys, bars)
    svg.label(axes, label, f"test {metric}")
    figure.description = "; ".join(
        f"{row['method']}: {wording.metric(row['test'], row['test_low'], row['test_high'])} at {x:.3g}"
        for row, x in zip(rows, xs, strict=True)
    )
    return figure


def _name_points(
    axes: Axes, names: Sequence[str], xs: Sequence[float], ys: Sequence[float], bars: Iterable[tuple[float, ...]]
) -> None:
    """A name near each point, at the first of many places where it meets no point, no bar and no other name."""
    scale = 72 / axes.figure.dpi
    points = [axes.transData.transform(point) * scale for point in zip(xs, ys, strict=True)]
    taken = [(x - 5, x + 5, y - 5, y + 5) for x, y in points]
    for x, low, high in bars:
        (a, b), (_, c) = (axes.transData.transform((x, end)) * scale for end in (low, high))
        taken.append((a - 1, a + 1, b, c))
    left, right, bottom, top = (scale * edge for edge in (axes.bbox.x0, axes.bbox.x1, axes.bbox.y0, axes.bbox.y1))
    for i, name in enumerate(names):
        width, (x, y) = 6.6 * len(svg.short(name, 24)) + 4, points[i]
        boxes: list[tuple[bool, float, int, tuple[float, float, float, float]]] = []
        for rise in (0, 13, -13, 26, -26, 39, -39, 52, -52, 65, -65):
            for start in (x + 9, x - 9 - width, x - width / 2 if abs(rise) == 13 else x + 9):
                box = (start, start + width, y + rise - 6, y + rise + 6)
                outside = sum(max(0.0, gap) for gap in (left - box[0], box[1] - right, bottom - box[2], box[3] - top))
                boxes.append((outside > 0 or any(_overlap(box, other) for other in taken), outside, len(boxes), box))
        box = min(boxes)[-1]
        taken.append(box)
        far = abs((box[2] + box[3]) / 2 - y) > 14
        arrow = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 5} if far else None
        axes.annotate(
            svg.short(name, 24),
            (xs[i], ys[i]),
            xytext=(box[0] - x if box[0] >= x - width / 2 else box[1] - x, box[2] + 6 - y),
            textcoords="offset points",
            horizontalalignment="left" if box[0] >= x - width / 2 else "right",
            verticalalignment="center",
            fontsize=10.5,
            arrowprops=arrow,
        )


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[1] and other[0] < one[1] and one[2] < other[3] and other[2] < one[3]
