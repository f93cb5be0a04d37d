"""Normalized LR+GD against its formula in loops, limits and bounds; the loss, the perceptrons, the classifier."""

import copy
import functools
import io
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.estimator_checks import check_estimator
from torch import nn

from assay.bench.arms import DEFAULT_RECIPE
from assay.bench.evidence import Bench
from assay.bench.loop import fit
from assay.bench.recipe import Budget
from assay.bench.tasks import resolve_task
from assay.linear_model import NormalizedLogisticClassifier
from assay.losses import normalized_logistic
from assay.optim import NormalizedLRGD, PerceptronResult, batch_perceptron, normalized_lr_scale, perceptron
from assay.optim.normalized_lr.claim import TABLE, PlainGD, claim, steps_until_right, worst_case
from assay.optim.normalized_lr.normalized_lr import apply

OWN_STEP = {"NormalizedLRGD"}
EXACT = {"rtol": 0.0, "atol": 0.0}
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def random_data(seed=0, n=30, d=4):
    """Rows and labels that no plane separates."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return X, 2 * torch.randint(2, (n,), generator=generator) - 1


def separable_data(seed, n, d, margin):
    """Signed rows y_i a_i that a unit vector separates with exactly this margin."""
    rng = np.random.default_rng(seed)
    u = rng.normal(size=d)
    u /= np.linalg.norm(u)
    a = rng.normal(size=(n, d))
    a += np.outer(margin + (n > 1) * np.abs(rng.normal(size=n)) - a @ u, u)
    return torch.from_numpy(a)


def by_hand(X, y, lr, steps, theta=None, plain=False, eps=0.0):
    """Trajectory of the formula, in loops."""
    X, y = X.tolist(), y.tolist()
    n, d = len(X), len(X[0])
    theta = [0.0] * d if theta is None else list(theta)
    path = []
    for _ in range(steps):
        p = [1 / (1 + math.exp(y[i] * sum(X[i][j] * theta[j] for j in range(d)))) for i in range(n)]
        beta = 1.0 if plain else 1 / (sum(p) / n + eps)
        theta = [theta[j] + lr * beta / n * sum(p[i] * y[i] * X[i][j] for i in range(n)) for j in range(d)]
        path.append(theta)
    return torch.tensor(path, dtype=torch.float64)


def walk(make, X, y, lr, steps, theta=None):
    p = nn.Parameter(torch.zeros(X.shape[1], dtype=X.dtype) if theta is None else theta.clone())
    optimizer, path = make([p], lr), []
    for _ in range(steps):
        optimizer.step(lambda: y * (X @ p))
        path.append(p.detach().clone())
    return torch.stack(path)


class OnTheLoss(PlainGD):
    """SGD on the normalized loss: the method by its other route."""

    def loss(self, margins):
        return normalized_logistic(margins)


class Scaled(PlainGD):
    """SGD on the logistic loss times beta: the third route."""

    def loss(self, margins):
        return super().loss(margins) * normalized_lr_scale(margins)


# --- the method


@pytest.mark.parametrize("make", [NormalizedLRGD, OnTheLoss, Scaled])
@pytest.mark.parametrize("lr", [0.1, 3.0, 20.0])
def test_optimizer_loss_and_scale_are_the_formula(make, lr):
    X, y = random_data()
    torch.testing.assert_close(walk(make, X, y, lr, 15), by_hand(X, y, lr, 15), **CLOSE)
    start = torch.tensor([0.3, -1.0, 0.5, 0.0], dtype=torch.float64)
    torch.testing.assert_close(walk(make, X, y, lr, 5, start), by_hand(X, y, lr, 5, start.tolist()), **CLOSE)


def test_first_step_from_zero_goes_to_the_mean():
    X, y = random_data()
    mean = (y[:, None] * X).mean(0)
    torch.testing.assert_close(walk(NormalizedLRGD, X, y, 7.0, 1)[0], 7 * mean, **CLOSE)
    torch.testing.assert_close(walk(PlainGD, X, y, 7.0, 1)[0], 3.5 * mean, **CLOSE)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.sampled_from([0.0, 1.0, 30.0, 1e3, 1e6]), lr=st.sampled_from([0.1, 100.0]))
def test_no_step_is_longer_than_the_longest_row(seed, size, lr):
    X, y = random_data(seed, n=1 + seed % 9)
    start = size * torch.randn(4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for make in (NormalizedLRGD, OnTheLoss):
        moved = walk(make, X, y, lr, 1, start)[0] - start
        # What is left of the difference after rounding is relative to theta.
        assert moved.norm() <= lr * X.norm(dim=1).max() * (1 + 1e-12) + 1e-14 * size


@pytest.mark.parametrize(("make", "normalized"), [(NormalizedLRGD, True), (PlainGD, False)])
def test_a_huge_step_size_gives_the_batch_perceptron(make, normalized):
    X, y = random_data(seed=3)
    path = walk(make, X, y, 1e8, 20) / 1e8
    for steps in range(1, 21):
        theta, n_iter, solved = batch_perceptron(X, y, normalized=normalized, max_iter=steps)
        torch.testing.assert_close(path[steps - 1], theta, rtol=0, atol=1e-6)
        assert n_iter == steps and not solved


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 40),
    d=st.integers(2, 6),
    margin=st.floats(0.2, 1.0),
    lr=st.sampled_from([0.1, 1.0, 10.0, 100.0]),
)
def test_steps_and_updates_stay_below_their_bounds(seed, n, d, margin, lr):
    signed = separable_data(seed, n, d, margin)
    novikoff = signed.norm(dim=1).square().max().item() / margin**2
    bound = novikoff + 2 * math.log(2 * n - 1) / (lr * margin**2)
    assert steps_until_right(signed, NormalizedLRGD, lr) <= math.ceil(bound)
    y = torch.ones(n)
    for found in (perceptron(signed, y), batch_perceptron(signed, y, normalized=True)):
        assert found.solved and found.n_iter <= novikoff and (signed @ found.theta > 0).all()
    assert batch_perceptron(signed, y).n_iter <= n * novikoff


def test_repeated_and_rescaled_examples_change_nothing():
    X, y = random_data(seed=5)
    path = walk(NormalizedLRGD, X, y, 5.0, 10)
    torch.testing.assert_close(walk(NormalizedLRGD, X.repeat(3, 1), y.repeat(3), 5.0, 10), path, **CLOSE)
    scaled = walk(NormalizedLRGD, 8 * X, y, 5.0 / 64, 10)
    torch.testing.assert_close(8 * scaled @ X.T, path @ X.T, **CLOSE)


def test_steps_on_the_worst_case_are_the_papers():
    signed = worst_case(1000)
    assert {lr: steps_until_right(signed, NormalizedLRGD, lr) for lr in TABLE} == TABLE
    assert steps_until_right(signed, PlainGD, 100.0) == 308


def test_eps_lets_the_steps_fade():
    X, y = random_data()
    make = functools.partial(NormalizedLRGD, eps=0.2)
    torch.testing.assert_close(walk(make, X, y, 3.0, 10), by_hand(X, y, 3.0, 10, eps=0.2), **CLOSE)
    far = torch.full((1,), 1e6, dtype=torch.float64)
    assert torch.equal(walk(make, far[:, None], torch.ones(1), 3.0, 1, far)[0], far)


# --- the scale and the loss


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-1e6, 700), min_size=1, max_size=8))
def test_the_scale_is_one_over_the_mean_error(values):
    margins = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    beta = normalized_lr_scale(margins)
    assert beta >= 1 and not beta.requires_grad
    assert (beta * torch.sigmoid(-margins).mean()).item() == pytest.approx(1, rel=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-500, 500), min_size=1, max_size=8))
def test_loss_and_gradients_are_those_with_a_constant_beta(values):
    margins = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    p = [math.exp(-m) / (1 + math.exp(-m)) if m > 0 else 1 / (1 + math.exp(m)) for m in values]
    plain = [math.log1p(math.exp(-m)) if m > 0 else math.log1p(math.exp(m)) - m for m in values]
    loss = normalized_logistic(margins)
    (gradient,) = torch.autograd.grad(loss, margins, create_graph=True)
    assert loss.item() == pytest.approx(sum(plain) / sum(p), rel=1e-11)
    assert gradient.tolist() == pytest.approx([-q / sum(p) for q in p], rel=1e-11)
    (second,) = torch.autograd.grad(gradient.sum(), margins)
    assert second.tolist() == pytest.approx([q * (1 - q) / sum(p) for q in p], rel=1e-8, abs=1e-15)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_extreme_margins_are_finite_in_every_precision(dtype):
    for values in ([1e4, 1e4], [-1e4, -1e4], [1e4, -1e4], [50.0, 40.0], [0.0, 1e4]):
        margins = torch.tensor(values, dtype=dtype, requires_grad=True)
        loss = normalized_logistic(margins)
        (gradient,) = torch.autograd.grad(loss, margins)
        assert loss.isfinite() and loss.dtype == gradient.dtype == dtype
        assert gradient.sum().item() == pytest.approx(-1, abs=1e-3)
    assert normalized_lr_scale(margins).dtype == torch.promote_types(dtype, torch.float32)


def test_under_autocast_and_compiled_it_is_the_same():
    margins = torch.linspace(-3, 60, 9, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert normalized_logistic(margins).dtype == torch.float32
    torch._dynamo.reset()
    compiled = torch.compile(normalized_logistic, backend="aot_eager", fullgraph=True)
    outcomes = []
    for loss in (normalized_logistic, compiled):
        x = margins.double().requires_grad_()
        outcomes.append(torch.autograd.grad(loss(x), x))
    torch.testing.assert_close(*outcomes, **CLOSE)


@pytest.mark.parametrize("function", [normalized_logistic, normalized_lr_scale])
def test_what_is_no_list_of_margins_is_refused(function):
    for margins in (torch.zeros(2, 1), torch.zeros(()), torch.zeros(0)):
        with pytest.raises(ValueError, match=r"margins.shape = \(.*\) is out of range: \(n,\)"):
            function(margins)
    with pytest.raises(ValueError, match=r"margins.dtype = torch.int64 is out of range"):
        function(torch.zeros(2, dtype=torch.int64))


# --- the optimizer as one of torch's


def test_the_closure_gives_margins_and_gradients_stay_as_they_are():
    X, y = random_data()
    p, other = nn.Parameter(torch.zeros(4, dtype=torch.float64)), nn.Parameter(torch.ones(2))
    frozen = nn.Parameter(torch.ones(4, dtype=torch.float64), requires_grad=False)
    p.grad = torch.full_like(p, 9.0)
    optimizer, calls = NormalizedLRGD([p, other, frozen], lr=2.0), []

    def closure():
        calls.append(torch.is_grad_enabled())
        return y * (X @ (p + frozen))

    before = (y * (X @ frozen)).clone()
    with torch.no_grad():
        margins = optimizer.step(closure)
    assert calls == [True] and not margins.requires_grad and not optimizer.state
    torch.testing.assert_close(margins, before, **EXACT)
    assert (p.grad == 9).all() and (other == 1).all() and other.grad is None and (frozen == 1).all() and p.any()


def test_groups_have_their_own_rate_and_schedulers_drive_it():
    X, y = random_data()
    first, second = (nn.Parameter(torch.zeros(2, dtype=torch.float64)) for _ in range(2))
    optimizer = NormalizedLRGD([{"params": [first], "lr": torch.tensor(2.0)}], lr=5.0)
    optimizer.add_param_group({"params": [second]})
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.0)
    optimizer.step(lambda: y * (X @ torch.cat([first, second])))
    mean = (y[:, None] * X).mean(0)
    torch.testing.assert_close(first.detach(), 2 * mean[:2], **CLOSE)
    torch.testing.assert_close(second.detach(), 5 * mean[2:], **CLOSE)
    scheduler.step()
    before = second.detach().clone()
    optimizer.step(lambda: y * (X @ torch.cat([first, second])))
    assert torch.equal(second, before)


def test_resuming_and_copies_go_on_to_the_bit():
    X, y = random_data()
    whole = walk(NormalizedLRGD, X, y, 3.0, 6)
    p = nn.Parameter(whole[2].clone())
    saved = io.BytesIO()
    torch.save(NormalizedLRGD([p], lr=3.0, eps=0.0).state_dict(), saved)
    saved.seek(0)
    resumed = NormalizedLRGD([p], lr=50.0, eps=1.0)
    resumed.load_state_dict(torch.load(saved, weights_only=True))
    for q, optimizer in [copy.deepcopy((p, resumed)), pickle.loads(pickle.dumps((p, resumed))), (p, resumed)]:
        for step in range(3, 6):
            optimizer.step(lambda q=q: y * (X @ q))
            torch.testing.assert_close(q.detach(), whole[step], **EXACT)


def test_what_the_optimizer_cannot_use_is_refused_by_name():
    p = nn.Parameter(torch.zeros(2))
    for options, message in [
        ({"lr": -1.0}, "lr = -1.0 is out of range"),
        ({"lr": math.nan}, "lr = nan is out of range"),
        ({"lr": torch.ones(2)}, r"lr of shape \(2,\) is out of range"),
        ({"eps": -1e-8}, "eps = -1e-08 is out of range"),
    ]:
        with pytest.raises(ValueError, match=message):
            NormalizedLRGD([p], **options)
        with pytest.raises(ValueError, match=message):
            NormalizedLRGD([p]).add_param_group({"params": [nn.Parameter(torch.zeros(1))], **options})
    with pytest.raises(TypeError, match="speed"):
        NormalizedLRGD([p], speed=1)
    with pytest.raises(TypeError, match="has no option 'speed'"):
        NormalizedLRGD([{"params": [p], "speed": 1}])
    with pytest.raises(ValueError, match="empty parameter list"):
        NormalizedLRGD([])
    optimizer = NormalizedLRGD([p])
    with pytest.raises(RuntimeError, match="needs the margins"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="carry no gradient"):
        optimizer.step(lambda: torch.zeros(3))
    with pytest.raises(ValueError, match=r"margins.shape = \(\) is out of range"):
        optimizer.step(lambda: p.sum())
    assert not p.any()
    p.to_local = lambda: p
    with pytest.raises(RuntimeError, match="sharded"):
        NormalizedLRGD([p])


# --- the perceptrons


def test_perceptron_visits_the_rows_in_turn():
    X, y = random_data(seed=7)
    theta, updates = np.zeros(4), []
    for a, label in 3 * list(zip(X.numpy(), y.numpy(), strict=True)):
        if label * (a @ theta) <= 0:
            theta = theta + label * a
            updates.append(theta)
    for count in (1, 2, 10, len(updates)):
        found = perceptron(X, y, max_iter=count)
        torch.testing.assert_close(found.theta, torch.from_numpy(updates[count - 1]), **CLOSE)
        assert found[1:] == (count, False)


@pytest.mark.parametrize("normalized", [False, True])
def test_batch_perceptron_is_the_formula_from_any_start(normalized):
    X, y = random_data(seed=8)
    start = np.array([0.1, -0.2, 0.0, 0.3])
    for theta0 in (None, start):
        theta = np.zeros(4) if theta0 is None else theta0
        for step in range(6):
            wrong = [label * a for a, label in zip(X.numpy(), y.numpy(), strict=True) if label * (a @ theta) <= 0]
            half = theta0 is None and step == 0 and not normalized
            theta = theta + sum(wrong) / (len(wrong) if normalized else len(X)) * (0.5 if half else 1)
        found = batch_perceptron(X.numpy(), y.numpy(), normalized=normalized, max_iter=6, theta0=theta0)
        torch.testing.assert_close(found.theta, torch.from_numpy(theta), **CLOSE)
    assert (start == [0.1, -0.2, 0.0, 0.3]).all()


@pytest.mark.parametrize("solve", [perceptron, batch_perceptron])
def test_perceptrons_stop_and_say_so(solve):
    contradiction = solve([[1, 0], [1, 0]], [1, -1], max_iter=9)
    assert contradiction[1:] == (9, False) and contradiction.theta.dtype == torch.float64
    solved = solve(torch.tensor([[1.0, 0.0]]), [1], theta0=[2, 0])
    assert isinstance(solved, PerceptronResult) and solved[1:] == (0, True) and solved.theta.dtype == torch.float32
    X, y = [[1.0, 2.0], [3.0, 4.0]], [1, -1]
    for arguments, options, message in [
        ((X, [1, 0]), {}, "y = 0 is out of range: -1 or"),
        ((X, [1]), {}, r"y.shape = \(1,\) is out of range: \(2,\)"),
        (([1.0, 2.0], y), {}, r"X.shape = \(2,\) is out of range"),
        (([[1.0], [math.nan]], y), {}, "X holds a value that is not finite"),
        ((X, y), {"max_iter": 0}, "max_iter = 0 is out of range"),
        ((X, y), {"theta0": [1.0]}, r"theta0.shape = \(1,\) is out of range: \(2,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            solve(*arguments, **options)


# --- the classifier


@pytest.mark.filterwarnings(
    "ignore::sklearn.exceptions.ConvergenceWarning", "ignore::sklearn.exceptions.SkipTestWarning"
)
def test_it_is_a_scikit_learn_estimator():
    check_estimator(NormalizedLogisticClassifier(max_iter=30, fit_intercept=True))


def test_classifier_is_the_formula_and_stops_when_all_are_right():
    signed = worst_case(50).numpy()
    y = np.array(["b"] + 49 * ["a"])
    X = np.where(y == "b", 1, -1)[:, None] * signed
    found = NormalizedLogisticClassifier(lr=1.0).fit(X, y)
    steps = found.n_iter_
    path = by_hand(torch.from_numpy(signed), torch.ones(50), 1.0, steps)
    np.testing.assert_allclose(found.coef_[0], path[-1], rtol=1e-10)
    assert steps > 1 and not (signed @ path[-2].numpy() > 0).all()
    assert found.solved_ and found.score(X, y) == 1 and found.intercept_ == 0 and list(found.classes_) == ["a", "b"]
    shifted = NormalizedLogisticClassifier(fit_intercept=True).fit(np.array([[1.0], [2.0], [3.0]]), [0, 1, 1])
    with_ones = batch_of_ones([[1.0], [2.0], [3.0]], [-1, 1, 1], shifted.n_iter_)
    np.testing.assert_allclose([*shifted.coef_[0], *shifted.intercept_], with_ones, rtol=1e-10)
    assert shifted.solved_ and list(shifted.predict([[0.0], [9.0]])) == [0, 1]


def batch_of_ones(rows, y, steps):
    X = torch.tensor([[*row, 1.0] for row in rows], dtype=torch.float64)
    return walk(NormalizedLRGD, X, torch.tensor(y), 100.0, steps)[-1]


def test_classifier_says_what_it_cannot_do():
    X = [[1.0], [2.0], [3.0]]
    with pytest.warns(ConvergenceWarning, match="max_iter = 7"):
        found = NormalizedLogisticClassifier(max_iter=7).fit(X, [0, 1, 0])
    assert found.n_iter_ == 7 and not found.solved_
    for options, y, message in [
        ({"lr": 0.0}, [0, 1, 1], "lr = 0.0 is out of range"),
        ({"max_iter": 0}, [0, 1, 1], "max_iter = 0 is out of range"),
        ({}, [1, 1, 1], "y has one class"),
        ({}, [0, 1, 2], "Only binary classification is supported"),
    ]:
        with pytest.raises(ValueError, match=message):
            NormalizedLogisticClassifier(**options).fit(X, y)


# --- in the bench


def test_in_the_bench_it_is_the_objective():
    task, budget = resolve_task("tabular"), Budget(steps=8, batch_size=32, evaluations=0)
    recipe = replace(DEFAULT_RECIPE, update=lambda run: torch.optim.SGD(run.model.parameters(), 0.1))

    def by_hand(run):
        def loss(model, batch):
            logits = model(batch.input)
            errors = 1 - F.softmax(logits, 1).gather(1, batch.target[:, None])
            return F.cross_entropy(logits, batch.target) / errors.mean().detach()

        return loss

    ones, others = (
        fit(changed, task, budget, 7).model.state_dict()
        for changed in (apply(recipe), replace(recipe, objective=by_hand))
    )
    torch.testing.assert_close(ones, others, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="normalized-lr needs a classification task of two classes"):
        fit(apply(recipe), replace(task, classes=3), budget, 7)


# --- the claim


class Summed(PlainGD):
    """Broken: beta is one over the sum of the errors, not their mean."""

    def loss(self, margins):
        return super().loss(margins) * normalized_lr_scale(margins) / len(margins)


class OverLoss(PlainGD):
    """Broken: divided by the loss, which is another method."""

    def loss(self, margins):
        plain = super().loss(margins)
        return plain / plain.detach()


class OverNorm(PlainGD):
    """Broken: divided by the norm of the gradient, which is another method."""

    def loss(self, margins):
        plain = super().loss(margins)
        (p,) = self.param_groups[0]["params"]
        (gradient,) = torch.autograd.grad(plain, p, retain_graph=True)
        return plain / gradient.norm()


@pytest.mark.parametrize(
    ("method", "verdict"),
    [
        (Summed, "does not hold"),
        (OverLoss, "does not hold"),
        (OverNorm, "does not hold"),
        (NormalizedLRGD, "holds"),
    ],
)
def test_broken_variants_are_found_out(method, verdict):
    assert claim(Bench(), method=method, parts=("table",)).verdict == verdict


def test_the_other_parts_of_the_claim():
    assert claim(Bench(), seeds=2, parts=("imbalance", "oscillation")).verdict == "holds"
    assert claim(Bench(), seeds=2, method=PlainGD, parts=("imbalance",)).verdict == "does not hold"
