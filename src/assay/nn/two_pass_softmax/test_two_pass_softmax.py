"""Two-pass softmax against float64, torch's softmax in its bookkeeping, and broken variants of its claim."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from assay.bench.evidence import FAILS, HOLDS, OPEN, Bench
from assay.nn._contract import Example
from assay.nn.two_pass_softmax.claim import RANGE, SUM, TIME, claim, figure
from assay.nn.two_pass_softmax.two_pass_softmax import (
    LONG,
    TwoPassSoftmax,
    extexp,
    extexp_logsumexp,
    extexp_sum,
    softmax_backend_report,
    three_pass_softmax,
    two_pass_softmax,
)

two_pass = partial(two_pass_softmax, backend="reference")


def by_the_reference(layer: nn.Module, x: Tensor) -> Tensor:
    return two_pass(x, layer.dim, chunk_size=2)


EXAMPLES = [
    Example(partial(TwoPassSoftmax), (3, 2, 5), nn.Softmax(-1), stateless=True),
    Example(partial(TwoPassSoftmax, dim=1), (3, 5, 2), nn.Softmax(1), by_the_reference, stateless=True),
]
ROUTES = [
    two_pass,
    partial(two_pass, chunk_size=3),
    three_pass_softmax,
    partial(three_pass_softmax, variant="reload"),
]
INPUTS = {
    "N(0, 9)": lambda n: 3 * torch.randn(n),
    "uniform": lambda n: 2000 * torch.rand(n) - 1000,
    "constant": lambda n: torch.full((n,), 3e4),
    "N(-5e4, 1)": lambda n: torch.randn(n) - 5e4,
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def worst(y: Tensor, x: Tensor) -> float:
    """Largest relative error to the softmax in float64, where that is above 1e-30."""
    exact = x.double().softmax(-1)
    return ((y - exact).abs() / exact)[exact > 1e-30].max().item()


@pytest.mark.parametrize("n", [1, 7, 64, 1500, 2**20])
@pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS)
def test_is_softmax_to_the_last_bits(make, n):
    x = make(n)
    assert worst(two_pass(x), x) <= 5e-7


def test_a_long_row_sums_to_one():
    x = 3 * torch.randn(2**22)
    y = two_pass_softmax(x)
    assert abs(y.double().sum().item() - 1) <= 1e-7
    assert worst(y, x) <= 5e-7


def test_the_backend_auto_leaves_short_rows_and_float64_to_torch():
    for x in (3 * torch.randn(2, LONG - 1), torch.randn(1, LONG, dtype=torch.float64)):
        torch.testing.assert_close(two_pass_softmax(x), x.softmax(-1), rtol=0, atol=0)
    x = torch.randn(LONG)
    torch.testing.assert_close(two_pass_softmax(x), two_pass(x), rtol=0, atol=0)


@given(st.floats(-1e7, 1e7, width=32))
def test_the_pair_is_the_exponential(x):
    for dtype, close in ((torch.float32, 2e-7), (torch.float64, 1e-9)):
        m, n = (value.item() for value in extexp(torch.tensor(x, dtype=dtype)))
        assert 0.70 <= m <= 1.42 and n == int(n)
        exact = torch.tensor(x, dtype=torch.float64).item()
        # log m + n ln 2 = x, with ln 2 in two parts as the product with n would be rounded.
        rest = (exact - n * float.fromhex("0x1.62e42feep-1")) - n * float.fromhex("0x1.a39ef35793c76p-33")
        assert m == pytest.approx(math.exp(rest), rel=close)


def test_exponents_beyond_the_range_of_floats():
    m, n = extexp(torch.tensor([1000.0, -1000.0, 3.4e38, -3.4e38]))
    assert n[:2].tolist() == [1443, -1443] and n.isfinite().all() and ((m >= 0.7) & (m <= 1.42)).all()
    m, n = extexp(torch.tensor([-torch.inf, torch.inf, torch.nan]))
    assert m[:2].tolist() == [0, 1] and n[:2].tolist() == [-torch.inf, torch.inf] and (m[2] != m[2])
    wide = torch.tensor([1e308, -1.7e308], dtype=torch.float64)
    assert all(part.isfinite().all() for part in extexp(wide))


@given(st.integers(1, 70), st.integers(1, 80), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_the_sum_is_that_of_any_split_and_any_order(n, chunk_size, seed):
    x = 300 * torch.randn(3, n, generator=torch.Generator().manual_seed(seed))
    m, exponent = extexp_sum(x, -1, chunk_size)
    for other in (x, x.flip(-1)):
        m_whole, exponent_whole = extexp_sum(other, -1, n)
        assert torch.equal(exponent, exponent_whole)
        torch.testing.assert_close(m, m_whole, rtol=1e-6, atol=0)
    exact = x.double().logsumexp(-1)
    torch.testing.assert_close(extexp_logsumexp(x).double(), exact, rtol=2e-7, atol=2e-7)


def test_sums_of_nothing_of_masked_entries_and_over_another_dimension():
    for x in (torch.empty(2, 0), torch.full((2, 3), -torch.inf)):
        m, n = extexp_sum(x)
        assert m.tolist() == [0, 0] and n.tolist() == [-torch.inf] * 2
        assert extexp_logsumexp(x).tolist() == [-torch.inf] * 2
    assert extexp_sum(torch.zeros(4, 3, dtype=torch.bfloat16), 0)[0].tolist() == [4, 4, 4]
    assert extexp_sum(torch.tensor(0.0))[0].item() == 1
    x = torch.randn(4, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(torch.autograd.grad(extexp_logsumexp(x), x)[0], x.softmax(0))


@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_no_maximum_is_needed_to_be_free_of_a_shift(shift):
    x = torch.randint(-40, 40, (3, 500)) / 8  # adding the shift is exact
    torch.testing.assert_close(two_pass(x + shift), two_pass(x), rtol=3e-7, atol=0)


class Maxima(TorchDispatchMode):
    """Remembers, for every maximum taken, whether it was one of numbers that all stand in ``x``."""

    def __init__(self, x: Tensor):
        super().__init__()
        self.x, self.found = x, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "max" in function.__name__ and torch.is_tensor(args[0]):
            self.found.append(torch.isin(args[0].float(), self.x).all().item())
        return function(*args, **(kwargs or {}))


def test_takes_the_maximum_of_exponents_alone():
    x = 2e4 * torch.rand(1000) - 1e4
    for function, found in ((partial(two_pass, chunk_size=100), False), (three_pass_softmax, True)):
        with Maxima(x) as maxima:
            y = function(x)
        assert maxima.found and any(maxima.found) is found
        assert y.isfinite().all()


@pytest.mark.parametrize("route", ROUTES)
def test_agrees_with_torch_in_everything_around(route):
    x = 3 * torch.randn(5, 4, 6)
    for dim in (0, 1, -1):
        for given_ in (x, x.transpose(0, 2), x[::2], x[:0], x[:, :0], x[..., :0], x.double(), x.bfloat16(), x.half()):
            y, wanted = route(given_, dim), given_.softmax(dim)
            assert y.is_contiguous()
            close = {} if y.dtype in (torch.float32, torch.float64) else {"rtol": 1e-2, "atol": 1e-4}
            torch.testing.assert_close(y, wanted, **close)
    assert route(torch.tensor(3.0), 0).item() == route(torch.tensor(3.0), -1).item() == 1
    masked = torch.tensor([[0.0, -torch.inf, 0.0, 0.0], [-torch.inf] * 4, [torch.inf, 0, 0, 0], [torch.nan, 0, 0, 0]])
    torch.testing.assert_close(route(masked), masked.softmax(-1), equal_nan=True)
    assert route(masked)[0, 1].item() == 0


def test_dtype_and_out_are_as_in_torch():
    x, out = torch.randn(3, 5), torch.empty(3, 5, dtype=torch.float64)
    for backend in ("auto", "reference"):
        assert two_pass_softmax(x, 0, torch.float64, backend=backend, out=out) is out
        torch.testing.assert_close(out, x.softmax(0, torch.float64))
    whole = torch.arange(3)
    torch.testing.assert_close(two_pass(whole, dtype=torch.float32), whole.softmax(-1, torch.float32))
    view = torch.empty(5, 3).T
    torch.testing.assert_close(two_pass(x, out=view), x.softmax(-1))


@pytest.mark.parametrize("route", ROUTES)
def test_has_torchs_gradient(route):
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(route, (x,))
    torch.autograd.gradgradcheck(route, (x,))
    weight = torch.randn(4, 7, dtype=torch.float64)
    mine, torchs = (torch.autograd.grad((y * weight).sum(), x)[0] for y in (route(x, 0), x.softmax(0)))
    torch.testing.assert_close(mine, torchs, rtol=0, atol=1e-12)
    per_row = torch.func.vmap(torch.func.grad(lambda row: route(row).square().sum()))(x.detach())
    whole = torch.autograd.grad(x.softmax(-1).square().sum(), x)[0]
    torch.testing.assert_close(per_row, whole, rtol=0, atol=1e-12)


def test_compiles_and_reports_every_backend():
    rows = {row["backend"]: row for row in softmax_backend_report(50, repeats=2)}
    assert rows["reference"]["error"] <= 5e-7 and rows["compile"]["error"] <= 5e-7
    assert rows["torch"]["milliseconds"] > 0 and rows["cpp"]["milliseconds"] is rows["triton"]["error"] is None
    x, weight = torch.randn(50, requires_grad=True), torch.randn(50)
    compiled = two_pass_softmax(x, backend="compile")
    mine, torchs = (torch.autograd.grad((y * weight).sum(), x)[0] for y in (compiled, x.softmax(-1)))
    torch.testing.assert_close(mine, torchs)


def test_refuses_what_makes_no_sense():
    x = torch.randn(2, 3)
    for bad in (
        {"dim": 2},
        {"dim": None},
        {"backend": "fast"},
        {"chunk_size": 0},
        {"dtype": torch.int64},
        {"out": torch.empty(3)},
        {"out": torch.empty(2, 3, dtype=torch.float64)},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} = .* is out of range"):
            two_pass_softmax(x, **bad)
    with pytest.raises(ValueError, match=r"dtype = torch\.int64 is out of range"):
        two_pass_softmax(x.long())
    with pytest.raises(ValueError, match=r"x\.dtype"):
        extexp(x.long())
    with pytest.raises(ValueError, match="variant = 'online' is out of range"):
        three_pass_softmax(x, -1, "online")
    with pytest.raises(ValueError, match="repeats = 0"):
        softmax_backend_report(3, 0)
    for backend in ("cpp", "triton"):
        with pytest.raises(RuntimeError, match="not part of this installation"):
            two_pass_softmax(x, backend=backend)
    with pytest.raises(RuntimeError, match="has no gradient"):
        two_pass_softmax(x.requires_grad_(), out=torch.empty(2, 3))


def plain_sum(x: Tensor) -> Tensor:
    """A broken variant of the card: no maximum, and no extended range either."""
    return x.exp() / x.exp().sum()


def running_sum(x: Tensor) -> Tensor:
    """A broken variant of the card: pairs, but added one after the other in float32, by 8 accumulators."""
    _, exponent = extexp_sum(x)
    mantissas, exponents = extexp(x)
    summands = mantissas * (exponents - exponent).exp2()
    return summands / summands.view(-1, 8).numpy().cumsum(0)[-1].sum()  # NumPy adds in float32, torch does not


SHORT = {"sizes": (2**12, 2**20), "parts": ("accuracy",)}


@pytest.mark.parametrize(("broken", "name"), [(plain_sum, RANGE), (running_sum, SUM)])
def test_the_claim_does_not_hold_for_a_broken_variant(broken, name):
    evidence = claim(Bench(), method=broken, seeds=2, **SHORT)
    assert {check.name: check.verdict for check in evidence.checks}[name] == FAILS


def test_the_claim_holds_in_accuracy_and_cannot_tell_of_speed():
    evidence = claim(Bench(), seeds=2, **SHORT)
    verdicts = {check.name: check.verdict for check in evidence.checks}
    assert verdicts[SUM] == verdicts[RANGE] == HOLDS and verdicts[TIME] == OPEN
    assert evidence.verdict == OPEN and figure(evidence) is not None
