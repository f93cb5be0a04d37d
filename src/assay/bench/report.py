"""The report of a comparison: one HTML file that needs nothing else, made from the records alone. No torch."""

from __future__ import annotations

import datetime
import re
import shlex
import statistics
from collections.abc import Iterable
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from assay.bench import plots, wording
from assay.bench.comparison import FINISHED, Comparison, seconds_factor, selected_trial

_STEADY = 1.5
DIVERGED = "diverged"
_SUFFIXES = {"examples": "", "seconds": "_equal_seconds"}
_PHASES = {"tune": "tuning", "report": "fresh seeds", "seconds": "fresh seeds at equal seconds"}


def html_report(comparison: Comparison) -> str:
    """The page: answer, table, plots, failures, and how it was measured.

    It loads nothing (no script, no font, no picture from elsewhere), follows the reader's light or dark setting, and
    is readable on a phone and on paper.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["breakable"] = _breakable
    source = resources.files("assay.bench").joinpath("report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        s=comparison.settings,
        say=wording,
        comparison=comparison,
        rows=_rows(comparison),
        clocks=["examples", *(["seconds"] if comparison.settings.equal_seconds else [])],
        plots=_plots(comparison),
        failures=_failures(comparison),
        diverged=any(r["status"] == DIVERGED and r["phase"] != "tune" for r in comparison.records),
        failed_trials=any(r["status"] != FINISHED and r["phase"] == "tune" for r in comparison.records),
        no_effect=[arm for arm in comparison.settings.arms if comparison.no_effect(arm)],
        unsteady=_unsteady(comparison),
        progress=_progress(comparison),
        places=_places(comparison),
        facts=_facts(comparison),
        call=python_call(comparison),
        command=command(comparison),
        repeatable=_by_name(comparison),
    )


def _breakable(name: str) -> Markup:
    """A name that a narrow column may break after its brackets, commas and signs."""
    return Markup("<wbr>").join(re.findall(r"[^(,+=_]*[(,+=_]?", name))


def _rows(comparison: Comparison) -> list[dict[str, Any]]:
    """The table's rows, in words."""
    rows = []
    for row in comparison.table:
        arm = row["method"]
        value, _, half = wording.metric(row["test"], row["test_low"], row["test_high"]).partition(" ± ")
        rows.append(
            {
                "method": arm,
                "baseline": arm == comparison.settings.baseline,
                "flags": wording.flags({**row, "no_effect": False}),  # the verdict says that
                "test": value,
                "half": half,
                "gains": {clock: _gain(comparison, row, clock) for clock in _SUFFIXES},
                "ratio": wording.ratio(row["time_ratio"]),
                "seconds": wording.seconds(row["seconds"]) if row["seconds"] else "",
                "memory": wording.bytes_(row["peak_memory"]),
                "state": wording.per_parameter(row["optimizer_bytes"], row["parameters"]),
                "options": wording.option_words(row["selected"]),
                "trial": row["selected_trial"],
            }
        )
    return rows


def _gain(comparison: Comparison, row: dict[str, Any], clock: str) -> dict[str, str]:
    """Gain, interval, verdict and remarks, at equal examples or equal seconds."""
    suffix = _SUFFIXES[clock]
    value, low, high = (row.get(part + suffix) for part in ("gain", "low", "high"))
    outcome = wording.outcome(row, suffix)
    return {
        "value": wording.gain_value(value, low, high),
        "interval": "" if outcome == wording.NO_EFFECT else wording.gain_interval(value, low, high),
        "outcome": outcome,
        "kind": outcome.replace(" ", "-"),
        "remark": _why_open(comparison, row, clock) if outcome == wording.OPEN and value is not None else "",
        "steps": _steps_in_time(comparison, row) if clock == "seconds" and value is not None else "",
    }


def _why_open(comparison: Comparison, row: dict[str, Any], clock: str) -> str:
    """What keeps a verdict open: Holm's correction, or too few seeds."""
    suffix = _SUFFIXES[clock]
    if wording.excludes_zero(row["low" + suffix], row["high" + suffix]):
        return f"p = {row['p' + suffix]:.2g} (Holm)"
    needed = wording.seeds_needed(comparison, row["method"], "seconds" if suffix else "report")
    return f"≈ {wording.whole(needed)} seeds" if needed else ""


def _steps_in_time(comparison: Comparison, row: dict[str, Any]) -> str:
    """Steps and seconds that a run at equal seconds really had."""
    if seconds_factor(comparison, row["method"]) == 1.0:
        return "same runs"
    runs = [run for run in comparison.of(row["method"], "seconds") if run["status"] == FINISHED and run["seconds"]]
    if not runs:
        return ""
    usual = statistics.median(run["seconds"] for run in runs)
    return f"{wording.whole(row['steps_equal_seconds'])} steps, {wording.seconds(usual)}"


def _plots(comparison: Comparison) -> dict[str, Any]:
    """All plots as safe markup: what comes from records is escaped in them already."""
    settings = comparison.settings
    curves = {against: plots.Curves(comparison, against) for against in ("examples", "seconds")}
    tuning = plots.Tuning(comparison)
    others = settings.arms[1:] or settings.arms
    tuned = others if settings.trials > 1 else []
    clocks = _SUFFIXES if settings.equal_seconds else {"examples": ""}
    return {
        "gains": {clock: Markup(plots.gains(comparison, suffix)) for clock, suffix in clocks.items()},
        "curves": {a: _panels((arm, curve.svg(arm)) for arm in others) for a, curve in curves.items()},
        "tuning": _panels((arm, tuning.svg(arm)) for arm in tuned),
        "cost": {of: Markup(plots.cost(comparison, of)) for of in ("time_ratio", "peak_memory")},
    }


def _panels(drawn: Iterable[tuple[str, str]]) -> list[tuple[str, Markup]]:
    return [(name, Markup(svg)) for name, svg in drawn if svg]


def _failures(comparison: Comparison) -> list[dict[str, Any]]:
    """Runs that did not finish, those of a method with one status and message together."""
    groups: dict[tuple[str, str, str, str], list[dict[str, Any]]] = {}
    for arm in comparison.settings.arms:
        for phase in _PHASES:
            for run in comparison.of(arm, phase):
                if run["status"] != FINISHED:
                    groups.setdefault((arm, phase, run["status"], run.get("message") or ""), []).append(run)
    found = []
    for (arm, phase, status, message), runs in groups.items():
        tuning = phase == "tune"
        which = sorted({run["trial"] if tuning else run["seed"] for run in runs})
        found.append(
            {
                "method": arm,
                "status": status,
                "message": message,
                "phase": _PHASES[phase],
                "count": len(runs),
                "which": f"{'trial' if tuning else 'seed'}{'s' * (len(which) > 1)} {', '.join(map(str, which))}",
                "options": list(dict.fromkeys(wording.options(run["options"]) for run in runs))[:3],
                "steps": _span(sorted({run["steps"] for run in runs if run.get("steps") is not None})),
            }
        )
    return found


def _span(numbers: list[int]) -> str:
    return " to ".join(dict.fromkeys((wording.whole(numbers[0]), wording.whole(numbers[-1])))) if numbers else ""


def _progress(comparison: Comparison) -> dict[str, int]:
    settings = comparison.settings
    tuned = {arm: len(comparison.of(arm, "tune")) == settings.trials for arm in settings.arms}
    lost = sum(tuned[arm] and selected_trial(comparison, arm) is None for arm in settings.arms)
    phases = {phase: sum(r["phase"] == phase for r in comparison.records) for phase in _PHASES}
    return {
        "runs": len(comparison.records),
        "tuned": phases["tune"],
        "to_tune": settings.trials * len(settings.arms),
        "reported": phases["report"],
        "to_report": settings.seeds * (len(settings.arms) - lost),
    }


def _unsteady(comparison: Comparison) -> float | None:
    """How many times as long the slowest run of a method took as its fastest, if that is enough to doubt seconds."""
    spreads = []
    for arm in comparison.settings.arms:
        taken = [r["seconds"] for r in comparison.of(arm, "report") if r["status"] == FINISHED and r["seconds"]]
        spreads += [max(taken) / min(taken)] if len(taken) > 1 else []
    usual = statistics.median(spreads) if spreads else 1.0
    return usual if usual > _STEADY else None


def _places(comparison: Comparison) -> list[dict[str, Any]]:
    """The machines and versions that the records name; more than one makes seconds hard to compare."""
    found: list[dict[str, Any]] = []
    for run in comparison.records or [comparison.settings.environment]:
        place = {"machine": run.get("machine") or {}, "versions": run.get("versions") or {}}
        if place not in found:
            found.append(place)
    return found


def _facts(comparison: Comparison) -> list[tuple[str, str]]:
    """What was asked for, as pairs for a list."""
    settings, budget = comparison.settings, comparison.settings.budget
    steps, examples = wording.whole(budget["steps"]), wording.whole(budget["steps"] * budget["batch_size"])
    seeds = settings.report_seeds
    moments = [r["started"] for r in comparison.records if r.get("started")]
    days = sorted({datetime.datetime.fromtimestamp(moment, datetime.UTC).date() for moment in moments})
    spent = sum(r.get("seconds") or 0.0 for r in comparison.records)
    facts = [
        ("Task", f"{settings.task}: {settings.about}" if settings.about else settings.task),
        ("Baseline", settings.baseline),
        ("Budget of a run", f"{steps} steps of {budget['batch_size']} = {examples} examples"),
        ("Evaluations in a run", str(budget["evaluations"])),
        ("Trials", f"{settings.trials} for each method" if settings.trials > 1 else "none, defaults only"),
        ("Selected by", f"{settings.select} validation {settings.metric}" if settings.trials > 1 else "not applicable"),
        ("Fresh seeds", f"{seeds[0]} to {seeds[-1]}"),
        ("Device", settings.device),
        ("Runs", f"{len(comparison.records)}, {wording.seconds(spent)} of training"),
    ]
    if days:
        facts.append(("Made", " to ".join(dict.fromkeys((days[0].isoformat(), days[-1].isoformat())))))
    return [*facts, ("Code", settings.code)]


def _by_name(comparison: Comparison) -> bool:
    """Whether the task was asked for by a name that a command can repeat, not given as an object."""
    asked = comparison.settings.asked
    return ".py:" in asked or asked.partition("(")[0] in ("digits", "tabular", "text")


def command(comparison: Comparison) -> str:
    """The shell command that makes this comparison again."""
    settings, budget = comparison.settings, comparison.settings.budget
    words = ["assay", "compare"]
    for name, value in (
        ("task", settings.asked if _by_name(comparison) else "FILE.py:NAME"),
        ("methods", ",".join(settings.arms[1:] or settings.arms)),
        ("baseline", settings.baseline),
        ("trials", settings.trials),
        ("seeds", settings.seeds),
        ("steps", budget["steps"]),
        ("batch-size", budget["batch_size"]),
        ("select", settings.select),
        ("device", settings.device),
    ):
        words += [f"--{name}", shlex.quote(str(value))]
    return " ".join(words + ([] if settings.equal_seconds else ["--no-equal-seconds"]))


def python_call(comparison: Comparison) -> str:
    """The Python call that makes this comparison again."""
    settings, budget = comparison.settings, comparison.settings.budget
    task = repr(settings.asked) if _by_name(comparison) else "task"
    arguments = [task, repr(settings.arms[1:] or settings.arms), f"baseline={settings.baseline!r}"]
    arguments += [f"trials={settings.trials}", f"seeds={settings.seeds}"]
    arguments += [f"steps={budget['steps']}", f"batch_size={budget['batch_size']}", f"select={settings.select!r}"]
    arguments += [] if settings.equal_seconds else ["equal_seconds=False"]
    arguments += [] if settings.device == "cpu" else [f"device={settings.device!r}"]
    return "assay.compare(\n    " + ",\n    ".join(arguments) + ",\n)"
