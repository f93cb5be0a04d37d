from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from assay.data import IndexedDataset

INPUTS, TARGETS = torch.arange(20.0).view(10, 2), torch.arange(10) + 100


class Plain(Dataset[Any]):
    """Nothing but ``__len__`` and ``__getitem__``; counts what it is asked for."""

    def __init__(self, examples: list[Any]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> Any:
        return self.examples[i]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([])


class Batched(Plain):
    def __getitem__(self, i: int) -> Any:
        raise AssertionError("asked one by one")

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self.examples[i] for i in indices]


@pytest.mark.parametrize("workers", [0, 2])
def test_indices_follow_their_examples_through_a_shuffling_loader(workers):
    dataset = IndexedDataset(TensorDataset(INPUTS, TARGETS))
    loader = DataLoader(dataset, batch_size=4, shuffle=True, num_workers=workers)
    seen = []
    for inputs, targets, index in loader:
        assert index.dtype == torch.int64
        assert torch.equal(inputs, INPUTS[index]) and torch.equal(targets, TARGETS[index])
        seen += index.tolist()
    assert sorted(seen) == list(range(10)) and len(dataset) == 10


def test_every_kind_of_example():
    for example, expected in [
        ((1, 2), (1, 2, 0)),
        ([1, 2], (1, 2, 0)),
        ("text", ("text", 0)),
        ({"input": 1}, {"input": 1, "index": 0}),
    ]:
        dataset = IndexedDataset(Plain([example]))
        assert dataset[0] == expected and dataset.__getitems__([0]) == [expected]
    assert example == {"input": 1}  # a copy got the index


def test_a_whole_batch_is_asked_for_at_once_where_that_is_possible():
    dataset = IndexedDataset(Batched([("a", 0), ("b", 1), ("c", 2)]))
    assert dataset.__getitems__([2, 0]) == [("c", 2, 2), ("a", 0, 0)]


def test_positions_with_subsets_and_from_the_end():
    data = TensorDataset(TARGETS)
    assert IndexedDataset(Subset(data, [7, 3]))[1] == (TARGETS[3], 1)
    assert Subset(IndexedDataset(data), [7, 3])[1] == (TARGETS[3], 3)
    assert IndexedDataset(data)[-1] == (TARGETS[9], 9)
    assert IndexedDataset(data)[torch.tensor(4)] == (TARGETS[4], 4)


def test_wrong_use_is_refused():
    dataset = IndexedDataset(Plain([{"index": 5}]))
    for index in (1, -2):
        with pytest.raises(IndexError, match=f"index = {index} is out of range"):
            dataset[index]
    with pytest.raises(ValueError, match="'index' already"):
        dataset[0]
    with pytest.raises(ValueError, match="ds = "):
        IndexedDataset(Stream())
