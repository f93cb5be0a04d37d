"""The honest bench: tasks, recipes, fit, compare, statistics, records and the report."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from assay.bench.comparison import Comparison
    from assay.bench.evidence import Bench, Check, Evidence, Rows, at_least, at_most
    from assay.bench.loop import Fit, fit
    from assay.bench.protocol import compare
    from assay.bench.recipe import Batch, Budget, Recipe, Run
    from assay.bench.tasks import Task

_HOME = {
    "comparison": ("Comparison",),
    "loop": ("Fit", "fit"),
    "protocol": ("compare",),
    "evidence": ("Bench", "Check", "Evidence", "Rows", "at_least", "at_most"),
    "recipe": ("Batch", "Budget", "Recipe", "Run"),
    "tasks": ("Task",),
}
__all__ = [
    "Batch",
    "Bench",
    "Budget",
    "Check",
    "Comparison",
    "Evidence",
    "Fit",
    "Recipe",
    "Rows",
    "Run",
    "Task",
    "at_least",
    "at_most",
    "compare",
    "fit",
]


def __getattr__(name: str) -> Any:
    # Submodules load on demand: statistics and records are read without torch.
    for module, names in _HOME.items():
        if name in names:
            return getattr(importlib.import_module(f"assay.bench.{module}"), name)
    raise AttributeError(f"module 'assay.bench' has no attribute {name!r}")
