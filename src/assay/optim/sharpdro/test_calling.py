"""SharpDRO in use: the ways to call it, the contract of wrappers, what it refuses, two processes, and the bench."""

import copy
import io
import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from assay._processes import run_on_two
from assay.bench.arms import DEFAULT_RECIPE, resolve
from assay.bench.loop import fit
from assay.bench.recipe import Budget
from assay.bench.spec import parse_specs
from assay.bench.tasks import resolve_task
from assay.optim import SharpDRO
from assay.optim._wrapper_contract import BASES, EXACT, network
from assay.optim.sam import RandomMask
from assay.optim.sharpdro.sharpdro import apply
from assay.optim.sharpdro.test_sharpdro import GROUPS, SGD, closure_of, train


@pytest.mark.parametrize("bn_stats, passes", [("first", 1), ("both", 2), ("none", 0)])
def test_running_statistics_follow_the_passes_that_are_named(bn_stats, passes):
    model = network()
    train(model, SharpDRO(model, torch.optim.SGD, n_groups=GROUPS, lr=0.1, bn_stats=bn_stats), range(1))
    assert model[1].num_batches_tracked == passes


@pytest.mark.parametrize("mode", ["aware", "agnostic"])
def test_the_ways_to_call_it_give_the_same_bits(mode):
    def calls_step(model, optimizer, step):
        optimizer.step(closure_of(model, step, mode))

    def calls_two(model, optimizer, step):
        closure = closure_of(model, step, mode)
        optimizer.first_step(*closure(), zero_grad=True)
        assert all(p.grad is None for p in model.parameters())
        losses, about = closure()
        optimizer.second_step(*((losses,) if mode == "aware" else (losses, about)))

    def calls_backward(model, optimizer, step):
        closure = closure_of(model, step, mode)

        def scalar():
            optimizer.zero_grad()
            loss = optimizer.objective(*closure())
            loss.backward()
            return loss

        optimizer.step(scalar)

    def calls_both(model, optimizer, step):
        closure = closure_of(model, step, mode)
        optimizer.zero_grad()
        optimizer.objective(*closure()).backward()
        optimizer.first_step(zero_grad=True)
        optimizer.objective(*closure()).backward()
        optimizer.second_step()

    ends = []
    for way in (calls_step, calls_two, calls_backward, calls_both):
        model = network()
        # Running statistics aside: in the two calls the loop itself must see to them.
        model[1].track_running_stats = False
        optimizer = SharpDRO(model, torch.optim.SGD, 0.3, n_groups=GROUPS, step_size=0.5, mode=mode, **SGD)
        for step in range(4):
            way(model, optimizer, step)
        ends.append([list(model.parameters()), optimizer.q])
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], **EXACT)


def test_the_second_closure_may_be_another():
    p = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = SharpDRO([p], torch.optim.SGD, rho=0.0, n_groups=1, lr=0.0)
    zeros = torch.zeros(2).long()
    optimizer.step(lambda: (p, zeros), lambda: (3 * p, zeros))
    torch.testing.assert_close(p.grad, torch.full((2,), 0.5 + 1.5, dtype=torch.float64))


def test_a_failing_second_closure_leaves_weights_and_q():
    model = network()
    optimizer = SharpDRO(model, torch.optim.SGD, 0.5, n_groups=GROUPS, step_size=1.0, lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]

    def fails():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure_of(model, 0), fails)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert optimizer.q.tolist() == [0.25] * 4
    train(model, optimizer)


# The contract of wrappers, for a closure that does not call backward.


def make(model, base, options):
    return SharpDRO(model, base, 0.3, n_groups=GROUPS, step_size=0.5, **options)


@pytest.mark.parametrize("base, options", BASES)
def test_resuming_is_bit_exact(base, options):
    model, other = network(), network(seed=9)
    optimizer = make(model, base, options)
    train(model, optimizer, range(3))
    saved = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], saved)
    saved.seek(0)
    weights, state = torch.load(saved, weights_only=True)
    fresh = make(other, base, options)
    other.load_state_dict(weights)
    fresh.load_state_dict(state)
    assert fresh.q.tolist() == optimizer.q.tolist() != [0.25] * 4
    torch.testing.assert_close(train(other, fresh, range(3, 6)), train(model, optimizer, range(3, 6)), **EXACT)


def test_copies_go_on_alike():
    pair = (model := network(), make(model, torch.optim.SGD, SGD))
    train(*pair, range(2))
    others = [copy.deepcopy(pair), pickle.loads(pickle.dumps(pair))]
    expected = train(*pair, range(2, 4))
    for other in others:
        torch.testing.assert_close(train(*other, range(2, 4)), expected, **EXACT)


def test_schedulers_groups_and_parameters_without_gradient():
    model = network()
    model[3].bias.requires_grad_(False)
    parts = [{"params": model[0].parameters(), "lr": 0.0}, {"params": [*model[1].parameters(), *model[3].parameters()]}]
    optimizer = SharpDRO(parts, torch.optim.SGD, n_groups=GROUPS, lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.0)
    still = [model[0].weight.detach().clone(), model[3].bias.detach().clone()]
    before = model[3].weight.detach().clone()
    train(model, optimizer, range(1))
    assert not torch.equal(model[3].weight, before)
    scheduler.step()
    before = model[3].weight.detach().clone()
    train(model, optimizer, range(1))
    assert torch.equal(model[3].weight, before)
    assert torch.equal(model[0].weight, still[0]) and torch.equal(model[3].bias, still[1])
    assert model[3].bias.grad is None


def test_a_mask_chooses_what_is_perturbed():
    models = [network(), network()]
    masked = SharpDRO(models[0], torch.optim.SGD, 0.3, n_groups=GROUPS, mask=RandomMask(1.0), **SGD)
    plain = SharpDRO(models[1], torch.optim.SGD, 0.0, n_groups=GROUPS, **SGD)
    torch.testing.assert_close(train(models[0], masked), train(models[1], plain), **EXACT)
    masked.load_state_dict(masked.state_dict())


# What is refused.


@pytest.mark.parametrize("options, message", [
    ({}, "n_groups = None is out of range: an integer >= 1"),
    ({"n_groups": 0}, "n_groups = 0 is out of range"),
    ({"n_groups": True}, "n_groups = True is out of range"),
    ({"n_groups": 2, "step_size": -1.0}, r"step_size = -1\.0 is out of range"),
    ({"n_groups": 2, "step_size": float("inf")}, "step_size = inf is out of range"),
    ({"n_groups": 2, "rho": -0.1}, r"rho = -0\.1 is out of range"),
    ({"n_groups": 2, "mode": "blind"}, "mode = 'blind' is out of range: 'aware' or 'agnostic'"),
    ({"n_groups": 2, "ascent": "sgd"}, "ascent = 'sgd' is out of range: 'mean' or 'weighted'"),
    ({"mode": "agnostic", "ascent": "weighted"}, "ascent = 'weighted' is out of range: 'mean' with mode = 'agnostic'"),
    ({"mode": "agnostic", "subtract": True}, "subtract = True is out of range: False with mode = 'agnostic'"),
])  # fmt: skip
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SharpDRO([nn.Parameter(torch.ones(2))], torch.optim.SGD, lr=0.1, **options)


def test_wrong_use_is_named():
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(TypeError, match="speed"):
        SharpDRO([p], torch.optim.SGD, n_groups=2, lr=0.1, speed=1)
    optimizer = SharpDRO([p], torch.optim.SGD, n_groups=2, lr=0.1)
    groups = torch.tensor([0, 1, 1])
    with pytest.raises(RuntimeError, match="needs the gradient twice"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="lacks the losses at w: a closure returns"):
        optimizer.step(lambda: p.sum())
    for losses, wrong, message in [
        (p, None, "groups = None is out of range"),
        (p, groups[:2], r"groups.shape = \(2,\) is out of range: \(3,\)"),
        (p, groups.float(), "out of range: .* integers"),
        (p, 2 * groups, "groups = .0, 2. is out of range: integers from 0 to 1"),
        (p, -groups, "groups = .-1, 0. is out of range"),
        (p.sum(), groups[0], r"per_sample_loss.shape = \(\) is out of range"),
    ]:
        with pytest.raises(ValueError, match=message):
            optimizer.first_step(losses, wrong)
    with pytest.raises(RuntimeError, match="call first_step"):
        optimizer.second_step()
    optimizer.first_step(p, groups)
    with pytest.raises(ValueError, match=r"per_sample_loss.shape = \(2,\) is out of range: \(3,\), as at w"):
        optimizer.second_step(p[:2])
    with pytest.raises(RuntimeError, match=r"lacks the losses at w \+ eps"):
        optimizer.second_step()
    with pytest.raises(RuntimeError, match="call second_step"):
        optimizer.first_step(p, groups)
    other = SharpDRO([p], torch.optim.SGD, n_groups=3, lr=0.1)
    with pytest.raises(ValueError, match="n_groups = 3 is out of range: 2, as was saved"):
        other.load_state_dict(optimizer.state_dict())
    agnostic = SharpDRO([p], torch.optim.SGD, mode="agnostic", lr=0.1)
    for logits in (None, torch.zeros(3), torch.zeros(2, 3)):
        with pytest.raises(ValueError, match=r"logits.shape = .* is out of range"):
            agnostic.first_step(p, logits)
    twice = SharpDRO([p], torch.optim.SGD, n_groups=2, subtract=True, lr=0.1)
    with pytest.raises(RuntimeError, match="give the losses to step"):
        twice.objective(p, groups)


SHARED = """
from torch import nn
from assay.optim.sharpdro.test_sharpdro import GROUPS, SGD, SharpDRO, batch_of, closure_of, F
def train(model, mode, part=slice(None)):
    optimizer = SharpDRO(model.parameters(), torch.optim.SGD, 0.3, n_groups=GROUPS, step_size=0.5, mode=mode, **SGD)
    for step in range(4):
        x, y, groups = (tensor[part] for tensor in batch_of(step))
        def closure():
            logits = model(x)
            return F.cross_entropy(logits, y, reduction="none"), groups if mode == "aware" else logits
        optimizer.step(closure)
    return optimizer.q
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3)).double()
"""

TOGETHER = """
from torch.distributed.fsdp import fully_shard
mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
saved = torch.load(sys.argv[2] + ".expected")
for mode in ("aware", "agnostic"):
    expected, q = saved[mode]
    part = slice(4 * rank, 4 * rank + 4)
    ddp = nn.parallel.DistributedDataParallel(network())
    sharded = fully_shard(network(), mesh=mesh)
    for model in (ddp, sharded):
        torch.testing.assert_close(train(model, mode, part), q, rtol=1e-12, atol=1e-12)
    found = {name: value.full_tensor() for name, value in sharded.state_dict().items()}
    for values in (ddp.module.state_dict(), found):
        torch.testing.assert_close(dict(values), expected, rtol=1e-9, atol=1e-11)
model = network()
optimizer = SharpDRO(model, torch.optim.SGD, n_groups=GROUPS, ascent="weighted", lr=0.1)
try:
    optimizer.step(closure_of(model, 0))
except RuntimeError as error:
    assert "processes average only one" in str(error)
else:
    raise AssertionError("two gradients of one pass were taken")

from assay.losses import GroupDRO
losses = torch.tensor([1.0, 2.0, 4.0, 3.0, 5.0, 9.0]).double()
groups = torch.tensor([0, 0, 1, 0, 1, 1])  # of group 0 are two in this half, and one in the other
criterion, means = GroupDRO(2, 0.1), torch.tensor([2.0, 6.0]).double()
loss = criterion(losses[3 * rank : 3 * rank + 3], groups[3 * rank : 3 * rank + 3])
torch.testing.assert_close(criterion.q, (0.1 * means).softmax(0))
dist.all_reduce(loss)
torch.testing.assert_close(loss / 2, criterion.q @ means)
"""


def test_two_processes_are_one(tmp_path):
    """Means of groups, q and the agnostic weights are over both batches, which hold the groups in different numbers."""
    alone = {}
    scope = {"torch": torch}
    exec(SHARED, scope)
    for mode in ("aware", "agnostic"):
        model = scope["network"]()
        q = scope["train"](model, mode)
        alone[mode] = (dict(model.state_dict()), q)
    torch.save(alone, tmp_path / "store.expected")
    run_on_two(SHARED + TOGETHER, tmp_path)


# In the bench.


class ByHand(SharpDRO):
    """Asks the loop's closure for nothing but the batch, and takes its losses and groups itself."""

    def step(self, closure):
        closure()

        def losses():
            logits = self.model(self.seen.input)
            about = {"class": self.seen.target, "data": self.seen.index % 3, None: logits}[self.groups]
            return F.cross_entropy(logits, self.seen.target, reduction="none"), about

        return super().step(losses)


@pytest.mark.parametrize("groups", ["class", "data", None])
def test_in_the_bench_it_stands_around_the_arms_optimizer(groups):
    task, budget = resolve_task("digits(model='mlp')"), Budget(steps=5, batch_size=60, evaluations=0)
    data = copy.copy(task.train)
    data.groups = [i % 3 for i in range(len(data))]
    task = replace(task, train=data)

    def update(run):
        base = torch.optim.SGD(run.model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
        n_groups = {"class": 10, "data": 3, None: None}[groups]
        mode = "aware" if groups else "agnostic"
        optimizer = ByHand(None, base, 0.2, n_groups=n_groups, step_size=0.5, mode=mode)
        optimizer.model, optimizer.groups = run.model, groups
        return optimizer

    def objective(run):
        def loss(model, batch):
            run.optimizer.seen = batch
            return run.task.loss(model(batch.input), batch.target)

        return loss

    (specs,), (base,) = parse_specs(f"sharpdro(groups={groups!r},step_size=0.5)"), parse_specs("sgd(weight_decay=0.0)")
    arm = resolve(specs, base)
    assert list(arm.space) == ["sgd.lr", "sharpdro.rho"]
    found = fit(arm.recipe({"sgd.lr": 0.05, "sharpdro.rho": 0.2}), task, budget, 7).model
    expected = fit(replace(DEFAULT_RECIPE, objective=objective, update=update), task, budget, 7).model
    torch.testing.assert_close(list(found.parameters()), list(expected.parameters()), rtol=1e-4, atol=1e-6)
    assert found[2].num_batches_tracked == 5


def test_in_the_bench_what_it_cannot_train_is_named():
    budget = Budget(steps=2, batch_size=16, evaluations=0)
    for options, task, message in [
        ({}, "tabular(dataset='diabetes')", "sharpdro needs a classification task"),
        ({"groups": "data"}, "digits", "a training set with an attribute groups"),
    ]:
        with pytest.raises(ValueError, match=message):
            fit(apply(DEFAULT_RECIPE, **options), resolve_task(task), budget, 0)
    replaced = replace(apply(DEFAULT_RECIPE), update=DEFAULT_RECIPE.update)
    with pytest.raises(ValueError, match="name it last"):
        fit(replaced, resolve_task("digits"), budget, 0)
    for options, message in [({"groups": "severity"}, "groups = 'severity'"), ({"rho": -1.0}, "rho = -1.0")]:
        with pytest.raises(ValueError, match=message):
            apply(DEFAULT_RECIPE, **options)
    assert fit(apply(DEFAULT_RECIPE, groups=None), resolve_task("text"), budget, 0).status == "finished"
