"""Group DRO's weights and loss against plain loops, and images that few photons reached."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.data import photon_limited, poisson_severities
from assay.losses import GroupDRO, group_dro_weights
from assay.losses._contract import MEMORY_CHECKS, Memory

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


@given(
    losses=st.lists(st.floats(-20, 20), min_size=1, max_size=5),
    step_size=st.floats(0, 3),
    seed=st.integers(0, 999),
)
@settings(deadline=None)
def test_weights_are_the_formula(losses, step_size, seed):
    q = torch.rand(len(losses), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(0)
    raised = [weight * math.exp(step_size * loss) for weight, loss in zip(q.tolist(), losses, strict=True)]
    expected = torch.tensor([weight / sum(raised) for weight in raised], dtype=torch.float64)
    found = group_dro_weights(q, torch.tensor(losses, dtype=torch.float64), step_size)
    torch.testing.assert_close(found, expected, **CLOSE)


def test_weights_stay_on_the_simplex_at_its_edge():
    q = torch.tensor([0.0, 0.5, 0.5])
    assert group_dro_weights(q, torch.tensor([1e4, 0.0, 2e4]), 1.0).tolist() == [0.0, 0.0, 1.0]
    assert group_dro_weights(q, torch.tensor([1.0, float("inf"), 0.0]), 1.0).tolist() == q.tolist()
    assert group_dro_weights(q, torch.randn(3), 0.0).tolist() == q.tolist()
    losses = torch.ones(3, requires_grad=True)
    assert not group_dro_weights(q.bfloat16(), losses, 1.0).requires_grad
    assert group_dro_weights(q.bfloat16(), losses, 1.0).dtype == torch.bfloat16


def example(seed=0, n=9):
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(n, generator=draw, dtype=torch.float64), torch.randint(3, (n,), generator=draw)


def test_the_loss_is_the_formula_over_several_batches():
    criterion, q = GroupDRO(4, 0.7), [0.25] * 4  # group 3 never comes
    for seed in range(5):
        losses, groups = example(seed)
        losses.requires_grad_()
        members = [losses.detach()[groups == s].tolist() for s in range(4)]
        means = [sum(m) / len(m) if m else 0.0 for m in members]
        raised = [weight * math.exp(0.7 * mean) for weight, mean in zip(q, means, strict=True)]
        q = [weight / sum(raised) for weight in raised]
        loss = criterion(losses, groups)
        assert loss.item() == pytest.approx(sum(w * m for w, m in zip(q, means, strict=True)), rel=1e-12)
        assert criterion.q.tolist() == pytest.approx(q, rel=1e-12)
        (gradient,) = torch.autograd.grad(loss, losses)
        expected = [q[g] / len(members[g]) for g in groups.tolist()]
        torch.testing.assert_close(gradient, torch.tensor(expected, dtype=torch.float64), **CLOSE)


def test_one_group_is_the_mean_and_a_step_of_0_is_the_mean_over_groups():
    losses, groups = example()
    torch.testing.assert_close(GroupDRO(1)(losses, torch.zeros_like(groups)), losses.mean(), **CLOSE)
    means = [losses[groups == s].mean() for s in range(3)]
    torch.testing.assert_close(GroupDRO(3, 0.0)(losses, groups), sum(means) / 3, **CLOSE)


def make(**options):
    return GroupDRO(3, **{"step_size": 0.5, **options})


def step(criterion, k, losses):
    return criterion(losses, example(k, len(losses))[1])


@pytest.mark.parametrize("check", MEMORY_CHECKS, ids=lambda check: check.__name__)
def test_it_keeps_the_contract_of_losses_with_a_memory(check):
    check(Memory(make, step, lambda: torch.rand(9), "GroupDRO"))


def test_in_evaluation_it_weighs_by_what_it_has():
    criterion = make()
    losses, groups = example()
    trained = criterion(losses, groups)
    assert criterion.eval()(losses, groups) == trained
    assert criterion(losses.float(), groups).dtype == torch.float32


@pytest.mark.parametrize("call, message", [
    (lambda: GroupDRO(0), "n_groups = 0 is out of range"),
    (lambda: GroupDRO(2, -1.0), r"step_size = -1\.0 is out of range"),
    (lambda: GroupDRO(2)(torch.zeros(2), torch.tensor([0, 2])), "groups = .0, 2. is out of range"),
    (lambda: GroupDRO(2)(torch.zeros(2), torch.tensor([0])), r"groups.shape = \(1,\) is out of range"),
    (lambda: GroupDRO(2)(torch.zeros(0), torch.zeros(0).long()), r"per_sample_loss.shape = \(0,\) is out of range"),
    (lambda: group_dro_weights(torch.ones(1), torch.ones(1), float("nan")), "step_size = nan is out of range"),
    (lambda: group_dro_weights(torch.ones(1), torch.ones(2), 1.0), r"group_loss.shape = \(2,\) is out of range"),
    (lambda: photon_limited(torch.zeros(2), 6), "severity = 6 is out of range: integers from 0 to 5"),
    (lambda: photon_limited(torch.zeros(2), -1), "severity = -1 is out of range"),
    (lambda: photon_limited(torch.zeros(2), 0.5), r"severity = 0\.5 is out of range"),
    (lambda: photon_limited(torch.zeros(2, 3), torch.tensor([1, 1, 1])), "severity = .* is out of range: an integer"),
    (lambda: photon_limited(-torch.ones(2), 1), "x is out of range"),
    (lambda: photon_limited(torch.ones(2).long(), 1), "x is out of range"),
    (lambda: photon_limited(torch.ones(2), 1, photons=(0.0,)), r"photons = \(0\.0,\) is out of range"),
    (lambda: poisson_severities(-1, 1.0, 3), "n = -1 is out of range"),
    (lambda: poisson_severities(3, -1.0, 3), r"lam = -1\.0 is out of range"),
    (lambda: poisson_severities(3, 1.0, 1.5), r"max_severity = 1\.5 is out of range"),
])  # fmt: skip
def test_what_is_out_of_range_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Photons.


def test_shot_noise_keeps_the_mean_and_has_its_variance():
    draw = torch.Generator().manual_seed(0)
    for severity, c in enumerate((6.0, 2.5, 1.2, 0.5, 0.3), start=1):
        x = torch.full((40_000,), 0.4, dtype=torch.float64)
        noisy = photon_limited(x, severity, draw)
        torch.testing.assert_close(noisy * c, (noisy * c).round(), rtol=0, atol=1e-9)
        spread = (0.4 / c) ** 0.5
        assert noisy.mean().item() == pytest.approx(0.4, abs=5 * spread / 200)
        assert noisy.var().item() == pytest.approx(0.4 / c, rel=0.1)


def test_severities_may_differ_and_none_changes_nothing():
    x = torch.rand(5, 2, 3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(photon_limited(x, 0), x)
    severity = torch.tensor([0, 2, 0, 1, 3])
    noisy = photon_limited(x, severity, torch.Generator().manual_seed(2), photons=(100.0, 10.0, 1.0))
    assert torch.equal(noisy[severity == 0], x[severity == 0]) and noisy.dtype == x.dtype
    for i, c in ((1, 10.0), (3, 100.0), (4, 1.0)):
        torch.testing.assert_close(noisy[i] * c, (noisy[i] * c).round(), rtol=0, atol=1e-4)
    one = photon_limited(x, 2, torch.Generator().manual_seed(3))
    assert torch.equal(one, torch.poisson(2.5 * x, generator=torch.Generator().manual_seed(3)) / 2.5)
    assert torch.equal(photon_limited(torch.zeros(3), 3), torch.zeros(3))


def test_severities_are_a_poisson_number_cut_off():
    n, lam, most = 40_000, 0.6, 3
    drawn = poisson_severities(n, lam, most, torch.Generator().manual_seed(0))
    assert drawn.dtype == torch.long and drawn.shape == (n,)
    share = [math.exp(-lam) * lam**k / math.factorial(k) for k in range(most)]
    share.append(1 - sum(share))
    for k, p in enumerate(share):
        assert (drawn == k).double().mean().item() == pytest.approx(p, abs=5 * (p * (1 - p) / n) ** 0.5)
    assert not poisson_severities(5, 9.0, 0).any() and not poisson_severities(5, 0.0, 3).any()
    assert len(poisson_severities(0, 1.0, 3)) == 0
