"""Masks, policy and loss against formulas written out by hand, what the masks leave untouched, and the claim."""

from __future__ import annotations

import copy
import importlib
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special
from torch import nn
from torch.distributions import Beta

from assay.bench.arms import DEFAULT_RECIPE
from assay.bench.evidence import FAILS, Bench
from assay.bench.loop import evaluate, fit
from assay.bench.recipe import Budget
from assay.bench.tasks import resolve_task
from assay.data import NoiseMaskPolicy, noise_mask
from assay.data.noise_mask.noise_mask import apply, feature_extractor
from assay.losses import noise_mask_loss

claims = importlib.import_module("assay.data.noise_mask.claim")  # by name: assay.data.noise_mask is the function

EXACT = {"rtol": 0.0, "atol": 0.0}
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Recorded:
    """A distribution whose sample is known beforehand."""

    def __init__(self, cells):
        self.cells = cells

    def sample(self):
        return self.cells


def small_policy(grid=4, channels=1, **options):
    torch.manual_seed(3)
    features = nn.Sequential(nn.Conv2d(channels, 3, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return NoiseMaskPolicy(features, 12, grid=grid, **options)


# --- the method by hand, given one recorded sample ---


def head_by_hand(h, head):
    """Two layers with batch normalization by the batch's statistics, and a linear one; also what enters the last."""
    for linear, norm in ((head[0], head[1]), (head[3], head[4])):
        z = h @ linear.weight.detach().numpy().T + linear.bias.detach().numpy()
        z = (z - z.mean(0)) / np.sqrt(z.var(0) + norm.eps)
        h = np.maximum(z * norm.weight.detach().numpy() + norm.bias.detach().numpy(), 0)
    return h @ head[6].weight.detach().numpy().T + head[6].bias.detach().numpy(), h


def mask_by_hand(cells, height, width, kernel_size, sigma):
    """Nearest cell, then every pixel a weighted mean of the window around it, reflected at the border."""
    grid = len(cells)
    half = kernel_size // 2
    large = [[cells[r * grid // height][c * grid // width] for c in range(width)] for r in range(height)]
    inside = lambda at, size: -at if at < 0 else 2 * (size - 1) - at if at >= size else at  # noqa: E731
    weight = lambda dr, dc: math.exp(-(dr**2 + dc**2) / (2 * sigma**2))  # noqa: E731
    window = [(dr, dc) for dr in range(-half, half + 1) for dc in range(-half, half + 1)]
    total = sum(weight(dr, dc) for dr, dc in window)
    return [
        [
            sum(weight(dr, dc) * large[inside(r + dr, height)][inside(c + dc, width)] for dr, dc in window) / total
            for c in range(width)
        ]
        for r in range(height)
    ]


def test_a_step_by_hand():
    """Concentrations, mask, loss, gradients of the policy's last layers and of the classifier, and the new bases."""
    policy = small_policy().double()
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(64, 5)).double()
    images, labels = torch.randn(6, 1, 8, 8, generator=generator(), dtype=torch.double), torch.arange(6) % 5
    h = policy.feature_extractor(images).detach().numpy()
    old = {name: getattr(policy, f"base_{name}").numpy().copy() for name in ("alpha", "beta")}
    out = {name: head_by_hand(h, getattr(policy, name)) for name in ("alpha", "beta")}
    alpha, beta = (np.exp(0.9 * old[name] + 0.1 * out[name][0]) for name in ("alpha", "beta"))

    torch.manual_seed(8)
    m = Beta(torch.tensor(alpha), torch.tensor(beta)).sample().numpy()  # the recorded sample
    torch.manual_seed(8)
    mask, log_density = policy.sample(images, kernel_size=5, sigma=1.5)
    losses = F.cross_entropy(classifier(images * mask), labels, reduction="none")
    loss = noise_mask_loss(log_density, losses)
    loss.backward()

    masks = np.array([mask_by_hand(row.reshape(4, 4), 8, 8, 5, 1.5) for row in m])
    np.testing.assert_allclose(mask.squeeze(1).numpy(), masks, **CLOSE)
    log_p = (alpha - 1) * np.log(m) + (beta - 1) * np.log(1 - m) - special.betaln(alpha, beta)
    np.testing.assert_allclose(log_density.detach().numpy(), log_p, **CLOSE)
    x = (images.squeeze(1).numpy() * masks).reshape(6, 64)
    weight, bias = (p.detach().numpy() for p in classifier[1].parameters())
    z = x @ weight.T + bias
    p, hot = np.exp(z) / np.exp(z).sum(1, keepdims=True), np.eye(5)[labels.numpy()]
    mean_loss = -np.log((p * hot).sum(1)).mean()
    log_sum = np.log(np.exp(log_p).sum(1)).mean()
    assert loss.item() == pytest.approx(log_sum * mean_loss, rel=1e-9)

    at_logits = log_sum * (p - hot) / 6
    np.testing.assert_allclose(classifier[1].weight.grad.numpy(), at_logits.T @ x, **CLOSE)
    np.testing.assert_allclose(classifier[1].bias.grad.numpy(), at_logits.sum(0), **CLOSE)
    share = np.exp(log_p) / np.exp(log_p).sum(1, keepdims=True) * mean_loss / 6
    for name, own, log_m in (("alpha", alpha, np.log(m)), ("beta", beta, np.log(1 - m))):
        at_head = share * (log_m + special.digamma(alpha + beta) - special.digamma(own)) * own * 0.1
        last = getattr(policy, name)[6]
        np.testing.assert_allclose(last.weight.grad.numpy(), at_head.T @ out[name][1], **CLOSE)
        np.testing.assert_allclose(last.bias.grad.numpy(), at_head.sum(0), **CLOSE)
        moved = 0.99 * old[name] + 0.01 * out[name][0].mean(0, keepdims=True)
        np.testing.assert_allclose(getattr(policy, f"base_{name}").numpy(), moved, **CLOSE)


# --- the mask ---


@settings(max_examples=40, deadline=None)
@given(
    grid=st.integers(1, 6),
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    half=st.integers(0, 5),
    sigma=st.floats(0.05, 50),
    seed=st.integers(0, 99),
)
def test_masks_by_hand_of_any_size(grid, height, width, half, sigma, seed):
    kernel_size = 2 * min(half, min(height, width) - 1) + 1
    cells = torch.rand(2, grid**2, generator=generator(seed), dtype=torch.double)
    mask = noise_mask(Recorded(cells), (height, width), grid=grid, kernel_size=kernel_size, sigma=sigma)
    expected = [mask_by_hand(row.view(grid, grid).tolist(), height, width, kernel_size, sigma) for row in cells]
    assert mask.shape == (2, 1, height, width) and ((mask > 0) & (mask < 1)).all()
    torch.testing.assert_close(mask.squeeze(1), torch.tensor(expected, dtype=torch.double), **CLOSE)


def test_a_constant_sample_is_a_constant_mask():
    for c in (0.2, 1e-6, 1 - 1e-6):
        mask = noise_mask(Recorded(torch.full((1, 64**2), c, dtype=torch.double)), 224, grid=64)
        torch.testing.assert_close(mask, torch.full((1, 1, 224, 224), c, dtype=torch.double), **CLOSE)


def test_a_grid_of_the_images_size_is_taken_as_it_is():
    cells = torch.rand(3, 16, generator=generator())
    assert torch.equal(noise_mask(Recorded(cells), 4, grid=4, kernel_size=1), cells.view(3, 1, 4, 4))


def test_samples_at_the_ends_stay_inside():
    """Tiny concentrations draw zeros and ones as far as precision goes, where the density is next to infinite."""
    tiny = Beta(torch.full((2, 16), 1e-3), torch.full((2, 16), 1e-3))
    torch.manual_seed(0)
    assert ((drawn := tiny.sample()) < 1e-30).any() and (drawn > 1 - 1e-7).any()
    mask = noise_mask(tiny, 4, grid=4, kernel_size=1, generator=generator())
    assert ((mask > 0) & (mask < 1)).all()
    policy = small_policy()
    policy.base_alpha.fill_(-8.0)
    policy.base_beta.fill_(-8.0)
    mask, log_density = policy.sample(torch.randn(5, 1, 8, 8), kernel_size=3)
    assert log_density.isfinite().all() and ((mask > 0) & (mask < 1)).all()


def test_the_generator_draws_alone_what_torch_would_draw():
    dist = Beta(torch.rand(3, 16) + 1, torch.rand(3, 16) + 1)
    torch.manual_seed(4)
    state = torch.get_rng_state()
    own = noise_mask(dist, 8, grid=4, kernel_size=3, generator=generator(4))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(own, noise_mask(dist, 8, grid=4, kernel_size=3))
    policy, images = small_policy().eval(), torch.randn(5, 1, 8, 8)
    first, again, other = (policy.sample(images, kernel_size=3, generator=generator(seed)) for seed in (1, 1, 2))
    torch.testing.assert_close(first, again, **EXACT)
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel_size": 4}, r"kernel_size = 4 is out of range: an odd integer in \[1, 15\]"),
        ({"kernel_size": 17}, "kernel_size = 17"),
        ({"kernel_size": -1}, "kernel_size = -1"),
        ({"sigma": 0.0}, "sigma = 0.0 is out of range"),
        ({"sigma": math.nan}, "sigma = nan"),
        ({"grid": 0}, "grid = 0"),
        ({"grid": 5}, r"shape = \(2, 16\) is out of range: \(B, 25\)"),
        ({"size": (0, 8)}, r"size = \(0, 8\)"),
    ],
)
def test_masks_that_cannot_be(change, message):
    options = {"size": 8, "grid": 4, "kernel_size": 3, "sigma": 1.0} | change
    with pytest.raises(ValueError, match=message):
        noise_mask(Recorded(torch.rand(2, 16)), options.pop("size"), **options)


# --- the policy ---


@pytest.mark.parametrize("channels", [1, 3])
def test_each_image_has_its_mask_over_all_channels(channels):
    policy, images = small_policy(channels=channels), torch.randn(5, channels, 9, 12)
    mask, log_density = policy.sample(images, kernel_size=3, sigma=1.0)
    assert mask.shape == (5, 1, 9, 12) and log_density.shape == (5, 16) and (images * mask).shape == images.shape
    assert not any(torch.equal(mask[i], mask[j]) for i in range(5) for j in range(i))


def test_the_sample_carries_no_gradient():
    policy, images = small_policy(), torch.randn(5, 1, 8, 8, requires_grad=True)
    mask, log_density = policy.sample(images, kernel_size=3)
    assert not mask.requires_grad and log_density.requires_grad
    assert not noise_mask(policy(images), 8, grid=4, kernel_size=3).requires_grad


def test_bases_are_buffers_that_follow_the_mean_in_training_alone():
    policy, images = small_policy(base_momentum=0.7).double(), torch.randn(5, 1, 8, 8, dtype=torch.double)
    assert {"base_alpha", "base_beta"} <= policy.state_dict().keys()
    assert all(((b >= 0) & (b < 1)).all() for b in (policy.base_alpha, policy.base_beta))
    assert not any(name.startswith("base") for name, _ in policy.named_parameters())
    assert not policy.base_alpha.requires_grad
    for _ in range(3):
        heads = [copy.deepcopy(getattr(policy, n))(policy.feature_extractor(images)) for n in ("alpha", "beta")]
        expected = [
            0.7 * base + 0.3 * head.mean(0, keepdim=True)
            for base, head in zip((policy.base_alpha, policy.base_beta), heads, strict=True)
        ]
        policy(images)
        torch.testing.assert_close([policy.base_alpha, policy.base_beta], [e.detach() for e in expected], **CLOSE)
    resumed = small_policy(base_momentum=0.7).double()
    resumed.load_state_dict(policy.state_dict())
    before = copy.deepcopy(policy.state_dict())
    one, other = policy.eval()(images), resumed.eval()(images)
    torch.testing.assert_close(one.concentration1, other.concentration1, **EXACT)
    torch.testing.assert_close(dict(policy.state_dict()), dict(before), **EXACT)
    base = policy.base_distribution()
    assert base.batch_shape == (1, 16)
    torch.testing.assert_close(base.concentration0, policy.base_beta.exp(), **EXACT)
    assert noise_mask(base, 8, grid=4, kernel_size=3).shape == (1, 1, 8, 8)


def test_heads_run_once_a_step():
    policy = small_policy()
    policy(torch.randn(5, 1, 8, 8))
    assert {int(m.num_batches_tracked) for m in policy.modules() if isinstance(m, nn.BatchNorm1d)} == {1}


def test_decay_1_ignores_the_images_and_learns_nothing():
    policy = small_policy(decay=1.0)
    dist = policy(torch.randn(5, 1, 8, 8))
    assert torch.equal(dist.concentration1, dist.concentration1[:1].expand(5, -1))
    losses = torch.rand(5)
    _, log_density = policy.sample(torch.randn(5, 1, 8, 8), kernel_size=3)
    noise_mask_loss(log_density, losses, estimator="reinforce").backward()
    assert not any(p.grad.any() for p in policy.parameters())


def test_half_precision_draws_and_weighs_in_single():
    policy, images = small_policy(), torch.randn(5, 1, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mask, log_density = policy.sample(images, kernel_size=3, generator=generator())
        masked = images * mask
        loss = noise_mask_loss(log_density, torch.rand(5, dtype=torch.bfloat16))
    assert mask.dtype == log_density.dtype == masked.dtype == loss.dtype == torch.float32
    assert ((mask > 0) & (mask < 1)).all()
    half = small_policy().bfloat16()
    mask, log_density = half.sample(images.bfloat16(), kernel_size=3)
    assert mask.dtype == torch.bfloat16 and log_density.dtype == torch.float32
    assert half.base_distribution().concentration1.dtype == torch.float32


def test_concentrations_stay_where_densities_can_be_told():
    policy, images = small_policy(), torch.randn(5, 1, 8, 8)
    with torch.no_grad():
        policy.alpha[6].bias.copy_(torch.linspace(-2e3, 2e3, 16))
    _, log_density = policy.sample(images, kernel_size=3)
    dist = policy(images)
    assert dist.concentration1.min().item() == pytest.approx(math.exp(-10)) and log_density.isfinite().all()
    assert dist.concentration1.max().item() == pytest.approx(math.exp(10))
    noise_mask_loss(log_density, torch.rand(5), estimator="reinforce").backward()
    assert all(p.grad.isfinite().all() for p in policy.parameters())


def test_a_policy_that_has_diverged_is_seen_in_its_masks():
    policy = small_policy()
    with torch.no_grad():
        policy.alpha[6].bias[3] = math.nan
    mask, log_density = policy.sample(torch.randn(5, 1, 8, 8), kernel_size=1)
    assert torch.equal(
        mask.isnan(), log_density.isnan().view(5, 1, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
    )
    assert mask.isnan().any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": 0}, "grid = 0"),
        ({"grid": 2.5}, "grid = 2.5"),
        ({"feature_dim": 0}, "feature_dim = 0"),
        ({"decay": 1.1}, r"decay = 1.1 is out of range: \[0, 1\]"),
        ({"base_momentum": -0.1}, "base_momentum = -0.1"),
    ],
)
def test_policies_that_cannot_be(change, message):
    options = {"feature_dim": 4} | change
    with pytest.raises(ValueError, match=message):
        NoiseMaskPolicy(nn.Flatten(), options.pop("feature_dim"), **options)


def test_features_of_another_shape_are_named():
    with pytest.raises(ValueError, match=r"features' shape = \(2, 16\) is out of range: \(2, 4\)"):
        NoiseMaskPolicy(nn.Flatten(), 4, grid=2)(torch.randn(2, 1, 4, 4))
    with pytest.raises(TypeError):
        NoiseMaskPolicy(nn.Flatten(), 4, no_such_option=1)


def test_the_classifier_learns_from_the_masked_images_as_from_any():
    policy, classifier = small_policy(), nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    images, labels = torch.randn(6, 1, 8, 8), torch.arange(6) % 5
    mask, log_density = policy.sample(images, kernel_size=3)
    losses = F.cross_entropy(classifier(images * mask), labels, reduction="none")
    loss = noise_mask_loss(log_density, losses, estimator="reinforce", baseline=losses.detach().mean())
    plain = F.cross_entropy(classifier(images * mask), labels)
    ones, others = (torch.autograd.grad(value, classifier.parameters(), retain_graph=True) for value in (loss, plain))
    torch.testing.assert_close(ones, others)


# --- in the bench ---


@pytest.mark.parametrize("estimator", ["reference", "reinforce"])
def test_in_the_bench_it_is_the_objective(estimator):
    """The weights are those of a loop written by hand, also with an optimizer that asks for a loss twice."""
    task, budget = resolve_task("digits"), Budget(steps=6, batch_size=60, evaluations=0)

    class Twice(torch.optim.SGD):
        def step(self, closure):
            closure()
            return super().step(closure)

    recipe = replace(DEFAULT_RECIPE, update=lambda run: Twice(run.model.parameters(), 0.02))
    seen = []

    def by_hand(run):
        policy = NoiseMaskPolicy(*feature_extractor(1), grid=4)
        optimizer = torch.optim.Adam(policy.parameters(), 0.01)
        draw = torch.Generator().manual_seed(run.seed)

        def loss(model, batch):
            seen.append(run.step)
            if run.step >= 3:
                return F.cross_entropy(model(batch.input), batch.target)
            if len(seen) % 2 == 1:
                by_hand.mask, log_density = policy.sample(batch.input, kernel_size=3, sigma=1.0, generator=draw)
                by_hand.factor = log_density.detach().logsumexp(1).mean() if estimator == "reference" else 1.0
            losses = F.cross_entropy(model(batch.input * by_hand.mask), batch.target, reduction="none")
            if len(seen) % 2 == 1:
                cost = losses.detach()
                optimizer.param_groups[0]["lr"] = 0.01 * (1 + math.cos(math.pi * run.step / 3)) / 2
                optimizer.zero_grad()
                if estimator == "reference":
                    (log_density.logsumexp(1).mean() * cost.mean()).backward()
                else:
                    ((cost - cost.mean()) * log_density.mean(1)).mean().backward()
                optimizer.step()
            return by_hand.factor * losses.mean()

        return loss

    ours = fit(apply(recipe, estimator=estimator, policy_lr=0.01, grid=4), task, budget, 7).model
    hands = fit(replace(recipe, objective=by_hand), task, budget, 7).model
    assert len(seen) == 12
    torch.testing.assert_close(ours.state_dict(), hands.state_dict(), rtol=1e-5, atol=1e-6)


def test_without_heating_it_is_plain_training_to_the_bit():
    task, budget = resolve_task("digits(model='vit')"), Budget(steps=4, batch_size=60, evaluations=0)
    one, other = (fit(recipe, task, budget, 7).model for recipe in (apply(DEFAULT_RECIPE, heating=0.0), DEFAULT_RECIPE))
    torch.testing.assert_close(one.state_dict(), other.state_dict(), **EXACT)


def test_evaluation_never_sees_a_mask():
    task, budget = resolve_task("digits"), Budget(steps=4, batch_size=60, evaluations=1)
    result = fit(apply(DEFAULT_RECIPE, heating=1.0), task, budget, 7)
    assert result.validation == evaluate(task, result.model, task.validation)


def test_what_the_bench_cannot_use_is_refused():
    for task in ("tabular", "text"):
        with pytest.raises(ValueError, match="noise-mask needs images"):
            fit(apply(DEFAULT_RECIPE), resolve_task(task), Budget(steps=1), 7)
    for options in ({"heating": 1.5}, {"policy_lr": -1.0}, {"estimator": "exact"}, {"grid": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} = .* is out of range"):
            apply(DEFAULT_RECIPE, **options)


# --- the claim ---


@pytest.mark.parametrize("loss", [claims.reversed_sign, noise_mask_loss])
def test_a_policy_turned_round_is_found_out(loss):
    evidence = claims.claim(Bench(), loss=loss, variants=(claims.FIXED,), seeds=25, heating=20)
    assert (evidence.verdict == FAILS) == (loss is claims.reversed_sign)


@pytest.mark.parametrize("broken", [{}, {"masked_test": True}, {"fine_tune": False}])
def test_masks_at_the_end_cost_far_more_than_a_short_run(broken):
    """A run this short costs the method as it is some seven points; the broken ones lose thirty."""
    variants = (claims.PLAIN, claims.LEARNED)
    evidence = claims.claim(Bench(), **broken, variants=variants, seeds=3, heating=4, tuning=1)
    assert (evidence.checks[0].observed < -15) == bool(broken)


# --- what a name means ---


def test_the_function_is_not_hidden_by_the_room_of_the_same_name():
    import assay.data

    assert assay.data.noise_mask is noise_mask and callable(noise_mask)
