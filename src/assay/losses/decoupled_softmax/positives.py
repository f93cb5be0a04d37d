"""Which labels are relevant to which query: dense masks, padded lists, scipy's sparse rows, and draws from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from assay.losses.decoupled_softmax.sharded import Group, first_column, shared_total, total_of

Target = Tensor | tuple[Tensor, Tensor]
"""Relevance (N, C), or lists (indices (N, P), values (N, P)) in which an entry of value 0 is padding."""


@dataclass(frozen=True)
class Positives:
    """Relevance in the form in which it came, W entries a row: all columns of this rank, or a list of P labels.

    ``marked`` (N, W) are the positives, ``here`` those whose column this rank holds, ``places`` their columns here
    (None for a dense target, whose entries are the columns).
    """

    relevance: Tensor
    marked: Tensor
    here: Tensor
    places: Tensor | None
    columns: int
    group: Group

    @classmethod
    def read(cls, target: Target, size: Sequence[int], group: Group = None) -> Positives:
        rows, columns = size
        if isinstance(target, Tensor):
            _same_shape("target", target, (rows, columns))
            marked = target > 0
            return cls(target, marked, marked, None, columns, group)
        indices, values = target
        if indices.dim() != 2 or len(indices) != rows:
            raise ValueError(f"target[0].shape = {tuple(indices.shape)} is out of range: ({rows}, P)")
        _same_shape("target[1]", values, tuple(indices.shape))
        marked = values > 0
        first = 0 if group is None else first_column(columns, group, indices.device)
        places = (indices - first).long()
        # Padding may stand at any index; so may, where labels are sharded, another rank's labels.
        inside = (places >= 0) & (places < columns)
        if group is None and indices.device.type == "cpu" and not torch.compiler.is_compiling():
            outside = marked & ~inside
            if outside.any():
                raise ValueError(f"target[0] = {indices[outside][0].item()} is out of range: [0, {columns})")
        return cls(values, marked, marked & inside, places.clamp(0, columns - 1), columns, group)

    def of(self, scores: Tensor) -> Tensor:
        """What scores (N, C) are at the entries: (N, W)."""
        return scores if self.places is None else scores.gather(1, self.places)

    def columns_of(self, entries: Tensor) -> Tensor:
        """The columns here, as (N, C), of those ``entries`` (N, W) that are here."""
        if self.places is None:
            return entries & self.here
        return scattered(entries & self.here, self.places, self.columns)

    def count(self, entries: Tensor) -> Tensor:
        """How many labels ``entries`` marks for each query on all ranks: (N,)."""
        numbers = entries.sum(1)
        # Every rank has a list whole, and of a dense target only its own columns.
        return total_of(numbers, self.group) if self.places is None else numbers

    def draw(self, most: int | Tensor, generator: torch.Generator | None) -> Tensor:
        """At most ``most`` positives of each row (one number, or (N,)), without replacement, by relevance: (N, W)."""
        if isinstance(most, int) and most >= self.marked.shape[1]:
            return self.marked  # no row can have more
        if self.group is not None and self.places is None:
            raise ValueError("target = a dense slice is out of range where positives are sampled: (indices, values)")
        relevance = self.relevance.to(torch.promote_types(self.relevance.dtype, torch.float32))
        # The largest of w / Exp(1) is an entry with probability proportional to w, the next one of the rest, and so on.
        keys = relevance / torch.empty_like(relevance).exponential_(generator=generator)
        keys = keys.masked_fill(~self.marked, -1.0)
        if self.group is not None:
            dist.broadcast(keys, dist.get_global_rank(self.group, 0), group=self.group)
        if isinstance(most, Tensor):
            chosen = keys.argsort(1, descending=True).argsort(1) < most[:, None]
        else:
            best = keys.topk(most, dim=1).indices
            chosen = torch.zeros_like(self.marked).scatter(1, best, True)
        return chosen & self.marked

    def total(self, terms: Tensor, chosen: Tensor, weights: Tensor | None, normalize: str) -> Tensor:
        """Sum or mean of the ``chosen`` entries of ``terms`` (N, W), times their ``weights``; 0 of none: (N,)."""
        kept = terms.masked_fill(~(chosen & self.here), 0.0)
        if weights is not None:
            _same_shape("weights", weights, tuple(self.marked.shape))
            kept = kept * weights
        losses = shared_total(kept.sum(1), self.group)
        return losses / self.count(chosen).clamp(min=1) if normalize == "mean" else losses


def scattered(values: Tensor, places: Tensor, columns: int) -> Tensor:
    """``values`` (N, P) at their columns of a matrix (N, columns), 0 elsewhere; nonzero values of one column add up.

    Where a value is 0, its place means nothing.
    """
    wide = values.new_zeros(len(values), columns + 1)  # the last column takes what is padding
    places = torch.where(values != 0, places, columns)
    wide = wide.scatter(1, places, values) if values.dtype == torch.bool else wide.scatter_add(1, places, values)
    return wide[:, :columns]


def as_lists(target: Target) -> tuple[Tensor, Tensor]:
    """A dense target as lists as long as its longest row; lists as they are."""
    if not isinstance(target, Tensor):
        return target
    if target.dim() != 2:
        raise ValueError(f"target.shape = {tuple(target.shape)} is out of range: (N, C)")
    row, column = (target > 0).nonzero(as_tuple=True)
    return _padded(row, column, target[row, column], len(target))


def positives_from_csr(
    matrix: Any, *, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Rows of a sparse relevance matrix as the pair (indices, values) that the losses here take as target.

    Row i lists the columns of the positive entries of row i, in ascending order, then entries of index 0 and value 0
    up to the length of the longest row (at least 1). Entries stored twice are summed; the matrix is left as it is.

    Args:
        matrix: (N, C), any scipy.sparse matrix or array; a batch is ``matrix[rows]``.
        device: of the two tensors; None: the CPU.
        dtype: of the values.

    Returns:
        indices (N, P) int64 and values (N, P).

    Raises:
        ValueError: no two-dimensional sparse matrix, or a value that is negative or not finite.

    Source:
        Gupta et al., arXiv 2310.10636, whose data are of this form.

    Example:
        >>> import scipy.sparse
        >>> from assay.losses import positives_from_csr
        >>> indices, values = positives_from_csr(scipy.sparse.csr_array([[0.0, 1.0, 0.5], [1.0, 0.0, 0.0]]))
        >>> indices.tolist(), values.tolist()
        ([[1, 2], [0, 0]], [[1.0, 0.5], [1.0, 0.0]])
    """
    import numpy as np
    from scipy import sparse

    if not sparse.issparse(matrix) or matrix.ndim != 2:
        raise ValueError(f"matrix = a {type(matrix).__name__} is out of range: a scipy.sparse matrix (N, C)")
    entries = matrix.tocsr(copy=True)
    entries.sum_duplicates()
    entries.eliminate_zeros()
    found = entries.data[~(np.isfinite(entries.data) & (entries.data > 0))]
    if len(found):
        raise ValueError(f"matrix holds {found[0]}, which is out of range: finite numbers >= 0")
    row = torch.from_numpy(np.repeat(np.arange(entries.shape[0]), np.diff(entries.indptr)))
    column = torch.from_numpy(entries.indices.astype(np.int64))
    indices, values = _padded(row, column, torch.as_tensor(entries.data).to(dtype), entries.shape[0])
    return indices.to(device), values.to(device)


def _padded(row: Tensor, column: Tensor, value: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Entries sorted by row, as lists of equal length."""
    lengths = torch.bincount(row, minlength=rows)
    longest = max(1, int(lengths.max())) if rows else 1
    position = torch.arange(len(row), device=row.device) - (lengths.cumsum(0) - lengths)[row]
    indices, values = column.new_zeros(rows, longest), value.new_zeros(rows, longest)
    indices[row, position], values[row, position] = column, value
    return indices, values


def _same_shape(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if x.shape != shape:
        raise ValueError(f"{name}.shape = {tuple(x.shape)} is out of range: {shape}")
