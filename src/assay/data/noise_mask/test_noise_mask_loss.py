"""Both estimators against the formulas, and the policy gradient against the derivative of the expected cost."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from scipy import stats
from torch.distributions import Beta

from assay.losses import noise_mask_loss

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def two_cells(theta, count, seed):
    """A policy of two cells with log-concentrations ``theta`` (4,), a cost of what it draws, and the log-densities."""
    dist = Beta(*theta.exp().view(2, 1, 2).expand(2, count, 2))
    with torch.no_grad():
        cells = torch._sample_dirichlet(
            torch.stack([dist.concentration1, dist.concentration0], -1), generator=generator(seed)
        )[..., 0]
    return cost(cells[:, 0], cells[:, 1]), dist.log_prob(cells)


def cost(first, second):
    return 1 + (first + 0.5 * second) ** 2 - second


def expected_cost(theta):
    """The mean cost by Gauss-Legendre quadrature over the unit square."""
    at, weights = np.polynomial.legendre.leggauss(200)
    at, weights = (at + 1) / 2, weights / 2
    a, b = np.exp(theta[:2]), np.exp(theta[2:])
    p = [stats.beta.pdf(at, a[cell], b[cell]) * weights for cell in range(2)]
    return p[0] @ cost(at[:, None], at[None]) @ p[1]


def test_reinforce_is_the_policy_gradient_and_a_baseline_lowers_its_variance():
    theta = torch.tensor([0.9, 0.6, 0.7, 1.1], dtype=torch.double, requires_grad=True)
    point, step = theta.detach().numpy(), 1e-5
    exact = [(expected_cost(point + step * e) - expected_cost(point - step * e)) / (2 * step) for e in np.eye(4)]
    spread = []
    for with_baseline in (False, True):
        chunks = []
        for seed in range(50):
            costs, log_density = two_cells(theta, 10_000, seed)
            baseline = costs.mean() if with_baseline else None
            loss = noise_mask_loss(log_density, costs, estimator="reinforce", baseline=baseline)
            chunks.append(2 * torch.autograd.grad(loss, theta)[0])  # times the number of cells
        chunks = torch.stack(chunks)
        np.testing.assert_allclose(chunks.mean(0).numpy(), exact, rtol=0, atol=1e-2)
        spread.append(chunks.var(0).sum().item())
    assert spread[1] < 0.5 * spread[0]


def test_the_batch_mean_is_as_good_a_baseline_as_the_mean_of_the_others():
    log_density, losses = torch.randn(5, 3, dtype=torch.double, requires_grad=True), torch.rand(5, dtype=torch.double)
    others = (losses.sum() - losses) / 4
    ours, theirs = (
        torch.autograd.grad(noise_mask_loss(log_density, losses, estimator="reinforce", baseline=b), log_density)[0]
        for b in (losses.mean(), others)
    )
    torch.testing.assert_close(ours, (1 - 1 / 5) * theirs, **CLOSE)


def loss_by_hand(log_density, losses, estimator, baseline):
    rows = log_density.tolist()
    mean = sum(losses.tolist()) / len(rows)
    if estimator == "reference":
        return mean * sum(math.log(sum(math.exp(v) for v in row)) for row in rows) / len(rows)
    terms = [(value - baseline) * sum(row) / len(row) for value, row in zip(losses.tolist(), rows, strict=True)]
    return mean + sum(terms) / len(rows)


@pytest.mark.parametrize(("estimator", "baseline"), [("reference", None), ("reinforce", None), ("reinforce", 0.7)])
def test_the_loss_by_hand_and_whose_gradient_is_whose(estimator, baseline):
    log_density = torch.randn(4, 9, generator=generator(), dtype=torch.double, requires_grad=True)
    losses = torch.rand(4, generator=generator(1), dtype=torch.double, requires_grad=True)
    loss = noise_mask_loss(log_density, losses, estimator=estimator, baseline=baseline)
    assert loss.item() == pytest.approx(loss_by_hand(log_density, losses, estimator, baseline or 0.0), rel=1e-12)
    at_policy, at_losses = torch.autograd.grad(loss, (log_density, losses))
    if estimator == "reference":
        factor, share = log_density.logsumexp(1).mean(), log_density.softmax(1) * losses.mean() / 4
        torch.autograd.gradcheck(noise_mask_loss, (log_density, losses))
    else:
        factor, share = 1.0, (losses - (baseline or 0.0))[:, None].expand(4, 9) / 36
    torch.testing.assert_close(at_losses, torch.full((4,), 1 / 4, dtype=torch.double) * factor, **CLOSE)
    torch.testing.assert_close(at_policy, share, **CLOSE)


def test_a_baseline_carries_no_gradient_and_may_be_one_per_image():
    log_density, losses = torch.randn(4, 9), torch.rand(4, requires_grad=True)
    for baseline in (losses.mean(), 0.5 * losses):
        loss = noise_mask_loss(log_density, losses, estimator="reinforce", baseline=baseline)
        torch.testing.assert_close(torch.autograd.grad(loss, losses)[0], torch.full((4,), 0.25))


def test_a_reference_loss_that_turns_the_classifier_round_warns():
    few = torch.full((3, 16), -4.0)
    with pytest.warns(UserWarning, match="drives the classifier's loss up"):
        assert noise_mask_loss(few, torch.ones(3)) < 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            noise_mask_loss(few, torch.ones(3))
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        noise_mask_loss(-few, torch.ones(3))
        noise_mask_loss(few, torch.ones(3), estimator="reinforce")


@pytest.mark.parametrize("estimator", ["reference", "reinforce"])
def test_the_loss_compiles_whole(estimator):
    torch._dynamo.reset()
    compiled = torch.compile(noise_mask_loss, backend="aot_eager", fullgraph=True)
    outcomes = []
    for function in (noise_mask_loss, compiled):
        values = torch.randn(4, 9, generator=generator()).requires_grad_(), torch.ones(4, requires_grad=True)
        loss = function(*values, estimator=estimator)
        outcomes.append((loss.detach(), *torch.autograd.grad(loss, values)))
    torch.testing.assert_close(*outcomes)


def test_losses_that_cannot_be():
    log_density, losses = torch.zeros(3, 4), torch.ones(3)
    for arguments, options, message in [
        ((log_density, losses), {"estimator": "exact"}, "estimator = 'exact' is out of range"),
        ((log_density, losses.mean()), {}, r"per_sample_loss.shape = \(\) is out of range: \(3,\)"),
        ((log_density[0], losses), {}, r"log_density.shape = \(4,\) is out of range: \(B, G\)"),
        ((log_density, losses), {"baseline": 1.0}, "baseline = .* is out of range: None with"),
        ((log_density, losses), {"estimator": "reinforce", "baseline": torch.ones(3, 1)}, r"baseline.shape = \(3, 1\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            noise_mask_loss(*arguments, **options)
