"""What a comparison found, recomputed from its records; no torch, so that a report opens at once."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from assay.bench.records import Records, write_text
from assay.bench.statistics import Paired, holm, mean_interval, paired, verdicts

FIRST_REPORT_SEED = 100
FINISHED, FAILED = "finished", "failed"
_SAME_SPEED = 0.03


@dataclass(frozen=True)
class Settings:
    """What was asked for, and where it ran; ``asked`` is the task as it was named, ``task`` its own name."""

    asked: str
    task: str
    about: str
    metric: str
    direction: str
    baseline: str
    arms: list[str]
    trials: int
    seeds: int
    budget: dict[str, int]
    select: str
    equal_seconds: bool
    device: str
    environment: dict[str, Any]
    code: str
    test_examples: int = 0

    def __post_init__(self) -> None:
        if self.select not in SELECTIONS:
            raise ValueError(f"select = {self.select!r} is out of range: one of {', '.join(SELECTIONS)}")

    @property
    def report_seeds(self) -> list[int]:
        return list(range(FIRST_REPORT_SEED, FIRST_REPORT_SEED + self.seeds))

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)


@dataclass
class Comparison:
    """Settings and records; everything else is computed from them.

    ``table`` has one dict per arm, the baseline first; ``to_pandas`` the same as a DataFrame; ``save`` writes a
    report (``.html``), a table (``.csv``) or table, settings and curves (``.json``), by the file's ending.
    """

    settings: Settings
    records: list[dict[str, Any]]
    damaged: int = 0
    interrupted: bool = False
    reused: int = 0

    def of(self, arm: str, phase: str) -> list[dict[str, Any]]:
        """Records of an arm in a phase, ordered by trial and seed."""
        chosen = [r for r in self.records if r["arm"] == arm and r["phase"] == phase]
        return sorted(chosen, key=lambda r: (r["trial"], r["seed"]))

    @property
    def complete(self) -> bool:
        """Whether every arm that could be selected was run on every report seed, and at equal seconds where asked."""
        wanted = [("report", arm) for arm in self.settings.arms if selected_trial(self, arm) is not None]
        if self.settings.equal_seconds:
            wanted += [("seconds", arm) for arm in self.settings.arms[1:] if self.needs_seconds(arm)]
        return not self.interrupted and all(len(self.of(arm, phase)) == self.settings.seeds for phase, arm in wanted)

    @property
    def table(self) -> list[dict[str, Any]]:
        """One row per arm: test metric, gain over the baseline with interval and verdict, cost, what was selected."""
        rows = [self._row(arm) for arm in self.settings.arms]
        for phase, suffix in (("report", ""), ("seconds", "_equal_seconds")):
            results = [self.paired(arm, phase) for arm in self.settings.arms[1:]]
            answers = zip(results, holm([r.p for r in results]), verdicts(results), strict=True)
            for row, (result, p, verdict) in zip(rows[1:], answers, strict=True):
                found = {"gain": result.gain, "low": result.low, "high": result.high, "p": p, "verdict": verdict}
                if row["no_effect"]:  # equal weights: the difference is known, not estimated
                    found |= {"gain": 0.0, "low": 0.0, "high": 0.0}
                if row["inapplicable"]:  # it was never trained: that is no bad result
                    found |= {"verdict": FAILED}
                row.update({f"{name}{suffix}": _number(value) for name, value in found.items()})
        return rows

    def to_pandas(self) -> Any:
        """The table as a pandas DataFrame."""
        import pandas

        return pandas.DataFrame(self.table)

    def paired(self, arm: str, phase: str = "report") -> Paired:
        """The arm against the baseline on the test data, seed by seed (or at equal seconds)."""
        base = _by_seed(self.of(self.settings.baseline, "report"))
        if phase == "seconds" and not self.needs_seconds(arm):
            phase = "report"
        mine = _by_seed(self.of(arm, phase))
        seeds = [seed for seed in self.settings.report_seeds if seed in base and seed in mine]
        settings = self.settings
        return paired([mine[s] for s in seeds], [base[s] for s in seeds], settings.direction, settings.test_examples)

    def needs_seconds(self, arm: str) -> bool:
        """Whether equal seconds want runs of their own: not at the baseline's speed, and not with its very weights."""
        return seconds_factor(self, arm) not in (None, 1.0) and not self.no_effect(arm)

    def _row(self, arm: str) -> dict[str, Any]:
        report, tuning = self.of(arm, "report"), self.of(arm, "tune")
        finished = [r for r in report if r["status"] == FINISHED]
        mean, low, high = mean_interval([r["test"] for r in finished])
        trial = selected_trial(self, arm)
        selected: dict[str, Any] = next((r["options"] for r in report), {})
        parameters = _median(r["parameters"] for r in finished)
        state = _median(r["optimizer_bytes"] for r in finished)
        failures = [r for r in report + tuning if r["status"] != FINISHED]
        return {
            "method": arm,
            "test": _number(mean),
            "test_low": _number(low),
            "test_high": _number(high),
            "seeds": len(finished),
            "failed_seeds": len(report) - len(finished),
            "failed_trials": sum(r["status"] != FINISHED for r in tuning),
            "failure": _failure(failures),
            "no_effect": self.no_effect(arm),
            "inapplicable": bool(report) and all(r["status"] == "error" for r in report),
            "selected_trial": trial,
            "selected": selected,
            "seconds": _median(r["seconds"] for r in finished),
            "preparation": _median(r["preparation"] for r in finished),
            "time_ratio": time_ratio(self, arm),
            "steps": _median(r["steps"] for r in finished),
            "steps_equal_seconds": _median(r["steps"] for r in self.of(arm, "seconds") if r["status"] == FINISHED),
            "peak_memory": _median(r["peak_memory"] for r in finished),
            "optimizer_bytes": state,
            "parameters": parameters,
            "tuning_seconds": sum(r.get("seconds") or 0.0 for r in tuning),
        }

    def no_effect(self, arm: str) -> bool:
        """Whether every run of the arm ended in exactly the weights of the baseline's run of that trial and seed."""
        pairs = []
        for phase in ("tune", "report"):
            base, mine = (
                {
                    (r["trial"], r["seed"]): r["fingerprint"] if r["status"] == FINISHED else ""
                    for r in self.of(a, phase)
                }
                for a in (self.settings.baseline, arm)
            )
            pairs += [(base[run], mine[run]) for run in mine if run in base]
        return arm != self.settings.baseline and bool(pairs) and all(a and a == b for a, b in pairs)

    def save(self, path: str | Path) -> Path:
        """Write the report (``.html``), the table (``.csv``) or all (``.json``); the file is whole or not there."""
        target = Path(path)
        if target.suffix == ".html":
            from assay.bench.report import html_report

            text = html_report(self)
        elif target.suffix == ".csv":
            text = self.to_csv()
        elif target.suffix == ".json":
            text = self.to_json()
        else:
            raise ValueError(f"path = {str(path)!r} is out of range: a file ending in .html, .csv or .json")
        write_text(target, text)
        return target

    def to_json(self) -> str:
        """Settings, table and the curve of every reported run."""
        names = ("arm", "phase", "trial", "seed", "status", "validation", "test", "curve")
        runs = [{name: record.get(name) for name in names} for record in sorted(self.records, key=_order)]
        return json.dumps({"settings": asdict(self.settings), "table": self.table, "runs": runs}, indent=1)

    def to_csv(self) -> str:
        """The table, options as ``name=value`` words."""
        rows = [{**row, "selected": " ".join(f"{k}={v}" for k, v in row["selected"].items())} for row in self.table]
        names = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()


def load(folder: str | Path) -> Comparison:
    """The comparison of a folder that ``assay compare`` wrote; raises ValueError where there is none."""
    folder = Path(folder)
    try:
        said = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        settings = Settings(**said)
    except OSError as error:
        raise ValueError(f"{folder} holds no comparison: {error.strerror} (settings.json)") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder}/settings.json cannot be read: {error}") from error
    store = Records(folder / "records.jsonl")
    wanted = [r for r in store.lines if _belongs(r, settings)]
    comparison = Comparison(settings, [r for r in wanted if r["phase"] != "seconds"], damaged=store.damaged)
    for arm in settings.arms[1:]:
        factor = seconds_factor(comparison, arm)
        steps = max(1, round(settings.budget["steps"] * factor)) if factor else None
        comparison.records += [
            r for r in wanted if r["phase"] == "seconds" and r["arm"] == arm and r["budget"]["steps"] == steps
        ]
    return comparison


def _belongs(record: dict[str, Any], settings: Settings) -> bool:
    same_budget = record["phase"] == "seconds" or record["budget"] == settings.budget
    in_range = record["trial"] < max(1, settings.trials)
    if record["phase"] != "tune":
        in_range = in_range and record["seed"] in settings.report_seeds
    return (
        same_budget
        and in_range
        and record["code"] == settings.code
        and record["base"] == settings.baseline
        and record["arm"] in settings.arms
        and record["device"] == settings.device
        and str(record["task"]).split(" ")[0] == settings.task.split(" ")[0]
    )


def _final(record: dict[str, Any]) -> float | None:
    return record.get("validation")


def _best(record: dict[str, Any], direction: str = "max") -> float | None:
    values = [point["validation"] for point in record.get("curve", []) if point["validation"] is not None]
    pick = max if direction == "max" else min
    return pick(values, default=None)


SELECTIONS = {"final": lambda record, _: _final(record), "best": _best}
"""How a trial is scored, by name, from its validation values alone."""


def selected_trial(comparison: Comparison, arm: str) -> int | None:
    """The trial that validation data picks; 0 without tuning, None if all trials failed.

    Of trials with equal values, as accuracies on few examples often are, the one with the lowest validation loss.
    """
    settings = comparison.settings
    if settings.trials == 0:
        return 0
    score = SELECTIONS[settings.select]
    sign = 1 if settings.direction == "max" else -1
    scored = [
        (sign * value, -(record.get("validation_loss") or 0.0), -record["trial"])
        for record in comparison.of(arm, "tune")
        if record["status"] == FINISHED and (value := score(record, settings.direction)) is not None
    ]
    return -max(scored)[2] if scored else None


def time_ratio(comparison: Comparison, arm: str) -> float | None:
    """Training time as a multiple of the baseline's: the median over seeds, whose runs are made close together."""
    base = _by_seed(comparison.of(comparison.settings.baseline, "report"), "seconds")
    mine = _by_seed(comparison.of(arm, "report"), "seconds")
    pairs = [(seconds, base.get(seed)) for seed, seconds in mine.items()]
    return _median(seconds / other for seconds, other in pairs if seconds and other)


def seconds_factor(comparison: Comparison, arm: str) -> float | None:
    """Share of the budget's steps that fit into the baseline's seconds; 1.0 within 3 %, None if nothing finished.

    Preparation is taken to grow with the steps, as that of the methods here does.
    """
    ratio = time_ratio(comparison, arm)
    if ratio is None:
        return None
    return 1.0 if abs(1 / ratio - 1) <= _SAME_SPEED else max(0.02, min(4.0, 1 / ratio))


def _by_seed(records: list[dict[str, Any]], name: str = "test") -> dict[int, float | None]:
    return {r["seed"]: r.get(name) if r["status"] == FINISHED else None for r in records}


def _order(record: dict[str, Any]) -> tuple[str, str, int, int]:
    return record["arm"], record["phase"], record["trial"], record["seed"]


def _failure(failures: list[dict[str, Any]]) -> str:
    kinds = list(dict.fromkeys(f["status"] + (f": {f['message']}" if f.get("message") else "") for f in failures))
    return "; ".join(kinds)


def _median(values: Iterable[float | None]) -> float | None:
    numbers = sorted(v for v in values if v is not None)
    if not numbers:
        return None
    middle = len(numbers) // 2
    return numbers[middle] if len(numbers) % 2 else (numbers[middle - 1] + numbers[middle]) / 2


def _number(value: Any) -> Any:
    """None for a number that is none, so that tables and JSON need no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
