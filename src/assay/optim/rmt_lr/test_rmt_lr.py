"""The random-matrix formulas against matrices with noise, the learner against Polyak's theory."""

import copy
import functools
import io
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from assay import catalogue
from assay.bench.claims import recorded
from assay.bench.evidence import Bench, Rows
from assay.optim import (
    LanczosLR,
    batch_eigenvalue,
    critical_batch_size,
    curvature_lr,
    curvature_operator,
    estimate_noise,
    scale_lr,
)
from assay.optim.rmt_lr import claim as claim_module
from assay.optim.rmt_lr.claim import claim, data, rule_checks
from assay.optim.rmt_lr.lanczos_lr import extremes, rates

EXACT = {"rtol": 0.0, "atol": 0.0}
sizes = st.floats(1, 1e4)


def diagonal(*values):
    return torch.diag(torch.tensor(values, dtype=torch.float64))


def sgd(lr=0.1, **options):
    return torch.optim.SGD([nn.Parameter(torch.ones(3, dtype=torch.float64))], lr=lr, **options)


# --- the rules


def test_rules_double_and_take_roots():
    assert scale_lr(0.1, 64, 128) == pytest.approx(0.2)
    assert scale_lr(0.1, 64, 128, rule="sqrt") == pytest.approx(0.1 * 2**0.5)
    assert scale_lr(0.1, 64, 4096, critical_batch_size=256) == pytest.approx(0.4)
    assert scale_lr(0.1, 64, 4096, critical_batch_size=256, rule="sqrt") == pytest.approx(0.2)
    assert scale_lr(0.1, 512, 4096, critical_batch_size=256) == 0.1
    assert scale_lr(0.1, 512, 128, critical_batch_size=256) == pytest.approx(0.05)


@given(sizes, sizes, st.sampled_from(["linear", "sqrt"]), st.none() | sizes)
def test_there_and_back_is_the_identity(old, new, rule, critical):
    options = {"rule": rule, "critical_batch_size": critical}
    assert scale_lr(0.3, old, old, **options) == 0.3
    assert scale_lr(scale_lr(0.3, old, new, **options), new, old, **options) == pytest.approx(0.3, rel=1e-12)


# --- the formulas


@given(st.floats(0.01, 10), st.floats(0, 1), sizes, sizes, st.none() | st.floats(1, 100))
def test_the_eigenvalue_falls_to_that_of_all_data(lambda_1, noise_var, size, other, times):
    small, large = sorted((size, other))
    data = None if times is None else times * large
    eigenvalue = functools.partial(batch_eigenvalue, lambda_1, noise_var, 400)
    assert eigenvalue(small, data) >= eigenvalue(large, data) * (1 - 1e-12)
    assert eigenvalue(large, data) >= lambda_1
    assert eigenvalue(large, large) == lambda_1
    assert eigenvalue(1e15) == pytest.approx(lambda_1, rel=1e-6)
    assert batch_eigenvalue(-lambda_1, noise_var, 400, small, data) == -eigenvalue(small, data)


@given(st.floats(0.1, 10), st.floats(1e-4, 1), st.integers(1, 1000), st.none() | st.integers(2, 10**6))
def test_at_the_critical_size_the_phases_meet(lambda_1, noise_var, n_params, data):
    critical = critical_batch_size(lambda_1, noise_var, n_params, data)
    b = critical if data is None else critical / (1 - critical / data)
    assert n_params * noise_var / b == pytest.approx(lambda_1**2, rel=1e-6)
    assert data is None or critical < data
    for near in (critical * (1 - 1e-6), critical * (1 + 1e-6)):
        if data is None or near < data:
            assert batch_eigenvalue(lambda_1, noise_var, n_params, near, data) == pytest.approx(
                2 * lambda_1, rel=1e-5 * (1 + b / critical)
            )


@pytest.mark.parametrize("batch", [1, 2, 4, 8, 32])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_matrix_with_noise_has_the_eigenvalue_that_is_said(batch, sign):
    n, sigma2, spike = 400, 0.01, 1.0
    found = []
    for seed in range(4):
        noise = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        matrix = (torch.triu(noise) + torch.triu(noise, 1).T) * (sigma2 / batch) ** 0.5
        matrix[0, 0] += sign * spike
        found.append(torch.linalg.eigvalsh(matrix)[-1 if sign == 1 else 0].item())
    said = batch_eigenvalue(sign * spike, sigma2, n, batch)
    assert sum(found) / 4 == pytest.approx(said, rel=0.03)


@given(st.floats(0.1, 10), st.floats(0.01, 100), st.floats(1, 100), st.floats(1.5, 50), st.booleans())
def test_noise_is_found_again(lambda_1, total, small, ratio, whole):
    large = small * ratio
    data = large if whole else None
    measured = [batch_eigenvalue(lambda_1, total / 7, 7, size, data) for size in (large, small)]
    if not whole and large <= total / lambda_1**2 * 1.001:  # inside the noise at both sizes
        if large < total / lambda_1**2 * 0.999:
            with pytest.raises(ValueError, match="falling with the batch size"):
                estimate_noise([measured[0] * (1 - 1e-9), measured[1]], [large, small], data)
        return
    found = estimate_noise(measured, [large, small], data, n_params=7)
    assert found.lambda_1 == pytest.approx(lambda_1, rel=1e-3)
    assert found.noise_var * 7 == pytest.approx(total, rel=1e-3)
    again = [batch_eigenvalue(*found, 7, size, data) for size in (large, small)]
    assert again == pytest.approx(measured, rel=1e-6)


def test_a_real_network_gives_an_estimate():
    torch.manual_seed(0)
    x, y = torch.randn(200, 5, dtype=torch.float64), torch.randint(2, (200,))
    model = nn.Linear(5, 2).double()

    def largest(chosen):
        return torch.linalg.eigvalsh(
            curvature_operator(model, F.cross_entropy, [(x[chosen], y[chosen])]) @ torch.eye(12).double()
        )[-1].item()

    of_four = sum(largest(chosen) for chosen in torch.randperm(200).split(4)) / 50
    noise = estimate_noise([of_four, largest(torch.arange(200))], [4, 200], 200)
    assert noise.noise_var > 0 and batch_eigenvalue(*noise, 1, 4, 200) == pytest.approx(of_four)


# --- the step along the gradient


def test_the_curvature_rate_goes_to_the_minimum_along_the_gradient():
    h = diagonal(1.0, 4.0, 9.0)
    g = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    lr = curvature_lr(g, lambda v: h @ v)
    assert lr == pytest.approx((g @ g / (g @ h @ g)).item(), rel=1e-14)
    w = torch.linalg.solve(h, g)
    losses = [((w - rate * g) @ h @ (w - rate * g)).item() for rate in (0.999 * lr, lr, 1.001 * lr)]
    assert losses[1] < min(losses[0], losses[2])
    assert curvature_lr([g[:1], g[1:]], [(h @ g)[:1], (h @ g)[1:]]) == lr
    op = curvature_operator(linear(), F.mse_loss, [(torch.eye(2), torch.zeros(2, 1))])
    assert curvature_lr(torch.ones(2), op.product) == pytest.approx(1.0)


def linear():
    return nn.Linear(2, 1, bias=False)


@pytest.mark.parametrize("hvp", [torch.tensor([-1.0, -1.0]), torch.zeros(2), torch.full((2,), math.nan)])
def test_without_curvature_the_rate_stays(hvp):
    for previous in (0.0, 0.3):
        with pytest.warns(UserWarning, match="stays at"):
            assert curvature_lr(torch.ones(2), hvp, previous=previous) == previous


# --- the learner


@settings(max_examples=30, deadline=None)
@given(st.floats(1e-3, 10), st.floats(1.01, 1e4))
def test_polyaks_rates_contract_as_he_says(low, condition):
    high = low * condition
    lr, momentum = rates(high, low)
    root = math.sqrt(condition)
    for curvature in (low, math.sqrt(low * high), high):  # of the map (w, step) -> (w + step', step')
        step = torch.tensor([[1 - lr * curvature, momentum], [-lr * curvature, momentum]], dtype=torch.float64)
        radius = torch.linalg.eigvals(step).abs().max().item()
        assert radius == pytest.approx(max((root - 1) / (root + 1), momentum**0.5), abs=1e-4)
    plain, none = rates(high, low, momentum=False)
    assert none == 0 and abs(1 - plain * high) == pytest.approx(abs(1 - plain * low))
    assert rates(high, low, kind="adaptive") == rates(math.sqrt(high), math.sqrt(low), momentum=False)


def test_on_a_quadratic_the_learner_is_as_fast_as_theory_and_twice_over_lambda_is_the_edge():
    h = diagonal(1.0, 25.0, 100.0)
    w = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def descend(optimizer, steps=200):
        w.data.fill_(1)
        for _ in range(steps):
            optimizer.zero_grad()
            (w @ h @ w / 2).backward()
            optimizer.step()
        return w.detach().norm().item()

    optimizer = torch.optim.SGD([w], lr=1e-3)
    LanczosLR(optimizer, lambda: h)  # which of the three has the most weight is the starting vector's choice
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"]) in [pytest.approx(rates(100.0, low)) for low in (1.0, 25.0, 100.0)]
    group["lr"], group["momentum"] = rates(100.0, 1.0)
    assert descend(optimizer) < 10 * 200 * (9 / 11) ** 200
    assert descend(torch.optim.SGD([w], lr=1.98 / 100)) < 0.1 < 1e3 < descend(torch.optim.SGD([w], lr=2.02 / 100), 400)


def test_the_bulk_is_the_positive_value_of_most_weight():
    values = torch.tensor([-3.0, 0.0, 0.5, 2.0, 8.0], dtype=torch.float64)
    weights = torch.tensor([0.5, 0.2, 0.05, 0.15, 0.1], dtype=torch.float64)
    assert extremes(values, weights) == (8.0, 2.0)
    assert extremes(values * torch.tensor([1, 1, 1, 1e-6, 1]), weights) == (8.0, 8e-4)
    assert rates(1.0, 1e-4)[1] < 0.99 and rates(1.0, 1e-9)[1] == 0.99


@pytest.mark.parametrize(("options", "expected"), [
    ({}, rates(4.0, 4.0)),
    ({"safety": 0.5}, (0.125, 0.0)),
    ({"momentum": False}, (0.25, 0.9)),
    ({"kind": "adaptive"}, (0.5, 0.9)),
])  # fmt: skip
def test_groups_get_rate_and_momentum(options, expected):
    optimizer = sgd(momentum=0.9)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": torch.tensor(3.0)})
    tensor = optimizer.param_groups[1]["lr"]
    scheduler = LanczosLR(optimizer, diagonal(4.0, 4.0), **options)
    assert optimizer.param_groups[1]["lr"] is tensor
    for group in optimizer.param_groups:
        assert (float(group["lr"]), group["momentum"]) == pytest.approx(expected)
    assert (scheduler.lambda_max, scheduler.lambda_min) == pytest.approx((4, 4))


def test_adaptive_optimizers_keep_their_betas():
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(2))])
    LanczosLR(optimizer, diagonal(4.0, 4.0), kind="adaptive", safety=0.1)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05) and optimizer.param_groups[0]["betas"] == (0.9, 0.999)


def test_it_measures_at_its_interval_and_afresh():
    calls = []

    def operator():
        calls.append(len(calls) + 1)
        return diagonal(*[4.0 * len(calls)] * 3)

    optimizer = sgd()
    scheduler = LanczosLR(optimizer, operator, interval=3, momentum=False)
    seen = []
    for _ in range(7):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert calls == [1, 2, 3]
    assert seen == pytest.approx([1 / 4] * 3 + [1 / 8] * 3 + [1 / 12])
    assert scheduler.get_last_lr() == pytest.approx([1 / 12])


def test_it_leaves_no_trace_in_the_training():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 2))
    x, y = torch.randn(8, 3), torch.randint(2, (8,))
    F.cross_entropy(model(x), y).backward()
    kept = copy.deepcopy([dict(model.state_dict()), [p.grad for p in model.parameters()], torch.get_rng_state()])

    def operator():
        chosen = torch.randperm(8)[:4]
        return curvature_operator(model, F.cross_entropy, [(x[chosen], y[chosen])])

    LanczosLR(torch.optim.SGD(model.parameters(), lr=0.1), operator, steps=5)
    now = [dict(model.state_dict()), [p.grad for p in model.parameters()], torch.get_rng_state()]
    torch.testing.assert_close(now, kept, **EXACT)
    assert model.training


@pytest.mark.parametrize("matrix", [diagonal(-1.0, -2.0), diagonal(0.0, 0.0), diagonal(math.nan, 1.0)])
def test_without_positive_curvature_everything_stays(matrix):
    optimizer = sgd(lr=0.3, momentum=0.5)
    with pytest.warns(UserWarning, match="stay as they are"):
        scheduler = LanczosLR(optimizer, matrix)
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]) == (0.3, 0.5)
    scheduler.operator = diagonal(4.0, 4.0)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.25)
    scheduler.operator = matrix
    with pytest.warns(UserWarning, match="stay as they are"):
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.25)


def test_a_run_is_taken_up_to_the_bit():
    def run(steps, resume_at=None):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        x, y = torch.randn(30, 3, dtype=torch.float64), torch.randint(2, (30,))

        def made():
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            op = curvature_operator(model, F.cross_entropy, [(x, y)])
            return optimizer, LanczosLR(optimizer, op, steps=4, interval=2, safety=0.1)

        optimizer, scheduler = made()
        for step in range(steps):
            if step == resume_at:
                saved = io.BytesIO()
                torch.save([optimizer.state_dict(), scheduler.state_dict()], saved)
                saved.seek(0)
                states = torch.load(saved, weights_only=True)
                optimizer, scheduler = made()
                optimizer.load_state_dict(states[0])
                optimizer.param_groups[0]["momentum"] = 0.123  # the scheduler's state sets it
                scheduler.load_state_dict(states[1])
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            scheduler.step()
        return [p.detach() for p in model.parameters()], scheduler.get_last_lr(), scheduler.learned

    assert run(5)[2] is not None
    torch.testing.assert_close(run(7, resume_at=3), run(7), **EXACT)


def test_what_is_out_of_range_is_named():
    for call, message in [
        (lambda: scale_lr(-1, 1, 1), "lr = -1 is out of range"),
        (lambda: scale_lr(1, 0, 1), "batch_size = 0 is out of range"),
        (lambda: scale_lr(1, 1, -2), "new_batch_size = -2 is out of range"),
        (lambda: scale_lr(1, 1, 1, rule="cubic"), "rule = 'cubic' is out of range"),
        (lambda: scale_lr(1, 1, 1, critical_batch_size=0), "critical_batch_size = 0 is out of range"),
        (lambda: batch_eigenvalue(math.nan, 1, 1, 1), "lambda_1 = nan is out of range"),
        (lambda: batch_eigenvalue(1, -1, 1, 1), "noise_var = -1 is out of range"),
        (lambda: batch_eigenvalue(1, 1, 0, 1), "n_params = 0 is out of range"),
        (lambda: batch_eigenvalue(1, 1, 1, 0), "batch_size = 0 is out of range"),
        (lambda: batch_eigenvalue(1, 1, 1, 9, 8), "batch_size = 9 is out of range: at most dataset_size = 8"),
        (lambda: critical_batch_size(0, 1, 1), "lambda_1 = 0 is out of range"),
        (lambda: critical_batch_size(1, 1, 1, 0), "dataset_size = 0 is out of range"),
        (lambda: estimate_noise([1.0], [2, 3]), "eigenvalues = .* is out of range: two of them"),
        (lambda: estimate_noise([1.0, -2.0], [3, 2]), "eigenvalues = -2.0 is out of range"),
        (lambda: estimate_noise([1.0, 2.0], [2, 3]), "falling with the batch size"),
        (lambda: estimate_noise([1.0, 2.0], [2, 2]), "falling with the batch size"),
        (lambda: estimate_noise([9.0, 1.0], [2, 4]), "falling with the batch size"),
        (lambda: curvature_lr(torch.ones(2), torch.ones(3)), "hvp of other shapes than grad"),
        (lambda: curvature_lr(torch.ones(2), torch.ones(2), previous=-1), "previous = -1 is out of range"),
        (lambda: LanczosLR(sgd(), diagonal(1.0), steps=0), "steps = 0 is out of range"),
        (lambda: LanczosLR(sgd(), diagonal(1.0), interval=0.5), "interval = 0.5 is out of range"),
        (lambda: LanczosLR(sgd(), diagonal(1.0), safety=0), "safety = 0 is out of range"),
        (lambda: LanczosLR(sgd(), diagonal(1.0), kind="adam"), "kind = 'adam' is out of range"),
        (lambda: LanczosLR(sgd(momentum=0.9, dampening=0.5), diagonal(1.0)), "dampens it"),
        (lambda: LanczosLR(torch.optim.AdamW(sgd().param_groups[0]["params"]), diagonal(1.0)), "has no such option"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


# --- the claim


def of_all_data(model, loss_fn, batches):
    """Broken: the spectrum of the full Hessian, whatever the batch."""
    x, y = data(torch.float64)
    return curvature_operator(model, loss_fn, [(x, y)])


def linear_for_all(lr, batch_size, new_batch_size, *, rule):
    """Broken: Adam's rate in proportion to the batch."""
    return scale_lr(lr, batch_size, new_batch_size)


def test_without_the_noise_of_the_batch_the_claim_fails(monkeypatch):
    monkeypatch.setattr(claim_module, "DRAWS", 6)
    few = {"parts": ["spectrum"], "sizes": (32, 64)}
    assert claim(Bench(), operator=of_all_data, seeds=2, **few).checks[0].verdict == "does not hold"
    assert claim(Bench(), seeds=4, **few).checks[0].verdict == "holds"


def test_with_the_linear_rule_for_adam_the_claim_fails():
    """On the recorded runs, as what they measure does not depend on the rule."""
    rows = Rows(row for row in recorded(catalogue.find("rmt-lr"))[0].rows if row["variant"] in ("SGD", "Adam"))
    assert [check.verdict for check in rule_checks(rows, scale_lr)[:4]] == ["holds"] * 4
    broken = [check.verdict for check in rule_checks(rows, linear_for_all)]
    assert broken[2] == "does not hold" and broken[:2] == ["holds"] * 2
