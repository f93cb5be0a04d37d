"""Ranking measures over a matrix of scores, computed by scikit-learn where it has them.

All take ``scores`` (Q, M), larger is nearer, and ``relevant`` (Q, M) of the same shape, as tensors or arrays. For
retrieval among embeddings of one set, leave each query itself out by ``same_label_pairs``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

Matrix = Any
"""A (Q, M) matrix: a tensor, an array or a list of lists."""


def recall_at_k(scores: Matrix, relevant: Matrix, k: int = 1) -> float:
    """R@k of metric learning: the share of queries with a relevant item among their k best.

    Args:
        scores, relevant: (Q, M); queries without any relevant item are left out.
        k: at least 1.

    Raises:
        ValueError: shapes that differ, k out of range, or no query with a relevant item.

    Example:
        >>> from assay.metrics import recall_at_k
        >>> recall_at_k([[0.9, 0.1, 0.5], [0.2, 0.8, 0.3]], [[1, 0, 0], [1, 0, 0]], k=1)
        0.5
    """
    ranked, _ = _ranked(scores, relevant, k)
    return float(ranked[:, :k].any(1).mean())


def precision_at_k(scores: Matrix, relevant: Matrix, k: int = 1, *, attainable: bool = False) -> float:
    """P@k: the mean share of relevant items among the k best of each query.

    Args:
        scores, relevant: (Q, M); queries without any relevant item are left out.
        k: at least 1.
        attainable: divide by min(k, number of relevant items), so that the best ranking always has 1.

    Raises:
        ValueError: as in :func:`recall_at_k`.

    Example:
        >>> from assay.metrics import precision_at_k
        >>> precision_at_k([[0.9, 0.1, 0.5]], [[1, 0, 0]], k=2)
        0.5
        >>> precision_at_k([[0.9, 0.1, 0.5]], [[1, 0, 0]], k=2, attainable=True)
        1.0
    """
    ranked, totals = _ranked(scores, relevant, k)
    most = np.minimum(totals, k) if attainable else k
    return float((ranked[:, :k].sum(1) / most).mean())


def mean_reciprocal_rank(scores: Matrix, relevant: Matrix, k: int | None = None) -> float:
    """MRR@k: the mean of one over the rank of the first relevant item, 0 where it is beyond rank k.

    Args:
        scores, relevant: (Q, M); queries without any relevant item are left out.
        k: at least 1; None: the whole ranking.

    Raises:
        ValueError: as in :func:`recall_at_k`.

    Example:
        >>> from assay.metrics import mean_reciprocal_rank
        >>> mean_reciprocal_rank([[0.9, 0.1, 0.5], [0.2, 0.8, 0.3]], [[1, 0, 0], [0, 0, 1]], k=10)
        0.75
    """
    ranked, _ = _ranked(scores, relevant, 1 if k is None else k)
    first = ranked.argmax(1) + 1
    return float(np.where(first <= (k or ranked.shape[1]), 1 / first, 0.0).mean())


def mean_average_precision(scores: Matrix, relevant: Matrix) -> float:
    """mAP: the mean over queries of the average precision at the ranks of their relevant items.

    Args:
        scores, relevant: (Q, M); queries without any relevant item are left out. Equal scores share the worst rank.

    Raises:
        ValueError: as in :func:`recall_at_k`.

    Example:
        >>> from assay.metrics import mean_average_precision
        >>> mean_average_precision([[0.9, 0.1, 0.5, 0.0]], [[1, 0, 0, 1]])
        0.75
    """
    from sklearn.metrics import label_ranking_average_precision_score

    scores, relevant = _checked(scores, relevant)
    return float(label_ranking_average_precision_score(relevant, scores))


def ndcg(scores: Matrix, relevance: Matrix, k: int | None = None) -> float:
    """nDCG@k: discounted gain of the k best over that of the best possible ranking, mean over queries.

    Args:
        scores: (Q, M).
        relevance: (Q, M) gains >= 0, binary or graded; queries without any are left out.
        k: at least 1; None: the whole ranking.

    Raises:
        ValueError: as in :func:`recall_at_k`.

    Example:
        >>> from assay.metrics import ndcg
        >>> ndcg([[0.9, 0.1, 0.5]], [[1, 0, 0]], k=2)
        1.0
    """
    from sklearn.metrics import ndcg_score

    scores, relevance = _checked(scores, relevance)
    _check_k(k if k is not None else 1)
    return float(ndcg_score(relevance, scores, k=k))


def nmi(embeddings: Matrix, labels: Any, *, seed: int = 0) -> float:
    """NMI of metric learning: k-means with as many clusters as there are labels, compared with them.

    Args:
        embeddings: (N, d).
        labels: (N,) integers.
        seed: of k-means.

    Returns:
        Normalized mutual information in [0, 1], arithmetic mean in the denominator.

    Example:
        >>> from assay.metrics import nmi
        >>> nmi([[0.0, 0.0], [0.1, 0.0], [5.0, 5.0], [5.1, 5.0]], [0, 0, 1, 1])
        1.0
    """
    from sklearn.cluster import KMeans
    from sklearn.metrics import normalized_mutual_info_score

    points, labels = _array(embeddings), _array(labels)
    clusters = KMeans(len(np.unique(labels)), n_init=10, random_state=seed).fit_predict(points)
    return float(normalized_mutual_info_score(labels, clusters))


def same_label_pairs(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Leave-one-out retrieval within one set: cosine scores, and which pairs share a label.

    Args:
        embeddings: (N, d), not necessarily of unit length.
        labels: (N,) integers.

    Returns:
        scores (N, N - 1) and relevant (N, N - 1): every row's own column is left out.

    Raises:
        ValueError: lengths that differ.

    Example:
        >>> import torch
        >>> from assay.metrics import recall_at_k, same_label_pairs
        >>> x = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
        >>> recall_at_k(*same_label_pairs(x, torch.tensor([0, 0, 1, 1])), k=1)
        1.0
    """
    if embeddings.dim() != 2 or labels.shape != embeddings.shape[:1]:
        raise ValueError(f"labels.shape = {tuple(labels.shape)} is out of range: ({len(embeddings)},)")
    unit = torch.nn.functional.normalize(embeddings.detach(), dim=1)
    others = ~torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    rows = (len(unit), len(unit) - 1)
    return (unit @ unit.T)[others].view(rows), (labels[:, None] == labels)[others].view(rows)


def _array(values: Any) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
    return np.asarray(values)


def _checked(scores: Matrix, relevant: Matrix) -> tuple[np.ndarray, np.ndarray]:
    """Both as arrays, without the queries that have nothing to find."""
    scores, relevant = _array(scores), _array(relevant)
    if scores.ndim != 2 or scores.shape != relevant.shape:
        raise ValueError(f"relevant.shape = {relevant.shape} is out of range: that of the scores, {scores.shape}")
    if not np.isfinite(scores).all():
        raise ValueError("scores hold a number that is not finite")
    some = relevant.astype(bool).any(1)
    if not some.any():
        raise ValueError("relevant marks no item of any query: there is nothing to measure")
    return scores[some], relevant[some]


def _ranked(scores: Matrix, relevant: Matrix, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Relevance in the order of falling scores, ties in the order of the columns, and how many items are relevant."""
    scores, relevant = _checked(scores, relevant)
    _check_k(k)
    relevant = relevant.astype(bool)
    order = np.argsort(-scores, axis=1, kind="stable")
    return np.take_along_axis(relevant, order, 1), relevant.sum(1)


def _check_k(k: int) -> None:
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k = {k!r} is out of range: an integer >= 1")
