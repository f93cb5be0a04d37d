"""The line search by hand, its two ways to be asked, and as one of torch's optimizers."""

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from assay.optim import ArmijoGD
from assay.optim.sso.armijo import FLOOR

SCALES = torch.tensor([1.0, 7.0, 0.3], dtype=torch.float64)


def f(w):
    return (SCALES * w).square().sum() + w.sin().sum()


def standard(optimizer, w, calls=None):
    def closure():
        optimizer.zero_grad()
        loss = f(w)
        loss.backward()
        if calls is not None:
            calls.append(True)
        return loss

    return closure


def cheap(optimizer, w, calls):
    def closure(backward=True):
        calls.append(backward)
        assert torch.is_grad_enabled() == backward
        loss = f(w)
        if backward:
            optimizer.zero_grad()
            loss.backward()
        return loss

    return closure


@given(st.integers(0, 1000), st.floats(0.01, 0.9), st.floats(0.1, 0.95), st.floats(1, 4), st.floats(0.01, 100))
@settings(max_examples=20, deadline=None)
def test_it_is_the_search_by_hand(seed, c, backtrack, expand, lr):
    start = torch.randn(3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    w = nn.Parameter(start.clone())
    optimizer, a, x, calls = ArmijoGD([w], lr, c, backtrack, expand), lr, start, []
    for _ in range(4):
        d = 2 * SCALES**2 * x + x.cos()
        a *= expand
        for _ in range(100):
            if f(x - a * d) <= f(x) - c * a * d.norm() ** 2:
                break
            a *= backtrack
            if a < FLOOR:
                break
        loss = optimizer.step(cheap(optimizer, w, calls))
        assert loss.item() == pytest.approx(f(x).item()) and optimizer.grad_norm == pytest.approx(d.norm().item())
        assert optimizer.param_groups[0]["lr"] == pytest.approx(a, rel=1e-12)
        x = x - a * d
        torch.testing.assert_close(w.detach(), x, rtol=1e-10, atol=1e-10)
    assert calls.count(True) == 4


def test_a_closure_that_knows_no_other_way_serves_as_well():
    paths = []
    for make in (standard, cheap):
        w = nn.Parameter(torch.ones(3, dtype=torch.float64))
        optimizer, calls = ArmijoGD([w]), []
        for _ in range(20):
            optimizer.step(make(optimizer, w, calls))
        paths.append(w.detach().clone())
    torch.testing.assert_close(*paths, rtol=0, atol=0)
    assert f(paths[0]) < 2 < f(torch.ones(3)) - 50


def test_it_stops_looking_at_the_floor_and_after_max_trials():
    for options, expected in [({}, 0.9e-6), ({"max_trials": 7}, 2 * 0.5**7)]:
        w, seen = nn.Parameter(torch.zeros(1, dtype=torch.float64)), []
        optimizer = ArmijoGD([w], backtrack=0.5, **options)

        def closure(backward=True, w=w, seen=seen):
            seen.append(w.item())
            if backward:
                w.grad = torch.ones_like(w)
            return torch.tensor(0.0 if len(seen) == 1 else float("nan"))  # no step is ever good enough

        optimizer.step(closure)
        last = -w.item()
        assert last == -seen[-1] * 0.5 and last == pytest.approx(optimizer.param_groups[0]["lr"])
        assert last == pytest.approx(expected, rel=0.5) and (last < FLOOR) == (options == {})


def test_as_one_of_torchs():
    w = nn.Parameter(torch.ones(3, dtype=torch.float64))
    idle = nn.Parameter(torch.ones(2))
    optimizer = ArmijoGD([w, idle])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.0)
    for step in range(5):
        if step == 2:
            saved = io.BytesIO()
            torch.save(optimizer.state_dict(), saved)
            saved.seek(0)
            other = nn.Parameter(w.detach().clone())
            resumed = ArmijoGD([other, nn.Parameter(torch.ones(2))])
            resumed.load_state_dict(torch.load(saved, weights_only=True))
            resumed.step(standard(resumed, other))
            twin, copied = copy.deepcopy((w, optimizer))
            copied.step(standard(copied, twin))
        before = w.detach().clone()
        optimizer.step(standard(optimizer, w))
        scheduler.step()
        assert torch.equal(w, before) == (step > 2), "a rate of 0 is a step of 0"
        if step == 2:
            assert torch.equal(other, w) and torch.equal(twin, w)
    assert (idle == 1).all() and idle.grad is None


def test_what_it_cannot_use_is_refused_by_name():
    w = nn.Parameter(torch.ones(2))
    for options, message in [
        ({"lr": 0.0}, "lr = 0.0 is out of range"),
        ({"c": 0.0}, "c = 0.0 is out of range"),
        ({"c": 1.0}, "c = 1.0 is out of range"),
        ({"backtrack": 0.0}, "backtrack = 0.0 is out of range"),
        ({"expand": 0.9}, "expand = 0.9 is out of range"),
        ({"max_trials": 0}, "max_trials = 0 is out of range"),
    ]:
        with pytest.raises(ValueError, match=message):
            ArmijoGD([w], **options)
    with pytest.raises(ValueError, match="a second group is out of range"):
        ArmijoGD([{"params": [w]}, {"params": [nn.Parameter(torch.ones(1))]}])
    with pytest.raises(TypeError, match="ArmijoGD has no option 'speed'"):
        ArmijoGD([{"params": [w], "speed": 1}])
    with pytest.raises(RuntimeError, match="compares losses"):
        ArmijoGD([w]).step()

    def sparse():
        w.grad = torch.ones(2).to_sparse()
        return torch.ones(())

    with pytest.raises(RuntimeError, match="sparse"):
        ArmijoGD([w]).step(sparse)
