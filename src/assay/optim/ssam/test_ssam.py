"""SSAM against two passes by hand, and its limits SAM and the base."""

import copy
import pickle

import pytest
import torch
from torch import nn

from assay.bench import Bench
from assay.bench.arms import DEFAULT_RECIPE, resolve
from assay.bench.loop import fit
from assay.bench.recipe import Budget
from assay.bench.spec import parse_specs
from assay.bench.tasks import resolve_task
from assay.optim import SAM, SSAM
from assay.optim._wrapper_contract import BASES, EXACT, closure_of, network, train
from assay.optim.sam import DynamicMask, FisherMask, RandomMask
from assay.optim.ssam import claim as room
from assay.optim.ssam.ssam import apply

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def make(params, base, **base_options):
    return SSAM(params, base, 0.3, mask="dynamic", **base_options)


def exchanging(params, **options):
    """A mask that is exchanged in every step."""
    optimizer = SSAM(params, torch.optim.SGD, 0.3, mask="dynamic", lr=0.1, momentum=0.9, **options)
    optimizer.register_step_pre_hook(lambda *_: optimizer.update_mask())
    return optimizer


def random_half(params):
    return SSAM(params, torch.optim.AdamW, 0.3, mask=RandomMask(0.5), adaptive=True, lr=0.01)


WRAPPERS = {"SSAM": make}
DISTRIBUTED = [(exchanging, {}), (exchanging, {"drop": "weight", "grow": "gradient"}), (random_half, {})]


def flat(tensors):
    return torch.cat([x.detach().flatten() for x in tensors])


def masks_of(optimizer):
    return flat(optimizer.mask.masks.values())


def with_gradient(optimizer, model, step=0):
    closure_of(model, optimizer, step)()
    return flat(p.grad for p in model.parameters())


# --- the step


@pytest.mark.parametrize("mask", ["fisher", "dynamic"])
@pytest.mark.parametrize("base, options", BASES)
def test_without_zeros_it_is_sam_and_without_ones_the_base(base, options, mask):
    models = [network() for _ in range(4)]
    optimizers = [
        SSAM(models[0], base, 0.3, mask=mask, sparsity=0.0, **options),
        SAM(models[1], base, 0.3, norm_eps=1e-7, **options),
        SSAM(models[2], base, 0.3, mask=mask, sparsity=1.0, **options),
        base(models[3].parameters(), **options),
    ]
    ends = [train(model, optimizer, range(20)) for model, optimizer in zip(models, optimizers, strict=True)]
    torch.testing.assert_close(ends[0], ends[1], **CLOSE)
    torch.testing.assert_close(ends[2], ends[3], **CLOSE)


@pytest.mark.parametrize("adaptive", [False, True])
def test_it_is_two_passes_by_hand(adaptive):
    model, other = network(), network()
    optimizer = SSAM(model, torch.optim.SGD, 0.3, mask=RandomMask(0.6, seed=3), adaptive=adaptive, lr=0.1)
    plain = torch.optim.SGD(other.parameters(), lr=0.1)
    masks = list(optimizer.mask.masks.values())
    for step in range(5):
        optimizer.step(closure_of(model, optimizer, step))
        closure = closure_of(other, plain, step)
        closure()
        statistics = copy.deepcopy(list(other.buffers()))
        weights = [p.detach().clone() for p in other.parameters()]
        scaled = [p.grad * w.abs() if adaptive else p.grad for p, w in zip(other.parameters(), weights, strict=True)]
        norm = flat(scaled).norm()
        with torch.no_grad():
            for p, w, g, mask in zip(other.parameters(), weights, scaled, masks, strict=True):
                p += 0.3 * (g * w.abs() if adaptive else g) / (norm + 1e-7) * mask
        closure()
        with torch.no_grad():
            for p, w in zip(other.parameters(), weights, strict=True):
                p.copy_(w)
            for b, s in zip(other.buffers(), statistics, strict=True):
                b.copy_(s)
        plain.step()
    torch.testing.assert_close(model.state_dict(), other.state_dict(), **CLOSE)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_the_perturbation_is_zero_off_the_mask_and_has_the_whole_gradients_norm(sparsity):
    model = network()
    optimizer = SSAM(model, torch.optim.SGD, 0.3, mask=RandomMask(sparsity), lr=0.0)
    g = with_gradient(optimizer, model)
    before, mask = flat(model.parameters()), masks_of(optimizer)
    with optimizer.perturbed():
        eps = flat(model.parameters()) - before
    assert not eps[~mask].any()
    torch.testing.assert_close(eps[mask], (0.3 * g / g.norm())[mask], rtol=1e-6, atol=1e-12)
    assert eps.norm() <= 0.3 * (1 + 1e-6)
    assert sparsity or eps.norm() == pytest.approx(0.3, rel=1e-6)
    optimizer.step(closure_of(model, optimizer, 0))
    torch.testing.assert_close(flat(model.parameters()), before, **EXACT)


def test_tensors_off_the_mask_are_neither_copied_nor_touched():
    model = network()
    optimizer = SSAM(model, torch.optim.SGD, 0.3, mask=RandomMask(0.5), lr=0.1)
    params = list(model.parameters())
    optimizer.mask.set_masks([torch.full_like(p, i == 1, dtype=torch.bool) for i, p in enumerate(params)])
    with_gradient(optimizer, model)
    versions = [p._version for p in params]
    optimizer.first_step()
    assert [p is params[1] for p, _ in optimizer._saved] == [True]
    assert [p._version == v for p, v in zip(params, versions, strict=True)] == [True, False, True, True, True]
    optimizer.second_step()
    train(model, optimizer)


def test_groups_have_their_own_radius_and_later_ones_join_the_mask():
    model = network()
    groups = [{"params": model[0].parameters(), "rho": 0.0}, {"params": [*model[1].parameters()]}]
    optimizer = SSAM(groups, torch.optim.SGD, 0.5, mask=RandomMask(0.0), lr=0.1)
    optimizer.add_param_group({"params": [*model[3].parameters()], "rho": 0.1})
    g = with_gradient(optimizer, model)
    before = copy.deepcopy(model)
    with optimizer.perturbed():
        moved = [(p - q).norm() / p.grad.norm() for p, q in zip(model.parameters(), before.parameters(), strict=True)]
    expected = [rho / g.norm() for rho in (0.0, 0.5, 0.5, 0.1, 0.1)]
    torch.testing.assert_close(torch.stack(moved), torch.stack(expected), rtol=1e-5, atol=0)


def test_a_failing_second_closure_leaves_the_weights():
    model = network()
    optimizer = make(model, torch.optim.SGD, lr=0.1)
    before = flat(model.parameters())

    def fails():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure_of(model, optimizer, 0), fails)
    assert torch.equal(flat(model.parameters()), before)
    once = copy.deepcopy(model)
    with pytest.raises(ZeroDivisionError), optimizer.perturbed():
        1 / 0  # noqa: B018
    assert torch.equal(flat(model.parameters()), flat(once.parameters()))


def test_checkpoints_and_copies_hold_the_mask_and_its_next_draws():
    def steps(model, optimizer, numbers):
        for step in numbers:
            optimizer.update_mask(epoch=step, T_end=9)
            optimizer.step(closure_of(model, optimizer, step))
        return [*model.state_dict().values(), masks_of(optimizer)]

    model = network()
    optimizer = make(model, torch.optim.AdamW, lr=0.01)
    steps(model, optimizer, range(3))
    other = network(seed=9)
    fresh = SSAM(other, torch.optim.AdamW, 0.3, mask="dynamic", seed=5, lr=0.5)
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    pairs = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer))), (other, fresh)]
    other.load_state_dict(saved[0])
    fresh.load_state_dict(saved[1])
    assert fresh.mask.epoch == 3 and fresh.mask.T_end == 9
    fresh.mask.seed = 0
    expected = steps(model, optimizer, range(3, 6))
    for pair in pairs:
        torch.testing.assert_close(steps(*pair, range(3, 6)), expected, **EXACT)


# --- refusals


@pytest.mark.parametrize("options, message", [
    ({"mask": "magnitude"}, "mask = 'magnitude' is out of range: 'fisher', 'dynamic'"),
    ({"mask": None}, "mask = None is out of range"),
    ({"sparsity": 1.1}, r"sparsity = 1.1 is out of range: \[0, 1\]"),
    ({"mask": "dynamic", "drop_rate": -0.1}, "drop_rate = -0.1 is out of range"),
    ({"mask": "dynamic", "drop": "fisher"}, "drop = 'fisher' is out of range: 'gradient', 'weight', 'random'"),
    ({"mask": "dynamic", "grow": "all"}, "grow = 'all' is out of range"),
    ({"refresh": "never"}, "refresh = 'never' is out of range"),
    ({"rho": -1.0}, "rho = -1.0 is out of range"),
    ({"norm_eps": -1.0}, "norm_eps = -1.0 is out of range"),
])  # fmt: skip
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SSAM([nn.Parameter(torch.ones(2))], torch.optim.SGD, **options, lr=0.1)


def test_wrong_use_is_named():
    with pytest.raises(ValueError, match="num_samples = 0 is out of range"):
        FisherMask(num_samples=0)
    with pytest.raises(ValueError, match="T_end = 3 is out of range: > T_start = 5"):
        DynamicMask(T_start=5, T_end=3).exchanged(4)
    optimizer = make([nn.Parameter(torch.ones(2))], torch.optim.SGD, lr=0.1)
    with pytest.raises(TypeError, match="data"):
        optimizer.update_mask(data=1)
    with pytest.raises(TypeError, match="model"):
        SSAM([nn.Parameter(torch.ones(2))], torch.optim.SGD, lr=0.1).update_mask()


# --- in the bench


def test_in_the_bench_it_refreshes_every_epoch(monkeypatch):
    task, budget = resolve_task("digits"), Budget(steps=60, batch_size=32, evaluations=0)
    seen = []
    inherited = SSAM.update_mask

    def update_mask(self, **context):
        seen.append(context.get("epoch", "data"))
        inherited(self, **context)

    monkeypatch.setattr(SSAM, "update_mask", update_mask)
    recipe = DEFAULT_RECIPE
    for options in ({"mask": "fisher"}, {"mask": "dynamic", "rho": 0.2, "lr": 0.01, "weight_decay": 0.0}):
        result = fit(apply(recipe, **options), task, budget, 7, test=True)
        assert result.status == "finished" and result.test > 0.5
    epochs = -(-60 // (len(task.train) // 32))
    assert seen == ["data"] * epochs + list(range(epochs))
    with pytest.raises(ValueError, match="lr = -1 is out of range"):
        apply(recipe, lr=-1)
    assert resolve(parse_specs("ssam(rho=0.3)")[0]).space.keys() >= {"ssam.lr"}


# --- the claim


class Everything(SSAM):
    """Broken: the mask is not applied."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.mask.apply = lambda params, eps: eps


class Flipped(SSAM):
    """Broken: the weights with the largest Fisher information are those that are left out."""

    def update_mask(self, **context):
        super().update_mask(**context)
        self.mask.set_masks([~mask for mask in self.mask.masks.values()])


def verdicts(method, variant):
    evidence = room.claim(Bench(), method=method, variants=[variant], reported=(), seeds=3, epochs=2)
    return {check.name: check.verdict for check in evidence.checks}


def test_a_mask_that_is_not_applied_is_found_out():
    name = "largest share of weights perturbed, SSAM-D"
    assert verdicts(Everything, "SSAM-D")[name] == "does not hold"
    assert verdicts(SSAM, "SSAM-D")[name] == "holds"


def test_a_mask_of_the_wrong_half_is_found_out():
    name = "rise of the loss, Fisher 50 % / all"
    assert verdicts(Flipped, "SSAM-F")[name] == "does not hold"
    assert verdicts(SSAM, "SSAM-F")[name] == "holds"
