"""What a compiler is told where its own choice is wrong or slow; without one these are plain operations."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 64


def kept(x: Tensor) -> Tensor:
    """A copy that stays as it is: of a buffer that is about to be updated, or of what many elements will read.

    As an operator of its own a compiled graph keeps it. Of a plain copy it would know that it can be made again: for
    the backward pass, from a buffer that has changed by then, or at each of the elements that read it.
    """
    opaque = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    return _kept(x) if opaque else x.clone()


@torch.library.custom_op("assay::kept", mutates_args=())
def _kept(x: Tensor) -> Tensor:
    return x.clone()


@_kept.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def total(rows: Tensor) -> Tensor:
    """Sum over the rows of (rows, C).

    What a compiler makes of that sum goes down one column after the other, across all memory; so it is given blocks of
    rows that fit into a cache.
    """
    count = rows.shape[0] // _BLOCK
    if not torch.compiler.is_compiling() or count < 2:
        return rows.sum(0)
    whole = rows[: count * _BLOCK].view(count, _BLOCK, rows.shape[1]).sum(1).sum(0)
    return whole if rows.shape[0] % _BLOCK == 0 else whole + rows[count * _BLOCK :].sum(0)
