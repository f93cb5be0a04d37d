"""AdamP and SGDP against the paper's formulas in plain loops, and their invariants."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from assay.bench import Bench
from assay.optim import SGDP, AdamP, project_radial
from assay.optim._contract import gradients, parameters, same, walk
from assay.optim.adamp import claim as room

EPS = 1e-8
DISTRIBUTED = [
    (AdamP, {"lr": 0.01, "weight_decay": 0.1}),
    (AdamP, {"lr": 0.01, "weight_decay": 0.1, "delta": 100.0}),
    (SGDP, {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1}),
]


def project(p, g, u, delta, wd_ratio, eps):
    """The projection restated with one loop over views and one over groups."""
    for rows in (p.shape[0], 1):
        ps, gs, us = (x.reshape(rows, -1) for x in (p, g, u))
        cosines = [abs(a @ b) / (max(a.norm(), eps) * max(b.norm(), eps)) for a, b in zip(ps, gs, strict=True)]
        if max(cosines) < delta / math.sqrt(ps.shape[1]):
            directions = [a / (a.norm() + eps) for a in ps]
            projected = [x - h * (h @ x) for h, x in zip(directions, us, strict=True)]
            return torch.stack(projected).reshape(p.shape), wd_ratio
    return u, 1.0


def adamp(params, steps, lr=1e-3, betas=(0.9, 0.999), eps=EPS, wd=0.0, delta=0.1, wd_ratio=0.1, nesterov=False):
    """Trajectory of AdamP from the formula; gradients come from the same stream as in ``walk``."""
    params = [p.detach().clone().requires_grad_() for p in params]
    ms, vs = ([torch.zeros_like(p) for p in params] for _ in range(2))
    with torch.no_grad():
        for step in gradients(params, steps):
            t = step + 1
            for i, p in enumerate(params):
                g = p.grad
                ms[i] = betas[0] * ms[i] + (1 - betas[0]) * g
                vs[i] = betas[1] * vs[i] + (1 - betas[1]) * g * g
                top = betas[0] * ms[i] + (1 - betas[0]) * g if nesterov else ms[i]
                u = top / (vs[i].sqrt() / math.sqrt(1 - betas[1] ** t) + eps)
                u, s = project(p, g, u, delta, wd_ratio, eps) if p.dim() > 1 and p.numel() else (u, 1.0)
                p.copy_((1 - lr * wd * s) * p - lr / (1 - betas[0] ** t) * u)
    return params


def sgdp(params, steps, lr=1e-3, momentum=0.0, dampening=0.0, wd=0.0, nesterov=False, delta=0.1, wd_ratio=0.1):
    params = [p.detach().clone().requires_grad_() for p in params]
    buffers = [torch.zeros_like(p) for p in params]
    with torch.no_grad():
        for _ in gradients(params, steps):
            for i, p in enumerate(params):
                g = p.grad
                buffers[i] = momentum * buffers[i] + (1 - dampening) * g
                u = g + momentum * buffers[i] if nesterov else buffers[i]
                u, s = project(p, g, u, delta, wd_ratio, EPS) if p.dim() > 1 and p.numel() else (u, 1.0)
                p.copy_((1 - lr * wd * s / (1 - momentum)) * p - lr * u)
    return params


@pytest.mark.parametrize("delta", [0.1, 2.0, 1000.0])
@pytest.mark.parametrize("nesterov", [False, True])
def test_adamp_is_the_formula(delta, nesterov):
    options = {"lr": 0.01, "betas": (0.8, 0.95), "nesterov": nesterov, "delta": delta, "wd_ratio": 0.3}
    mine = walk(AdamP, parameters(), steps=10, weight_decay=0.1, **options)
    same(mine, adamp(parameters(), 10, wd=0.1, **options), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("delta", [0.1, 2.0, 1000.0])
@pytest.mark.parametrize("nesterov", [False, True])
def test_sgdp_is_the_formula(delta, nesterov):
    options = {"lr": 0.01, "momentum": 0.9, "dampening": 0.2, "nesterov": nesterov, "delta": delta}
    mine = walk(SGDP, parameters(), steps=10, weight_decay=0.1, **options)
    same(mine, sgdp(parameters(), 10, wd=0.1, **options), rtol=1e-10, atol=1e-12)


def test_without_projection_it_is_adamw():
    options = {"lr": 0.01, "weight_decay": 0.1}
    mine = walk(AdamP, parameters(), steps=20, delta=0.0, **options)
    same(mine, walk(torch.optim.AdamW, parameters(), steps=20, **options), rtol=1e-12, atol=1e-12)


def test_vectors_and_scalars_are_never_projected():
    def vectors():
        return [p for p in parameters() if p.dim() <= 1]

    mine = walk(AdamP, vectors(), steps=20, delta=1e9, weight_decay=0.1)
    same(mine, walk(torch.optim.AdamW, vectors(), steps=20, weight_decay=0.1), rtol=1e-12, atol=1e-12)


def orthogonal(p, by_row, seed=0):
    """A gradient orthogonal to every row of p, or only to p as a whole."""
    g = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed), dtype=p.dtype)
    rows = p.shape[0] if by_row else 1
    ps, gs = p.reshape(rows, -1), g.reshape(rows, -1)
    return (gs - ps * ((gs * ps).sum(1) / (ps * ps).sum(1))[:, None]).reshape(p.shape)


@pytest.mark.parametrize("shape", [(6, 10), (4, 3, 5, 5), (1, 7)])
def test_rows_orthogonal_to_their_gradient_are_projected(shape):
    generator = torch.Generator().manual_seed(1)
    p, u = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    g = orthogonal(p, by_row=True)
    before = [x.clone() for x in (p, g, u)]
    projected, decay = project_radial(p, g, u, 0.1, 0.25, EPS)
    assert decay.item() == 0.25
    rows = (projected * p).flatten(1).sum(1).abs()
    # eps keeps a share of 2 eps / |w| of the radial part.
    assert (rows <= 1e-6 * projected.flatten(1).norm(dim=1) * p.flatten(1).norm(dim=1)).all()
    again, _ = project_radial(p, g, projected, 0.1, 0.25, EPS)
    torch.testing.assert_close(again, projected, rtol=1e-7, atol=1e-9)
    assert all(torch.equal(x, y) for x, y in zip((p, g, u), before, strict=True))


def test_the_layer_view_fires_when_only_the_whole_is_orthogonal():
    generator = torch.Generator().manual_seed(2)
    p, u = (torch.randn(6, 10, generator=generator, dtype=torch.float64) for _ in range(2))
    g = orthogonal(p, by_row=False)
    projected, decay = project_radial(p, g, u, 0.1, 0.25, EPS)
    assert decay.item() == 0.25
    assert abs((projected * p).sum()) < 1e-6
    assert (projected * p).sum(1).abs().max() > 1e-3, "the rows were projected one by one"
    torch.testing.assert_close(projected, project(p, g, u, 0.1, 0.25, EPS)[0], rtol=1e-12, atol=1e-12)


def test_one_row_with_a_large_cosine_keeps_the_others_from_being_projected():
    generator = torch.Generator().manual_seed(3)
    p, u = (torch.randn(5, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    g = orthogonal(p, by_row=True)
    g[0] = p[0]
    projected, decay = project_radial(p, g, u, 0.1, 0.1, EPS)
    assert torch.equal(projected, u) and decay.item() == 1.0


@given(st.integers(0, 10_000), st.floats(0, 3), st.lists(st.integers(1, 5), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_projection_is_the_loops(seed, delta, shape):
    generator = torch.Generator().manual_seed(seed)
    p, g, u = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    expected, decay = project(p, g, u, delta, 0.1, EPS)
    found, scale = project_radial(p, g, u, delta, 0.1, EPS)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert scale.item() == decay


@pytest.mark.parametrize("fires", [True, False])
def test_decay_is_scaled_exactly_where_it_fires(fires):
    p = nn.Parameter(torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    start, lr, decay = p.detach().clone(), 0.1, 0.5
    p.grad = orthogonal(start, by_row=True) if fires else start.clone()
    kept, plain = nn.Parameter(start.clone()), p.grad.clone()
    kept.grad = plain
    SGDP([p], lr=lr, weight_decay=decay, wd_ratio=0.1).step()
    SGDP([kept], lr=lr, weight_decay=0.0).step()
    expected = lr * decay * (0.1 if fires else 1.0)
    torch.testing.assert_close(kept - p, start * expected, rtol=1e-12, atol=1e-14)


def test_norms_grow_by_pythagoras_and_no_other_way():
    p = nn.Parameter(torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    optimizer = SGDP([p], lr=0.1, momentum=0.9)
    for seed in range(20):
        p.grad = orthogonal(p.detach(), by_row=True, seed=seed)
        buffer = optimizer.state[p].get("momentum_buffer", torch.zeros_like(p))
        update, _ = project_radial(p.detach(), p.grad, 0.9 * buffer + p.grad, 0.1, 0.1, EPS)
        before = p.detach().clone()
        optimizer.step()
        expected = before.flatten(1).square().sum(1) + 0.01 * update.flatten(1).square().sum(1)
        torch.testing.assert_close(p.detach().flatten(1).square().sum(1), expected, rtol=1e-6, atol=1e-9)


def test_projection_leaves_the_momentum_unprojected():
    def buffers(cls, names, **options):
        params = parameters()
        optimizer = cls(params, **options)
        for _ in gradients(params, 5):
            optimizer.step()
        return [optimizer.state[p][name] for p in params for name in names]

    adam = ("exp_avg", "exp_avg_sq")
    mine = buffers(AdamP, adam, delta=1e9)
    torch.testing.assert_close(mine, buffers(torch.optim.AdamW, adam), rtol=1e-12, atol=1e-14)
    mine = buffers(SGDP, ["momentum_buffer"], momentum=0.9, delta=1e9)
    torchs = buffers(torch.optim.SGD, ["momentum_buffer"], momentum=0.9, lr=1e-3)
    torch.testing.assert_close(mine, torchs, rtol=1e-12, atol=1e-14)


def test_a_group_may_have_its_own_delta():
    start = torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    params = [nn.Parameter(start.clone()) for _ in range(2)]
    optimizer = SGDP([{"params": params[:1], "delta": 0.0}, {"params": params[1:]}], lr=0.1, momentum=0.9)
    for seed in range(3):
        for p in params:
            p.grad = orthogonal(start, by_row=True, seed=seed)
        optimizer.step()
    assert not torch.equal(*params)


@pytest.mark.parametrize("make", [AdamP, SGDP])
def test_zero_weights_give_no_nan(make):
    params = [nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(3, 4))]
    params[1].data[0] = 1.0
    for p in walk(make, params, steps=3, weight_decay=0.1):
        assert p.isfinite().all()


def test_half_precision_measures_the_cosine_in_float32():
    generator = torch.Generator().manual_seed(0)
    p, g, u = (torch.randn(8, 1024, generator=generator).bfloat16() for _ in range(3))
    exact, decay = project_radial(p.float(), g.float(), u.float(), 1.0, 0.1, EPS)
    found, scale = project_radial(p, g, u, 1.0, 0.1, EPS)
    assert scale.item() == decay.item()
    torch.testing.assert_close(found.float(), exact, rtol=1e-2, atol=1e-2)


def test_scaling_the_weights_and_the_rate_does_not_turn_the_path():
    """For f(w) = h(w / |w|): p0 -> k p0 and lr -> k^2 lr leave the directions alone."""
    target = torch.randn(5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    start = torch.randn(1, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def path(k):
        p = nn.Parameter(start * k)
        optimizer = SGDP([p], lr=0.05 * k * k, momentum=0.9, eps=0.0)
        directions = []
        for _ in range(30):
            optimizer.zero_grad()
            ((p[0] / p[0].norm()) @ target).backward()
            optimizer.step()
            directions.append((p / p.norm()).detach())
        return torch.cat(directions)

    # With k a power of two all numbers scale exactly, but for rounding in the square roots.
    torch.testing.assert_close(path(4.0), path(1.0), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("make", "option", "value"),
    [
        (AdamP, "betas", (1.0, 0.9)),
        (AdamP, "eps", -1e-8),
        (AdamP, "weight_decay", -0.1),
        (AdamP, "delta", -0.1),
        (AdamP, "wd_ratio", 1.5),
        (SGDP, "momentum", 1.0),
        (SGDP, "dampening", 2.0),
    ],
)
def test_values_out_of_range_are_refused_by_name(make, option, value):
    with pytest.raises(ValueError, match=f"{option} = .* is out of range"):
        make([nn.Parameter(torch.ones(2, 2))], **{option: value})


class Unprojected(SGDP):
    """The broken variant: SGDP that never projects."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{**kwargs, "delta": 0.0})


class Always(AdamP):
    """The other broken variant: every weight is projected, the last layer included."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{**kwargs, "delta": 1e9})


def test_the_claim_fails_for_an_sgdp_that_never_projects():
    assert room.claim(Bench(quick=True), sgdp=Unprojected, parts=("sphere",)).verdict == "does not hold"
    assert room.claim(Bench(quick=True), parts=("sphere",)).verdict == "holds"


def test_an_adamp_that_projects_everything_is_not_the_formula():
    params = walk(Always, copy.deepcopy(parameters()), steps=3)
    with pytest.raises(AssertionError):
        same(params, adamp(parameters(), 3), rtol=1e-6, atol=1e-6)
