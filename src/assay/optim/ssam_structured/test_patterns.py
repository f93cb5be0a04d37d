"""The patterns against loops over groups and units."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.optim.sam import nm_mask, structured_mask


def scores_of(*shapes, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return {str(i): torch.rand(shape, generator=draw, dtype=torch.float64) for i, shape in enumerate(shapes)}


# --- N of M


def groups_by_hand(row, n, m):
    """A row's mask, group by group; of equal scores the later one stays."""
    mask = []
    for start in range(0, len(row), m):
        group = row[start : start + m]
        ranked = sorted(range(len(group)), key=lambda i: (group[i], i))
        kept = set(ranked[max(len(group) - n, 0) :])
        mask += [i in kept for i in range(len(group))]
    return mask


def test_the_papers_example():
    found = nm_mask(torch.tensor([3, 1, 2, 0, 5, 7, 6, 8]), 2, 4)
    assert found.tolist() == [1, 0, 1, 0, 0, 1, 0, 1] and found.dtype == torch.bool
    assert nm_mask(torch.ones(2, 4), 2, 4).tolist() == [[False, False, True, True]] * 2


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 5), st.integers(1, 5), st.integers(1, 4), st.integers(0, 11), st.integers(0, 99))
def test_groups_lie_within_rows_or_columns(n, m, rows, columns, seed):
    n = min(n, m)
    score = torch.randint(0, 5, (rows, columns), generator=torch.Generator().manual_seed(seed))
    found = nm_mask(score, n, m)
    assert found.tolist() == [groups_by_hand(row, n, m) for row in score.tolist()]
    assert torch.equal(nm_mask(score.t(), n, m, group_dim="out"), found.t())
    kernel = score.view(rows, columns, 1, 1).expand(rows, columns, 2, 1)
    assert torch.equal(nm_mask(kernel, n, m), nm_mask(kernel.flatten(1), n, m).view(kernel.shape))


@pytest.mark.parametrize("group_dim", ["in", "out"])
def test_every_full_group_has_n_ones_and_the_short_one_as_many_as_it_can(group_dim):
    score = scores_of((11, 3, 2, 3))["0"]
    mask = nm_mask(score, 3, 4, group_dim=group_dim).flatten(1)
    mask = mask if group_dim == "in" else mask.t()
    counts = [part.sum(1).unique().tolist() for part in mask.split(4, dim=1)]
    assert counts == ([[3]] * 4 + [[2]] if group_dim == "in" else [[3]] * 3)
    assert nm_mask(score, 4, 4, group_dim=group_dim).all() and not nm_mask(score, 0, 4, group_dim=group_dim).any()


def test_the_mask_of_a_kernel_follows_its_channels():
    score, order = scores_of((8, 3, 3, 3))["0"], torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    assert torch.equal(nm_mask(score[order], 2, 4), nm_mask(score, 2, 4)[order])
    inside = torch.tensor([2, 0, 1])
    one = nm_mask(score[:, inside], 2, 4, group_dim="out")
    assert torch.equal(one, nm_mask(score, 2, 4, group_dim="out")[:, inside])


@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (3, 0), (5,)])
def test_small_scores_keep_their_shape(shape):
    assert nm_mask(torch.ones(shape), 2, 4).shape == shape


# --- units


def units_by_hand(scores, sparsity, channels):
    """Lists of (key, row) in the order in which units are switched on, until enough is covered."""
    units, keys = [], list(scores)
    while keys:
        key = keys.pop(0)
        score = scores[key]
        if not channels:
            units.append([(key, ...)])
        elif score.dim() < 2:
            units += [[(key, i)] for i in range(score.numel())]
        else:
            bias = keys.pop(0) if keys and scores[keys[0]].shape == score.shape[:1] else None
            units += [[(key, i)] + ([(bias, i)] if bias else []) for i in range(len(score))]

    def entries(unit):
        return torch.cat([scores[key][i].flatten() for key, i in unit])

    masks = {key: torch.zeros_like(score, dtype=torch.bool) for key, score in scores.items()}
    target, covered = int(sum(score.numel() for score in scores.values()) * (1 - sparsity)), 0
    for unit in sorted(units, key=lambda unit: -entries(unit).mean()):
        if covered < target:
            for key, i in unit:
                masks[key][i] = True
            covered += entries(unit).numel()
    return masks


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 1), st.sampled_from(["tensor", "channel"]), st.integers(0, 99))
def test_units_are_switched_on_by_their_mean(sparsity, granularity, seed):
    scores = scores_of((5, 4), (5,), (3, 2, 2, 1), (2,), (3, 3), (3,), (3,), seed=seed)
    found = structured_mask(scores, sparsity, granularity)
    expected = units_by_hand(scores, sparsity, granularity == "channel")
    assert list(found) == list(scores)
    torch.testing.assert_close(found, expected)
    size, share = 54, sum(int(mask.sum()) for mask in found.values()) / 54
    assert int(size * (1 - sparsity)) / size <= share <= 1 - sparsity + 20 / size


def test_what_is_off_altogether_and_on_altogether():
    scores = scores_of((5, 4), (5,), (2, 2))
    for granularity in ("tensor", "channel"):
        assert all(mask.all() for mask in structured_mask(scores, 0.0, granularity).values())
        assert not any(mask.any() for mask in structured_mask(scores, 1.0, granularity).values())


def test_the_mean_counts_and_not_the_sum():
    scores = {"large": torch.full((100, 4), 1.0), "small": torch.full((2, 2), 2.0)}
    found = structured_mask(scores, 0.99, "tensor")
    assert found["small"].all() and not found["large"].any()


def test_a_mask_takes_the_memory_of_its_units():
    scores = scores_of((50, 40), (50,))
    for granularity, bytes_ in (("tensor", 2), ("channel", 50)):
        found = structured_mask(scores, 0.5, granularity)
        assert {mask.untyped_storage().nbytes() for mask in found.values()} == {bytes_}


@pytest.mark.parametrize("call, message", [
    (lambda: nm_mask(torch.ones(4), 5, 4), r"n = 5 is out of range: \[0, m\], m = 4"),
    (lambda: nm_mask(torch.ones(4), 0, 0), "m = 0 is out of range"),
    (lambda: nm_mask(torch.ones(4), 2, 4, group_dim=1), "group_dim = 1 is out of range: 'in' or 'out'"),
    (lambda: structured_mask({"a": torch.ones(4)}, 1.5), r"sparsity = 1.5 is out of range: \[0, 1\]"),
    (lambda: structured_mask({"a": torch.ones(4)}, 0.5, "row"), "granularity = 'row' is out of range"),
])  # fmt: skip
def test_arguments_out_of_range_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
