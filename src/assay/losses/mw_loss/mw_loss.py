"""MW loss: every positive score above every negative score of the batch, whichever queries they belong to."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from assay._checks import in_range
from assay._distributed import all_gather_rows, all_reduce_sum, rank, rows_by_rank, world_size
from assay.losses.mw_loss.auc import aoc, global_auc
from assay.losses.mw_loss.binned_sums import binned_sums
from assay.losses.mw_loss.pair_sums import pair_sums

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from assay.bench.recipe import Batch, Objective, Recipe, Run

__all__ = ["aoc", "apply", "contrastive_loss", "global_auc", "mw_loss"]

MANY = 2**24
"""Pairs from which on ``pairs="auto"`` forms none: 0.4 s of a CPU."""


def mw_loss(
    scores: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float = 0.01,
    positive_mask: Tensor | None = None,
    negative_mask: Tensor | None = None,
    reduction: str = "mean",
    chunk_size: int | None = None,
    pairs: str = "auto",
    group: ProcessGroup | None = None,
) -> Tensor:
    """Mann-Whitney loss of a score matrix: a smooth count of the pairs (positive, negative) in the wrong order.

    With S+ the scores of all positives and S- those of all negatives, *of all rows* ::

        l(s+, s) = log(1 + exp(-(s+ - s) / temperature))
        loss     = mean over s+ in S+ and s in S- of l(s+, s)

    Pairs are not kept within a query, so that an offset of a whole row, which the contrastive loss cannot see, counts
    here. The share of wrongly ordered pairs (``assay.metrics.aoc``) is at most loss / log 2, for every temperature.

    Args:
        scores: (B, M) similarities, floating point. Half precision is computed in float32 and returned as it came, or,
            under autocast, in float32.
        target: (B,) int64, the column of each row's positive; the rest of the row is negative. By default row i's is
            column i, which wants M >= B.
        temperature: > 0.
        positive_mask, negative_mask: (B, M) bool. ``positive_mask`` replaces ``target``, with any number of positives
            in a row; ``negative_mask`` says which of the other cells are negatives, by default all. Cells in neither
            are ignored. A row may have no positive: its negatives still count.
        reduction: ``"mean"`` over all pairs; ``"paper"``: sum over negatives, mean over positives (the paper's
            equation 3), which grows with the batch; ``"none"``: for each positive the mean over all negatives, (B,),
            or with ``positive_mask`` in the order of ``scores[positive_mask]``. Without any pair the loss is 0.
        chunk_size: how many positives are compared with all negatives at a time, at least 1: memory is about
            3 * chunk_size * |S-| numbers, forward and backward. None: pieces of fixed size (2^17 pairs on a CPU, 2^24
            on a GPU), also of the negatives. The value does not depend on it; ``"binned"`` has no use for it.
        pairs: ``"exact"`` looks at each of the |S+| |S-| pairs. ``"binned"`` puts scores into bins and never forms a
            pair: each l is off by less than 3e-8, and its slope in s / temperature by less than 3e-8; the time grows
            with B * M alone. It differentiates once, wants float64 on its device, and where the scores span more than
            8,000 temperatures it does as ``"exact"``. ``"auto"`` is ``"binned"`` from 2^24 pairs on (256 queries) for
            scores of at most float32, whose own rounding is of that size, and ``"exact"`` otherwise.
        group: processes whose rows make one pool (``torch.distributed.group.WORLD`` for all; that is None where no
            processes were started). Each brings rows of its own, and the default target of its row i is column i plus
            the number of rows before its own. All return the loss of the pool; its gradient is scaled for parameters
            that are averaged over processes, as DDP does. ``"none"`` gives a process its own positives.

    Raises:
        ValueError: an argument out of range, shapes that do not fit, a cell in both masks.

    Source:
        Sheikholeslami et al.: Optimizing What Matters: AUC-Driven Learning for Robust Neural Retrieval, 2025, arXiv
        2510.00137.

    Example:
        >>> import torch
        >>> from assay.losses import contrastive_loss, mw_loss
        >>> scores = torch.tensor([[0.9, 0.3], [0.1, 0.8]])
        >>> lower = scores - torch.tensor([[0.0], [0.6]])  # the second query scores everything lower
        >>> [round(mw_loss(s, temperature=0.1).item(), 4) for s in (scores, lower)]
        [0.0026, 0.3292]
        >>> [round(contrastive_loss(s, temperature=0.1).item(), 4) for s in (scores, lower)]
        [0.0017, 0.0017]
    """
    _check_scores(scores)
    _check_temperature(temperature)
    in_range("reduction", reduction, reduction in ("mean", "paper", "none"), "'mean', 'paper' or 'none'")
    in_range("pairs", pairs, pairs in ("auto", "exact", "binned"), "'auto', 'exact' or 'binned'")
    whole = isinstance(chunk_size, int) and not isinstance(chunk_size, bool)
    in_range("chunk_size", chunk_size, chunk_size is None or (whole and chunk_size >= 1), "None, or an integer >= 1")
    precise = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if positive_mask is None and negative_mask is None:
        rows, columns = scores.shape
        pairs = _resolved(pairs, precise, rows, rows * (columns - 1), group)
        pool = _Pool.by_target(precise, _target(scores, target, group), pairs)
    else:
        pool = _Pool.by_mask(precise, *_masks(scores, target, positive_mask, negative_mask, group))
        pairs = _resolved(pairs, precise, len(pool.positives), pool.negatives, group)
    return _as_given(_reduced(pool, temperature, reduction, chunk_size, pairs, group), scores)


def contrastive_loss(scores: Tensor, target: Tensor | None = None, *, temperature: float = 0.01) -> Tensor:
    """InfoNCE on the same score matrix: each row's positive against that row's negatives alone.

    With s+_i the score of row i's target ::

        loss = - mean over i of log( exp(s+_i / temperature) / sum_j exp(s_ij / temperature) )

    Adding a constant to a row changes nothing, which is why its scores are not comparable between queries.

    Args:
        scores: (B, M), floating point; half precision as in :func:`mw_loss`.
        target: (B,) int64, the column of each row's positive; by default row i's is column i, which wants M >= B.
        temperature: > 0.

    Raises:
        ValueError: an argument out of range, shapes that do not fit.

    Source:
        van den Oord et al.: Representation Learning with Contrastive Predictive Coding, 2018, arXiv 1807.03748.

    Example:
        >>> import torch
        >>> from assay.losses import contrastive_loss
        >>> contrastive_loss(torch.tensor([[0.5, 0.5], [0.0, 0.0]]))
        tensor(0.6931)
    """
    _check_scores(scores)
    _check_temperature(temperature)
    precise = scores.to(torch.promote_types(scores.dtype, torch.float32))
    loss = F.cross_entropy(precise / temperature, _target(scores, target, None))
    return _as_given(loss, scores)


@dataclass(frozen=True)
class _Pool:
    """The positives (P,), and the negatives: all ``cells`` except ``cells.flatten()[holes]``."""

    positives: Tensor
    cells: Tensor
    holes: Tensor

    @classmethod
    def by_target(cls, scores: Tensor, target: Tensor, pairs: str) -> _Pool:
        positives = scores.gather(1, target[:, None]).squeeze(1)
        if pairs == "binned":  # no copy of the matrix: what a positive adds to the bins can be taken back
            return cls(positives, scores, target + scores.shape[1] * torch.arange(len(target), device=target.device))
        columns = torch.arange(scores.shape[1] - 1, device=scores.device)
        others = columns + (columns >= target[:, None])
        return cls(positives, scores.gather(1, others).flatten(), target[:0])

    @classmethod
    def by_mask(cls, scores: Tensor, positive: Tensor, negative: Tensor) -> _Pool:
        none = torch.empty(0, dtype=torch.int64, device=scores.device)
        return cls(scores[positive], scores[negative], none)

    @property
    def negatives(self) -> int:
        return self.cells.numel() - self.holes.numel()


def _resolved(pairs: str, precise: Tensor, positives: int, negatives: int, group: ProcessGroup | None) -> str:
    """What ``"auto"`` stands for here."""
    if pairs != "auto":
        return pairs
    bins = precise.dtype == torch.float32 and precise.device.type != "mps"
    everyone = 1 if group is None else world_size(group)  # whose positives meet this process's negatives
    return "binned" if bins and everyone * positives * negatives >= MANY else "exact"


def _target(scores: Tensor, target: Tensor | None, group: ProcessGroup | None) -> Tensor:
    """The column of each row's positive."""
    rows, columns = scores.shape
    if target is None:
        first = 0
        if group is not None:
            sizes = rows_by_rank(torch.tensor([rows], device=scores.device), group)
            first = int(torch.cat(sizes[: rank(group)]).sum()) if rank(group) else 0
        if columns < first + rows:
            shapes = f"{(rows, columns)} is out of range: at least {first + rows} columns where no target is given"
            raise ValueError(f"scores.shape = {shapes}")
        return torch.arange(first, first + rows, device=scores.device)
    if target.shape != (rows,):
        raise ValueError(f"target.shape = {tuple(target.shape)} is out of range: ({rows},)")
    if target.dtype != torch.int64:
        raise ValueError(f"target.dtype = {target.dtype} is out of range: torch.int64")
    if target.device.type == "cpu" and not torch.compiler.is_compiling():  # a GPU would have to wait, and checks anyway
        outside = (target < 0) | (target >= columns)
        if outside.any():
            raise ValueError(f"target = {target[outside][0].item()} is out of range: [0, {columns})")
    return target


def _masks(
    scores: Tensor, target: Tensor | None, positive: Tensor | None, negative: Tensor | None, group: ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Which cells are positives and which are negatives."""
    for name, mask in (("positive_mask", positive), ("negative_mask", negative)):
        if mask is not None and mask.shape != scores.shape:
            raise ValueError(f"{name}.shape = {tuple(mask.shape)} is out of range: {tuple(scores.shape)}")
        if mask is not None and mask.dtype != torch.bool:
            raise ValueError(f"{name}.dtype = {mask.dtype} is out of range: torch.bool")
    if positive is None:
        chosen = _target(scores, target, group)[:, None]
        positive = torch.zeros_like(scores, dtype=torch.bool).scatter(1, chosen, True)
        return positive, negative & ~positive  # type: ignore[operator]  # one of the two masks is given
    if negative is None:
        return positive, ~positive
    if not torch.compiler.is_compiling() and (positive & negative).any():
        cell = (positive & negative).nonzero()[0].tolist()
        raise ValueError(f"cell {cell} is in positive_mask and in negative_mask: at most one may hold it")
    return positive, negative


def _reduced(
    pool: _Pool, temperature: float, reduction: str, chunk_size: int | None, pairs: str, group: ProcessGroup | None
) -> Tensor:
    positives, negatives, own = pool.positives, pool.negatives, slice(None)
    if group is not None:
        sizes = torch.tensor([[len(positives), negatives]], device=positives.device)
        counts, this = torch.cat(rows_by_rank(sizes, group)).tolist(), rank(group)
        start = sum(count for count, _ in counts[:this])
        own, negatives = slice(start, start + len(positives)), sum(count for _, count in counts)
        positives = all_gather_rows(positives, group)
    if pairs == "binned":
        in_place = group is None and len(pool.holes) > 0
        sums, _ = binned_sums(
            positives.detach() if in_place else positives, pool.cells, pool.holes, in_place, temperature
        )
    else:
        sums = pair_sums(positives, pool.cells, temperature, chunk_size)
    if group is not None:  # every process has compared all positives with its own negatives
        sums = all_reduce_sum(sums, group)
    if reduction == "none":
        return sums[own] / max(1, negatives)
    total = sums.sum() / max(1, len(positives))
    return total if reduction == "paper" else total / max(1, negatives)


def _as_given(loss: Tensor, scores: Tensor) -> Tensor:
    """In the precision of the scores; under autocast losses stay in float32, as torch's own do."""
    return loss if torch.is_autocast_enabled(scores.device.type) else loss.to(scores.dtype)


def _check_scores(scores: Tensor) -> None:
    if scores.dim() != 2:
        raise ValueError(f"scores.shape = {tuple(scores.shape)} is out of range: (B, M)")
    if not scores.is_floating_point():
        raise ValueError(f"scores.dtype = {scores.dtype} is out of range: floating point")


def _check_temperature(temperature: float) -> None:
    in_range("temperature", temperature, 0 < temperature < math.inf, "(0, inf)")


def apply(recipe: Recipe, *, temperature: float = 1.0) -> Recipe:
    """MW loss as a run's objective: the batch's logits are the scores, the targets' logits its positives."""
    _check_temperature(temperature)

    def objective(run: Run) -> Objective:
        if run.task.classes is None:
            raise ValueError("mw-loss needs a classification task")

        def loss(model: Callable[[Any], Any], batch: Batch) -> Tensor:
            return mw_loss(model(batch.input), batch.target, temperature=temperature)

        return loss

    return replace(recipe, objective=objective)
