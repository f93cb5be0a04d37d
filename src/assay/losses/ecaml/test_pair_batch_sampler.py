"""Batches by class: what is in them, how many an epoch has, and that they can be repeated, shared and resumed."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from assay.data import PairBatchSampler
from assay.losses.ecaml.pair_batch_sampler import _most_batches

LABELS = torch.tensor([7, 3, 3, 9, 7, 7, 9, 3, 9, 7, 4, 3, 4, 7, 4, 4])


def sizes(draw):
    return [label for label, size in enumerate(draw) for _ in range(size)]


@settings(max_examples=60, deadline=None)
@given(draw=st.lists(st.integers(2, 30), min_size=3, max_size=9), per_class=st.integers(1, 2), seed=st.integers(0, 99))
def test_every_batch_holds_its_classes_side_by_side_and_no_example_comes_twice(draw, per_class, seed):
    labels = sizes(draw)
    sampler = PairBatchSampler(labels, 3, per_class, seed)
    seen = []
    batches = list(sampler)
    for batch in batches:
        groups = np.asarray(labels)[batch].reshape(3, per_class)
        assert (groups == groups[:, :1]).all() and len(set(groups[:, 0])) == 3
        seen += batch
    assert len(batches) == len(sampler) and len(set(seen)) == len(seen)


@settings(max_examples=100, deadline=None)
@given(groups=st.lists(st.integers(0, 6), min_size=1, max_size=6), classes=st.integers(1, 4))
def test_an_epoch_has_as_many_batches_as_can_be_made(groups, classes):
    """Taking the fullest classes first is the best that can be done, and what is counted by the formula."""
    left, made = sorted(groups), 0
    while len(left) >= classes and left[-classes] > 0:
        left = sorted([*left[:-classes], *(size - 1 for size in left[-classes:])])
        made += 1
    assert _most_batches(np.asarray(groups), classes) == made


def test_batches_follow_from_seed_and_epoch_alone():
    def batches(seed, epoch):
        sampler = PairBatchSampler(LABELS, 2, 2, seed)
        sampler.set_epoch(epoch)
        torch.manual_seed(7 * epoch)
        state = torch.get_rng_state()
        found = list(sampler)
        assert torch.equal(torch.get_rng_state(), state)
        return found

    state = np.random.get_state()[1].copy()  # noqa: NPY002
    assert batches(0, 1) == batches(0, 1)
    different = [batches(*key) for key in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert all(one != other for one, other in itertools.combinations(different, 2))
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002


def test_labels_of_any_kind_and_in_any_order_are_the_same():
    expected = list(PairBatchSampler(LABELS, 3, 2, 5))
    for labels in (LABELS.tolist(), LABELS.numpy(), [f"class {label}" for label in LABELS.tolist()]):
        assert list(PairBatchSampler(labels, 3, 2, 5)) == expected


def test_classes_and_examples_are_drawn_evenly():
    labels, counts, together = sizes([6] * 6), Counter(), Counter()
    sampler = PairBatchSampler(labels, 2, 2)
    for epoch in range(300):
        sampler.set_epoch(epoch)
        for batch in sampler:
            counts.update(batch)
            together[frozenset(labels[i] for i in batch)] += 1
    assert set(counts.values()) == {300}  # nothing is left over here
    from scipy.stats import chisquare

    assert len(together) == 15 and chisquare(list(together.values())).pvalue > 1e-3


def test_a_rare_class_is_used_up_and_a_common_one_is_in_every_batch():
    labels = sizes([40, 8, 8, 8, 2])
    sampler = PairBatchSampler(labels, 2, 2)
    batches = [{labels[i] for i in batch} for batch in sampler]
    assert len(batches) == 13  # 4 + 4 + 4 + 1 partners for the first class
    assert all(0 in batch for batch in batches)
    assert sum(4 in batch for batch in batches) == 1


def test_processes_share_an_epoch_without_meeting():
    labels = sizes([9, 12, 20, 7, 5])
    alone = list(PairBatchSampler(labels, 3, 2, 1))
    shares = [list(PairBatchSampler(labels, 3, 2, 1, rank=rank, world_size=3)) for rank in range(3)]
    length = len(alone) // 3
    assert [len(share) for share in shares] == [length] * 3
    assert [batch for together in zip(*shares, strict=True) for batch in together] == alone[: 3 * length]
    drawn = [index for share in shares for batch in share for index in batch]
    assert len(set(drawn)) == len(drawn)


def test_resumes_in_the_middle_of_an_epoch():
    whole, broken, fresh = (PairBatchSampler(LABELS, 2, 2, 3) for _ in range(3))
    for sampler in (whole, broken):
        sampler.set_epoch(4)
    expected, iterator = list(whole), iter(broken)
    head = [next(iterator) for _ in range(2)]
    fresh.load_state_dict(broken.state_dict())
    fresh.set_epoch(4)  # as a loop says that begins its epoch anew
    assert head + list(fresh) == expected
    assert list(fresh) == expected and fresh.state_dict()["position"] == 0
    fresh.load_state_dict(broken.state_dict())
    fresh.set_epoch(5)
    whole.set_epoch(5)
    assert list(fresh) == list(whole)
    fresh.load_state_dict(broken.state_dict() | {"position": 3})
    assert list(fresh) == expected[3:]


def test_works_as_the_batch_sampler_of_a_loader():
    sampler = PairBatchSampler(LABELS, 3, 2)
    loader = DataLoader(TensorDataset(torch.arange(len(LABELS)), LABELS), batch_sampler=sampler)
    assert len(loader) == len(sampler) == 2
    for index, labels in loader:
        assert index.shape == (6,) and torch.equal(LABELS[index], labels)
        assert torch.equal(labels[::2], labels[1::2]) and len(labels.unique()) == 3


def test_small_classes_are_refused_or_left_out():
    labels = [0, 0, 0, 1, 2, 2, 5, 5]
    with pytest.raises(ValueError, match=r"per_class = 2 is out of range for 1 of the classes, such as 1 with 1 exam"):
        PairBatchSampler(labels, 2, 2)
    drawn = {labels[i] for batch in PairBatchSampler(labels, 3, 2, skip_small=True) for i in batch}
    assert drawn == {0, 2, 5}
    with pytest.raises(ValueError, match=r"classes_per_batch = 4 is out of range: \[1, 3\]"):
        PairBatchSampler(labels, 4, 2, skip_small=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes_per_batch": 0}, "classes_per_batch = 0 is out of range: an integer >= 1"),
        ({"classes_per_batch": 5}, r"classes_per_batch = 5 is out of range: \[1, 4\]"),
        ({"per_class": 1.5}, "per_class = 1.5 is out of range"),
        ({"per_class": True}, "per_class = True is out of range"),
        ({"seed": -1}, "seed = -1 is out of range: an integer >= 0"),
        ({"world_size": 0}, "world_size = 0 is out of range"),
        ({"rank": 1}, r"rank = 1 is out of range: \[0, 1\)"),
        ({"world_size": 5}, r"world_size = 5 is out of range: \[1, 3\], the epoch's batches"),
        ({"labels": LABELS.view(4, 4)}, r"labels.shape = \(4, 4\) is out of range: \(N,\)"),
        ({"labels": []}, r"labels.shape = \(0,\) is out of range"),
    ],
)
def test_arguments_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        PairBatchSampler(**{"labels": LABELS, "classes_per_batch": 2, "per_class": 2, **options})


def test_the_state_of_another_sampler_is_refused():
    sampler = PairBatchSampler(LABELS, 2, 2)
    with pytest.raises(ValueError, match="seed = 1 in the state is out of range: 0"):
        sampler.load_state_dict(PairBatchSampler(LABELS, 2, 2, 1).state_dict())
    with pytest.raises(ValueError, match="size = 15 in the state"):
        sampler.load_state_dict(PairBatchSampler(LABELS[1:], 2, 2).state_dict())
    with pytest.raises(ValueError, match="epoch = -1 is out of range"):
        sampler.set_epoch(-1)
    with pytest.raises(TypeError, match="no_such_argument"):
        PairBatchSampler(LABELS, 2, 2, no_such_argument=1)
