"""What the command line shows: tables, progress, verdicts. Quiet where nobody watches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from assay.bench import wording
from assay.bench.comparison import Comparison
from assay.bench.evidence import Evidence

_STYLE = {"better": "green", "worse": "red", "holds": "green", "does not hold": "red"}
_PHASES = {"tune": "tuning", "report": "fresh seeds", "seconds": "equal seconds"}


def _progress(console: Console, *, transient: bool) -> Progress:
    text, best = TextColumn("{task.description}"), TextColumn("{task.fields[best]}")
    columns = (text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), best)
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=transient)


@contextlib.contextmanager
def bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error, or nothing when that is no terminal."""
    with _progress(Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=None, best="")
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextlib.contextmanager
def watch() -> Iterator[Callable[[str, int, int, Comparison], None]]:
    """A bar for each phase of a comparison: runs done, time left, best validation value so far."""
    with _progress(Console(stderr=True), transient=False) as progress:
        bars: dict[str, Any] = {}

        def update(phase: str, done: int, total: int, comparison: Comparison) -> None:
            if phase not in bars:
                bars[phase] = progress.add_task(f"{_PHASES[phase]:>13}", total=None, best="")
            progress.update(bars[phase], completed=done, total=total or None, best=_best(comparison, phase))

        yield update


def _best(comparison: Comparison, phase: str) -> str:
    values = [
        (record["validation"], record["arm"])
        for record in comparison.records
        if record["phase"] == phase and record.get("validation") is not None
    ]
    if not values:
        return ""
    value, arm = (max if comparison.settings.direction == "max" else min)(values)
    return f"best {comparison.settings.metric} {value:.4g} ({arm})"


def _console() -> Console:
    """A terminal as wide as it is; a file or a pipe wide enough that no cell is cut."""
    console = Console()
    return console if console.is_terminal else Console(width=160)


def print_comparison(comparison: Comparison) -> None:
    """The table of a comparison, the answer in words above it."""
    console = _console()
    console.print(f"\n[bold]{wording.answer(comparison)}[/]", highlight=False)
    console.print(f"{wording.answer_at_equal_seconds(comparison)}\n", highlight=False)
    settings = comparison.settings
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in (
        "method",
        f"test {settings.metric}",
        "gain",
        "verdict",
        "equal seconds",
        "time",
        "peak memory",
        "notes",
    ):
        table.add_column(title, justify="left" if title in ("method", "verdict", "notes") else "right")
    for row in comparison.table:
        table.add_row(
            row["method"],
            wording.metric(row["test"], row["test_low"], row["test_high"]),
            wording.gain(row.get("gain"), row.get("low"), row.get("high")),
            _styled(wording.outcome(row) if "verdict" in row else "baseline"),
            _styled(wording.outcome(row, "_equal_seconds")) if settings.equal_seconds and "verdict" in row else "",
            wording.ratio(row["time_ratio"]),
            wording.bytes_(row["peak_memory"]),
            "; ".join(wording.flags(row)),
        )
    console.print(table)
    for row in comparison.table:
        if row["failure"]:
            console.print(f"{row['method']}: {row['failure']}", highlight=False, markup=False, soft_wrap=True)
    console.print()


def print_evidence(evidence: Evidence) -> None:
    """Rows (means by variant), checks with intervals, notes and the verdict of a claim."""
    console = _console()
    variants = list(dict.fromkeys(row["variant"] for row in evidence.rows))
    metrics = list(dict.fromkeys(
        name for row in evidence.rows for name, value in row.items()
        if isinstance(value, (int, float)) and name not in ("seed", "variant")
    ))  # fmt: skip
    table = Table("variant", "seeds", *metrics, box=None, header_style="bold", pad_edge=False)
    for variant in variants:
        rows = [row for row in evidence.rows if row["variant"] == variant]
        cells = []
        for name in metrics:
            values = [row[name] for row in rows if row.get(name) is not None]
            cells.append(f"{sum(values) / len(values):.4g}" if values else "")
        table.add_row(variant, str(len(rows)), *cells)
    console.print(table)
    console.print()
    for check in evidence.checks:
        sign = {"<=": "at most", ">=": "at least"}[check.sense]
        interval = "" if check.low == check.high else f" \\[{check.low:.4g}, {check.high:.4g}]"
        needed = f" (about {check.seeds_needed} seeds would settle it)" if check.seeds_needed else ""
        console.print(
            f"{_styled(check.verdict)}: {check.name}: {check.observed:.4g}{interval}, {sign} {check.bound:.4g}{needed}",
            highlight=False,
        )
    for note in evidence.notes:
        console.print(f"note: {note}", highlight=False, markup=False)
    console.print(f"\nverdict: [bold]{_styled(evidence.verdict)}[/]")


def _styled(word: str) -> str:
    return f"[{_STYLE[word]}]{word}[/]" if word in _STYLE else word
