from __future__ import annotations

import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import median_filter
from scipy.optimize import minimize
from torch import nn

from assay.bench.arms import DEFAULT_RECIPE
from assay.bench.evidence import FAILS, Bench
from assay.bench.loop import fit
from assay.bench.recipe import Budget
from assay.bench.tasks import resolve_task
from assay.optim import GradNormRecorder, refine_schedule, schedule_bound
from assay.optim.refined_schedule.claim import claim, figure, no_tail_sum
from assay.optim.refined_schedule.refined_schedule import apply

METHODS = ["closed-form", "numerical"]
norm_lists = st.lists(st.floats(0.01, 100), min_size=2, max_size=60)


def noisy_norms(steps: int = 200, seed: int = 0) -> np.ndarray:
    """Like those of a network: large at first, rising towards the end, with noise of 30 %."""
    t = np.linspace(0, 1, steps)
    return (5 * np.exp(-t / 0.03) + 1 + t) * np.exp(0.3 * np.random.default_rng(seed).standard_normal(steps))


def paper_schedule(norms: list[float], power: float) -> list[float]:
    """The closed form, from the sum over p = t+1..T itself."""
    w = [norm**-power for norm in norms]
    return [w[t] * sum(w[t + 1 :]) / sum(w) for t in range(len(w))]


def paper_median(norms: list[float], smoothing: float) -> list[float]:
    """The running median, one window at a time: to the left the first value again, to the right the mirrored run."""
    steps, half = len(norms), int(smoothing * len(norms)) // 2

    def at(i: int) -> float:
        i = max(i, 0) % (2 * (steps - 1))
        return norms[i] if i < steps else norms[2 * (steps - 1) - i]

    return [sorted(at(t + k) for k in range(-half, half + 1))[half] for t in range(steps)]


def last_iterate_bound(eta: np.ndarray, costs: np.ndarray) -> float:
    """The bound for any step sizes as the paper states it (with D = 1): a sum over windows that end with the run."""
    total = (1 + sum(eta**2 * costs)) / (2 * sum(eta))
    for k in range(len(eta) - 1):
        after, here = sum(eta[k + 1 :]), sum(eta[k:])
        total += eta[k] / after * sum(eta[k:] ** 2 * costs[k:]) / here / 2
    return total


# --- refine_schedule


@pytest.mark.parametrize("power", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("steps", [2, 3, 19, 100])
def test_closed_form_and_median_are_those_of_the_paper(power, smoothing, steps):
    norms = noisy_norms(steps).tolist()
    expected = paper_schedule(paper_median(norms, smoothing), power)
    options = {"power": power, "smoothing": smoothing}
    np.testing.assert_allclose(refine_schedule(norms, normalize=False, **options), expected, rtol=1e-10, atol=0)
    np.testing.assert_allclose(refine_schedule(norms, **options), np.divide(expected, max(expected)), rtol=1e-10)


@pytest.mark.parametrize("smoothing, width", [(0.1, 101), (0.0999, 99), (0.25, 251), (0.001, 1)])
def test_the_median_is_the_scipy_recipe(smoothing, width):
    norms = noisy_norms(1000)
    padded = np.pad(norms, (0, 2 * width), mode="reflect")
    smooth = median_filter(padded, size=width, mode="nearest")[: -2 * width]
    assert (refine_schedule(norms, smoothing=smoothing) == refine_schedule(smooth, smoothing=0)).all()


@pytest.mark.parametrize("steps", [2, 5, 1000])
def test_equal_norms_give_linear_decay_to_zero(steps):
    t = np.arange(1, steps + 1)
    eta = refine_schedule(np.full(steps, 3.0))
    np.testing.assert_allclose(eta, (steps - t) / (steps - 1), rtol=0, atol=1e-12)
    assert eta[-1] == 0 and eta.dtype == np.float64


@given(norm_lists, st.sampled_from([0.5, 1.0, 2.0]), st.floats(0, 1), st.sampled_from([1e-150, 1e-3, 7.0, 1e150]))
@settings(max_examples=100, deadline=None)
def test_the_scale_of_the_norms_does_not_matter(norms, power, smoothing, scale):
    for method in METHODS:
        options = {"power": power, "smoothing": smoothing, "method": method}
        eta = refine_schedule(norms, **options)
        np.testing.assert_allclose(refine_schedule(np.multiply(norms, scale), **options), eta, rtol=1e-9)
        assert eta.max() == 1 and eta.min() >= 0 and (eta[-1] == 0) == (method == "closed-form")


def test_large_early_norms_give_a_warm_up():
    """A schedule that ignores the norms would be linear decay, which never rises."""
    norms = np.r_[np.full(30, 15.0), np.ones(970)]
    for method in METHODS:
        assert refine_schedule(norms, smoothing=0.02, method=method)[0] < 0.01
    eta = refine_schedule(15 ** np.clip(1 - np.arange(1000) / 100, 0, 1), smoothing=0.01)
    assert (np.diff(eta[:90]) > 0).all() and (np.diff(eta[110:]) < 0).all()


def test_norms_that_grow_towards_the_end_give_a_faster_decay():
    eta = refine_schedule(np.linspace(1, 3, 500))
    assert (eta[50:-1] < refine_schedule(np.ones(500))[50:-1]).all()


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_one_spike_leaves_no_trace(power):
    norms = noisy_norms(1000)
    eta = refine_schedule(norms, power=power)
    for t in (1, 2, 40, 500, 900, 998, 999):
        spiky = norms.copy()
        spiky[t] *= 1000
        np.testing.assert_allclose(refine_schedule(spiky, power=power), eta, rtol=0, atol=0.05)


def test_the_first_norm_alone_decides_the_first_entry():
    """More than half of the first window is the first norm itself, the one value that the median cannot smooth."""
    norms = np.r_[1e-3, np.ones(999)]
    eta = refine_schedule(norms)
    assert eta[0] == 1 and eta[1:].max() < 2e-6
    np.testing.assert_allclose(refine_schedule(norms[1:]), refine_schedule(np.ones(999)), rtol=1e-9)


def test_another_number_of_steps_resamples_on_the_unit_interval():
    norms = noisy_norms(100)
    for steps in (2, 37, 100, 450):
        resampled = [np.interp(k / (steps - 1) * 99, range(100), norms) for k in range(steps)]
        np.testing.assert_allclose(refine_schedule(norms, total_steps=steps), refine_schedule(resampled), rtol=1e-9)
    assert (refine_schedule([3.0], total_steps=3) == [1, 0.5, 0]).all()


def test_norms_that_are_not_finite_are_dropped_and_counted():
    norms = noisy_norms(50)
    holes = np.insert(norms, [0, 10, 50], [np.nan, np.inf, np.nan])
    with pytest.warns(UserWarning, match="dropped 3 of 53 gradient norms"):
        eta = refine_schedule(holes)
    assert (eta == refine_schedule(norms)).all()


@pytest.mark.parametrize(
    "norms, options, message",
    [
        ([], {}, "no finite value"),
        ([1.0, 0.0], {}, r"holds 0\.0, which is out of range: > 0"),
        ([1.0, -2.0, 3.0], {}, r"holds -2\.0, which is out of range: > 0"),
        ([[1.0, 2.0]], {}, r"shape \(1, 2\)"),
        ([1.0], {}, "total_steps = 1 is out of range"),
        ([1.0, 2.0], {"total_steps": 0}, "total_steps = 0 is out of range"),
        ([1.0, 2.0], {"total_steps": 2.5}, r"total_steps = 2\.5 is out of range"),
        ([1.0, 2.0], {"power": -1}, "power = -1 is out of range"),
        ([1.0, 2.0], {"power": float("nan")}, "power = nan is out of range"),
        ([1.0, 2.0], {"smoothing": 1.1}, r"smoothing = 1\.1 is out of range"),
        ([1.0, 2.0], {"smoothing": -0.1}, r"smoothing = -0\.1 is out of range"),
        ([1.0, 2.0], {"method": "newton"}, "method = 'newton' is out of range"),
    ],
)
def test_bad_arguments_are_refused(norms, options, message):
    with pytest.raises(ValueError, match=message):
        refine_schedule(norms, **options)
    with pytest.raises(ValueError, match="no finite value"), warnings.catch_warnings(action="ignore"):
        refine_schedule([np.nan, np.inf])


# --- the theory behind it


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_the_numerical_schedule_minimizes_the_last_iterate_bound(power):
    """Against L-BFGS-B on the bound as stated, from linear decay."""
    norms = noisy_norms(25)
    eta = refine_schedule(norms, power=power, smoothing=0, normalize=False, method="numerical")
    costs = norms**power
    start = np.linspace(1, 0.1, 25) / np.sqrt(costs.sum())
    found = minimize(
        last_iterate_bound, start, (costs,), "L-BFGS-B", bounds=[(1e-8, None)] * 25, options={"ftol": 1e-14}
    )
    assert last_iterate_bound(eta, costs) <= found.fun
    np.testing.assert_allclose(eta, found.x, rtol=2e-2)
    assert found.fun < last_iterate_bound(eta, costs) * (1 + 1e-6)
    for t in range(25):
        step = np.eye(25)[t] * eta[t] * 1e-4
        slope = (last_iterate_bound(eta + step, costs) - last_iterate_bound(eta - step, costs)) / 2e-4
        assert abs(slope) < 1e-7 * last_iterate_bound(eta, costs)


def best_scale(weights: np.ndarray, norms: np.ndarray, distance: float) -> np.ndarray:
    return weights * distance / np.sqrt(np.sum((weights * norms) ** 2))


def test_inverse_squared_norms_are_the_weights_with_the_least_bound():
    rng, norms = np.random.default_rng(0), noisy_norms(40)
    best = schedule_bound(best_scale(norms**-2, norms, 3.0), norms, 3.0)
    assert best == pytest.approx(3.0 / np.sqrt(np.sum(norms**-2)), rel=1e-12)
    for weights in rng.lognormal(sigma=rng.uniform(0, 2, (1000, 1)), size=(1000, 40)) * norms**-2:
        assert schedule_bound(best_scale(weights, norms, 3.0), norms, 3.0) > best
    assert schedule_bound(2 * best_scale(norms**-2, norms, 3.0), norms, 3.0) > best


def test_the_bound_by_hand():
    assert schedule_bound([1.0, 2.0], [3.0, 0.5], distance=2.0) == (4 + 9 + 1) / 6
    for arguments, message in [
        (([1.0], [1.0, 2.0]), "weights of shape"),
        (([0.0, 0.0], [1.0, 2.0]), "weights are all zero"),
        (([-1.0, 2.0], [1.0, 2.0]), "weights holds -1"),
        (([1.0, 2.0], [1.0, np.inf]), "grad_norms holds"),
        (([1.0, 2.0], [1.0, 2.0], 0.0), r"distance = 0\.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            schedule_bound(*arguments)


def descend(start: np.ndarray, eta: np.ndarray) -> tuple[float, np.ndarray]:
    """Subgradient descent on sum |x|: the value at x_T and the norms G_1..G_T."""
    x, norms = start.copy(), []
    for step in eta:
        last, g = x, np.sign(x)
        norms.append(np.linalg.norm(g))
        x = x - step * g
    return np.abs(last).sum(), np.array(norms)


def test_the_last_iterate_keeps_both_bounds():
    rng = np.random.default_rng(1)
    for _ in range(200):
        start = rng.standard_normal(4)
        distance = np.linalg.norm(start)
        weights = rng.lognormal(sigma=1.5, size=20) * rng.choice([0.01, 0.1, 1])
        value, norms = descend(start, np.array(paper_schedule(weights, -1.0)))
        assert value <= schedule_bound(weights, norms, distance)
        value, norms = descend(start, weights)
        assert value <= last_iterate_bound(weights / distance, norms**2) * distance


# --- in the bench


def recorded_run(optimizer: str, norm: str, **options):
    """The factors that a run with the refined schedule used, and the norms of its pilot recorded from outside."""
    make = {"sgd": lambda run: torch.optim.SGD(run.model.parameters(), 0.05), "adamw": DEFAULT_RECIPE.update}[optimizer]
    base = replace(DEFAULT_RECIPE, update=make)
    task, budget = resolve_task("digits(model='mlp')"), Budget(steps=40, batch_size=32, evaluations=0)
    recorders, factors = {}, []

    def watched(run):
        factor = apply(base, **options).schedule(run)
        return lambda progress: factors.append(factor(progress)) or factors[-1]

    def outside(run):
        recorders.setdefault("pilot", GradNormRecorder(run.model.parameters(), norm)).record()

    pilot_steps = round(40 * options.get("pilot", 1.0))
    fit(base, task, replace(budget, steps=pilot_steps), 7, before_update=outside)
    result = fit(replace(base, schedule=watched), task, budget, 7)
    return np.array(factors), recorders["pilot"].norms, result


@pytest.mark.parametrize("optimizer, norm, power", [("sgd", "l2", 2.0), ("adamw", "l1", 1.0)])
def test_in_the_bench_a_pilot_gives_the_norms(optimizer, norm, power):
    factors, norms, result = recorded_run(optimizer, norm, smoothing=0.2)
    np.testing.assert_allclose(factors, refine_schedule(norms, power=power, smoothing=0.2), rtol=1e-6, atol=1e-12)
    assert result.preparation > 0


def test_in_the_bench_a_pilot_may_be_short():
    factors, norms, _ = recorded_run("adamw", "l1", pilot=0.5, method="numerical")
    assert len(norms) == 20 and len(factors) == 40
    stretched = np.interp(np.arange(40) / 40, np.arange(20) / 20, norms)
    np.testing.assert_allclose(factors, refine_schedule(stretched, power=1, method="numerical"), rtol=1e-6, atol=1e-12)


def test_in_the_bench_a_pilot_that_tells_nothing_leaves_the_schedule():
    for status, gradient in [("diverged", torch.ones(2)), ("finished", torch.zeros(2))]:
        model = nn.Module()
        model.weight = nn.Parameter(torch.zeros(2))
        model.weight.grad = gradient
        trial = SimpleNamespace(model=model, progress=0.0)

        def pilot(recipe, *, fraction, before_update, trial=trial, status=status):
            before_update(trial)
            return SimpleNamespace(status=status)

        run = SimpleNamespace(fit=pilot, optimizer=torch.optim.SGD([torch.zeros(1)]), budget=Budget(steps=4))
        assert apply(DEFAULT_RECIPE).schedule(run) is DEFAULT_RECIPE.schedule(run)


def test_in_the_bench_bad_options_are_refused_before_training():
    for options in ({"smoothing": 2.0}, {"method": "newton"}, {"pilot": 0.0}, {"pilot": 1.5}):
        with pytest.raises(ValueError, match="is out of range"):
            apply(DEFAULT_RECIPE, **options)


# --- the claim


def test_the_claim_does_not_hold_without_the_tail_sum():
    few = {"problems": ["diabetes"], "schedules": ["linear", "refined"], "seeds": 20}
    broken = claim(Bench(), method=no_tail_sum, **few)
    assert [check.verdict for check in broken.checks] == [FAILS]
    real = claim(Bench(), **few | {"seeds": 6})
    assert real.verdict != FAILS
    assert figure(real) is not None
