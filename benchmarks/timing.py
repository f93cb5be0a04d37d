"""What the benchmarks measure with: interleaved pairs on one thread in processor time, transient memory, bandwidth."""

from __future__ import annotations

import argparse
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from assay.bench.records import environment


def seconds(call: Callable[[], Any]) -> float:
    """Processor time of one call."""
    start = time.process_time()
    call()
    return time.process_time() - start


@dataclass
class Pairs:
    """Times of a candidate and of its reference, taken in turns."""

    mine: list[float]
    base: list[float]

    @property
    def minimum(self) -> float:
        """Ratio of the fastest calls."""
        return min(self.mine) / min(self.base)

    @property
    def median(self) -> float:
        """Median of the pairs' ratios."""
        return statistics.median(mine / base for mine, base in zip(self.mine, self.base, strict=True))


def in_turns(reference: Callable[[], Any], candidate: Callable[[], Any], pairs: int) -> Pairs:
    """A B A B ...: what disturbs the machine disturbs both."""
    times = [(seconds(reference), seconds(candidate)) for _ in range(pairs)]
    return Pairs([mine for _, mine in times], [base for base, _ in times])


def transient_bytes(call: Callable[[], Any]) -> int:
    """The most that one call has allocated at a time, from the allocator's own events."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def bandwidth() -> float:
    """Bytes a second of an operation in place on 100 MB, the best of several."""
    x = torch.ones(25_000_000)
    best = math.inf
    for _ in range(7):
        best = min(best, seconds(lambda: x.mul_(1.0)))
    return 2 * x.numel() * 4 / best


def conditions(pairs: int) -> str:
    """How it was measured, in one line."""
    malloc = "reuse" if os.environ.get("MALLOC_MMAP_MAX_") == "0" else "default"
    return (
        f"One thread; {pairs} pairs; malloc: {malloc}; {environment()['machine']['processor']}, "
        f"torch {torch.__version__}, Python {platform.python_version()}."
    )


def command(about: str | None, table: Callable[..., str], flag: str, flag_help: str, pairs: int) -> None:
    """The command line of a benchmark: print ``table(pairs, only, flag)``, and write it where ``--markdown`` says."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    parser.add_argument("--pairs", type=int, default=pairs, help="pairs, at least 7 for figures to quote")
    parser.add_argument("--only", nargs="*", default=[], help="names or parts of names")
    parser.add_argument(f"--{flag}", action="store_true", help=flag_help)
    said = parser.parse_args()
    text = table(said.pairs, said.only, getattr(said, flag))
    print(text)
    if said.markdown:
        said.markdown.write_text(text + "\n", encoding="utf-8")
