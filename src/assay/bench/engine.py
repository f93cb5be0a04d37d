"""Where runs are made: processes on this machine by default, a Ray or Dask cluster by name, all through joblib."""

from __future__ import annotations

import functools
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

_EXTRAS = {"ray": "ray.util.joblib", "dask": "distributed"}
_BACKENDS = {"local": "loky", "sequential": "sequential", "ray": "ray", "dask": "dask"}


def execute(
    function: Callable[[Any], Any], items: Sequence[Any], engine: str = "local", jobs: int | None = None
) -> Iterator[Any]:
    """``function`` of each item, in the order in which they finish; on Ctrl-C the workers end and it raises."""
    if engine not in _BACKENDS:
        raise ValueError(f"engine = {engine!r} is out of range: one of {', '.join(_BACKENDS)}")
    if engine in _EXTRAS:
        _connect(engine)
    if not items:
        return
    if engine == "sequential":
        yield from map(function, items)
        return
    import joblib

    jobs = jobs or min(len(items), joblib.cpu_count())
    with joblib.parallel_config(backend=_BACKENDS[engine], n_jobs=jobs):
        local = engine == "local"
        # Clusters hand results back in lists: they are asked for a few at a time, so that little is lost in a crash.
        if local:
            work = functools.partial(_quiet, function)
            running = joblib.Parallel(return_as="generator_unordered", pre_dispatch=jobs, batch_size=1)
            results = running(joblib.delayed(work)(item) for item in items)
            try:
                yield from results
            except BaseException:
                _stop_workers()
                raise
        else:
            for start in range(0, len(items), jobs):
                yield from joblib.Parallel()(joblib.delayed(function)(item) for item in items[start : start + jobs])


def _connect(engine: str) -> None:
    try:
        module = __import__(_EXTRAS[engine], fromlist=["register_ray"])
    except ImportError as error:
        raise ImportError(f"engine {engine!r} needs an extra: pip install 'assay-ml[{engine}]'") from error
    if engine == "ray":
        module.register_ray()
    else:
        try:
            module.default_client()
        except ValueError:
            module.Client(processes=True, threads_per_worker=1, dashboard_address=None)


def _quiet(function: Callable[[Any], Any], item: Any) -> Any:
    """Leave Ctrl-C to the process that the user talks to."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return function(item)


def _stop_workers() -> None:
    from joblib.externals.loky import get_reusable_executor

    get_reusable_executor().shutdown(wait=False, kill_workers=True)
