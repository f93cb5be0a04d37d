from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.data import random_crops, replay_crops, self_mix

EXACT = {"rtol": 0.0, "atol": 0.0}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- drawing boxes


@given(
    low=st.floats(0.01, 1),
    more=st.floats(0, 1),
    ratio=st.floats(0.3, 1),
    aspect=st.floats(0.2, 5),
    seed=st.integers(0, 99),
)
def test_boxes_lie_inside_and_are_of_the_size_and_shape_asked_for(low, more, ratio, aspect, seed):
    scale = (low, low + more * (1 - low))
    boxes, flips = random_crops(
        50, scale=scale, ratio=(ratio, 1 / ratio), aspect=aspect, flip=0.5, generator=generator(seed)
    )
    y, x, h, w = boxes.double().unbind(1)
    assert boxes.shape == (50, 4) and flips.shape == (50,) and flips.dtype == torch.bool
    assert (y >= 0).all() and (x >= 0).all() and (y + h <= 1 + 1e-7).all() and (x + w <= 1 + 1e-7).all()
    shape = w * aspect / h
    assert (shape >= ratio - 1e-5).all() and (shape <= 1 / ratio + 1e-5).all()
    area = h * w
    middle = ((y - (1 - h) / 2).abs() < 1e-6) & ((x - (1 - w) / 2).abs() < 1e-6)  # none of ten fitted
    assert (((area >= scale[0] - 1e-5) & (area <= scale[1] + 1e-5)) | middle).all()


def test_boxes_have_the_distribution_that_is_said():
    boxes, flips = random_crops(40_000, scale=(0.1, 0.5), ratio=(0.5, 2.0), flip=0.25, generator=generator())
    area, shape = boxes[:, 2] * boxes[:, 3], (boxes[:, 3] / boxes[:, 2]).log()
    for values, low, high in ((area, 0.1, 0.5), (shape, -math.log(2), math.log(2))):
        quantiles = torch.linspace(0.1, 0.9, 9)
        torch.testing.assert_close(values.quantile(quantiles), low + (high - low) * quantiles, rtol=0, atol=0.02)
    place = boxes[:, :2] / (1 - boxes[:, 2:])
    torch.testing.assert_close(place.mean(0), torch.full((2,), 0.5), rtol=0, atol=0.01)
    assert abs(flips.float().mean() - 0.25) < 0.01


def test_where_no_box_fits_it_is_the_largest_in_the_middle():
    wide, _ = random_crops(1, scale=(1.0, 1.0), ratio=(1.0, 1.0), aspect=2.0, generator=generator())
    high, _ = random_crops(1, scale=(1.0, 1.0), ratio=(1.0, 1.0), aspect=0.5, generator=generator())
    assert wide.tolist() == [[0, 0.25, 1, 0.5]] and high.tolist() == [[0.25, 0, 0.5, 1]]


# --- replaying them


@settings(deadline=None)
@given(data=st.data(), seed=st.integers(0, 99))
def test_a_box_of_whole_pixels_is_cropping_and_resizing(data, seed):
    images = torch.randn(3, 2, 7, 9, generator=generator(seed), dtype=torch.float64)
    boxes, flips, expected = [], [], []
    size = data.draw(st.tuples(st.integers(1, 10), st.integers(1, 10)))
    for image in images:
        h, w = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 9))
        y, x = data.draw(st.integers(0, 7 - h)), data.draw(st.integers(0, 9 - w))
        boxes.append([y / 7, x / 9, h / 7, w / 9])
        flips.append(data.draw(st.booleans()))
        crop = F.interpolate(image[None, :, y : y + h, x : x + w], size, mode="bilinear", align_corners=False)
        expected.append(crop.flip(-1) if flips[-1] else crop)
    replayed = replay_crops(images, torch.tensor(boxes, dtype=torch.float64), torch.tensor(flips), size)
    torch.testing.assert_close(replayed, torch.cat(expected), rtol=0, atol=1e-9)


def test_the_whole_image_at_its_own_size_is_the_image():
    images = torch.rand(2, 3, 8, 6)
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(2, 4)
    torch.testing.assert_close(replay_crops(images, whole, torch.tensor([False, True]), (8, 6))[0], images[0])
    mirrored = replay_crops(images, whole, torch.tensor([False, True]), (8, 6))[1]
    torch.testing.assert_close(mirrored, images[1].flip(-1))


def test_several_crops_of_an_image_are_those_one_by_one():
    images = torch.rand(2, 3, 8, 6)
    boxes, flips = random_crops(10, generator=generator())
    boxes, flips = boxes.view(2, 5, 4), flips.view(2, 5)
    many = replay_crops(images, boxes, flips, 4)
    assert many.shape == (2, 5, 3, 4, 4)
    for k in range(5):
        torch.testing.assert_close(many[:, k], replay_crops(images, boxes[:, k], flips[:, k], 4), **EXACT)
    half = replay_crops(images.half(), boxes, flips, 4)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), many, rtol=0, atol=2e-3)


# --- mixing


def batch(seed=0, size=12, groups=4, dtype=torch.float64):
    draw = generator(seed)
    images = torch.rand(size, 2, 6, 5, generator=draw, dtype=dtype)
    labels = torch.rand(size, 3, generator=draw, dtype=dtype)
    return images, labels / labels.sum(1, keepdim=True), torch.randint(groups, (size,), generator=draw)


@settings(deadline=None)
@given(seed=st.integers(0, 999), mode=st.sampled_from(["cutmix", "mixup"]), alpha=st.sampled_from([0.2, 1.0, 5.0]))
def test_nothing_crosses_from_image_to_image(seed, mode, alpha):
    """Where a group's crops and labels are equal, mixing them gives them back to the bit."""
    _, _, groups = batch(seed)
    images = torch.rand(4, 2, 6, 5, generator=generator(seed))[groups]
    labels = torch.rand(4, 3, generator=generator(seed))[groups]
    mixed, soft = self_mix(images, labels, groups, alpha=alpha, prob=1.0, mode=mode, generator=generator(seed))
    torch.testing.assert_close((mixed, soft), (images, labels), **EXACT)


@settings(deadline=None)
@given(seed=st.integers(0, 999), mode=st.sampled_from(["cutmix", "mixup"]), alpha=st.sampled_from([0.2, 1.0, 5.0]))
def test_labels_are_mixed_by_the_exact_share_of_pixels(seed, mode, alpha):
    """Crop i is i + 1 everywhere, so the pixels tell the partner and the share, which the labels must have."""
    _, _, groups = batch(seed)
    size = len(groups)
    images = torch.arange(1.0, size + 1, dtype=torch.float64).view(size, 1, 1, 1).expand(size, 2, 6, 5)
    before = images.clone()
    mixed, soft = self_mix(
        images, torch.eye(size).double(), groups, alpha=alpha, prob=1.0, mode=mode, generator=generator(seed)
    )
    torch.testing.assert_close(images, before, **EXACT)
    partners = []
    for i in range(size):
        if mode == "cutmix":
            share = torch.zeros(size).double()
            for value in mixed[i].flatten().tolist():
                share[int(value) - 1] += 1 / 60
            torch.testing.assert_close(soft[i], share, rtol=0, atol=1e-9)
        else:
            expected = (soft[i] * torch.arange(1.0, size + 1)).sum().expand(2, 6, 5)
            torch.testing.assert_close(mixed[i], expected, rtol=0, atol=1e-9)
        others = [j for j in soft[i].nonzero().flatten().tolist() if j != i]
        assert len(others) <= 1 and all(groups[j] == groups[i] for j in others)
        partners += others
    alone = torch.bincount(groups, minlength=4)[groups] == 1
    torch.testing.assert_close(mixed[alone], before[alone], **EXACT)
    torch.testing.assert_close(soft[alone], torch.eye(size).double()[alone], **EXACT)
    if partners:  # lam < 1: everyone in company meets one other, and is met by one
        assert sorted(partners) == (~alone).nonzero().flatten().tolist()


def test_of_two_crops_each_meets_the_other():
    images, labels, _ = batch()
    groups = torch.arange(12) % 6
    for seed in range(5):
        mixed, soft = self_mix(images, labels, groups, prob=1.0, mode="mixup", generator=generator(seed))
        other = torch.arange(12).roll(6)
        torch.testing.assert_close(mixed + mixed[other], images + images[other])
        torch.testing.assert_close(soft + soft[other], labels + labels[other])
        assert not torch.allclose(mixed, images)


def test_lambda_one_or_no_luck_changes_nothing():
    images, labels, groups = batch()
    for options in ({"alpha": 0.0, "prob": 1.0}, {"prob": 0.0}):
        for mode in ("cutmix", "mixup"):
            torch.testing.assert_close(
                self_mix(images, labels, groups, mode=mode, **options), (images, labels), **EXACT
            )
    changed = [
        not torch.equal(self_mix(*batch(), prob=0.3, mode="mixup", generator=generator(k))[0], images)
        for k in range(400)
    ]
    assert 0.2 < sum(changed) / 400 < 0.4


def test_the_generator_decides_alone():
    once = self_mix(*batch(), prob=1.0, generator=generator(3))
    torch.manual_seed(99)
    torch.testing.assert_close(self_mix(*batch(), prob=1.0, generator=generator(3)), once, **EXACT)
    assert not torch.equal(self_mix(*batch(), prob=1.0, generator=generator(4))[0], once[0])
    torch.manual_seed(5)
    by_global = self_mix(*batch(), prob=1.0)
    torch.manual_seed(5)
    torch.testing.assert_close(self_mix(*batch(), prob=1.0), by_global, **EXACT)


def test_the_cut_is_the_box_of_the_definition():
    """Over many draws the share that is left has the mean of lam with the cut at the edges, and every pixel is cut."""
    images = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 16, 16)
    groups, counts, shares = torch.zeros(2, dtype=torch.long), torch.zeros(16, 16), []
    for k in range(600):
        mixed, soft = self_mix(images, torch.eye(2), groups, prob=1.0, generator=generator(k))
        cut = mixed[0, 0]
        counts += cut
        rows, columns = cut.any(1).nonzero().flatten(), cut.any(0).nonzero().flatten()
        assert cut.sum() == len(rows) * len(columns)  # one rectangle
        shares.append(soft[0, 0].item())
    assert counts.min() > 0
    sides = [(int(16 * math.sqrt(1 - (k + 0.5) / 200))) for k in range(200)]
    inside = [sum(max(0, min(16, c - s // 2 + s) - max(0, c - s // 2)) for c in range(16)) / 16 for s in sides]
    assert sum(shares) / 600 == pytest.approx(sum(1 - (i / 16) ** 2 for i in inside) / 200, abs=0.03)


# --- wrong use


BOX, FLIP = torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([False])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: random_crops(0), "count = 0 is out of range: an integer >= 1"),
        (lambda: random_crops(3, scale=(0.0, 1.0)), r"scale = \(0.0, 1.0\)"),
        (lambda: random_crops(3, scale=(0.5, 1.1)), r"scale = \(0.5, 1.1\)"),
        (lambda: random_crops(3, ratio=(2.0, 1.0)), r"ratio = \(2.0, 1.0\)"),
        (lambda: random_crops(3, aspect=0), "aspect = 0"),
        (lambda: random_crops(3, flip=1.5), "flip = 1.5"),
        (lambda: replay_crops(torch.zeros(1, 4, 4), BOX, FLIP, 2), r"images.shape = \(1, 4, 4\)"),
        (lambda: replay_crops(torch.zeros(1, 1, 4, 4).byte(), BOX, FLIP, 2), "of torch.uint8"),
        (lambda: replay_crops(torch.zeros(2, 1, 4, 4), BOX, FLIP, 2), r"boxes.shape = \(1, 4\) .* \(2, 4\)"),
        (lambda: replay_crops(torch.zeros(1, 1, 4, 4), BOX, FLIP[:0], 2), r"flips.shape = \(0,\) .* \(1,\)"),
        (lambda: replay_crops(torch.zeros(1, 1, 4, 4), BOX, FLIP, 0), "size = 0"),
        (lambda: self_mix(*batch(), mode="cut"), "mode = 'cut' is out of range: 'cutmix' or 'mixup'"),
        (lambda: self_mix(*batch(), alpha=-1), "alpha = -1"),
        (lambda: self_mix(*batch(), prob=2), "prob = 2"),
        (lambda: self_mix(batch()[0][0], *batch()[1:]), r"images.shape = \(2, 6, 5\)"),
        (lambda: self_mix(batch()[0].long(), *batch()[1:], mode="mixup"), "floating point for mixup"),
        (lambda: self_mix(batch()[0], batch()[1][1:], batch()[2]), r"soft_targets.shape = \(11, 3\)"),
        (lambda: self_mix(batch()[0], batch()[1].long(), batch()[2]), "soft_targets.dtype = torch.int64"),
        (lambda: self_mix(*batch()[:2], batch()[2][1:]), r"group_ids.shape = \(11,\) is out of range: \(12,\)"),
    ],
)  # fmt: skip
def test_arguments_out_of_range_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
