"""Lion-K against the formula in plain loops, its constraint, and its Lyapunov function."""

import functools
import inspect
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from assay.bench import Bench
from assay.optim import Lion, LionK, _rule, lion_constraint_violation, lion_lyapunov
from assay.optim._contract import CHECKS, gradients, parameters, same, walk
from assay.optim.kappas import L1, L2, HalfSquare, Huber, L2Rows, LogCosh, Lp, Nuclear, SoftThreshold, TopK
from assay.optim.lion_k.claim import LION, claim

KAPPAS = [
    L1(), SoftThreshold(0.25), TopK(3), Huber(0.5), Lp(1.5), L2(), L2Rows(), Nuclear(None), Nuclear(), HalfSquare(),
    LogCosh(),
]  # fmt: skip
DISTRIBUTED = [(Lion, {"lr": 0.01, "weight_decay": 0.1})] + [
    (LionK, {"lr": 0.01, "weight_decay": 0.1, "kappa": kappa})
    for kappa in (TopK(3), Lp(1.5), L2(), L2Rows(), Nuclear())
]
CLOSE = {"rtol": 1e-11, "atol": 1e-12}
by_kappa = pytest.mark.parametrize("kappa", KAPPAS, ids=repr)


def shaped(kappa, y):
    """gradK restated: by the table of the paper and its duals."""
    if isinstance(kappa, L1) or (isinstance(kappa, Nuclear) and y.dim() < 2):
        return (y > 0).to(y) - (y < 0).to(y)
    if isinstance(kappa, SoftThreshold):
        return torch.sign(y) * (y.abs() > kappa.e)
    if isinstance(kappa, Huber):
        return (y / kappa.e).clamp(-1, 1)
    if isinstance(kappa, LogCosh):
        return (y.exp() - (-y).exp()) / (y.exp() + (-y).exp())
    if isinstance(kappa, HalfSquare):
        return y
    if isinstance(kappa, TopK):
        least = y.abs().flatten().sort(descending=True).values[: kappa.k][-1]
        return torch.sign(y) * (y.abs() >= least)
    if isinstance(kappa, L2Rows) and y.dim() > 1:
        return torch.stack([row / row.square().sum().sqrt() for row in y])
    if isinstance(kappa, (L2, L2Rows)):
        return y / y.square().sum().sqrt()
    if isinstance(kappa, Lp):
        return y.sign() * y.abs() ** (kappa.p - 1) / (y.abs() ** kappa.p).sum() ** ((kappa.p - 1) / kappa.p)
    u, s, v = torch.linalg.svd(y.flatten(1), full_matrices=False)
    if kappa.ns_steps is None:
        return (u @ v).view(y.shape)
    s = s / s.square().sum().sqrt()
    for _ in range(kappa.ns_steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return ((u * s) @ v).view(y.shape)


def by_hand(params, steps, kappa, lr=0.01, betas=(0.9, 0.99), weight_decay=0.0, scale=lambda p: 1.0):
    """The formula; gradients come from the same stream as in ``walk``."""
    params = [nn.Parameter(p.detach().clone()) for p in params]
    ms = [torch.zeros_like(p) for p in params]
    with torch.no_grad():
        for _ in gradients(params, steps):
            for i, p in enumerate(params):
                if p.numel() == 0:
                    continue
                c = betas[0] * ms[i] + (1 - betas[0]) * p.grad
                p.copy_((1 - lr * weight_decay) * p - lr * scale(p) * shaped(kappa, c))
                ms[i] = betas[1] * ms[i] + (1 - betas[1]) * p.grad
    return params


@by_kappa
def test_trajectory_is_the_formula(kappa):
    options = {"lr": 0.05, "betas": (0.8, 0.95), "weight_decay": 0.3}
    mine = walk(LionK, parameters(), steps=6, kappa=kappa, **options)
    same(mine, by_hand(parameters(), 6, kappa, **options), **CLOSE)


def test_lion_is_the_published_one_to_the_bit_and_lionk_with_l1():
    options = {"lr": 0.05, "betas": (0.8, 0.95), "weight_decay": 0.3}
    lion = walk(Lion, parameters(), steps=20, **options)
    same(lion, by_hand(parameters(), 20, L1(), **options))
    same(lion, walk(LionK, parameters(), steps=20, kappa="l1", **options))
    assert inspect.signature(Lion).parameters["betas"].default == (0.9, 0.99)


CONTRACTS = [check for check in CHECKS if check.__name__.startswith(("lists", "resuming", "ascent", "bfloat16"))]


@pytest.mark.parametrize("check", CONTRACTS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("kappa", [kappa for kappa in KAPPAS if not isinstance(kappa, L1)], ids=repr)
def test_every_kappa_is_held_to_the_contract(kappa, check):
    check(functools.partial(LionK, kappa=kappa))


@by_kappa
def test_every_kappa_compiles(kappa, monkeypatch):
    monkeypatch.setattr(_rule, "COMPILER", "aot_eager")
    _rule._compiled.cache_clear()
    # An entrywise kappa is compiled for tensors beyond a list's size.
    shape, dtype = ((2, _rule.SMALL), torch.float32) if kappa.elementwise(torch.ones(1, 1)) else ((4, 3), torch.float64)
    start, grads = torch.randn(shape, dtype=dtype), torch.randn(3, *shape, dtype=dtype)
    eager, compiled = (steps_of(kappa, start, grads, lr=0.1, compile=how)[0][-1] for how in (False, True))
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)


def steps_of(kappa, start, grads, **options):
    """Where a parameter goes with the given gradients, and its optimizer."""
    p = nn.Parameter(start.clone())
    optimizer, path = LionK([p], kappa=kappa, **options), [start.clone()]
    for grad in grads:
        p.grad = grad.clone()
        optimizer.step()
        path.append(p.detach().clone())
    return path, optimizer


def test_every_entry_moves_by_lr():
    start, grads = torch.randn(5, 4, dtype=torch.float64), torch.randn(8, 5, 4, dtype=torch.float64)
    path, _ = steps_of("l1", start, grads, lr=0.1, weight_decay=0.5)
    for before, after in itertools.pairwise(path):
        torch.testing.assert_close((after - 0.95 * before).abs(), torch.full_like(after, 0.1), **CLOSE)


@by_kappa
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 9999), lr=st.floats(0.01, 0.5), spread=st.floats(0.1, 20))
def test_outside_it_comes_nearer_and_inside_it_stays(kappa, seed, lr, spread):
    """For any gradients at all: the distance shrinks by 1 - lr * weight_decay in every step."""
    generator = torch.Generator().manual_seed(seed)
    start = spread * torch.randn(4, 3, generator=generator, dtype=torch.float64)
    grads = 10 ** torch.randn(12, 1, 1, generator=generator, dtype=torch.float64) * torch.randn(
        12, 4, 3, generator=generator, dtype=torch.float64
    )
    if kappa == Nuclear():
        return  # its steps leave the domain; the claim says by how much
    decay = 2.0
    for first in (start, kappa.project(decay * start) / decay):
        path, _ = steps_of(kappa, first, grads, lr=lr, weight_decay=decay)
        distances = [kappa.distance(decay * x).item() for x in path]
        for before, after in itertools.pairwise(distances):
            assert after <= (1 - lr * decay) * before + 1e-10


@by_kappa
def test_the_mirrored_problem_has_the_mirrored_path(kappa):
    start, grads = torch.randn(4, 3, dtype=torch.float64), torch.randn(6, 4, 3, dtype=torch.float64)
    path, _ = steps_of(kappa, start, grads, lr=0.1, weight_decay=0.5)
    mirrored, _ = steps_of(kappa, -start, -grads, lr=0.1, weight_decay=0.5)
    torch.testing.assert_close(torch.stack(mirrored), -torch.stack(path), **CLOSE)


@pytest.mark.parametrize("kappa", [L1(), TopK(3), Lp(1.5), L2(), L2Rows(), Nuclear(None), Nuclear()], ids=repr)
def test_the_scale_of_the_gradients_does_not_count(kappa):
    start, grads = torch.randn(4, 3, dtype=torch.float64), torch.randn(6, 4, 3, dtype=torch.float64)
    path, _ = steps_of(kappa, start, grads, lr=0.1)
    for scale in (1e-5, 7.0, 1e5):
        scaled, _ = steps_of(kappa, start, scale * grads, lr=0.1)
        torch.testing.assert_close(torch.stack(scaled), torch.stack(path), rtol=1e-9, atol=1e-9)


def test_half_square_is_momentum():
    start, grads = torch.randn(5, dtype=torch.float64), torch.randn(8, 5, dtype=torch.float64)
    path, _ = steps_of(HalfSquare(), start, grads, lr=0.1, betas=(0.9, 0.9))
    ages = 0.9 ** torch.arange(8, dtype=torch.float64)
    for t in range(8):
        average = (0.1 * ages[: t + 1].flip(0)[:, None] * grads[: t + 1]).sum(0)
        torch.testing.assert_close(path[t] - path[t + 1], 0.1 * average, **CLOSE)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_nuclear_is_torchs_muon():
    """Nesterov momentum b of Muon is betas (b^2, b) here; Muon works in bfloat16."""
    start, grads = torch.randn(6, 9), torch.randn(5, 6, 9)
    path, _ = steps_of("nuclear", start, grads, lr=0.1, betas=(0.9**2, 0.9), weight_decay=0.2)
    p = nn.Parameter(start.clone())
    muon = torch.optim.Muon([p], lr=0.1, momentum=0.9, weight_decay=0.2)
    for grad in grads:
        p.grad = grad.clone()
        muon.step()
    torch.testing.assert_close(p.detach(), path[-1], rtol=0, atol=0.01)
    assert (path[-1] - path[0]).abs().max() > 0.1


@pytest.mark.parametrize("kappa", [L2(), L2Rows(), Nuclear(None), Lp(2)], ids=repr)
@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (7,), (3, 2, 2)])
def test_rms_scale_makes_lr_the_step_of_an_entry_and_widens_the_constraint(kappa, shape):
    start, grads = torch.randn(shape, dtype=torch.float64), torch.randn(3, *shape, dtype=torch.float64)
    path, optimizer = steps_of(kappa, start, grads, lr=0.1, rms_scale=True)
    for before, after in itertools.pairwise(path):
        assert (after - before).square().mean().sqrt().item() == pytest.approx(0.1, rel=1e-9)
    (p,) = optimizer.param_groups[0]["params"]
    optimizer.param_groups[0]["weight_decay"] = 1.0
    edge = kappa.grad(torch.randn(shape, dtype=torch.float64)) / kappa.entry_size(p)
    for stretch in (1.0, 1.5):
        p.data = stretch * edge
        distance = kappa.distance(stretch * kappa.entry_size(p) * edge).item()
        assert lion_constraint_violation(optimizer) == pytest.approx(distance, abs=1e-12)
        assert (distance > 0.1) == (stretch > 1)


def test_rms_scale_leaves_what_is_entrywise():
    options = {"lr": 0.05, "weight_decay": 0.3}
    for kappa in (L1(), Huber(0.5), TopK(3)):
        plain = walk(LionK, parameters(), kappa=kappa, **options)
        same(walk(LionK, parameters(), kappa=kappa, rms_scale=True, **options), plain)


def test_violation_is_the_farthest_parameter_and_nothing_without_decay():
    near, far = (nn.Parameter(torch.tensor(values)) for values in ([0.5, -3.0], [2.0, 2.0]))
    optimizer = LionK([{"params": [near]}, {"params": [far], "kappa": L2()}], lr=0.1, weight_decay=2.0)
    expected = max(2 * 3.0 - 1, 2 * 8**0.5 - 1)
    assert lion_constraint_violation(optimizer) == pytest.approx(expected, rel=1e-6)
    optimizer.param_groups[0]["weight_decay"] = optimizer.param_groups[1]["weight_decay"] = 0.0
    assert lion_constraint_violation(optimizer) == 0.0
    empty = nn.Parameter(torch.zeros(0, 3, dtype=torch.bfloat16))
    assert lion_constraint_violation(LionK([empty], kappa=TopK(2), weight_decay=1.0)) == 0.0


def test_a_complex_parameter_is_a_pair_of_real_ones_or_refused():
    start = torch.randn(3, dtype=torch.complex128)
    for kappa in (L1(), LogCosh()):
        z, x = nn.Parameter(start.clone()), nn.Parameter(torch.view_as_real(start).clone())
        ones, others = (LionK([q], lr=0.1, weight_decay=0.1, kappa=kappa) for q in (z, x))
        for _ in range(3):
            z.grad = torch.randn(3, dtype=torch.complex128)
            x.grad = torch.view_as_real(z.grad).clone()
            ones.step()
            others.step()
        assert torch.equal(torch.view_as_real(z.detach()), x.detach())
        assert lion_constraint_violation(ones) == lion_constraint_violation(others)
    for kappa in (L2(), Nuclear()):
        with pytest.raises(RuntimeError, match="complex parameters with"):
            z.grad = z.detach().clone()
            LionK([z], kappa=kappa).step()


@pytest.mark.parametrize("kappa", [Huber(0.5), LogCosh(), L2()], ids=repr)
@pytest.mark.parametrize(("alpha", "gamma", "eps"), [(1.0, 1.0, 0.0), (0.5, 2.0, 0.4), (2.0, 0.5, 2.0)])
def test_the_lyapunov_function_never_grows(kappa, alpha, gamma, eps):
    """Runge-Kutta steps of the dynamics from inside the domain, on a quadratic."""
    torch.manual_seed(0)
    a, b, decay = torch.randn(8, 4, dtype=torch.float64), torch.randn(8, dtype=torch.float64), 1.5

    def f(x):
        return (a @ x - b).square().sum() / 2

    def flow(x, m):
        force = alpha * a.T @ (a @ x - b) + gamma * m
        return kappa.grad(m - eps * force) - decay * x, -force

    x, m = kappa.project(torch.randn(4, dtype=torch.float64)) / decay, torch.randn(4, dtype=torch.float64)
    values, dt = [], 0.005
    for _ in range(600):
        options = {"weight_decay": decay, "alpha": alpha, "gamma": gamma, "eps": eps}
        values.append(lion_lyapunov(f(x), x, m, kappa, **options).item())
        ks = [flow(x, m)]
        for part in (0.5, 0.5, 1.0):
            ks.append(flow(x + part * dt * ks[-1][0], m + part * dt * ks[-1][1]))
        x, m = (
            value + dt / 6 * (k[0] + 2 * k[1] + 2 * k[2] + k[3])
            for value, k in zip((x, m), zip(*ks, strict=True), strict=True)
        )
    falls = -torch.tensor(values).diff()
    assert (falls >= -1e-7).all() and values[0] - values[-1] > 0.1
    assert lion_lyapunov(f, torch.full_like(x, 9.0), m, kappa, weight_decay=1.0) == float("inf")


@pytest.mark.parametrize(("options", "message"), [
    ({"weight_decay": 0.0}, "weight_decay = 0.0 is out of range"),
    ({"weight_decay": 1.0, "alpha": 0.0}, "alpha = 0.0 is out of range"),
    ({"weight_decay": 1.0, "gamma": -1.0}, "gamma = -1.0 is out of range"),
    ({"weight_decay": 1.0, "gamma": 2.0, "eps": 0.6}, "eps = 0.6 is out of range"),
])  # fmt: skip
def test_the_lyapunov_function_names_what_is_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        lion_lyapunov(0.0, torch.zeros(2), torch.zeros(2), **options)


@pytest.mark.parametrize(("options", "message"), [
    ({"betas": (1.0, 0.9)}, "betas = .* is out of range"),
    ({"weight_decay": -1.0}, r"weight_decay = -1\.0 is out of range"),
    ({"eps": -1.0}, r"eps = -1\.0 is out of range"),
    ({"kappa": "l3"}, "kappa = 'l3' is out of range: a Kappa, or one of l1, l2"),
    ({"kappa": L1}, "kappa = <class .*> is out of range"),
    ({"lr": 0.5, "weight_decay": 2.1}, r"weight_decay = 2\.1 is out of range: at most 1 / lr = 2\.0"),
    ({"lr": torch.tensor(0.5), "weight_decay": 2.1}, r"weight_decay = 2\.1 is out of range"),
])  # fmt: skip
def test_options_out_of_range_are_named(options, message):
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=message):
        LionK([p], **options)
    with pytest.raises(ValueError, match=message):
        LionK([p]).add_param_group({"params": [nn.Parameter(torch.ones(2))], **options})


def test_a_schedule_that_lifts_the_rate_too_far_is_stopped():
    p = nn.Parameter(torch.ones(2))
    optimizer = Lion([p], lr=0.5, weight_decay=2.0)
    p.grad = torch.ones(2)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.6
    with pytest.raises(ValueError, match=r"weight_decay = 2\.0 is out of range: at most 1 / lr"):
        optimizer.step()
    assert torch.equal(p.detach(), torch.full((2,), -0.5))


class Coupled(LionK):
    """The broken variant: the decay is part of the gradient."""

    @staticmethod
    def rule(p, g, m, *, lr, t, betas, weight_decay, kappa, eps, rms_scale):
        options = {"betas": betas, "kappa": kappa, "eps": eps, "rms_scale": rms_scale}
        LionK.rule(p, g.add(p, alpha=weight_decay), m, lr=lr, t=t, weight_decay=0.0, **options)


class SignOnly(LionK):
    """Broken for the family: the kappa is forgotten."""

    def __init__(self, *args, kappa, **options):
        super().__init__(*args, **options)


def test_coupled_decay_and_a_forgotten_kappa_make_the_claim_fail():
    coupled = claim(Bench(), method=Coupled, cases=LION[1:], seeds=3, steps=600).checks[-1]
    assert coupled.name.startswith("violation after / before") and coupled.verdict == "does not hold"
    family = ("soft threshold", "l2")
    found = claim(Bench(), method=SignOnly, cases=family, seeds=2, steps=600).checks[:2]
    assert {check.verdict for check in found} == {"does not hold"}
    assert claim(Bench(), cases=(LION[1], *family), seeds=2, steps=600).verdict == "holds"
