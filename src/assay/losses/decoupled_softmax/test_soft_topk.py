from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.losses import log_soft_topk, soft_topk

CLOSE = {"rtol": 1e-8, "atol": 1e-8}


def row_by_row(x, k, alpha, n_iter):
    """y, log y and the two Jacobians, literally: bisection and the implicit function theorem in plain numbers."""
    values, logs, slopes, log_slopes = [], [], [], []
    for row, places in zip(x.tolist(), k if isinstance(k, list) else [k] * len(x), strict=True):
        lo, hi = -max(row) - 10 / alpha, -min(row) + 10 / alpha
        for _ in range(n_iter):
            mid = (lo + hi) / 2
            if sum(1 / (1 + math.exp(-alpha * (value + mid))) for value in row) < places:
                lo = mid
            else:
                hi = mid
        z = [alpha * (value + (lo + hi) / 2) for value in row]
        y = [1 / (1 + math.exp(-value)) for value in z]
        v = [alpha * p * (1 - p) for p in y]
        n = range(len(row))
        values.append(y)
        logs.append([value - math.log1p(math.exp(value)) for value in z])
        slopes.append([[v[c] * (c == j) - v[c] * v[j] / sum(v) for j in n] for c in n])
        log_slopes.append([[alpha * (1 - y[c]) * ((c == j) - v[j] / sum(v)) for j in n] for c in n])
    return [torch.tensor(numbers, dtype=torch.float64) for numbers in (values, logs, slopes, log_slopes)]


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.integers(1, 6), st.floats(0.1, 2))
def test_values_and_gradients_are_those_of_the_formula(seed, k, alpha):
    torch.manual_seed(seed)
    x = 2 * torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    g = torch.randn(3, 7, dtype=torch.float64)
    values, logs, slopes, log_slopes = row_by_row(x, k, alpha, 64)
    for found, expected, slope in (
        (soft_topk(x, k, alpha), values, slopes),
        (log_soft_topk(x, k, alpha), logs, log_slopes),
    ):
        torch.testing.assert_close(found, expected, **CLOSE)
        (vjp,) = torch.autograd.grad(found, x, g)
        torch.testing.assert_close(vjp, torch.einsum("nc,ncj->nj", g, slope), **CLOSE)
        torch.testing.assert_close(vjp.sum(1), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-9)


def test_few_halvings_stop_where_the_formula_does():
    x = torch.randn(4, 9, dtype=torch.float64)
    for n_iter in (1, 5, 32):
        expected = row_by_row(x, 3, 1.5, n_iter)[0]
        torch.testing.assert_close(soft_topk(x, 3, 1.5, n_iter), expected, rtol=1e-12, atol=1e-12)


def test_finite_differences_of_first_and_second_order():
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    for operator in (soft_topk, log_soft_topk):
        for k in (2, torch.tensor([1, 4])):
            assert torch.autograd.gradcheck(lambda x, f=operator, k=k: f(x, k, 1.3), x)
            assert torch.autograd.gradgradcheck(lambda x, f=operator, k=k: f(x, k, 1.3), x)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.integers(1, 99), st.floats(0.05, 20))
def test_rows_sum_to_k_and_keep_the_order(seed, k, alpha):
    torch.manual_seed(seed)
    x = 3 * torch.randn(2, 100, dtype=torch.float64)
    for n_iter, close in ((32, 1e-6), (64, 1e-10)):
        y = soft_topk(x, k, alpha, n_iter)
        torch.testing.assert_close(y.sum(1), torch.full((2,), float(k), dtype=torch.float64), rtol=0, atol=close)
    order = x.argsort(1)
    assert (y.gather(1, order).diff(dim=1) >= 0).all()
    torch.testing.assert_close(soft_topk(x + 30 * torch.randn(2, 1, dtype=torch.float64), k, alpha), y)
    torch.testing.assert_close(log_soft_topk(x, k, alpha).exp(), y)


def test_the_limits_of_alpha():
    x = torch.stack([torch.randperm(8) for _ in range(5)]).double()
    for k in range(1, 8):
        hard = (x.argsort(1, descending=True).argsort(1) < k).double()
        torch.testing.assert_close(soft_topk(x, k, 1e3), hard, rtol=0, atol=1e-12)
        torch.testing.assert_close(soft_topk(x, k, 1e-7), torch.full_like(x, k / 8), rtol=0, atol=1e-6)


def test_a_number_for_each_row_is_a_loop_over_rows():
    x, k = torch.randn(4, 6, dtype=torch.float64), torch.tensor([1, 5, 2, 3])
    each = torch.cat([soft_topk(x[i : i + 1], int(k[i])) for i in range(4)])
    torch.testing.assert_close(soft_topk(x, k), each, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(soft_topk(x, k.int()), each, rtol=1e-12, atol=1e-12)


def test_entries_of_minus_infinity_take_no_part():
    x = torch.randn(3, 6, dtype=torch.float64)
    masked = x.clone()
    masked[:, 1] = masked[:, 4] = -math.inf
    masked.requires_grad_()
    kept = [0, 2, 3, 5]
    for operator, nothing in ((soft_topk, 0.0), (log_soft_topk, -math.inf)):
        y = operator(masked, 2)
        torch.testing.assert_close(y[:, kept], operator(x[:, kept], 2))
        assert (y[:, [1, 4]] == nothing).all()
        (slope,) = torch.autograd.grad(y[:, kept].pow(2).sum(), masked)
        assert slope.isfinite().all() and not slope[:, [1, 4]].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_saturated_rows_keep_finite_gradients(dtype):
    """Where every y is 0 or 1 the formula is 0 / 0; what is left are the entries at the threshold."""
    x = torch.tensor([[3e4, 2e4, -1e4, -2e4], [1e4, 1e4, 1e4, 1e4]], dtype=dtype, requires_grad=True)
    for operator in (soft_topk, log_soft_topk):
        y = operator(x, 2)
        assert y.dtype == dtype
        (slope,) = torch.autograd.grad(y[:, 2].sum(), x)
        assert slope.isfinite().all()
        assert abs(slope.double().sum(1)).max() < 1e-2
    torch.testing.assert_close(soft_topk(x, 2).float()[1], torch.full((4,), 0.5), rtol=0, atol=1e-2)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0,), r"k = 0 is out of range: an integer in \[1, 5\]"),
        ((6,), r"k = 6 is out of range: an integer in \[1, 5\]"),
        ((True,), "k = True is out of range"),
        (("num_pos",), "k = 'num_pos' is out of range: an integer, or one a row"),
        ((torch.tensor([1, 2, 6]),), "k = 6 is out of range"),
        ((torch.tensor([1.0, 2.0, 3.0]),), "k = torch.float32 of shape"),
        ((2, 0.0), "alpha = 0.0 is out of range: above 0"),
        ((2, math.inf), "alpha = inf is out of range: above 0"),
        ((2, 1.0, 0), "n_iter = 0 is out of range"),
    ],
)
def test_arguments_out_of_range_are_named(arguments, message):
    for operator in (soft_topk, log_soft_topk):
        with pytest.raises(ValueError, match=message):
            operator(torch.zeros(3, 6), *arguments)
        for x in (torch.zeros(6), torch.zeros(3, 6, dtype=torch.int64)):
            with pytest.raises(ValueError, match=r"x = torch\.\w+ of shape .* is out of range"):
                operator(x, 2)
