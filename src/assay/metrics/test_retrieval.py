import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, top_k_accuracy_score

from assay.metrics import (
    mean_average_precision,
    mean_reciprocal_rank,
    ndcg,
    nmi,
    precision_at_k,
    recall_at_k,
    same_label_pairs,
)


def by_hand(scores, relevant, k):
    """R@k, P@k, attainable P@k, MRR@k, nDCG@k and mAP, query by query and rank by rank."""
    found = []
    for s, r in zip(scores, relevant, strict=True):
        if not any(r):
            continue
        order = sorted(range(len(s)), key=lambda j: -s[j])
        hits = [bool(r[j]) for j in order]
        first = hits.index(True) + 1
        gain = sum(1 / math.log2(rank + 2) for rank, hit in enumerate(hits[:k]) if hit)
        best = sum(1 / math.log2(rank + 2) for rank in range(min(k, sum(hits))))
        precisions = [sum(hits[: i + 1]) / (i + 1) for i, hit in enumerate(hits) if hit]
        found.append(
            (
                any(hits[:k]),
                sum(hits[:k]) / k,
                sum(hits[:k]) / min(k, sum(hits)),
                1 / first if first <= k else 0,
                gain / best,
                sum(precisions) / len(precisions),
            )
        )
    return np.mean(found, axis=0)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 9))
def test_all_measures_equal_a_count_by_hand(seed, k):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(5, 9))
    relevant = rng.random((5, 9)) < 0.3
    relevant[0] = False
    relevant[1, 3] = True
    got = [
        recall_at_k(scores, relevant, k),
        precision_at_k(scores, relevant, k),
        precision_at_k(scores, relevant, k, attainable=True),
        mean_reciprocal_rank(scores, relevant, k),
        ndcg(scores, relevant, k),
        mean_average_precision(scores, relevant),
    ]
    np.testing.assert_allclose(got, by_hand(scores, relevant, k), rtol=1e-12)


def test_they_agree_with_scikit_learn_where_it_has_the_same():
    rng = np.random.default_rng(0)
    scores, target = rng.normal(size=(20, 7)), rng.integers(7, size=20)
    one_hot = np.eye(7)[target]
    assert recall_at_k(scores, one_hot, 3) == pytest.approx(top_k_accuracy_score(target, scores, k=3, labels=range(7)))
    assert mean_reciprocal_rank(scores, one_hot) == pytest.approx(mean_average_precision(scores, one_hot))
    relevant = rng.random((20, 7)) < 0.4
    relevant[:, 0] = True
    each = [average_precision_score(r, s) for r, s in zip(relevant, scores, strict=True)]
    assert mean_average_precision(scores, relevant) == pytest.approx(np.mean(each))


def test_tensors_of_any_dtype_are_taken():
    scores, relevant = torch.randn(4, 6), torch.eye(4, 6)
    for dtype in (torch.bfloat16, torch.float64):
        assert 0 <= recall_at_k(scores.to(dtype).requires_grad_(), relevant.bool(), 2) <= 1


def test_a_set_is_searched_without_the_query_itself():
    x, labels = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 1, 0, 2, 1, 0])
    scores, relevant = same_label_pairs(3 * x, labels)
    for i in range(6):
        others = [j for j in range(6) if j != i]
        cosines = torch.nn.functional.cosine_similarity(x[i], x[others])
        torch.testing.assert_close(scores[i], cosines)
        assert relevant[i].tolist() == [bool(labels[j] == labels[i]) for j in others]


def test_clusters_are_compared_with_labels():
    centres = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    labels = torch.arange(30) % 3
    generator = torch.Generator().manual_seed(0)
    points = centres[labels] + 0.1 * torch.randn(30, 2, generator=generator)
    assert nmi(points, labels) == pytest.approx(1)
    assert nmi(torch.randn(30, 2, generator=generator), labels) < 0.4


def test_what_cannot_be_measured_is_named():
    scores = [[0.1, 0.2]]
    with pytest.raises(ValueError, match="k = 0 is out of range"):
        recall_at_k(scores, [[0, 1]], 0)
    with pytest.raises(ValueError, match=r"relevant.shape = \(1, 3\) is out of range"):
        ndcg(scores, [[0, 1, 1]])
    with pytest.raises(ValueError, match="nothing to measure"):
        mean_average_precision(scores, [[0, 0]])
    with pytest.raises(ValueError, match="not finite"):
        precision_at_k([[math.nan, 0.0]], [[0, 1]])
    with pytest.raises(ValueError, match=r"labels\.shape"):
        same_label_pairs(torch.zeros(3, 2), torch.zeros(2))
