"""Decoupled softmax and soft top-k losses: several labels are relevant to a query and must not compete."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from assay.losses.decoupled_softmax.chunked import (
    chunked_decoupled_softmax,
    chunked_soft_topk_loss,
    encode_in_chunks,
)
from assay.losses.decoupled_softmax.positives import Positives, Target, positives_from_csr
from assay.losses.decoupled_softmax.sharded import Group, logsumexp_of, shared_total
from assay.losses.decoupled_softmax.soft_topk import centred, log_soft_topk, soft_topk, threshold
from assay.losses.decoupled_softmax.terms import (
    check_options,
    check_temperature,
    check_topk,
    decoupled_terms,
    places_and_positives,
    reduced,
    topk_terms,
)

__all__ = [
    "chunked_decoupled_softmax",
    "chunked_soft_topk_loss",
    "decoupled_softmax",
    "encode_in_chunks",
    "log_soft_topk",
    "multilabel_bce",
    "multilabel_softmax",
    "positives_from_csr",
    "soft_topk",
    "soft_topk_loss",
]

if TYPE_CHECKING:
    from assay.bench.recipe import Batch, Objective, Recipe, Run


def decoupled_softmax(
    scores: Tensor,
    target: Target,
    *,
    temperature: float | Tensor = 1.0,
    num_sampled_positives: int | None = None,
    normalize: str = "mean",
    weights: Tensor | None = None,
    generator: torch.Generator | None = None,
    reduction: str = "mean",
    group: Group = None,
) -> Tensor:
    """Softmax over labels in which each positive meets the negatives only, not the other positives.

    For a query with scores z, s = z / temperature and positives P ::

        loss = 1/|P| sum over j in P of  - s_j + log( exp(s_j) + sum over c not in P of exp(s_c) )

    so no positive's gradient is ever positive. With one positive it is cross-entropy. Half precision is computed in
    float32. A query without positives has loss 0, and counts in the mean.

    Args:
        scores: (N, C), floating point; -inf takes a label that is no positive out.
        target: relevance (N, C), bool or numbers, positives being the entries above 0; or a pair (indices (N, P),
            values (N, P)) that lists each positive once, entries of value 0 being padding.
        temperature: above 0; a tensor may be learned.
        num_sampled_positives: None, or how many positives a query has in this step, at least 1; drawn without
            replacement in proportion to the target's values. The others are left out, and are no negatives.
        normalize: ``"mean"`` over the positives of a query as above, or ``"sum"``, without the 1/|P|.
        weights: None, or a factor for each positive's term, of the shape of target (of values); |P| stays a number.
        generator: draws the samples.
        reduction: ``"none"`` gives (N,); ``"mean"`` over the N queries; ``"sum"``.
        group: where the labels' columns are cut over the ranks of a process group, that group: ``scores`` are this
            rank's columns, in the order of ranks. A dense target is the same slice, lists are whole and alike on all
            ranks, with indices over all labels. Every rank gets the loss of all labels, and its columns' gradient.

    Raises:
        ValueError: an argument or an index out of range, shapes that do not fit.

    Source:
        Gupta et al.: Dual-encoders for Extreme Multi-label Classification, ICLR 2024, arXiv 2310.10636.

    Example:
        >>> import torch
        >>> from assay.losses import decoupled_softmax
        >>> scores = torch.tensor([[4.0, 1.0, 0.0, 0.0]])
        >>> decoupled_softmax(scores, torch.tensor([[True, True, False, False]]), reduction="none")
        tensor([0.2937])
        >>> decoupled_softmax(scores, (torch.tensor([[0, 1]]), torch.ones(1, 2)), reduction="none")
        tensor([0.2937])
    """
    x = _scaled(scores, temperature)
    check_options(reduction, normalize, num_sampled_positives)
    positives = Positives.read(target, x.shape, group)
    chosen = positives.marked
    if num_sampled_positives is not None:
        chosen = positives.draw(num_sampled_positives, generator)
    rest = logsumexp_of(x, group, left_out=positives.columns_of(positives.marked))
    terms = decoupled_terms(positives.of(x), rest, chosen & positives.here)
    return reduced(positives.total(terms, chosen, weights, normalize), reduction, scores.dtype)


def soft_topk_loss(
    scores: Tensor,
    target: Target,
    *,
    k: int | Tensor | str = 5,
    alpha: float = 2.0,
    n_iter: int = 32,
    temperature: float | Tensor = 1.0,
    reduction: str = "mean",
    sample_positives: bool = True,
    normalize: str = "mean",
    weights: Tensor | None = None,
    generator: torch.Generator | None = None,
    group: Group = None,
) -> Tensor:
    """The loss of precision at k: each positive should have one of the k places of a soft top-k.

    For a query with scores z, s = z / temperature, positives P and y = soft_topk(s, k, alpha) ::

        loss = - 1/|P| sum over j in P of log y_j

    Where a query has more than k positives, k of them are drawn, by the target's values, and the others take no part.
    Alpha sharpens the scores after the temperature has. A query without positives has loss 0, and counts in the mean.

    Args:
        scores, target, temperature, reduction, normalize, weights, generator, group: as in
            :func:`decoupled_softmax`.
        k: an integer in [1, C - 1]; one for each query (N,); or ``"num_pos"``, the number of its positives.
        alpha: above 0.
        n_iter: halvings in search of the threshold, at least 1.
        sample_positives: False: all positives count, and share the k places.

    Raises:
        ValueError: as in :func:`decoupled_softmax`; k out of range.

    Source:
        Gupta et al., arXiv 2310.10636.

    Example:
        >>> import torch
        >>> from assay.losses import soft_topk_loss
        >>> scores = torch.tensor([[4.0, 1.0, 0.0, 0.0]])
        >>> soft_topk_loss(scores, torch.tensor([[True, True, False, False]]), k=2, reduction="none")
        tensor([0.2328])
    """
    x = _scaled(scores, temperature)
    check_options(reduction, normalize)
    check_topk(k, alpha, n_iter, len(x), x.shape[1] if group is None else None)
    positives = Positives.read(target, x.shape, group)
    places, chosen = places_and_positives(k, positives, sample_positives, generator)
    out = positives.columns_of(positives.marked & ~chosen)
    shifted = centred(x.masked_fill(out, -math.inf), group)
    t = threshold(shifted, places, alpha, n_iter, group)
    terms = topk_terms(positives.of(shifted), t, alpha, chosen & positives.here)
    return reduced(positives.total(terms, chosen, weights, normalize), reduction, scores.dtype)


def multilabel_softmax(
    scores: Tensor,
    target: Target,
    *,
    temperature: float | Tensor = 1.0,
    num_sampled_positives: int | None = None,
    normalize: str = "sum",
    weights: Tensor | None = None,
    generator: torch.Generator | None = None,
    reduction: str = "mean",
    group: Group = None,
) -> Tensor:
    """The plain softmax over all labels (InfoNCE), in which positives compete: the baseline.

    For a query with scores z, s = z / temperature and positives P ::

        loss = sum over j in P of  - s_j + log( sum over all c of exp(s_c) )

    Its gradient lowers a positive whose probability exceeds 1/|P|. With one positive it is cross-entropy.

    Args:
        normalize: ``"sum"``, as above and in the authors' experiments, or ``"mean"``, over |P|. Compare it with
            :func:`decoupled_softmax` at equal ``normalize``: the default of that one is the other.
        num_sampled_positives: as there, but a positive that is not drawn stays in the denominator.
        scores, target, temperature, weights, generator, reduction, group: as there.

    Raises:
        ValueError: as there.

    Source:
        The baseline of Gupta et al., arXiv 2310.10636.

    Example:
        >>> import torch
        >>> from assay.losses import multilabel_softmax
        >>> scores = torch.tensor([[4.0, 1.0, 0.0, 0.0]])
        >>> multilabel_softmax(scores, torch.tensor([[True, True, False, False]]), normalize="mean")
        tensor(1.5829)
    """
    x = _scaled(scores, temperature)
    check_options(reduction, normalize, num_sampled_positives)
    positives = Positives.read(target, x.shape, group)
    chosen = positives.marked
    if num_sampled_positives is not None:
        chosen = positives.draw(num_sampled_positives, generator)
    terms = logsumexp_of(x, group) - positives.of(x).masked_fill(~(chosen & positives.here), 0.0)
    return reduced(positives.total(terms, chosen, weights, normalize), reduction, scores.dtype)


def multilabel_bce(
    scores: Tensor,
    target: Target,
    *,
    temperature: float | Tensor = 1.0,
    normalize: str = "mean",
    weights: Tensor | None = None,
    reduction: str = "mean",
    group: Group = None,
) -> Tensor:
    """A logistic regression for each label: the other baseline.

    For a query with scores z, s = z / temperature and positives P ::

        loss = 1/C ( sum over j in P of softplus(- s_j)  +  sum over c not in P of softplus(s_c) )

    Args:
        normalize: ``"mean"`` over the C labels, as above, or ``"sum"``.
        weights: of the positives' terms.
        scores, target, temperature, reduction, group: as in :func:`decoupled_softmax`.

    Raises:
        ValueError: as there.

    Source:
        The baseline of Gupta et al., arXiv 2310.10636.

    Example:
        >>> import torch
        >>> from assay.losses import multilabel_bce
        >>> multilabel_bce(torch.zeros(1, 4), torch.tensor([[True, True, False, False]]))
        tensor(0.6931)
    """
    x = _scaled(scores, temperature)
    check_options(reduction, normalize)
    positives = Positives.read(target, x.shape, group)
    negatives = -F.logsigmoid(-x).masked_fill(positives.columns_of(positives.marked), 0.0)
    losses = positives.total(-F.logsigmoid(positives.of(x)), positives.marked, weights, "sum")
    losses = losses + shared_total(negatives.sum(1), group)
    if normalize == "mean":
        losses = losses / shared_total(x.new_tensor(x.shape[1]), group)
    return reduced(losses, reduction, scores.dtype)


def _scaled(scores: Tensor, temperature: float | Tensor) -> Tensor:
    """Scores over temperature, in single precision at least."""
    if scores.dim() != 2 or not scores.is_floating_point():
        raise ValueError(f"scores = {scores.dtype} of shape {tuple(scores.shape)} is out of range: floating (N, C)")
    check_temperature(temperature)
    return scores.to(torch.promote_types(scores.dtype, torch.float32)) / temperature


def apply(recipe: Recipe, *, k: int = 1, alpha: float = 2.0) -> Recipe:
    """The soft top-k loss as the objective of a classification; the decoupled softmax would be cross-entropy there."""
    check_topk(k, alpha, 32, 0, None)

    def objective(run: Run) -> Objective:
        if run.task.classes is None:
            raise ValueError("decoupled-softmax needs a classification task")
        check_topk(k, alpha, 32, 0, run.task.classes)

        def loss(model: Callable[[Any], Any], batch: Batch) -> Tensor:
            right = batch.target[:, None]
            return soft_topk_loss(model(batch.input), (right, torch.ones_like(right)), k=k, alpha=alpha)

        return loss

    return replace(recipe, objective=objective)
