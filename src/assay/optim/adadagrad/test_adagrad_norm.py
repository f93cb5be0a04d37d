from __future__ import annotations

import functools
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from assay.optim import AdaGradNorm
from assay.optim.adadagrad.test_sampler import saved


def parameters(*shapes: tuple[int, ...], seed: int = 0) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=draw, dtype=torch.float64)) for shape in shapes]


def run(optimizer, params, steps, loss=lambda params: sum((p**4).sum() + p.sum() for p in params)):
    for _ in range(steps):
        optimizer.zero_grad()
        loss(params).backward()
        optimizer.step()
    return [p.detach().clone() for p in params]


def test_adagrad_norm_is_the_formula():
    params = parameters((3, 2), (4,), (2, 1, 2, 2))
    x = [p.detach().numpy().copy() for p in params]
    groups = [{"params": params[:2], "lr": 0.3, "weight_decay": 0.1}, {"params": params[2:]}]
    optimizer = AdaGradNorm(groups, lr=0.1, b0=0.5, eps=1e-3)
    v = 0.25
    for _ in range(10):
        g = [4 * a**3 + 1 + decay * a for a, decay in zip(x, (0.1, 0.1, 0.0), strict=True)]
        v += sum((a**2).sum() for a in g)
        x = [a - lr * b / (math.sqrt(v) + 1e-3) for a, b, lr in zip(x, g, (0.3, 0.3, 0.1), strict=True)]
        found = run(optimizer, params, 1)
        for a, b in zip(x, found, strict=True):
            np.testing.assert_allclose(b.numpy(), a, rtol=1e-12)


def test_adagrad_norm_of_one_number_is_adagrad():
    one, two = parameters((1,)), parameters((1,))
    ours = AdaGradNorm(one, lr=0.2, b0=0.3, eps=1e-6, weight_decay=0.1)
    torchs = torch.optim.Adagrad(two, lr=0.2, initial_accumulator_value=0.09, eps=1e-6, weight_decay=0.1)
    for _ in range(20):
        torch.testing.assert_close(run(ours, one, 1), run(torchs, two, 1), rtol=1e-12, atol=0)


def test_adagrad_norm_turns_with_the_coordinates():
    q = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    curvature = torch.tensor([1.0, 2.0, 3.0, 4.0, 50.0], dtype=torch.float64)

    def distance(optimizer):
        x = parameters((5,))[0]
        y = nn.Parameter(q @ x.detach())
        run(optimizer([x]), [x], 30, lambda params: (curvature * params[0] ** 2).sum())
        run(optimizer([y]), [y], 30, lambda params: (curvature * (q.T @ params[0]) ** 2).sum())
        return (q @ x - y).norm().item()

    assert distance(functools.partial(AdaGradNorm, lr=0.5)) < 1e-12
    assert distance(functools.partial(torch.optim.Adagrad, lr=0.5)) > 1e-2


def test_adagrad_norm_resumes_exactly_and_shares_nothing():
    params = parameters((3,), (2, 2))
    optimizer = AdaGradNorm(params, lr=0.1)
    run(optimizer, params, 3)
    for state in (saved(optimizer.state_dict()), optimizer.state_dict()):
        twins = [nn.Parameter(p.detach().clone()) for p in params]
        twin = AdaGradNorm(twins, lr=9.0, b0=7.0)
        twin.load_state_dict(state)
        before = optimizer.state_dict()["state"]["global"]["v"].clone()
        after = run(twin, twins, 5)
        assert torch.equal(optimizer.state_dict()["state"]["global"]["v"], before)
    for a, b in zip(run(optimizer, params, 5), after, strict=True):
        assert torch.equal(a, b)
    again = pickle.loads(pickle.dumps(optimizer))
    assert torch.equal(again.state["global"]["v"], optimizer.state["global"]["v"])


def test_adagrad_norm_one_accumulator_for_late_groups_and_missing_gradients():
    a, b, c = parameters((2,), (3,), (1,))
    optimizer = AdaGradNorm([a], b0=1.0)
    optimizer.add_param_group({"params": [b], "lr": 0.5})
    optimizer.add_param_group({"params": [c]})
    untouched = c.detach().clone()
    a.grad, b.grad = torch.full_like(a, 2.0), torch.ones_like(b)
    optimizer.step()
    assert optimizer.state["global"]["v"].item() == pytest.approx(1 + 8 + 3, rel=1e-12)
    assert torch.equal(c, untouched)
    assert torch.equal(a.grad, torch.full_like(a, 2.0))
    idle = AdaGradNorm(parameters((2,)), b0=2.0)
    assert idle.step(lambda: torch.tensor(3.0)).item() == 3.0
    assert idle.state["global"]["v"].item() == 4.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.complex128])
def test_adagrad_norm_dtypes(dtype):
    p = nn.Parameter(torch.tensor([3.0, 4.0], dtype=dtype))
    q = nn.Parameter(torch.tensor(0.0, dtype=torch.float64))
    optimizer = AdaGradNorm([p, q], lr=torch.tensor([1.0]), b0=0.0)
    p.grad, q.grad = torch.tensor([300.0, 400.0], dtype=dtype), torch.tensor(0.0, dtype=torch.float64)
    optimizer.step()
    assert optimizer.state["global"]["v"].item() == 250_000  # more than float16 holds
    assert p.dtype == dtype
    torch.testing.assert_close(
        p.detach().to(torch.complex128).real, torch.tensor([2.4, 3.2]).double(), rtol=1e-2, atol=0
    )


def test_adagrad_norm_refuses():
    p = parameters((2,))
    for bad in ({"lr": -1.0}, {"eps": -1.0}, {"weight_decay": -1.0}, {"b0": -1.0}, {"b0": math.nan}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} = "):
            AdaGradNorm(p, **bad)
    with pytest.raises(ValueError, match="eps"):
        AdaGradNorm(p, b0=0.0, eps=0.0)
    with pytest.raises(ValueError, match="lr"):
        AdaGradNorm(p, lr=torch.ones(2))
    with pytest.raises(TypeError):
        AdaGradNorm(p, momentum=0.9)
    with pytest.raises(TypeError, match="b0"):
        AdaGradNorm([{"params": p, "b0": 1.0}])  # there is one accumulator, not one a group
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        AdaGradNorm(table.parameters()).step()
