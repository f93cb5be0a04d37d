from __future__ import annotations

import pytest
import torch

from assay.bench.evidence import FAILS, Bench
from assay.losses import decoupled_softmax, multilabel_softmax
from assay.losses.decoupled_softmax.claim import DECOUPLED, SOFTMAX, claim, measures, share_found


def coupled(scores, target, **options):
    """The first broken variant: positives stay in the denominator."""
    return multilabel_softmax(scores, target, **{"normalize": "mean", **options})


def heavy(scores, target, **options):
    """The second broken variant: without 1/|P|, so that queries with many labels weigh more."""
    return decoupled_softmax(scores, target, **{**options, "normalize": "sum"})


@pytest.mark.parametrize("method", [coupled, heavy, decoupled_softmax])
def test_broken_variants_are_found_out(method):
    evidence = claim(Bench(), method=method, variants=(SOFTMAX, DECOUPLED), seeds=2, steps=20)
    mechanism = {check.verdict for check in evidence.checks[:3]}
    assert (FAILS in mechanism) == (method is not decoupled_softmax)
    assert method is decoupled_softmax or evidence.verdict == FAILS


def test_measures_of_retrieval():
    scores = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]])
    relevant = torch.tensor([[1, 0, 1, 0, 0, 1], [0, 0, 0, 0, 0, 1]]).bool()
    assert share_found(scores, relevant, 3) == pytest.approx((2 / 3 + 1) / 2)
    found = measures(torch.cat([scores, scores - 10], 1), torch.cat([relevant, torch.zeros_like(relevant)], 1))
    assert found == pytest.approx({"P@1": 1.0, "P@5": (2 / 3 + 1) / 2, "R@10": 1.0})
