"""What a compiler is told where its own choice is wrong or slow; without one these are plain operations."""

from __future__ import annotations

import torch
from torch import Tensor

from assay._operators import opaque

_BLOCK = 64


def kept(*tensors: Tensor) -> list[Tensor]:
    """Copies that stay as they are: of buffers that are about to be updated, or of what many elements will read.

    As an operator of its own a compiled graph keeps them. Of plain copies it would know that they can be made again:
    for the backward pass, from a buffer that has changed by then, or at each of the elements that read them. Tensors
    given together are copied at one time, in the forward pass if that reads one of them, and in the backward pass if
    one is a gradient; alone, a buffer that the backward pass is to read may be read in either.
    """
    opaque = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    return _kept(list(tensors)) if opaque else [x.clone() for x in tensors]


@opaque("kept")
def _kept(tensors: list[Tensor]) -> list[Tensor]:
    return [x.clone() for x in tensors]


@_kept.register_fake
def _(tensors: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(x) for x in tensors]


_kept.register_autograd(lambda ctx, grads: grads)


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
