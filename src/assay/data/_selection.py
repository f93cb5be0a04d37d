"""What to keep of a dataset, given a score for each example."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from assay.data._checks import one_of, share


def keep_by_score(
    scores: Any,
    keep: float = 0.5,
    *,
    mode: str = "max",
    offset: float = 0,
    labels: Any = None,
    balanced: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Positions of the examples to keep: exactly ``round(keep * N)`` of them, sorted.

    With the N scores in ascending order, equal ones in the order of the dataset ::

        mode "max":     the last ones: the hardest, the paper's choice
        mode "min":     the first ones: the easiest
        mode "offset":  those from ``offset`` on; under label noise a window below the very hardest
        mode "random":  any, the scores are ignored: the baseline to beat

    Args:
        scores: (N,), without NaN; infinite ones are ordinary.
        keep: share to keep, in (0, 1].
        offset: how many of the lowest scores mode "offset" skips (an int), or the share of them (a float in [0, 1)).
        labels: classes (N,), needed and used by ``balanced``.
        balanced: keep every class in its proportion, to less than one example, and choose by score within each.
        generator: for mode "random"; None: torch's global one.

    Returns:
        A sorted LongTensor on the CPU.

    Raises:
        ValueError: an argument out of range, a score that is NaN, or a window that ends beyond N.

    Source:
        Paul, Ganguli, Dziugaite: Deep Learning on a Data Diet, NeurIPS 2021, arXiv 2107.07075.

    Example:
        >>> import torch
        >>> from assay.data import keep_by_score
        >>> scores = torch.tensor([0.9, 0.1, 0.5, 0.7])
        >>> keep_by_score(scores, 0.5)
        tensor([0, 3])
        >>> keep_by_score(scores, 0.5, mode="offset", offset=1)
        tensor([2, 3])
        >>> keep_by_score(scores, 0.5, labels=[0, 1, 1, 0], balanced=True)
        tensor([0, 2])
    """
    scores = torch.as_tensor(scores).detach().cpu()
    if scores.dim() != 1 or scores.isnan().any():
        raise ValueError(f"scores {tuple(scores.shape)}: a vector (N,) without NaN is needed")
    one_of("mode", mode, ("max", "min", "offset", "random"))
    total = len(scores)
    size, skip = round(share("keep", keep) * total), offset_of(offset, total) if mode == "offset" else 0
    if size + skip > total:
        raise ValueError(f"keep = {keep!r} and offset = {offset!r} reach beyond the {total} scores")
    if mode == "random":
        order = torch.randperm(total, generator=generator)
    else:
        order = scores.argsort(stable=True, descending=False)
    if not balanced:
        return _window(order, size, skip, mode)
    labels = torch.as_tensor(labels).cpu() if labels is not None else None
    if labels is None or labels.shape != scores.shape:
        raise ValueError(f"labels = {labels!r}: balanced=True needs one class for each of the {total} scores")
    classes, group = labels.unique(return_inverse=True)
    members = [order[group[order] == c] for c in range(len(classes))]
    counts = [len(m) for m in members]
    sizes, skips = _apportion(size, counts), _apportion(skip, counts)
    chosen = [_window(m, s, min(o, len(m) - s), mode) for m, s, o in zip(members, sizes, skips, strict=True)]
    return torch.cat(chosen).sort().values


class ScoreSubset(Subset):
    """A torch ``Subset`` of chosen positions, such as :func:`keep_by_score` returns.

    ``subset[j]`` is ``dataset[indices[j]]``. Positions are checked once, here, and stored as plain ints, which every
    dataset understands.

    Args:
        dataset: map-style, of N examples.
        indices: distinct integers in [0, N): a tensor, an array or a list.

    Raises:
        ValueError: positions that are not distinct integers in [0, N); a mask is none.

    Example:
        >>> import torch
        >>> from assay.data import ScoreSubset
        >>> subset = ScoreSubset(["a", "b", "c"], torch.tensor([0, 2]))
        >>> len(subset), subset[1]
        (2, 'c')
    """

    def __init__(self, dataset: Any, indices: Sequence[int] | Tensor) -> None:
        positions = check_positions(indices, len(dataset))
        if len(positions.unique()) != len(positions):
            raise ValueError("indices name an example more than once")
        super().__init__(dataset, positions.tolist())


def check_positions(indices: Any, total: int) -> Tensor:
    """Positions in a dataset as a LongTensor (M,) on the CPU; ValueError unless they are integers in [0, total)."""
    found = torch.as_tensor(indices).cpu()
    if found.dim() != 1 or (found.numel() and (found.is_floating_point() or found.dtype == torch.bool)):
        raise ValueError(f"indices {tuple(found.shape)} of {found.dtype}: integer positions (M,) are needed")
    if found.numel() and (found.min() < 0 or found.max() >= total):
        raise ValueError(f"indices reach from {found.min()} to {found.max()}: allowed are 0 to {total - 1}")
    return found.long()


def _window(order: Tensor, size: int, skip: int, mode: str) -> Tensor:
    """``size`` positions of an ascending order, sorted: from the end for "max", else from ``skip`` on."""
    start = len(order) - size if mode == "max" else skip
    return order[start : start + size].sort().values


def _apportion(total: int, counts: list[int]) -> list[int]:
    """Whole shares of ``total`` in proportion to ``counts``, each off by less than one, by largest remainders."""
    whole = sum(counts)
    shares = [total * count // whole for count in counts]
    remainders = [total * count % whole for count in counts]
    for i in sorted(range(len(counts)), key=lambda i: -remainders[i])[: total - sum(shares)]:
        shares[i] += 1
    return shares


def offset_of(offset: float, total: int) -> int:
    """How many of ``total`` scores an offset skips."""
    skip = round(offset * total) if isinstance(offset, float) and 0 <= offset < 1 else offset
    if isinstance(skip, bool) or not isinstance(skip, int) or skip < 0:
        raise ValueError(f"offset = {offset!r} is out of range: a number of scores >= 0, or a share in [0, 1)")
    return skip
