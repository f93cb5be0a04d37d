"""What the losses on scores and the losses on embeddings have in common: a positive's term, and the reduction."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from assay.losses.decoupled_softmax.positives import Positives
from assay.losses.decoupled_softmax.soft_topk import check_bisection, check_k


def decoupled_terms(s: Tensor, rest: Tensor, used: Tensor) -> Tensor:
    """- log( exp(s) / (exp(s) + exp(rest)) ) of scores (N, W) and the negatives' log sum (N, 1), where ``used``."""
    # Masked before the sigmoid: where a score and rest are both -inf their difference is nan.
    return -F.logsigmoid((s - rest).masked_fill(~used, 0.0))


def topk_terms(s: Tensor, t: Tensor, alpha: float, used: Tensor) -> Tensor:
    """- log sigmoid(alpha (s + t)) of scores (N, W) and thresholds (N, 1), where ``used``."""
    return -F.logsigmoid(alpha * (s + t).masked_fill(~used, 0.0))


def places_and_positives(
    k: Any, positives: Positives, sample_positives: bool, generator: torch.Generator | None
) -> tuple[int | Tensor, Tensor]:
    """How many places each query has, and which positives compete for them."""
    if isinstance(k, str):
        # A query without positives gets a place that nothing asks for.
        return positives.count(positives.marked).clamp(min=1), positives.marked
    return k, positives.draw(k, generator) if sample_positives else positives.marked


def check_temperature(temperature: float | Tensor) -> None:
    # A tensor is not looked at: a device would have to wait.
    if not isinstance(temperature, Tensor) and not 0 < temperature < math.inf:
        raise ValueError(f"temperature = {temperature!r} is out of range: above 0")


def check_topk(k: Any, alpha: float, n_iter: int, rows: int, columns: int | None) -> None:
    check_bisection(alpha, n_iter)
    if isinstance(k, str):
        if k != "num_pos":
            raise ValueError(f"k = {k!r} is out of range: an integer, one for each query, or 'num_pos'")
    else:
        check_k(k, rows, columns)


def check_options(reduction: str, normalize: str, num_sampled_positives: Any = None) -> None:
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction = {reduction!r} is out of range: 'none', 'mean' or 'sum'")
    if normalize not in ("mean", "sum"):
        raise ValueError(f"normalize = {normalize!r} is out of range: 'mean' or 'sum'")
    number = num_sampled_positives
    if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
        raise ValueError(f"num_sampled_positives = {number!r} is out of range: None or an integer >= 1")


def reduced(losses: Tensor, reduction: str, dtype: torch.dtype) -> Tensor:
    if reduction == "none":
        return losses.to(dtype)
    total = losses.sum()
    return (total / max(1, len(losses)) if reduction == "mean" else total).to(dtype)
