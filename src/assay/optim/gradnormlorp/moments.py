"""The two averages of Adam in an optimizer's state: whole, or in blocks of 8-bit codes between steps."""

from __future__ import annotations

import functools
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

from assay.compress.quant import dequantize_blockwise, dynamic_map, quantize_blockwise

BLOCK = 256
_map = functools.cache(dynamic_map)


class Moments:
    """``with Moments(...) as (m, v)``: the averages under ``name`` and ``name + "_sq"``, zero at first, to be renewed.

    With 8 bits each is kept as codes, with the scales of its blocks under ``..._absmax``; what was not zero in v stays
    so, for it is divided by.
    """

    def __init__(self, state: MutableMapping[str, Any], name: str, like: Tensor, bits: int) -> None:
        self.state, self.like, self.bits = state, like, bits
        self.names = (name, f"{name}_sq")
        self.tensors: list[Tensor] = []

    def __enter__(self) -> list[Tensor]:
        self.tensors = [self._load(name, signed) for name, signed in zip(self.names, (True, False), strict=True)]
        return self.tensors

    def __exit__(self, *error: object) -> None:
        for name, x, signed in zip(self.names, self.tensors, (True, False), strict=True):
            self.state[name] = x
            if self.bits == 8:
                codes, absmax = quantize_blockwise(x, _map(signed), BLOCK, keep_nonzero=not signed)
                self.state[name], self.state[f"{name}_absmax"] = codes, absmax

    def _load(self, name: str, signed: bool) -> Tensor:
        if name not in self.state:
            return torch.zeros_like(self.like)
        kept: Tensor = self.state[name]
        if self.bits == 32:
            return kept
        scales = self.state[f"{name}_absmax"]
        return dequantize_blockwise(kept, scales, _map(signed), dtype=self.like.dtype, block_size=BLOCK)
