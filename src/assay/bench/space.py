"""The tunable space: each option is a default and a sampler, and all methods draw from one Halton stream."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

DIMENSIONS = 24
_STREAM_SEED = 20_240_229  # part of the protocol: the same trials for everybody


@functools.cache
def _stream(points: int) -> np.ndarray:
    from scipy.stats import qmc

    return qmc.Halton(DIMENSIONS, scramble=True, rng=np.random.default_rng(_STREAM_SEED)).random(points)


def trial_options(space: Mapping[str, Mapping[str, Any]], trial: int) -> dict[str, Any]:
    """Options of a trial: trial 0 is the defaults, trial k the k-th point of the stream.

    Coordinate j of the point goes to the j-th option, so methods whose spaces begin alike are tried at equal values.
    """
    if len(space) > DIMENSIONS:
        raise ValueError(f"{len(space)} tunable options; at most {DIMENSIONS}")
    if trial == 0:
        return {name: sampler["default"] for name, sampler in space.items()}
    point = _stream(max(64, 2 ** math.ceil(math.log2(trial + 1))))[trial]
    return {name: draw(sampler, float(u)) for (name, sampler), u in zip(space.items(), point, strict=False)}


def draw(sampler: Mapping[str, Any], u: float) -> Any:
    """The value of a sampler at ``u`` in [0, 1).

    >>> round(draw({"default": 0.1, "log": [0.01, 1.0]}, 0.5), 12)
    0.1
    """
    if "log" in sampler:
        low, high = sampler["log"]
        return float(f"{math.exp(math.log(low) + u * (math.log(high) - math.log(low))):.6g}")
    if "uniform" in sampler:
        low, high = sampler["uniform"]
        return float(f"{low + u * (high - low):.6g}")
    if "integer" in sampler:
        low, high = sampler["integer"]
        return low + int(u * (high - low + 1))
    choices = sampler["choice"]
    return choices[int(u * len(choices))]


def check_space(space: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ValueError for a sampler that is not (default, one kind of range)."""
    for name, sampler in space.items():
        kinds = set(sampler) - {"default"}
        if "default" not in sampler or len(kinds) != 1 or not kinds <= {"log", "uniform", "integer", "choice"}:
            raise ValueError(
                f"space of {name}: a default and one of log, uniform, integer, choice; got {dict(sampler)}"
            )
        (kind,) = kinds
        values = sampler[kind]
        if kind == "choice":
            good = len(values) > 0
        else:
            good = len(values) == 2 and values[0] < values[1] and (kind != "log" or values[0] > 0)
        if not good:
            raise ValueError(f"space of {name}: {kind} = {values} is out of range")
