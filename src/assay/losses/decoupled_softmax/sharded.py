"""Sums over labels whose columns may be cut over the ranks of a group; with ``group=None`` all of them are here."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from assay._distributed import all_gather_rows, all_reduce_max, all_reduce_sum, rank, rows_by_rank

Group = dist.ProcessGroup | None


def total_of(x: Tensor, group: Group) -> Tensor:
    """The sum over ranks; backward sums what all ranks ask of it."""
    return x if group is None else all_reduce_sum(x, group)


def largest_of(x: Tensor, group: Group) -> Tensor:
    """The maximum over ranks, without gradient."""
    return x.detach() if group is None else all_reduce_max(x, group)


def shared_total(x: Tensor, group: Group) -> Tensor:
    """The sum over ranks as a loss that every rank holds whole: backward hands each rank the gradient once."""
    return x if group is None else _SharedTotal.apply(x, group)


def logsumexp_of(x: Tensor, group: Group = None, left_out: Tensor | None = None) -> Tensor:
    """log sum exp over the columns (N, C) of all ranks without those ``left_out`` (N, C): (N, 1).

    Of nothing it is -inf, with gradient 0 (torch gives nan).
    """
    out = x.isneginf() if left_out is None else left_out | x.isneginf()
    empty = out.all(1, keepdim=True)
    kept = torch.where(out, x.new_full((), -math.inf).masked_fill(empty, 0.0), x)
    result = kept.logsumexp(1, keepdim=True).masked_fill(empty, -math.inf)
    return result if group is None else logsumexp_of(all_gather_rows(result.T, group).T)


def first_column(width: int, group: dist.ProcessGroup, device: torch.device) -> int:
    """How many columns the lower ranks hold."""
    widths = rows_by_rank(torch.tensor([width], device=device), group)
    return sum(int(w) for w in widths[: rank(group)])


class _SharedTotal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return all_reduce_sum(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], None
