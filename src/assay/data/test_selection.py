"""What is kept: windows of a stable order, shares of classes, positions that are checked."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from assay.data import ScoreSubset, keep_by_score

few_values = st.lists(st.sampled_from([0.0, 0.5, 1.0, math.inf]), min_size=1, max_size=30)


@settings(max_examples=150, deadline=None)
@given(few_values, st.floats(0.01, 1), st.sampled_from(["max", "min", "offset", "random"]), st.floats(0, 1))
def test_keep_is_a_window_of_the_stable_order(values, keep, mode, at):
    size = round(keep * len(values))
    offset = int(at * (len(values) - size))
    kept = keep_by_score(torch.tensor(values), keep, mode=mode, offset=offset).tolist()
    assert kept == sorted(set(kept)) and len(kept) == size
    order = sorted(range(len(values)), key=lambda i: values[i])  # stable: ties by index
    if mode != "random":
        start = {"max": len(values) - size, "min": 0, "offset": offset}[mode]
        assert kept == sorted(order[start : start + size])


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), min_size=1, max_size=40),
    st.floats(0.01, 1),
    st.sampled_from(["max", "min", "offset", "random"]),
    st.floats(0, 1),
)
def test_balanced_keeps_proportions_within_one(pairs, keep, mode, at):
    labels, scores = [c for c, _ in pairs], torch.tensor([float(s) for _, s in pairs])
    size = round(keep * len(pairs))
    offset = int(at * (len(pairs) - size))
    kept = keep_by_score(scores, keep, mode=mode, offset=offset, labels=labels, balanced=True).tolist()
    assert kept == sorted(set(kept)) and len(kept) == size
    for c in set(labels):
        members = [i for i, label in enumerate(labels) if label == c]
        chosen = [i for i in kept if labels[i] == c]
        assert abs(len(chosen) - size * len(members) / len(labels)) < 1
        left = [scores[i] for i in members if i not in chosen]
        if chosen and left and mode == "max":
            assert min(scores[i] for i in chosen) >= max(left)
        if chosen and left and mode == "min":
            assert max(scores[i] for i in chosen) <= min(left)


def test_keep_everything_and_windows():
    scores = torch.tensor([0.3, 0.1, 0.2, 0.9, 0.5])
    assert keep_by_score(scores, 1).tolist() == [0, 1, 2, 3, 4]
    assert keep_by_score(scores, 1, mode="offset", offset=0).tolist() == [0, 1, 2, 3, 4]
    assert keep_by_score(scores, 0.4, mode="offset", offset=2).tolist() == [0, 4]
    assert torch.equal(keep_by_score(scores, 0.4, mode="offset", offset=0.4), torch.tensor([0, 4]))
    assert keep_by_score(np.array([1, 1, 1, 1]), 0.5).tolist() == [2, 3]
    assert keep_by_score([1, 1, 1, 1], 0.5, mode="min").dtype == torch.long


def test_random_is_deterministic_under_a_seed():
    draw = lambda seed: keep_by_score(  # noqa: E731
        torch.zeros(50), 0.5, mode="random", generator=torch.Generator().manual_seed(seed)
    )
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    torch.manual_seed(3)
    first = keep_by_score(torch.zeros(50), mode="random")
    torch.manual_seed(3)
    assert torch.equal(keep_by_score(torch.zeros(50), mode="random"), first)


def test_subset_in_a_data_loader():
    data = TensorDataset(torch.arange(6.0), torch.arange(6))
    subset = ScoreSubset(data, keep_by_score(torch.tensor([0.1, 0.9, 0.2, 0.8, 0.7, 0.3]), 0.5))
    assert isinstance(subset, torch.utils.data.Subset) and subset.indices == [1, 3, 4]
    assert all(type(i) is int for i in subset.indices)
    assert [y.tolist() for _, y in DataLoader(subset, batch_size=2, num_workers=1)] == [[1, 3], [4]]
    assert len(ScoreSubset(data, [])) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: keep_by_score(torch.rand(4), 0), r"keep = 0 .* \(0, 1\]"),
        (lambda: keep_by_score(torch.rand(4), 1.5), "keep = 1.5"),
        (lambda: keep_by_score(torch.rand(4), math.nan), "keep = nan"),
        (lambda: keep_by_score(torch.rand(4), mode="best"), "mode = 'best'"),
        (lambda: keep_by_score(torch.rand(4), mode="offset", offset=-1), "offset = -1"),
        (lambda: keep_by_score(torch.rand(4), mode="offset", offset=1.5), "offset = 1.5"),
        (lambda: keep_by_score(torch.rand(4), 0.5, mode="offset", offset=3), "reach beyond the 4 scores"),
        (lambda: keep_by_score(torch.tensor([1.0, math.nan])), "without NaN"),
        (lambda: keep_by_score(torch.rand(4, 2)), r"scores \(4, 2\)"),
        (lambda: keep_by_score(torch.rand(4), balanced=True), "labels = None"),
        (lambda: keep_by_score(torch.rand(4), labels=[0, 1], balanced=True), "labels = "),
        (lambda: ScoreSubset(range(23), torch.tensor([True, False])), "torch.bool"),
        (lambda: ScoreSubset(range(23), [0, 23]), "indices reach from 0 to 23"),
        (lambda: ScoreSubset(range(23), [1, 1]), "more than once"),
    ],
)
def test_out_of_range_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
