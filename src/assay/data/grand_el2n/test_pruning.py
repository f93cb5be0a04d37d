"""Which examples take part in each epoch."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from assay.data import PruningSampler, keep_by_score

N = 40
SCORES = torch.randn(N, generator=torch.Generator().manual_seed(0))


def shares(**options):
    sampler = PruningSampler(SCORES, **options)
    found = []
    for epoch in range(options["epochs"] + 2):
        sampler.set_epoch(epoch)
        found.append(sampler.share)
    return found


def test_the_share_follows_the_formula():
    assert shares(epochs=5, keep=0.5, schedule="linear") == pytest.approx([1, 0.875, 0.75, 0.625, 0.5, 0.5, 0.5])
    assert shares(epochs=5, keep=0.2, schedule="cubic", begin=1, end=3) == pytest.approx(
        [1, 1, 0.2 + 0.8 / 8, 0.2, 0.2, 0.2, 0.2]
    )
    assert shares(epochs=3, keep=0.4, schedule="step", begin=1) == [1, 0.4, 0.4, 0.4, 0.4]
    assert shares(epochs=3, keep=0.4, schedule="step") == [0.4] * 5
    assert shares(epochs=3, keep=0.4, schedule="linear", begin=2, end=2) == [1, 1, 0.4, 0.4, 0.4]
    assert shares(epochs=1, keep=0.4) == [0.4] * 3


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(["step", "linear", "cubic"]),
    st.sampled_from(["max", "min", "random", "offset"]),
    st.floats(0.1, 1),
    st.booleans(),
)
def test_each_epoch_visits_what_the_scores_say_once(schedule, mode, keep, balanced):
    offset = min(0.2, 1 - keep) if mode == "offset" else 0
    how = {"mode": mode, "labels": torch.arange(N) % 3, "balanced": balanced}
    try:
        sampler = PruningSampler(SCORES, 4, keep, schedule=schedule, offset=float(offset), **how)
    except ValueError:  # rounding may push the last window beyond the end
        return
    seen = set(range(N))
    for epoch in range(4):
        sampler.set_epoch(epoch)
        visited = list(sampler)
        assert sorted(visited) == sampler.indices().tolist() and len(visited) == len(sampler) == len(set(visited))
        if mode in ("max", "min"):
            assert sampler.indices().tolist() == keep_by_score(SCORES, sampler.share, **how).tolist()
            assert balanced or set(visited) <= seen  # what is gone stays away
        seen = set(visited)
    if mode == "offset" and not balanced:
        expected = keep_by_score(SCORES, sampler.share, mode=mode, offset=float(offset))
        assert sampler.indices().tolist() == expected.tolist()


def test_orders_depend_on_seed_and_epoch_alone():
    def orders(seed):
        sampler = PruningSampler(SCORES, 3, 0.5, seed=seed)
        torch.manual_seed(seed + 7)
        return [sampler.set_epoch(epoch) or list(sampler) for epoch in (0, 1, 2, 0)]

    first = orders(1)
    assert first == orders(1) and first[0] == first[3] and first[0] != first[1]
    assert first[0] != orders(2)[0]


def test_with_a_data_loader_and_renewed_scores():
    dataset = TensorDataset(torch.arange(N))
    sampler = PruningSampler(SCORES, 2, 0.5, schedule="step")
    loader = DataLoader(dataset, batch_size=6, sampler=sampler)
    assert sorted(torch.cat([x for (x,) in loader]).tolist()) == keep_by_score(SCORES, 0.5).tolist()
    sampler.update(-SCORES)
    assert sorted(torch.cat([x for (x,) in loader]).tolist()) == keep_by_score(SCORES, 0.5, mode="min").tolist()
    assert len(loader) == 4


def test_it_resumes():
    one, other = PruningSampler(SCORES, 6, 0.3), PruningSampler(torch.zeros(N), 6, 0.3)
    one.set_epoch(3)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    assert list(one) == list(other)


@pytest.mark.parametrize("options, message", [
    ({"epochs": 0}, "epochs = 0 is out of range"),
    ({"keep": 0}, "keep = 0 is out of range"),
    ({"schedule": "cosine"}, "schedule = 'cosine' is out of range"),
    ({"begin": 3, "end": 2}, "begin = 3 and end = 2 are out of range"),
    ({"end": 9}, "end = 9 are out of range"),
    ({"mode": "best"}, "mode = 'best' is out of range"),
    ({"mode": "offset", "offset": 0.9}, "reach beyond"),
    ({"scores": torch.tensor([1.0, float("nan")])}, "without NaN"),
])  # fmt: skip
def test_out_of_range_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        PruningSampler(**{"scores": SCORES, "epochs": 4, **options})


def test_wrong_use_is_named():
    sampler = PruningSampler(SCORES, 4)
    with pytest.raises(ValueError, match=r"scores\.shape = \(3,\) is out of range"):
        sampler.update(torch.zeros(3))
    with pytest.raises(ValueError, match="epoch = -1 is out of range"):
        sampler.set_epoch(-1)
