"""The shared mechanism of the SAM family: SAM and ASAM against two passes written by hand."""

import copy

import pytest
import torch
from torch import nn

from assay.optim import SAM
from assay.optim._wrapper_contract import BASES, EXACT, closure_of, network, train


def by_hand(base, options, *, rho, adaptive=False, steps=20, norm_eps=1e-12):
    """Two passes and a base optimizer, in plain loops."""
    model = network()
    optimizer = base(model.parameters(), **options)
    for step in range(steps):
        closure_of(model, optimizer, step)()
        statistics = copy.deepcopy(list(model.buffers()))
        params = list(model.parameters())
        weights = [p.detach().clone() for p in params]
        scales = [p.abs() if adaptive else torch.ones_like(p) for p in weights]
        norm = sum((s * p.grad).square().sum() for s, p in zip(scales, params, strict=True)).sqrt()
        with torch.no_grad():
            for p, s in zip(params, scales, strict=True):
                p += rho * s * s * p.grad / (norm + norm_eps)
        closure_of(model, optimizer, step)()
        with torch.no_grad():
            for p, w in zip(params, weights, strict=True):
                p.copy_(w)
            for b, s in zip(model.buffers(), statistics, strict=True):
                b.copy_(s)
        optimizer.step()
    return list(model.state_dict().values())


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("base, options", BASES)
def test_it_is_two_passes_by_hand(base, options, adaptive):
    model = network()
    optimizer = SAM(model, base, rho=0.3, adaptive=adaptive, **options)
    expected = by_hand(base, options, rho=0.3, adaptive=adaptive)
    torch.testing.assert_close(train(model, optimizer, range(20)), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("base, options", BASES)
def test_a_radius_of_zero_is_the_base(base, options):
    models = [network(), network()]
    sam, plain = SAM(models[0], base, rho=0.0, **options), base(models[1].parameters(), **options)
    torch.testing.assert_close(train(models[0], sam), train(models[1], plain), **EXACT)


def test_two_calls_are_one_step():
    models = [network(), network()]
    optimizers = [SAM(model, torch.optim.SGD, rho=0.2, lr=0.1) for model in models]
    for step in range(3):
        optimizers[0].step(closure_of(models[0], optimizers[0], step))
        closure = closure_of(models[1], optimizers[1], step)
        closure()
        optimizers[1].first_step(zero_grad=True)
        assert all(p.grad is None for p in models[1].parameters())
        with optimizers[1]._statistics(False):
            closure()
        optimizers[1].second_step(zero_grad=True)
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), **EXACT)


def test_the_perturbation_has_norm_rho_and_the_way_back_is_exact():
    model = network()
    optimizer = SAM(model, torch.optim.SGD, rho=0.3, lr=0.0)
    closure_of(model, optimizer, 0)()
    before = [p.detach().clone() for p in model.parameters()]
    with optimizer.perturbed():
        moved = sum((p - q).square().sum() for p, q in zip(model.parameters(), before, strict=True)).sqrt()
    torch.testing.assert_close(moved.item(), 0.3, rtol=1e-9, atol=0)
    optimizer.step(closure_of(model, optimizer, 0))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_groups_have_their_own_radius():
    model = network()
    groups = [{"params": model[0].parameters(), "rho": 0.0}, {"params": model[3].parameters()}]
    optimizer = SAM(groups, torch.optim.SGD, rho=0.5, lr=0.1)
    closure_of(model, optimizer, 0)()
    before = copy.deepcopy(model)
    norm = torch.cat([p.grad.flatten() for p in [*model[0].parameters(), *model[3].parameters()]]).norm()
    with optimizer.perturbed():
        assert torch.equal(model[0].weight, before[0].weight)
        eps = model[3].weight - before[3].weight
    torch.testing.assert_close(eps, 0.5 * model[3].weight.grad / norm)
    with pytest.raises(ValueError, match="rho = -1 is out of range"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "rho": -1})


def test_a_failing_second_closure_leaves_the_weights():
    model = network()
    optimizer = SAM(model, torch.optim.SGD, rho=0.5, lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]

    def fails():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure_of(model, optimizer, 0), fails)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    train(model, optimizer)  # and it goes on
    closure_of(model, optimizer, 0)()
    now = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ZeroDivisionError), optimizer.perturbed():
        1 / 0  # noqa: B018
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), now, strict=True))


@pytest.mark.parametrize("bn_stats, passes", [("first", 1), ("both", 2), ("none", 0)])
def test_running_statistics_follow_the_passes_that_are_named(bn_stats, passes):
    model = network()
    optimizer = SAM(model, torch.optim.SGD, rho=0.5, lr=0.0, bn_stats=bn_stats)
    once = copy.deepcopy(model)
    closure_of(once, optimizer, 0)()
    optimizer.step(closure_of(model, optimizer, 0))
    assert model[1].num_batches_tracked == passes
    assert torch.equal(model[1].running_mean, once[1].running_mean) == (passes == 1)


def test_a_norm_that_is_not_finite_is_no_ascent():
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = SAM([p], torch.optim.SGD, rho=0.5, lr=0.1)
    p.grad = torch.tensor([float("inf"), 1.0])
    with optimizer.perturbed():
        assert p.tolist() == [1.0, 2.0]


def test_a_base_that_exists_is_shared():
    model = network()
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = SAM(None, base, rho=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(base, 1, gamma=0.5)
    train(model, optimizer)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05 and optimizer.state is base.state
    base.load_state_dict(base.state_dict())
    assert optimizer.param_groups is base.param_groups and optimizer.state is base.state
    with pytest.raises(TypeError, match="takes no options"):
        SAM(None, base, lr=0.2)


def test_an_ascent_of_ones_own():
    model = network()
    ones = SAM(model, torch.optim.SGD, lr=0.0, ascent=lambda groups, params, grads: [g.sign() for g in grads])
    closure_of(model, ones, 0)()
    before = model[0].weight.detach().clone()
    with ones.perturbed():
        torch.testing.assert_close(model[0].weight - before, model[0].weight.grad.sign())


@pytest.mark.parametrize("options, message", [
    ({"rho": -0.1}, r"rho = -0\.1 is out of range"),
    ({"norm_eps": float("nan")}, "norm_eps = nan is out of range"),
    ({"ascent": "up"}, "ascent = 'up' is out of range"),
    ({"bn_stats": "last"}, "bn_stats = 'last' is out of range"),
])  # fmt: skip
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SAM([nn.Parameter(torch.ones(2))], torch.optim.SGD, lr=0.1, **options)


def test_wrong_use_is_named():
    p = nn.Parameter(torch.ones(2))
    optimizer = SAM([p], torch.optim.SGD, lr=0.1)
    with pytest.raises(RuntimeError, match="needs the gradient twice"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="call first_step"):
        optimizer.second_step()
    with pytest.raises(RuntimeError, match="has no mask"):
        optimizer.update_mask()
    p.grad = torch.ones(2)
    optimizer.first_step()
    with pytest.raises(RuntimeError, match="call second_step"):
        optimizer.first_step()
    sparse = SAM([p], torch.optim.SGD, lr=0.1)
    p.grad = torch.ones(2).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        sparse.first_step()


class Spy:
    """A mask that perturbs the first parameter only, and writes down when it is asked for anything."""

    def __init__(self, moment):
        self.moment, self.calls = moment, []

    def init(self, params):
        self.calls.append(("init", len(params)))
        self.off = set(params[1:])

    def apply(self, params, eps):
        self.calls.append("apply")
        assert len(params) == 1
        return eps

    def refresh(self, optimizer, *, epoch):
        self.calls.append(("refresh", epoch))

    def density(self):
        return 0.25

    def state_dict(self):
        return {"calls": len(self.calls)}

    def load_state_dict(self, state):
        self.calls.append(state)


@pytest.mark.parametrize("moment, order", [
    ("now", [("refresh", 3), "apply"]), ("before", [("refresh", 3), "apply"]), ("after", ["apply", ("refresh", 3)]),
])  # fmt: skip
def test_a_mask_is_asked_in_its_moment(moment, order):
    model = network()
    optimizer = SAM(model, torch.optim.SGD, mask=Spy(moment), lr=0.1)
    with pytest.raises(TypeError, match="epoch"):
        optimizer.update_mask(epochs=3)
    optimizer.update_mask(epoch=3)
    assert len(optimizer.mask.calls) == (2 if moment == "now" else 1)
    train(model, optimizer, range(2))
    assert optimizer.mask.calls == [("init", 5), *order, "apply"]
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.mask.calls[-1] == {"calls": 4} and optimizer.mask_density() == 0.25
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert optimizer.mask.calls[-1] == ("init", 6)


def test_what_a_mask_leaves_out_is_neither_copied_nor_moved():
    model = network()
    optimizer = SAM(model, torch.optim.SGD, mask=Spy("now"), lr=0.1)
    closure_of(model, optimizer, 0)()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.first_step()
    assert [p is model[0].weight for p, _ in optimizer._saved] == [True]
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    assert moved == [True, False, False, False, False]
    optimizer.second_step()


def test_a_gradient_scaler_goes_with_the_two_calls():
    plain, model = network(), network()
    train(plain, SAM(plain, torch.optim.SGD, lr=0.1), range(3))
    optimizer, scaler = SAM(model, torch.optim.SGD, lr=0.1), torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(3):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        for call in (optimizer.first_step, optimizer.second_step):
            optimizer.zero_grad()
            scaler.scale((model(x) - x[:, :3]).square().mean()).backward()
            scaler.unscale_(optimizer)
            call()
            scaler.update()
    torch.testing.assert_close(list(model.parameters()), list(plain.parameters()))


def test_a_second_gradient_that_is_not_finite_can_be_left_out():
    model = network()
    optimizer = SAM(model, torch.optim.SGD, lr=0.1)
    closure_of(model, optimizer, 0)()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.first_step()
    model[0].weight.grad.fill_(torch.inf)
    optimizer.restore()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    train(model, optimizer, range(1))
