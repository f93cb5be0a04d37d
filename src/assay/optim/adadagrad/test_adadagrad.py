from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import TensorDataset

from assay.bench import Bench, Budget, fit
from assay.bench.arms import DEFAULT_RECIPE
from assay.bench.tasks import Task
from assay.optim import (
    AdaGradNorm,
    AdaptiveBatchSize,
    augmented_inner_product_test,
    coordinate_norm_test,
    gradient_moments,
)
from assay.optim.adadagrad.adadagrad import apply
from assay.optim.adadagrad.batch_tests import MOMENT_TESTS
from assay.optim.adadagrad.claim import claim
from assay.optim.adadagrad.test_batch_tests import FOUR, gradients
from assay.optim.adadagrad.test_sampler import saved

DISTRIBUTED = [(AdaGradNorm, {"lr": 0.3, "weight_decay": 0.1})]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(2, 30), st.floats(0.0, 2.0)), min_size=1, max_size=8), st.sampled_from(FOUR))
def test_sizes_only_grow_up_to_the_cap(batches, test):
    name = test.__name__.removesuffix("_test")
    controller = AdaptiveBatchSize(4, max_batch_size=100, test=name, eta=0.5, theta=0.5, nu=0.5)
    sizes = [controller.size]
    for seed, (b, drift) in enumerate(batches):
        grads = gradients(b, seed, drift)
        sizes.append(controller.update(grads))
        found = test(grads, 0.5, 0.5) if test is augmented_inner_product_test else test(grads, 0.5)
        wanted = sizes[-2] if found.passed or sizes[-2] == 100 else max(sizes[-2], found.size)
        assert sizes[-1] == controller.size == min(wanted, 100)
        assert isinstance(sizes[-1], int)
    assert sizes == sorted(sizes)


def test_update_from_moments_is_update():
    grads = gradients(8)
    for name in MOMENT_TESTS:
        one, two = (AdaptiveBatchSize(8, max_batch_size=10**9, test=name) for _ in range(2))
        one.update(grads)
        two.update_from_moments(*gradient_moments([grads], inner=True))
        assert (one.size, one.last) == (two.size, two.last)
        if name != "norm":
            with pytest.raises(ValueError, match="inner_variance"):
                AdaptiveBatchSize(8, max_batch_size=9, test=name).update_from_moments(1.0, 1.0, 8)
    assert AdaptiveBatchSize(8, max_batch_size=99).update_from_moments(torch.tensor(4.0), torch.tensor(2.0), 8) == 50
    with pytest.raises(ValueError, match="coordinate_norm"):
        AdaptiveBatchSize(8, max_batch_size=9, test="coordinate_norm").update_from_moments(1.0, 1.0, 8)


def test_coordinate_norm_controls_too():
    controller = AdaptiveBatchSize(8, max_batch_size=10**9, test="coordinate_norm", eta=0.5, quantile=0.9)
    assert controller.update(gradients(8)) == coordinate_norm_test(gradients(8), 0.5, 0.9).size


@pytest.mark.filterwarnings("ignore:the mean gradient is zero")
def test_growth_limit_interval_and_cap():
    nothing = torch.tensor([[1.0], [-1.0]])
    controller = AdaptiveBatchSize(2, max_batch_size=20, max_growth=1.6, interval=3)
    assert [controller.due(step) for step in range(4)] == [True, False, False, True]
    assert [controller.update(nothing) for _ in range(7)] == [3, 4, 6, 9, 14, 20, 20]
    assert not controller.due(0)
    last = controller.last
    assert controller.update(gradients(8)) == 20
    assert controller.last is last  # at the cap nothing is computed


@pytest.mark.parametrize("name", [*MOMENT_TESTS, "coordinate_norm"])
@pytest.mark.parametrize("grads", [[[1.0, -2.0], [-1.0, 2.0]], [[0.0, 0.0], [0.0, 0.0]]])
def test_zero_mean_gradient_asks_for_everything(name, grads):
    controller = AdaptiveBatchSize(2, max_batch_size=64, test=name)
    with pytest.warns(UserWarning, match="mean gradient is zero"):
        assert controller.update(torch.tensor(grads)) == 64
    assert not math.isnan(controller.last.statistic)


def test_gradients_that_say_nothing_change_nothing():
    controller = AdaptiveBatchSize(4, max_batch_size=64)
    assert controller.update(torch.ones(1, 3)) == 4
    assert controller.last is None
    for bad in (math.nan, math.inf):
        with pytest.warns(UserWarning, match="not finite"):
            assert controller.update(torch.tensor([[1.0], [bad]])) == 4


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 5000), st.integers(1, 300), st.integers(1, 9))
def test_micro_batches_cover_the_size(size, most, world):
    micro, steps = AdaptiveBatchSize(size, max_batch_size=5000).micro_batches(most, world)
    assert 1 <= micro <= most
    assert micro * steps * world >= size > (micro - 1) * steps * world
    assert most * (steps - 1) * world < size
    with pytest.raises(ValueError, match="max_micro_batch"):
        AdaptiveBatchSize(4, max_batch_size=8).micro_batches(0)


def test_controller_resumes():
    one = AdaptiveBatchSize(4, max_batch_size=1000, eta=0.5)
    one.update(gradients(4))
    two = AdaptiveBatchSize(4, max_batch_size=1000, eta=0.5)
    two.load_state_dict(saved(one.state_dict()))
    assert (two.size, two.last) == (one.size, one.last)
    small = AdaptiveBatchSize(4, max_batch_size=5)
    small.load_state_dict(one.state_dict())
    assert small.size == 5


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("initial", 1),
        ("initial", 2.5),
        ("max_batch_size", 3),
        ("test", "variance"),
        ("eta", 0.0),
        ("theta", -1.0),
        ("nu", math.nan),
        ("interval", 0),
        ("max_growth", 1.0),
        ("quantile", 0.0),
        ("quantile", 1.1),
    ],
)
def test_controller_refuses(name, value):
    options = {"initial": 4, "max_batch_size": 64, name: value}
    with pytest.raises(ValueError, match=f"{name} = "):
        AdaptiveBatchSize(options.pop("initial"), **options)


def toy(n: int = 65) -> Task:
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, 6, generator=draw), torch.randint(3, (n,), generator=draw)
    data = TensorDataset(x, y)
    loss = F.cross_entropy
    return Task("toy", mlp, data, data, data, loss, loss, "loss", "min", Budget(40, 16), 3)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def test_bench_spends_the_same_examples_in_fewer_steps():
    recipe, made = apply(DEFAULT_RECIPE, eta=0.5, interval=2), []

    def batch(run):
        made.append(recipe.batch(run))
        assert made[-1].controller.size == 4  # a quarter of the budget's 16
        return made[-1]

    result = fit(replace(recipe, batch=batch), toy(), seed=3)
    (batches,) = made
    assert result.status == "finished"
    assert 640 <= result.examples < 640 + 65
    assert 10 <= result.steps < 160
    assert 4 < batches.controller.size <= batches.controller.max_batch_size == 65
    assert result.fingerprint == fit(recipe, toy(), seed=3).fingerprint
    with pytest.raises(ValueError, match="eta"):
        apply(DEFAULT_RECIPE, eta=-1.0)


class SumsAbsoluteValues(AdaptiveBatchSize):
    """Broken: the norm of the mean gradient is the sum of its absolute values, so every batch seems large enough."""

    def update(self, per_sample_grads):
        moments = gradient_moments([per_sample_grads])
        absolute = sum(g.mean(0).abs().sum().item() for g in per_sample_grads.values())
        return self.update_from_moments(absolute**2, moments.variance, moments.size)


def test_the_claim_fails_for_a_sum_of_absolute_values():
    broken = claim(Bench(quick=True), controller=SumsAbsoluteValues, parts=("steps", "growth"))
    assert [check.verdict for check in broken.checks] == ["does not hold", "holds", "does not hold"]
    assert claim(Bench(quick=True), parts=("growth",)).verdict == "holds"
