"""SSO against its formulas and the authors' code in plain numpy, its guarantees, and how often it asks."""

import copy
import functools
import io
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from assay.bench.evidence import Bench
from assay.optim import SSO, ArmijoGD, target_surrogate
from assay.optim.sso import claim as room
from assay.optim.sso.smoothness import smoothness

OWN_STEP = {"SSO", "ArmijoGD"}
EXACT = {"rtol": 0.0, "atol": 0.0}
CLOSE = {"rtol": 1e-8, "atol": 1e-8}


def logistic_data(seed=0, n=12, d=4):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)), (rng.random(n) < 0.5).astype(float)


def bce(z, y):
    return (np.logaddexp(0, z) - y * z).sum()


def asks(X, w, y, reduction="sum", count=None):
    """A closure of the logistic regression with weights w, and a list with an entry for each call of the loss."""
    X, y, calls = torch.as_tensor(X), torch.as_tensor(y), [] if count is None else count

    def loss_fn(z):
        calls.append(z.requires_grad)
        return F.binary_cross_entropy_with_logits(z, y, reduction=reduction)

    return lambda: (X @ w, loss_fn)


def weights(d=4):
    return nn.Parameter(torch.zeros(d, dtype=torch.float64))


def walk(X, y, steps, **options):
    w = weights(X.shape[1])
    optimizer, path, losses = SSO([w], **options), [], []
    for _ in range(steps):
        losses.append(optimizer.step(asks(X, w, y)).item())
        path.append(w.detach().clone())
    return torch.stack(path), losses


def authors(X, y, steps, m, eta, schedule="constant", total=None, target="constant", scaled=True):
    """The authors' SSO on the summed logistic loss, their surrogate as a mean if ``scaled``, else the paper's."""
    w, path, squares, found = np.zeros(X.shape[1]), [], 0.0, None
    n = len(y)
    for t in range(1, steps + 1):
        z0 = X @ w
        g = 1 / (1 + np.exp(-z0)) - y
        eta_t = eta
        if target == "armijo":
            eta_t = 1.8 * (found or eta)
            while bce(z0 - eta_t * g, y) > bce(z0, y) - 0.5 * eta_t * g @ g:
                eta_t *= 0.9
            found = eta_t
        eta_t *= {"constant": 1, "stochastic": t**-0.5, "exponential": (1 / (total or 1)) ** (t / (total or 1))}[
            schedule
        ]
        if target == "adagrad":
            squares += g @ g
            eta_t /= math.sqrt(squares) + 1e-6
        scale = 2 * eta_t / n if scaled else 1.0  # from the paper's surrogate to the code's

        def S(v, z0=z0, g=g, eta_t=eta_t, scale=scale):
            away = X @ v - z0
            return scale * (g @ away + away @ away / (2 * eta_t))

        a = 10.0
        for _ in range(m):
            d = scale * X.T @ (g + (X @ w - z0) / eta_t)
            a, start = 2 * a, S(w)
            for _ in range(100):
                if S(w - a * d) <= start - 0.1 * a * d @ d:
                    break
                a *= 0.9
                if a < 1e-6:
                    break
            w = w - a * d
            if np.linalg.norm(d) <= 1e-6:
                break
        path.append(w)
    return torch.from_numpy(np.array(path))


@pytest.mark.parametrize("m", [1, 5, 20])
@pytest.mark.parametrize("eta_code", [0.5, 4.0])
def test_the_authors_code_is_reproduced_by_the_scale_of_the_inner_steps(m, eta_code):
    X, y = logistic_data()
    eta = 1 / (2 * eta_code)
    path, _ = walk(X, y, 8, lr=eta, inner_steps=m, init_step=10 * 2 * eta / len(y), grad_tol=0.0)
    torch.testing.assert_close(path, authors(X, y, 8, m, eta), **CLOSE)


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": "stochastic"},
        {"schedule": "exponential", "total_steps": 6},
        {"target": "adagrad"},
        {"target": "armijo"},
        {"target": "adagrad", "schedule": "stochastic"},
        {"target": "armijo", "schedule": "stochastic"},
    ],
    ids=str,
)
def test_schedules_and_targets_are_the_formula(options):
    X, y = logistic_data(1)
    path, _ = walk(X, y, 6, lr=3.0, inner_steps=4, **options)
    said = {{"total_steps": "total"}.get(name, name): value for name, value in options.items()}
    torch.testing.assert_close(path, authors(X, y, 6, 4, 3.0, scaled=False, **said), **CLOSE)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def test_at_the_start_the_surrogate_has_the_gradient_of_the_loss():
    model, x, y = network(), torch.randn(7, 3).double(), torch.randint(2, (7,))
    params, z = list(model.parameters()), model(x)
    z0 = z.detach().clone().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(z0, y), z0)
    value = target_surrogate(z, z0, g, 0.3)
    assert value.item() == 0
    for mine, true in zip(
        torch.autograd.grad(value, params), torch.autograd.grad(F.cross_entropy(model(x), y), params), strict=True
    ):
        torch.testing.assert_close(mine, true, rtol=1e-10, atol=1e-12)
    away = torch.randn(7, 2).double()
    by_hand = sum(a * b + a * a / 0.6 for a, b in zip(away.flatten().tolist(), g.flatten().tolist(), strict=True))
    assert target_surrogate(z0 + away, z0, g, 0.3).item() == pytest.approx(by_hand, rel=1e-12)
    with pytest.raises(ValueError, match=r"z.shape = \(7, 2\) is out of range: \(7,\)"):
        target_surrogate(z, z[:, 0], g, 0.3)


def test_one_plain_inner_step_is_sgd():
    model, x, y = network(), torch.randn(7, 3).double(), torch.randint(2, (7,))
    other = copy.deepcopy(model)
    mine = SSO(model.parameters(), 0.7, 1, inner=functools.partial(torch.optim.SGD, lr=0.1))
    plain = torch.optim.SGD(other.parameters(), lr=0.1)
    for _ in range(5):
        loss = mine.step(lambda: (model(x), lambda z: F.cross_entropy(z, y)))
        plain.zero_grad()
        expected = F.cross_entropy(other(x), y)
        expected.backward()
        plain.step()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(list(model.parameters()), list(other.parameters()), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("inner", ["armijo", functools.partial(torch.optim.LBFGS, lr=1.0, max_iter=20)], ids=str)
def test_with_squared_errors_one_step_lands_on_least_squares(inner):
    X, _ = logistic_data(2, 20, 3)
    y = X @ [1.0, -2.0, 0.5] + np.sin(np.arange(20))
    w, target = weights(3), torch.from_numpy(y)
    optimizer = SSO([w], 1.0, 400, inner=inner, grad_tol=1e-12)
    optimizer.step(lambda: (torch.from_numpy(X) @ w, lambda z: 0.5 * (z - target).square().sum()))
    torch.testing.assert_close(w.detach(), torch.from_numpy(np.linalg.lstsq(X, y)[0]), rtol=0, atol=1e-6)
    assert optimizer.counts["gradients"] == 1


@pytest.mark.parametrize("m", [1, 10, 100])
def test_with_all_data_and_the_smoothness_the_loss_never_rises(m):
    X, y = logistic_data(3, 40, 5)
    _, losses = walk(X, y, 200 if m == 1 else 20, lr=4.0, inner_steps=m)
    assert (np.diff(losses) <= 1e-13).all() and losses[-1] < losses[0] - 1


def test_the_loss_is_asked_once_however_many_the_steps():
    X, y = logistic_data()
    for m, options in [(1, {}), (25, {}), (25, {"target": "adagrad"}), (25, {"schedule": "stochastic"})]:
        calls, w = [], weights()
        optimizer = SSO([w], 4.0, m, **options)
        for _ in range(4):
            optimizer.step(asks(X, w, y, count=calls))
        assert calls == 4 * [True]
        assert optimizer.counts["gradients"] == optimizer.counts["losses"] == 4
        assert optimizer.counts["forwards"] >= 4 * m or optimizer.counts["forwards"] >= 8
    calls, w = [], weights()
    optimizer = SSO([w], 4.0, 25, target="armijo")
    optimizer.step(asks(X, w, y, count=calls))
    assert calls[0] and not any(calls[1:]) and 2 <= len(calls) == optimizer.counts["losses"]


def test_a_penalty_is_part_of_the_surrogate():
    X, y = logistic_data(4, 30, 3)
    w, XT, yT = weights(3), torch.from_numpy(X), torch.from_numpy(y)
    optimizer = SSO([w], 4.0, 5, grad_tol=1e-5)
    for _ in range(60):
        optimizer.step(lambda: (XT @ w, lambda z: F.binary_cross_entropy_with_logits(z, yT, reduction="sum"), w @ w))
    gradient = XT.T @ (torch.sigmoid(XT @ w) - yT) + 2 * w
    assert gradient.norm() < 1e-4


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_smoothness_of_known_losses(reduction):
    z, generator = torch.randn(6, 3).double(), torch.Generator().manual_seed(0)
    classes, floats = torch.tensor([0, 2, 1, -100, 0, 1]), torch.rand(6, 3, generator=generator).double()
    soft = floats / floats.sum(1, keepdim=True)
    for module, function, target, sharp in [
        (nn.BCEWithLogitsLoss, F.binary_cross_entropy_with_logits, floats, torch.zeros(6, 3)),
        (nn.MSELoss, F.mse_loss, floats, torch.zeros(6, 3)),
        (nn.CrossEntropyLoss, F.cross_entropy, classes, torch.tensor([0.0, 0.0, -99.0]).expand(6, 3)),
        (nn.CrossEntropyLoss, F.cross_entropy, soft, torch.tensor([0.0, 0.0, -99.0]).expand(6, 3)),
    ]:
        loss = functools.partial(module(reduction=reduction), target=target)
        hessian = torch.autograd.functional.hessian(loss, sharp.double()).view(18, 18)
        largest = torch.linalg.eigvalsh(hessian)[-1].item()  # the largest there is, at these outputs
        assert smoothness(loss, z) == pytest.approx(largest, rel=1e-6)
        assert smoothness(functools.partial(function, target=target, reduction=reduction), z) == smoothness(loss, z)
    X, y = logistic_data()
    known, w = functools.partial(nn.BCEWithLogitsLoss(reduction=reduction), target=torch.from_numpy(y)), weights()
    optimizer = SSO([w], "smoothness", 3)
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.step(lambda: (torch.from_numpy(X) @ w, known))
    n, v = 12 if reduction == "mean" else 1, weights()
    SSO([v], 2.0 * n, 3).step(lambda: (torch.from_numpy(X) @ v, known))
    assert torch.equal(w, v)
    weighted = functools.partial(nn.CrossEntropyLoss(torch.ones(3)), target=classes)
    for unknown in (lambda z: z.sum(), functools.partial(F.l1_loss, target=floats), weighted):
        with pytest.raises(ValueError, match="lr = 'smoothness' is out of range for loss_fn"):
            smoothness(unknown, z)


def test_dropout_must_be_held_fixed():
    model = nn.Sequential(nn.Linear(3, 50), nn.Dropout(0.5), nn.Linear(50, 1))
    x, y = torch.randn(20, 3), torch.rand(20, 1)
    optimizer = SSO(model.parameters(), 20 / 2, 10)

    def closure():
        return model(x), lambda z: F.mse_loss(z, y)

    def held():
        with torch.random.fork_rng():
            torch.manual_seed(7)
            return closure()

    losses = [optimizer.step(held).item() for _ in range(5)]
    assert (np.diff(losses) <= 1e-6).all()
    start = copy.deepcopy(model.state_dict())
    rises = []
    for _ in range(5):
        model.load_state_dict(start)
        optimizer.step(closure)
        rises.append(held()[1](held()[0]).item() - losses[-1])
    assert max(rises) > 1e-3, "with new masks at each look the surrogate is of another function"


@pytest.mark.parametrize(
    "options",
    [
        {"target": "adagrad", "schedule": "stochastic"},
        {"target": "armijo"},
        {"reset_step": False},
        {"reset_step": False, "inner": functools.partial(torch.optim.Adam, lr=0.05)},
    ],
    ids=str,
)
def test_resuming_and_copies_go_on_to_the_bit(options):
    X, y = logistic_data(5)
    whole, _ = walk(X, y, 6, lr=2.0, inner_steps=5, **options)
    w = weights()
    optimizer = SSO([w], 2.0, 5, **options)
    for _ in range(3):
        optimizer.step(asks(X, w, y))
    saved = io.BytesIO()
    torch.save([optimizer.state_dict(), w.detach()], saved)
    saved.seek(0)
    state, value = torch.load(saved, weights_only=True)
    v = nn.Parameter(value)
    resumed = SSO([v], 2.0, 5, **options)
    resumed.load_state_dict(state)
    for x, one in [copy.deepcopy((w, optimizer)), (v, resumed), (w, optimizer)]:
        for _ in range(3):
            one.step(asks(X, x, y))
        torch.testing.assert_close(x.detach(), whole[-1], **EXACT)
        assert one.counts == optimizer.counts or x is not w


def test_gradients_stay_and_other_parameters_too():
    X, y = logistic_data()
    w, frozen, other = (
        weights(),
        nn.Parameter(torch.ones(4).double(), requires_grad=False),
        nn.Parameter(torch.ones(4).double()),
    )
    w.grad, idle = torch.full_like(w, 9.0), nn.Parameter(torch.ones(2))
    optimizer = SSO([w, frozen, idle], 4.0, 3)
    XT = torch.from_numpy(X)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.25)
    optimizer.step(
        lambda: (XT @ (w + other * frozen), lambda z: F.binary_cross_entropy_with_logits(z, torch.from_numpy(y)))
    )
    assert (w.grad == 9).all() and other.grad is None and (frozen == 1).all() and (idle == 1).all() and w.any()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 1.0
    v, u = (nn.Parameter(w.detach().clone()) for _ in range(2))
    for x, lr in ((v, 1.0), (u, 4.0)):
        SSO([x], lr, 3).step(asks(X, x, y))
    optimizer = SSO([w], 4.0, 3)
    optimizer.param_groups[0]["lr"] = 1.0
    optimizer.step(asks(X, w, y))
    assert torch.equal(w, v) and not torch.equal(w, u)


def test_what_sso_cannot_use_is_refused_by_name():
    w = nn.Parameter(torch.zeros(4))
    for options, message in [
        ({"lr": 0.0}, "lr = 0.0 is out of range: a number > 0 or 'smoothness'"),
        ({"lr": "best"}, "lr = 'best' is out of range"),
        ({"lr": math.nan}, "lr = nan is out of range"),
        ({"inner_steps": 0}, "inner_steps = 0 is out of range"),
        ({"inner": "newton"}, "inner = 'newton' is out of range: 'armijo' or"),
        ({"schedule": "cosine"}, "schedule = 'cosine' is out of range: 'constant', 'stochastic'"),
        ({"schedule": "exponential"}, "total_steps = None is out of range"),
        ({"total_steps": 0}, "total_steps = 0 is out of range"),
        ({"target": "best"}, "target = 'best' is out of range"),
        ({"armijo_c": 1.0}, "armijo_c = 1.0 is out of range"),
        ({"backtrack": 1.0}, "backtrack = 1.0 is out of range"),
        ({"expand": 0.5}, "expand = 0.5 is out of range"),
        ({"init_step": 0.0}, "init_step = 0.0 is out of range"),
        ({"grad_tol": -1.0}, "grad_tol = -1.0 is out of range"),
    ]:
        with pytest.raises(ValueError, match=message):
            SSO([w], **options)
    with pytest.raises(TypeError, match="speed"):
        SSO([w], speed=1)
    with pytest.raises(TypeError, match="SSO has no option 'speed'"):
        SSO([{"params": [w], "speed": 1}])
    optimizer = SSO([w])
    with pytest.raises(ValueError, match="a second group is out of range"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    with pytest.raises(RuntimeError, match="needs the model's outputs"):
        optimizer.step()
    with pytest.raises(ValueError, match="what the closure returned is out of range"):
        optimizer.step(lambda: w.sum())
    with pytest.raises(RuntimeError, match="carry no gradient"):
        optimizer.step(lambda: (torch.zeros(3), torch.sum))
    shapes = iter((3, 2))
    with pytest.raises(ValueError, match=r"z.shape = \(2,\) is out of range: \(3,\)"):
        optimizer.step(lambda: (w[: next(shapes)], lambda z: (z - 1).square().sum()))
    assert w.grad is None
    for make in (SSO, ArmijoGD):
        with pytest.raises(RuntimeError, match="does not support sharded or complex"):
            make([nn.Parameter(torch.ones(2, dtype=torch.complex64))])
        sharded = nn.Parameter(torch.ones(2))
        sharded.to_local = sharded.detach
        with pytest.raises(RuntimeError, match="does not support sharded or complex"):
            make([sharded])


# --- the claim


class Recomputing(SSO):
    """Broken: each inner step asks for the gradient again, which is gradient descent in several steps."""

    def __init__(self, params, lr, inner_steps, **options):
        super().__init__(params, lr, 1, **options)
        self.times = inner_steps

    def step(self, closure):
        for _ in range(self.times):
            loss = super().step(closure)
        return loss


class Linear(SSO):
    """Broken: the surrogate without its price for going away."""

    def _eta(self, *args):
        return math.inf


@pytest.mark.parametrize(
    ("method", "verdicts"),
    [
        (SSO, ["holds", "holds"]),
        (Recomputing, ["holds", "does not hold"]),
        (Linear, ["does not hold", "holds"]),
    ],
)
def test_broken_variants_are_found_out(method, verdicts):
    evidence = room.claim(Bench(quick=True), method=method, parts=["guarantee"], careful=[10])
    assert [check.verdict for check in evidence.checks] == verdicts
