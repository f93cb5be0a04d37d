"""Checks of arguments that the family shares; each names the argument, its value and the allowed range."""

from __future__ import annotations

from typing import Any


def share(name: str, value: float) -> float:
    if isinstance(value, bool) or not 0 < value <= 1:
        raise ValueError(f"{name} = {value!r} is out of range: (0, 1]")
    return value


def count(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} = {value!r} is out of range: an integer >= 1")
    return value


def one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} = {value!r} is out of range: {' or '.join(map(repr, allowed))}")
