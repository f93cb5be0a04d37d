"""A frozen linear layer whose weight is adapted in a low rank, with its row norms as parameters of their own."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GradNormLoRPLinear(nn.Module):
    """A frozen linear layer with a weight-normalized low-rank update, for training with :class:`GradNormLoRP`.

    With the base's weight W0 (out, in), and s = alpha / rank ::

        W = m * (W0 + s B A) / |W0 + s B A|                     |.| the norm of each row, a constant in the gradient
        y = x W^T + bias

    A (rank, in) begins at random, B (out, rank) at zero and m (out,) at the row norms of W0, so the layer begins as the
    base; they are ``lora_A``, ``lora_B`` and ``lora_magnitude_vector``, the only parameters that train. Dropout acts on
    the input of A alone. ``merge()`` is a plain ``torch.nn.Linear`` with the weight W.

    Args:
        base: the layer to adapt; it becomes a part of this one, frozen.
        rank: of the update, an int >= 1.
        alpha: scales the update, > 0.
        dropout: in [0, 1).
        device, dtype: None, those of the base; otherwise a copy of the base is adapted there.

    Shapes: (..., in) to (..., out).

    Raises:
        ValueError: an argument out of range.
        TypeError: ``base`` is no ``torch.nn.Linear``.

    Source: J.-H. Huang et al., AAAI 2025, arXiv 2412.19616; S.-Y. Liu et al., DoRA, ICML 2024, arXiv 2402.09353.

    >>> import torch
    >>> from assay.nn import GradNormLoRPLinear
    >>> base = torch.nn.Linear(8, 4)
    >>> layer = GradNormLoRPLinear(base, rank=2)
    >>> x = torch.randn(3, 8)
    >>> torch.allclose(layer(x), base(x), atol=1e-5), sum(p.numel() for p in layer.parameters() if p.requires_grad)
    (True, 28)
    """

    def __init__(
        self, base: nn.Linear, rank: int = 8, alpha: float = 16, dropout: float = 0.0, *,
        device: Any = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if not isinstance(base, nn.Linear):
            raise TypeError(f"base = {base!r} is out of range: a torch.nn.Linear")
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f"rank = {rank!r} is out of range: an int >= 1")
        if not alpha > 0:
            raise ValueError(f"alpha = {alpha!r} is out of range: a number > 0")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout = {dropout!r} is out of range: [0, 1)")
        if device is not None or dtype is not None:
            base = copy.deepcopy(base).to(device=device, dtype=dtype)
        self.base = base.requires_grad_(False)
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        weight = base.weight
        self.lora_A = nn.Parameter(weight.new_empty(rank, base.in_features))
        self.lora_B = nn.Parameter(weight.new_zeros(base.out_features, rank))
        self.lora_magnitude_vector = nn.Parameter(row_norms(weight.detach()))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def direction(self) -> Tensor:
        """W0 + s B A, shape (out, in)."""
        return self.base.weight + self.lora_B @ self.lora_A * (self.alpha / self.rank)

    def row_scale(self) -> Tensor:
        """m / |W0 + s B A|, shape (out,)."""
        with torch.no_grad():
            norms = row_norms(self.direction())
        return self.lora_magnitude_vector / norms

    def forward(self, x: Tensor) -> Tensor:
        dropped = F.dropout(x, self.dropout, self.training)
        update = F.linear(F.linear(dropped, self.lora_A), self.lora_B) * (self.alpha / self.rank)
        y = (F.linear(x, self.base.weight) + update) * self.row_scale()
        return y if self.base.bias is None else y + self.base.bias

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """A plain linear layer that computes the same (in evaluation, where there is no dropout)."""
        weight = self.direction() * self.row_scale()[:, None]
        merged = nn.Linear(
            self.base.in_features, self.base.out_features, self.base.bias is not None, weight.device, weight.dtype
        )
        merged.weight.copy_(weight)
        if self.base.bias is not None:
            merged.bias.copy_(self.base.bias)
        return merged

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, dropout={self.dropout}"


def row_norms(weight: Tensor) -> Tensor:
    """The norm of each row, in float32 at least, above zero."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return torch.linalg.vector_norm(weight, dim=1, dtype=wide).clamp_min(1e-12).to(weight.dtype)
