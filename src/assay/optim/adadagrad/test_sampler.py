from __future__ import annotations

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from assay.optim import AdaptiveBatchSampler, AdaptiveBatchSize


def saved(state):
    """Through a file, loaded the safe way."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 60), st.lists(st.integers(1, 20), min_size=1), st.booleans(), st.booleans())
def test_every_index_once_in_batches_of_the_current_size(total, sizes, shuffle, drop_last):
    controller = AdaptiveBatchSize(2, max_batch_size=20)
    sampler = AdaptiveBatchSampler(range(total), controller, shuffle=shuffle, drop_last=drop_last)
    for _ in range(2):
        seen, controller.size = [], sizes[0]
        for k, batch in enumerate(sampler):
            assert len(batch) == min(controller.size, total - len(seen))
            seen += batch
            controller.size = sizes[(k + 1) % len(sizes)]
        assert len(set(seen)) == len(seen) <= total
        if drop_last:
            assert total - len(seen) < controller.size
        else:
            assert sorted(seen) == list(range(total))
        if not shuffle:
            assert seen == list(range(len(seen)))


def test_order_is_the_generators_and_changes_each_epoch():
    def epochs(generator):
        sampler = AdaptiveBatchSampler(range(50), AdaptiveBatchSize(8, max_batch_size=8), generator=generator)
        return [[i for batch in sampler for i in batch] for _ in range(2)]

    given = epochs(torch.Generator().manual_seed(3))
    assert given[0] != given[1]
    assert given == epochs(torch.Generator().manual_seed(3))
    torch.manual_seed(5)
    own = epochs(None)
    torch.manual_seed(5)
    assert own == epochs(None) != given


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("stop", range(7))
def test_resumes_in_mid_epoch(stop, shuffle, drop_last):
    def make(seed):
        controller, order = AdaptiveBatchSize(3, max_batch_size=50), torch.Generator().manual_seed(seed)
        return AdaptiveBatchSampler(range(29), controller, shuffle=shuffle, drop_last=drop_last, generator=order)

    def draw(sampler, count):
        """The next batches, over as many epochs as it takes; the size grows by one with each."""
        batches = []
        while len(batches) < count:
            for batch in sampler:
                batches.append(batch)
                sampler.controller.size += 1
                if len(batches) == count:
                    break
        return batches

    interrupted, resumed = make(1), make(2)
    draw(interrupted, stop)
    resumed.load_state_dict(saved(interrupted.state_dict()))
    assert resumed.batch_size == 3 + stop
    assert draw(resumed, 9) == draw(make(1), stop + 9)[stop:]


def test_data_loader_follows_in_mid_epoch():
    controller = AdaptiveBatchSize(4, max_batch_size=64)
    data = TensorDataset(torch.arange(30.0))
    sampler = AdaptiveBatchSampler(data, controller)
    loader = DataLoader(data, batch_sampler=sampler)
    assert len(loader) == len(sampler) == 8
    lengths, seen = [], []
    for (x,) in loader:
        lengths.append(len(x))
        seen += x.tolist()
        controller.size *= 2
    assert lengths == [4, 8, 16, 2]
    assert sorted(seen) == list(range(30))
    assert len(AdaptiveBatchSampler(range(30), AdaptiveBatchSize(4, max_batch_size=4), drop_last=True)) == 7
