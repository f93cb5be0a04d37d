"""Efficient-Adam against its formula in plain loops, its conservation law, and real processes."""

import copy
import io
import math

import pytest
import torch
from torch import nn

from assay._processes import run_on_two
from assay.bench import Bench
from assay.optim import EfficientAdam, SimulatedEfficientAdam
from assay.optim._contract import copies_go_on_alike, parameters, resuming_from_a_state_dict_is_bit_exact, same, walk
from assay.optim.compress import Identity, LogQuantizer, ScaledSign, TopK, UniformQuantizer
from assay.optim.efficient_adam.claim import FULL, SIGN, claim

# With feedback a rate of 0 still sends what is remembered, where the contract wants nothing to move.
EXAMPLE = {"EfficientAdam": {"error_feedback": False}}
OWN_STEP = ["SimulatedEfficientAdam"]
SHAPES = [(7, 5), (9,), (), (0, 3), (40,)]
CLOSE = {"rtol": 1e-12, "atol": 1e-12}
EXACT = {"worker_compressor": "identity", "server_compressor": "identity"}


def start(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in SHAPES]


def stream(rounds, workers, seed=1, dtype=torch.float64):
    """For each round, for each worker, the gradients of all parameters; they drift apart, as on different data."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(rounds):
        yield [
            [(torch.randn(shape, generator=generator, dtype=torch.float64) + k).to(dtype) for shape in SHAPES]
            for k in range(workers)
        ]


def run(optimizer, rounds):
    for grads in rounds:
        optimizer.step(grads)
    return [p.detach() for p in optimizer.param_groups[0]["params"]]


def adam(m, v, g, t, beta=0.9, theta=0.99, eps=1e-8):
    m, v = beta * m + (1 - beta) * g, theta * v + (1 - theta) * g**2
    return m, v, m / (1 - beta**t) / ((v / (1 - theta**t)).sqrt() + eps)


def by_hand(x, rounds, Qw, Qs, lr=1e-3, wd=0.0, worker=True, server=True, sqrt=False):
    """The formula for one tensor; what goes through Q is compressed and decompressed."""
    es, workers = torch.zeros_like(x), {}
    for t, grads in enumerate(rounds, start=1):
        rate, sent = lr / math.sqrt(t) if sqrt else lr, []
        for k, g in enumerate(grads):
            m, v, e = workers.get(k, (torch.zeros_like(x),) * 3)
            m, v, step = adam(m, v, g, t)
            a = rate * step + e
            d = Qw.decompress(Qw.compress(a))
            workers[k] = m, v, a - d if worker else torch.zeros_like(x)
            sent.append(d)
        b = sum(sent) / len(sent) + es
        d = Qs.decompress(Qs.compress(b))
        es = b - d if server else es
        x = (1 - rate * wd) * x - d
    return x


@pytest.mark.parametrize("Qw, Qs", [
    (ScaledSign(), ScaledSign()), (LogQuantizer(3), ScaledSign()), (TopK(0.2), UniformQuantizer(4)), (Identity(),) * 2,
], ids=str)  # fmt: skip
@pytest.mark.parametrize("feedback, sides", [
    (True, (True, True)), (False, (False, False)), ("worker", (True, False)), ("server", (False, True)),
])  # fmt: skip
def test_trajectory_is_the_formula(Qw, Qs, feedback, sides):
    params = start()
    how = {"worker_compressor": Qw, "server_compressor": Qs, "error_feedback": feedback}
    found = run(SimulatedEfficientAdam(params, 3, lr=0.1, weight_decay=0.1, lr_decay="sqrt", **how), stream(12, 3))
    for i, x in enumerate(start()):
        rounds = [[worker[i] for worker in grads] for grads in stream(12, 3)]
        expected = by_hand(x.detach(), rounds, Qw, Qs, 0.1, 0.1, *sides, sqrt=True)
        torch.testing.assert_close(found[i], expected, rtol=1e-9, atol=1e-9)


def test_alone_and_uncompressed_it_is_adamw():
    options = {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1}
    ours = walk(EfficientAdam, parameters(), steps=10, **EXACT, **options)
    same(ours, walk(torch.optim.AdamW, parameters(), steps=10, **options), **CLOSE)


def test_uncompressed_it_is_the_mean_of_local_steps_and_not_adam_of_the_mean_gradient():
    found = run(SimulatedEfficientAdam(start(), 3, **EXACT), stream(6, 3))
    moves, mean = [], start()
    for k in range(3):
        params = start()
        optimizer = torch.optim.Adam(params, betas=(0.9, 0.99))
        for grads in stream(6, 3):
            for p, g in zip(params, grads[k], strict=True):
                p.grad = g
            optimizer.step()
        moves.append([p.detach() - q.detach() for p, q in zip(params, start(), strict=True)])
    for x, y, *steps in zip(start(), found, *moves, strict=True):
        torch.testing.assert_close(y, x.detach() + sum(steps) / 3, **CLOSE)
    optimizer = torch.optim.Adam(mean, betas=(0.9, 0.99))
    for grads in stream(6, 3):
        for i, p in enumerate(mean):
            p.grad = sum(worker[i] for worker in grads) / 3
        optimizer.step()
    assert (mean[0] - found[0]).abs().max() > 1e-4


def lost(make, Q, bucket="tensor"):
    """What the workers wanted, less what was applied and what is still remembered; the largest of all elements."""
    params = start()
    optimizer = make(params, 4, lr=0.1, worker_compressor=Q, server_compressor=Q, bucket=bucket)
    wanted = [torch.zeros_like(p) for p in params]
    states = [[(torch.zeros_like(p),) * 2 for p in params] for _ in range(4)]
    for t, grads in enumerate(stream(15, 4), start=1):
        optimizer.param_groups[0]["lr"] = rate = 0.1 / t  # the residuals are updates: a new rate does not rescale them
        optimizer.step(grads)
        for k, worker in enumerate(grads):
            for i, g in enumerate(worker):
                *states[k][i], step = adam(*states[k][i], g, t)
                wanted[i] += rate * step / 4
    found = []
    for p, x, total in zip(params, start(), wanted, strict=True):
        kept = optimizer.state[p]["server_error"] + optimizer.state[p]["worker_error"].mean(0)
        found.append((x.detach() - p.detach() + kept - total).abs().flatten())
    return torch.cat(found).max().item()


@pytest.mark.parametrize("bucket", ["tensor", 16])
@pytest.mark.parametrize("Q", [ScaledSign(), LogQuantizer(3), TopK(0.1)], ids=str)
def test_nothing_is_lost(Q, bucket):
    assert lost(SimulatedEfficientAdam, Q, bucket) < 1e-10


def test_a_residual_that_is_dropped_is_noticed():
    class Forgetful(SimulatedEfficientAdam):
        def step(self, worker_grads):
            for state in self.state.values():
                state["worker_error"].zero_()
            super().step(worker_grads)

    assert lost(Forgetful, ScaledSign()) > 1e-2


def test_a_bucket_is_one_scale_for_tensors_in_a_row():
    params = start()
    optimizer = SimulatedEfficientAdam(params, 1, bucket=1000)
    before = [p.detach().clone() for p in params]
    (grads,) = stream(1, 1)
    optimizer.step(grads)
    moved = torch.cat([(p.detach() - q).abs().flatten() for p, q in zip(params, before, strict=True)])
    assert moved.max() - moved.min() < 1e-12
    assert optimizer.traffic.sent == math.ceil(85 / 8) + 4 + 1
    apart = SimulatedEfficientAdam(start(), 1, min_size=10)
    apart.step(grads)  # of 9, 1 and 0 elements: as they are, in float64
    assert apart.traffic.sent == (math.ceil(35 / 8) + 4) + (math.ceil(40 / 8) + 4) + 10 * 8 + 1


def test_workers_may_change_places():
    forward = run(SimulatedEfficientAdam(start(), 3), stream(8, 3))
    backward = run(SimulatedEfficientAdam(start(), 3), (grads[::-1] for grads in stream(8, 3)))
    for x, y in zip(forward, backward, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


def test_without_feedback_nothing_is_kept():
    optimizer = SimulatedEfficientAdam(start(), 2, error_feedback=False)
    run(optimizer, stream(2, 2))
    assert all({"round", "step", "exp_avg", "exp_avg_sq"} == state.keys() for state in optimizer.state.values())


def test_without_gradients_the_residuals_run_out():
    params = start()
    optimizer = SimulatedEfficientAdam(params, 2, lr=0.01, betas=(0.5, 0.99))
    run(optimizer, stream(5, 2))
    zeros = [[torch.zeros(shape, dtype=torch.float64) for shape in SHAPES]] * 2
    for _ in range(100):
        optimizer.step(zeros)
    before = [p.detach().clone() for p in params]
    optimizer.step(zeros)
    for p, q in zip(params, before, strict=True):
        assert p.isfinite().all() and ((p.detach() - q).abs() < 1e-4).all()


def test_a_missing_gradient_sends_the_residual_and_none_at_all_moves_nothing():
    params = start()
    optimizer = SimulatedEfficientAdam(params, 2, lr=0.1)
    run(optimizer, stream(3, 2))
    state = optimizer.state[params[0]]
    residual, m = state["worker_error"][1].clone(), state["exp_avg"][1].clone()
    (grads,) = stream(1, 2, seed=5)
    grads[1][0] = None
    grads[0][1] = grads[1][1] = None
    before = [p.detach().clone() for p in params]
    kept = copy.deepcopy(optimizer.state[params[1]])
    optimizer.step(grads)
    assert torch.equal(state["exp_avg"][1], m) and state["step"] == [4, 3] and state["round"] == 4
    Q = ScaledSign()
    torch.testing.assert_close(state["worker_error"][1], residual - Q.decompress(Q.compress(residual)), **CLOSE)
    assert torch.equal(params[1], before[1]) and not torch.equal(params[0], before[0])
    assert all(torch.equal(x, y) if torch.is_tensor(x) else x == y
               for x, y in zip(kept.values(), optimizer.state[params[1]].values(), strict=True))  # fmt: skip


def test_a_gradient_that_is_not_finite_stops_the_round_and_forgets_nothing():
    params = start()
    optimizer = SimulatedEfficientAdam(params, 2)
    run(optimizer, stream(2, 2))
    before = copy.deepcopy([(p, optimizer.state[p]) for p in params])
    (grads,) = stream(1, 2)
    grads[1][2] = torch.tensor(math.nan, dtype=torch.float64)
    optimizer.step(grads)
    for (q, old), p in zip(before, params, strict=True):
        assert torch.equal(p, q)
        for name, value in optimizer.state[p].items():
            assert torch.equal(value, old[name]) if torch.is_tensor(value) else value == old[name]


def test_the_theorys_schedules():
    x = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    how = {"theta": "1/t", "lr_decay": "sqrt", "betas": (0.5, 0.8), "lr": 0.1, **EXACT}
    plain = SimulatedEfficientAdam([x], 1, bias_correction=False, eps=0.01, **how)
    corrected = SimulatedEfficientAdam([y := nn.Parameter(x.detach().clone())], 1, **how)
    m, v, w, kept, a, b = 0, 0.01, 0, 1, torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for t in range(1, 6):
        g = torch.tensor([1.0, -2.0, 0.1 * t], dtype=torch.float64)
        plain.step([[g]])
        corrected.step([[g]])
        theta = 1 - 0.8 / t
        m, v, w, kept = 0.5 * m + 0.5 * g, theta * v + (1 - theta) * g**2, theta * w + (1 - theta) * g**2, kept * theta
        a = a - 0.1 / math.sqrt(t) * m / v.sqrt()
        b = b - 0.1 / math.sqrt(t) * m / (1 - 0.5**t) / ((w / (1 - kept)).sqrt() + 1e-8)
    torch.testing.assert_close(x.detach(), a, **CLOSE)
    torch.testing.assert_close(y.detach(), b, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_twin_resumes_exactly(dtype):
    whole = run(SimulatedEfficientAdam(start(dtype), 2, lr=0.01), stream(6, 2, dtype=dtype))
    params, rounds = start(dtype), list(stream(6, 2, dtype=dtype))
    optimizer = SimulatedEfficientAdam(params, 2, lr=0.01)
    run(optimizer, rounds[:3])
    saved = io.BytesIO()
    torch.save(optimizer.state_dict(), saved)
    saved.seek(0)
    other = SimulatedEfficientAdam(params, 2, lr=0.01)
    other.load_state_dict(torch.load(saved, weights_only=True))
    state = other.state[params[0]]
    assert state["worker_error"].dtype == state["server_error"].dtype == torch.float32
    torch.optim.lr_scheduler.ConstantLR(other, 1.0)  # it puts a step of its own over the method
    run(copy.deepcopy(other), rounds[3:])  # a copy has its own parameters
    for x, y in zip(run(other, rounds[3:]), whole, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize("check", [resuming_from_a_state_dict_is_bit_exact, copies_go_on_alike])
def test_residuals_are_saved_and_copied(check):
    check(EfficientAdam)


PROCESSES = """
import torch.distributed as dist
from assay.optim import EfficientAdam, SimulatedEfficientAdam
from assay.optim.compress import LogQuantizer
from assay.optim.efficient_adam.test_efficient_adam import start, stream

sizes = []
def watch(name):
    plain = getattr(dist, name)
    def call(*tensors, **options):
        sizes.extend((name, x.nbytes, x.dtype) for x in tensors[-1:] if torch.is_tensor(x))
        return plain(*tensors, **options)
    setattr(dist, name, call)

for how in ({}, {"bucket": 32, "worker_compressor": LogQuantizer(3)}, {"min_size": 8, "error_feedback": "worker"}):
    ends = []
    for topology in ("gather", "server"):
        params = start()
        with torch.no_grad():
            params[0].add_(rank)  # the first step gives all the parameters of rank 0
        optimizer = EfficientAdam(params, lr=0.01, weight_decay=0.1, topology=topology, **how)
        for i, grads in enumerate(stream(50, 2)):
            for p, g in zip(params, grads[rank]):
                p.grad = g if (i + rank) % 7 else None
            if i == 22 and rank:
                params[1].grad = params[1].grad * float("nan")
            optimizer.step()
        ends.append(torch.cat([p.detach().flatten() for p in params]))
    both = [torch.empty_like(ends[0]) for _ in range(2)]
    dist.all_gather(both, ends[0])
    assert torch.equal(both[0], both[1]), "replicas differ"
    assert torch.equal(ends[0], ends[1]), "topologies differ"
    params = start()
    twin = SimulatedEfficientAdam(params, 2, lr=0.01, weight_decay=0.1, **how)
    for i, grads in enumerate(stream(50, 2)):
        if i != 22:
            twin.step([[g if (i + k) % 7 else None for g in grads[k]] for k in range(2)])
    assert torch.equal(ends[0], torch.cat([p.detach().flatten() for p in params])), "the twin differs"

# What is counted is what is given to the network, and it is bytes of the packed size.
import assay.optim.efficient_adam.efficient_adam as module
params = start()
optimizer = EfficientAdam(params)
(grads,) = stream(1, 2)
for p, g in zip(params, grads[rank]):
    p.grad = g
optimizer.step()
before = optimizer.traffic
watch("all_gather")
optimizer.step()
assert all(dtype == torch.uint8 for _, _, dtype in sizes)
packed = sum(-(-p.numel() // 8) + 4 for p in params)
assert [size for _, size, _ in sizes] == [1, packed], sizes
assert optimizer.traffic == (before.sent + 1 + packed, before.received + 1 + packed)
"""


def test_two_processes_are_bit_identical_in_both_topologies_and_to_the_twin(tmp_path):
    run_on_two(PROCESSES, tmp_path)


def test_what_cannot_be_is_refused():
    p = nn.Parameter(torch.ones(3))
    p.to_local = lambda: p
    with pytest.raises(RuntimeError, match="whole parameters on every worker"):
        EfficientAdam([p])
    with pytest.raises(RuntimeError, match="complex"):
        EfficientAdam([nn.Parameter(torch.ones(2, dtype=torch.complex64))])
    with pytest.raises(ValueError, match=r"worker_grads of lengths \[1\] is out of range: 2 lists of 1"):
        SimulatedEfficientAdam([nn.Parameter(torch.ones(2))], 2).step([[torch.ones(2)]])


@pytest.mark.parametrize("options, message", [
    ({"worker_compressor": "log"}, "worker_compressor = 'log' is out of range"),
    ({"error_feedback": "both"}, "error_feedback = 'both' is out of range"),
    ({"bucket": 0}, "bucket = 0 is out of range"),
    ({"min_size": -1}, "min_size = -1 is out of range"),
    ({"topology": "ring"}, "topology = 'ring' is out of range"),
    ({"eps": 0.0}, r"eps = 0\.0 is out of range: a number > 0"),
    ({"theta": "t"}, "theta = 't' is out of range: 'const' or '1/t'"),
    ({"lr_decay": "cos"}, "lr_decay = 'cos' is out of range"),
    ({"theta": "1/t", "betas": (0.9, 0.0)}, "betas = .* is out of range: with theta"),
    ({"betas": (0.9, 1.0)}, "betas = .* is out of range"),
    ({"weight_decay": -1.0}, r"weight_decay = -1\.0 is out of range"),
])  # fmt: skip
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        EfficientAdam([nn.Parameter(torch.ones(2))], **options)


def test_the_twin_wants_workers():
    with pytest.raises(ValueError, match="n_workers = 0 is out of range"):
        SimulatedEfficientAdam([nn.Parameter(torch.ones(2))], 0)


class OneWay(SimulatedEfficientAdam):
    """The broken variant: the server answers in full precision."""

    def __init__(self, params, n_workers, **options):
        super().__init__(params, n_workers, **{**options, "server_compressor": "identity"})


@pytest.mark.parametrize("method, verdict", [(OneWay, "does not hold"), (SimulatedEfficientAdam, "holds")])
def test_one_way_is_not_enough(method, verdict):
    checks = claim(Bench(quick=True), method=method, parts=["digits"], seeds={"digits": 1, "reported": 1}).checks
    found = {check.name: check.verdict for check in checks}
    assert found[f"digits: bytes received by a worker, {SIGN} / {FULL}"] == verdict
    assert found[f"digits: bytes sent by a worker, {SIGN} / {FULL}"] == "holds"
