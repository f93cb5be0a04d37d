"""MECO against its formulas, closed forms and quadrature; the two losses; the estimator."""

import copy
import functools
import io
import math
import pickle
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from assay._processes import run_on_two
from assay.bench.evidence import Bench
from assay.losses import meco_loss, nce_loss
from assay.optim import MECO, PartitionEstimator
from assay.optim.meco import claim as claim_module
from assay.optim.meco.claim import claim

OWN_STEP = ["MECO"]
EXACT = {"rtol": 0.0, "atol": 0.0}
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
lists = st.lists(st.floats(-5, 5), min_size=1, max_size=6)


def energies(seed=0):
    """A small energy model in two dimensions."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def log_p(model, x, shift=0.0):
    return shift + model(x).squeeze(1) - x.square().sum(1) / 4


def closure_of(model, step, shift=0.0, sizes=(7, 5)):
    draw = torch.Generator().manual_seed(step)
    x, z = (torch.randn(n, 2, generator=draw, dtype=torch.float64) for n in sizes)
    return lambda: (log_p(model, x + 1, shift), log_p(model, 2 * z, shift) + z.square().sum(1) / 2)


def train(optimizer, model, steps=range(5), **options):
    for step in steps:
        optimizer.step(closure_of(model, step, **options))
    return [p.detach().clone() for p in model.parameters()]


def by_hand(model, steps, lr, gamma, beta, weight_decay):
    """The formulas as they stand, u and r themselves and no logarithms."""
    params = list(model.parameters())
    u, v = None, None
    for step in range(steps):
        p_data, log_ratio = closure_of(model, step)()
        r = log_ratio.exp()
        u = r.mean().item() if u is None else (1 - gamma) * u + gamma * r.mean().item()
        of_data = torch.autograd.grad(p_data.mean(), params, retain_graph=True)
        of_ratio = torch.autograd.grad(r.mean(), params)
        d = [-a + b / u + weight_decay * p.detach() for a, b, p in zip(of_data, of_ratio, params, strict=True)]
        v = d if v is None else [(1 - beta) * old + beta * new for old, new in zip(v, d, strict=True)]
        with torch.no_grad():
            for p, step_of in zip(params, v, strict=True):
                p -= lr * step_of
    return [p.detach() for p in params], math.log(u)


@pytest.mark.parametrize("options", [
    {},
    {"lr": 0.1, "gamma": 0.3, "beta": 0.5, "weight_decay": 0.1},
    {"lr": 0.1, "gamma": 1.0, "beta": 1.0},
])  # fmt: skip
def test_trajectory_is_the_formula(options):
    said = {"lr": 1e-2, "gamma": 0.1, "beta": 0.1, "weight_decay": 0.0} | options
    expected, log_u = by_hand(energies(), 6, **said)
    model, unused = energies(), nn.Parameter(torch.zeros(2))
    optimizer = MECO([*model.parameters(), unused], **options)
    torch.testing.assert_close(train(optimizer, model, range(6)), expected, **CLOSE)
    assert optimizer.log_z == pytest.approx(log_u, abs=1e-12)
    assert not unused.any() and unused.grad is None


def test_without_memory_it_is_the_gradient_of_the_batchs_likelihood():
    model = energies()
    before = [p.detach().clone() for p in model.parameters()]
    p_data, log_ratio = closure_of(model, 0)()
    likelihood = -p_data.mean() + torch.logsumexp(log_ratio, 0) - math.log(len(log_ratio))
    gradient = torch.autograd.grad(likelihood, list(model.parameters()))
    optimizer = MECO(model.parameters(), lr=1.0, gamma=1.0, beta=1.0)
    loss = optimizer.step(closure_of(model, 0))
    for p, old, g in zip(model.parameters(), before, gradient, strict=True):
        torch.testing.assert_close(old - p.detach(), g, **CLOSE)
        torch.testing.assert_close(p.grad, g, **CLOSE)
    weights = torch.softmax(log_ratio.detach(), 0)
    assert loss.item() == pytest.approx((weights @ log_ratio - p_data.mean()).item()) and not loss.requires_grad


@pytest.mark.parametrize("shift", [-700.0, 3.0, 1e4])
def test_a_constant_in_the_energy_changes_nothing(shift):
    found = []
    for c in (0.0, shift):
        model = energies()
        optimizer = MECO(model.parameters(), lr=0.1)
        found.append((train(optimizer, model, shift=c), optimizer.log_z - c))
    torch.testing.assert_close(found[0][0], found[1][0], **CLOSE)
    assert found[0][1] == pytest.approx(found[1][1], abs=1e-8)


def test_the_direction_is_unbiased_where_one_batch_is_not():
    """theta frozen: p~ = exp(theta x), q = N(0, 1), so that the gradient of log Z is theta."""
    theta = torch.tensor(1.2, dtype=torch.float64, requires_grad=True)
    draw, means = torch.Generator().manual_seed(0), {}
    for gamma, steps in ((0.004, 2000), (1.0, 500)):
        estimator, directions = PartitionEstimator(gamma), []
        for step in range(steps):
            z = torch.randn(4, generator=draw, dtype=torch.float64)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                log_u = estimator.update(theta * z)
            if gamma == 1 or step >= 500:
                loss = meco_loss(torch.zeros(1), theta * z, log_u)
                directions.append(torch.autograd.grad(loss, theta)[0])
        found = torch.stack(directions)
        means[gamma] = found.mean().item(), (found.std() / len(found) ** 0.5).item()
    mean, error = means[0.004]
    # u itself is known to about sqrt(gamma / 2 * var(r) / 4): the error that the mean of the directions inherits.
    drift = 1.2 * (0.004 / 2 * (math.exp(1.44) - 1) / 4) ** 0.5
    assert abs(mean - 1.2) < 3 * (error + drift)
    assert means[1.0][0] < 1.2 - 5 * means[1.0][1]


def test_it_finds_the_likelihoods_optimum_and_log_z():
    """p~ = exp(-E) with E quadratic: the optimum is the data's mean and Z = sqrt(2 pi)."""
    theta = nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer, draw = MECO([theta], lr=0.05, gamma=0.05), torch.Generator().manual_seed(0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, 600)
    noise = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), 3.0)
    for _ in range(600):
        x, z = 2 + torch.randn(64, generator=draw).double(), 3 * torch.randn(64, generator=draw).double()
        optimizer.step(lambda x=x, z=z: (-((x - theta) ** 2) / 2, -((z - theta) ** 2) / 2 - noise.log_prob(z)))
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.001)
    assert theta.item() == pytest.approx(2, abs=0.1)
    z = 3 * torch.randn(200_000, generator=draw).double()
    refined = optimizer.partition.refine(-((z - theta.detach()) ** 2) / 2 - noise.log_prob(z))
    assert refined.item() == optimizer.log_z == pytest.approx(0.5 * math.log(2 * math.pi), abs=0.01)


# --- the estimator


@settings(max_examples=50, deadline=None)
@given(st.lists(lists, min_size=1, max_size=6), st.floats(0.01, 1))
def test_log_u_is_the_linear_recursion_and_bounds_the_weights(batches, gamma):
    estimator, u = PartitionEstimator(gamma), None
    for batch in batches:
        log_ratio = torch.tensor(batch, dtype=torch.float64, requires_grad=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            log_u = estimator.update(log_ratio)
        mean = sum(map(math.exp, batch)) / len(batch)
        u = mean if u is None else (1 - gamma) * u + gamma * mean
        assert log_u.item() == pytest.approx(math.log(u), abs=1e-12) and not log_u.requires_grad
        assert estimator.log_z == log_u.item()
        assert (log_ratio.detach() - log_u).exp().mean().item() <= 1 / gamma * (1 + 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_extreme_ratios_neither_overflow_nor_vanish(dtype):
    estimator = PartitionEstimator(0.1)
    for value in (1e4, -1e4, 1e4, -math.inf):
        log_ratio = torch.full((3,), value, dtype=dtype, requires_grad=True)
        log_u = estimator.update(log_ratio)
        loss = meco_loss(torch.zeros(2, dtype=dtype), log_ratio, log_u)
        (gradient,) = torch.autograd.grad(loss, log_ratio)
        assert log_u.isfinite() and loss.isfinite() and gradient.isfinite().all()
        assert log_u.dtype == torch.promote_types(dtype, torch.float32)
        assert gradient.sum() <= 10 * 1.01


def test_a_single_sample_that_decides_is_warned_of():
    estimator = PartitionEstimator()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimator.update(torch.zeros(4))
        assert estimator.ess == pytest.approx(4)
        estimator.update(torch.tensor([3.0, 3.0, -50.0]))
        assert estimator.ess == pytest.approx(2)
        estimator.update(torch.tensor([5.0]))
    with pytest.warns(UserWarning, match="of 3 noise samples 1.00 count"):
        estimator.update(torch.tensor([0.0, 30.0, 1.0]))


def test_noise_that_cannot_see_the_mass_is_warned_of():
    """The setting of the landscape: data at 16, noise N(0, 1)."""
    theta, draw = nn.Parameter(torch.zeros(())), torch.Generator().manual_seed(0)
    optimizer = MECO([theta], lr=0.01)
    noise = torch.distributions.Normal(0.0, 1.0)

    def closure():
        x, z = 16 + torch.randn(32, generator=draw), torch.randn(32, generator=draw)
        return -((x - theta) ** 2) / 2, -((z - theta) ** 2) / 2 - noise.log_prob(z)

    with pytest.warns(UserWarning, match="does not reach where the model has its mass"):
        for _ in range(300):
            optimizer.step(closure)
    assert optimizer.partition.ess < 1.5


# --- the losses


@settings(max_examples=30, deadline=None)
@given(lists, lists, st.floats(-3, 3))
def test_the_surrogate_is_its_formula(data, ratio, log_u):
    p_data, log_ratio = (torch.tensor(values, dtype=torch.float64, requires_grad=True) for values in (data, ratio))
    loss = meco_loss(p_data, log_ratio, torch.tensor(log_u, dtype=torch.float64, requires_grad=True))
    weights = [math.exp(r - log_u) / len(ratio) for r in ratio]
    said = sum(w * r for w, r in zip(weights, ratio, strict=True)) - sum(data) / len(data)
    assert loss.item() == pytest.approx(said, rel=1e-10, abs=1e-12)
    gradients = torch.autograd.grad(loss, [p_data, log_ratio])
    assert gradients[0].tolist() == pytest.approx([-1 / len(data)] * len(data))
    assert gradients[1].tolist() == pytest.approx(weights)
    assert meco_loss(p_data, log_ratio, log_u).item() == pytest.approx(said, rel=1e-10, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(lists, lists, st.floats(0.2, 5))
def test_nce_is_the_log_likelihood_of_telling_data_from_noise(data, noise, nu):
    def right(g):  # P(data | x) with nu samples of noise for one of data
        return math.exp(g) / (math.exp(g) + nu)

    said = -sum(math.log(right(g)) for g in data) / len(data)
    said -= nu * sum(math.log(1 - right(g)) for g in noise) / len(noise)
    found = nce_loss(*(torch.tensor(values, dtype=torch.float64) for values in (data, noise)), nu)
    assert found.item() == pytest.approx(said, rel=1e-10)


def test_nce_is_least_at_the_truth_and_takes_infinities():
    """Data N(1, 1), noise N(0, 2^2), by quadrature: the gradient in the mean and in c is zero at the true ones."""
    x = torch.linspace(-12, 14, 4001, dtype=torch.float64)
    data, noise = (torch.distributions.Normal(torch.tensor(m).double(), s).log_prob(x) for m, s in ((1.0, 1), (0.0, 2)))
    mean, c = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (1.0, -0.5 * math.log(2 * math.pi)))
    g = -((x - mean) ** 2) / 2 + c - noise
    for nu in (1.0, 4.0):
        each = torch.stack([nce_loss(v[None], torch.full((1,), -math.inf).double(), nu) for v in g[::40]])
        other = torch.stack([nce_loss(torch.full((1,), math.inf).double(), v[None], nu) for v in g[::40]])
        loss = (data.exp()[::40] * each + noise.exp()[::40] * other).sum() * (x[40] - x[0])
        torch.testing.assert_close(torch.autograd.grad(loss, [mean, c], retain_graph=True), (mean * 0, c * 0), **CLOSE)


# --- the optimizer as one of torch's


def test_a_base_gets_the_direction_as_its_gradient():
    model, other = energies(), energies()
    optimizer = MECO(None, base=torch.optim.Adam(model.parameters(), lr=0.05), beta=0.7)
    adam, estimator = torch.optim.Adam(other.parameters(), lr=0.05), PartitionEstimator()
    for step in range(5):
        optimizer.step(closure_of(model, step))
        p_data, log_ratio = closure_of(other, step)()
        adam.zero_grad()
        meco_loss(p_data, log_ratio, estimator.update(log_ratio)).backward()
        adam.step()
    torch.testing.assert_close(list(model.parameters()), list(other.parameters()), **EXACT)
    assert optimizer.param_groups is optimizer.base.param_groups


@pytest.mark.parametrize("base", [None, functools.partial(torch.optim.AdamW, lr=0.05)])
def test_resuming_and_copies_go_on_to_the_bit(base):
    def made(model):
        return MECO(model.parameters(), lr=0.1, base=base and base(model.parameters()))

    model = energies()
    optimizer = made(model)
    train(optimizer, model, range(3))
    saved = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], saved)
    saved.seek(0)
    copies = [copy.deepcopy((optimizer, model)), pickle.loads(pickle.dumps((optimizer, model)))]
    resumed = energies(seed=9)
    fresh = made(resumed)
    weights, state = torch.load(saved, weights_only=True)
    resumed.load_state_dict(weights)
    fresh.load_state_dict(state)
    expected = train(optimizer, model, range(3, 6))
    for one, its in [*copies, (fresh, resumed)]:
        torch.testing.assert_close(train(one, its, range(3, 6)), expected, **EXACT)
        assert one.log_z == optimizer.log_z
    assert math.isnan(made(model).log_z)
    made(model).load_state_dict(made(model).state_dict())


def test_groups_and_schedulers_set_the_rates():
    model = energies()
    optimizer = MECO([{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2].parameters()}], lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.0)
    before = [p.detach().clone() for p in model.parameters()]
    first = train(optimizer, model, range(1))
    schedule.step()
    second = train(optimizer, model, range(1, 2))
    assert all(torch.equal(p, q) for p, q in zip(first[:2], before[:2], strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(first[2:], before[2:], strict=True))
    torch.testing.assert_close(second, first, **EXACT)


def test_the_closure_is_called_once_with_gradients_and_old_ones_do_not_count():
    model = energies()
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e6)
    optimizer, calls, inner = MECO(model.parameters()), [], closure_of(model, 0)

    def closure():
        calls.append(torch.is_grad_enabled())
        return inner()

    with torch.no_grad():
        optimizer.step(closure)
    assert calls == [True] and all(p.grad.abs().max() < 100 for p in model.parameters())


def test_two_processes_are_one(tmp_path):
    run_on_two(
        "from assay.optim.meco.test_meco import on_each\nfor kind in ('ddp', 'fsdp2'): on_each(rank, kind)", tmp_path
    )


class Both(nn.Module):
    """log p~ of data and noise in one pass, as wrappers around a module want it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return log_p(self.model, x)


def on_each(rank, kind):
    """This process's half of the data and of the noise."""
    whole = energies()
    alone = MECO(whole.parameters(), lr=0.1, beta=0.5)
    model = Both(energies())
    if kind == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard

        wrapped = fully_shard(model, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (2,)))
    optimizer = MECO(wrapped.parameters(), lr=0.1, beta=0.5)
    mine = slice(3 * rank, 3 * rank + 3)

    def closure(density, x, z):
        p_x, p_z = density(torch.cat([x, z])).split([len(x), len(z)])
        return p_x, p_z + z.square().sum(1) / 2

    for step in range(4):
        draw = torch.Generator().manual_seed(step)
        x, z = (torch.randn(6, 2, generator=draw, dtype=torch.float64) for _ in range(2))
        optimizer.step(functools.partial(closure, wrapped, x[mine], z[mine]))
        # Both processes hold all of it here, and the mean of two equal means is that mean.
        alone.step(functools.partial(closure, functools.partial(log_p, whole), x, z))
    found = [p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in wrapped.parameters()]
    torch.testing.assert_close(found, [p.detach() for p in whole.parameters()], rtol=1e-9, atol=1e-11)
    assert optimizer.log_z == pytest.approx(alone.log_z, abs=1e-12)


def test_what_is_out_of_range_is_named():
    p, fine = nn.Parameter(torch.zeros(2)), torch.zeros(3)
    for options, message in [
        ({"lr": -1.0}, "lr = -1.0 is out of range"),
        ({"lr": math.nan}, "lr = nan is out of range"),
        ({"weight_decay": -1}, "weight_decay = -1 is out of range"),
        ({"gamma": 0}, r"gamma = 0 is out of range: \(0, 1\]"),
        ({"gamma": 1.5}, "gamma = 1.5 is out of range"),
        ({"beta": 0.0}, "beta = 0.0 is out of range"),
    ]:
        with pytest.raises(ValueError, match=message):
            MECO([p], **options)
    with pytest.raises(TypeError, match=r"base = .* is out of range: None, or an optimizer"):
        MECO([p], base=torch.optim.Adam)
    with pytest.raises(TypeError, match="speed"):
        MECO([p], speed=1)
    with pytest.raises(ValueError, match="empty parameter list"):
        MECO([])
    optimizer = MECO([p])
    with pytest.raises(RuntimeError, match="needs the densities"):
        optimizer.step()
    for values, message in [
        (torch.tensor([0.0, math.nan]), "log_ratio holds nan, which is out of range"),
        (torch.tensor([0.0, math.inf]), "log_ratio holds inf, which is out of range"),
        (torch.zeros(2, 3), r"log_ratio.shape = \(2, 3\) is out of range: \(n,\) .* for each context"),
        (torch.zeros(0), r"log_ratio.shape = \(0,\) is out of range"),
        (torch.full((2,), -math.inf), "no sample of the noise lies where the model has mass"),
    ]:
        with pytest.raises(ValueError, match=message):
            optimizer.step(lambda values=values: (p.sum() + fine, values))
    with pytest.raises(ValueError, match="log_p_data holds nan"):
        meco_loss(fine * math.nan, fine, 0.0)
    with pytest.raises(ValueError, match="log_p_data_ratio holds nan"):
        nce_loss(fine * math.nan, fine)
    with pytest.raises(ValueError, match="nu = 0 is out of range"):
        nce_loss(fine, fine, 0)
    assert not p.any() and p.grad is None


# --- the claim


def test_without_tracking_the_claim_fails(monkeypatch):
    """On the steps at equal rates, with noise of width 8, beside NCE that learns Z."""
    monkeypatch.setattr(claim_module, "METHODS", claim_module.METHODS[:2])
    few = {"parts": ["mean"], "widths": (8.0,), "tuned": (False,), "seeds": 2}
    assert claim(Bench(), method=functools.partial(MECO, gamma=1.0), **few).verdict == "does not hold"
    assert claim(Bench(), **few).verdict == "holds"
