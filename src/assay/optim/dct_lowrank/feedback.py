"""Error feedback: what a projection left out, kept for the next step, whole or in a few bits."""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

from assay.optim._lowrank import Shards, local


def quantize_rows(x: Tensor, bits: int, dim: int = -1) -> tuple[Tensor, Tensor, Tensor]:
    """Affine codes of 8 or 4 bits along a dimension, each row by its own smallest and largest element.

    ::

        code = round((x - low) / (high - low) * (2^bits - 1))         a row of equal elements: 0

    4-bit codes lie in pairs in a byte, element 2k in the high half and 2k + 1 in the low one.

    Returns:
        Codes (uint8, with 4 bits of half the length, rounded up), low and high (of length 1 along ``dim``).
    """
    x = x.movedim(dim, -1)
    low, high = x.aminmax(dim=-1, keepdim=True)
    span = high - low
    codes = ((x - low) / torch.where(span > 0, span, 1) * (2**bits - 1)).round_().to(torch.uint8)
    if bits == 4:
        if codes.shape[-1] % 2:
            codes = torch.cat([codes, torch.zeros_like(codes[..., :1])], -1)
        codes = codes[..., ::2].mul(16) + codes[..., 1::2]
    return codes.movedim(-1, dim), low.movedim(-1, dim), high.movedim(-1, dim)


def dequantize_rows(codes: Tensor, low: Tensor, high: Tensor, bits: int, size: int, dim: int = -1) -> Tensor:
    """What :func:`quantize_rows` stood for, of length ``size`` along ``dim``, to half a step of the row."""
    codes = codes.movedim(dim, -1)
    if bits == 4:
        codes = torch.stack([codes // 16, codes % 16], -1).flatten(-2)[..., :size]
    low, high = low.movedim(dim, -1), high.movedim(dim, -1)
    return (low + codes * ((high - low) / (2**bits - 1))).movedim(-1, dim)


class Residual:
    """E, the part of all gradients so far that no step has used, in an optimizer's state.

    ``bits`` None keeps it in the parameter's dtype and shape, under ``error``; 8 or 4 as codes along the projected
    side of the matrix, under ``error_codes``, ``error_low`` and ``error_high``.
    """

    def __init__(self, state: MutableMapping[str, Any], shards: Shards, p: Tensor, right: bool, bits: int | None):
        self.state, self.shards, self.p, self.bits = state, shards, p, bits
        self.dim = 1 if right else 0

    def add_to(self, A: Tensor) -> Tensor:
        """A + E, of a matrix A as this process computes with it."""
        if self.bits is None:
            return A + self.shards.take(self.state["error"]).flatten(1) if "error" in self.state else A
        if "error_codes" not in self.state:
            return A
        codes, low, high = (self.shards.take(self.state[f"error_{name}"]) for name in ("codes", "low", "high"))
        return A + dequantize_rows(codes, low, high, self.bits, A.shape[self.dim], self.dim)

    def keep(self, E: Tensor) -> None:
        """E <- this matrix."""
        if self.bits is None:
            if "error" not in self.state:
                self.state["error"] = torch.zeros_like(self.p, memory_format=torch.preserve_format)
            mine = local(self.state["error"])
            mine.copy_(self.shards.part(E).view(mine.shape))
            return
        for name, x in zip(("codes", "low", "high"), quantize_rows(E, self.bits, self.dim), strict=True):
            whole = [self.p.shape[0], math.prod(self.p.shape[1:])]
            whole[self.dim] = x.shape[self.dim]
            self.state[f"error_{name}"] = self.shards.keep(x, whole)
