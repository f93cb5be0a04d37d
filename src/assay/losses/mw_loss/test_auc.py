from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from assay.metrics import aoc, global_auc


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 9999), st.sampled_from([2, 5, 1000]))
def test_is_the_area_under_the_roc_curve_of_the_pool(seed, levels):
    rng = np.random.default_rng(seed)
    scores = rng.integers(levels, size=(4, 6)) / 8  # with few levels most scores are equal
    positive = rng.random((4, 6)) < 0.3
    positive[0, :2] = True, False
    expected = roc_auc_score(positive.ravel(), scores.ravel())
    assert global_auc(scores, positive) == pytest.approx(expected, abs=1e-12)
    assert aoc(scores, positive) == pytest.approx(1 - expected, abs=1e-12)
    assert global_auc(torch.tensor(scores), torch.tensor(positive)) == global_auc(scores.tolist(), positive.tolist())


@pytest.mark.parametrize("k", [1, 2, 3, 6, 50])
def test_hard_negatives_are_the_highest_of_each_row(k):
    rng = np.random.default_rng(k)
    scores, positive = rng.normal(size=(5, 6)), rng.random((5, 6)) < 0.3
    positive[0, 0], positive[1] = True, True  # the second row has no negative
    pool = [(s, True) for s in scores[positive]]
    for row, mask in zip(scores, positive, strict=True):
        pool += [(s, False) for s in sorted(row[~mask], reverse=True)[:k]]
    expected = roc_auc_score([label for _, label in pool], [s for s, _ in pool])
    assert global_auc(scores, positive, hard_k=k) == pytest.approx(expected, abs=1e-12)
    assert aoc(scores, positive, hard_k=k) == pytest.approx(1 - expected, abs=1e-12)


def test_is_not_the_mean_over_rows():
    scores, positive = [[1.0, 0.9], [0.1, 0.0]], [[1, 0], [1, 0]]
    assert np.mean([global_auc([row], [mask]) for row, mask in zip(scores, positive, strict=True)]) == 1
    assert global_auc(scores, positive) == 0.75


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
@pytest.mark.parametrize("hard_k", [None, 1])
def test_any_dtype_is_taken(dtype, hard_k):
    scores = torch.tensor([[3.0, 1.0], [2.0, 2.0]]).to(dtype)
    if scores.is_floating_point():
        scores.requires_grad_()
    assert global_auc(scores, torch.eye(2), hard_k=hard_k) == pytest.approx((1 + 1 + 1 + 0.5) / 4)


def test_what_cannot_be_measured_is_named():
    scores = [[0.1, 0.2]]
    for measure in (global_auc, aoc):
        with pytest.raises(ValueError, match=r"positive_mask.shape = \(1, 3\) is out of range"):
            measure(scores, [[0, 1, 1]])
        for mask in ([[0, 0]], [[1, 1]]):
            with pytest.raises(ValueError, match="nothing to compare"):
                measure(scores, mask)
        with pytest.raises(ValueError, match="not finite"):
            measure([[np.nan, 0.0]], [[0, 1]])
        for k in (0, 1.5, True):
            with pytest.raises(ValueError, match=f"hard_k = {k} is out of range"):
                measure(scores, [[0, 1]], hard_k=k)
