"""The comparison: the same tuning budget for all, then fresh paired seeds, each run kept as a line."""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from assay.bench.arms import DEFAULT_RECIPE, Arm, arms_for, resolve, task_of
from assay.bench.comparison import Comparison, Settings, seconds_factor, selected_trial
from assay.bench.engine import execute
from assay.bench.loop import fit
from assay.bench.memory import PeakMemory
from assay.bench.recipe import Budget
from assay.bench.records import PROTOCOL, Records, code_version, each, environment, key, write_text
from assay.bench.spec import Spec, parse_specs
from assay.bench.tasks import Task

TUNING_SEED = 1
__all__ = ["Comparison", "Progress", "compare"]

Progress = Callable[[str, int, int, Comparison], None]
"""Called with the phase, runs finished and planned in it, and all that was found so far."""


def compare(
    task: Task | str,
    methods: str | Iterable[str],
    *,
    baseline: str = "adamw",
    trials: int = 5,
    seeds: int = 5,
    steps: int | None = None,
    batch_size: int | None = None,
    select: str = "final",
    equal_seconds: bool = True,
    engine: str = "local",
    jobs: int | None = None,
    device: str = "cpu",
    records: str | Path | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Give every method the same budget on ``task`` and say which of them differs from the tuned baseline.

    1. Each method and the baseline is tried ``trials`` times (trial 0: its defaults; then one Halton stream through
       its card's space), and the best trial on *validation* data is selected.
    2. The selected options are trained anew on ``seeds`` fresh seeds, the same for all (initial weights, order of the
       data, splits), and measured on *test* data: equal numbers of training examples.
    3. The same once more with as many steps as fit into the seconds that the baseline took, preparation included.

    Differences are paired by seed, with 95 % intervals and Holm's correction over the methods.

    Args:
        task: a :class:`Task`, the name of one (``"digits"``, ``"text(length=32)"``) or ``"FILE.py:NAME"``.
        methods: names as in ``"adamp, adamp(delta=0.05), adamp+ps-kd"``, or a list of them.
        baseline: a name likewise; also ``"adamw"`` and ``"sgd"``. Methods are put on top of it.
        trials: runs to tune each arm; 0 or 1 means defaults only.
        seeds: fresh seeds to report on, at least 2.
        steps, batch_size: override the task's budget.
        select: ``"final"`` picks the trial with the best last validation value, ``"best"`` the best on the way.
        equal_seconds: whether to do part 3.
        engine: ``"local"`` processes, ``"sequential"``, or a joblib backend by name: ``"ray"``, ``"dask"``.
        jobs: processes at a time; all cores by default.
        device: ``"cpu"``, ``"cuda"``, ...
        records: file of JSON lines to read finished runs from and to add new ones to; None keeps nothing.
        progress: called after each run.

    Raises:
        ValueError: an argument out of range, an unknown method, task or option.
        RecordError: a record could not be written; what was recorded before is safe.

    >>> import assay
    >>> result = assay.compare("digits(model='mlp')", "adamp", trials=1, seeds=2, steps=5, engine="sequential")
    >>> [row["method"] for row in result.table]
    ['adamw', 'adamp']
    """
    for name, value, least in (("trials", trials, 0), ("seeds", seeds, 2)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name} = {value!r} is out of range: an integer >= {least}")
    found = task_of(task)
    methods_specs = parse_specs(methods)
    (baseline_specs,) = parse_specs(baseline)
    arms = arms_for(methods_specs, baseline_specs)
    budget = Budget(
        steps=found.budget.steps if steps is None else steps,
        batch_size=found.budget.batch_size if batch_size is None else batch_size,
        evaluations=found.budget.evaluations,
    )
    settings = Settings(
        asked=task if isinstance(task, str) else found.name,
        task=found.name,
        about=found.about,
        metric=found.metric_name,
        direction=found.direction,
        baseline=arms[0].name,
        arms=[arm.name for arm in arms],
        trials=trials if trials > 1 else 0,
        seeds=seeds,
        budget=asdict(budget),
        select=select,
        equal_seconds=equal_seconds,
        device=device,
        environment=environment(),
        code=code_version(),
        test_examples=len(found.test),
    )
    plan = _Plan(task, found, arms, settings, budget)
    store = Records(records)
    known = store.known()
    comparison = Comparison(settings, [], damaged=store.damaged)
    if records is not None:
        write_text(Path(records).with_name("settings.json"), settings.to_json())
    try:
        for phase, jobs_of_phase in (("tune", plan.tune), ("report", plan.report), ("seconds", plan.seconds)):
            _run_phase(phase, list(jobs_of_phase(comparison)), known, store, comparison, engine, jobs, progress)
    except KeyboardInterrupt:
        comparison.interrupted = True
    return comparison


@dataclass(frozen=True)
class Job:
    """One run to be made; what its record will be known by, and the objects that make it."""

    identity: dict[str, Any]
    task: Task | str
    method: tuple[Spec, ...]
    base: tuple[Spec, ...]
    budget: Budget
    device: str
    test: bool


class _Plan:
    """Which runs each phase wants, given the records of the phases before."""

    def __init__(self, task: Task | str, found: Task, arms: list[Arm], settings: Settings, budget: Budget) -> None:
        self.task, self.arms, self.settings, self.budget = task, arms, settings, budget
        self.task_key = _task_key(task, found)

    def tune(self, _: Comparison) -> Iterator[Job]:
        for trial in range(self.settings.trials):
            for arm in self.arms:
                yield self._job(arm, "tune", trial, TUNING_SEED, self.budget)

    def report(self, comparison: Comparison) -> Iterator[Job]:
        for seed in self.settings.report_seeds:
            for arm in self.arms:
                trial = selected_trial(comparison, arm.name)
                if trial is not None:
                    yield self._job(arm, "report", trial, seed, self.budget)

    def seconds(self, comparison: Comparison) -> Iterator[Job]:
        if not self.settings.equal_seconds:
            return
        for seed in self.settings.report_seeds:
            for arm in self.arms[1:]:
                trial, factor = selected_trial(comparison, arm.name), seconds_factor(comparison, arm.name)
                if trial is not None and comparison.needs_seconds(arm.name):
                    yield self._job(arm, "seconds", trial, seed, self.budget.scaled(factor or 1.0))

    def _job(self, arm: Arm, phase: str, trial: int, seed: int, budget: Budget) -> Job:
        identity = {
            "protocol": PROTOCOL,
            "code": self.settings.code,
            "task": self.task_key,
            "base": self.settings.baseline,
            "arm": arm.name,
            "phase": phase,
            "trial": trial,
            "seed": seed,
            "options": arm.options(trial),
            "budget": asdict(budget),
            "device": self.settings.device,
        }
        base = tuple(part.spec for part in self.arms[0].parts)
        method = base if arm is self.arms[0] else tuple(part.spec for part in arm.parts if part.spec not in base)
        task = self.task if isinstance(self.task, Task) else str(self.task)
        return Job(identity, task, method, base, budget, self.settings.device, test=phase != "tune")


def _task_key(task: Task | str, found: Task) -> str:
    """The task's name, with a digest of its file: an edited task is another task."""
    path, _, _ = task.rpartition(":") if isinstance(task, str) else ("", "", "")
    if path.endswith(".py"):
        return f"{found.name} {hashlib.sha256(Path(path).read_bytes()).hexdigest()[:10]}"
    return found.name


def _run_phase(
    phase: str,
    wanted: list[Job],
    known: dict[str, dict[str, Any]],
    store: Records,
    comparison: Comparison,
    engine: str,
    jobs: int | None,
    progress: Progress | None,
) -> None:
    """Take what is known, run the rest, record each run as it finishes."""
    done = 0
    missing = []
    for job in wanted:
        record = known.get(key(job.identity))
        if record is None:
            missing.append(job)
        else:
            comparison.records.append(record)
            done += 1
    comparison.reused += done
    if progress:
        progress(phase, done, len(wanted), comparison)
    for record in execute(run_job, missing, engine, jobs):
        store.add(record)
        comparison.records.append(record)
        done += 1
        if progress:
            progress(phase, done, len(wanted), comparison)


def run_job(job: Job) -> dict[str, Any]:
    """Make one run, in whatever process the engine chose; whatever happens to it becomes its record."""
    torch.set_num_threads(1)
    started = time.time()
    _warm_up(job.device)
    outcome: dict[str, Any] = {"status": "error", "message": ""}
    with PeakMemory(job.device) as peak:
        try:
            task = task_of(job.task)
            base = () if job.method == job.base else job.base
            recipe = resolve(job.method, base).recipe(job.identity["options"])
            result = fit(recipe, task, job.budget, job.identity["seed"], device=job.device, test=job.test)
            outcome = {name: value for name, value in vars(result).items() if name != "model"}
        except (torch.OutOfMemoryError, MemoryError) as error:
            outcome = {"status": "out of memory", "message": str(error)}
        except Exception as error:
            memory = "allocate memory" in str(error)
            outcome = {"status": "out of memory" if memory else "error", "message": f"{type(error).__name__}: {error}"}
    facts = {"peak_memory": peak.bytes, "started": round(started), **environment()}
    return _finite({**job.identity, **outcome, **facts})


@functools.cache
def _warm_up(device: str) -> None:
    """Two small steps, once a process: what libraries load and allocate at first use is no method's cost."""
    small = Budget(steps=2, batch_size=8, evaluations=1)
    for name in ("digits", "text"):
        fit(DEFAULT_RECIPE, task_of(name), small, device=device)


def _finite(value: Any) -> Any:
    """The same with None for numbers that JSON does not know."""
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    return each(_finite, value)
