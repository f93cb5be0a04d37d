"""Merging experts into one: the chosen experts' weights are averaged, and one linear layer is left to compute."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from assay._checks import in_range
from assay.nn._experts import load_balance, noisy_top_k_gating
from assay.nn._swap import swap
from assay.nn.meo.layers import LEVELS, MEOLinear, MoELinear, TokenAttention

if TYPE_CHECKING:
    from assay.bench.recipe import Batch, Objective, Recipe, Run

__all__ = ["MEOLinear", "MoELinear", "TokenAttention", "convert_ffn_to_meo", "load_balance", "noisy_top_k_gating"]

# BERT and its kin; GPT-2; torch's own encoder layers. The projection after attention is not part of the FFN.
_FFN = r"(^|\.)(intermediate\.dense|(?<!attention\.)output\.dense|mlp\.(c_fc|c_proj)|linear[12])$"


def convert_ffn_to_meo(
    model: nn.Module,
    num_experts: int,
    k: int = 2,
    *,
    noise: float = 0.01,
    layers: str = _FFN,
    **options: Any,
) -> nn.Module:
    """Make :class:`MEOLinear` of the feed-forward layers of a trained transformer, in place, and return it.

    Expert e starts as ``W + noise * std(W) * N(0, 1)`` with the bias of the layer, so that at first the model computes
    nearly what it did. Found by name are the feed-forward layers of BERT and its kin, of GPT-2 (``Conv1D``) and of
    ``torch.nn.TransformerEncoderLayer``.

    Args:
        model: the transformer.
        num_experts, k: as in :class:`MEOLinear`.
        noise: >= 0.
        layers: a regular expression that the dotted names of the layers to convert must contain.
        options: further arguments of :class:`MEOLinear`; ``level`` "sequence" or "token".

    Raises:
        ValueError: an argument out of range.

    Warns:
        NoEffectWarning: there is no layer of a kind that could be converted.

    Source: S. He et al., Merging Experts into One, EMNLP 2023, arXiv 2310.09832.

    >>> import torch
    >>> from assay.nn import convert_ffn_to_meo
    >>> encoder = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    >>> convert_ffn_to_meo(encoder, num_experts=4).linear1
    MEOLinear(16, 32, num_experts=4, k=2, level='sequence', bias=True, noisy_gating=True)
    """
    in_range("noise", noise, noise >= 0, ">= 0")
    level = options.get("level", "sequence")
    in_range("level", level, level in LEVELS[:2], "'sequence' or 'token': nothing hands these layers a task")

    def convert(name: str, dense: Any) -> nn.Module:
        if not re.search(layers, name):
            return dense
        weight = dense.weight if isinstance(dense, nn.Linear) else dense.weight.T  # Conv1D keeps it as (in, out)
        factory: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        merged = MEOLinear(
            weight.shape[1], weight.shape[0], num_experts, k, bias=dense.bias is not None, **options, **factory
        )
        with torch.no_grad():
            merged.weight.copy_(weight + noise * weight.std() * torch.randn_like(merged.weight))
            if merged.bias is not None:
                merged.bias.copy_(dense.bias.expand_as(merged.bias))
        return merged

    # transformers may not be installed; its Conv1D is known by name.
    kinds = {type(module) for module in model.modules() if type(module).__name__ == "Conv1D"}
    return swap(model, (nn.Linear, *kinds), convert)


def apply(
    recipe: Recipe,
    *,
    num_experts: int = 8,
    k: int = 2,
    level: str = "sequence",
    coefficient: float = 0.01,
) -> Recipe:
    """The recipe with freshly drawn experts in the model's feed-forward layers, and their balance loss added."""
    in_range("coefficient", coefficient, coefficient >= 0, ">= 0")

    def model(run: Run) -> nn.Module:
        if run.task.name.startswith("text"):
            raise ValueError("meo: a gate that has seen the whole sequence knows the bytes that are to be predicted")
        network = convert_ffn_to_meo(recipe.model(run), num_experts, k, level=level)
        for layer in _layers(network):
            layer.reset_parameters()  # there is nothing trained to start from: each expert gets weights of its own
        return network

    def objective(run: Run) -> Objective:
        inner = recipe.objective(run)

        def loss(network: Callable[[Any], Any], batch: Batch) -> Tensor:
            total = inner(network, batch)
            for layer in _layers(run.model):
                assert layer.aux_loss is not None  # the forward pass has just set it
                total = total + coefficient * layer.aux_loss
            return total

        return loss

    return replace(recipe, model=model, objective=objective)


def _layers(model: nn.Module) -> list[MEOLinear]:
    return [module for module in model.modules() if isinstance(module, MEOLinear)]
