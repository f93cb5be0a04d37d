"""SharpDRO against the update written out by hand, its reductions and invariants, and a broken variant."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from assay.bench import Bench
from assay.optim import SAM, SharpDRO
from assay.optim._wrapper_contract import BASES, network
from assay.optim.sharpdro import claim as room

OWN_STEP = ["SharpDRO"]
GROUPS = 4
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}


def batch_of(step):
    """Inputs, classes and groups of a step's own batch; group 3 is in none, group 2 in every other."""
    draw = torch.Generator().manual_seed(step)
    x = torch.randn(8, 4, generator=draw, dtype=torch.float64)
    return x, torch.randint(3, (8,), generator=draw), torch.randint(2 + step % 2, (8,), generator=draw)


def closure_of(model, step, mode="aware"):
    x, y, groups = batch_of(step)

    def closure():
        logits = model(x)
        return F.cross_entropy(logits, y, reduction="none"), groups if mode == "aware" else logits

    return closure


def train(model, optimizer, steps=range(4)):
    losses = [optimizer.step(closure_of(model, step, optimizer.mode)) for step in steps]
    assert all(loss.shape == () and not loss.requires_grad for loss in losses)
    return [value.detach().clone() for value in model.state_dict().values()]


def gradient(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)


def by_groups(losses, groups, q):
    """sum_s q_s L_s, group by group."""
    total = 0.0
    for s, weight in enumerate(q):
        members = [loss for loss, g in zip(losses, groups.tolist(), strict=True) if g == s]
        total = total + weight * sum(members) / max(len(members), 1)
    return total


def by_hand(
    base, options, *, rho=0.3, step_size=0.5, steps=6, adaptive=False, mode="aware", ascent="mean", subtract=False
):
    """The update as the paper and its code have it, with every pass and every sum written out."""
    model = network()
    optimizer = base(model.parameters(), **options)
    params = list(model.parameters())
    q = [1 / GROUPS] * GROUPS
    for step in range(steps):
        x, y, groups = batch_of(step)
        logits = model(x)
        losses = F.cross_entropy(logits, y, reduction="none")
        g0, up = gradient(model, losses.mean()), gradient(model, losses.mean())
        if ascent == "weighted":
            up = gradient(model, by_groups(losses, groups, q))
        raised = [
            weight * torch.exp(step_size * by_groups(losses.detach(), groups, [s == r for r in range(GROUPS)])).item()
            for s, weight in enumerate(q)
        ]
        q = [weight / sum(raised) for weight in raised]
        if subtract:
            g0 = [a - b for a, b in zip(g0, gradient(model, by_groups(losses, groups, q)), strict=True)]
        weights, statistics = [p.detach().clone() for p in params], copy.deepcopy(list(model.buffers()))
        scales = [w.abs() if adaptive else torch.ones_like(w) for w in weights]
        norm = sum((s * g).square().sum() for s, g in zip(scales, up, strict=True)).sqrt()
        with torch.no_grad():
            for p, s, g in zip(params, scales, up, strict=True):
                p += rho * s * s * g / (norm + 1e-12)
        far = model(x)
        moved = F.cross_entropy(far, y, reduction="none")
        if mode == "aware":
            g1 = gradient(model, by_groups(moved, groups, q))
        else:
            lost = [
                max(0.0, (a.softmax(0).max() - b.softmax(0).max()).item()) for a, b in zip(logits, far, strict=True)
            ]
            omega = [value / sum(lost) if sum(lost) else 1 / len(lost) for value in lost]
            g1 = gradient(model, sum(w * loss for w, loss in zip(omega, moved, strict=True)))
        with torch.no_grad():
            for p, w, a, b in zip(params, weights, g0, g1, strict=True):
                p.copy_(w)
                p.grad = a + b
            for buffer, value in zip(model.buffers(), statistics, strict=True):
                buffer.copy_(value)
        optimizer.step()
    return [value.detach() for value in model.state_dict().values()], q


@pytest.mark.parametrize("base, options, settings", [
    *((base, options, {}) for base, options in BASES),
    *((*BASES[0], settings) for settings in [
        {"adaptive": True},
        {"ascent": "weighted"},
        {"subtract": True},
        {"ascent": "weighted", "subtract": True},
        {"mode": "agnostic"},
    ]),
])  # fmt: skip
def test_it_is_the_update_by_hand(base, options, settings):
    model = network()
    optimizer = SharpDRO(model, base, 0.3, n_groups=GROUPS, step_size=0.5, **settings, **options)
    expected, q = by_hand(base, options, **settings)
    torch.testing.assert_close(train(model, optimizer, range(6)), expected, rtol=1e-9, atol=1e-9)
    if optimizer.mode == "aware":
        assert optimizer.q.tolist() == pytest.approx(q, abs=1e-12)
        # Group 3 never came: its weight changed by the others' alone, as if its loss had been 0.
        assert 0 < q[3] < q[2] < min(q[0], q[1])
    else:
        assert optimizer.q is None


def test_one_group_is_sams_gradient_and_the_plain_one():
    model = network()
    optimizer = SharpDRO(model, torch.optim.SGD, 0.3, n_groups=1, lr=0.1)
    others = [network(), network()]
    x, y, _ = batch_of(0)
    sam = SAM(others[0], torch.optim.SGD, 0.3, lr=0.1)

    def closure():
        sam.zero_grad()
        loss = F.cross_entropy(others[0](x), y)
        loss.backward()
        return loss

    loss = optimizer.step(lambda: (F.cross_entropy(model(x), y, reduction="none"), torch.zeros(8).long()))
    assert loss == sam.step(closure)
    F.cross_entropy(others[1](x), y).backward()
    for p, a, b in zip(model.parameters(), *(other.parameters() for other in others), strict=True):
        torch.testing.assert_close(p.grad, a.grad + b.grad, rtol=1e-12, atol=1e-14)


def test_without_radius_one_group_doubles_sgds_rate():
    models = [network(), network()]
    optimizer = SharpDRO(models[0], torch.optim.SGD, rho=0.0, n_groups=1, lr=0.05)
    sgd = torch.optim.SGD(models[1].parameters(), lr=0.1)
    for step in range(5):
        x, y, _ = batch_of(step)
        optimizer.step(lambda x=x, y=y: (F.cross_entropy(models[0](x), y, reduction="none"), torch.zeros(8).long()))
        sgd.zero_grad()
        F.cross_entropy(models[1](x), y).backward()
        sgd.step()
    found, expected = (list(model.parameters()) for model in models)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_groups_of_any_size_count_alike_where_q_stays_uniform():
    p = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = SharpDRO([p], torch.optim.SGD, rho=0.0, n_groups=2, step_size=0.0, lr=0.0)
    groups = torch.tensor([0] * 9 + [1])
    for _ in range(3):
        optimizer.step(lambda: (p[groups], groups))
        assert optimizer.q.tolist() == [0.5, 0.5]
    torch.testing.assert_close(p.grad, torch.tensor([0.9 + 0.5, 0.1 + 0.5], dtype=torch.float64))


def test_an_absent_group_has_no_gradient_and_no_nan():
    p = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = SharpDRO([p], torch.optim.SGD, rho=0.1, n_groups=3, step_size=1.0, lr=0.0)
    groups = torch.tensor([0, 0, 1])
    optimizer.step(lambda: (p[groups], groups))
    torch.testing.assert_close(optimizer.q, torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64).softmax(0))
    assert p.grad.isfinite().all() and p.grad[2] == 0


def test_q_is_the_softmax_of_all_losses_and_does_not_underflow():
    p = nn.Parameter(torch.tensor([0.0, 300.0, 600.0], dtype=torch.float64))
    optimizer = SharpDRO([p], torch.optim.SGD, rho=0.0, n_groups=3, step_size=1.0, lr=0.0)
    groups = torch.arange(3)
    for _ in range(4):
        optimizer.step(lambda: (p[groups], groups))
    expected = torch.log_softmax(4 * p.detach(), 0)
    torch.testing.assert_close(optimizer.log_q, expected, rtol=1e-14, atol=0)
    assert expected[0].exp() == 0, "q itself is 0 there, and multiplying it would never bring it back"
    for _ in range(4):  # and the group that had nothing comes back
        optimizer.step(lambda: (p[2 - groups], groups))
    torch.testing.assert_close(optimizer.q, torch.full((3,), 1 / 3, dtype=torch.float64))


def test_a_loss_that_is_not_finite_leaves_q():
    p = nn.Parameter(torch.ones(2))
    optimizer = SharpDRO([p], torch.optim.SGD, n_groups=2, step_size=1.0, lr=0.0)
    optimizer.step(lambda: (p[torch.tensor([0, 1])] * torch.tensor([1.0, float("inf")]), torch.tensor([0, 1])))
    assert optimizer.q.tolist() == [0.5, 0.5]


def test_the_way_up_has_length_rho_and_the_way_back_is_exact():
    model = network()
    optimizer = SharpDRO(model, torch.optim.SGD, rho=0.3, n_groups=GROUPS, lr=0.0)
    before = [p.detach().clone() for p in model.parameters()]
    lengths, closure = [], closure_of(model, 1)

    def watched():
        moved = [(p - q).square().sum() for p, q in zip(model.parameters(), before, strict=True)]
        lengths.append(sum(moved).sqrt().item())
        return closure()

    optimizer.step(watched)
    assert lengths == [0.0, pytest.approx(0.3, rel=1e-9)]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


# Without groups.


def agnostic_weights(first, second):
    """The weights that examples with these logits at w and at w + eps get: the gradient of the second pass."""
    p = nn.Parameter(torch.zeros(len(first), dtype=torch.float64))
    optimizer = SharpDRO([p], torch.optim.SGD, rho=0.0, mode="agnostic", lr=0.0)
    logits = iter([first, second])
    optimizer.step(lambda: (p.clone(), next(logits)))
    return p.grad - 1 / len(first)


def test_agnostic_weights_are_the_confidence_that_is_lost():
    sure, unsure = torch.tensor([5.0, 0.0, 0.0]), torch.zeros(3)
    first = torch.stack([sure, sure, unsure, unsure]).double()
    weights = agnostic_weights(first, torch.stack([unsure, sure, unsure, sure]).double())
    torch.testing.assert_close(weights, torch.tensor([1.0, 0.0, 0.0, 0.0]).double())
    torch.testing.assert_close(agnostic_weights(first, first), torch.full((4,), 0.25).double())
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(6, 5, 3, generator=draw, dtype=torch.float64) for _ in range(2))
    weights = agnostic_weights(a, b)  # several outputs an example, as a language model has
    lost = (a.softmax(-1).amax(-1).mean(1) - b.softmax(-1).amax(-1).mean(1)).clamp(min=0)
    torch.testing.assert_close(weights, lost / lost.sum(), rtol=1e-12, atol=1e-12)


def test_no_gradient_goes_through_the_weights():
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    p = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = SharpDRO([p], torch.optim.SGD, mode="agnostic", lr=0.0)
    for scale in (1.0, 0.5):
        optimizer.objective(p + 1.0, scale * logits).backward()
        assert logits.grad is None
        if scale == 1.0:
            optimizer.first_step()


class NotRestored(SharpDRO):
    """The broken variant: the step is taken from where the ascent led."""

    def restore(self):
        self._saved = None


def test_the_claim_fails_where_the_weights_are_not_restored():
    settings = {room.ERM: room.Setting(0.05), room.AWARE: room.Setting(0.05, 0.2, 0.05)}
    few = {"seeds": 4, "epochs": 4, "settings": settings}
    broken = room.claim(Bench(), method=NotRestored, **few)
    assert broken.verdict == broken.checks[1].verdict == "does not hold"
    assert room.claim(Bench(), **few).checks[1].verdict == "holds"
