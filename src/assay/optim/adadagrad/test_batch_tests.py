from __future__ import annotations

import datetime
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.optim import (
    augmented_inner_product_test,
    coordinate_norm_test,
    gradient_moments,
    inner_product_test,
    norm_test,
    orthogonality_test,
)

FOUR = (norm_test, inner_product_test, orthogonality_test, augmented_inner_product_test)


def gradients(b: int, seed: int = 0, drift: float = 0.3) -> dict[str, torch.Tensor]:
    """Noisy gradients of b examples for three tensors of different shapes."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {"weight": (3, 4), "bias": (3,), "scale": ()}
    return {k: torch.randn(b, *s, generator=draw, dtype=torch.float64) + drift for k, s in shapes.items()}


def rows(grads: dict[str, torch.Tensor]) -> np.ndarray:
    return np.concatenate([g.reshape(len(g), -1).numpy() for g in grads.values()], axis=1)


def oracle(g: np.ndarray) -> dict[str, float]:
    """The paper's statistics of one batch, example by example."""
    b, n = g.shape
    mean = sum(g[i] for i in range(b)) / b
    sq = sum(mean[j] ** 2 for j in range(n))
    inner = [sum(g[i][j] * mean[j] for j in range(n)) for i in range(b)]
    residual = np.array([g[i] - inner[i] / sq * mean for i in range(b)])

    def variance(values):
        centre = sum(values) / b
        return sum((value - centre) ** 2 for value in values) / (b - 1)

    norm, orth = (sum(variance(m[:, j]) for j in range(n)) for m in (g, residual))
    return {"sq": sq, "norm": norm, "inner": variance(inner), "orth": orth}


@pytest.mark.parametrize("tolerance", [0.05, 0.5, 5.0])
def test_statistics_and_sizes_are_the_papers(tolerance):
    for b in (2, 7, 16):
        grads = gradients(b, seed=b)
        want = oracle(rows(grads))
        sq = want["sq"]
        cases = (
            (norm_test, want["norm"], tolerance**2 * sq),
            (inner_product_test, want["inner"], tolerance**2 * sq**2),
            (orthogonality_test, want["orth"], tolerance**2 * sq),
        )
        for test, statistic, bound in cases:
            found = test(grads, tolerance)
            assert found.statistic == pytest.approx(statistic, rel=1e-12)
            assert found.mean_norm_sq == pytest.approx(sq, rel=1e-12)
            assert found.passed == (statistic / b <= bound)
            assert found.size == max(b, math.ceil(statistic / bound))
            assert isinstance(found.size, int)


def test_whole_gradient_not_tensor_by_tensor():
    """The inner product runs over all tensors: a sum of tensor-wise variances gives another number."""
    grads = gradients(9)
    flat = torch.cat([g.reshape(9, -1) for g in grads.values()], dim=1)
    for test in (*FOUR, coordinate_norm_test):
        of_dict, of_list, of_flat = test(grads), test(list(grads.values())), test(flat)
        assert of_dict == of_list
        assert of_dict == pytest.approx(of_flat, rel=1e-12)
    per_tensor = sum(inner_product_test(g).statistic for g in grads.values())
    assert abs(per_tensor / inner_product_test(grads).statistic - 1) > 0.01


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 40), st.integers(0, 10_000), st.floats(0.01, 3.0))
def test_pythagoras(b, seed, drift):
    grads = gradients(b, seed, drift)
    v, inner, orth = (test(grads) for test in (norm_test, inner_product_test, orthogonality_test))
    assert v.statistic == pytest.approx(inner.statistic / v.mean_norm_sq + orth.statistic, rel=1e-10)


def test_augmented_is_the_larger_of_two():
    for theta, nu in ((0.01, 1.0), (1.0, 0.01), (50.0, 50.0)):
        grads = gradients(5)
        parts = inner_product_test(grads, theta), orthogonality_test(grads, nu)
        both = augmented_inner_product_test(grads, theta, nu)
        assert both.size == max(part.size for part in parts)
        assert both.passed == all(part.passed for part in parts)


def test_coordinate_norm_test():
    grads = gradients(6)
    g = rows(grads)
    ratios = np.sort(g.var(0, ddof=1) / g.mean(0) ** 2)
    found = coordinate_norm_test(grads, 0.5)
    assert found.statistic == pytest.approx(ratios[-1], rel=1e-12)
    assert found.size == math.ceil(ratios[-1] / 0.25)
    half = coordinate_norm_test(grads, 0.5, quantile=0.5)
    assert half.statistic == pytest.approx(ratios[math.ceil(0.5 * len(ratios)) - 1], rel=1e-12)
    dead = {**grads, "dead": torch.zeros(6, 4, dtype=torch.float64)}
    assert coordinate_norm_test(dead, 0.5) == found
    assert found.size >= norm_test(grads, 0.5).size  # every coordinate within eta: so is their sum
    assert coordinate_norm_test(torch.zeros(3, 2)).size == math.inf


@pytest.mark.parametrize("test", [*FOUR, coordinate_norm_test])
def test_equal_examples_pass_at_any_tolerance(test):
    one = torch.randn(1, 1000)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        g = one.to(dtype).expand(17, -1)
        assert test(g, 1e-12) == (17, 0.0, pytest.approx(float(one.square().sum()), rel=1e-2), True)
    tolerances = (math.inf, math.inf) if test is augmented_inner_product_test else (math.inf,)
    assert test(gradients(4), *tolerances).size == 4


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(1e-6, 1e6), st.floats(0.02, 0.5))
def test_scale_free_and_inverse_square_in_the_tolerance(seed, scale, tolerance):
    grads = gradients(6, seed)
    scaled = {k: scale * g for k, g in grads.items()}
    for test in (norm_test, inner_product_test, orthogonality_test, coordinate_norm_test):
        found = test(grads, tolerance)
        assert abs(test(scaled, tolerance).size - found.size) <= 1  # a ceiling at the edge of an integer
        quarter = test(grads, tolerance / 2)
        if not found.passed:
            assert 4 * (found.size - 1) <= quarter.size <= 4 * found.size


def test_each_example_twice():
    b, grads = 8, gradients(8)
    twice = {k: torch.cat([g, g]) for k, g in grads.items()}
    for test in (norm_test, inner_product_test, orthogonality_test):
        ratio = test(twice).statistic / test(grads).statistic
        assert ratio == pytest.approx((b - 1) / (b - 0.5), rel=1e-12)


def test_half_precision_and_complex_and_large_tensors():
    wide = torch.randn(5, 2**20 + 3, dtype=torch.float64) + 0.1  # more than one block a row
    mean, var = wide.mean(0), wide.var(0)
    assert norm_test(wide)[1:3] == pytest.approx((var.sum().item(), mean.square().sum().item()), rel=1e-12)
    half = torch.randn(64, 100).bfloat16()
    assert norm_test(half).statistic == pytest.approx(half.double().var(0).sum().item(), rel=1e-5)
    assert inner_product_test(half).statistic == pytest.approx(inner_product_test(half.double()).statistic, rel=1e-4)
    z = torch.randn(6, 4, dtype=torch.complex128)
    assert norm_test(z) == norm_test(torch.view_as_real(z))


# --- moments: accumulation, ranks -------------------------------------------------------------------------------------


def accumulated(parts: list[np.ndarray]) -> tuple[float, float]:
    """Mean of means; mean of variances + mean of squared means - square of the mean: for equal micro-batches."""
    means = [part.mean(0) for part in parts]
    mean = sum(means) / len(parts)
    within = sum(part.var(0, ddof=1) for part in parts) / len(parts)
    between = sum(m**2 for m in means) / len(parts) - mean**2
    return float((mean**2).sum()), float((within + between).sum())


@pytest.mark.parametrize("count", [1, 2, 5])
def test_moments_of_micro_batches(count):
    parts = [gradients(4, seed) for seed in range(count)]
    mean_sq, variance = accumulated([rows(part) for part in parts])
    found = gradient_moments(part for part in parts)
    assert found[:3] == pytest.approx((mean_sq, variance, 4 * count), rel=1e-10)
    if count == 1:
        assert found.variance == pytest.approx(norm_test(parts[0]).statistic, rel=1e-12)


def test_inner_variance_of_micro_batches():
    parts = [gradients(4, seed) for seed in range(3)]
    mean = np.concatenate([rows(part) for part in parts]).mean(0)
    along = [rows(part) @ mean for part in parts]
    want = np.mean([a.var(ddof=1) for a in along]) + np.var([a.mean() for a in along])
    found = gradient_moments(parts, inner=True)
    assert found.inner_variance == pytest.approx(want, rel=1e-10)
    assert found[:3] == gradient_moments(parts)[:3]
    with pytest.raises(ValueError, match="iterator"):
        gradient_moments(iter(parts), inner=True)


def test_unequal_micro_batches_are_weighted_by_examples():
    parts = [gradients(3, 1), gradients(9, 2)]
    whole = np.concatenate([rows(part) for part in parts])
    found = gradient_moments(parts)
    assert found.mean_sq == pytest.approx(float((whole.mean(0) ** 2).sum()), rel=1e-12)
    within = sum(len(rows(p)) * rows(p).var(0, ddof=1) for p in parts) / 12
    between = sum(len(rows(p)) * (rows(p).mean(0) - whole.mean(0)) ** 2 for p in parts) / 12
    assert found.variance == pytest.approx(float((within + between).sum()), rel=1e-12)


def _rank(rank: int, folder: str) -> None:
    limit = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=limit)
    parts = [gradients(4, 2 * rank), gradients(4, 2 * rank + 1)]
    torch.save(tuple(gradient_moments(parts, inner=True, group=dist.group.WORLD)), f"{folder}/{rank}")
    dist.destroy_process_group()


def test_ranks_are_micro_batches(tmp_path):
    other = torch.multiprocessing.get_context("spawn").Process(target=_rank, args=(1, str(tmp_path)))
    other.start()
    _rank(0, str(tmp_path))
    other.join()
    here = gradient_moments([gradients(4, seed) for seed in range(4)], inner=True)
    for rank in range(2):
        assert torch.load(tmp_path / str(rank)) == pytest.approx(tuple(here), rel=1e-12)


def test_functions_refuse():
    for test, name in zip(FOUR, ("eta", "theta", "nu", "theta"), strict=True):
        with pytest.raises(ValueError, match=f"{name} = 0"):
            test(gradients(4), 0.0)
        with pytest.raises(ValueError, match="at least 2"):
            test(gradients(1))
        with pytest.raises(ValueError, match="one number"):
            test([torch.ones(3, 2), torch.ones(4, 2)])
        with pytest.raises(ValueError, match="empty"):
            test({})
    with pytest.raises(ValueError, match="quantile"):
        coordinate_norm_test(gradients(4), quantile=0.0)
    with pytest.raises(ValueError, match="empty"):
        gradient_moments([])
