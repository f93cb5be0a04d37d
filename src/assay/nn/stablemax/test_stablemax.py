"""StableMax against the paper's formula, torch's cross-entropy in its bookkeeping, and broken variants of its claim."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from assay.bench.evidence import FAILS, HOLDS, Bench
from assay.losses import stablemax_cross_entropy
from assay.losses._contract import CHECKS as LOSS_CHECKS
from assay.losses._contract import Example as LossExample
from assay.nn import LogStableMax, StableMax, swap
from assay.nn._contract import Example
from assay.nn.functional import log_stablemax, stablemax
from assay.nn.stablemax.claim import LONG, claim, figure

EXAMPLES = [
    Example(partial(StableMax), (4, 5), nn.Softmax(-1), stateless=True),
    Example(partial(StableMax, dim=1), (3, 4, 2), nn.Softmax(1), stateless=True),
    Example(partial(LogStableMax), (4, 3, 5), nn.LogSoftmax(-1), stateless=True),
]
exactly = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)


def ramp(x: float) -> float:
    return x + 1 if x >= 0 else 1 / (1 - x)


def oracle(logits: list[float]) -> list[float]:
    return [ramp(x) / sum(map(ramp, logits)) for x in logits]


def loss_oracle(input: Tensor, target: Tensor, **options: Any) -> list[float]:
    """The loss of each example by its formula, for a mean that does not weight the examples."""
    smoothing = options.get("label_smoothing", 0.0)
    losses = []
    for logits, said in zip(input.tolist(), target.tolist(), strict=True):
        if said == options.get("ignore_index", -100):
            losses.append(0.0)
            continue
        q = said if isinstance(said, list) else [float(k == said) for k in range(len(logits))]
        q = [(1 - smoothing) * share + smoothing / len(logits) for share in q]
        losses.append(-sum(share * math.log(p) for share, p in zip(q, oracle(logits), strict=True)))
    return losses


def classes() -> tuple[Tensor, Tensor]:
    return 3 * torch.randn(5, 4), torch.tensor([2, 0, 1, 3, 1])


def probabilities() -> tuple[Tensor, Tensor]:
    return 3 * torch.randn(5, 4), torch.rand(5, 4).softmax(1)


def first_ignored(target: Tensor) -> Tensor:
    return torch.cat([target.new_full((1,), -100), target[1:]])


LOSSES = [
    LossExample(stablemax_cross_entropy, classes, loss_oracle, ignored=first_ignored),
    LossExample(stablemax_cross_entropy, classes, loss_oracle, {"label_smoothing": 0.3}, ignored=first_ignored),
    LossExample(stablemax_cross_entropy, probabilities, loss_oracle, {"dtype": None}),
]


# In half precision the loss is float32: see test_dtypes_of_the_loss.
@pytest.mark.parametrize("check", [c for c in LOSS_CHECKS if c.__name__ != "keeps_dtype"], ids=lambda c: c.__name__)
@pytest.mark.parametrize("example", LOSSES, ids=str)
def test_the_loss_keeps_the_contract_of_its_family(example, check):
    check(example)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=6))
def test_the_papers_formula(logits):
    x = torch.tensor(logits, dtype=torch.float64)
    p = stablemax(x)
    exactly(p, torch.tensor(oracle(logits), dtype=torch.float64))
    exactly(log_stablemax(x).exp(), p)
    exactly(p, F.softmax(x.sign() * x.abs().log1p(), -1))
    assert p.gt(0).all() and p.sum().item() == pytest.approx(1, abs=1e-12) and p[x.argmax()] == p.max()


@given(st.floats(-1e8, 1e8))
def test_the_ramp_of_an_opposite_is_its_inverse(x):
    odds = [p[0] / p[1] for p in (stablemax(torch.tensor([z, 0.0], dtype=torch.float64)) for z in (x, -x))]
    assert (odds[0] * odds[1]).item() == pytest.approx(1, rel=1e-12)


def test_equal_logits_share_and_zero_has_a_meaning():
    exactly(stablemax(torch.full((2, 5), -3.0)), torch.full((2, 5), 0.2))
    x = torch.tensor([1.0, 2.0])
    assert (stablemax(x + 5) - stablemax(x)).abs().max() > 0.01
    assert (stablemax(5 * x) - stablemax(x)).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_those_of_the_formula_also_at_zero_and_one(dtype):
    z = torch.tensor([[0.0, 1.0, -1.0, 1e30], [-0.0, 0.0, 0.0, 0.0], [2.0, -1e30, 1.0, 0.5]], dtype=dtype)
    y = torch.tensor([0, 1, 2])
    leaf = z.clone().requires_grad_()
    stablemax_cross_entropy(leaf, y, reduction="sum").backward()
    expected = (stablemax(z, dtype=torch.float64) - F.one_hot(y, 4)) / (1 + z.double().abs())
    torch.testing.assert_close(leaf.grad, expected.to(dtype), rtol=1e-6 if dtype == torch.float32 else 1e-12, atol=0)
    assert leaf.grad[1].ne(0).all()


def test_a_very_sure_answer_still_learns_where_softmax_has_stopped():
    z, y = torch.tensor([[1e4, -1e4, -1e4]]), torch.tensor([0])
    outcomes = []
    for loss in (F.cross_entropy, stablemax_cross_entropy):
        leaf = z.clone().requires_grad_()
        value = loss(leaf, y)
        value.backward()
        outcomes.append((value.item(), leaf.grad))
    assert outcomes[0][0] == 0 and not outcomes[0][1].any()
    assert outcomes[1][0] > 0 and outcomes[1][1].ne(0).all()


@pytest.mark.parametrize("shape", [(4,), (6, 4), (6, 4, 2, 3), (0, 4)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_classes_are_counted_as_torch_counts_them(shape, weighted, reduction):
    dim = 0 if len(shape) == 1 else 1
    z = 3 * torch.randn(shape, dtype=torch.float64)
    y = torch.randint(4, shape[:dim] + shape[dim + 1 :])
    if y.dim() and len(y):
        y[0] = 7
    weight = torch.rand(4) if weighted else None
    ours = stablemax_cross_entropy(z, y, weight, ignore_index=7, reduction=reduction)
    log = log_stablemax(z, dim)
    double = weight.double() if weighted else None
    exactly(ours, F.nll_loss(log, y, double, ignore_index=7, reduction=reduction), equal_nan=True)
    for smoothing in (0.0, 0.2):
        ours = stablemax_cross_entropy(z, y, weight, 7, reduction, smoothing)
        theirs = F.cross_entropy(log, y, double, ignore_index=7, reduction=reduction, label_smoothing=smoothing)
        exactly(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_probabilities_are_counted_as_torch_counts_them(reduction):
    z, weight = torch.randn(3, 4, 2, dtype=torch.float64), torch.rand(4)
    q = torch.rand(3, 4, 2).softmax(1)
    ours = stablemax_cross_entropy(z, q, weight, reduction=reduction, label_smoothing=0.1)
    log = log_stablemax(z, 1)
    exactly(ours, F.cross_entropy(log, q.double(), weight.double(), reduction=reduction, label_smoothing=0.1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_masked_logits_have_no_part(dtype):
    z = torch.tensor([[1.0, -torch.inf, -2.0]], dtype=dtype, requires_grad=True)
    p = stablemax(z)
    assert p[0, 1] == 0 and log_stablemax(z)[0, 1] == -torch.inf
    torch.testing.assert_close(p[:, ::2], stablemax(z[:, ::2]))
    assert torch.autograd.grad(p[0, 0], z)[0][0, 1] == 0
    for target in (torch.tensor([2]), torch.tensor([[0.25, 0.0, 0.75]])):
        loss = stablemax_cross_entropy(z, target)
        alone = stablemax_cross_entropy(z[:, ::2], target // 2 if target.dim() == 1 else target[:, ::2])
        torch.testing.assert_close(loss, alone)
        grad = torch.autograd.grad(loss, z)[0]
        assert grad.isfinite().all() and grad[0, 1] == 0
    assert stablemax_cross_entropy(z, torch.tensor([1])) == torch.inf


def test_dtypes_of_the_loss():
    z, y = torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 4
    exact = stablemax_cross_entropy(z, y)
    for dtype, close in [(torch.float16, 1e-2), (torch.bfloat16, 3e-2), (torch.float32, 1e-6), (torch.float64, 1e-6)]:
        for computed in (None, torch.float32, torch.float64):
            loss = stablemax_cross_entropy(z.to(dtype), y, dtype=computed)
            wide = dtype == torch.float64 and computed != torch.float32
            assert loss.dtype == (torch.float64 if wide else torch.float32)
            torch.testing.assert_close(loss.double(), exact, rtol=close, atol=close)
        assert stablemax(z.to(dtype)).dtype == dtype == log_stablemax(z, dtype=dtype).dtype
    assert stablemax(torch.tensor([0, 1]), dtype=torch.float32).tolist() == pytest.approx([1 / 3, 2 / 3])
    # In half precision 1 + 4096 would be 4096.
    assert log_stablemax(torch.tensor([4096.0, 0.0]).half())[1].item() == pytest.approx(-math.log(4098), rel=1e-3)


def test_gradients_per_example_with_torch_func():
    z, y = classes()
    each = torch.func.vmap(torch.func.grad(stablemax_cross_entropy))(z, y)
    leaf = z.clone().requires_grad_()
    stablemax_cross_entropy(leaf, y, reduction="sum").backward()
    torch.testing.assert_close(each, leaf.grad)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.softmax = nn.Linear(8, 24), nn.Softmax(dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return self.softmax((q @ k.mT).masked_fill(later, -torch.inf)) @ v


def test_it_stands_in_causal_attention():
    model, x = swap(Attention(), nn.Softmax, StableMax), torch.randn(2, 5, 8)
    assert isinstance(model.softmax, StableMax) and model.softmax.dim == -1
    changed = torch.cat([x[:, :3], torch.randn(2, 2, 8)], 1)
    torch.testing.assert_close(model(x)[:, :3], model(changed)[:, :3])
    model(x).square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def test_arguments_out_of_range_are_named():
    z, y = torch.zeros(2, 3), torch.tensor([0, 1])
    for name, value in [("reduction", "average"), ("label_smoothing", 1.5), ("dtype", torch.float16)]:
        with pytest.raises(ValueError, match=f"{name} = {value!r} is out of range"):
            stablemax_cross_entropy(z, y, **{name: value})
    for name, arguments in [
        ("input", (torch.tensor(0.0), y)),
        ("target", (z, torch.tensor([0]))),
        ("target", (z, torch.rand(2, 2))),
        ("weight", (z, y, torch.ones(2))),
    ]:
        with pytest.raises(ValueError, match=rf"{name}\.shape = \(.*\) is out of range"):
            stablemax_cross_entropy(*arguments)
    with pytest.raises(ValueError, match="dim = None is out of range: an integer"):
        StableMax(None)
    for call in (stablemax, log_stablemax, partial(stablemax_cross_entropy, target=y, dtype=None)):
        with pytest.raises(ValueError, match=r"dtype = torch\.int64 is out of range"):
            call(z.long())


def softmax_by_another_name(input: Tensor, target: Tensor, **options: Any) -> Tensor:
    """The broken variant of the card."""
    return F.cross_entropy(input, target, reduction=options.get("reduction", "mean"))


def derivative_zero_at_zero(input: Tensor, target: Tensor, **options: Any) -> Tensor:
    """The other broken variant of the card: sign(x) log(1 + |x|) left to automatic differentiation."""
    return F.cross_entropy(input.sign() * input.abs().log1p(), target, reduction=options.get("reduction", "mean"))


def test_the_claim_does_not_hold_for_broken_variants():
    verdicts = {}
    for method in (stablemax_cross_entropy, softmax_by_another_name, derivative_zero_at_zero):
        evidence = claim(Bench(quick=True), method=method)
        verdicts[method] = [check.verdict for check in evidence.checks[1:]]
        assert figure(evidence) is not None
    assert verdicts == {
        stablemax_cross_entropy: [HOLDS, HOLDS],
        softmax_by_another_name: [FAILS, HOLDS],
        derivative_zero_at_zero: [HOLDS, FAILS],
    }


def test_the_long_run_asks_for_the_unseen_pairs(monkeypatch):
    monkeypatch.setattr(Bench, "scale", lambda bench, count, least=1: 2)
    evidence = claim(Bench(quick=True), parts=[LONG])
    assert [check.verdict for check in evidence.checks] == [FAILS, HOLDS]  # two epochs teach neither
