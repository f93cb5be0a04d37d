from __future__ import annotations

import functools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from assay.bench.arms import DEFAULT_RECIPE
from assay.bench.evidence import FAILS, Bench
from assay.bench.loop import fit
from assay.bench.recipe import Budget
from assay.bench.tasks import resolve_task
from assay.losses import PSKD, pskd_schedule, soft_target_cross_entropy
from assay.losses._contract import Example, Memory
from assay.losses.ps_kd.claim import (
    HARD,
    PROGRESSIVE,
    OwnTeacher,
    ZeroStart,
    calibration_error,
    claim,
    risk_coverage,
)
from assay.losses.ps_kd.ps_kd import apply
from assay.optim._contract import Twice

N, C = 12, 4
EXACT = {"rtol": 0.0, "atol": 0.0}


# --- for the family's contract


def soft_example():
    return 2 * torch.randn(6, 5), F.softmax(2 * torch.randn(6, 5), -1)


def double_loop(logits, soft_targets, ignore_index=None):
    losses = []
    for z, t in zip(logits.tolist(), soft_targets.tolist(), strict=True):
        log_sum = math.log(sum(math.exp(value) for value in z))
        losses.append(-sum(weight * (value - log_sum) for value, weight in zip(z, t, strict=True)))
    return losses


def first_ignored(targets):
    return targets.index_fill(0, torch.tensor([0]), -100)


def table_step(module, k, logits):
    module.set_epoch(1 + k // 2)
    indices = (torch.arange(6) + 6 * k) % N
    return module.loss(logits, indices % C, indices)


def model_step(module, k, logits):
    torch.manual_seed(100 + k // 2)  # the model as an epoch left it
    module.set_epoch(1 + k // 2, nn.Linear(C, C).double())
    return module.loss(logits, torch.arange(6) % C, logits.detach())


def memory(step=table_step, **options):
    make = functools.partial(PSKD, N, C, total_epochs=4, dtype=torch.float64, **options)
    name = ", ".join(f"{key}={value}" for key, value in options.items())
    return Memory(make, step, lambda: torch.randn(6, C, dtype=torch.float64), f"PSKD({name})")


EXAMPLES = [
    Example(soft_target_cross_entropy, soft_example, double_loop),
    Example(soft_target_cross_entropy, soft_example, double_loop, {"ignore_index": -100}, ignored=first_ignored),
    memory(),
    memory(topk=2),
    memory(model_step, store="model"),
]


# --- the loss


def test_gradient_is_softmax_minus_target():
    logits, soft = soft_example()
    logits.requires_grad_()
    soft_target_cross_entropy(logits, soft).backward()
    torch.testing.assert_close(logits.grad, (F.softmax(logits.detach(), -1) - soft) / len(logits))


def test_hard_targets_are_cross_entropy_and_classes_may_be_masked_out():
    logits, labels = torch.randn(2, 3, C, dtype=torch.float64), torch.tensor([[0, 1, 2], [2, 0, 0]])
    logits[..., 3] = -math.inf
    ours, torchs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    one, other = (
        soft_target_cross_entropy(ours, F.one_hot(labels, C).double()),
        F.cross_entropy(torchs.flatten(0, 1), labels.flatten()),
    )
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(*(torch.autograd.grad(loss, x)[0] for loss, x in ((one, ours), (other, torchs))))
    assert soft_target_cross_entropy(logits, F.one_hot(labels + 1, C).double()) == math.inf


def test_targets_may_carry_a_gradient_also_where_they_are_zero():
    logits, soft = torch.randn(3, C, dtype=torch.float64), torch.eye(C, dtype=torch.float64)[:3].requires_grad_()
    (gradient,) = torch.autograd.grad(soft_target_cross_entropy(logits, soft, reduction="sum"), soft)
    torch.testing.assert_close(gradient, -F.log_softmax(logits, -1))


def test_nothing_to_average_is_zero():
    assert soft_target_cross_entropy(torch.zeros(0, C), torch.zeros(0, C)) == 0
    assert soft_target_cross_entropy(torch.zeros(2, C), torch.full((2, C), -1.0), ignore_index=-1) == 0


def test_half_precision_does_not_overflow_in_the_sum():
    logits = torch.full((64, 2), 3e4, dtype=torch.float16)
    logits[:, 1] = -3e4
    loss = soft_target_cross_entropy(logits, torch.tensor([[0.0, 1.0]], dtype=torch.float16).expand(64, 2))
    assert loss == 6e4


# --- the schedule


@given(total=st.integers(1, 400), alpha_T=st.floats(0, 1))
def test_schedule_is_linear_and_ends_at_alpha_T(total, alpha_T):
    values = [pskd_schedule(epoch, total, alpha_T) for epoch in range(1, total + 1)]
    np.testing.assert_allclose(values, alpha_T * np.arange(1, total + 1) / total, rtol=1e-12)
    assert values[-1] == pytest.approx(alpha_T, rel=1e-15)
    assert pskd_schedule(0, total, alpha_T) == values[0] and pskd_schedule(total + 1, total, alpha_T) == values[-1]


def test_a_loop_may_count_epochs_from_zero_also_when_it_resumes():
    from_one, from_zero = (PSKD(N, C, total_epochs=6) for _ in range(2))
    for epoch in range(6):
        from_one.set_epoch(epoch + 1)
        from_zero.set_epoch(epoch)
        resumed = PSKD(N, C, total_epochs=6)
        resumed.load_state_dict(from_zero.state_dict())
        assert from_one.alpha == from_zero.alpha == resumed.alpha == pytest.approx(0.8 * (epoch + 1) / 6)
        from_zero = resumed


# --- the targets


def softmax(rows):
    exp = np.exp(rows - rows.max(1, keepdims=True))
    return exp / exp.sum(1, keepdims=True)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, C)).double()


def examples():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(N, 3, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(C, (N,), generator=generator)


def orders(epochs):
    generator = torch.Generator().manual_seed(2)
    return [torch.randperm(N, generator=generator).split(5) for _ in range(epochs)]


def train(objective, epochs=6):
    """SGD with momentum; ``objective(logits, labels, indices, epoch)``. Yields the model after every epoch."""
    model, (inputs, labels) = network(), examples()
    optimizer = torch.optim.SGD(model.parameters(), 0.5, momentum=0.9)
    for epoch, batches in enumerate(orders(epochs), 1):
        for indices in batches:
            optimizer.zero_grad()
            objective(model(inputs[indices]), labels[indices], indices, epoch).backward()
            optimizer.step()
        yield model


def progressive(criterion):
    def objective(logits, labels, indices, epoch):
        criterion.set_epoch(epoch)
        return criterion.loss(logits, labels, indices)

    return objective


def test_training_follows_the_formulas_over_six_epochs():
    """The method in numpy, its gradient by hand: softmax - target at the logits."""
    criterion = PSKD(N, C, total_epochs=6, dtype=torch.float64)
    ours = train(progressive(criterion))
    model, (inputs, labels) = network(), examples()
    x, y = inputs.numpy(), labels.numpy()
    params = [p.detach().numpy().copy() for p in model.parameters()]
    velocity = [np.zeros_like(p) for p in params]
    previous = np.eye(C)[y]
    for epoch, batches in enumerate(orders(6)):
        alpha = 0.8 * (epoch + 1) / 6
        for chosen in (batch.numpy() for batch in batches):
            w1, b1, w2, b2 = params
            hidden = np.tanh(x[chosen] @ w1.T + b1)
            p = softmax(hidden @ w2.T + b2)
            soft = (1 - alpha) * np.eye(C)[y[chosen]] + alpha * previous[chosen]
            previous[chosen] = p
            at_logits = (p - soft) / len(chosen)
            at_hidden = at_logits @ w2 * (1 - hidden**2)
            gradients = [at_hidden.T @ x[chosen], at_hidden.sum(0), at_logits.T @ hidden, at_logits.sum(0)]
            for q, v, g in zip(params, velocity, gradients, strict=True):
                v *= 0.9
                v += g
                q -= 0.5 * v
        for p, q in zip(next(ours).parameters(), params, strict=True):
            np.testing.assert_allclose(p.detach().numpy(), q, rtol=0, atol=1e-9)
        np.testing.assert_allclose(criterion.table.values.numpy(), previous, rtol=0, atol=1e-9)
        assert criterion.alpha == pytest.approx(alpha)


def test_alpha_zero_is_training_with_cross_entropy_bit_for_bit():
    ours = train(progressive(PSKD(N, C, total_epochs=6, alpha_T=0)))
    torchs = train(lambda logits, labels, *_: F.cross_entropy(logits, labels))
    for one, other in zip(ours, torchs, strict=True):
        torch.testing.assert_close(one.state_dict(), other.state_dict(), **EXACT)


@pytest.mark.parametrize("topk", [None, 1, 3])
def test_first_targets_are_exactly_one_hot(topk):
    criterion = PSKD(N, C, total_epochs=7, alpha_T=0.95, topk=topk)
    labels = torch.arange(N) % C
    for epoch in (1, 3, 7):
        criterion.set_epoch(epoch)
        assert torch.equal(criterion.targets(labels, torch.arange(N)), F.one_hot(labels, C).float())


@settings(deadline=None)
@given(
    topk=st.none() | st.integers(1, C),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    epoch=st.integers(1, 5),
    scale=st.floats(0, 200),
    seed=st.integers(0, 99),
)
def test_targets_are_distributions(topk, dtype, epoch, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(8, C, generator=generator, dtype=torch.float64)
    labels = torch.randint(C, (8,), generator=generator)
    criterion = PSKD(N, C, total_epochs=5, dtype=dtype, topk=topk)
    criterion.update(logits, torch.arange(8))
    criterion.set_epoch(epoch)
    soft = criterion.targets(labels, torch.arange(8))
    assert soft.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (soft >= 0).all()
    torch.testing.assert_close(soft.sum(1), torch.ones(8, dtype=soft.dtype), rtol=1e-6, atol=1e-6)
    close = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]
    dense = F.softmax(logits, -1)
    if topk:
        for row in dense:
            lowest = row.argsort(descending=True)[topk:]
            row[lowest] = row[lowest].mean() if len(lowest) else 0.0
    expected = (1 - criterion.alpha) * F.one_hot(labels, C).double() + criterion.alpha * dense
    torch.testing.assert_close(soft.double(), expected, rtol=0, atol=close)


def test_only_the_rows_of_the_batch_change():
    criterion = PSKD(N, C, total_epochs=2)
    criterion.update(torch.randn(N, C), torch.arange(N))
    before = criterion.table.values.clone()
    visited = torch.tensor([3, 0, 7])
    criterion.loss(torch.randn(3, C), visited % C, visited)
    changed = (criterion.table.values != before).any(1)
    assert changed.nonzero().flatten().tolist() == [0, 3, 7]
    torch.testing.assert_close(criterion.table.values.sum(1), torch.ones(N))


def test_targets_are_from_before_the_step_also_with_an_index_twice():
    criterion = PSKD(N, C, total_epochs=1, dtype=torch.float64)
    old, new = torch.randn(1, C, dtype=torch.float64), torch.randn(3, C, dtype=torch.float64)
    criterion.update(old, torch.tensor([5]))
    labels, indices = torch.tensor([1, 1, 1]), torch.tensor([5, 5, 5])
    soft = 0.2 * F.one_hot(labels, C) + 0.8 * F.softmax(old, -1)
    torch.testing.assert_close(criterion.loss(new, labels, indices), soft_target_cross_entropy(new, soft))
    torch.testing.assert_close(criterion.table.values[5], F.softmax(new[2], -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_topk_of_all_classes_equals_the_dense_table(dtype):
    dense, top = (PSKD(N, C, total_epochs=1, dtype=dtype, topk=topk) for topk in (None, C))
    indices = torch.randperm(N)
    for criterion in (dense, top):
        torch.manual_seed(3)
        criterion.update(torch.randn(N, C), indices)
    torch.testing.assert_close(*(c.targets(indices % C, indices) for c in (dense, top)), **EXACT)


def test_ignored_examples_add_nothing_and_are_not_stored():
    logits, indices = torch.randn(4, C), torch.tensor([1, 2, 3, 4])
    for ignore_index, ignored in ((-100, -100), (0, 0), (255, 255)):
        one, other = (PSKD(N, C, total_epochs=1, ignore_index=ignore_index) for _ in range(2))
        labels = torch.tensor([1, ignored, 2, ignored])
        kept = torch.tensor([0, 2])
        for _ in range(2):
            x = logits.clone().requires_grad_()
            loss = one.loss(x, labels, indices)
            torch.testing.assert_close(loss, other.loss(logits[kept], labels[kept], indices[kept]))
            assert not torch.autograd.grad(loss, x)[0][[1, 3]].any()
        torch.testing.assert_close(one.state_dict()["table.values"], other.state_dict()["table.values"])
        assert one.table.written.nonzero().flatten().tolist() == [1, 3]
        assert one.loss(logits, torch.full((4,), ignored), indices) == 0


def test_tokens_of_sequences():
    """Any shape of labels: each position is an example of its own."""
    logits, indices = torch.randn(2, 3, C), torch.tensor([[0, 1, 2], [9, 8, 7]])
    labels = torch.tensor([[0, 1, -100], [2, 3, 1]])
    criterion, flat = (PSKD(N, C, total_epochs=1) for _ in range(2))
    for _ in range(2):
        expected = flat.loss(logits.view(-1, C), labels.flatten(), indices.flatten(), reduction="none")
        torch.testing.assert_close(criterion.loss(logits, labels, indices, reduction="none"), expected.view(2, 3))


# --- mixed examples


def test_mixed_targets_and_what_is_stored_of_mixed_examples():
    labels, indices, partner = torch.tensor([0, 1, 2, -100]), torch.arange(4), torch.tensor([1, 0, 3, 2])
    lam = torch.tensor([0.3, 1.0, 0.5, 0.5])
    logits = torch.randn(4, C)
    for store_mixed in (False, True):
        criterion = PSKD(N, C, total_epochs=1, store_mixed=store_mixed)
        criterion.update(torch.randn(4, C), indices)
        before, soft = criterion.table.values.clone(), criterion.targets(labels, indices)
        mixed = criterion.targets(labels, indices, partner=partner, lam=lam)
        torch.testing.assert_close(mixed[0], 0.3 * soft[0] + 0.7 * soft[1])
        torch.testing.assert_close(mixed[1], soft[1])
        assert (mixed[2:] == -100).all()  # half of each is ignored
        loss = criterion.loss(logits, labels, indices, partner=partner, lam=lam)
        torch.testing.assert_close(loss, soft_target_cross_entropy(logits[:2], mixed[:2]))
        if store_mixed:
            before[:3] = F.softmax(logits[:3], -1)
        torch.testing.assert_close(criterion.table.values, before)
    with pytest.raises(ValueError, match=r"lam = 1.5 is out of range: \[0, 1\]"):
        criterion.targets(labels, indices, partner=partner, lam=1.5)


# --- wrong use


@pytest.mark.parametrize(
    "name, value",
    [
        ("num_samples", 0),
        ("num_classes", 1),
        ("total_epochs", 0),
        ("total_epochs", 2.5),
        ("alpha_T", 1.1),
        ("alpha_T", -0.1),
        ("alpha_T", math.nan),
        ("topk", 0),
        ("topk", C + 1),
        ("topk", 1.5),
        ("dtype", torch.int8),
        ("dtype", torch.float8_e4m3fn),
        ("store", "disk"),
    ],
)
def test_arguments_out_of_range_are_named(name, value):
    options = {"num_samples": N, "num_classes": C, "total_epochs": 3, name: value}
    with pytest.raises(ValueError, match=f"{name} = .* is out of range"):
        PSKD(**options)


def test_what_does_not_fit_is_named():
    criterion, logits, labels, indices = (
        PSKD(N, C, total_epochs=3),
        torch.zeros(2, C),
        torch.tensor([0, 1]),
        torch.arange(2),
    )
    for arguments, message in [
        ((logits, labels, torch.tensor([0, N])), f"indices = {N} is out of range"),
        ((logits, labels, torch.tensor([-1, 0])), "indices = -1 is out of range"),
        ((logits, labels + C, indices), f"labels = {C} is out of range"),
        ((logits, labels, torch.arange(3)), r"indices.shape = \(3,\) with labels of shape \(2,\)"),
        ((torch.zeros(2, C + 1), labels, indices), r"logits.shape = \(2, 5\) is out of range: \(2, 4\)"),
        ((torch.zeros(3, C), labels, indices), r"logits.shape = \(3, 4\) is out of range: \(2, 4\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            criterion.loss(*arguments)
    with pytest.raises(ValueError, match=r"logits\.shape"):
        criterion.update(logits, torch.arange(3))
    with pytest.raises(ValueError, match="epoch = -1 is out of range"):
        criterion.set_epoch(-1)
    with pytest.raises(ValueError, match="floating point"):
        soft_target_cross_entropy(logits, logits.long())
    assert not criterion.table.written.any()


# --- in the bench


def test_in_the_bench_it_is_the_objective():
    """The weights are those of a loop written by hand, also with an optimizer that asks for a loss twice."""
    task, budget = resolve_task("digits(model='mlp')"), Budget(steps=30, batch_size=60, evaluations=0)

    recipe = replace(DEFAULT_RECIPE, update=lambda run: Twice(run.model.parameters(), 0.1))
    seen = []

    def by_hand(run):
        criterion = PSKD(run.size, 10, total_epochs=run.epochs, alpha_T=0.6)

        def loss(model, batch):
            logits = model(batch.input)
            if len(seen) % 2 == 0:
                criterion.set_epoch(batch.epoch + 1)
                by_hand.soft = criterion.targets(batch.target, batch.index)
                criterion.update(logits, batch.index)
            seen.append(criterion.alpha)
            return soft_target_cross_entropy(logits, by_hand.soft)

        return loss

    ones = fit(apply(recipe, alpha_T=0.6), task, budget, 7).model
    others = fit(replace(recipe, objective=by_hand), task, budget, 7).model
    torch.testing.assert_close(ones.state_dict(), others.state_dict(), **EXACT)
    assert len(seen) == 60 and seen[0] < seen[-1] == pytest.approx(0.6)
    with pytest.raises(ValueError, match="ps-kd needs a classification task"):
        fit(apply(recipe), replace(task, classes=None), budget, 7)


# --- the claim


@pytest.mark.parametrize("method", [ZeroStart, OwnTeacher, PSKD])
def test_broken_variants_are_found_out(method):
    evidence = claim(Bench(), method=method, variants=(HARD, PROGRESSIVE), seeds=3, epochs=60)
    assert (evidence.verdict == FAILS) == (method is not PSKD)


def test_measures_of_confidence():
    right = np.array([1.0, 0.0, 1.0, 1.0])
    confidence = np.array([0.95, 0.9, 0.5, 0.51])  # the last two share the eighth of 15 intervals, (7/15, 8/15]
    expected = (abs(1 - 0.95) + abs(0 - 0.9) + abs(2 - 1.01)) / 4
    assert calibration_error(confidence, right) == pytest.approx(expected)
    assert calibration_error(np.array([0.0, 1.0]), np.array([0.0, 1.0])) == 0
    assert calibration_error(confidence, right, bins=1) == pytest.approx(abs(3 - 2.86) / 4)
    assert risk_coverage(confidence, right) == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    assert risk_coverage(confidence, 0 * right) == 1
