"""Compressors against brute force: sizes on the wire, errors, and what comes back."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.optim.compress import Identity, LogQuantizer, ScaledSign, TopK, UniformQuantizer
from assay.optim.efficient_adam.compressors import pack_bits, unpack_bits

ALL = [
    Identity(),
    ScaledSign(),
    *(Q(bits) for Q in (LogQuantizer, UniformQuantizer) for bits in (2, 3, 5, 8)),
    TopK(0.3),
]
VECTORS = st.lists(st.floats(-100, 100, width=32).filter(lambda x: x == 0 or abs(x) > 1e-6), min_size=1, max_size=40)


def through(Q, x):
    return Q.decompress(Q.compress(x))


@pytest.mark.parametrize("Q", ALL, ids=str)
@pytest.mark.parametrize("shape", [(1,), (8,), (17,), (3, 5, 7), (), (0, 4), (1000,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bytes_and_what_comes_back(Q, shape, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    payload = Q.compress(x)
    assert payload.data.dtype == torch.uint8 and payload.data.dim() == 1
    assert Q.bits(payload) == 8 * len(payload.data) == 8 * Q.nbytes(x.numel(), dtype)
    once = Q.decompress(payload)
    assert once.shape == x.shape and once.dtype == dtype
    torch.testing.assert_close(through(Q, once), once, rtol=0, atol=0)
    sent = Q.decompress(payload._replace(data=torch.cat([torch.zeros(3, dtype=torch.uint8), payload.data])[3:]))
    torch.testing.assert_close(sent, once, rtol=0, atol=0)


def test_sizes_are_the_ones_promised():
    for n in (1, 7, 8, 9, 1000):
        x = torch.randn(n)
        assert len(ScaledSign().compress(x).data) == math.ceil(n / 8) + 4
        assert len(LogQuantizer(3).compress(x).data) == math.ceil(3 * n / 8) + 4
        assert len(UniformQuantizer(5).compress(x).data) == math.ceil(5 * n / 8) + 4
    assert len(TopK(0.01).compress(torch.randn(1000)).data) == 10 * 4 + math.ceil(10 * 10 / 8)


@pytest.mark.parametrize("width", [1, 2, 3, 7, 8, 20])
def test_packing_is_undone(width):
    codes = torch.randint(2**width, (101,), generator=torch.Generator().manual_seed(0))
    data = pack_bits(codes, width)
    assert len(data) == math.ceil(101 * width / 8)
    assert unpack_bits(data, width, 101).tolist() == codes.tolist()


@settings(max_examples=100, deadline=None)
@given(VECTORS)
def test_errors_are_contractions(values):
    x = torch.tensor(values, dtype=torch.float64)
    for Q in ALL:
        lost, all_of_it = (x - through(Q, x)).square().sum(), x.square().sum()
        assert lost <= (1 - Q.contraction(len(x))) * all_of_it * (1 + 1e-6) + 1e-12, Q
        assert 0 <= Q.delta <= Q.contraction(len(x)) <= 1


@pytest.mark.parametrize("Q", [LogQuantizer(3), UniformQuantizer(3), TopK(0.25), ScaledSign()], ids=str)
def test_contractions_are_as_large_as_they_may_be(Q):
    n = 40
    worst = {
        "LogQuantizer(3)": torch.tensor([1.0] + [1 / 8 - 1e-9] * (n - 1), dtype=torch.float64),
        "UniformQuantizer(3)": torch.tensor([1.0] + [1 / 6 - 1e-9] * (n - 1), dtype=torch.float64),
        "TopK(ratio=0.25)": torch.ones(n),
        "ScaledSign()": torch.tensor([1.0] + [1e-9] * (n - 1)),
    }[str(Q)].double()
    left = 1 - (worst - through(Q, worst)).square().sum() / worst.square().sum()
    assert left.item() == pytest.approx(Q.contraction(n), abs=1e-5)


@settings(max_examples=50, deadline=None)
@given(VECTORS.filter(lambda values: 0 not in values))
def test_the_error_of_signs_is_known(values):
    x = torch.tensor(values, dtype=torch.float64)
    expected = x.square().sum() - x.abs().sum() ** 2 / len(x)
    torch.testing.assert_close((x - through(ScaledSign(), x)).square().sum(), expected, rtol=1e-5, atol=1e-4)


def test_zero_has_a_sign_and_only_a_sign():
    assert through(ScaledSign(), torch.tensor([0.0, -0.0, -4.0, 2.0])).tolist() == [1.5, 1.5, -1.5, 1.5]
    for Q in ALL:
        assert not through(Q, torch.zeros(5)).any()


@settings(max_examples=50, deadline=None)
@given(VECTORS, st.sampled_from([2, 3, 4]))
def test_levels_are_the_nearest(values, bits):
    x = torch.tensor(values, dtype=torch.float64)
    s, L = x.abs().max(), 2 ** (bits - 1) - 1
    powers = torch.tensor([2.0**-j for j in range(L)], dtype=torch.float64)
    for Q, levels in ((LogQuantizer(bits), powers), (UniformQuantizer(bits), torch.arange(1, L + 1).double() / L)):
        levels = s * torch.cat([-levels, torch.zeros(1), levels])
        found, best = (x - through(Q, x)).abs(), (x[:, None] - levels).abs().min(1).values
        torch.testing.assert_close(found, best, rtol=1e-6, atol=1e-5)
    above = x.abs() >= s * powers[-1] / 2 * (1 + 1e-6)
    assert ((x - through(LogQuantizer(bits), x)).abs() <= x.abs() / 3 * (1 + 1e-5))[
        above & (x.abs() >= s * powers[-1])
    ].all()


def test_ties_go_away_from_zero():
    x = torch.tensor([8.0, 6.0, -6.0, 3.0, 1.0, -1.0])
    assert through(LogQuantizer(3), x).tolist() == [8, 8, -8, 4, 2, -2]


def test_topk_keeps_the_largest_as_they_are():
    x = torch.randn(50, dtype=torch.float64)
    y = through(TopK(0.1), x)
    assert (y != 0).sum() == 5 and set(y[y != 0].tolist()) == set(x[x.abs().argsort()[-5:]].tolist())


@pytest.mark.parametrize("make, message", [
    (lambda: LogQuantizer(1), "bits = 1 is out of range"),
    (lambda: UniformQuantizer(9), "bits = 9 is out of range"),
    (lambda: TopK(0.0), r"ratio = 0\.0 is out of range"),
])  # fmt: skip
def test_what_is_out_of_range_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
