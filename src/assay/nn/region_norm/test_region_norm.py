"""Region normalization against torch's on one region, its invariances, and a broken variant of its claim."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from assay.bench.claims import recorded
from assay.bench.evidence import FAILS, HOLDS, Bench
from assay.catalogue import find
from assay.nn import InpaintingGenerator, RegionNormB, RegionNormL
from assay.nn._contract import Example
from assay.nn.functional import region_norm
from assay.nn.region_norm.claim import SHIFT, claim, figure


def with_hole(layer: nn.Module, x: Tensor) -> Tensor:
    mask = torch.zeros(x.shape[0], 1, *x.shape[2:], dtype=x.dtype)
    mask[:, :, 1:, :2] = 1
    return layer(x, mask)


EXAMPLES = [
    Example(partial(RegionNormB, 2), (3, 2, 3, 3), forward=with_hole, apart=False),
    Example(partial(RegionNormB, 2, statistics="instance", mask_beta=False), (2, 2, 3, 3), forward=with_hole),
    Example(partial(RegionNormL, 2, threshold=0.5, kernel_size=3, statistics="instance"), (2, 2, 3, 3), gradient=False),
    Example(
        partial(InpaintingGenerator, 1, width=2, blocks=0, threshold=0.4),
        (3, 1, 12, 12),
        forward=with_hole,
        gradient=False,
        apart=False,
        bfloat16=0.2,
    ),
]
close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)
STATISTICS = pytest.mark.parametrize("statistics", ["batch", "instance"])


def image(batch: int = 3) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(batch, 2, 6, 5, dtype=torch.float64) * 3 + 1, torch.rand(batch, 1, 6, 5) < 0.4


@STATISTICS
def test_each_region_has_mean_0_and_its_own_variance(statistics):
    x, hole = image()
    y = region_norm(x, hole, statistics=statistics)
    for example in (slice(None),) if statistics == "batch" else range(3):
        for channel in range(2):
            for region in (hole, ~hole):
                before, after = x[example, channel][region[example, 0]], y[example, channel][region[example, 0]]
                var = before.var(correction=0)
                close(after, (before - before.mean()) / (var + 1e-5).sqrt())
                assert after.mean().abs() < 1e-12
                close(after.var(correction=0), var / (var + 1e-5))


@STATISTICS
@pytest.mark.parametrize("full", [False, True])
def test_one_region_is_torchs_normalization(statistics, full):
    x, _ = image()
    labels = torch.full((3, 1, 6, 5), full)
    plain = F.batch_norm(x, None, None, training=True) if statistics == "batch" else F.instance_norm(x)
    for mode in ("plain", "reference"):
        close(region_norm(x, labels, statistics=statistics, eps_mode=mode), plain)


@STATISTICS
def test_what_is_in_the_hole_is_nothing_to_the_rest(statistics):
    x, hole = image()
    other = torch.where(hole, 1e3 * torch.randn_like(x), x)
    one, two = (region_norm(t, hole, statistics=statistics) for t in (x, other))
    valid = ~hole.expand_as(x)
    assert torch.equal(one[valid], two[valid])
    layer = RegionNormB(2, statistics).double()
    assert torch.equal(layer(x, hole)[valid], layer(other, hole)[valid])


@settings(deadline=None, max_examples=20)
@given(st.floats(0.1, 10), st.floats(0.1, 10), st.floats(-5, 5))
def test_scale_and_shift_of_a_region_cancel(a, b, c):
    x, hole = image()
    y = torch.where(hole, a * x + c, b * x - c)
    close(region_norm(y, hole, eps=1e-30), region_norm(x, hole, eps=1e-30))


def test_labels_may_be_swapped_or_many_or_differ_by_channel():
    x, hole = image()
    close(region_norm(x, ~hole), region_norm(x, hole))
    for count in (3, 7):  # by element and by products of matrices
        labels = torch.randint(count, (3, 1, 6, 5))
        y = region_norm(x, labels, count)
        for region in range(count):
            here = (labels == region).expand_as(x)
            close(y[here], region_norm(x, labels == region)[here])
    each = torch.cat([hole, ~hole], 1)
    close(region_norm(x, each), region_norm(x, hole))


@pytest.mark.parametrize("count", [2, 7])
def test_statistics_are_exact_under_autocast(count):
    x, labels = torch.randn(2, 4, 8, 8), torch.randint(count, (2, 1, 8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        found = region_norm(x, labels, count)
    torch.testing.assert_close(found, region_norm(x, labels, count), rtol=0, atol=0)


def test_the_authors_eps_is_that_of_their_batch_normalization():
    x, hole = image()
    x = x * 1e-2
    expected = torch.zeros_like(x)
    for region in (hole, ~hole):  # fill the others with the region's mean, normalize all, and shrink
        share = region.double().mean()
        mean = (x * region).sum((0, 2, 3), keepdim=True) / region.sum()
        normed = F.batch_norm(torch.where(region, x, mean), None, None, training=True)
        expected += normed * share.sqrt() * region
    close(region_norm(x, hole, eps_mode="reference"), expected)


@STATISTICS
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_empty_full_and_single_regions_are_finite(statistics, dtype):
    x, hole = image()
    single = torch.zeros_like(hole)
    single[0, 0, 2, 3] = True
    for labels in (torch.zeros_like(hole), torch.ones_like(hole), single):
        leaf = x.to(dtype).requires_grad_()
        y = region_norm(leaf, labels, statistics=statistics)
        y.float().square().sum().backward()
        assert y.dtype == dtype and y.isfinite().all() and leaf.grad.isfinite().all()
    assert (y[0, :, 2, 3] == 0).all()


@STATISTICS
def test_gradients(statistics):
    x, hole = image(2)
    small, labels = x[:, :, :3, :3].clone().requires_grad_(), hole[:, :, :3, :3]
    torch.autograd.gradcheck(lambda t: region_norm(t, labels, statistics=statistics), (small,))


def test_by_a_mask_each_region_has_its_affine_map():
    x, hole = image()
    layer = RegionNormB(2).double()
    close(layer(x, hole), region_norm(x, hole))
    with torch.no_grad():
        for i, parameter in enumerate(layer.parameters(), start=1):
            parameter.fill_(i)
    y = region_norm(x, hole)
    close(layer(x, hole), torch.where(hole, 2 * y + 2, 4 * y + 4))
    layer.mask_beta = False
    close(layer(x, hole), torch.where(hole, 2 * y, 4 * y) + 6)
    mask = F.interpolate(hole.float(), scale_factor=2)
    layer.mask_beta = True
    close(layer(x, mask), torch.where(hole, 2 * y + 2, 4 * y + 4))
    close(layer.train()(x, mask), layer.eval()(x, mask))


def test_by_a_map_of_its_own():
    x, _ = image()
    layer = RegionNormL(2, threshold=0.5, kernel_size=3).double()
    s = torch.sigmoid(F.conv2d(torch.cat([x.mean(1, True), x.amax(1, True)], 1), layer.conv.weight, padding=1))
    y = region_norm(x, s >= 0.5)
    gamma, beta = (F.conv2d(s, c.weight, c.bias, padding=1) for c in (layer.gamma_conv, layer.beta_conv))
    close(layer(x), y * (1 + gamma) + beta)
    assert torch.equal(layer.last_region, s >= 0.5) and 0 < layer.last_region.double().mean() < 1
    layer(x).sum().backward()
    assert layer.conv.weight.grad.abs().max() > 0
    for parameter in (*layer.gamma_conv.parameters(), *layer.beta_conv.parameters()):
        nn.init.zeros_(parameter)
    close(layer(x), y)
    for threshold in (0.0, 1.5):
        layer.threshold = threshold
        close(layer(x), F.batch_norm(x, None, None, training=True))
    assert sum(p.numel() for p in RegionNormL(9).parameters()) == 198


def test_the_generator_is_wired_as_in_the_paper():
    model = InpaintingGenerator(width=8, blocks=2)
    assert [type(m).__name__ for m in model.encoder] == ["Conv2d", "RegionNormB"] * 3
    assert sum(isinstance(m, RegionNormL) for m in model.modules()) == 2 * 2 + 2
    mixed = torch.randn(2, 8, 3, 5)
    assert torch.equal(model.decoder[1](mixed), F.pixel_shuffle(mixed, 2))
    images, masks = torch.rand(2, 3, 16, 20), torch.zeros(2, 1, 16, 20)
    masks[..., 4:9] = 1
    filled = model(images, masks)
    assert filled.shape == images.shape and filled.min() >= 0 and filled.max() <= 1
    model.eval()
    unseen = torch.where(masks.bool(), 0.0, images)  # what is under the hole is not looked at
    assert torch.equal(model(images, masks), model(unseen, masks))
    assert InpaintingGenerator(width=8, blocks=0, mask_channel=True)(images, masks).shape == images.shape
    with pytest.raises(ValueError, match="width = 0 is out of range: >= 1"):
        InpaintingGenerator(width=0)


def test_arguments_out_of_range_are_named():
    x, hole = image()
    for name, value in [("statistics", "layer"), ("eps", 0.0), ("eps_mode", "other"), ("num_regions", 0)]:
        with pytest.raises(ValueError, match=f"{name} = {value!r} is out of range"):
            region_norm(x, hole, **{name: value})
    with pytest.raises(ValueError, match=r"labels of shape \(3, 1, 6, 4\)"):
        region_norm(x, hole[..., :4])
    with pytest.raises(ValueError, match="kernel_size = 4 is out of range: an odd number"):
        RegionNormL(2, kernel_size=4)
    with pytest.raises(ValueError, match=r"mask of shape \(2, 1, 6, 5\)"):
        RegionNormB(2).double()(x, hole[:2])
    with pytest.raises(ValueError, match="with C = 5 is wanted"):
        RegionNormL(5)(x)


def over_all(x: Tensor, mask: Tensor) -> Tensor:
    """The broken variant of the card: the regions are told apart by name alone."""
    return F.batch_norm(x, None, None, training=True)


def test_the_claim_does_not_hold_for_one_normalization_over_all():
    real, broken = (claim(Bench(), method=method, parts=(SHIFT,)) for method in (region_norm, over_all))
    assert (real.checks[0].verdict, broken.checks[0].verdict) == (HOLDS, FAILS)


def test_the_claim_is_drawn():
    evidence, _ = recorded(find("region-norm"))
    assert figure(evidence) is not None
