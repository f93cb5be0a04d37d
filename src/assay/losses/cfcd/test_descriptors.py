from __future__ import annotations

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from assay.losses import local_descriptor_triplet, local_descriptors, match_descriptors
from assay.losses.cfcd.descriptors import unit_rows
from assay.nn import GlobalDescriptor, multi_scale_descriptors

T, K, D = 4, 9, 6
SEEDS = st.integers(0, 10_000)
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def tuple_of_images(seed, alike=0.3, dtype=torch.float64):
    """Descriptors (T, K, D) whose positive shows the anchor's places in another order, and attention (T, K)."""
    torch.manual_seed(seed)
    descriptors = torch.randn(T, K, D, dtype=torch.float64)
    descriptors[1] = descriptors[0, torch.randperm(K)] + alike * torch.randn(K, D, dtype=torch.float64)
    return descriptors.to(dtype), torch.rand(T, K, dtype=torch.float64).to(dtype)


# --- in plain loops


def between(one, other):
    return math.dist(one, other)


def unit(rows):
    return [[x / math.hypot(*row) for x in row] for row in rows.tolist()]


def matches_by_hand(query, positive, attention, ratio=0.9, keep=0.5):
    query, positive, attention = unit(query), unit(positive), attention.tolist()
    attended = sorted(range(len(positive)), key=lambda p: -attention[p])[: int(keep * len(positive))]
    found = []
    for p in range(len(positive)):
        order = sorted(range(len(query)), key=lambda q: between(query[q], positive[p]))
        q, second = order[0], order[1]
        back = min(range(len(positive)), key=lambda other: between(query[q], positive[other]))
        close = between(query[q], positive[p]) <= ratio * between(query[second], positive[p])
        if back == p and close and p in attended:
            found.append((q, p))
    return found


def triplets_by_hand(descriptors, attention, margin=0.1, **options):
    matches = matches_by_hand(descriptors[0], descriptors[1], attention[1], **options)
    anchor, positive, *negatives = map(unit, descriptors)
    losses = []
    for q, p in matches:
        row = []
        for negative in negatives:
            nearest = min(between(anchor[q], n) for n in negative)
            row.append(max(0.0, between(anchor[q], positive[p]) ** 2 - nearest**2 + margin))
        losses.append(row)
    return torch.tensor(losses, dtype=torch.float64).view(len(matches), len(negatives))


@settings(deadline=None, max_examples=60)
@given(SEEDS, st.sampled_from([0.05, 0.5, 2.0]), st.sampled_from([0.9, 0.6, 1.0]), st.sampled_from([0.5, 0.29, 1.0]))
def test_matches_are_those_of_a_search_by_hand(seed, alike, ratio, keep):
    descriptors, attention = tuple_of_images(seed, alike)
    q, p = match_descriptors(*descriptors[:2], attention[1], ratio=ratio, attention_keep=keep)
    assert list(zip(q.tolist(), p.tolist(), strict=True)) == matches_by_hand(
        *descriptors[:2], attention[1], ratio, keep
    )
    assert len(set(q.tolist())) == len(q) and len(p) <= int(keep * K)


@settings(deadline=None, max_examples=60)
@given(SEEDS, st.sampled_from([0.3, 1.0]), st.sampled_from([0.0, 0.1, 1.5]))
def test_losses_are_those_of_the_formula(seed, alike, margin):
    descriptors, attention = tuple_of_images(seed, alike)
    expected = triplets_by_hand(descriptors, attention, margin)
    loss = functools.partial(local_descriptor_triplet, descriptors, attention, margin=margin)
    torch.testing.assert_close(loss(reduction="none"), expected, **CLOSE)
    torch.testing.assert_close(loss(), expected.sum(), **CLOSE)
    mean = expected.mean() if expected.numel() else torch.zeros((), dtype=torch.float64)
    torch.testing.assert_close(loss(reduction="mean"), mean, **CLOSE)


def test_an_experiment_with_every_rule_at_work():
    """So that the two tests above are not about empty sets."""
    descriptors, attention = tuple_of_images(3)
    every = len(match_descriptors(*descriptors[:2], attention[1], ratio=1, attention_keep=1)[0])
    lowe = len(match_descriptors(*descriptors[:2], attention[1], ratio=0.5, attention_keep=1)[0])
    kept = len(match_descriptors(*descriptors[:2], attention[1], ratio=1)[0])
    assert every > max(lowe, kept) and min(lowe, kept) > 1
    assert (local_descriptor_triplet(descriptors, attention, margin=1.0, reduction="none") > 0).any()


def test_attention_is_that_of_the_positive():
    descriptors, attention = tuple_of_images(0, alike=0.05)
    _, p = match_descriptors(*descriptors[:2], attention[1])
    assert set(p.tolist()) <= set(attention[1].topk(K // 2).indices.tolist()) and len(p) == K // 2
    changed = attention.clone()
    changed[[0, 2, 3]] = 0
    loss = functools.partial(local_descriptor_triplet, descriptors, margin=1.0)
    assert loss(changed) == loss(attention) > 0
    assert loss(attention.flip(1)) != loss(attention)


# --- what must hold


def test_an_equal_positive_and_far_negatives_cost_nothing():
    descriptors = torch.eye(16)[:8].expand(T, 8, 16).clone()
    descriptors[2:] = -descriptors[2:].sum(1, keepdim=True)  # at squared distance 2 + 2 / sqrt(8)
    attention = torch.rand(T, 8)
    assert local_descriptor_triplet(descriptors, attention) == 0
    assert local_descriptor_triplet(descriptors, attention, margin=3.0) > 0


@given(SEEDS)
@settings(deadline=None, max_examples=20)
def test_neither_the_order_of_negatives_nor_the_lengths_of_rows_matter(seed):
    descriptors, attention = tuple_of_images(seed)
    expected = local_descriptor_triplet(descriptors, attention, margin=1.0)
    swapped = descriptors[[0, 1, 3, 2]]
    torch.testing.assert_close(local_descriptor_triplet(swapped, attention, margin=1.0), expected, **CLOSE)
    lengths = torch.logspace(-18, 18, K, dtype=torch.float64)[torch.randperm(K)][:, None]
    torch.testing.assert_close(
        local_descriptor_triplet(descriptors * lengths, attention, margin=1.0), expected, **CLOSE
    )


def test_without_a_match_the_loss_is_zero_and_attached():
    descriptors = torch.eye(K)[None].repeat(T, 1, 1)
    descriptors[1] = 1.0  # equally far from all: Lowe's ratio is 1
    for reduction in ("sum", "mean"):
        loss = local_descriptor_triplet(descriptors.requires_grad_(), torch.rand(T, K), reduction=reduction)
        (gradient,) = torch.autograd.grad(loss, descriptors)
        assert loss == 0 and not gradient.any()
    assert local_descriptor_triplet(descriptors, torch.rand(T, K), reduction="none").shape == (0, T - 2)
    same = torch.ones(T, K, D)  # distances of 0 everywhere: nothing is nearest
    assert local_descriptor_triplet(same, torch.rand(T, K)) == 0


def test_gradients_go_through_descriptors_and_not_through_the_search():
    descriptors, attention = tuple_of_images(1)
    loss = functools.partial(local_descriptor_triplet, attention=attention.requires_grad_(), margin=1.0)
    torch.autograd.gradcheck(loss, descriptors.requires_grad_())
    (gradient,) = torch.autograd.grad(loss(descriptors), descriptors)
    q, p = match_descriptors(*descriptors[:2], attention[1])
    touched = gradient.abs().sum(2) > 0
    assert touched[0].nonzero()[:, 0].tolist() == sorted(q.tolist())
    assert touched[1].nonzero()[:, 0].tolist() == p.tolist()
    assert all(1 <= touched[n].sum() <= len(q) for n in (2, 3))


def test_rows_of_zeros_have_a_finite_gradient():
    descriptors, attention = tuple_of_images(1)
    descriptors[2:] = 0  # a dead place is the nearest of all that point away
    (gradient,) = torch.autograd.grad(
        local_descriptor_triplet(descriptors.requires_grad_(), attention, margin=1.0), descriptors
    )
    assert gradient.abs().max() < 100
    assert torch.equal(unit_rows(torch.tensor([[3e-30, 4e-30], [0.0, 0.0]]).double())[1], torch.zeros(2).double())


def test_one_query_has_no_second_nearest():
    q, p = match_descriptors(torch.ones(1, D), torch.randn(3, D), torch.tensor([1.0, 2.0, 3.0]), attention_keep=1.0)
    assert len(q) == len(p) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_single(dtype):
    descriptors, attention = tuple_of_images(0, dtype=dtype)
    expected = local_descriptor_triplet(descriptors.double(), attention.double(), margin=1.0)
    loss = local_descriptor_triplet(descriptors, attention, margin=1.0)
    assert loss.dtype == dtype
    torch.testing.assert_close(loss.double(), expected, rtol=1e-2, atol=1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(local_descriptor_triplet(descriptors, attention, margin=1.0), loss)


# --- maps


def test_local_descriptors_are_the_columns_of_the_map():
    maps = torch.randn(2, 3, 2, 4)
    descriptors, attention = local_descriptors(maps)
    for b, h, w in ((0, 0, 0), (1, 1, 3), (0, 1, 2)):
        torch.testing.assert_close(descriptors[b, 4 * h + w], maps[b, :, h, w])
        torch.testing.assert_close(attention[b, 4 * h + w], maps[b, :, h, w].abs().sum())


def test_the_global_descriptor_is_pooling_linear_norm_and_length_one():
    torch.manual_seed(0)
    module, maps = GlobalDescriptor(3, 5).double(), torch.randn(6, 3, 2, 2, dtype=torch.float64)
    pooled = torch.zeros(6, 3, dtype=torch.float64)
    for b in range(6):
        for c in range(3):
            cubes = [max(x, 1e-6) ** 3 for x in maps[b, c].flatten().tolist()]
            pooled[b, c] = (sum(cubes) / 4) ** (1 / 3)
    hidden = pooled @ module.linear.weight.T + module.linear.bias
    centred = (hidden - hidden.mean(0)) / (hidden.var(0, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(module(maps), centred / centred.norm(dim=1, keepdim=True), **CLOSE)
    torch.autograd.gradcheck(module, maps.requires_grad_())
    evaluated = module.eval()(maps)
    torch.testing.assert_close(evaluated.norm(dim=1), torch.ones(6, dtype=torch.float64), **CLOSE)


@pytest.mark.parametrize(("p", "pool"), [(1.0, nn.AdaptiveAvgPool2d(1)), (400.0, nn.AdaptiveMaxPool2d(1))])
def test_generalized_mean_pooling_lies_between_mean_and_maximum(p, pool):
    maps = torch.rand(4, 3, 2, 2, dtype=torch.float64) + 0.5
    module, pooled = GlobalDescriptor(3, 5, p=p).double(), pool(maps).flatten(1)
    expected = F.normalize(module.norm(module.linear(pooled)), dim=1)
    torch.testing.assert_close(module(maps), expected, rtol=0, atol=1e-9 if p == 1 else 0.1)


def test_half_precision_maps_do_not_overflow_when_cubed():
    module = GlobalDescriptor(3, 5).eval()
    with torch.autocast("cpu", torch.float16):
        assert module(torch.full((2, 3, 4, 4), 500.0, dtype=torch.float16)).isfinite().all()


def test_several_scales_are_averaged_as_unit_descriptors():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), GlobalDescriptor(4, 5))
    images = torch.rand(3, 1, 12, 12)
    model(images)
    model[2].norm.train(False)
    flags = [module.training for module in model.modules()]
    found = multi_scale_descriptors(model, images, scales=(0.5, 1.0))
    assert [module.training for module in model.modules()] == flags and not found.requires_grad
    model.eval()
    half = images.view(3, 1, 6, 2, 6, 2).mean((3, 5))  # bilinear at a half is the mean of four
    expected = F.normalize(F.normalize(model(half), dim=1) + F.normalize(model(images), dim=1), dim=1)
    torch.testing.assert_close(found, expected.detach())
    assert torch.equal(multi_scale_descriptors(model, images, scales=[1]), unit_rows(model(images)).detach())
    assert multi_scale_descriptors(model, images).shape == (3, 5)


# --- wrong use


def test_what_does_not_fit_is_named():
    descriptors, attention = tuple_of_images(0)
    for call, message in [
        (lambda: local_descriptor_triplet(descriptors[:2], attention[:2]), r"descriptors.shape = \(2, 9, 6\) is out"),
        (lambda: local_descriptor_triplet(descriptors, attention[0]), r"attention.shape = \(9,\) is out of range: \(4"),
        (lambda: local_descriptor_triplet(descriptors, attention, margin=-1), "margin = -1 is out of range"),
        (lambda: local_descriptor_triplet(descriptors, attention, ratio=1.1), "ratio = 1.1 is out of range: "),
        (lambda: local_descriptor_triplet(descriptors, attention, attention_keep=0), "attention_keep = 0 is out of "),
        (lambda: local_descriptor_triplet(descriptors, attention, reduction="average"), "reduction = 'average' is out"),
        (lambda: match_descriptors(descriptors[0], descriptors, attention[0]), r"query.shape = \(9, 6\) with positive"),
        (lambda: match_descriptors(descriptors[0], descriptors[1], attention[0, 1:]), r"attention.shape = \(8,\) is"),
        (lambda: local_descriptors(descriptors), r"maps.shape = \(4, 9, 6\) is out of range: \(B, D, H, W\)"),
        (lambda: GlobalDescriptor(0), "in_channels = 0 is out of range"),
        (lambda: GlobalDescriptor(3, 0), "out_features = 0 is out of range"),
        (lambda: GlobalDescriptor(3, p=0), "p = 0 is out of range: greater than 0"),
        (lambda: GlobalDescriptor(3, eps=0.0), "eps = 0.0 is out of range: greater than 0"),
        (lambda: GlobalDescriptor(3)(torch.ones(2, 4, 1, 1)), r"maps.shape = \(2, 4, 1, 1\) is out of range: \(B, 3"),
        (lambda: multi_scale_descriptors(nn.Flatten(), torch.ones(1, 1, 2, 2), scales=()), r"scales = \(\) is out of"),
        (lambda: multi_scale_descriptors(nn.Flatten(), torch.ones(1, 1, 2, 2), scales=[0]), r"scales = \[0\] is out"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="no_such_argument"):
        local_descriptor_triplet(descriptors, attention, no_such_argument=1)
