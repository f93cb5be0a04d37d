"""Means over the tokens of a batch that are no padding, in one process or over several."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from assay._distributed import all_reduce_sum


@dataclass(frozen=True)
class Tokens:
    """Which rows of (tokens, C) count: ``real`` is 1 for those and 0 for padding, of shape (tokens, 1), or None."""

    real: Tensor | None
    count: Tensor  # over all processes if synchronized
    sync: bool

    @classmethod
    def of(cls, rows: Tensor, padding_mask: Tensor | None, sync: bool) -> Tokens:
        real = None if padding_mask is None else (~padding_mask).reshape(-1, 1).to(rows.dtype)
        count = rows.new_tensor(len(rows)) if real is None else real.sum()
        return cls(real, all_reduce_sum(count) if sync else count, sync)

    def mean(self, rows: Tensor) -> Tensor:
        """Mean over real tokens (C,); 0 if there are none."""
        return self.shared_mean((rows if self.real is None else rows * self.real).sum(0))

    def shared_mean(self, total: Tensor) -> Tensor:
        """The mean whose sum over this process's tokens is ``total``."""
        return (all_reduce_sum(total) if self.sync else total) / self.count.clamp_min(1)

    def update_(self, buffer: Tensor, value: Tensor) -> None:
        """Put a value into a buffer, unless there was no token to have it from."""
        buffer.copy_(torch.where(self.count > 0, value.to(buffer.dtype), buffer))


@torch.library.custom_op("assay::snapshot", mutates_args=())
def snapshot(buffer: Tensor) -> Tensor:
    """A copy of a buffer that is about to be updated.

    As an operator of its own it is what a compiled graph keeps for the backward pass. Of a plain copy it would know
    that it can be made again from the buffer, which has changed by then.
    """
    return buffer.clone()


@snapshot.register_fake
def _(buffer: Tensor) -> Tensor:
    return torch.empty_like(buffer)


def scaled(rows: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """``weight rows / sqrt(var + eps) + bias`` of each channel, in one pass: batch normalization of mean 0."""
    weight, bias = (p if p is None else p.to(rows.dtype) for p in (weight, bias))
    return F.batch_norm(rows, torch.zeros_like(var), var, weight, bias, False, 0.0, eps)


def scaled_backward(
    grad: Tensor, rows: Tensor, var: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`scaled` for a constant ``var``: of rows, weight (also where there is none) and bias."""
    if rows.shape[0] == 0:  # torch's kernel divides by the number of rows
        return rows.clone(), torch.zeros_like(var), torch.zeros_like(var)
    scale = torch.ones_like(var) if weight is None else weight.to(rows.dtype)
    return torch.ops.aten.native_batch_norm_backward(
        grad, rows, scale, torch.zeros_like(var), var, None, None, False, eps, [True, True, True]
    )


def check_tokens(input: Tensor, num_features: int, padding_mask: Tensor | None) -> None:
    """Refuse an input that is not (..., C), and a mask that is not boolean of its shape without C."""
    if input.dim() < 2 or input.shape[-1] != num_features:
        raise ValueError(f"input of shape {tuple(input.shape)}: (..., C) with C = {num_features} is wanted")
    if padding_mask is not None and (padding_mask.dtype != torch.bool or padding_mask.shape != input.shape[:-1]):
        raise ValueError(
            f"padding_mask of shape {tuple(padding_mask.shape)} and {padding_mask.dtype}: "
            f"boolean of shape {tuple(input.shape[:-1])} is wanted, True for padding"
        )
