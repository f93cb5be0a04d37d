"""Assay: published learning methods, each a drop-in PyTorch piece, each tested against its own claim.

>>> import assay
>>> card = assay.find("adamp")
>>> card.year
2021

``assay.compare`` gives methods the same budget on a task; ``assay.optim``, ``assay.nn``, ``assay.losses`` and
``assay.data`` hold the pieces. Nothing heavy is imported before it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from assay.catalogue import Card, UnknownMethod, cards, find, search

if TYPE_CHECKING:
    from assay.bench import Comparison, Task, compare

__version__ = "0.1.0"
__all__ = ["Card", "Comparison", "Task", "UnknownMethod", "cards", "compare", "find", "search"]

_FAMILIES = ("bench", "data", "linear_model", "losses", "metrics", "nn", "optim")
_FROM_BENCH = ("Comparison", "Task", "compare")


def __getattr__(name: str) -> Any:
    if name in _FAMILIES:
        return importlib.import_module(f"assay.{name}")
    if name in _FROM_BENCH:
        return getattr(importlib.import_module("assay.bench"), name)
    raise AttributeError(f"module 'assay' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_FAMILIES, *_FROM_BENCH})
