"""A dataset whose examples know their position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset


class IndexedDataset(Dataset[Any]):
    """Adds to each example its position: ``(input, target)`` becomes ``(input, target, index)``.

    The index is the one the example was asked for by, in [0, len(dataset)), so a ``DataLoader``, its samplers and its
    workers keep it right under shuffling; it is collated into a LongTensor. An example that is no tuple or list comes
    out as ``(example, index)``, a mapping as a copy with the key ``"index"``. Wrap last: a ``Subset`` of an indexed
    dataset gives positions in the whole, an indexed ``Subset`` positions in the subset.

    Args:
        ds: a map-style dataset; the wrapper keeps it as ``dataset``.

    Raises:
        ValueError: ``ds`` has no length (an iterable dataset has no positions); a mapping that has the key already.
        IndexError: a position out of range.

    Example:
        >>> import torch
        >>> from assay.data import IndexedDataset
        >>> dataset = torch.utils.data.TensorDataset(torch.zeros(3, 2), torch.tensor([5, 6, 7]))
        >>> loader = torch.utils.data.DataLoader(IndexedDataset(dataset), batch_size=3)
        >>> [(target, index) for _, target, index in loader]
        [(tensor([5, 6, 7]), tensor([0, 1, 2]))]
    """

    def __init__(self, ds: Any) -> None:
        if not (hasattr(ds, "__len__") and hasattr(ds, "__getitem__")):
            raise ValueError(f"ds = {ds!r} is out of range: a dataset with __len__ and __getitem__")
        self.dataset = ds

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        index = self._position(index)
        return _with(self.dataset[index], index)

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """A whole batch at once, where the dataset can give one faster than by examples."""
        positions = [self._position(index) for index in indices]
        many = getattr(self.dataset, "__getitems__", None)
        examples = many(positions) if many else [self.dataset[position] for position in positions]
        return [_with(example, position) for example, position in zip(examples, positions, strict=True)]

    def _position(self, index: int) -> int:
        size, position = len(self), int(index)
        if not -size <= position < size:
            raise IndexError(f"index = {position} is out of range: [0, {size})")
        return position % size


def _with(example: Any, index: int) -> Any:
    if isinstance(example, dict):
        if "index" in example:
            raise ValueError("the example has a key 'index' already")
        return {**example, "index": index}
    return (*example, index) if isinstance(example, tuple | list) else (example, index)
