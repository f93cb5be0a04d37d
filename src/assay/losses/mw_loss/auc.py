"""AUC of a pooled set of scores: whether scores mean the same for all queries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Matrix = Any
"""A (Q, M) matrix: a tensor, an array or a list of lists."""


def global_auc(scores: Matrix, positive_mask: Matrix, *, hard_k: int | None = None) -> float:
    """AUC of all scores in one pool: how often a positive of any query is above a negative of any query.

    With S+ the scores that ``positive_mask`` marks and S- all others (of each row only the ``hard_k`` highest) ::

        AUC = (1 / (|S+| |S-|)) sum over s+ in S+, s in S- of 1[s+ > s] + 1[s+ = s] / 2

    It is not the mean of the rows' AUCs: a query whose scores are all high counts against the others' positives.

    Args:
        scores: (Q, M), tensor or array; larger is nearer.
        positive_mask: (Q, M), nonzero where relevant.
        hard_k: None, or at least 1: how many negatives of a row enter the pool (the paper has 500).

    Raises:
        ValueError: shapes that differ, scores that are not finite, hard_k out of range, no positive or no negative.

    Source:
        Sheikholeslami et al., arXiv 2510.00137, 2025.

    Example:
        >>> from assay.metrics import global_auc
        >>> scores = [[0.9, 0.8], [0.1, 0.2]]  # each row is in order, but not the pool
        >>> global_auc(scores, [[1, 0], [0, 1]])
        0.75
        >>> global_auc([[0.9, 0.8], [0.8, 0.9]], [[1, 0], [0, 1]])
        1.0
    """
    positives, negatives = _pool(scores, positive_mask, hard_k)
    negatives = negatives.sort().values
    below = torch.searchsorted(negatives, positives).sum() + torch.searchsorted(negatives, positives, right=True).sum()
    return below.item() / (2 * len(positives) * len(negatives))


def aoc(scores: Matrix, positive_mask: Matrix, *, hard_k: int | None = None) -> float:
    """Area over the curve: ``1 - AUC`` of the pooled scores, where equal scores count one half.

    It is at most the mean of ``mw_loss`` over log 2, for every matrix and every temperature.

    Args:
        scores, positive_mask, hard_k: as in :func:`global_auc`.

    Raises:
        ValueError: as :func:`global_auc`.

    Source:
        Sheikholeslami et al., arXiv 2510.00137, 2025, Lemma 2.

    Example:
        >>> from assay.metrics import aoc
        >>> aoc([[0.9, 0.8], [0.1, 0.2]], [[1, 0], [0, 1]])
        0.25
    """
    return 1.0 - global_auc(scores, positive_mask, hard_k=hard_k)


def _pool(scores: Matrix, positive_mask: Matrix, hard_k: int | None) -> tuple[Tensor, Tensor]:
    """All positives and the (hard) negatives, in one dimension each."""
    if hard_k is not None and (isinstance(hard_k, bool) or not isinstance(hard_k, int) or hard_k < 1):
        raise ValueError(f"hard_k = {hard_k!r} is out of range: None, or an integer >= 1")
    scores = torch.as_tensor(scores).detach()
    scores = scores.float() if scores.dtype in (torch.bfloat16, torch.float16) else scores
    positive = torch.as_tensor(positive_mask, device=scores.device) != 0
    if scores.dim() != 2 or positive.shape != scores.shape:
        shapes = f"{tuple(positive.shape)} is out of range: that of the scores, {tuple(scores.shape)}"
        raise ValueError(f"positive_mask.shape = {shapes}")
    if not scores.isfinite().all():
        raise ValueError("scores hold a number that is not finite")
    positives, negatives = scores[positive], scores[~positive]
    if not (len(positives) and len(negatives)):
        raise ValueError("positive_mask marks all or no scores: there is nothing to compare")
    if hard_k is not None:
        precise = scores if scores.is_floating_point() else scores.double()
        highest = precise.masked_fill(positive, -torch.inf).topk(min(hard_k, scores.shape[1]), 1).values
        positives, negatives = positives.to(precise.dtype), highest[highest > -torch.inf]
    return positives, negatives
