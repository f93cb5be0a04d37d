"""Sums of softplus over all pairs of a positive and a negative, pair by pair, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from assay._operators import opaque

# Operators of their own: a compiled graph then holds one node and not every block of the loop, and backward computes
# the blocks again instead of keeping them.


@opaque("mw_pair_sums")
def pair_sums(positives: Tensor, negatives: Tensor, temperature: float, chunk_size: int | None) -> Tensor:
    """For every positive p: sum over negatives n of softplus((n - p) / temperature); (P,) and (N,) give (P,)."""
    sums = torch.zeros_like(positives)
    for rows, _, x in _blocks(positives, negatives, temperature, chunk_size):
        sums[rows] += _softplus(x).sum(1)
    return sums


@opaque("mw_pair_gradients")
def pair_gradients(
    weights: Tensor, positives: Tensor, negatives: Tensor, temperature: float, chunk_size: int | None
) -> tuple[Tensor, Tensor]:
    """Gradients of ``(weights * pair_sums).sum()`` with respect to positives (P,) and negatives (N,)."""
    at_positives, at_negatives = torch.zeros_like(positives), torch.zeros_like(negatives)
    for rows, columns, x in _blocks(positives, negatives, temperature, chunk_size):
        slope = x.sigmoid_().mul_(weights[rows, None] / temperature)
        at_positives[rows] -= slope.sum(1)
        at_negatives[columns] += slope.sum(0)
    return at_positives, at_negatives


def _second(
    of: tuple[Tensor, ...],
    weights: Tensor,
    positives: Tensor,
    negatives: Tensor,
    temperature: float,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the product of ``of`` with ``pair_gradients``, with respect to its first three arguments.

    That product is the sum over pairs of weight * sigmoid(x) * (of_negative - of_positive) / temperature.
    """
    at_weights, at_positives, at_negatives = map(torch.zeros_like, (weights, positives, negatives))
    for rows, columns, x in _blocks(positives, negatives, temperature, chunk_size):
        sigmoid = x.sigmoid_()
        factor = (of[1][columns] - of[0][rows, None]) / temperature
        at_weights[rows] += (sigmoid * factor).sum(1)
        bend = sigmoid * (1 - sigmoid) * factor * (weights[rows, None] / temperature)
        at_positives[rows] -= bend.sum(1)
        at_negatives[columns] += bend.sum(0)
    return at_weights, at_positives, at_negatives


def block_size(x: Tensor) -> int:
    """How many numbers are worked on at a time: few enough for a CPU's cache, many enough for a GPU's cores."""
    return 1 << (17 if x.device.type == "cpu" else 24)


def _blocks(
    positives: Tensor, negatives: Tensor, temperature: float, chunk_size: int | None
) -> Iterator[tuple[slice, slice, Tensor]]:
    """All pairs, block by block: where the rows and columns are, and (n - p) / temperature, (rows, columns)."""
    block, total = block_size(negatives), max(1, len(negatives))
    columns = min(total, block) if chunk_size is None else total
    rows = max(1, block // columns) if chunk_size is None else chunk_size
    for i in range(0, len(positives), rows):
        for k in range(0, len(negatives), columns):
            row, column = slice(i, i + rows), slice(k, k + columns)
            # The difference first: near each other it is exact, whatever the temperature.
            yield row, column, (negatives[column] - positives[row, None]).div_(temperature)


def _softplus(x: Tensor) -> Tensor:
    return F.softplus(x, threshold=50)  # torch's 20 would be off by 2e-9


@pair_sums.register_fake
def _(positives: Tensor, negatives: Tensor, temperature: float, chunk_size: int | None) -> Tensor:
    return torch.empty_like(positives)


@pair_gradients.register_fake
def _(
    weights: Tensor, positives: Tensor, negatives: Tensor, temperature: float, chunk_size: int | None
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(positives), torch.empty_like(negatives)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.temperature, ctx.chunk_size = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, weights: Tensor) -> tuple[Any, ...]:
    return *pair_gradients(weights, *ctx.saved_tensors, ctx.temperature, ctx.chunk_size), None, None


def _double_backward(ctx: Any, *of: Tensor) -> tuple[Any, ...]:
    weights, positives, negatives = ctx.saved_tensors
    return *_second(of, weights, positives, negatives, ctx.temperature, ctx.chunk_size), None, None


pair_sums.register_autograd(_backward, setup_context=_keep)
pair_gradients.register_autograd(_double_backward, setup_context=_keep)
