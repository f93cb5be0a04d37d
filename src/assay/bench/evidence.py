"""What a claim measured, and the verdict that follows from it.

A claim is a function ``claim(bench) -> Evidence`` in the room's ``claim.py``: it runs its variants over seeds, fixes
its bounds in the code, and never decides the verdict itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from assay.bench.statistics import mean_interval, seeds_to_settle

HOLDS, FAILS, OPEN = "holds", "does not hold", "cannot tell"


@dataclass(frozen=True)
class Check:
    """One inequality ``observed <= bound`` or ``observed >= bound``, with the 95 % interval of what was observed."""

    name: str
    observed: float
    low: float
    high: float
    sense: str
    bound: float
    n: int

    @property
    def verdict(self) -> str:
        """*holds* or *does not hold* only where the whole interval lies on one side of the bound."""
        if not all(map(math.isfinite, (self.low, self.high))):
            return OPEN
        good, bad = (self.high <= self.bound, self.low > self.bound)
        if self.sense == ">=":
            good, bad = (self.low >= self.bound, self.high < self.bound)
        return HOLDS if good else FAILS if bad else OPEN

    @property
    def seeds_needed(self) -> int | None:
        """How many seeds would settle the check if mean and spread stayed as they are; None if it is settled."""
        if self.verdict != OPEN:
            return None
        return seeds_to_settle(self.n, (self.high - self.low) / 2, self.observed - self.bound)


def at_most(name: str, samples: Any, bound: float) -> Check:
    """The mean of ``samples`` (one per seed) is at most ``bound``; a plain number is exact and has no interval."""
    return _check(name, samples, "<=", bound)


def at_least(name: str, samples: Any, bound: float) -> Check:
    """The mean of ``samples`` (one per seed) is at least ``bound``; a plain number is exact and has no interval."""
    return _check(name, samples, ">=", bound)


def _check(name: str, samples: Any, sense: str, bound: float) -> Check:
    values = np.asarray(samples, dtype=float)
    if values.ndim == 0:
        return Check(name, float(values), float(values), float(values), sense, float(bound), 1)
    mean, low, high = mean_interval(values)
    return Check(name, mean, low, high, sense, float(bound), len(values))


class Rows(list[dict[str, Any]]):
    """What was measured, one dict per (variant, seed): ``{"variant": ..., "seed": ..., metric: value, ...}``."""

    def values(self, variant: str, metric: str) -> np.ndarray:
        """The metric of a variant, ordered by seed; raises KeyError naming what is missing."""
        chosen = sorted((row for row in self if row["variant"] == variant), key=lambda row: row["seed"])
        if not chosen:
            raise KeyError(f"no row of variant {variant!r}; there are {sorted({row['variant'] for row in self})}")
        return np.asarray([row[metric] for row in chosen], dtype=float)

    def difference(self, variant: str, baseline: str, metric: str) -> np.ndarray:
        """Variant minus baseline, paired by seed."""
        return self.values(variant, metric) - self.values(baseline, metric)

    def ratio(self, variant: str, baseline: str, metric: str) -> np.ndarray:
        """Variant over baseline, paired by seed."""
        return self.values(variant, metric) / self.values(baseline, metric)


@dataclass
class Evidence:
    """Rows and checks of a claim; ``notes`` are findings that do not gate the verdict."""

    rows: Rows
    checks: list[Check]
    notes: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """*does not hold* if one check fails, else *cannot tell* if one is open (or there is none), else *holds*."""
        verdicts = [check.verdict for check in self.checks]
        if FAILS in verdicts:
            return FAILS
        return HOLDS if verdicts and OPEN not in verdicts else OPEN

    def to_json(self) -> dict[str, Any]:
        checks = [vars(check) | {"verdict": check.verdict, "seeds_needed": check.seeds_needed} for check in self.checks]
        return {"verdict": self.verdict, "checks": checks, "notes": self.notes, "rows": list(self.rows)}

    @classmethod
    def from_json(cls, said: dict[str, Any]) -> Evidence:
        names = Check.__dataclass_fields__
        checks = [Check(**{name: check[name] for name in names}) for check in said["checks"]]
        return cls(Rows(said["rows"]), checks, list(said["notes"]))


class Bench:
    """What a claim is handed: seeds, processes, and whether this is only a smoke run.

    ``quick`` shortens everything; a claim asks :meth:`seeds` and :meth:`scale` for its sizes and need not know.
    """

    def __init__(
        self, *, quick: bool = False, jobs: int = 1, progress: Callable[[int, int], None] | None = None
    ) -> None:
        self.quick, self.jobs, self._progress = quick, jobs, progress

    def __getstate__(self) -> dict[str, Any]:
        # A claim may hand its bench to the processes that measure; the progress bar stays here.
        return {**vars(self), "_progress": None}

    def seeds(self, count: int, first: int = 100) -> list[int]:
        """``count`` reporting seeds (two in a quick run), apart from the seeds below 100 that tuning may use."""
        return list(range(first, first + (min(2, count) if self.quick else count)))

    def scale(self, count: int, least: int = 1) -> int:
        """A number of steps or epochs: a tenth of it in a quick run, never below ``least``."""
        return max(least, count // 10) if self.quick else count

    def rows(self, run: Callable[[str, int], dict[str, Any]], variants: Iterable[str], seeds: Sequence[int]) -> Rows:
        """``run(variant, seed)`` for every pair, on one thread each, in ``jobs`` processes; its metrics as rows."""
        import joblib

        pairs = [(variant, seed) for seed in seeds for variant in variants]
        tasks = (joblib.delayed(_one_thread)(run, variant, seed) for variant, seed in pairs)
        results = joblib.Parallel(n_jobs=self.jobs, return_as="generator")(tasks)
        rows = Rows()
        for (variant, seed), metrics in zip(pairs, results, strict=True):
            rows.append({"variant": variant, "seed": seed, **_plain(metrics)})
            if self._progress:
                self._progress(len(rows), len(pairs))
        return rows


def _one_thread(run: Callable[[str, int], dict[str, Any]], variant: str, seed: int) -> dict[str, Any]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return run(variant, seed)
    finally:
        torch.set_num_threads(threads)


def _plain(metrics: dict[str, Any]) -> dict[str, Any]:
    """Numbers, strings and lists as JSON knows them, so that rows read back equal rows written."""
    return json.loads(json.dumps(metrics, default=lambda value: value.tolist()))
