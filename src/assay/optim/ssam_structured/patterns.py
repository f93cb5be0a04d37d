"""Masks whose zeros hardware or autograd can make use of: N of M consecutive weights, or whole units."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor

Key = TypeVar("Key", bound=Hashable)
GRANULARITIES = ("tensor", "channel")


def nm_mask(score: Tensor, n: int, m: int, *, group_dim: str = "in") -> Tensor:
    """The mask of the n largest scores in each group of m consecutive ones.

    A tensor of two or more dimensions is seen as the matrix (rows, the rest), a kernel (o, i, kh, kw) as (o, i kh kw),
    and groups lie within its rows, or with ``group_dim="out"`` within its columns; a vector is one row. Of a last group
    with fewer than m members min(n, their number) stay. Of equal scores the later one stays.

    Args:
        score: any shape, dtype of real numbers.
        n, m: 0 <= n <= m, m >= 1; the share of zeros is 1 - n / m.
        group_dim: ``"in"`` or ``"out"``. A product can skip the zeros if groups lie along the dimension that it sums
            over: ``"in"`` for the forward pass, ``"out"`` for the gradient of the input.

    Returns:
        A bool tensor of the score's shape.

    Raises:
        ValueError: an argument out of range.

    Source: P. Mi et al., Systematic Investigation of Sparse Perturbed SAM, 2023, arXiv 2306.17504.

    >>> import torch
    >>> from assay.optim.sam import nm_mask
    >>> nm_mask(torch.tensor([3, 1, 2, 0, 5, 7, 6, 8]), 2, 4).int()
    tensor([1, 0, 1, 0, 0, 1, 0, 1], dtype=torch.int32)
    """
    check_nm(n, m, group_dim)
    if score.dim() < 2:
        return _rows_nm(score.reshape(1, -1), n, m).view(score.shape)
    matrix = score.flatten(1)
    mask = _rows_nm(matrix, n, m) if group_dim == "in" else _rows_nm(matrix.t(), n, m).t()
    return mask.reshape(score.shape)


def check_nm(n: int, m: int, group_dim: str) -> None:
    if not m >= 1:
        raise ValueError(f"m = {m!r} is out of range: an integer >= 1")
    if not 0 <= n <= m:
        raise ValueError(f"n = {n!r} is out of range: [0, m], m = {m}")
    if group_dim not in ("in", "out"):
        raise ValueError(f"group_dim = {group_dim!r} is out of range: 'in' or 'out'")


def _rows_nm(matrix: Tensor, n: int, m: int) -> Tensor:
    rows, size = matrix.shape
    wide = torch.promote_types(matrix.dtype, torch.float32)
    # What fills the last group up is dropped before anything else.
    padded = torch.nn.functional.pad(matrix.to(wide), (0, -size % m), value=-math.inf)
    groups = padded.view(rows, padded.shape[1] // m, m)
    dropped = groups.argsort(dim=-1, stable=True)[..., : m - n]
    mask = torch.ones_like(groups, dtype=torch.bool).scatter_(-1, dropped, False)
    return mask.view(padded.shape)[:, :size]


def structured_mask(scores: Mapping[Key, Tensor], sparsity: float, granularity: str = "tensor") -> dict[Key, Tensor]:
    """Masks that are constant within units: the units with the largest mean score are on.

    Units are switched on, the largest mean first, until they hold at least int(N (1 - sparsity)) of all N entries: the
    share of ones may exceed 1 - sparsity, by less than the last unit's share. Of equal means the first is on.

    ``granularity="tensor"``: a unit is a whole tensor. ``"channel"``: a unit is a row (of the first dimension) together
    with its entry in the bias, by which is meant a vector of as many entries as there are rows that follows directly,
    as in the order of a module's parameters; the entries of any other vector are units by themselves.

    Args:
        scores: a tensor for each name or parameter.
        sparsity: in [0, 1].
        granularity: ``"tensor"`` or ``"channel"``.

    Returns:
        ``{key: mask}``, bool tensors of the scores' shapes; each is a view of one number a unit.

    Raises:
        ValueError: an argument out of range.

    Source: P. Mi et al., Systematic Investigation of Sparse Perturbed SAM, 2023, arXiv 2306.17504.

    >>> import torch
    >>> from assay.optim.sam import structured_mask
    >>> scores = {"weight": torch.tensor([[1.0, 2.0], [5.0, 6.0], [0.0, 1.0]]), "bias": torch.tensor([9.0, 0.0, 0.0])}
    >>> structured_mask(scores, 0.5, "channel")
    {'weight': tensor([[ True,  True],
            [ True,  True],
            [False, False]]), 'bias': tensor([ True,  True, False])}
    """
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity = {sparsity!r} is out of range: [0, 1]")
    check_granularity(granularity)
    units = list(_units(scores, granularity))
    means: list[Tensor] = []
    sizes: list[int] = []
    for keys in units:
        rows = torch.cat([_as_rows(scores[key], granularity) for key in keys], 1)
        means.append(rows.mean(1))
        sizes += [rows.shape[1]] * rows.shape[0]
    mean = torch.cat([x.to(means[0].device) for x in means]).nan_to_num(-math.inf)
    size = torch.tensor(sizes, device=mean.device)
    order = mean.argsort(dim=0, descending=True, stable=True)
    before = size[order].cumsum(0) - size[order]
    on = torch.empty_like(size, dtype=torch.bool)
    on[order] = before < int(sum(score.numel() for score in scores.values()) * (1 - sparsity))
    masks = {}
    for keys, part in zip(units, on.split([len(x) for x in means]), strict=True):
        for key in keys:
            shape = scores[key].shape
            ones = part.view(part.shape + (1,) * (len(shape) - 1)) if granularity == "channel" and shape else part[0]
            masks[key] = ones.expand(shape).to(scores[key].device)
    return {key: masks[key] for key in scores}


def _as_rows(score: Tensor, granularity: str) -> Tensor:
    """The entries of each unit as a row."""
    wide = score.to(torch.promote_types(score.dtype, torch.float32))
    if granularity == "tensor":
        return wide.reshape(1, -1)
    return wide.flatten(1) if wide.dim() > 1 else wide.reshape(-1, 1)


def check_granularity(granularity: str) -> None:
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity = {granularity!r} is out of range: 'tensor' or 'channel'")


def _units(scores: Mapping[Key, Tensor], granularity: str) -> Iterator[list[Key]]:
    """Keys whose rows belong together: each alone, or a matrix with its bias."""
    keys = list(scores)
    while keys:
        key = keys.pop(0)
        bias = scores[keys[0]] if granularity == "channel" and keys and scores[key].dim() > 1 else None
        yield [key, keys.pop(0)] if bias is not None and bias.shape == scores[key].shape[:1] else [key]
