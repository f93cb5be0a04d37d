"""Optimistic OMD against its formula on one plain vector, its bounds for any gradients, and as one of torch's."""

import copy
import functools
import io
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from assay.bench.arms import DEFAULT_RECIPE
from assay.bench.evidence import Bench
from assay.bench.loop import fit
from assay.bench.recipe import Budget
from assay.bench.tasks import resolve_task
from assay.online import Ball, Box, Simplex
from assay.optim import OptimisticOMD
from assay.optim import _contract as contract
from assay.optim.omd_sea import claim as room
from assay.optim.omd_sea.omd_sea import apply

OWN_STEP = {"OptimisticOMD"}
DISTRIBUTED = [
    (OptimisticOMD, {"diameter": 5.0, "domain": Ball(1.5)}),
    (OptimisticOMD, {"diameter": 5.0, "lipschitz": 2.0, "domain": Box(-0.3, 0.3)}),
    (OptimisticOMD, {"diameter": 5.0, "mode": "strongly_convex", "strong_convexity": 1.0, "optimism": "middle_grad"}),
]
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
SHAPES = [(2, 3), (4,)]
DOMAINS = {"free": None, "ball": Ball(0.7, 0.1), "box": Box(-0.2, 0.3), "simplex": Simplex()}
POOL = {"diameter": 1.5, "lipschitz": 3.0, "delta": 0.5}


def numbers(seed, *shape):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def walk(gradients, domain=None, start=None, shapes=SHAPES, **options):
    """x_1, ..., x_{T+1} as vectors, when the gradients come in turn; the parameters have these shapes."""
    sizes = [math.prod(shape) for shape in shapes]
    start = torch.zeros(sum(sizes), dtype=torch.float64) if start is None else start
    params = [nn.Parameter(x.view(s).clone()) for x, s in zip(start.split(sizes), shapes, strict=True)]
    optimizer = OptimisticOMD(params, domain=domain, **options)
    path = [torch.cat([p.detach().flatten() for p in params])]
    for g in gradients:
        for p, part in zip(params, g.split(sizes), strict=True):
            p.grad = part.view_as(p).clone()
        optimizer.step()
        path.append(torch.cat([p.detach().flatten() for p in params]))
    return torch.stack(path), optimizer


def formula(gradients, etas, project, start, optimism="last_grad"):
    """The same by the formula, with the step sizes given as a function of t and of V_{t-1}."""
    xhat, M, V, path, surprises = project(start), 0 * start, 0.0, [project(start)], []
    for t, g in enumerate(gradients, 1):
        xhat = project(xhat - etas(t, V) * g)
        surprises.append(((g - M) ** 2).sum().item())
        V += surprises[-1]
        M = g if optimism == "last_grad" else 0 * g
        path.append(project(xhat - etas(t + 1, V) * M))
    return torch.stack(path), surprises


@pytest.mark.parametrize("optimism", ["last_grad", "none"])
@pytest.mark.parametrize("name", DOMAINS)
def test_convex_and_strongly_convex_are_the_formula_on_one_vector(name, optimism):
    domain, gradients, start = DOMAINS[name], numbers(0, 20, 10), numbers(1, 10)
    project = domain.project if domain else lambda x: x
    path, optimizer = walk(gradients, domain, start, optimism=optimism, **POOL)
    by_hand, surprises = formula(gradients, lambda t, V: 1.5 / math.sqrt(0.5 + 36 + V), project, start, optimism)
    torch.testing.assert_close(path, by_hand, **CLOSE)
    etas = [1.5 / math.sqrt(36.5 + sum(surprises[:t])) for t in range(20)]
    bound = 1.5**2 / (2 * etas[-1]) + sum(eta * s for eta, s in zip(etas, surprises, strict=True))
    assert optimizer.regret_bound() == pytest.approx(bound, rel=1e-12)
    strong = {"diameter": None, "mode": "strongly_convex", "strong_convexity": 0.8}
    path, optimizer = walk(gradients, domain, start, optimism=optimism, **strong)
    by_hand, _ = formula(gradients, lambda t, V: 2 / (0.8 * t), project, start, optimism)
    torch.testing.assert_close(path, by_hand, **CLOSE)
    assert optimizer.regret_bound() == math.inf


@pytest.mark.parametrize("name", DOMAINS)
def test_exp_concave_is_the_formula_on_one_vector(name):
    domain, gradients, start = DOMAINS[name], numbers(2, 15, 10), numbers(3, 10)
    path, optimizer = walk(gradients, domain, start, mode="exp_concave", exp_concavity=0.2, **POOL)
    beta = 0.5 * min(1 / (4 * 3.0 * 1.5), 0.2)
    H = (1 + beta / 2 * 9) * torch.eye(10, dtype=torch.float64)
    project = domain.project_norm if domain else lambda x, H: x
    xhat = domain.project(start) if domain else start
    by_hand = [xhat]
    for g in gradients:
        xhat = project(xhat - torch.linalg.solve(H, g), H)
        H = H + beta / 2 * torch.outer(g, g)
        by_hand.append(project(xhat - torch.linalg.solve(H, g), H))
    torch.testing.assert_close(path, torch.stack(by_hand), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(optimizer.param_groups[0]["H"], H, **CLOSE)
    torch.testing.assert_close(optimizer.param_groups[0]["H_inverse"], torch.linalg.inv(H), **CLOSE)


def test_without_a_lipschitz_constant_it_is_the_largest_norm_so_far():
    gradients = numbers(4, 6, 10) * torch.tensor([1.0, 3.0, 0.1, 0.1, 9.0, 1.0], dtype=torch.float64)[:, None]
    norms = gradients.norm(dim=1).tolist()
    path, _ = walk(gradients, Ball(), diameter=2.0)

    def eta(t, V):
        return 2 / math.sqrt(1 + 4 * max(norms[: max(1, t - 1)]) ** 2 + V)

    by_hand, _ = formula(gradients, eta, Ball().project, torch.zeros(10, dtype=torch.float64))
    torch.testing.assert_close(path, by_hand, **CLOSE)


@given(st.integers(0, 10**6), st.sampled_from(["ball", "box", "simplex"]), st.floats(0.01, 100), st.booleans())
@settings(max_examples=40, deadline=None)
def test_the_bound_holds_for_any_gradients(seed, name, scale, repeats):
    domain = DOMAINS[name]
    gradients = scale * numbers(seed, 25, 10)
    if repeats:
        gradients = gradients[:5].repeat_interleave(5, 0)
    diameter = {"ball": 1.4, "box": 0.5 * 10**0.5, "simplex": 2**0.5}[name]
    for lipschitz in (None, scale / 10):
        path, optimizer = walk(gradients, domain, diameter=diameter, lipschitz=lipschitz)
        best = domain.argmin(gradients.sum(0))
        assert ((path[:-1] - best) * gradients).sum() <= optimizer.regret_bound() * (1 + 1e-12)


def quadratics(seed, strong):
    """Losses: 1/2 ||x - c||^2, or 1/2 (<a, x> - b)^2, whose exp-concavity is 1 / (largest residual)^2."""
    c, b = numbers(seed, 60, 3), numbers(seed + 1, 60)
    if strong:
        return [lambda x, c=c: 0.5 * (x - c).square().sum(-1) for c in c]
    a = c / c.norm(dim=1, keepdim=True)
    return [lambda x, a=a, b=b: 0.5 * (x @ a - b).square() for a, b in zip(a, b.clamp(-1, 1), strict=True)]


@pytest.mark.parametrize("mode", ["strongly_convex", "exp_concave"])
@pytest.mark.parametrize("optimism", ["last_grad", "middle_grad", "none"])
def test_bounds_of_the_other_modes_hold_for_their_losses(mode, optimism):
    for seed in range(3):
        losses = quadratics(seed, mode == "strongly_convex")
        x = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        options = {"lipschitz": 2.0, "strong_convexity": 1.0, "exp_concavity": 0.25, "optimism": optimism}
        optimizer = OptimisticOMD([x], diameter=2.0, mode=mode, domain=Ball(), **options)
        total, played = 0.0, []
        for f in losses:
            played.append(x.detach().clone())
            total += optimizer.step(functools.partial(backward, optimizer, f, x)).item()
        points = torch.nn.functional.normalize(numbers(9, 2000, 3), dim=1) * torch.rand(2000, 1).double()
        best = sum(f(points) for f in losses).min().item()
        assert total - best <= optimizer.regret_bound()
        with optimizer.eval_params():
            torch.testing.assert_close(x.detach(), torch.stack(played).mean(0), **CLOSE)
        assert not torch.equal(x, torch.stack(played).mean(0))


def backward(optimizer, f, x):
    optimizer.zero_grad()
    loss = f(x)
    loss.backward()
    return loss


def test_constant_gradients_are_guessed():
    g = numbers(5, 1, 10)
    path, optimizer = walk(g.repeat(200, 1), Ball(), diameter=2.0, lipschitz=4.0)
    bounds = [walk(g.repeat(n, 1), Ball(), diameter=2.0, lipschitz=4.0)[1].regret_bound() for n in (2, 200)]
    group = optimizer.param_groups[0]
    assert group["V"] == pytest.approx(g.square().sum().item(), rel=1e-12) and bounds[0] == pytest.approx(bounds[1])
    assert ((path[:-1] * g).sum() + 200 * g.norm()).item() <= bounds[1]
    assert path.norm(dim=1).max() <= 1 + 1e-12


def test_unconstrained_with_one_step_size_it_is_the_optimistic_gradient():
    gradients = numbers(6, 30, 10)
    path, _ = walk(gradients, diameter=3e8, lipschitz=1e-9, delta=1e18)  # eta = 0.3, but for 1e-17 of it
    torch.testing.assert_close(path[1], -0.6 * gradients[0], rtol=1e-12, atol=1e-12)
    for t in range(1, 30):
        expected = path[t] - 0.6 * gradients[t] + 0.3 * gradients[t - 1]
        torch.testing.assert_close(path[t + 1], expected, rtol=1e-12, atol=1e-12)


def test_schedulers_drive_the_step_size_and_the_bound_knows():
    rates, gradients = [0.1, 0.2, 0.05, 0.3, 0.3, 0.02], numbers(7, 5, 10)
    x = nn.Parameter(torch.zeros(10, dtype=torch.float64))
    optimizer = OptimisticOMD([x], diameter=1e9, lipschitz=1e-9, delta=1e18, domain=Ball())  # eta is the factor
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: rates[t])
    path = [x.detach().clone()]
    for g in gradients:
        x.grad = g.clone()
        optimizer.step()
        scheduler.step()
        path.append(x.detach().clone())
    # A point is played with the rate that held when it was chosen: the scheduler's change comes a round later.
    used = [rates[0], *rates[:5]]
    by_hand, surprises = formula(gradients, lambda t, V: used[t - 1], Ball().project, torch.zeros(10).double())
    torch.testing.assert_close(torch.stack(path), by_hand, **CLOSE)
    steep = [1 / (2 * rate) for rate in used[:5]]
    growth = steep[0] + sum(max(0, b - a) for a, b in itertools.pairwise(steep))
    bound = 1e18 * growth + sum(rate * s for rate, s in zip(used, surprises, strict=False))
    assert optimizer.regret_bound() == pytest.approx(bound, rel=1e-9)
    strong = OptimisticOMD([x], diameter=1.0, mode="strongly_convex", strong_convexity=1.0)
    strong.step()
    assert strong.regret_bound() < math.inf
    strong.param_groups[0]["lr"] = 0.5
    strong.step()
    strong.step()
    assert strong.regret_bound() == math.inf


@pytest.mark.parametrize("mode", ["convex", "strongly_convex", "exp_concave"])
def test_other_guesses_are_those_that_were_asked_for(mode):
    options = {**POOL, "mode": mode, "strong_convexity": 0.9, "exp_concavity": 0.5, "domain": Ball(2.0)}
    target = numbers(8, 6)
    first, second = (nn.Parameter(torch.zeros(6, dtype=torch.float64)) for _ in range(2))
    middle, external = (
        OptimisticOMD([p], optimism=o, **options) for p, o in ((first, "middle_grad"), (second, "external"))
    )
    seen = []

    def closure():
        seen.append(first.detach().clone())
        return backward(middle, lambda x: (x - target).square().sum() * 0.2 * len(seen), first)

    for t in range(6):
        middle.step(closure)
        played, corrected = seen[-2:]
        second.grad = 0.4 * (played - target) * (2 * t + 1)
        external.step(hint=[0.4 * (corrected - target) * (2 * t + 2)])
        torch.testing.assert_close(first, second, **CLOSE)
        torch.testing.assert_close(external.state[second]["xhat"], corrected, **CLOSE)
    assert external.regret_bound() == pytest.approx(middle.regret_bound(), rel=1e-9)


SAFE = [
    contract.resuming_from_a_state_dict_is_bit_exact,
    contract.copies_go_on_alike,
    contract.gradients_are_not_written,
    contract.without_a_gradient_nothing_moves,
    contract.a_closure_is_called_with_gradients_on,
    contract.bfloat16_stays_finite_and_bfloat16,
    contract.parameters_may_come_from_a_generator,
]


@pytest.mark.parametrize("check", SAFE, ids=lambda check: check.__name__)
@pytest.mark.parametrize("domain", [None, Ball(20.0), Box(-0.5, 2.0), Simplex()], ids=str)
def test_it_is_one_of_torchs(check, domain):
    if domain is not None and check is contract.a_closure_is_called_with_gradients_on:
        domain = Ball(50.0)  # the loss that it expects is that of a point outside of the others
    check(functools.partial(OptimisticOMD, diameter=3.0, domain=domain))


def test_resuming_with_a_matrix_is_bit_exact():
    def make(params):
        return OptimisticOMD(params, mode="exp_concave", exp_concavity=0.5, domain=Ball(0.8), **POOL)

    p = nn.Parameter(torch.zeros(5))
    optimizer, gradients = make([p]), numbers(10, 8, 5).float()
    for step, g in enumerate(gradients):
        if step == 4:
            saved = io.BytesIO()
            torch.save([optimizer.state_dict(), p.detach()], saved)
            saved.seek(0)
            state, point = torch.load(saved, weights_only=True)
            q = nn.Parameter(point.clone())
            resumed = make([q])
            resumed.load_state_dict(state)
            pairs = [(p, optimizer), (q, resumed), copy.deepcopy((q, resumed))]
        for x, one in [(p, optimizer)] if step < 4 else pairs:
            x.grad = g.clone()
            one.step()
    assert torch.equal(p, q) and torch.equal(p, pairs[2][0])
    assert all(one.regret_bound() == optimizer.regret_bound() for _, one in pairs)


def test_groups_are_learners_of_their_own():
    one, other = (nn.Parameter(torch.zeros(3, dtype=torch.float64)) for _ in range(2))
    together = OptimisticOMD([{"params": [one]}], diameter=2.0, lipschitz=1.0)
    together.add_param_group(
        {"params": [other], "mode": "strongly_convex", "strong_convexity": 2.0, "domain": Ball(0.5)}
    )
    gradients = numbers(11, 6, 6)
    for g in gradients:
        one.grad, other.grad = g[:3].clone(), g[3:].clone()
        together.step()
    first, a = walk(gradients[:, :3], shapes=[(3,)], diameter=2.0, lipschitz=1.0)
    strong = {"diameter": 2.0, "mode": "strongly_convex", "strong_convexity": 2.0}
    second, b = walk(gradients[:, 3:], Ball(0.5), shapes=[(3,)], **strong)
    torch.testing.assert_close(torch.stack([one, other]).detach(), torch.stack([first[-1], second[-1]]), **CLOSE)
    assert together.regret_bound() == pytest.approx(a.regret_bound() + b.regret_bound(), rel=1e-12)
    together.load_state_dict(together.state_dict())
    assert together.param_groups[1]["domain"].radius == 0.5


def test_what_it_cannot_use_is_refused_by_name():
    p = nn.Parameter(torch.ones(3))
    for options, message in [
        ({"diameter": 0.0}, "diameter = 0.0 is out of range"),
        ({"diameter": None}, "diameter = None is out of range: mode = 'convex' needs"),
        ({"lipschitz": -1.0}, "lipschitz = -1.0 is out of range"),
        ({"delta": 0.0}, "delta = 0.0 is out of range"),
        ({"delta": math.nan}, "delta = nan is out of range"),
        ({"mode": "concave"}, "mode = 'concave' is out of range: 'convex'"),
        ({"mode": "strongly_convex"}, "strong_convexity = None is out of range"),
        ({"mode": "exp_concave", "exp_concavity": 1.0}, "lipschitz = None is out of range"),
        ({"optimism": "best"}, "optimism = 'best' is out of range: 'last_grad'"),
        ({"domain": 3}, r"domain = 3 is out of range: an object with project\(\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            OptimisticOMD([p], **{"diameter": 1.0, **options})
    optimizer = OptimisticOMD([p], diameter=1.0)
    with pytest.raises(ValueError, match="lr = -1 is out of range"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": -1})
    with pytest.raises(ValueError, match="optimism = 'none' is out of range: all groups"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "optimism": "none"})
    matrix = {"mode": "exp_concave", "lipschitz": 1.0, "exp_concavity": 1.0}
    with pytest.raises(ValueError, match="params of 4097 elements"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(4097))], **matrix})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(TypeError, match="has no option 'speed'"):
        OptimisticOMD([{"params": [p], "speed": 1}], diameter=1.0)
    with pytest.raises(RuntimeError, match="hint is to be given"):
        optimizer.step(hint=[torch.ones(3)])
    with pytest.raises(RuntimeError, match="hint is to be given"):
        OptimisticOMD([p], diameter=1.0, optimism="external").step()
    with pytest.raises(RuntimeError, match="needs a second gradient"):
        OptimisticOMD([p], diameter=1.0, optimism="middle_grad").step()
    p.grad = torch.ones(3).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    c = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    c.grad = torch.ones_like(c)
    with pytest.raises(RuntimeError, match="complex"):
        OptimisticOMD([c], diameter=1.0).step()
    p.to_local = lambda: p
    for options in (matrix, {"domain": Simplex()}):
        with pytest.raises(RuntimeError, match="does not support sharded parameters"):
            OptimisticOMD([p], diameter=1.0, **options)
    with pytest.raises(RuntimeError, match="does not support sharded parameters"):
        Ball(1.0, torch.zeros(3)).project_parts([p])
    two = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))]
    partial = OptimisticOMD(two, diameter=1.0, **matrix)
    for p in two:
        p.grad = torch.ones(2)
    partial.step()
    two[0].grad = None
    with pytest.raises(RuntimeError, match="needs a gradient of every parameter"):
        partial.step()


def test_in_the_bench_it_is_the_update():
    task, budget = resolve_task("tabular"), Budget(steps=8, batch_size=32, evaluations=0)

    def by_hand(run):
        return OptimisticOMD(run.model.parameters(), diameter=3.0)

    ones, others = (
        fit(recipe, task, budget, 7).model.state_dict()
        for recipe in (apply(DEFAULT_RECIPE, diameter=3.0), replace(DEFAULT_RECIPE, update=by_hand))
    )
    torch.testing.assert_close(ones, others, rtol=0, atol=0)


# --- the claim


class Squares(OptimisticOMD):
    """Broken: V sums squared gradients, not squared surprises, as AdaGrad does."""

    def _correct(self, group, params):
        (p,) = params
        guess = self.state[p].get("M", torch.zeros_like(p))
        group["V"] += (p.grad.square().sum() - (p.grad - guess).square().sum()).item()
        super()._correct(group, params)


NoGuess = functools.partial(OptimisticOMD, optimism="none")


@pytest.mark.parametrize(
    ("method", "verdict"),
    [(OptimisticOMD, "holds"), (NoGuess, "does not hold"), (Squares, "does not hold")],
    ids=["OptimisticOMD", "NoGuess", "Squares"],
)
def test_broken_variants_are_found_out(method, verdict):
    evidence = room.claim(Bench(quick=True), method=method, settings=[room.SLOW])
    decisive = [check for check in evidence.checks if "regret of OMD minus that of" in check.name]
    assert {check.verdict for check in decisive} == {verdict} and len(decisive) == 2
