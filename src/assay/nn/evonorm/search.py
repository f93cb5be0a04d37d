"""The search among layer graphs: two ways to reject one early, and evolution on several networks at once."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay._checks import in_range
from assay.nn.evonorm.graph import LayerGraph, Random, mutate, pick, random_graph

Examples = tuple[Tensor, Tensor]
Layer = LayerGraph | Callable[..., nn.Module]


@dataclass(frozen=True)
class Anchor:
    """A network that layers are tried in, with the task that it learns.

    Args:
        build: called with ``norm``, returns the network; it calls ``norm(num_features)`` for each layer, and
            ``norm(num_features, nonlinear=False)`` where no activation belongs.
        train, valid: inputs and class labels, to learn from and to be measured on.
        batch_size, lr: of stochastic gradient descent with momentum 0.9.
        groups: of the operations over groups, in layers that are given as graphs.

    >>> import torch
    >>> from torch import nn
    >>> from assay.nn.evonorm_search import Anchor, LayerGraph
    >>> examples = torch.randn(8, 3, 4, 4), torch.randint(2, (8,))
    >>> build = lambda norm: nn.Sequential(nn.Conv2d(3, 8, 3), norm(8), nn.Flatten(), nn.Linear(32, 2))
    >>> Anchor(build, examples, examples).network(LayerGraph.from_name("B0"))[1].groups
    8
    """

    build: Callable[[Callable[..., nn.Module]], nn.Module]
    train: Examples
    valid: Examples
    batch_size: int = 64
    lr: float = 0.1
    groups: int = 8

    def network(self, layer: Layer) -> nn.Module:
        """The network with a layer, given as a graph or as what ``build`` calls."""
        return self.build(partial(layer.module, groups=self.groups) if isinstance(layer, LayerGraph) else layer)

    def accuracy(self, layer: Layer, steps: int = 100, seed: int = 0) -> float:
        """Share of ``valid`` that is right after so many steps; 0 if the loss was not finite."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.network(layer)
            optimizer = torch.optim.SGD(model.parameters(), lr=self.lr, momentum=0.9)
            for _ in range(steps):
                chosen = torch.randint(self.train[0].shape[0], (self.batch_size,))
                loss = F.cross_entropy(model(self.train[0][chosen]), self.train[1][chosen])
                if not loss.isfinite():
                    return 0.0
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        with torch.no_grad():
            right = model.eval()(self.valid[0]).argmax(1) == self.valid[1]
        return right.double().mean().item()


def quality_reject(
    layer: Layer, anchors: Iterable[Anchor], *, steps: int = 100, threshold: float = 0.2, seed: int = 0
) -> bool:
    """Whether a layer is of no use: with it some anchor stays below ``threshold`` after a short training.

    A graph that does not depend on x is refused untried.

    Args:
        layer: a :class:`LayerGraph`, or a callable ``(num_features, nonlinear=True) -> module``.
        anchors: tried one after the other, up to the first that fails.
        steps: >= 0, of training.
        threshold: an accuracy in [0, 1], twice that of guessing in the paper.
        seed: of the networks' weights and the batches.

    Raises:
        ValueError: an argument out of range.

    Source: H. Liu et al., Evolving Normalization-Activation Layers, NeurIPS 2020, arXiv 2004.02967, section 3.

    >>> from assay.nn.evonorm_search import LayerGraph, quality_reject
    >>> quality_reject(LayerGraph((("exp", (1,)),)), anchors=[])  # 1 whatever x
    True
    """
    in_range("steps", steps, steps >= 0, ">= 0")
    in_range("threshold", threshold, 0 <= threshold <= 1, "[0, 1]")
    if isinstance(layer, LayerGraph) and 0 not in layer.live:
        return True
    return any(anchor.accuracy(layer, steps, seed) < threshold for anchor in anchors)


def stability_reject(
    layer: Layer, anchors: Iterable[Anchor], *, steps: int = 100, lr: float = 0.1, bound: float = 1e8, seed: int = 0
) -> bool:
    """Whether a layer can be driven to explode: gradient ascent on the loss's gradient leads above a bound.

    On one batch, with w the weights of the anchor::

        w <- w + lr u / |u|,   u = dG/dw,   G = |dloss/dw|        rejected as soon as G > bound or is not finite

    Args:
        layer, anchors: as in :func:`quality_reject`.
        steps: >= 1, of the ascent.
        lr: > 0, the length of a step.
        bound: > 0.
        seed: of the networks' weights.

    Raises:
        ValueError: an argument out of range.

    Source: H. Liu et al., Evolving Normalization-Activation Layers, NeurIPS 2020, arXiv 2004.02967, section 3.

    >>> import torch
    >>> from torch import nn
    >>> from assay.nn.evonorm_search import Anchor, LayerGraph, stability_reject
    >>> examples = torch.randn(8, 3, 4, 4), torch.randint(2, (8,))
    >>> build = lambda norm: nn.Sequential(nn.Conv2d(3, 8, 3), norm(8), nn.Flatten(), nn.Linear(32, 2))
    >>> twice = LayerGraph((("exp", (0,)), ("exp", (4,))))
    >>> [stability_reject(g, [Anchor(build, examples, examples)]) for g in (twice, LayerGraph.from_name("S0"))]
    [True, False]
    """
    in_range("steps", steps, steps >= 1, ">= 1")
    in_range("lr", lr, lr > 0, "> 0")
    in_range("bound", bound, bound > 0, "> 0")
    return any(_explodes(layer, anchor, steps, lr, bound, seed) for anchor in anchors)


def _explodes(layer: Layer, anchor: Anchor, steps: int, lr: float, bound: float, seed: int) -> bool:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = anchor.network(layer)
    parameters = list(model.parameters())
    x, labels = (t[: anchor.batch_size] for t in anchor.train)
    for _ in range(steps):
        loss = F.cross_entropy(model(x), labels)
        gradients = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
        norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        if not norm.isfinite() or norm > bound:
            return True
        upwards = torch.autograd.grad(norm, parameters, materialize_grads=True)
        length = torch.stack([u.square().sum() for u in upwards]).sum().sqrt()
        with torch.no_grad():
            for parameter, upward in zip(parameters, upwards, strict=True):
                parameter.add_(lr * upward / length.clamp_min(1e-30))
    return False


@dataclass(frozen=True)
class Candidate:
    """A graph that a search looked at, with its score on every anchor; None if it was rejected."""

    graph: LayerGraph
    scores: tuple[float, ...] | None

    @property
    def mean(self) -> float:
        """Mean score; minus infinity if it was rejected."""
        return -math.inf if self.scores is None else sum(self.scores) / len(self.scores)


def search(
    eval_fn_list: Sequence[Callable[[LayerGraph], float]],
    population: int,
    tournament_frac: float = 0.05,
    winner: str = "pareto",
    budget: int = 1000,
    rng: Random | None = None,
    *,
    reject: Callable[[LayerGraph], Any] | None = None,
    fresh: float = 0.1,
    start: int | None = None,
    nodes: int = 10,
    batch: bool = True,
) -> list[Candidate]:
    """Regularized evolution of layer graphs, judged by several scores at once.

    The population begins with random graphs. Then, again and again: of a random part of the population the winner is
    taken, and a mutation of it (or now and then a new random graph) joins, while the oldest member leaves. A graph that
    ``reject`` refuses is neither scored nor joins. Graphs of the same formula are judged once.

    Args:
        eval_fn_list: functions of a graph, one per anchor; higher is better.
        population: >= 1, its size.
        tournament_frac: the part that a winner is taken from, in (0, 1]; never less than one graph.
        winner: ``"pareto"``, any of those that no other one beats on one score without losing on another, all equally
            likely; or ``"average"``, the one of the highest mean score.
        budget: >= 1, the number of different graphs that are judged, rejected ones included. With little left to be
            found, as where ``nodes`` is very small, fewer.
        rng: a ``numpy.random.Generator`` or ``random.Random``; None for one that is seeded by the system.
        reject: for instance by :func:`quality_reject` and :func:`stability_reject`; None to reject nothing.
        fresh: probability of a new random graph instead of a mutation, in [0, 1].
        start: how many random graphs that are not rejected the population begins with, in 1 to ``population``; None for
            all of it. Few where nearly all are rejected.
        nodes, batch: of :func:`random_graph`.

    Returns:
        every candidate in the order of the search; ``max(found, key=lambda c: c.mean)`` is the best on average, and
        :func:`rerank` takes the best to a longer test.

    Raises:
        ValueError: an argument out of range.

    Source: H. Liu et al., Evolving Normalization-Activation Layers, NeurIPS 2020, arXiv 2004.02967, section 3.

    >>> import random
    >>> from assay.nn.evonorm_search import search
    >>> short = lambda graph: -len(graph.live)
    >>> found = search([short], population=8, tournament_frac=0.5, budget=60, rng=random.Random(0))
    >>> max(c.mean for c in found[:8]) < max(c.mean for c in found)
    True
    """
    in_range("eval_fn_list", eval_fn_list, len(eval_fn_list) >= 1, "at least one function")
    in_range("population", population, population >= 1, ">= 1")
    in_range("tournament_frac", tournament_frac, 0 < tournament_frac <= 1, "(0, 1]")
    in_range("winner", winner, winner in ("pareto", "average"), "pareto or average")
    in_range("budget", budget, budget >= 1, ">= 1")
    in_range("fresh", fresh, 0 <= fresh <= 1, "[0, 1]")
    start = population if start is None else start
    in_range("start", start, 1 <= start <= population, f"1 to population = {population}")
    if rng is None:
        import random

        rng = random.Random()
    members: deque[Candidate] = deque(maxlen=population)
    judged: dict[str, tuple[float, ...] | None] = {}
    history: list[Candidate] = []
    while len(judged) < budget and len(history) < 100 * budget:
        if len(members) < start or rng.random() < fresh:
            graph = random_graph(rng, nodes=nodes, batch=batch)
        else:
            graph = mutate(_winner(members, tournament_frac, winner, rng).graph, rng, batch=batch)
        formula = graph.to_expr()
        if formula not in judged:
            rejected = reject is not None and bool(reject(graph))
            judged[formula] = None if rejected else tuple(float(score(graph)) for score in eval_fn_list)
        history.append(Candidate(graph, judged[formula]))
        if history[-1].scores is not None:
            members.append(history[-1])
    return history


def _winner(members: Sequence[Candidate], frac: float, winner: str, rng: Random) -> Candidate:
    order = sorted(range(len(members)), key=lambda _: rng.random())
    tournament = [members[i] for i in order[: max(1, round(frac * len(members)))]]
    if winner == "average":
        return max(tournament, key=lambda candidate: candidate.mean)
    front: Candidate = pick(_front(tournament), rng)
    return front


def _front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that no other one dominates: as good on every score and better on one."""

    def dominated(a: Candidate) -> bool:
        assert a.scores is not None
        return any(
            b.scores != a.scores and all(theirs >= ours for theirs, ours in zip(b.scores or (), a.scores, strict=True))
            for b in candidates
        )

    return [candidate for candidate in candidates if not dominated(candidate)]


def rerank(
    found: Iterable[Candidate], eval_fn_list: Sequence[Callable[[LayerGraph], float]], top: int = 10
) -> list[Candidate]:
    """The ``top`` different candidates of the highest mean score, scored anew and sorted by that: best first.

    Args:
        found: what :func:`search` returned.
        eval_fn_list: functions of a graph, usually after a longer training.
        top: >= 1.

    Raises:
        ValueError: an argument out of range.

    >>> import random
    >>> from assay.nn.evonorm_search import rerank, search
    >>> found = search([lambda graph: -len(graph.live)], population=8, budget=20, rng=random.Random(0))
    >>> len(rerank(found, [lambda graph: -len(graph.to_expr())], top=3))
    3
    """
    in_range("top", top, top >= 1, ">= 1")
    different = {c.graph.to_expr(): c for c in found if c.scores is not None}
    best = sorted(different.values(), key=lambda c: c.mean, reverse=True)[:top]
    again = [Candidate(c.graph, tuple(float(score(c.graph)) for score in eval_fn_list)) for c in best]
    return sorted(again, key=lambda c: c.mean, reverse=True)
