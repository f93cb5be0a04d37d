"""Running a room's claim, and recording what it gave."""

from __future__ import annotations

import datetime
import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from assay.bench.evidence import Bench, Evidence
from assay.bench.records import each, environment, write_text
from assay.catalogue import Card


def run_claim(
    card: Card, *, quick: bool = False, jobs: int = 1, progress: Callable[[int, int], None] | None = None
) -> Evidence:
    """Run the experiment of a card; ``quick`` is a smoke run whose verdict means nothing."""
    return _module(card).claim(Bench(quick=quick, jobs=jobs, progress=progress))


def figure(card: Card, evidence: Evidence) -> Any:
    """The claim's matplotlib figure, drawn from its rows, on no screen."""
    import matplotlib

    matplotlib.use("Agg")
    return _module(card).figure(evidence)


def draw(card: Card, evidence: Evidence, path: Path) -> Path:
    """The claim's figure as a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure(card, evidence).savefig(path, dpi=150, bbox_inches="tight")
    return path


def record(card: Card, evidence: Evidence, command: str) -> Path:
    """Write ``evidence.json`` into the room: verdict, checks and rows, with machine, versions, seeds and command."""
    said: dict[str, Any] = {
        "id": card.id,
        "command": command,
        "date": datetime.date.today().isoformat(),
        "seeds": sorted({row["seed"] for row in evidence.rows if "seed" in row}),
        **environment(),
        **evidence.to_json(),
    }
    path = card.files()["evidence"]
    write_text(path, json.dumps(_named(said), indent=1, allow_nan=False) + "\n")
    return path


def recorded(card: Card) -> tuple[Evidence, dict[str, Any]] | None:
    """The recorded evidence of a card and all that stands in its file; None if there is none."""
    path = card.files()["evidence"]
    if not path.exists():
        return None
    try:
        said = _numbers(json.loads(path.read_text(encoding="utf-8")))
        return Evidence.from_json(said), said
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {type(error).__name__}: {error}") from error


_NO_JSON = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _named(value: Any) -> Any:
    """The same with the names of numbers that JSON does not know in their place."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return each(_named, value)


def _numbers(value: Any) -> Any:
    """What :func:`_named` was given."""
    return _NO_JSON.get(value, value) if isinstance(value, str) else each(_numbers, value)


def _module(card: Card) -> Any:
    return importlib.import_module(card.module.rpartition(".")[0] + ".claim")
