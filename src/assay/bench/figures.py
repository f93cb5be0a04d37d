"""What the figures of several claims have in common."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes

from assay.bench.evidence import Rows


def by_variant(axes: Axes, rows: Rows, variants: Sequence[str], metric: str, *, scale: float = 1.0) -> None:
    """A point for each seed and a bar at their mean, side by side for each variant that has the metric."""
    shown = [v for v in variants if any(row["variant"] == v and row.get(metric) is not None for row in rows)]
    for place, variant in enumerate(shown):
        values = scale * rows.values(variant, metric)
        axes.plot([place] * len(values), values, "o", alpha=0.5)
        axes.hlines(values.mean(), place - 0.2, place + 0.2, color="black")
    axes.set_xticks(range(len(shown)), [variant.replace(", ", ",\n") for variant in shown])
    axes.set_xlim(-0.5, max(len(shown), 1) - 0.5)
