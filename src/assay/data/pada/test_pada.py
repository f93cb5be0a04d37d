"""PA&DA's two samplers against the rules written out, and what importance sampling is for."""

from __future__ import annotations

import copy
import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from assay._processes import run_on_two
from assay.bench.arms import DEFAULT_RECIPE
from assay.bench.evidence import FAILS, Bench
from assay.bench.loop import fit
from assay.bench.recipe import Budget
from assay.bench.tasks import resolve_task
from assay.data import CellSuperNetwork, GradNormSampler, PathSampler, Zero, pada_mix, path_grad_norms
from assay.data._contract import VISITED
from assay.data.pada.claim import claim
from assay.data.pada.pada import apply
from assay.optim._contract import Twice

DOUBLE = {"dtype": torch.float64}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def samplers():
    """For the family's contract."""

    def advance(sampler, epoch):
        if epoch:
            sampler.record_norms(torch.arange(VISITED), (torch.arange(VISITED) * (epoch + 2)) % 5 + 0.5)
            sampler.step(epoch / 3)

    make = functools.partial(GradNormSampler, VISITED)
    return {
        "grad norms": (lambda: make(generator=seeded()), advance),
        "grad norms without replacement": (lambda: make(generator=seeded(), replacement=False), advance),
    }


# --- the rules, written out


def data_by_hand(n, epochs, visits, average):
    """Probabilities after each epoch; ``visits[e]`` lists the (index, norm) of epoch e in their order."""
    found = []
    for e in range(epochs):
        seen = {i: [] for i in range(n)}
        for i, g in visits[e]:
            seen[i].append(g)
        h = [0.0] * n
        for i, norms in seen.items():
            for k, g in enumerate(norms):
                h[i] = g if k == 0 else (h[i] + g) / 2
            if average == "mean" and norms:
                h[i] = sum(norms) / len(norms)
        total, tau = sum(h), e / epochs
        found.append([tau * x / total + (1 - tau) / n if total else 1 / n for x in h])
    return found


@pytest.mark.parametrize("average", ["ema", "mean"])
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_examples_follow_the_rule_also_twice_in_a_batch(average, data):
    n, epochs = 6, 4
    visit = st.tuples(st.integers(0, n - 1), st.floats(0, 10))
    visits = [data.draw(st.lists(visit, max_size=12)) for _ in range(epochs)]
    sampler = GradNormSampler(n, generator=seeded(), average=average)
    expected = data_by_hand(n, epochs, visits, average)
    for e in range(epochs):
        for start in range(0, len(visits[e]), 5):
            batch = visits[e][start : start + 5]
            sampler.record_norms([i for i, _ in batch], [g for _, g in batch])
        sampler.step(e / epochs)
        torch.testing.assert_close(sampler.probabilities, torch.tensor(expected[e], **DOUBLE), rtol=1e-9, atol=1e-12)


def paths_by_hand(k, epochs, steps, parametric, nonparametric, average):
    found = []
    for e in range(epochs):
        r, counts = [0.0] * k, [0] * k
        for path, norms in steps[e]:
            for op in range(k):
                edges = [norm for chosen, norm in zip(path, norms, strict=True) if chosen == op]
                g = sum(edges) / len(edges) if edges else 0
                if g:
                    counts[op] += 1
                    r[op] = (r[op] + g) / 2 if average == "ema" else r[op] + (g - r[op]) / counts[op]
        r = [x if m else 0 for x, m in zip(r, parametric, strict=True)]
        if nonparametric == "mean":
            known = [x for x, m in zip(r, parametric, strict=True) if m]
            r = [x if m else sum(known) / len(known) for x, m in zip(r, parametric, strict=True)]
        tau = e / epochs
        found.append([tau * x / sum(r) + (1 - tau) / k if sum(r) else 1 / k for x in r])
    return found


@pytest.mark.parametrize("average", ["ema", "mean"])
@pytest.mark.parametrize("nonparametric", ["zero", "mean"])
def test_paths_follow_the_rule(average, nonparametric):
    k, epochs, edges, generator = 4, 4, 3, seeded()
    parametric = [False, False, True, True]
    draws = [[torch.randint(k, (edges,), generator=generator).tolist() for _ in range(9)] for _ in range(epochs)]
    steps = [
        [(path, [torch.rand((), generator=generator).item() * parametric[op] for op in path]) for path in paths]
        for paths in draws
    ]
    expected = paths_by_hand(k, epochs, steps, parametric, nonparametric, average)
    how = {"average": average, "nonparametric": nonparametric, "parametric": parametric}
    by_edge, by_op = PathSampler(k, **how), PathSampler(k, **how)
    for e in range(epochs):
        for path, norms in steps[e]:
            by_edge.record(path, norms)
            sums = {op: sum(n for o, n in zip(path, norms, strict=True) if o == op) for op in {*path, 0}}
            by_op.record(path, sums)
        for sampler in (by_edge, by_op):
            sampler.step(e / epochs)
            torch.testing.assert_close(
                sampler.probabilities, torch.tensor(expected[e], **DOUBLE), rtol=1e-9, atol=1e-12
            )


def test_edges_may_have_choices_of_their_own():
    sampler = PathSampler([2, 3], generator=seeded())
    sampler.record([1, 0], [2.0, 5.0])
    sampler.record([1, 2], [2.0, 5.0])
    sampler.step(0.5)
    first, second = sampler.probabilities
    torch.testing.assert_close(first, torch.tensor([0.25, 0.75], **DOUBLE))
    torch.testing.assert_close(second, torch.tensor([1 / 6 + 1 / 4, 1 / 6, 1 / 6 + 1 / 4], **DOUBLE))
    assert len(sampler.sample()) == 2
    with pytest.raises(ValueError, match="num_edges = 3 is out of range: 2"):
        sampler.sample(3)


# --- what the distributions must be


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1e300), min_size=1, max_size=9), st.floats(0, 1))
def test_mixtures_are_distributions_above_a_floor(values, tau):
    importance, n = torch.tensor(values, **DOUBLE), len(values)
    p = pada_mix(importance, 1 / n, tau)
    assert p.sum().item() == pytest.approx(1) and (p >= (1 - tau) / n * (1 - 1e-12)).all()
    torch.testing.assert_close(pada_mix(importance * 1e-3, 1 / n, tau), p, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(pada_mix(importance, 1 / n, 0), torch.full((n,), 1 / n, **DOUBLE))
    if importance.max() > 0:
        shares = importance / importance.max()
        torch.testing.assert_close(pada_mix(importance, 1 / n, 1), shares / shares.sum())
    assert torch.equal(pada_mix(0 * importance, 1 / n, tau), torch.full((n,), 1 / n, **DOUBLE))


def test_draws_follow_the_probabilities():
    sampler = GradNormSampler(4, tau=1, generator=seeded())
    sampler.record_norms([0, 1, 2], [1.0, 0.0, 3.0])
    sampler.step()
    drawn = torch.tensor([i for _ in range(2000) for i in sampler])
    shares = torch.bincount(drawn, minlength=4) / len(drawn)
    torch.testing.assert_close(shares, torch.tensor([0.25, 0, 0.75, 0]), rtol=0, atol=0.02)
    assert shares[1] == shares[3] == 0
    paths = PathSampler(3, tau=1, generator=seeded())
    paths.record([0, 2], [1.0, 3.0])
    paths.step()
    drawn = torch.tensor([paths.sample(2) for _ in range(4000)])
    shares = torch.bincount(drawn.flatten(), minlength=3) / drawn.numel()
    torch.testing.assert_close(shares, torch.tensor([0.25, 0, 0.75]), rtol=0, atol=0.02)


def test_without_replacement_everybody_comes_once_and_the_likely_early():
    sampler = GradNormSampler(10, tau=0.9, replacement=False, generator=seeded())
    sampler.record_norms(range(10), [100.0] * 2 + [1.0] * 8)
    sampler.step()
    orders = torch.tensor([list(sampler) for _ in range(500)])
    assert (orders.sort(1).values == torch.arange(10)).all()
    assert ((orders[:, :2] < 2).double().mean() > 0.7).all()


# --- what it is for: variance


def variance(norms, q):
    """N^2 times the trace of the covariance of g_i / (N q_i), up to the mean that all q share."""
    return (norms.square() / q).sum()


def test_sampling_by_exact_norms_has_the_least_variance():
    norms = torch.rand(50, generator=seeded(), **DOUBLE) + 0.01
    best, uniform = variance(norms, pada_mix(norms, 1 / 50, 1)), variance(norms, torch.full((50,), 1 / 50, **DOUBLE))
    torch.testing.assert_close(best, norms.sum() ** 2)
    assert best < uniform
    for seed in range(100):
        q = torch.rand(50, generator=seeded(seed), **DOUBLE) + 1e-3
        assert variance(norms, q / q.sum()) >= best


def test_weights_make_the_gradient_unbiased():
    """By enumeration over N = 5: the expected weighted gradient is the full one, whatever was recorded."""
    gradients = torch.randn(5, 3, generator=seeded(), **DOUBLE)
    sampler = GradNormSampler(5, tau=0.7)
    sampler.record_norms(range(5), gradients.norm(dim=1))
    sampler.step()
    weights = sampler.weights(range(5)).double()
    expected = (sampler.probabilities[:, None] * weights[:, None] * gradients).sum(0)
    torch.testing.assert_close(expected, gradients.mean(0), rtol=1e-6, atol=1e-6)


# --- gradients of the operations on a path


def net(nodes=3, cells=2):
    torch.manual_seed(0)
    operations = [Zero, nn.Identity, lambda: nn.Linear(4, 4), lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU())]
    return CellSuperNetwork(nn.Linear(5, 4), operations, nn.Linear(4, 3), nodes=nodes, cells=cells).double()


def test_norms_are_those_of_the_operations_on_the_path_and_no_others():
    model, x = net(), torch.randn(6, 5, **DOUBLE)
    model(x, [3, 3, 3]).square().sum().backward()  # leaves gradients behind
    model(x, [2, 3, 2]).square().sum().backward()
    norms = path_grad_norms(model.active([2, 3, 2]))
    for op, edges in ((2, (0, 2)), (3, (1,))):
        expected = sum(p.grad.norm() for cell in model.cells for edge in edges for p in cell[edge][op].parameters())
        torch.testing.assert_close(norms[op], expected)
    assert set(norms) == {2, 3} and path_grad_norms(model.active([0, 1, 1])) == {0: 0, 1: 0}
    sampler = PathSampler(4)
    sampler.record([2, 3, 2], norms)
    sampler.step(1.0)
    halves = torch.stack([norms[2] / 2, norms[3]])
    torch.testing.assert_close(sampler.probabilities[2:], halves / halves.sum(), check_dtype=False)


def test_a_cell_is_its_graph():
    model, x = net(nodes=4, cells=1), torch.randn(6, 5, **DOUBLE)
    path = [2, 1, 3, 0, 2, 1]
    op = [model.cells[0][edge][k] for edge, k in enumerate(path)]
    a = model.stem(x)
    b = op[0](a)
    c = op[1](a) + op[2](b)
    d = op[3](a) + op[4](b) + op[5](c)
    torch.testing.assert_close(model(x, path), model.head(d))
    assert model.num_edges == 6 and len(list(net().paths())) == 64
    with pytest.raises(ValueError, match=r"path = .* is out of range: 6 operations from 0 to 3"):
        model(x, path[:5])


def test_paths_share_weights():
    model, x = net(), torch.randn(6, 5, **DOUBLE)
    before = model(x, [2, 2, 1])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(x, [2, 0, 3]).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model(x, [2, 2, 1]), before)
    untouched = copy.deepcopy(model.cells[0][1][2].state_dict())
    torch.testing.assert_close(net().cells[0][1][2].state_dict(), untouched, rtol=0, atol=0)


# --- several processes, resuming, wrong use


SCRIPT = """
from assay.data import GradNormSampler
whole = GradNormSampler(7, tau=1, generator=torch.Generator().manual_seed(0))
mine = GradNormSampler(7, tau=1, generator=torch.Generator().manual_seed(0), rank=rank, world_size=2)
whole.record_norms([0, 5, 2, 0], [1.0, 2.0, 3.0, 5.0])
mine.record_norms([[0, 5], [2, 0]][rank], [[1.0, 2.0], [3.0, 5.0]][rank])
for sampler in (whole, mine):
    sampler.step()
torch.testing.assert_close(mine.probabilities, whole.probabilities, rtol=0, atol=0)
lists = [None, None]
dist.all_gather_object(lists, list(mine))
assert len(lists[0]) == len(lists[1]) == len(mine) == 4
both = [i for pair in zip(*lists) for i in pair]
assert both[:7] == list(whole)[:7] or len(both) == 8
"""


def test_processes_exchange_norms_and_take_slices(tmp_path):
    run_on_two(SCRIPT, tmp_path)


def test_slices_are_those_of_one_list():
    lists = [list(GradNormSampler(7, generator=seeded(3), rank=r, world_size=3)) for r in range(3)]
    one = list(GradNormSampler(9, generator=seeded(3)))
    assert [len(part) for part in lists] == [3, 3, 3]
    merged = [i for triple in zip(*lists, strict=True) for i in triple]
    assert len(merged) == len(one) and all(0 <= i < 7 for i in merged)


def test_paths_resume():
    whole, stopped = PathSampler(4, generator=seeded()), PathSampler(4, generator=seeded())
    for sampler in (whole, stopped):
        sampler.record(sampler.sample(3), [1.0, 2.0, 3.0])
        sampler.step(0.5)
        sampler.record([0, 1, 1], [4.0, 1.0, 1.0])
    resumed = PathSampler(4)
    resumed.load_state_dict(copy.deepcopy(stopped.state_dict()))
    for sampler in (whole, resumed):
        sampler.step(0.9)
    assert torch.equal(whole.probabilities, resumed.probabilities)
    assert [whole.sample(5) for _ in range(4)] == [resumed.sample(5) for _ in range(4)]


@pytest.mark.parametrize("call, message", [
    (lambda: GradNormSampler(0), "num_samples = 0 is out of range"),
    (lambda: GradNormSampler(3, tau=1.5), r"tau = 1\.5 is out of range"),
    (lambda: GradNormSampler(3, average="max"), "average = 'max' is out of range"),
    (lambda: GradNormSampler(3, rank=1), "rank = 1 is out of range"),
    (lambda: GradNormSampler(3, world_size=2), "generator = None is out of range"),
    (lambda: GradNormSampler(3).record_norms([3], [1.0]), "indices reach"),
    (lambda: GradNormSampler(3).record_norms([1], [1.0, 2.0]), r"norms\.shape = \(2,\) is out of range"),
    (lambda: GradNormSampler(3).record_norms([1], [float("nan")]), "norms hold a number that is not finite"),
    (lambda: GradNormSampler(3).step(2.0), r"tau = 2\.0 is out of range"),
    (lambda: PathSampler([]), "num_choices = 0 is out of range"),
    (lambda: PathSampler(3, parametric=[True]), "parametric of shapes"),
    (lambda: PathSampler(3, nonparametric="one"), "nonparametric = 'one' is out of range"),
    (lambda: PathSampler(3).sample(), "num_edges = None is out of range"),
    (lambda: PathSampler(3).record([0, 3], [1.0, 1.0]), "path holds operation 3"),
    (lambda: PathSampler(3).record([0, 1], [1.0]), "grad_norms of 1 edges"),
    (lambda: PathSampler(3).record([0], {0: float("inf")}), "grad_norms = inf of operation 0 is out of range"),
    (lambda: pada_mix(torch.tensor([-1.0]), 1.0, 0.5), "importance .* is out of range"),
    (lambda: CellSuperNetwork(nn.Identity(), [], nn.Identity()), "operations = .* is out of range"),
    (lambda: CellSuperNetwork(nn.Identity(), [Zero], nn.Identity(), nodes=1), "nodes = 1 is out of range"),
])  # fmt: skip
def test_what_is_out_of_range_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- in the bench


def test_in_the_bench_it_is_the_batches():
    """The weights are those of a loop written by hand, also with an optimizer that asks for a loss twice."""
    task, budget = resolve_task("digits(model='mlp')"), Budget(steps=40, batch_size=50, evaluations=0)

    from dataclasses import replace

    recipe = replace(DEFAULT_RECIPE, update=lambda run: Twice(run.model.parameters(), 0.1))
    found = fit(apply(recipe), task, budget, 7)

    def by_hand(run):
        sampler = GradNormSampler(run.size, generator=run.order)

        class Epochs:
            def __iter__(self):
                for epoch in itertools.count():
                    if epoch:
                        sampler.step((epoch - 1) / run.epochs)
                    yield from torch.tensor(list(sampler)).split(50)

            def before_update(self, run, batch):
                recorded.append(batch.index)
                run.pending = batch

        def loss(model, batch):
            logits = model(batch.input)
            if run.pending is batch:
                sampler.record(batch.index, logits, batch.target)
                run.pending = None
            return F.cross_entropy(logits, batch.target)

        return Epochs(), loss

    recorded, made = [], {}

    def parts(run):
        if id(run) not in made:
            made[id(run)] = by_hand(run)
        return made[id(run)]

    hand = replace(recipe, batch=lambda run: parts(run)[0], objective=lambda run: parts(run)[1])
    assert fit(hand, task, budget, 7).fingerprint == found.fingerprint
    assert len(recorded) == 40 and found.fingerprint != fit(recipe, task, budget, 7).fingerprint
    with pytest.raises(ValueError, match="pada needs a classification task"):
        fit(apply(recipe), replace(task, classes=None), budget, 7)
    with pytest.raises(ValueError, match=r"tau = 2\.0 is out of range"):
        apply(recipe, tau=2.0)


# --- the claim


class BatchNorms(GradNormSampler):
    """The broken variant: every example of a batch gets the batch's loss."""

    def record(self, indices, logits, targets):
        self.record_norms(indices, F.cross_entropy(logits, targets).detach().expand(len(indices)))


def test_the_claim_refutes_sampling_by_the_batch_loss():
    assert claim(Bench(), sampler=BatchNorms, parts=["variance"], seeds=3).verdict == FAILS
    assert claim(Bench(), parts=["variance"], seeds=3).verdict != FAILS
