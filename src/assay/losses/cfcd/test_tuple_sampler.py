from __future__ import annotations

import collections
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from assay.data import TupleSampler


def example(n=400, classes=10, wrong=0.3, seed=0):
    draw = np.random.default_rng(seed)
    labels = draw.integers(classes, size=n)
    return labels, np.where(draw.random(n) < wrong, draw.integers(classes, size=n), labels)


def tuples_of(sampler):
    return [batch[k : k + sampler.tuple_size] for batch in sampler for k in range(0, len(batch), sampler.tuple_size)]


@settings(deadline=None, max_examples=60)
@given(
    classes=st.lists(st.integers(0, 6), min_size=20, max_size=120),
    size=st.integers(3, 6),
    per_batch=st.integers(1, 3),
    world=st.integers(1, 3),
    wrong=st.none() | st.floats(0, 1),
    seed=st.integers(0, 50),
)
def test_tuples_of_any_labels(classes, size, per_batch, world, wrong, seed):
    """Two of a class, then others; no image twice on any process; as many batches on each; the same again."""
    draw = random.Random(seed)
    guess = None if wrong is None else [draw.randrange(9) if draw.random() < wrong else c for c in classes]

    def sampler(rank):
        return TupleSampler(
            classes, guess, tuple_size=size, batch_size=size * per_batch, seed=seed, rank=rank, world_size=world
        )

    try:
        samplers = [sampler(rank) for rank in range(world)]
    except ValueError as error:
        assert "is out of range: the" in str(error)
        return
    for epoch in (0, 1):
        for each in samplers:
            each.set_epoch(epoch)
        groups = [group for each in samplers for group in tuples_of(each)]
        for a, p, *others in groups:
            assert classes[a] == classes[p] and a != p and len(others) == size - 2
            assert classes[a] not in [classes[n] for n in others]
        flat = [image for group in groups for image in group]
        assert len(flat) == len(set(flat))
        assert len({len(each) for each in samplers}) == 1 and len(list(samplers[0])) == len(samplers[0]) > 0
        again = sampler(0)
        again.set_epoch(epoch)
        assert list(again) == list(samplers[0]) == list(samplers[0])


def test_it_ends_when_the_images_do():
    labels, _ = example()
    (sampler,) = [TupleSampler(labels, batch_size=8)]
    drawn = {image for batch in sampler for image in batch}
    left = collections.Counter(labels[[i for i in range(len(labels)) if i not in drawn]].tolist())
    assert all(n < 2 or left.total() - n < 6 for n in left.values()) and left.total() < 40


def test_epochs_seeds_and_global_random_states():
    labels, predictions = example()
    random.seed(0)
    torch.manual_seed(0)
    states = random.getstate(), torch.get_rng_state()
    firsts = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        sampler = TupleSampler(labels, predictions, batch_size=16, seed=seed)
        sampler.set_epoch(epoch)
        firsts.append(next(iter(sampler)))
        firsts[-1].clear()  # what was handed out is the caller's
        firsts[-1] += next(iter(sampler))
    assert len(set(map(tuple, firsts))) == 3 and all(len(first) == 16 for first in firsts)
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])


def test_negatives_are_of_unlike_classes_where_there_are_enough():
    labels = torch.arange(900) % 30
    for a, _, *others in tuples_of(TupleSampler(labels, batch_size=8))[:80]:
        assert len({int(labels[i]) for i in [a, *others]}) == 7


def test_classes_are_drawn_evenly_whatever_their_size():
    labels = [0] * 1000 + [1] * 1000 + [2] * 4000
    anchors = collections.Counter(
        labels[group[0]] for group in tuples_of(TupleSampler(labels, tuple_size=3, batch_size=3))[:600]
    )
    assert all(160 < anchors[c] < 240 for c in range(3))


# --- hard negatives


def hard_share(labels, predictions, kind, anchors):
    """Share of the negatives that are of a kind, over tuples whose anchor was predicted (right or wrong)ly."""
    # Only the first tuples of a pass: later ones meet what the earlier ones left.
    groups = tuples_of(TupleSampler(labels, predictions, batch_size=8))[:200]
    mine = [group for group in groups if (predictions[group[0]] == labels[group[0]]) == (anchors == "right")]
    return sum(kind(a, n) for a, _, *others in mine for n in others) / (6 * len(mine))


def test_shares_of_hard_negatives_are_those_of_the_authors():
    labels, predictions = example(20_000, classes=50, wrong=0.5)

    def false_positive(a, n):
        return predictions[n] == labels[a]

    def of_the_class_it_was_mistaken_for(a, n):
        return labels[n] == predictions[a]

    def expected(hard):  # of the rest, one in about 49 classes is hard by chance
        return pytest.approx(hard + (1 - hard) * 0.02, abs=0.06)

    assert hard_share(labels, predictions, false_positive, "right") == expected(0.5)
    assert hard_share(labels, predictions, false_positive, "wrong") == expected(0.33)
    mistaken = hard_share(labels, predictions, of_the_class_it_was_mistaken_for, "wrong")
    assert mistaken == expected(0.67 * 0.5)
    without = [(a, n) for a, _, *others in tuples_of(TupleSampler(labels, batch_size=8))[:300] for n in others]
    assert sum(false_positive(*pair) for pair in without) / len(without) < 0.05


def test_the_positive_of_a_wrong_anchor_was_predicted_rightly_while_there_are_such():
    labels, predictions = example(2000, wrong=0.6)
    kept = []
    for a, p, *_ in tuples_of(TupleSampler(labels, predictions, batch_size=8))[:100]:
        if predictions[a] != labels[a]:
            kept.append(predictions[p] == labels[p])
        else:
            kept.append(None)
    assert all(right for right in kept if right is not None) and kept.count(True) > 20
    of_right_anchors = [
        predictions[p] == labels[p]
        for a, p, *_ in tuples_of(TupleSampler(labels, predictions, batch_size=8))[:100]
        if predictions[a] == labels[a]
    ]
    assert not all(of_right_anchors)
    nobody_is_right = (labels + 1) % 10
    for a, p, *others in tuples_of(TupleSampler(labels, nobody_is_right, batch_size=8)):
        assert labels[a] == labels[p] and labels[a] not in labels[others]


def test_predictions_of_classes_without_images_do_no_harm():
    labels = np.arange(100) % 5
    assert len(TupleSampler(labels, np.full(100, 77), tuple_size=4, batch_size=8)) > 0


# --- use and wrong use


def test_it_is_a_batch_sampler_of_a_loader():
    labels, predictions = example()
    sampler = TupleSampler(torch.tensor(labels), torch.tensor(predictions), batch_size=16)
    loader = DataLoader(TensorDataset(torch.arange(400), torch.tensor(labels)), batch_sampler=sampler)
    assert len(loader) == len(sampler)
    assert [x.tolist() for x, _ in loader] == list(sampler)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tuple_size": 2}, "tuple_size = 2 is out of range: an integer >= 3"),
        ({"batch_size": 12}, "batch_size = 12 is out of range: a multiple of tuple_size = 8"),
        ({"batch_size": 0}, "batch_size = 0 is out of range"),
        ({"world_size": 0}, "world_size = 0 is out of range: an integer >= 1"),
        ({"rank": 1}, r"rank = 1 is out of range: \[0, 1\)"),
        ({"labels": [0.5, 1.0]}, r"labels = \(2,\) of torch.float32 is out of range: \(N,\) integers"),
        ({"labels": [[0]]}, r"labels = \(1, 1\) of torch.int64 is out of range"),
        ({"labels": [0] * 400}, "batch_size = 8 is out of range: the 400 labels give no 1 x 8 images in tuples of 2"),
        ({"labels": list(range(400))}, "the 400 labels give no"),
        ({"batch_size": 480}, "the 400 labels give no 1 x 480 images"),
        ({"predictions": [0, 1]}, r"predictions.shape = \(2,\) is out of range: that of the labels, \(400,\)"),
    ],
)
def test_what_does_not_fit_is_named(options, message):
    options = {"labels": example()[0], "batch_size": 8} | options
    with pytest.raises(ValueError, match=message):
        TupleSampler(options.pop("labels"), options.pop("predictions", None), **options)
