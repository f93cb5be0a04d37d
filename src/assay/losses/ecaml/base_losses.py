"""The metric losses that the paper adds its term to: binomial deviance, N-pair and triplet, on cosine similarities."""

from __future__ import annotations

import math
from numbers import Integral

import torch
import torch.nn.functional as F
from torch import Tensor

from assay._checks import in_range


def binomial_deviance(
    embeddings: Tensor,
    labels: Tensor,
    *,
    alpha: float = 2.0,
    beta: float = 0.5,
    cost_pos: float = 1.0,
    cost_neg: float = 25.0,
) -> Tensor:
    """Binomial deviance of cosine similarities, pairs of a class and pairs of two classes averaged apart.

    With s_ij = cos(embeddings[i], embeddings[j]), over pairs i < j ::

        loss = mean over labels[i] == labels[j] of log(1 + exp(-alpha cost_pos (s_ij - beta)))
             + mean over labels[i] != labels[j] of log(1 + exp( alpha cost_neg (s_ij - beta)))

    A term without pairs is 0. Half precision is computed in float32.

    Args:
        embeddings: (N, d), floating point, not normalized or normalized alike.
        labels: (N,).
        alpha: steepness, above 0.
        beta: the similarity at which pairs are parted.
        cost_pos, cost_neg: further factors on the steepness for pairs of one class and of two, above 0.

    Returns:
        A scalar.

    Raises:
        ValueError: shapes that do not fit, an argument out of range.

    Source:
        Yi, Lei, Li: Deep Metric Learning for Practical Person Re-Identification, ICPR 2014, arXiv 1407.4979; in this
        form the main loss of Chen, Deng, arXiv 1901.07169.

    Example:
        >>> import torch
        >>> from assay.losses import binomial_deviance
        >>> x = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
        >>> binomial_deviance(x, torch.tensor([0, 0, 1]))  # log(1 + e^-1) + log(1 + e^-25)
        tensor(0.3133)
    """
    check_pairs_of(embeddings, labels)
    for name, value in (("alpha", alpha), ("cost_pos", cost_pos), ("cost_neg", cost_neg)):
        in_range(name, value, 0 < value < math.inf, "(0, inf)")
    in_range("beta", beta, math.isfinite(beta), "a finite number")
    unit = _unit(embeddings)
    distance, same = unit @ unit.T - beta, _same(labels)
    upper = torch.ones_like(same).triu(1)
    pull = _mean(-F.logsigmoid(alpha * cost_pos * distance), same & upper)
    push = _mean(-F.logsigmoid(-alpha * cost_neg * distance), ~same & upper)
    return (pull + push).to(embeddings.dtype)


def n_pair_loss(embeddings: Tensor, labels: Tensor, *, scale: float | None = 10.0, penalty: float = 5e-4) -> Tensor:
    """N-pair loss: each positive of an anchor against all its negatives at once.

    With x_i = scale embeddings[i] / |embeddings[i]|, over anchors a and their positives p ::

        loss = mean over (a, p) of log(1 + sum over labels[n] != labels[a] of exp(x_a . x_n - x_a . x_p))
             + penalty / 2 mean over i of |x_i|^2

    Half precision is computed in float32.

    Args:
        embeddings: (N, d), floating point.
        labels: (N,).
        scale: length that embeddings are brought to, above 0; None: they are taken as they are. With a length the
            penalty is the constant penalty scale^2 / 2.
        penalty: at least 0.

    Returns:
        A scalar; without a pair of one class the penalty alone.

    Raises:
        ValueError: shapes that do not fit, an argument out of range.

    Source:
        Sohn: Improved Deep Metric Learning with Multi-class N-pair Loss Objective, NIPS 2016; in this form in Chen,
        Deng, arXiv 1901.07169.

    Example:
        >>> import torch
        >>> from assay.losses import n_pair_loss
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
        >>> n_pair_loss(x, torch.tensor([0, 0, 1, 1]), scale=1.0, penalty=0.0)  # log(1 + e^1 + e^0)
        tensor(1.5514)
    """
    check_pairs_of(embeddings, labels)
    in_range("scale", scale, scale is None or 0 < scale < math.inf, "None or (0, inf)")
    in_range("penalty", penalty, 0 <= penalty < math.inf, "[0, inf)")
    x = _precise(embeddings) if scale is None else scale * _unit(embeddings)
    similarity, same = x @ x.T, _same(labels)
    # Not -inf: the logarithm of no negatives at all would have no gradient.
    negatives = similarity.masked_fill(same, torch.finfo(x.dtype).min / 2).logsumexp(1, keepdim=True)
    loss = _mean(-F.logsigmoid(similarity - negatives), _positives(same))
    return (loss + penalty / 2 * x.square().sum() / max(1, len(x))).to(embeddings.dtype)


def triplet_margin_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    margin: float = 0.1,
    negatives: int = 120,
    hard: float = 0.5,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Triplet loss on cosine similarities, with negatives of which some are the hardest and some are random.

    With s_ij = cos(embeddings[i], embeddings[j]), over anchors a, their positives p and the negatives n chosen for a ::

        loss = mean over (a, p, n) of max(0, margin + s_an - s_ap)

    The choice: the ``hard`` share of ``negatives`` are those nearest to a, the others are drawn from the rest without
    replacement; where a has no more than ``negatives``, all. Half precision is computed in float32. Takes N^2 times
    min(``negatives``, N) numbers.

    Args:
        embeddings: (N, d), floating point.
        labels: (N,).
        margin: at least 0.
        negatives: for each anchor, at least 1.
        hard: share of them that are the nearest ones, in [0, 1].
        generator: draws the others; None: torch's global one.

    Returns:
        A scalar; 0 without a triplet.

    Raises:
        ValueError: shapes that do not fit, an argument out of range.

    Source:
        Schroff, Kalenichenko, Philbin: FaceNet, CVPR 2015, arXiv 1503.03832; in this form in Chen, Deng, arXiv
        1901.07169.

    Example:
        >>> import torch
        >>> from assay.losses import triplet_margin_loss
        >>> x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.6, 0.8]])
        >>> triplet_margin_loss(x, torch.tensor([0, 0, 1]), margin=0.5)  # 0.5 + 0.6 - 1
        tensor(0.1000)
    """
    check_pairs_of(embeddings, labels)
    in_range("margin", margin, 0 <= margin < math.inf, "[0, inf)")
    whole = isinstance(negatives, Integral) and not isinstance(negatives, bool)
    in_range("negatives", negatives, whole and negatives >= 1, "an integer >= 1")
    in_range("hard", hard, 0 <= hard <= 1, "[0, 1]")
    unit = _unit(embeddings)
    similarity, same = unit @ unit.T, _same(labels)
    chosen, valid = _negatives(similarity.detach(), same, negatives, hard, generator)
    to_negative = similarity.gather(1, chosen)
    losses = F.relu(margin + to_negative[:, None, :] - similarity[:, :, None])
    return _mean(losses, _positives(same)[:, :, None] & valid[:, None, :]).to(embeddings.dtype)


def _negatives(
    similarity: Tensor, same: Tensor, count: int, hard: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """For each anchor the indices (N, k) of its negatives, and which of them are any (N, k)."""
    n = len(same)
    place = generator.device if generator is not None else same.device
    keys = torch.rand(n, n, generator=generator, device=place).to(same.device)
    nearest = similarity.masked_fill(same, -math.inf).topk(min(int(hard * count), n), dim=1).indices
    keys = keys.scatter(1, nearest, 2.0).masked_fill(same, -1.0)
    largest, chosen = keys.topk(min(count, n), dim=1)
    return chosen, largest >= 0


def check_pairs_of(embeddings: Tensor, labels: Tensor) -> None:
    """Refuse what is no batch of vectors with a label each."""
    if embeddings.dim() != 2:
        raise ValueError(f"embeddings.shape = {tuple(embeddings.shape)} is out of range: (N, d)")
    if labels.shape != embeddings.shape[:1]:
        raise ValueError(f"labels.shape = {tuple(labels.shape)} is out of range: ({len(embeddings)},)")
    if not embeddings.is_floating_point():
        raise ValueError(f"embeddings.dtype = {embeddings.dtype} is out of range: floating point")


def _precise(embeddings: Tensor) -> Tensor:
    return embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))


def _unit(embeddings: Tensor) -> Tensor:
    return F.normalize(_precise(embeddings), dim=1)


def _same(labels: Tensor) -> Tensor:
    return labels[:, None] == labels


def _positives(same: Tensor) -> Tensor:
    return same & ~torch.eye(len(same), dtype=torch.bool, device=same.device)


def _mean(values: Tensor, used: Tensor) -> Tensor:
    """The mean of the values used, 0 of none."""
    return (values * used).sum() / used.sum().clamp(min=1)
