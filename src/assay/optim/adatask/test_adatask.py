"""AdaTask: torch's optimizers for one task, their sum for several, and no task's scale in another's step."""

import copy

import pytest
import torch
from torch import nn

from assay._processes import run_on_two
from assay.bench.evidence import Bench
from assay.optim import AdaTask
from assay.optim._contract import EXACT, gradients, parameters, same
from assay.optim._rule import PIECE, SMALL
from assay.optim.adatask import claim as room

EXAMPLE = {"AdaTask": {"n_tasks": 1}}
CLOSE = {"rtol": 1e-12, "atol": 1e-12}
BASES = {"adam": torch.optim.Adam, "rmsprop": torch.optim.RMSprop, "adagrad": torch.optim.Adagrad}


def one_task(params, **options):
    return AdaTask(params, 1, **options)


DISTRIBUTED = [(one_task, {"lr": 1e-2, "weight_decay": 0.1}), (one_task, {"lr": 1e-2, "base": "adagrad"})]


class Net(nn.Module):
    """A trunk that all tasks share, and a head for each."""

    def __init__(self, tasks=2):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(6, 2) for _ in range(tasks))
        self.double()

    def losses(self, step, scales=(1.0, 1.0), tasks=None):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        hidden = self.trunk(x)
        losses = [
            s * (head(hidden) - x[:, k : k + 2]).square().mean()
            for k, (s, head) in enumerate(zip(scales, self.heads, strict=False))
        ]
        return [loss if tasks is None or k in tasks else None for k, loss in enumerate(losses)]


def train(optimizer, model, steps=20, **how):
    for step in range(steps):
        optimizer.step(model.losses(step, **how))
    return [p.detach().clone() for p in model.parameters()]


def random_gradients(params, tasks, seed):
    generator = torch.Generator().manual_seed(seed)
    return [
        [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p) for p in params] for _ in range(tasks)
    ]


# --- the formula


def direction(base, history, *, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, alpha=0.99):
    """One task's part of the step after this history of its gradients, as the paper has it."""
    m = v = torch.zeros_like(history[0])
    for g in history:
        m = betas[0] * m + (1 - betas[0]) * g
        v = {
            "adam": betas[1] * v + (1 - betas[1]) * g**2,
            "rmsprop": alpha * v + (1 - alpha) * g**2,
            "adagrad": v + g**2,
        }[base]
    t = len(history)
    if base == "adam":
        m, v = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
    else:
        m = history[-1]
    return lr * m / (v.sqrt() + eps)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("weights", [None, [1, 2], [0.3, 5.0]])
def test_it_is_the_formula(base, weights):
    params = parameters()[:5]
    others = [p.detach().clone() for p in params]
    options = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-3, "alpha": 0.7}
    optimizer = AdaTask(params, 2, base=base, task_weights=weights, weight_decay=0.3, **options)
    histories = [[[] for _ in params] for _ in range(2)]
    for step in range(8):
        found = random_gradients(params, 2, step)
        optimizer.step_from_grads(found)
        for i, p in enumerate(others):
            for k in range(2):
                histories[k][i].append(found[k][i] * (weights or [1, 1])[k])
            others[i] = p * (1 - 0.01 * 0.3) - sum(direction(base, histories[k][i], **options) for k in range(2))
    torch.testing.assert_close([p.detach() for p in params], others, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("base", "decay"), [*((base, 0.0) for base in BASES), ("adam", 0.1)])
def test_with_one_task_it_is_torchs(base, decay):
    mine, torchs = parameters(), parameters()
    optimizer = AdaTask(mine, 1, lr=0.01, base=base, weight_decay=decay)
    other = (torch.optim.AdamW if decay else BASES[base])(torchs, lr=0.01, eps=1e-8, weight_decay=decay)
    for step, _ in zip(gradients(mine, 20), gradients(torchs, 20), strict=True):
        # The ways to step are the same.
        if step % 2:
            optimizer.step_from_grads([[p.grad for p in mine]])
        else:
            optimizer.step()
        other.step()
    same(mine, torchs, **CLOSE)


@pytest.mark.parametrize("base", BASES)
def test_equal_tasks_move_as_far_as_one_times_their_number(base):
    for count in (2, 5):
        p, q = (nn.Parameter(torch.ones(7, dtype=torch.float64)) for _ in range(2))
        many, one = AdaTask([p], count, base=base), AdaTask([q], 1, base=base)
        for step in range(10):
            ((g,),) = random_gradients([q], 1, step)
            before = p.detach().clone(), q.detach().clone()
            many.step_from_grads([[g]] * count)
            one.step_from_grads([[g]])
            torch.testing.assert_close(p - before[0], count * (q - before[1]), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_a_factor_on_a_loss_leaves_the_trunk_alone(base, factor):
    def trunk(make, factor):
        model = Net()
        make(model, (1.0, factor))
        return torch.cat([p.detach().flatten() for p in model.trunk.parameters()])

    def ours(model, scales):
        train(AdaTask(model.parameters(), 2, lr=0.01, base=base, eps=1e-30), model, scales=scales)

    def theirs(model, scales):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for step in range(20):
            optimizer.zero_grad()
            sum(model.losses(step, scales)).backward()
            optimizer.step()

    start = torch.cat([p.detach().flatten() for p in Net().trunk.parameters()])
    moved = {make: (trunk(make, 1.0), trunk(make, factor)) for make in (ours, theirs)}
    change = {make: ((b - a).norm() / (a - start).norm()).item() for make, (a, b) in moved.items()}
    assert change[ours] < 1e-5 and change[theirs] > 0.1


def test_the_first_step_is_a_sign_for_each_task():
    p = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    one, other = torch.tensor([3.0, -1e-6, 1e6, 0.0]), torch.tensor([5.0, 2.0, -1.0, -1.0])
    AdaTask([p], 2, lr=0.1, eps=1e-30).step_from_grads([[one.double()], [other.double()]])
    torch.testing.assert_close(p.detach(), torch.tensor([-0.2, 0.0, 0.0, 0.1], dtype=torch.float64), **CLOSE)


def test_decay_is_once_for_all_tasks():
    params = parameters()
    before = [p.detach().clone() for p in params]
    zeros = [torch.zeros_like(p) for p in params]
    AdaTask(params, 3, lr=0.1, weight_decay=0.5).step_from_grads([zeros] * 3)
    same(params, [nn.Parameter(0.95 * p) for p in before], **CLOSE)


def test_the_order_of_the_tasks_does_not_matter():
    def run(order):
        params = parameters()
        optimizer = AdaTask(params, 3, lr=0.01)
        for step in range(5):
            found = random_gradients(params, 3, step)
            optimizer.step_from_grads([found[k] for k in order])
        return params

    same(run([0, 1, 2]), run([2, 0, 1]), rtol=1e-10, atol=1e-12)


def test_lists_of_small_tensors_and_large_ones_alone_are_the_same_bits():
    def run(small):
        params = [nn.Parameter(torch.linspace(-1, 1, n, dtype=torch.float64)) for n in (3, 50, SMALL + 1, PIECE + 5)]
        optimizer = AdaTask(params, 2, lr=0.01, weight_decay=0.1)
        for step in range(4):
            found = random_gradients(params, 2, step)
            if small:
                optimizer.step_from_grads(found)
                continue
            for p in params:  # one after the other
                only = [[g if p is q else None for q, g in zip(params, grads, strict=True)] for grads in found]
                optimizer.step_from_grads(only)
        return params

    same(run(True), run(False))


# --- heads, and tasks that are absent


def test_heads_have_the_ordinary_optimizer_and_no_other_state():
    model, other = Net(), Net()
    optimizer = AdaTask(model.parameters(), 2, lr=0.01, task_weights=[2.0, 3.0])
    adam = torch.optim.Adam(other.heads.parameters(), lr=0.01)
    for step in range(10):
        adam.zero_grad()
        other.trunk.load_state_dict(model.trunk.state_dict())
        one, two = other.losses(step)
        (2 * one + 3 * two).backward()
        adam.step()
        loss = optimizer.step(model.losses(step))
        torch.testing.assert_close(loss, (2 * one + 3 * two).detach())
    torch.testing.assert_close(list(model.heads.parameters()), list(other.heads.parameters()), **CLOSE)
    names = {name: set(optimizer.state[p]) - {"step"} for name, p in model.named_parameters()}
    assert names["heads.1.weight"] == {"exp_avg_1", "exp_avg_sq_1"}
    assert names["trunk.0.weight"] == {"exp_avg_0", "exp_avg_sq_0", "exp_avg_1", "exp_avg_sq_1"}
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("how", ["group", "call"])
def test_parameters_that_are_not_shared_have_one_accumulator_for_the_sum(how):
    model, other = Net(), Net()
    first, rest = list(model.trunk.parameters()), list(model.heads.parameters())
    groups = [{"params": first, "shared": False if how == "group" else None}, {"params": rest}]
    optimizer, adam = AdaTask(groups, 2, lr=0.01), torch.optim.Adam(other.parameters(), lr=0.01)
    for step in range(10):
        optimizer.step(model.losses(step), **({"shared": rest} if how == "call" else {}))
        adam.zero_grad()
        sum(other.losses(step)).backward()
        adam.step()
    torch.testing.assert_close(list(model.parameters()), list(other.parameters()), **CLOSE)
    assert set(optimizer.state[first[0]]) == {"step", "exp_avg_sum", "exp_avg_sq_sum"}


def test_an_absent_task_keeps_its_state_and_its_count():
    model = Net()
    optimizer = AdaTask(model.parameters(), 2, lr=0.01)
    train(optimizer, model, 4)
    shared = model.trunk[0].weight
    before = copy.deepcopy(optimizer.state[shared])
    train(optimizer, model, 3, tasks=[0])
    after = optimizer.state[shared]
    assert all(torch.equal(before[f"{name}_1"], after[f"{name}_1"]) for name in ("exp_avg", "exp_avg_sq"))
    assert before["step"].tolist() == [4, 4, 0] and after["step"].tolist() == [7, 4, 0]
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step([None, torch.zeros((), dtype=torch.float64)])  # nothing to learn from
    torch.testing.assert_close([p.detach() for p in model.parameters()], before, **EXACT)


def test_a_task_that_comes_late_starts_with_its_own_count():
    p = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = AdaTask([p], 2, lr=0.1, eps=1e-30)
    g = torch.ones(3, dtype=torch.float64)
    for _ in range(5):
        optimizer.step_from_grads([[g], [None]])
    before = p.detach().clone()
    optimizer.step_from_grads([[None], [1e3 * g]])
    torch.testing.assert_close(before - p.detach(), 0.1 * g, rtol=1e-9, atol=0)


# --- what is refused


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("n_tasks", 0),
        ("n_tasks", 1.5),
        ("base", "sgd"),
        ("betas", (1.0, 0.9)),
        ("eps", -1e-8),
        ("alpha", 1.0),
        ("weight_decay", -0.1),
        ("decoupled", False),
        ("task_weights", [1.0]),
        ("task_weights", [1.0, -1.0]),
        ("au_decay", 1.0),
    ],
)
def test_values_out_of_range_are_refused_by_name(option, value):
    with pytest.raises(ValueError, match=f"{option} = .* is out of range"):
        AdaTask([nn.Parameter(torch.ones(2))], **{"n_tasks": 2, option: value})


def test_what_else_is_refused():
    model = Net()
    optimizer = AdaTask(model.parameters(), 2)
    p = model.trunk[0].weight
    with pytest.raises(ValueError, match="losses of 1 tasks is out of range: 2"):
        optimizer.step([model.losses(0)[0]])
    with pytest.raises(ValueError, match=r"losses\[1\] of shape \(3,\) is out of range"):
        optimizer.step([model.losses(0)[0], torch.ones(3)])
    with pytest.raises(ValueError, match=r"per_task_grads of lengths \[1, 1\] is out of range: 2 lists of 6"):
        optimizer.step_from_grads([[None], [None]])
    with pytest.raises(ValueError, match="task_index = 2 is out of range: 0 to 1"):
        optimizer.accumulate(2)
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step_from_grads([[torch.ones_like(p).to_sparse()] + 5 * [None], 6 * [None]])
    with pytest.raises(TypeError, match="has no option 'momentum'"):
        AdaTask([{"params": [p], "momentum": 0.9}], 2)
    z = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(RuntimeError, match="complex"):
        AdaTask([z], 1).step_from_grads([[torch.ones_like(z)]])


TWO = """
from torch import nn
from torch.distributed.fsdp import fully_shard
from assay.optim import AdaTask
from assay.optim.adatask.test_adatask import Net

class OneLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Net()
    def forward(self, step, k):
        whole = torch.randn(8, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        x = whole if alone else whole.chunk(2)[rank]
        return (self.net.heads[k](self.net.trunk(x)) - x[:, k : k + 2]).square().mean()

def run(model, inner):
    optimizer = AdaTask(model.parameters(), 2, lr=0.01, track_au=True, task_weights=[1.0, 3.0])
    for step in range(5):
        for k in (0, 1):
            model(step, k).backward()
            optimizer.accumulate(k)
        optimizer.step()
    shares = list(optimizer.dominance().values())
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in inner.parameters()], shares, optimizer

alone = True
inner = OneLoss()
params, shares, _ = run(inner, inner)
alone = False
inner = OneLoss()
ddp = nn.parallel.DistributedDataParallel(inner, find_unused_parameters=True)
found, said, _ = run(ddp, inner)
torch.testing.assert_close(found, [p.detach() for p in params], rtol=1e-9, atol=1e-12)
torch.testing.assert_close(said, shares, rtol=1e-6, atol=1e-9)
inner = fully_shard(OneLoss(), mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
found, said, optimizer = run(inner, inner)
torch.testing.assert_close(found, [p.detach() for p in params], rtol=1e-9, atol=1e-12)
torch.testing.assert_close(said, shares, rtol=1e-6, atol=1e-9)
try:
    optimizer.step([inner(0, 0), inner(0, 1)])
except RuntimeError as error:
    assert "sharded parameters: call backward for each task" in str(error)
else:
    raise AssertionError("losses of sharded parameters were taken")
"""


def test_two_processes_are_one(tmp_path):
    run_on_two(TWO, tmp_path)


# --- the claim


class Summed(AdaTask):
    """The broken variant: one accumulator for the sum of the tasks, which is Adam."""

    def _update(self, gradients, shared):
        super()._update(gradients, ())


@pytest.mark.parametrize(("method", "verdict"), [(Summed, "does not hold"), (AdaTask, "holds")])
def test_the_claim_fails_where_the_tasks_share_their_accumulators(method, verdict):
    evidence = room.claim(Bench(), method=method, parts=("common rate",), arms=(room.ADAM, room.ADATASK), seeds=4)
    assert evidence.checks[0].name.endswith("AdaTask - Adam (points)")
    assert evidence.checks[0].verdict == verdict
