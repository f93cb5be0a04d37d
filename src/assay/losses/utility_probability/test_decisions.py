from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.losses import decide, fit_temperature, utility_to_probability

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
SEEDS = st.integers(0, 999)


def utilities(seed=0, shape=(5, 4), scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- from utilities to probabilities


@settings(deadline=None, max_examples=40)
@given(temperature=st.floats(1e-3, 1e3), with_prior=st.booleans(), seed=SEEDS)
def test_luces_rule(temperature, with_prior, seed):
    u, prior = utilities(seed), utilities(seed + 1).exp() if with_prior else None
    ours = utility_to_probability(u, temperature=temperature, prior=prior)
    for row in range(5):
        highest = max(u[row].tolist())
        weights = [
            (prior[row, c].item() if with_prior else 1.0) * math.exp((u[row, c].item() - highest) / temperature)
            for c in range(4)
        ]
        expected = torch.tensor([weight / sum(weights) for weight in weights], dtype=torch.float64)
        torch.testing.assert_close(ours[row], expected, rtol=1e-9, atol=1e-300)
    torch.testing.assert_close(ours.sum(1), torch.ones(5, dtype=torch.float64), **CLOSE)


def test_temperature_one_is_softmax_along_any_dimension():
    u = utilities(shape=(3, 4, 5))
    for dim in (0, 1, -1):
        torch.testing.assert_close(utility_to_probability(u, dim=dim), F.softmax(u, dim), **CLOSE)
    uniform = torch.full((5,), 0.2, dtype=torch.float64)
    torch.testing.assert_close(utility_to_probability(u, prior=uniform), F.softmax(u, -1), **CLOSE)
    torch.testing.assert_close(utility_to_probability(u, prior=30 * uniform), F.softmax(u, -1), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_limits_of_the_temperature(dtype):
    u, prior = torch.tensor([2.0, 5.0, 5.0, -math.inf], dtype=dtype), torch.tensor([0.2, 0.1, 0.3, 0.4])
    for cold in (1e-3, 1e-30):
        assert utility_to_probability(u, temperature=cold).tolist() == [0, 0.5, 0.5, 0]
        shared = utility_to_probability(u, temperature=cold, prior=prior)
        torch.testing.assert_close(shared.float(), torch.tensor([0, 0.25, 0.75, 0]))
    hot = utility_to_probability(u, temperature=1e9, prior=prior).float()
    torch.testing.assert_close(hot, torch.tensor([2 / 6, 1 / 6, 3 / 6, 0]))
    assert utility_to_probability(u).dtype == torch.promote_types(dtype, torch.float32)


@settings(deadline=None)
@given(shift=st.floats(-1e3, 1e3), temperature=st.floats(0.01, 100), seed=SEEDS)
def test_a_shift_of_a_row_changes_nothing(shift, temperature, seed):
    u = utilities(seed)
    ours = (utility_to_probability(x, temperature=temperature) for x in (u, u + shift))
    torch.testing.assert_close(*ours, rtol=1e-9, atol=1e-9)


def test_what_is_no_candidate_gets_exactly_nothing():
    u = utilities()
    u[:, 1] = -math.inf
    prior = torch.tensor([1.0, 1.0, 0.0, 1.0])
    u[:, 2] = 1e300  # must not count: its prior is 0
    for temperature in (1e-3, 1.0, 1e3):
        p = utility_to_probability(u, temperature=temperature, prior=prior)
        assert not p[:, 1:3].any()
        torch.testing.assert_close(p[:, [0, 3]], utility_to_probability(u[:, [0, 3]], temperature=temperature))
    assert utility_to_probability(torch.full((1, 2), -math.inf)).isnan().all()


def test_copies_of_a_candidate_are_merged():
    distinct = torch.tensor([[3, 1, 0], [3, 2, 0], [1, 0, 0]])
    u, prior = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([0.5, 0.2, 0.3])
    copies = torch.tensor([1, 0, 1, 1, 2, 0])
    tokens, first = distinct[copies], [0, 1, 4]
    for options in ({}, {"temperature": 0.3}, {"prior": prior}):
        alone = utility_to_probability(u, **options)
        again = {"prior": prior[copies]} if "prior" in options else options
        p = utility_to_probability(u[copies], candidates=tokens, **again)
        torch.testing.assert_close(p[first], alone[copies[first]])
        assert p.count_nonzero() == 3
        across = utility_to_probability(u[copies, None], candidates=tokens[:, None], dim=0, **_column(again))
        torch.testing.assert_close(across[:, 0], p)
        rows = utility_to_probability(u[copies].expand(2, -1), candidates=copies.expand(2, -1), **again)
        torch.testing.assert_close(rows, p.expand(2, -1))


def _column(options):
    return {key: value[:, None] if key == "prior" else value for key, value in options.items()}


def test_gradient_through_the_probability():
    def probability(u):
        return utility_to_probability(u, temperature=0.7, prior=torch.tensor([0.1, 0.2, 0.0, 0.7]).double())

    torch.autograd.gradcheck(probability, utilities().requires_grad_())


# --- the temperature


@pytest.mark.parametrize("temperature", [0.05, 0.5, 1.0, 3.0, 20.0])
@pytest.mark.parametrize("with_prior", [False, True])
def test_the_temperature_of_the_choices_is_recovered(temperature, with_prior):
    draw = torch.Generator().manual_seed(0)
    u = 3 * temperature * torch.randn(5000, 10, generator=draw, dtype=torch.float64)
    prior = torch.rand(10, generator=draw).double() if with_prior else None
    p = utility_to_probability(u, temperature=temperature, prior=prior)
    # Every choice with its probability as weight would be exact; so many draws are within 2 %.
    target = torch.multinomial(p, 1, generator=draw).squeeze(1)
    assert fit_temperature(u, target, prior=prior) == pytest.approx(temperature, rel=0.02)


def nll(u, target, temperature, **options):
    return F.nll_loss(utility_to_probability(u, temperature=temperature, **options).log(), target).item()


@settings(deadline=None, max_examples=60)
@given(scale=st.floats(0.01, 30), classes=st.integers(2, 6), count=st.integers(1, 30), seed=SEEDS)
def test_no_temperature_is_more_likely(scale, classes, count, seed):
    u = utilities(seed, (count, classes), scale)
    target = torch.randint(classes, (count,), generator=torch.Generator().manual_seed(seed))
    found = fit_temperature(u, target)
    assert 1e-3 <= found <= 1e3
    least = F.cross_entropy(u / found, target).item()
    for other in (1.0, 1e-3, 1e3, *(found * factor for factor in (0.9, 0.999, 1.001, 1.1))):
        if 1e-3 <= other <= 1e3:
            assert least <= F.cross_entropy(u / other, target).item() * (1 + 1e-12) + 1e-12


def test_ends_and_flat_choices():
    u = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    assert fit_temperature(u, torch.tensor([0, 0])) == pytest.approx(1e-3, rel=1e-12)
    assert fit_temperature(u, torch.tensor([1, 1])) == pytest.approx(1e3, rel=1e-12)
    assert fit_temperature(torch.ones(2, 2), torch.tensor([0, 1])) == 1.0
    closed = fit_temperature(torch.tensor([[2.0, 0.0]]).expand(10, 2), torch.tensor([0] * 8 + [1] * 2))
    assert closed == pytest.approx(2 / math.log(4), rel=1e-9)  # sigmoid(2 / T) = 0.8


def test_the_fit_knows_copies_priors_and_what_is_no_candidate():
    u, target = utilities(3, (40, 4)), torch.arange(40) % 4
    u[torch.arange(40), target] += 0.5
    plain = fit_temperature(u, target)
    padded = torch.cat([u, torch.full((40, 1), -math.inf, dtype=torch.float64)], 1)
    assert fit_temperature(padded, target) == pytest.approx(plain, rel=1e-9)
    twice, names = torch.cat([u, u], 1), torch.arange(8).remainder(4).expand(40, -1)
    for chosen in (target, target + 4):
        assert fit_temperature(twice, chosen, candidates=names) == pytest.approx(plain, rel=1e-9)
    prior = torch.tensor([0.0, 1.0, 1.0, 1.0])
    some = target > 0
    assert fit_temperature(u[some], target[some], prior=prior) == pytest.approx(
        fit_temperature(u[some, 1:], target[some] - 1), rel=1e-9
    )


def test_the_reference_is_one_more_sample_of_a_calibrated_network():
    """Copies left as they are, its utility says nothing of which one was chosen: the fit tends to infinity."""
    draw = torch.Generator().manual_seed(0)
    u = 2 * torch.randn(5000, 8, generator=draw, dtype=torch.float64)
    drawn = u.gather(1, torch.multinomial(F.softmax(u, 1), 6, replacement=True, generator=draw))
    assert fit_temperature(drawn, torch.zeros(5000, dtype=torch.long)) > 20
    everything = torch.multinomial(F.softmax(u, 1), 1, generator=draw).squeeze(1)
    assert fit_temperature(u, everything) == pytest.approx(1, rel=0.05)


# --- decisions


@settings(deadline=None)
@given(a=st.floats(1e-3, 1e3), seed=SEEDS)
def test_argmax_sees_the_order_alone(a, seed):
    u, b = utilities(seed), utilities(seed + 1, (5, 1), 100.0)
    expected = torch.tensor([max(range(4), key=row.__getitem__) for row in u.tolist()])
    for same in (u, a * u + b, torch.exp(u), u**3, torch.atan(u), F.log_softmax(u, -1)):
        assert torch.equal(decide(same), expected)


@settings(deadline=None)
@given(seed=SEEDS)
def test_least_expected_loss_by_the_formula(seed):
    u, losses = utilities(seed, (3, 4)), utilities(seed + 1, (3, 4, 4)).abs()
    p = utility_to_probability(u, temperature=0.5)
    chosen = decide(u, rule="mbr", probability=p, loss_matrix=losses)
    for row in range(3):
        risk = [sum(losses[row, d, c].item() * p[row, c].item() for c in range(4)) for d in range(4)]
        assert risk[chosen[row]] == min(risk)
        shared = decide(u[row], rule="mbr", probability=p[row], loss_matrix=losses[row])
        assert shared == chosen[row]
    fewer = decide(u, rule="mbr", probability=p, loss_matrix=losses[:, :2])
    assert fewer.max() < 2


@settings(deadline=None)
@given(seed=SEEDS)
def test_zero_one_loss_decides_for_the_most_probable_and_squared_loss_for_the_mean(seed):
    u = utilities(seed, (6, 5))
    p = utility_to_probability(u, prior=utilities(seed + 1, (5,)).exp())
    assert torch.equal(decide(u, rule="mbr", probability=p, loss_matrix=1 - torch.eye(5)), p.argmax(1))
    labels = torch.arange(5.0, dtype=torch.float64)
    nearest = (labels - (p @ labels).unsqueeze(1)).abs().argmin(1)
    square = (labels[:, None] - labels).square()
    assert torch.equal(decide(u, rule="mbr", probability=p, loss_matrix=square), nearest)


def test_without_a_probability_it_is_the_softmax():
    u, square = utilities(), (torch.arange(4)[:, None] - torch.arange(4)).square()
    p = F.softmax(u, -1)
    for options in ({"rule": "mbr", "loss_matrix": square}, {"rule": "sample"}):
        ones = decide(u, **options, generator=torch.Generator().manual_seed(2))
        others = decide(u, **options, probability=p, generator=torch.Generator().manual_seed(2))
        assert torch.equal(ones, others)


def test_samples_follow_the_probability():
    p = torch.tensor([0.5, 0.2, 0.3, 0.0])
    many = decide(torch.zeros(20_000, 4), rule="sample", probability=p.expand(20_000, 4), generator=_seeded())
    share = torch.bincount(many, minlength=4) / 20_000
    assert ((share - p).abs() <= 4 * (p * (1 - p) / 20_000).sqrt()).all()
    one = decide(torch.zeros(4), rule="sample", probability=p, generator=_seeded())
    assert one.shape == () and one == many[0]
    shaped = decide(torch.zeros(2, 3, 4), rule="sample", probability=p.expand(2, 3, 4), generator=_seeded())
    assert torch.equal(shaped.flatten(), many[:6])


def _seeded():
    return torch.Generator().manual_seed(11)


# --- wrong use

U, TARGET = torch.zeros(3, 4), torch.zeros(3, dtype=torch.long)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: utility_to_probability(U, temperature=0), "temperature = 0 is out of range"),
        (lambda: utility_to_probability(U, temperature=-1.0), "temperature = -1.0 is out of range"),
        (lambda: utility_to_probability(U, temperature=math.nan), "temperature = nan is out of range"),
        (lambda: utility_to_probability(U, temperature=math.inf), "temperature = inf is out of range"),
        (lambda: utility_to_probability(U.long()), "utility.dtype = torch.int64 is out of range: floating point"),
        (lambda: utility_to_probability(torch.tensor(1.0)), r"utility.shape = \(\) is out of range"),
        (lambda: utility_to_probability(U, prior=U[0] - 1), r"prior has a value out of range: \[0, inf\)"),
        (lambda: utility_to_probability(U, prior=U[0] / 0), r"prior has a value out of range: \[0, inf\)"),
        (lambda: utility_to_probability(U, prior=torch.ones(3)), r"prior.shape = \(3,\) is out of range: broadcast"),
        (lambda: utility_to_probability(U, candidates=TARGET), r"candidates.shape = \(3,\) is out of range: \(3, 4\)"),
        (lambda: fit_temperature(U[0], TARGET[0]), r"utility.shape = \(4,\) is out of range: \(N, C\)"),
        (lambda: fit_temperature(U[:0], TARGET[:0]), r"utility.shape = \(0, 4\) is out of range: \(N, C\) with N >= 1"),
        (lambda: fit_temperature(U, TARGET + 4), r"target = 4 is out of range: \[0, 4\)"),
        (lambda: fit_temperature(U, TARGET[:2]), r"target.shape = \(2,\) with utility of shape \(3, 4\)"),
        (lambda: fit_temperature(U.clone().index_fill_(1, TARGET[:1], -math.inf), TARGET), "target in row 0 is out of"),
        (lambda: fit_temperature(U + torch.tensor([0, 0, 0, math.nan]), TARGET), "utility has a value out of range"),
        (lambda: decide(U, rule="best"), "rule = 'best' is out of range: 'argmax', 'sample' or 'mbr'"),
        (lambda: decide(U, rule="mbr"), "loss_matrix = None is out of range: rule = 'mbr' needs one"),
        (lambda: decide(U, rule="mbr", loss_matrix=torch.zeros(4, 3)), r"loss_matrix.shape = \(4, 3\) is out of range"),
        (lambda: decide(U, rule="sample", probability=U), "probability has a row out of range"),
        (lambda: decide(U, rule="sample", probability=U - 1), "probability has a row out of range"),
        (lambda: decide(U, rule="sample", probability=U[0]), r"probability.shape = \(4,\) is out of range: \(3, 4\)"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_unknown_keywords_are_refused():
    for call in (utility_to_probability, decide):
        with pytest.raises(TypeError, match="no_such_argument"):
            call(U, no_such_argument=1)
    with pytest.raises(TypeError, match="no_such_argument"):
        fit_temperature(U, TARGET, no_such_argument=1)
