"""How the 8-bit engine keeps, converts, saves and shards its states."""

import copy
import functools
import io

import pytest
import torch
from torch import nn

from assay._processes import run_on_two
from assay.optim import AdamW8bit, Lion8bit, SGD8bit, use_32bit
from assay.optim.eightbit import quantized

EXACT = {"rtol": 0, "atol": 0}
Sgd = functools.partial(SGD8bit, lr=0.01)


def steps(p, optimizer, count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        p.grad = torch.randn(p.shape, generator=generator).to(p)
        optimizer.step()


def weight(*shape, dtype=torch.float32):
    return nn.Parameter(torch.randn(*shape or (64, 100), generator=torch.Generator().manual_seed(0)).to(dtype))


def bytes_of(state):
    return sum(x.nbytes for name, x in state.items() if name != "step")


@pytest.mark.parametrize("make, per_parameter", [(AdamW8bit, 2.04), (Sgd, 1.02), (Lion8bit, 1.02)])
def test_bytes_of_state_stay_few(make, per_parameter):
    p = weight(256, 256)
    optimizer = make([p])
    steps(p, optimizer, 2)
    assert bytes_of(optimizer.state[p]) <= per_parameter * p.numel()
    model = nn.ParameterList([p]).to(torch.bfloat16)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(model[0], optimizer, 2)
    state = optimizer.state[p]
    assert p.dtype == torch.bfloat16 and bytes_of(state) <= per_parameter * p.numel()
    assert {x.dtype for name, x in state.items() if name.endswith("absmax")} == {torch.float32}
    assert {x.dtype for name, x in state.items() if name + "_absmax" in state} == {torch.uint8}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"optim_bits": 32}], ids=["8 bits", "32 bits"])
def test_resuming_is_exact_in_every_dtype(dtype, options):
    whole, part = weight(dtype=dtype), weight(dtype=dtype)
    optimizer = AdamW8bit([whole], **options)
    steps(whole, optimizer, 3)
    steps(whole, optimizer, 3, seed=2)
    first = AdamW8bit([part], **options)
    steps(part, first, 3)
    saved = io.BytesIO()
    torch.save(first.state_dict(), saved)
    saved.seek(0)
    second = AdamW8bit([part], **options)
    second.load_state_dict(torch.load(saved, weights_only=True))
    assert {name: x.dtype for name, x in first.state[part].items()} == {
        name: x.dtype for name, x in second.state[part].items()
    }
    steps(part, second, 3, seed=2)
    torch.testing.assert_close(part, whole, **EXACT)


def test_a_checkpoint_of_torchs_adamw_goes_on_in_8_bits():
    p, q = weight(), weight()
    torchs = torch.optim.AdamW([p], lr=1e-3)
    steps(p, torchs, 5)
    with torch.no_grad():
        q.copy_(p)
    ours = AdamW8bit([q])
    ours.load_state_dict(copy.deepcopy(torchs.state_dict()))
    p.grad, q.grad = torch.zeros_like(p), torch.zeros_like(q)
    torchs.step()
    ours.step()
    assert bytes_of(ours.state[q]) <= 2.04 * q.numel() and ours.state[q]["step"] == 6
    assert (p - q).abs().max() < 1e-3  # the steps of weights whose m and v are coded coarsely


def test_a_group_may_change_to_32_bits_and_back():
    p, q = weight(33, 200), weight(33, 200)
    kept, changed = AdamW8bit([p]), AdamW8bit([q])
    for optimizer, r in ((kept, p), (changed, q)):
        steps(r, optimizer, 3)
    codes = changed.state[q]["exp_avg"].clone()
    for bits in (32, 8):
        changed.param_groups[0].update(optim_bits=bits, lr=0.0)
        changed._convert(q, changed.param_groups[0])
        assert changed.state[q]["exp_avg"].dtype == (torch.float32 if bits == 32 else torch.uint8)
        assert ("exp_avg_absmax" in changed.state[q]) == (bits == 8)
    # The largest of a block is coded as itself unless it is negative: then its 0.993 is the next scale.
    assert (codes.int() - changed.state[q]["exp_avg"].int()).abs().max() <= 1
    use_32bit(q)
    steps(q, changed, 1)
    assert changed.state[q]["exp_avg"].dtype == torch.float32


def test_a_block_size_that_is_not_the_states_is_refused():
    p = weight()
    optimizer = AdamW8bit([p])
    steps(p, optimizer, 1)
    optimizer.param_groups[0]["block_size"] = 64
    with pytest.raises(RuntimeError, match="block_size = 64 does not fit"):
        steps(p, optimizer, 1)


def test_pieces_layouts_and_short_blocks_change_nothing(monkeypatch):
    plain, last = weight(20, 9, 7, 5), weight(20, 9, 7, 5)
    last.data = last.data.to(memory_format=torch.channels_last)
    for p in (plain, last):
        steps(p, AdamW8bit([p]), 4)
        monkeypatch.setattr(quantized, "PIECE", 512)
    assert last.is_contiguous(memory_format=torch.channels_last) and not last.is_contiguous()
    torch.testing.assert_close(plain, last, **EXACT)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_elements_without_a_finite_gradient_stay(bad):
    p, q = weight(), weight()
    one, other = AdamW8bit([p]), AdamW8bit([q])
    steps(p, one, 3)
    steps(q, other, 3)
    before = {name: x.clone() for name, x in one.state[p].items()}
    old = p.detach().clone()
    p.grad, q.grad = (torch.ones_like(p) * 0.01 for _ in range(2))
    p.grad[3, 10:20] = bad
    one.step()
    other.step()
    assert torch.equal(p[3, 10:20], old[3, 10:20])
    chosen = torch.ones_like(p, dtype=torch.bool)
    chosen[3, 10:20] = False
    assert torch.equal(p[chosen], q[chosen]) and not torch.equal(p[chosen], old[chosen])
    assert p.isfinite().all() and all(x.isfinite().all() for x in one.state[p].values())
    p.grad.fill_(bad)
    old, before = p.detach().clone(), {name: x.clone() for name, x in one.state[p].items()}
    one.step()
    assert torch.equal(p, old)
    assert all(torch.equal(one.state[p][name], x) for name, x in before.items() if name.startswith("exp_avg_sq"))


def test_no_code_has_another_sign_than_its_momentum():
    p = weight(4096)
    optimizer = Sgd([p], momentum=0.5)
    g = torch.randn(4096) * 10 ** (-12 * torch.rand(4096))
    p.grad = g
    optimizer.step()
    assert torch.equal((optimizer.state[p]["momentum_buffer"].int() - 127).sign(), g.sign().int())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"optim_bits": 32}], ids=["8 bits", "32 bits"])
def test_half_precision_is_float32_written_back_rounded(dtype, options):
    p, q = weight(dtype=dtype), weight(dtype=dtype).float()
    q = nn.Parameter(q.detach())
    half, single = AdamW8bit([p], lr=0.01, **options), AdamW8bit([q], lr=0.01, **options)
    for step in range(4):
        g = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).to(dtype)
        p.grad, q.grad = g, g.float()
        half.step()
        single.step()
        with torch.no_grad():
            q.copy_(q.to(dtype))
    torch.testing.assert_close(p.float(), q, **EXACT)
    assert half.state[p]["exp_avg"].dtype == (torch.float32 if options else torch.uint8)


def test_stochastic_rounding_moves_a_parameter_that_nearest_leaves():
    moved = {}
    for on in (True, False):
        torch.manual_seed(0)
        p = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        optimizer = AdamW8bit([p], lr=1e-4, weight_decay=0.0, stochastic_rounding=on)
        for _ in range(20):
            p.grad = torch.ones_like(p)
            optimizer.step()
        moved[on] = (1 - p.detach().float()).mean().item()
    assert moved[False] == 0 and moved[True] == pytest.approx(20 * 1e-4, rel=0.1)


SHARDED = """
import copy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from assay.optim import AdamW8bit, use_32bit

def run(model, optimizer, count, seed):
    for step in range(count):
        torch.manual_seed(seed + step)
        model(torch.randn(8, 65)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
torch.manual_seed(0)
model = fully_shard(nn.Sequential(nn.Linear(65, 101, bias=False), nn.Linear(101, 65, bias=False)), mesh=mesh)
use_32bit(model[1])
optimizer = AdamW8bit(model.parameters(), lr=0.01)
start = model[0].weight.to_local().clone()
run(model, optimizer, 3, 0)
state = optimizer.state[model[0].weight]
rows = 51 - rank
assert state["exp_avg"].to_local().dtype == torch.uint8 and state["exp_avg"].to_local().shape == (rows, 65)
assert state["exp_avg"].shape == (101, 65)
assert state["exp_avg_absmax"].to_local().shape == (13,)  # of 51 * 65 elements, on both
assert optimizer.state[model[1].weight]["exp_avg"].to_local().dtype == torch.float32

# The shard is stepped as a parameter of its own would be.
alone = nn.Parameter(start)
single = AdamW8bit([alone], lr=0.01, min_8bit_size=0)
torch.manual_seed(0)
again = fully_shard(nn.Sequential(nn.Linear(65, 101, bias=False), nn.Linear(101, 65, bias=False)), mesh=mesh)
use_32bit(again[1])
other = AdamW8bit(again.parameters(), lr=0.01)
for step in range(3):
    torch.manual_seed(step)
    again(torch.randn(8, 65)).square().mean().backward()
    alone.grad = again[0].weight.grad.to_local().clone()
    other.step()
    single.step()
    other.zero_grad()
assert torch.equal(alone, again[0].weight.to_local()) and torch.equal(alone, model[0].weight.to_local())

# A checkpoint in torch's form for sharded models.
saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
fresh = AdamW8bit(again.parameters(), lr=0.01)
set_optimizer_state_dict(again, fresh, saved)
run(model, optimizer, 2, 7)
run(again, fresh, 2, 7)
for p, q in zip(model.parameters(), again.parameters()):
    assert torch.equal(p.to_local(), q.to_local())
"""


def test_shards_have_blocks_of_their_own_and_checkpoints(tmp_path):
    run_on_two(SHARDED, tmp_path)
