"""Layer graphs against the layers that they stand for, the two rejections, and evolution."""

from __future__ import annotations

import random
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.bench.datasets import split_digits
from assay.nn import evonorm
from assay.nn.evonorm.layers import LAYERS
from assay.nn.evonorm.search import _front
from assay.nn.evonorm_search import (
    Anchor,
    Candidate,
    GraphLayer,
    LayerGraph,
    mutate,
    quality_reject,
    random_graph,
    rerank,
    search,
    stability_reject,
)

close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)


def normal(*shape: int) -> Tensor:
    return 2 * torch.randn(shape, dtype=torch.float64) + 0.5


def graph_of(*nodes) -> LayerGraph:
    return LayerGraph(nodes)


@pytest.mark.parametrize("name", LAYERS)
def test_every_published_layer_is_a_graph(name):
    torch.manual_seed(0)
    layer = evonorm(name, 4, **({"groups": 2} if name.startswith("S") else {})).double()
    built = LayerGraph.from_name(name).module(4, groups=2, eps=layer.eps).double()
    names = {"v1": "v", "weight": "weight", "bias": "bias"}
    parameters = dict(built.named_parameters())
    assert {names[key] for key in parameters} == set(dict(layer.named_parameters()))
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.add_(0.3 * torch.randn_like(parameter))
            getattr(layer, names[key]).copy_(parameter)
    for training in (True, True, False):
        x = normal(3, 4, 3, 5)
        outputs = []
        for module in (layer.train(training), built.train(training)):
            leaf = x.clone().requires_grad_()
            y = module(leaf)
            values = {names.get(key, key): p for key, p in module.named_parameters()}
            gradients = torch.autograd.grad(y.square().sum(), [leaf, *(values[key] for key in sorted(values))])
            outputs.append([y, *gradients])
        close(*outputs)
    close([*layer.buffers()], [*built.buffers()])


def test_batch_and_group_normalization_with_their_activations_are_graphs():
    torch.manual_seed(0)
    v0, v1 = normal(4), normal(4)
    batch, built = nn.BatchNorm2d(4).double(), LayerGraph.from_name("BN-ReLU").module(4).double()
    group, sample = nn.GroupNorm(2, 4).double(), LayerGraph.from_name("GN-SiLU").module(4, groups=2).double()
    with torch.no_grad():
        for norm, graph in ((batch, built), (group, sample)):
            for ours, theirs, value in ((graph.v0, norm.bias, v0), (graph.v1, norm.weight, v1)):
                ours.copy_(value)
                theirs.copy_(value)
    for training in (True, True, False):
        x = normal(3, 4, 3, 5)
        close(built.train(training)(x), F.relu(batch.train(training)(x)))
        close(sample.train(training)(x), F.silu(group(x)))
    assert all(len(LayerGraph.from_name(name).nodes) <= 10 for name in ("BN-ReLU", "GN-SiLU"))


def test_every_operation_by_hand():
    a, b = normal(3, 4, 2, 3), normal(4)
    eps = 1e-5
    expected = {
        "neg": -a, "sigmoid": 1 / (1 + (-a).exp()), "tanh": torch.tanh(a), "exp": a.exp(), "abs": a.abs(),
        "log": torch.where(a > 0, 1.0, -1.0) * (a.abs() + eps).log(), "square": a * a,
        "sqrt": torch.where(a > 0, 1.0, -1.0) * (a.abs() + eps).sqrt(),
    }  # fmt: skip
    for op, value in expected.items():
        close(graph_of((op, (0,))).module(4).double()(a), value)
    v = b.view(4, 1, 1)
    binary = {"add": a + v, "mul": a * v, "div": a / v, "max": torch.maximum(a, v)}
    for op, value in binary.items():
        layer = graph_of((op, (0, 2))).module(4).double()
        layer.v0.data.copy_(b)
        close(layer(a), value)
    close(graph_of(("div", (0, 1))).module(4).double()(a), a / eps)
    grouped = a.view(3, 2, 2, 2, 3)
    sets = {"bwh": (a, (0, 2, 3)), "whc": (a, (1, 2, 3)), "wh": (a, (2, 3)), "whg": (grouped, (2, 3, 4))}
    for over, (values, dims) in sets.items():
        mean, var = values.mean(dims, keepdim=True), values.var(dims, correction=0, keepdim=True)
        for moment, value in (("mean", mean), ("std", (var + eps).sqrt()), ("rms", (var + mean**2 + eps).sqrt())):
            y = graph_of((f"{moment}_{over}", (0,))).module(4, groups=2).double()(a)
            close(y, value.expand_as(values).reshape(a.shape))


@pytest.mark.parametrize("seed", range(30))
def test_random_graphs_run_and_values_kept_small_are_those_repeated(seed):
    graph = random_graph(random.Random(seed), nodes=6)
    layer, x = graph.module(4, groups=2).double(), normal(3, 4, 2, 2)
    y = layer(x)
    assert y.shape == x.shape and layer.eval()(x).shape == x.shape

    class Full(GraphLayer):
        def _aggregate(self, place: int, op: str, a: Tensor, x: Tensor) -> Tensor:
            return super()._aggregate(place, op, a.expand_as(x).contiguous(), x)

    torch.testing.assert_close(Full(graph, 4, groups=2).double()(x), y, rtol=1e-9, atol=1e-9, equal_nan=True)


def test_formulas_name_what_is_live():
    graph = graph_of(("exp", (0,)), ("add", (0, 3)), ("tanh", (5,)))
    assert graph.to_expr() == "tanh((v1 + x))" and graph.live == (0, 3, 5, 6)
    assert graph_of(("add", (3, 0)), ("tanh", (4,))).to_expr() == graph.to_expr()
    assert graph_of(("div", (3, 0))).to_expr() != graph_of(("div", (0, 3))).to_expr()
    assert [key for key, _ in graph.module(4).named_parameters()] == ["weight", "bias", "v1"]


@pytest.mark.parametrize("rng", [random.Random(0), np.random.default_rng(0)], ids=["random", "numpy"])
@pytest.mark.parametrize("batch", [True, False])
def test_a_mutation_changes_one_node(rng, batch):
    seen = set()
    for _ in range(200):
        graph = random_graph(rng, batch=batch)
        child = mutate(graph, rng, batch=batch)
        changed = [i for i, (a, b) in enumerate(zip(graph.nodes, child.nodes, strict=True)) if a != b]
        assert len(changed) == 1
        seen.add(changed[0])
        assert batch or not any(op.endswith("bwh") for op, _ in child.nodes)
        assert all(i < 4 + place for place, node in enumerate(child.nodes) for i in node.inputs)  # no cycle
    assert seen == set(range(10))


def test_a_layer_in_which_samples_do_not_meet():
    rng = random.Random(1)
    for _ in range(20):
        layer = random_graph(rng, batch=False).module(4, groups=2).double()
        x = normal(3, 4, 2, 2)
        torch.testing.assert_close(layer(x)[:1], layer(x[:1]), equal_nan=True)


def chain(norm) -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        *(nn.Conv2d(1, 8, 3, 2), norm(8), nn.Conv2d(8, 8, 3, padding=1), norm(8)),
        *(nn.Flatten(), nn.Linear(72, 10)),
    )


@pytest.fixture(scope="module")
def anchors() -> list[Anchor]:
    train, valid = split_digits(0)
    return [Anchor(chain, train, valid, lr=0.05, groups=4)]


def test_the_rejections(anchors):
    published = [LayerGraph.from_name(name) for name in ("B0", "S0")]
    constant = graph_of(("exp", (1,)))
    hidden_constant = graph_of(("mul", (0, 1)))
    exploding = graph_of(("exp", (0,)), ("exp", (4,)), ("add", (0, 5)))
    quality = partial(quality_reject, anchors=anchors, steps=60, threshold=0.3)
    stability = partial(stability_reject, anchors=anchors)
    assert [quality(g) for g in (constant, hidden_constant, exploding, *published)] == [True] * 3 + [False] * 2
    assert [stability(g) for g in (graph_of(("exp", (0,)), ("exp", (4,))), *published)] == [True, False, False]
    before = torch.get_rng_state()
    layer = partial(evonorm, "S0", groups=4)  # a layer by hand is judged as the graph of it
    assert anchors[0].accuracy(layer, 20) == anchors[0].accuracy(published[1], 20)
    assert torch.equal(torch.get_rng_state(), before)


def uses(*names: str):
    return lambda graph: sum(1.0 for name in names if name in graph.to_expr())


def test_the_same_seed_gives_the_same_search():
    run = partial(search, [uses("tanh"), uses("exp", "std")], 12, 0.5, budget=60, reject=lambda g: 0 not in g.live)
    one, other = (run(rng=random.Random(3)) for _ in range(2))
    assert one == other != run(rng=random.Random(4))
    assert all((0 in c.graph.live) == (c.scores is not None) for c in one)
    assert len({c.graph.to_expr() for c in one}) == 60


@pytest.mark.parametrize("winner", ["pareto", "average"])
def test_evolution_finds_more_than_chance(winner):
    scores = [uses("tanh", "sigmoid", "whg"), uses("exp", "max", "div(", "std_wh(")]
    best = {}
    for name, fresh in (("evolution", 0.1), ("chance", 1.0)):
        runs = [search(scores, 20, 0.25, winner, 300, random.Random(seed), fresh=fresh) for seed in range(3)]
        best[name] = sum(max(c.mean for c in run) for run in runs)
    assert best["evolution"] > best["chance"]


def test_of_the_pareto_front_all_win_and_on_average_one():
    graphs = [graph_of(("exp", (0,)), ("add", (4, i))) for i in range(5)]
    scores = [(3.0, 0.0), (0.0, 2.0), (2.0, 0.0), (1.0, 1.0), (1.0, 1.0)]
    candidates = [Candidate(g, s) for g, s in zip(graphs, scores, strict=True)]
    assert _front(candidates) == [candidates[i] for i in (0, 1, 3, 4)]


def test_the_oldest_leaves_and_repeated_formulas_are_judged_once():
    judged = []

    def score(graph: LayerGraph) -> float:
        judged.append(graph.to_expr())
        return -float(len(judged))  # the first would win for ever if it could stay

    found = search([score], 3, 1.0, "average", 40, random.Random(0), fresh=0.0, nodes=3)
    assert len(judged) == len(set(judged)) == 40 and len(found) > 40
    parents = found[-1].graph.nodes
    assert sum(a != b for a, b in zip(found[0].graph.nodes, parents, strict=True)) > 1
    again = rerank(found, [lambda graph: float(len(graph.live))], top=5)
    assert len(again) == 5 and [c.mean for c in again] == sorted((c.mean for c in again), reverse=True)


def test_arguments_out_of_range_are_named():
    for nodes, message in [((), "nodes"), ((("sin", (0,)),), "op = 'sin'"), ((("add", (0,)),), "inputs"),
                           ((("exp", (4,)),), "inputs")]:  # fmt: skip
        with pytest.raises(ValueError, match=f"{message}.* is out of range"):
            LayerGraph(nodes)
    with pytest.raises(ValueError, match="name = 'B9' is out of range"):
        LayerGraph.from_name("B9")
    with pytest.raises(ValueError, match="groups = 3 is out of range"):
        LayerGraph.from_name("S0").module(4, groups=3)
    for name, value in [("population", 0), ("tournament_frac", 0.0), ("winner", "best"), ("budget", 0), ("fresh", 2.0)]:
        with pytest.raises(ValueError, match=f"{name} = .* is out of range"):
            search([uses("exp")], **{"population": 2, name: value})
    with pytest.raises(ValueError, match="threshold = 2 is out of range"):
        quality_reject(LayerGraph.from_name("S0"), [], threshold=2)
    with pytest.raises(ValueError, match="lr = 0 is out of range"):
        stability_reject(LayerGraph.from_name("S0"), [], lr=0)
