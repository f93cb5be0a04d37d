"""diffGrad against the paper's formulas in plain loops, and its invariants."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from assay.bench import Bench
from assay.optim import DiffGrad, diffgrad_friction
from assay.optim._contract import gradients, parameters, same, walk
from assay.optim.diffgrad.claim import claim

DISTRIBUTED = [
    (DiffGrad, {"lr": 0.01, "weight_decay": 0.1}),
    (DiffGrad, {"lr": 0.01, "weight_decay": 0.1, "decoupled": True, "amsgrad": True}),
]
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def by_hand(params, steps, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, wd=0.0, decoupled=False, amsgrad=False):
    """The formula, number by number; gradients come from the same stream as in ``walk``."""
    params = [nn.Parameter(p.detach().clone()) for p in params]
    ms, vs, tops, before = ([torch.zeros_like(p) for p in params] for _ in range(4))
    with torch.no_grad():
        for step in gradients(params, steps):
            t = step + 1
            for i, p in enumerate(params):
                g = p.grad
                if decoupled:
                    p *= 1 - lr * wd
                else:
                    g = g + wd * p
                ms[i] = betas[0] * ms[i] + (1 - betas[0]) * g
                vs[i] = betas[1] * vs[i] + (1 - betas[1]) * g**2
                tops[i] = torch.maximum(tops[i], vs[i])
                xi = 1 / (1 + torch.exp(-(before[i] - g).abs()))
                before[i] = g.clone()
                v = tops[i] if amsgrad else vs[i]
                p -= lr * math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t) * xi * ms[i] / (v.sqrt() + eps)
    return params


@pytest.mark.parametrize("options", [
    {},
    {"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-3},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "decoupled": True},
    {"amsgrad": True, "betas": (0.9, 0.5)},
])  # fmt: skip
def test_trajectory_is_the_formula(options):
    told = {"wd" if name == "weight_decay" else name: value for name, value in options.items()}
    same(walk(DiffGrad, parameters(), steps=10, **options), by_hand(parameters(), 10, **told), **CLOSE)


def constant(make, grads, **options):
    """Steps on one vector with the given gradients; how far each moved it."""
    p = nn.Parameter(torch.zeros(len(grads[0]), dtype=torch.float64))
    optimizer, moves = make([p], **options), []
    for grad in grads:
        before = p.detach().clone()
        p.grad = torch.tensor(grad, dtype=torch.float64)
        optimizer.step()
        moves.append(before - p.detach())
    return moves


def adam_move(grads, t, lr=1e-3, betas=(0.9, 0.999), eps=1e-8):
    g = torch.tensor(grads[:t], dtype=torch.float64)
    ages = torch.arange(t - 1, -1, -1, dtype=torch.float64)[:, None]
    m, v = ((1 - b) * (b**ages * x).sum(0) for b, x in zip(betas, (g, g**2), strict=True))
    return lr * math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t) * m / (v.sqrt() + eps)


def test_a_repeated_gradient_takes_half_a_step_of_adam():
    grads = [[0.3, -2.0, 1e-3]] * 5
    moves = constant(DiffGrad, grads)
    for t in range(2, 6):
        torch.testing.assert_close(moves[t - 1], adam_move(grads, t) / 2, **CLOSE)
    first = torch.tensor(grads[0], dtype=torch.float64)
    torch.testing.assert_close(moves[0], adam_move(grads, 1) * first.abs().sigmoid(), **CLOSE)


def test_a_gradient_that_jumps_takes_a_step_of_adam():
    grads = [[50.0, -60.0], [-1.0, 0.5], [90.0, 70.0]]
    for t, move in enumerate(constant(DiffGrad, grads), start=1):
        torch.testing.assert_close(move, adam_move(grads, t), rtol=1e-12, atol=0)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=2, max_size=8))
def test_the_step_is_between_half_of_adams_and_adams(values):
    grads = [[value] for value in values]
    for t, move in enumerate(constant(DiffGrad, grads), start=1):
        whole = adam_move(grads, t)
        assert move.sign() == whole.sign() or whole.abs() < 1e-15
        assert 0.5 * whole.abs() * (1 - 1e-9) <= move.abs() <= whole.abs() + 1e-15


def test_the_friction_by_itself():
    torch.manual_seed(0)
    g, h = torch.randn(2, 50, dtype=torch.float64)
    xi = diffgrad_friction(g, h)
    expected = [1 / (1 + math.exp(-abs(a - b))) for a, b in zip(g.tolist(), h.tolist(), strict=True)]
    torch.testing.assert_close(xi, torch.tensor(expected, dtype=torch.float64))
    assert (xi >= 0.5).all() and (diffgrad_friction(g, g) == 0.5).all()


def test_the_previous_gradient_is_a_copy():
    """A gradient buffer that is written in place gives the same as fresh ones; the first published code did not."""
    torch.manual_seed(0)
    fresh, reused = (nn.Parameter(torch.ones(5, dtype=torch.float64)) for _ in range(2))
    ones, others = DiffGrad([fresh]), DiffGrad([reused])
    reused.grad = torch.zeros_like(reused)
    for _ in range(5):
        g = torch.randn(5, dtype=torch.float64)
        fresh.grad = g.clone()
        reused.grad.copy_(g)
        ones.step()
        others.step()
    torch.testing.assert_close(fresh, reused, rtol=0, atol=0)
    kept = others.state[reused]["previous_grad"].clone()
    reused.grad.fill_(7)
    assert torch.equal(others.state[reused]["previous_grad"], kept)


def test_it_remembers_the_gradient_with_its_decay():
    p = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = DiffGrad([p], weight_decay=0.5, lr=0.0)
    p.grad = torch.tensor([1.0], dtype=torch.float64)
    optimizer.step()
    assert optimizer.state[p]["previous_grad"].item() == 2.0
    assert p.item() == 2.0


def test_a_missing_gradient_leaves_step_and_memory():
    p, q = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = DiffGrad([p, q])
    p.grad, q.grad = torch.ones(2), torch.ones(2)
    optimizer.step()
    q.grad, before = None, copy.deepcopy(optimizer.state[q])
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in optimizer.state[q].items())
    assert optimizer.state[p]["step"] == 2


def test_a_complex_parameter_is_a_pair_of_real_ones():
    torch.manual_seed(0)
    z = nn.Parameter(torch.randn(3, dtype=torch.complex128))
    x = nn.Parameter(torch.view_as_real(z.detach()).clone())
    ones, others = (DiffGrad([q], lr=0.1, weight_decay=0.1, amsgrad=True) for q in (z, x))
    for _ in range(4):
        z.grad = torch.randn(3, dtype=torch.complex128)
        x.grad = torch.view_as_real(z.grad).clone()
        ones.step()
        others.step()
    torch.testing.assert_close(torch.view_as_real(z.detach()), x.detach(), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("options, message", [
    ({"eps": -1.0}, r"eps = -1\.0 is out of range"),
    ({"weight_decay": -1.0}, r"weight_decay = -1\.0 is out of range"),
    ({"betas": (1.0, 0.9)}, "betas = .* is out of range"),
    ({"capturable": True}, "capturable = True is out of range"),
    ({"fused": True}, "fused = True is out of range"),
])  # fmt: skip
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        DiffGrad([nn.Parameter(torch.ones(2))], **options)


class WithoutFriction(DiffGrad):
    """The broken variant: plain Adam."""

    @staticmethod
    def rule(p, g, m, v, previous, *, lr, t, betas, eps, **_):
        m.lerp_(g, 1 - betas[0])
        v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
        p.sub_(m.div(v.sqrt().add_(eps)).mul_(lr * (1 - betas[1] ** t) ** 0.5 / (1 - betas[0] ** t)))


def test_without_friction_the_claim_fails():
    assert claim(Bench(), method=WithoutFriction, parts=["functions"]).verdict == "does not hold"
    assert {check.verdict for check in claim(Bench(), parts=["functions"]).checks[:4]} == {"holds"}
