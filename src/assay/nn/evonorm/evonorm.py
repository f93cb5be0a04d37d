"""EvoNorms: layers that evolution found in place of normalization and activation, and the search for more."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from assay._checks import in_range
from assay.nn.evonorm.convert import convert_bn_act_
from assay.nn.evonorm.graph import GraphLayer, LayerGraph, mutate, random_graph
from assay.nn.evonorm.layers import (
    LAYERS,
    EvoNormB0,
    EvoNormB1,
    EvoNormB2,
    EvoNormS0,
    EvoNormS1,
    EvoNormS2,
    evonorm,
)
from assay.nn.evonorm.search import Anchor, Candidate, quality_reject, rerank, search, stability_reject

if TYPE_CHECKING:
    from assay.bench.recipe import Recipe, Run

__all__ = [
    "Anchor",
    "Candidate",
    "EvoNormB0",
    "EvoNormB1",
    "EvoNormB2",
    "EvoNormS0",
    "EvoNormS1",
    "EvoNormS2",
    "GraphLayer",
    "LayerGraph",
    "apply",
    "convert_bn_act_",
    "evonorm",
    "mutate",
    "quality_reject",
    "random_graph",
    "rerank",
    "search",
    "stability_reject",
]


def apply(recipe: Recipe, *, name: str = "B0", group_size: int = 8) -> Recipe:
    """The recipe with the EvoNorm of that name in place of ``BatchNorm2d`` and the activation after it.

    ``group_size`` is the number of channels in a group of S0, S1 and S2.
    """
    in_range("name", name, name in LAYERS, " or ".join(LAYERS))
    options: dict[str, Any] = {"group_size": group_size} if name.startswith("S") else {}

    def model(run: Run) -> Any:
        return convert_bn_act_(recipe.model(run), partial(evonorm, name, **options))

    return replace(recipe, model=model)
