"""Domains by their variational inequality, Hedge and the pool by their formulas, environments by counting."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.online import Ball, Box, DynamicOMD, OptimisticHedge, SEAEnvironment, Simplex, regret

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
CENTER = torch.tensor([0.5, -1.0, 0.0, 2.0], dtype=torch.float64)
DOMAINS = [Ball(0.8), Ball(1.5, CENTER), Box(-0.2, 0.5), Box(CENTER - 1, CENTER + 0.1), Simplex()]


def numbers(seed, *shape):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


@given(st.integers(0, 10**6), st.sampled_from(DOMAINS), st.floats(0.1, 10))
@settings(max_examples=60, deadline=None)
def test_projections_are_the_nearest_points(seed, domain, scale):
    x, others = scale * numbers(seed, 4), domain.project(numbers(seed + 1, 50, 4))
    y = domain.project(x)
    # The nearest point is the one from which no other point of the set lies on the side of x.
    assert ((others - y) @ (x - y)).max() <= 1e-12 * scale**2
    assert torch.equal(domain.project(y), y), "what was projected must stay"
    root = numbers(seed + 2, 4, 4)
    H = root @ root.T + 0.05 * torch.eye(4, dtype=torch.float64)
    z = domain.project_norm(x, H)
    assert ((others - z) @ (H @ (x - z))).max() <= 1e-8 * scale**2
    torch.testing.assert_close(domain.project(z), z, **CLOSE)
    torch.testing.assert_close(domain.project_norm(y, H), y, **CLOSE)
    torch.testing.assert_close(domain.project_norm(x, 3 * torch.eye(4, dtype=torch.float64)), y, rtol=1e-8, atol=1e-8)
    best = domain.argmin(x)
    assert (others @ x).min() >= x @ best - 1e-12 * scale
    torch.testing.assert_close(domain.project(best), best, **CLOSE)
    rows = torch.stack([x, y, 2 * x])
    torch.testing.assert_close(domain.project(rows), torch.stack([y, y, domain.project(2 * x)]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("domain", DOMAINS[:4], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_parts_are_projected_as_one_vector(domain, dtype):
    x = (3 * numbers(3, 4)).to(dtype)
    whole = torch.cat([part.flatten() for part in domain.project_parts([x[:3].view(3, 1), x[3]])])
    torch.testing.assert_close(
        whole, domain.project(x).to(dtype), rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-6
    )
    again = torch.cat([part.flatten() for part in domain.project_parts([whole[:3], whole[3:]])])
    assert torch.equal(again, whole)


def test_bad_domains_are_refused():
    with pytest.raises(ValueError, match=r"radius = 0 is out of range"):
        Ball(0)
    with pytest.raises(ValueError, match=r"hi = 0.0 is out of range: at least lo = 1.0"):
        Box(1.0, 0.0)


# --- Hedge


def hedge_by_hand(losses, hints, rate, prior, lazy):
    """Weights of all rounds in plain sums; ``rate(t)`` of round t from 1."""
    n, played, q = len(prior), [], [p / sum(prior) for p in prior]
    for t in range(1, len(losses) + 2):
        past = [sum(row[i] for row in losses[: t - 1]) for i in range(n)]
        base = [prior[i] * math.exp(-rate(t) * past[i]) for i in range(n)] if lazy else q
        p = [base[i] * math.exp(-rate(t) * hints[t - 1][i]) for i in range(n)]
        played.append([x / sum(p) for x in p])
        if t <= len(losses):
            q = [q[i] * math.exp(-rate(t) * losses[t - 1][i]) for i in range(n)]
            q = [x / sum(q) for x in q]
    return played


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("optimism", ["last_loss", "none", "external"])
@pytest.mark.parametrize("lr", [0.7, None])
def test_hedge_is_the_formula(lr, optimism, lazy):
    losses, guesses, prior = numbers(0, 12, 3).tolist(), numbers(1, 12, 3).tolist(), [1.0, 2.0, 0.5]
    zero = [0.0] * 3
    hints = {"last_loss": [zero, *losses], "none": [zero] * 13, "external": [zero, *guesses]}[optimism]
    missed = [max(abs(a - b) for a, b in zip(x, m, strict=True)) ** 2 for x, m in zip(losses, hints, strict=False)]

    def rate(t):
        return lr or min(0.6, math.sqrt(math.log(3) / (1 + sum(missed[: t - 1]))))

    hedge = OptimisticHedge(3, lr, prior=torch.tensor(prior), optimism=optimism, lazy=lazy, max_lr=0.6)
    found = [hedge.weights.tolist()]
    for loss, guess in zip(losses, guesses, strict=True):
        row, hint = (torch.tensor(values, dtype=torch.float64) for values in (loss, guess))
        found.append(hedge.update(row, hint if optimism == "external" else None).tolist())
    np.testing.assert_allclose(found, hedge_by_hand(losses, hints, rate, prior, lazy), rtol=1e-10)


def test_hedge_without_guesses_is_exponential_weights_and_stays_positive():
    losses = numbers(2, 30, 4)
    greedy, lazy = (OptimisticHedge(4, 0.3, optimism="none", lazy=lazy) for lazy in (False, True))
    for row in losses:
        torch.testing.assert_close(greedy.update(row), lazy.update(row), **CLOSE)
    torch.testing.assert_close(greedy.weights, torch.softmax(-0.3 * losses.sum(0), 0), **CLOSE)
    far = OptimisticHedge(2, 1.0)
    weights = far.update(torch.tensor([0.0, 1e6]))
    assert (weights > 0).all() and weights.sum() == 1
    assert OptimisticHedge(1).update(torch.tensor([3.0])).tolist() == [1.0]


def test_hedge_refuses_what_does_not_fit():
    for options, message in [
        ({"n": 0}, "n = 0 is out of range"),
        ({"n": 2, "lr": 0.0}, "lr = 0.0 is out of range"),
        ({"n": 2, "max_lr": -1.0}, "max_lr = -1.0 is out of range"),
        ({"n": 2, "prior": [1.0, 0.0]}, r"prior = \[1.0, 0.0\] is out of range: 2 positive weights"),
        ({"n": 2, "optimism": "best"}, "optimism = 'best' is out of range"),
    ]:
        with pytest.raises(ValueError, match=message):
            OptimisticHedge(**options)
    with pytest.raises(ValueError, match=r"losses.shape = \(3,\) is out of range: \(2,\)"):
        OptimisticHedge(2).update(torch.zeros(3))
    for optimism, hint in (("last_loss", torch.zeros(2)), ("external", None)):
        with pytest.raises(ValueError, match=r"hint = .* is out of range: given if, and only if"):
            OptimisticHedge(2, optimism=optimism).update(torch.zeros(2), hint)


# --- a comparator that moves


def test_dynamic_omd_is_the_formula():
    D, G, L, T, d = 2.0, 2.0, 0.25, 50, 3
    gradients, domain = numbers(4, 12, d), Ball(1.0)
    learner = DynamicOMD(d, diameter=D, lipschitz=G, smoothness=L, rounds=T)
    etas = [D / (G * T**0.5) * 2**i for i in range(3)]
    etas = [min(eta, 1 / (8 * L)) for eta in etas]
    assert learner.step_sizes.tolist() == pytest.approx(etas) and etas[-1] == 1 / (8 * L)
    xhat = x = last = torch.zeros(3, d, dtype=torch.float64)
    logq, missed, hint = torch.zeros(3, dtype=torch.float64), 0.0, torch.zeros(3, dtype=torch.float64)
    for g in gradients:
        rate = min(1 / (8 * D**2 * L), math.sqrt(math.log(3) / (1 + missed)))
        p = torch.softmax(logq - rate * hint, 0)
        torch.testing.assert_close(learner.decision, p @ x, **CLOSE)
        losses = x @ g + 2 * L * (x - last).square().sum(1)
        logq, missed = logq - rate * losses, missed + (losses - hint).abs().max().item() ** 2
        xhat = torch.stack([domain.project(row - eta * g) for row, eta in zip(xhat, etas, strict=True)])
        last, x = x, torch.stack([domain.project(row - eta * g) for row, eta in zip(xhat, etas, strict=True)])
        hint = x @ g + 2 * L * (x - last).square().sum(1)
        assert learner.update(g).norm() <= 1 + 1e-12


def test_dynamic_omd_follows_a_target_that_jumps():
    environment = SEAEnvironment(800, 3, flip_every=100, loss="quadratic", amplitude=0.5)
    learner = DynamicOMD(
        3, diameter=2.0, lipschitz=1.5, smoothness=1.0, rounds=800, start=torch.tensor([0.0, 1.0, 0.0])
    )
    assert learner.decision.tolist() == [0.0, 1.0, 0.0]
    decisions = []
    for f in environment:
        decisions.append(learner.decision)
        learner.update(f.grad(decisions[-1]))
    moving = regret(environment, torch.stack(decisions), environment.means)
    fixed = regret(environment, torch.zeros(800, 3, dtype=torch.float64), environment.means)
    assert moving < 0.6 * fixed
    for options, message in [
        ({"dim": 0}, "dim = 0 is out of range"),
        ({"rounds": 0}, "rounds = 0 is out of range"),
        ({"smoothness": 0.0}, "smoothness = 0.0 is out of range"),
    ]:
        with pytest.raises(ValueError, match=message):
            DynamicOMD(**{"dim": 2, "diameter": 1.0, "lipschitz": 1.0, "smoothness": 1.0, "rounds": 5, **options})
    with pytest.raises(ValueError, match=r"gradient.shape = \(2,\) is out of range: \(3,\)"):
        learner.update(torch.zeros(2))


# --- environments and regret


@pytest.mark.parametrize("loss", ["linear", "quadratic"])
def test_environments_have_the_variance_and_variation_they_say(loss):
    environment = SEAEnvironment(2000, 3, sigma=0.5, flip_every=75, loss=loss, amplitude=0.7, seed=3)
    x = torch.nn.functional.normalize(numbers(5, 50, 3), dim=1)  # all sup over the ball are on the sphere
    x = torch.cat([x, torch.tensor([[-1.0, 0.0, 0.0]], dtype=torch.float64)])
    noise = sum((f.grad(x[0]) - (f.mean if loss == "linear" else x[0] - f.mean)).square().sum() for f in environment)
    assert noise.item() == pytest.approx(environment.variance, rel=0.05) and environment.variance == 500
    variation, before = 0.0, torch.zeros_like(x)
    for f in environment:
        point = x.clone().requires_grad_()
        (now,) = torch.autograd.grad(f.expected(point).sum(), point)
        variation, before = variation + (now - before).square().sum(1).max().item(), now
    assert variation == pytest.approx(environment.variation(), rel=1e-9)
    assert torch.allclose(torch.autograd.grad(f(point).sum(), point)[0], f.grad(x))
    assert len(environment) == 2000 and environment[0].mean.tolist() == [0.7, 0.0, 0.0]
    assert environment.flips == 26 and environment[75].mean[0] == -0.7
    again = SEAEnvironment(2000, 3, sigma=0.5, flip_every=75, loss=loss, amplitude=0.7, seed=3)
    assert torch.equal(again.coefficients, environment.coefficients)


@pytest.mark.parametrize("domain", [Ball(0.8), Box(-0.2, 0.5), Simplex()], ids=str)
@pytest.mark.parametrize("loss", ["linear", "quadratic"])
def test_regret_against_the_best_fixed_point_is_the_largest(domain, loss):
    environment = SEAEnvironment(30, 3, sigma=1.0, flip_every=None, loss=loss)
    decisions = domain.project(numbers(6, 30, 3))
    best = regret(environment, decisions, environment.best_fixed(domain)).item()
    others = [regret(environment, decisions, u).item() for u in domain.project(numbers(7, 200, 3))]
    assert max(others) <= best + 1e-12
    by_hand = sum((f(x) - f(decisions[0])).item() for f, x in zip(environment, decisions, strict=True))
    assert regret(environment, decisions, decisions[0]).item() == pytest.approx(by_hand)
    assert regret(environment, decisions, decisions).item() == 0


def test_environments_and_regret_refuse_what_does_not_fit():
    for options, message in [
        ({"rounds": 0}, "rounds = 0 is out of range"),
        ({"flip_every": 0}, "flip_every = 0 is out of range"),
        ({"sigma": -1.0}, "sigma = -1.0 is out of range"),
        ({"loss": "cubic"}, "loss = 'cubic' is out of range"),
    ]:
        with pytest.raises(ValueError, match=message):
            SEAEnvironment(**{"rounds": 3, **options})
    with pytest.raises(ValueError, match=r"shapes \(3, 2\) and \(3,\) are out of range"):
        regret([torch.sum] * 3, torch.zeros(3, 2), torch.zeros(3))
    with pytest.raises(ValueError, match="losses of 2 rounds are out of range: 3"):
        regret([torch.sum] * 2, torch.zeros(3, 2), torch.zeros(2))
