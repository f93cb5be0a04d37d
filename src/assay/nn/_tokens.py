"""Means over the tokens of a batch that are no padding, in one process or over several."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from assay._distributed import all_reduce_sum
from assay.nn._compiled import kept, total


@dataclass(frozen=True)
class Tokens:
    """Which rows of (tokens, C) count: ``real`` is 1 for those and 0 for padding, of shape (tokens, 1), or None."""

    real: Tensor | None
    count: Tensor | int  # over all processes if synchronized
    sync: bool

    @classmethod
    def of(cls, rows: Tensor, padding_mask: Tensor | None, sync: bool) -> Tokens:
        real = None if padding_mask is None else (~padding_mask).reshape(-1, 1).to(rows.dtype)
        if real is None and not sync:
            return cls(None, rows.shape[0], False)
        count = rows.new_tensor(rows.shape[0]) if real is None else real.sum()
        return cls(real, all_reduce_sum(count) if sync else count, sync)

    def mean(self, rows: Tensor) -> Tensor:
        """Mean over real tokens (C,); 0 if there are none."""
        return self.shared_mean(total(rows if self.real is None else rows * self.real))

    def shared_mean(self, summed: Tensor) -> Tensor:
        """The mean whose sum over this process's tokens is ``summed``."""
        summed = all_reduce_sum(summed) if self.sync else summed
        return summed / (max(self.count, 1) if isinstance(self.count, int) else self.count.clamp_min(1))

    def update_(self, buffer: Tensor, value: Tensor) -> None:
        """Put a value into a buffer, unless there was no token to have it from."""
        if not isinstance(self.count, int):
            value = torch.where(self.count > 0, value.to(buffer.dtype), buffer)
        elif self.count == 0:
            return
        buffer.copy_(value)


def scaled(rows: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """``weight rows / sqrt(var + eps) + bias`` of each channel, in one pass: batch normalization of mean 0."""
    weight, bias = (p if p is None else p.to(rows.dtype) for p in (weight, bias))
    if not torch.compiler.is_compiling():
        return F.batch_norm(rows, torch.zeros_like(var), var, weight, bias, False, 0.0, eps)
    scale = (var + eps).rsqrt()
    (scale,) = kept(scale if weight is None else weight * scale)
    return rows * scale if bias is None else rows * scale + bias


def scaled_backward(
    grad: Tensor, rows: Tensor, var: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`scaled` for a constant ``var``: of rows, weight (also where there is none) and bias."""
    if rows.shape[0] == 0:  # torch's kernel divides by the number of rows
        return rows.clone(), torch.zeros_like(var), torch.zeros_like(var)
    if torch.compiler.is_compiling():
        inverse = (var + eps).rsqrt()
        (scale,) = kept(inverse if weight is None else weight.to(rows.dtype) * inverse)
        return grad * scale, total(grad * rows) * inverse, total(grad)
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
