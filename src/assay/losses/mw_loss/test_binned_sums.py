from __future__ import annotations

import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.losses import mw_loss

binned = importlib.import_module("assay.losses.mw_loss.binned_sums")
NONE = torch.empty(0, dtype=torch.int64)


def pair_by_pair(positives, cells, temperature):
    x = (cells.flatten() - positives[:, None]) / temperature
    return F.softplus(x, threshold=50), torch.sigmoid(x) / temperature


@pytest.mark.parametrize("temperature", [0.01, 0.013, 1.0])
def test_each_pair_is_within_the_tolerance(temperature):
    """One negative at a time against a dense sweep of positives, from one bin's edge to far beyond the bend."""
    width = 2.0 ** -math.ceil(math.log2(64 / temperature))
    positives = torch.linspace(-50 * temperature, 50 * temperature, 20_011, dtype=torch.float64)
    for place in (0.0, 0.25, 0.499, 0.5, 127.4, 128.0, 255.49, 255.51):
        negative = torch.tensor([place * width], dtype=torch.float64)
        sums, slopes = binned.binned_sums(positives, negative, NONE, False, temperature)
        exact, slope = pair_by_pair(positives, negative, temperature)
        assert (sums - exact[:, 0]).abs().max() < binned.TOLERANCE
        assert (slopes - slope[:, 0]).abs().max() * temperature < binned.TOLERANCE
        for weight in (1.0, -2.0):
            gradient = binned.binned_gradient(
                torch.tensor([weight], dtype=torch.float64), negative, positives, NONE, NONE.double(), temperature
            )
            expected = weight * torch.sigmoid((positives - negative) / temperature)
            assert (gradient * temperature - expected).abs().max() < abs(weight) * binned.TOLERANCE


def test_interpolation_and_expansion_are_as_good_as_the_tolerance_says():
    """The two steps apart: 20 nodes on 4 temperatures, and degree two on 1/64, for every place of the bend."""
    nodes, _ = binned._interpolation()
    inside = torch.linspace(-1, 1, 401, dtype=torch.float64)
    lagrange = torch.stack(
        [math.prod((inside - other) / (node - other) for other in nodes if other != node) for node in nodes]
    )
    centre = torch.linspace(-60, 60, 2401, dtype=torch.float64)[:, None]
    for kernel in (lambda x: F.softplus(x, threshold=50), torch.sigmoid):
        interpolated = kernel(centre + 2 * nodes) @ lagrange
        assert (interpolated - kernel(centre + 2 * inside)).abs().max() < 1e-10
    assert lagrange.abs().sum(0).max() < 3  # how much the second interpolation can make of the first one's error
    half = 1 / 128
    # sup of |softplus'''| is 1 / (6 sqrt(3)), of |sigmoid'''| 1 / 8; spread and evaluation each err by one remainder
    assert 2 * half**3 / 6 * max(1 / (6 * math.sqrt(3)), 1 / 8) + 4 * 1e-10 < binned.TOLERANCE


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 9999),
    temperature=st.sampled_from([0.01, 0.07, 1.0, 30.0]),
    spread=st.sampled_from([1e-3, 1.0, 40.0]),
    offset=st.sampled_from([0.0, -0.3, 1e4]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_loss_and_gradient_are_those_of_all_pairs(seed, temperature, spread, offset, dtype):
    generator = torch.Generator().manual_seed(seed)
    scores = (spread * torch.randn(9, 12, generator=generator) + offset).to(dtype)
    target = torch.randint(12, (9,), generator=generator)
    found = []
    for pairs, x in (("exact", scores.double()), ("binned", scores)):
        x = x.clone().requires_grad_()
        losses = mw_loss(x, target, temperature=temperature, pairs=pairs, reduction="none")
        gradient = torch.autograd.grad(losses.mean(), x)[0]
        found.append((losses.detach().double(), gradient.double() * temperature))
    rounding = 0 if dtype == torch.float64 else 2e-7
    allowed = binned.TOLERANCE + rounding * found[0][0].abs() + 1e-13 * spread / temperature
    assert ((found[1][0] - found[0][0]).abs() <= allowed).all()
    assert (found[1][1] - found[0][1]).abs().max() <= (binned.TOLERANCE + rounding) * 1.0


def test_sums_of_many_scores_in_many_pieces(monkeypatch):
    monkeypatch.setattr(binned, "block_size", lambda x: 40)
    scores = torch.randn(30, 33, generator=torch.Generator().manual_seed(0)).T[:30]  # not contiguous
    one, other = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    losses = mw_loss(one, temperature=0.1), mw_loss(other, temperature=0.1, pairs="binned")
    torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-7)
    gradients = (torch.autograd.grad(loss, x)[0] for loss, x in zip(losses, (one, other), strict=True))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-8)


def test_many_pairs_are_binned_where_the_scores_are_no_finer_than_bins(monkeypatch):
    scores = torch.randn(6, 7, generator=torch.Generator().manual_seed(0))
    masks = {"positive_mask": torch.eye(6, 7, dtype=torch.bool)}
    module = importlib.import_module("assay.losses.mw_loss.mw_loss")
    called = []
    monkeypatch.setattr(module, "binned_sums", lambda *args: called.append(args) or binned.binned_sums(*args))
    for many, dtype, bins in ((36 * 6, torch.float32, 1), (36 * 6 + 1, torch.float32, 0), (1, torch.float64, 0)):
        monkeypatch.setattr(module, "MANY", many)
        for where in ({}, masks):
            called.clear()
            losses = [mw_loss(scores.to(dtype), temperature=0.1, pairs=pairs, **where) for pairs in ("auto", "exact")]
            assert len(called) == bins
            torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-7)


def test_scores_too_wide_for_bins_are_compared_exactly():
    scores = torch.randn(5, 6, dtype=torch.float64)
    scores[0, 1] = 1e3
    one, other = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    exact, wide = mw_loss(one), mw_loss(other, pairs="binned")
    torch.testing.assert_close(wide, exact, rtol=1e-14, atol=0)
    torch.testing.assert_close(torch.autograd.grad(wide, other), torch.autograd.grad(exact, one), rtol=1e-12, atol=0)
    assert binned._Grid.over(scores[0], scores, 0.01) is None
    assert binned._Grid.over(scores[0], scores, 0.13) is not None  # 7,700 temperatures


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_not_finite_give_what_all_pairs_give(bad):
    scores = torch.zeros(3, 3)
    scores[0, 1] = bad
    torch.testing.assert_close(mw_loss(scores, pairs="binned"), mw_loss(scores), equal_nan=True)


def test_compiles_into_one_graph():
    torch._dynamo.reset()
    scores = torch.randn(4, 5, dtype=torch.float64)
    outcomes = []

    def call(x):
        return mw_loss(x, pairs="binned", temperature=0.3)

    for function in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        x = scores.clone().requires_grad_()
        loss = function(x)
        outcomes.append((loss.detach(), *torch.autograd.grad(loss, x)))
    torch.testing.assert_close(*outcomes)


def test_arguments_stay_as_they_are_and_there_is_no_second_derivative():
    scores = torch.randn(4, 5, dtype=torch.float64).requires_grad_()
    before = scores.detach().clone()
    loss = mw_loss(scores, temperature=0.3, pairs="binned")
    (gradient,) = torch.autograd.grad(loss, scores, create_graph=True)
    assert torch.equal(scores.detach(), before)
    with pytest.raises(RuntimeError, match="binned"):
        gradient.square().sum().backward()
