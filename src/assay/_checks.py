"""The one form in which a bad argument is refused: its name, its value, the allowed range."""

from __future__ import annotations

from typing import Any


def in_range(name: str, value: Any, good: bool, allowed: str) -> None:
    """Raise ValueError unless ``good``."""
    if not good:
        raise ValueError(f"{name} = {value!r} is out of range: {allowed}")
