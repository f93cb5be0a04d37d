"""BAdam: fresh AdamW on one block after the other, and nothing left of a block when its visit is over."""

import copy
import weakref

import pytest
import torch
from torch import nn

from assay._processes import run_on_two
from assay.bench.arms import resolve
from assay.bench.evidence import Bench
from assay.bench.loop import fit
from assay.bench.recipe import Budget
from assay.bench.spec import parse_specs
from assay.bench.tasks import resolve_task
from assay.optim import BAdam, BlockWrapper
from assay.optim.badam import claim as room
from assay.optim.badam.blocks import Turns

EXACT = {"rtol": 0.0, "atol": 0.0}
LAYERS = ["0", "2", "4"]
ADAM = ("exp_avg", "exp_avg_sq")


def wrapper(params, base, **options):
    """One block of everything: what the contract asks of a wrapper is asked of the base's step."""
    kept = {"freeze_inactive": False}  # the contract sets flags itself
    return BlockWrapper(lambda groups: base(groups, **options), params, blocks=[""], switch_every=3, **kept)


def layerwise(params, **options):
    """A block for each layer of the contract's network; DDP wants to see all gradients."""
    return BAdam(params, blocks=[["0"], ["1", "2"], ["3"]], switch_every=2, freeze_inactive=False, **options)


EXAMPLE = {"BAdam": {"blocks": [""]}}
WRAPPERS = {"BlockWrapper": wrapper}
DISTRIBUTED = [(layerwise, {"lr": 1e-2, "weight_decay": 0.1}), (layerwise, {"lr": 1e-2, "order": "descending"})]


def network(dtype=torch.float64, width=5):
    torch.manual_seed(0)
    sizes = [(4, width), (width, width), (width, 3)]
    layers = [layer for a, b in sizes for layer in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).to(dtype)


def make(model, **options):
    return BAdam(model.named_parameters(), **{"lr": 0.01, "blocks": LAYERS, "switch_every": 4, **options})


def backward(model, step):
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    model.zero_grad()
    (model(x.to(model[0].weight.dtype)) - x[:, :3]).square().mean().backward()


def train(model, optimizer, steps):
    """The parameters after each step, and the blocks in which the steps were taken."""
    path, blocks = [], []
    for step in steps:
        backward(model, step)
        blocks.append(optimizer.current_block)
        optimizer.step()
        path.append([p.detach().clone() for p in model.parameters()])
    return path, blocks


# --- the formula


def by_hand(model, blocks, *, lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, always=None):
    """The paper's visits, a parameter at a time; ``blocks`` are the layers in which the steps are taken."""
    path, before, k, moments = [], None, 0, {}
    for step, block in enumerate(blocks):
        if block != before or k == 4:
            moments = {name: value for name, value in moments.items() if name.startswith(str(always))}
            before, k = block, 0
        k += 1
        backward(model, step)
        for name, p in model.named_parameters():
            if not name.startswith((LAYERS[block], str(always))):
                continue
            m, v, t = moments.get(name, (0.0, 0.0, 0))
            g, t = p.grad, t + 1
            m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g**2
            moments[name] = (m, v, t)
            decay = weight_decay if p.dim() > 1 else 0.0
            step_ = lr * (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
            p.data = p.data * (1 - lr * decay) - step_
        path.append([p.detach().clone() for p in model.parameters()])
    return path


@pytest.mark.parametrize("order", ["random", "ascending", "descending", "fixed"])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.3, "betas": (0.8, 0.9), "eps": 1e-3}])
def test_it_is_the_formula_in_every_order(order, options):
    model = network()
    path, blocks = train(model, make(model, order=order, **options), range(30))
    torch.testing.assert_close(path, by_hand(network(), blocks, **options), rtol=1e-10, atol=1e-12)
    visits = blocks[::4]
    expected = {"ascending": [0, 1, 2], "descending": [2, 1, 0], "fixed": [0, 0, 0]}
    if order == "random":
        assert sorted(visits[:3]) == sorted(visits[3:6]) == [0, 1, 2]
    else:
        assert visits == (expected[order] * 3)[:8]
    assert blocks == [block for block in visits for _ in range(4)][:30]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("decoupled", "base"), [(True, torch.optim.AdamW), (False, torch.optim.Adam)])
def test_one_block_and_a_long_visit_are_torchs_adam(dtype, decoupled, base):
    model, other = network(dtype), network(dtype)
    path, _ = train(model, make(model, blocks=[LAYERS], switch_every=50, decoupled=decoupled), range(20))
    torchs = base(other.parameters(), lr=0.01, weight_decay=0.0)
    for step in range(20):
        backward(other, step)
        torchs.step()
    torch.testing.assert_close(path[-1], list(other.parameters()), rtol=1e-7, atol=1e-9)


def test_coupled_decay_is_part_of_the_gradient():
    model, other = network(), network()
    train(model, make(model, blocks=[LAYERS], switch_every=50, decoupled=False, weight_decay=0.3), range(5))
    groups = [{"params": [p for p in other.parameters() if (p.dim() > 1) == big], "weight_decay": 0.3 * big}
              for big in (True, False)]  # fmt: skip
    torchs = torch.optim.Adam(groups, lr=0.01)
    for step in range(5):
        backward(other, step)
        torchs.step()
    torch.testing.assert_close(list(model.parameters()), list(other.parameters()), rtol=1e-10, atol=1e-12)


def test_every_visit_is_a_fresh_adamw_on_that_block_alone():
    model = network()
    optimizer = make(model, order="descending")
    for visit in range(6):
        block = LAYERS[optimizer.current_block]
        alone = copy.deepcopy(model)
        fresh = torch.optim.AdamW(alone[int(block)].parameters(), lr=0.01, weight_decay=0.0)
        train(model, optimizer, range(4 * visit, 4 * visit + 4))
        for step in range(4 * visit, 4 * visit + 4):
            backward(alone, step)
            fresh.step()
        same = {"rtol": 1e-12, "atol": 1e-14}
        torch.testing.assert_close(list(model.parameters()), list(alone.parameters()), **same)
        for layer in LAYERS:
            if layer != block:
                for p, q in zip(model[int(layer)].parameters(), alone[int(layer)].parameters(), strict=True):
                    assert torch.equal(p, q)


def test_a_head_that_is_always_active_keeps_its_moments():
    model = network()
    optimizer = make(model, blocks=["0", "2"], always_active=["4"], order="ascending")
    path, blocks = train(model, optimizer, range(20))
    torch.testing.assert_close(path, by_hand(network(), blocks, always="4"), rtol=1e-10, atol=1e-12)
    assert optimizer.state[model[4].weight]["step"] == 20
    assert optimizer.active_names() == ["2.weight", "2.bias", "4.weight", "4.bias"]


@pytest.mark.parametrize("freeze", [True, False])
def test_frozen_or_ignored_the_path_is_the_same(freeze):
    model, other = network(), network()
    path, _ = train(model, make(model, freeze_inactive=freeze), range(20))
    torch.testing.assert_close(path, train(other, make(other), range(20))[0], **EXACT)
    assert all(p.requires_grad for p in model.parameters()) is not freeze


def test_switching_by_hand_reproduces_any_schedule():
    """For instance a first visit that is one step short, as the authors' code has it."""
    model = network()
    optimizer, path, blocks = make(model, order="descending", switch_every=100), [], []
    for count in (3, 4, 4, 4):
        steps = range(len(path), len(path) + count)
        new = train(model, optimizer, steps)
        path, blocks = path + new[0], blocks + new[1]
        optimizer.switch_block()
    assert blocks == [2] * 3 + [1] * 4 + [0] * 4 + [2] * 4
    torch.testing.assert_close(path, by_hand(network(), blocks), rtol=1e-10, atol=1e-12)


def test_a_turn_by_hand_is_the_turn_of_the_epoch():
    optimizer = make(network(), order="ascending")
    seen = [optimizer.current_block]
    for index in (2, None, None, None, 0, None):
        optimizer.switch_block(index)
        seen.append(optimizer.current_block)
    assert seen == [0, 2, 1, 0, 1, 0, 2]
    for index in (3, -1, "0"):
        with pytest.raises(ValueError, match=r"index = .* is out of range: 0 to 2"):
            optimizer.switch_block(index)


def test_random_epochs_are_permutations_of_the_seed():
    def epochs(seed):
        turns = Turns("random", 6, seed)
        return [[turns.next() for _ in range(6)] for _ in range(20)]

    found = epochs(1)
    assert all(sorted(epoch) == list(range(6)) for epoch in found)
    assert len(set(map(tuple, found))) > 15
    assert epochs(1) == found != epochs(2)


# --- what is held, and what is computed


def test_state_is_the_blocks_and_dies_with_its_visit():
    model = network()
    optimizer = make(model, always_active=["4"], blocks=["0", "2"])
    for step in range(12):
        backward(model, step)
        optimizer.step()
        active = sum(p.numel() for name, p in model.named_parameters() if name in optimizer.active_names())
        assert sum(state[name].numel() for state in optimizer.state.values() for name in ADAM) <= 2 * active
        if step == 1:
            old = [weakref.ref(state[name]) for p, state in optimizer.state.items() for name in ADAM
                   if p is not model[4].weight and p is not model[4].bias]  # fmt: skip
            assert len(old) == 4
    assert not any(ref() is not None for ref in old)


def test_masters_die_with_their_visit_too():
    model = network(torch.bfloat16)
    optimizer = make(model)
    backward(model, 0)
    optimizer.step()
    old = [weakref.ref(master) for master in optimizer._masters.values()]
    assert len(old) == 2
    optimizer.switch_block()
    assert not any(ref() is not None for ref in old)


def test_backward_stops_at_the_active_block():
    model, counts, reached = network(), [], []
    for p in model.parameters():
        p.register_hook(lambda g: counts.append(g.numel()))
    optimizer = make(model, order="descending")

    def hook(module, args, output):
        if output.requires_grad:
            output.register_hook(lambda g: reached.append(0))

    model[0].register_forward_hook(hook)
    for visit, block in enumerate([4, 2, 0]):
        counts.clear()
        for step in range(4 * visit, 4 * visit + 4):
            backward(model, step)
            assert {name for name, p in model.named_parameters() if p.grad is not None} == {
                f"{block}.weight",
                f"{block}.bias",
            }
            assert bool(reached) == (block == 0)
            optimizer.step()
        assert sum(counts) == 4 * sum(p.numel() for p in model[block].parameters())


def test_closing_gives_the_flags_back():
    model = network()
    model[2].bias.requires_grad_(False)
    with make(model) as optimizer:
        assert sum(p.requires_grad for p in model.parameters()) == 2
        optimizer.switch_block(1)
        assert model[2].bias.requires_grad
    assert [p.requires_grad for p in model.parameters()] == [True, True, True, False, True, True]
    optimizer.close()
    for forbidden in (optimizer.step, optimizer.switch_block):
        with pytest.raises(RuntimeError, match="BAdam is closed"):
            forbidden()


def test_a_step_without_the_blocks_gradient_does_not_count():
    model = network()
    optimizer = make(model, order="ascending", always_active=["4"], blocks=["0", "2"])
    for step in range(3):
        backward(model, step)
        optimizer.step()
    before = copy.deepcopy(model.state_dict())
    model[0].zero_grad()
    optimizer.step()
    torch.testing.assert_close(model.state_dict(), before, **EXACT)
    assert optimizer.current_block == 0
    backward(model, 3)
    optimizer.step()
    assert optimizer.current_block == 1


def test_a_closure_is_called_once():
    model, calls = network(), []
    optimizer = make(model)

    def closure():
        calls.append(torch.is_grad_enabled())
        backward(model, 0)
        return 3.0

    assert optimizer.step(closure) == 3.0 and calls == [True]


# --- elsewhere


def test_in_the_bench_every_parameter_has_its_turn():
    budget = Budget(steps=12, batch_size=16, evaluations=0)
    (specs,), (base,) = parse_specs("badam"), parse_specs("adamw")
    recipe = resolve(specs, base).recipe({"badam.lr": 0.01, "badam.switch_every": 2})
    for task, count in (("digits(model='mlp')", 3), ("digits(model='vit')", 3)):
        model = fit(recipe, resolve_task(task), budget, 7).model
        optimizer = recipe.update(type("Run", (), {"model": model, "seed": 0}))
        assert len(optimizer.blocks) == count
        assert set(optimizer._homes.values()) == set(range(count))


TWO = """
import copy
from torch import nn
from torch.distributed.fsdp import fully_shard
from assay.optim.badam.test_badam import backward, make, network

def run(model, wrapped):
    optimizer = make(wrapped, blocks=[f"{prefix}{i}" for i in (0, 2, 4)], switch_every=2)
    for step in range(12):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        x = x if wrapped is alone else x.chunk(2)[rank]
        wrapped.zero_grad()
        (wrapped(x) - x[:, :3]).square().mean().backward()
        assert sum(p.grad is not None for p in wrapped.parameters()) == 2
        optimizer.step()
        for p, state in optimizer.state.items():
            assert type(state["exp_avg"]) is type(p.data), "state is not sharded as its parameter"
    return [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]

prefix, alone = "", network()
expected = run(alone, alone)
mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
whole, layers = network(), network()
for i in (0, 2, 4):
    fully_shard(layers[i], mesh=mesh)
for model in (fully_shard(whole, mesh=mesh), fully_shard(layers, mesh=mesh)):
    torch.testing.assert_close(run(model, model), expected, rtol=1e-9, atol=1e-12)
prefix, model = "module.", network()
ddp = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
torch.testing.assert_close(run(model, ddp), expected, rtol=1e-9, atol=1e-12)
"""


def test_frozen_blocks_on_two_processes_are_one(tmp_path):
    """FSDP2 follows the flags, DistributedDataParallel with find_unused_parameters."""
    run_on_two(TWO, tmp_path)


# --- the claim


class Stays(BAdam):
    """The broken variant: it never switches."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{**kwargs, "switch_every": 10**9, "order": "descending"})


class Hoards(BAdam):
    """The other broken variant: it keeps the moments of all blocks."""

    def _begin(self, index):
        self._block, self._count = index, 0
        self._activate()


def test_the_claim_fails_where_blocks_do_not_switch():
    def found(method):
        (check,) = room.claim(
            Bench(), method=method, parts=("accuracy",), arms=(room.BADAM, room.LAST), seeds=6, epochs=12
        ).checks
        return check.verdict

    assert found(Stays) == "does not hold"
    assert found(BAdam) == "holds"


def test_the_claim_fails_where_moments_are_kept():
    def found(method):
        arms = (room.BADAM, room.ADAMW)
        *_, check = room.claim(Bench(), method=method, parts=("accuracy",), arms=arms, seeds=2, epochs=5).checks
        assert check.name == "bytes of state, BAdam / AdamW"
        return check.verdict

    assert found(Hoards) == "does not hold"
    assert found(BAdam) == "holds"
