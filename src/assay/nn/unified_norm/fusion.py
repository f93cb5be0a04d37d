"""Fold unified normalization into the linear layers that read it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from assay._checks import in_range


@dataclass
class FusionReport:
    """What became of each unified normalization, by its name: ``folded`` into these layers, or ``affine``."""

    folded: dict[str, tuple[str, ...]] = field(default_factory=dict)
    affine: tuple[str, ...] = ()


class ChannelAffine(nn.Module):
    """``scale x + shift`` of each channel, the last dimension: what is left of a normalization that was not folded."""

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("scale", scale.detach().to(dtype))
        self.register_buffer("shift", shift.detach().to(dtype))

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        return torch.addcmul(self.shift, input, self.scale).to(input.dtype)


@torch.no_grad()
def fuse_unified_norm(
    model: nn.Module, example_inputs: tuple[Any, ...] | None = None, inplace: bool = False
) -> nn.Module:
    """A model for inference without its unified normalizations: they are folded into the layers that read them.

    ``Linear(W, b)`` behind scale s and shift t becomes ``Linear(W diag(s), b + W t)``, and so do the projections of
    ``torch.nn.MultiheadAttention``. Where anything else reads the output too, as a residual path does in a post-norm
    transformer, a precomputed scale and shift is left.

    The readers are found by tracing (``torch.fx``) the model or, where that fails, those of its parts that can be
    traced; torch's own transformer layers with ``norm_first`` are known.

    Args:
        model: in evaluation.
        example_inputs: if given, both models are called with them and must agree.
        inplace: change ``model`` itself instead of a copy.

    Returns:
        The fused model; ``fusion_report`` on it says what became of each normalization, a :class:`FusionReport`.

    Raises:
        ValueError: a normalization in training, or outputs on ``example_inputs`` that differ.

    Source: Q. Yang et al., Unified Normalization, ACM MM 2022, arXiv 2208.01313.

    >>> import torch
    >>> from assay.nn import UnifiedNorm, fuse_unified_norm
    >>> model = torch.nn.Sequential(UnifiedNorm(8), torch.nn.Linear(8, 4)).eval()
    >>> fused = fuse_unified_norm(model, (torch.randn(3, 8),))
    >>> fused[0], fused.fusion_report.folded
    (Identity(), {'0': ('1',)})
    """
    from assay.nn.unified_norm.unified_norm import UnifiedNorm

    expected = None if example_inputs is None else model(*example_inputs)
    model = model if inplace else copy.deepcopy(model)
    norms = {name: m for name, m in model.named_modules() if isinstance(m, UnifiedNorm)}
    for name, norm in norms.items():
        in_range(f"training of {name!r}", norm.training, not norm.training, "False: call model.eval() first")
    names = {module: name for name, module in model.named_modules()}
    report = FusionReport()
    readers = dict(_readers_in_transformers(model))
    for traced, found in _readers_in_graphs(model):
        readers.setdefault(traced, found)
    for name, norm in norms.items():
        found = readers.get(norm, [])
        if found and all(_can_take(*reader) for reader in found):
            scale, shift = norm.folded()
            for layer, parts in found:
                _fold(layer, parts, scale, shift)
            report.folded[name] = tuple(names[layer] for layer, _ in found)
            _replace(model, norm, nn.Identity())
        else:
            report.affine += (name,)
            _replace(model, norm, ChannelAffine(*norm.folded(), norm.running_var.dtype))
    model.fusion_report = report  # type: ignore[assignment]
    if example_inputs is not None:
        try:
            torch.testing.assert_close(model(*example_inputs), expected, rtol=1e-4, atol=1e-4)
        except AssertionError as error:
            raise ValueError(f"the fused model differs on example_inputs: {error}") from error
    return model


Reader = tuple[nn.Module, str]  # a layer, and which of an attention's projections: some of "qkv"


def _readers_in_transformers(model: nn.Module) -> Iterator[tuple[nn.Module, list[Reader]]]:
    for layer in model.modules():
        if isinstance(layer, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
            layer.activation_relu_or_gelu = 0  # its fused kernel wants the weights of a LayerNorm
            if not layer.norm_first:
                continue
            yield layer.norm1, [(layer.self_attn, "qkv")]
            if isinstance(layer, nn.TransformerDecoderLayer):
                yield layer.norm2, [(layer.multihead_attn, "q")]
                yield layer.norm3, [(layer.linear1, "")]
            else:
                yield layer.norm2, [(layer.linear1, "")]


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        from assay.nn.unified_norm.unified_norm import UnifiedNorm

        return isinstance(m, UnifiedNorm) or super().is_leaf_module(m, module_qualified_name)


def _readers_in_graphs(module: nn.Module) -> Iterator[tuple[nn.Module, list[Reader]]]:
    """The readers of every normalization whose readers are all known."""
    from assay.nn.unified_norm.unified_norm import UnifiedNorm

    if isinstance(module, UnifiedNorm) or not any(isinstance(m, UnifiedNorm) for m in module.modules()):
        return
    try:
        graph = _Tracer().trace(module)
    except Exception:  # whatever a forward pass does that cannot be traced
        for child in module.children():
            yield from _readers_in_graphs(child)
        return
    parts = dict(module.named_modules())
    calls = [node for node in graph.nodes if node.op == "call_module"]
    for node in calls:
        norm = parts[str(node.target)]
        if isinstance(norm, UnifiedNorm):
            once = sum(parts[str(other.target)] is norm for other in calls) == 1
            yield norm, (_readers_of(node, parts, calls) or []) if once else []
    for node in calls:  # what the tracer does not look into, torch's containers for one
        if not isinstance(parts[str(node.target)], UnifiedNorm):
            yield from (pair for child in parts[str(node.target)].children() for pair in _readers_in_graphs(child))


def _readers_of(node: fx.Node, parts: dict[str, nn.Module], calls: list[fx.Node]) -> list[Reader] | None:
    """All that read a node, or None if one of them is no layer that could take a scale and a shift of channels."""
    found: list[Reader] = []
    for user in node.users:
        layer = parts.get(str(user.target)) if user.op == "call_module" else None
        if layer is None or sum(parts[str(other.target)] is layer for other in calls) > 1:
            return None
        if isinstance(layer, (nn.Dropout, nn.Identity)):
            further = _readers_of(user, parts, calls)
            if further is None:
                return None
            found += further
        elif isinstance(layer, nn.MultiheadAttention):
            given = dict(zip(("query", "key", "value"), user.args, strict=False)) | user.kwargs
            found.append((layer, "".join(name[0] for name in ("query", "key", "value") if given.get(name) is node)))
        else:
            found.append((layer, ""))
    return found


def _can_take(layer: nn.Module, parts: str) -> bool:
    if parametrize.is_parametrized(layer):
        return False
    if isinstance(layer, nn.MultiheadAttention):
        return bool(parts) and layer._qkv_same_embed_dim and layer.bias_k is None
    return type(layer) is nn.Linear


def _fold(layer: nn.Module, parts: str, scale: Tensor, shift: Tensor) -> None:
    if isinstance(layer, nn.MultiheadAttention):
        rows = torch.cat([torch.full((layer.embed_dim,), part in parts) for part in "qkv"]).to(scale.device)
        weight, bias = layer.in_proj_weight, layer.in_proj_bias
        new, added = _folded(weight, scale, shift)
        layer.in_proj_weight = nn.Parameter(torch.where(rows[:, None], new, weight), weight.requires_grad)
        added = torch.where(rows, added, 0.0)
        layer.in_proj_bias = nn.Parameter(added if bias is None else bias + added, weight.requires_grad)
        return
    assert isinstance(layer, nn.Linear)
    new, added = _folded(layer.weight, scale, shift)
    layer.weight = nn.Parameter(new, layer.weight.requires_grad)
    layer.bias = nn.Parameter(added if layer.bias is None else layer.bias + added, layer.weight.requires_grad)


def _folded(weight: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    wide = weight.to(scale.dtype)
    return (wide * scale).to(weight.dtype), (wide @ shift).to(weight.dtype)


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if child is old:
                setattr(parent, name, new.train(old.training))
