"""Kappas against autograd, Fenchel's equality, and the geometry of the domains of their conjugates."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.optim.kappas import L1, L2, HalfSquare, Huber, Kappa, L2Rows, LogCosh, Lp, Nuclear, SoftThreshold, TopK

KAPPAS = [
    L1(), SoftThreshold(0.25), TopK(3), Huber(0.5), Lp(1.2), Lp(2), Lp(5.0), Lp(1), L2(), L2Rows(), Nuclear(None),
    HalfSquare(), LogCosh(),
]  # fmt: skip
NORMS = [kappa for kappa in KAPPAS if isinstance(kappa, (L1, TopK, Lp, L2, L2Rows, Nuclear))]
by_kappa = pytest.mark.parametrize("kappa", KAPPAS, ids=repr)


def random(shape, seed=0, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@by_kappa
@pytest.mark.parametrize("shape", [(4, 6), (7,), (), (3, 2, 2)])
def test_grad_is_the_derivative_of_value(kappa, shape):
    y = random(shape).requires_grad_()
    (expected,) = torch.autograd.grad(kappa.value(y), y)
    before = y.detach().clone()
    torch.testing.assert_close(kappa.grad(y.detach()), expected, rtol=1e-9, atol=1e-10)
    assert torch.equal(y.detach(), before), "grad wrote its argument"
    torch.testing.assert_close(kappa.grad_(before), expected, rtol=1e-9, atol=1e-10)


@by_kappa
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 9999), scale=st.floats(1e-3, 1e3), shape=st.sampled_from([(4, 3), (5,), ()]))
def test_fenchel(kappa, seed, scale, shape):
    """K(y) + K*(x) >= <x, y> for every x in the domain, with equality where x is the gradient at y."""
    y, other = random(shape, seed, scale), random(shape, seed + 1, scale)
    x, elsewhere = kappa.grad(y), kappa.project(other)
    assert kappa.in_domain(x) and kappa.in_domain(elsewhere)
    gap = kappa.value(y) + kappa.conjugate(x) - (x * y).sum()
    assert abs(gap.item()) <= 1e-10 * max(1, scale)
    for other_x in (elsewhere, kappa.grad(other)):
        assert kappa.value(y) + kappa.conjugate(other_x) - (other_x * y).sum() >= -1e-10 * max(1, scale)


@by_kappa
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 9999), scale=st.floats(0.1, 30))
def test_project_is_the_nearest_point(kappa, seed, scale):
    """(x - P) makes no acute angle with any way from P into the domain; gradients are its extreme points."""
    x = random((4, 3), seed, scale)
    nearest = kappa.project(x)
    assert kappa.in_domain(nearest, 1e-11)
    torch.testing.assert_close(kappa.project(nearest), nearest, rtol=1e-10, atol=1e-10)
    for y in (x, x - nearest, *(random((4, 3), seed + i) for i in range(1, 30))):
        inward = kappa.project(y) if isinstance(kappa, HalfSquare) else kappa.grad(y)
        assert ((x - nearest) * (inward - nearest)).sum() <= 1e-9 * scale
    torch.testing.assert_close(kappa.distance(x), (x - nearest).norm())


@by_kappa
def test_kappas_are_even_and_zero_has_gradient_zero(kappa):
    y = random((4, 3))
    torch.testing.assert_close(kappa.grad(-y), -kappa.grad(y))
    torch.testing.assert_close(kappa.value(-y), kappa.value(y))
    assert not kappa.grad(torch.zeros(4, 3)).any() and not kappa.grad(torch.zeros(())).any()


@pytest.mark.parametrize("kappa", NORMS, ids=repr)
def test_gradients_of_norms_know_no_scale(kappa):
    y = random((4, 3))
    for scale in (1e-6, 3.0, 1e9):
        torch.testing.assert_close(kappa.grad(scale * y), kappa.grad(y), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(kappa.value(scale * y), scale * kappa.value(y))


@pytest.mark.parametrize(("kappa", "outside"), [
    (L1(), [1.01, 0.0]), (SoftThreshold(0.1), [0.0, -1.01]), (Huber(1), [2.0, 0.0]), (LogCosh(), [1.01, 0.0]),
    (TopK(1), [0.6, 0.41]), (Lp(3), [0.7, 0.7]), (L2(), [0.8, 0.61]), (L2Rows(), [0.8, 0.61]), (Nuclear(), [1.01, 0.0]),
])  # fmt: skip
def test_the_conjugate_is_infinite_outside(kappa, outside):
    x = torch.tensor(outside, dtype=torch.float64)
    assert kappa.conjugate(x) == math.inf and not kappa.in_domain(x) and kappa.in_domain(x, 1.0)
    assert kappa.conjugate(x / x.norm() / 2) < math.inf and kappa.conjugate(kappa.project(x)) < math.inf


@pytest.mark.parametrize(("kappa", "x", "expected"), [
    (SoftThreshold(0.5), [0.5, -1.0], 0.75),
    (Huber(0.5), [0.5, -1.0], 0.3125),
    (HalfSquare(), [3.0, -4.0], 12.5),
    (LogCosh(), [1.0, 0.0], math.log(2)),
    (L1(), [1.0, -1.0], 0.0),
])  # fmt: skip
def test_conjugates_by_hand(kappa, x, expected):
    assert kappa.conjugate(torch.tensor(x, dtype=torch.float64)).item() == pytest.approx(expected, rel=1e-12)


def test_one_kappa_is_another_in_the_limit():
    y = random((5, 4))
    sign, unit = y.sign(), y / y.norm()
    for kappa, limit in [
        (TopK(20), sign), (TopK(99), sign), (SoftThreshold(0.0), sign), (Huber(1e-13), sign), (Lp(1), sign),
        (Lp(2), unit),
    ]:  # fmt: skip
        torch.testing.assert_close(kappa.grad(y), limit, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(Lp(1 + 1e-9).grad(y), sign, rtol=1e-7, atol=1e-7)
    top = torch.where(y.abs() == y.abs().max(), y.sign(), 0)
    torch.testing.assert_close(Lp(1e4).grad(y), TopK(1).grad(y), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(TopK(1).grad(y), top)
    rows = y[:1]
    torch.testing.assert_close(Nuclear(None).grad(rows), L2().grad(rows))
    torch.testing.assert_close(L2Rows().grad(rows), L2().grad(rows))
    torch.testing.assert_close(L2Rows().grad(rows[0]), L2().grad(rows[0]))


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4), (6, 2, 2)])
def test_nuclear_sets_singular_values_to_one(shape):
    u, _, v = torch.linalg.svd(random(shape).flatten(1), full_matrices=False)
    y = ((u * torch.linspace(0.2, 3, len(v), dtype=torch.float64)) @ v).view(shape)
    exact, loose = (kappa.grad(y).flatten(1) for kappa in (Nuclear(None), Nuclear()))
    torch.testing.assert_close(exact, u @ v, rtol=1e-12, atol=1e-12)
    values = torch.linalg.svdvals(loose)
    assert (values >= 0.65).all() and (values <= 1.3).all()
    turned = u.mT @ loose @ v.mT
    torch.testing.assert_close(turned, torch.diag(turned.diag()), rtol=0, atol=1e-10)


def test_nuclear_leaves_out_directions_of_rounding():
    y = random((5, 1)) @ random((1, 4), seed=1)
    values = torch.linalg.svdvals(Nuclear(None).grad(y))
    torch.testing.assert_close(values, torch.tensor([1.0, 0, 0, 0], dtype=torch.float64), rtol=1e-9, atol=1e-9)


@by_kappa
def test_half_precision_keeps_its_dtype_and_sums_in_float32(kappa):
    y = random((8, 40)).bfloat16()
    found, exact = kappa.grad(y), kappa.grad(y.double())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=0.02, atol=0.02)
    assert kappa.value(y).dtype == torch.float32
    torch.testing.assert_close(kappa.value(y).double(), kappa.value(y.double()), rtol=1e-5, atol=1e-5)


def test_below_eps_norms_fade_out():
    y = torch.full((4,), 1e-14, dtype=torch.float64)
    for kappa in (L2(), L2Rows(), Lp(3), Nuclear(None)):
        row = y[None] if isinstance(kappa, Nuclear) else y
        assert kappa.grad(row).norm() < 0.1
        assert kappa.grad(row, eps=0.0 if not isinstance(kappa, Lp) else 1e-15).norm() > 0.7


@pytest.mark.parametrize(("make", "message"), [
    (lambda: SoftThreshold(-1), r"e = -1 is out of range: a number >= 0"),
    (lambda: Huber(0), r"e = 0 is out of range: a number > 0"),
    (lambda: TopK(0), r"k = 0 is out of range"),
    (lambda: TopK(0.5), r"k = 0.5 is out of range"),
    (lambda: Lp(0.5), r"p = 0.5 is out of range"),
    (lambda: Lp(math.inf), r"p = inf is out of range"),
    (lambda: Nuclear(0), r"ns_steps = 0 is out of range"),
])  # fmt: skip
def test_numbers_out_of_range_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_kappa_of_ones_own_needs_three_methods():
    class Ball(Kappa):
        def value(self, y):
            return 2 * y.norm()

        def grad(self, y, eps=1e-12):
            return 2 * y / y.norm().clamp(min=eps)

        def project(self, x):
            return x / (x.norm() / 2).clamp(min=1)

    y = random((3, 2))
    assert Ball().in_domain(Ball().grad(y)) and not Ball().elementwise(y)
    torch.testing.assert_close(Ball().value(y) + Ball().conjugate(Ball().grad_(y.clone())), (Ball().grad(y) * y).sum())
