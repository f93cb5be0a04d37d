"""What the processes of a group hold together, seen from each of them; alone, every function is the identity."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """How many processes share the work; 1 where none were started."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def rank(group: dist.ProcessGroup | None = None) -> int:
    """Which of them this is; 0 where none were started."""
    return dist.get_rank(group) if world_size(group) > 1 else 0


def all_gather_rows(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The rows of all processes, concatenated in the order of ranks, with gradients to every process's own rows.

    The processes may bring different numbers of rows. Backward sums what all processes ask of a row: if each computes
    the same loss L of all rows and then averages its parameters' gradients (DDP), scale L by the number of processes.
    """
    if world_size(group) == 1:
        return x
    return _GatherRows.apply(x, group)


def all_reduce_sum(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The sum over processes, with the gradient of a sum: backward sums what all processes ask of it."""
    if world_size(group) == 1:
        return x
    return _SumOver.apply(x, group)


def all_reduce_max(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The element-wise maximum over processes, without gradient."""
    if world_size(group) == 1:
        return x.detach()
    largest = x.detach().clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    return largest


@torch.no_grad()
def rows_by_rank(x: Tensor, group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """The rows that each process brings, of any dtype and in any number; without gradient."""
    if world_size(group) == 1:
        return [x.detach()]
    count = torch.tensor([len(x)], device=x.device)
    counts = [torch.zeros_like(count) for _ in range(world_size(group))]
    dist.all_gather(counts, count, group=group)
    sizes = [int(c) for c in counts]
    padded = x.new_zeros(max(sizes), *x.shape[1:])  # the collective wants equal shapes
    padded[: len(x)] = x
    sent = padded.view(torch.uint8)  # bytes, because the backends do not know every dtype
    received = [torch.empty_like(sent) for _ in sizes]
    dist.all_gather(received, sent, group=group)
    return [part.view(x.dtype)[:size] for part, size in zip(received, sizes, strict=True)]


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        parts = rows_by_rank(x, group)
        ctx.group, ctx.start, ctx.size = group, sum(map(len, parts[: rank(group)])), len(x)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        gradient = gradients[0].contiguous().clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient[ctx.start : ctx.start + ctx.size], None


class _SumOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        gradient = gradients[0].clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None
