"""Layers as graphs of primitive operations: the space in which the EvoNorms were found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from assay._checks import in_range
from assay.nn.evonorm.layers import EvoLayer, like_map, move_running_, values_per_channel

INITIAL = ("x", "0", "v0", "v1")


def _divide(a: Tensor, b: Tensor, eps: float) -> Tensor:
    # Only what is nearer to zero than eps is moved, so that quotients by a standard deviation stay exact.
    return a / torch.where(b.abs() < eps, torch.where(b < 0, b.new_tensor(-eps), eps), b)


BINARY: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "add": lambda a, b, eps: a + b,
    "mul": lambda a, b, eps: a * b,
    "div": _divide,
    "max": lambda a, b, eps: torch.maximum(a, b),
}
UNARY: dict[str, Callable[[Tensor, float], Tensor]] = {
    "neg": lambda a, eps: -a,
    "sigmoid": lambda a, eps: a.sigmoid(),
    "tanh": lambda a, eps: a.tanh(),
    "exp": lambda a, eps: a.exp(),
    "log": lambda a, eps: a.sign() * (a.abs() + eps).log(),
    "abs": lambda a, eps: a.abs(),
    "square": lambda a, eps: a.square(),
    "sqrt": lambda a, eps: a.sign() * (a.abs() + eps).sqrt(),
}
AGGREGATE = tuple(f"{moment}_{over}" for moment in ("mean", "rms", "std") for over in ("bwh", "whc", "wh", "whg"))
OPERATIONS = (*BINARY, *UNARY, *AGGREGATE)
SAMPLE_OPERATIONS = tuple(name for name in OPERATIONS if not name.endswith("_bwh"))
_INFIX = {"add": " + ", "mul": " * ", "div": " / "}


class Node(NamedTuple):
    """An operation and the nodes that it is applied to, by number: 0 to 3 are x, 0, v0 and v1."""

    op: str
    inputs: tuple[int, ...]


class Random(Protocol):
    """A source of numbers in [0, 1): ``random.Random`` and ``numpy.random.Generator`` are such."""

    def random(self) -> float: ...


@dataclass(frozen=True)
class LayerGraph:
    """A layer as a graph of primitive operations, whose last node times ``weight`` plus ``bias`` is the output.

    Nodes 0 to 3 are the input x of shape (B, C, *), the constant 0, and two vectors per channel that are learned, v0
    (at first 0) and v1 (at first 1). Those given are numbered on from 4 and use earlier ones. Operations are

    - of two nodes: ``add, mul, div, max``;
    - of one, per element: ``neg, sigmoid, tanh, exp, abs, square``, ``log`` = sign(a) ln(|a| + eps) and ``sqrt`` =
      sign(a) sqrt(|a| + eps);
    - of one, over an index set: ``mean``, ``rms`` = sqrt(mean of squares + eps) and ``std`` = sqrt(biased variance +
      eps), each with ``_bwh`` (batch and space), ``_whc`` (space and channels), ``_wh`` (space) or ``_whg`` (space
      and the channels of a group). Those with the batch take moving averages in evaluation.

    Args:
        nodes: pairs ``(op, inputs)``, at least one.

    Raises:
        ValueError: an unknown operation, or inputs that are no earlier nodes or of the wrong number.

    Source: H. Liu et al., Evolving Normalization-Activation Layers, NeurIPS 2020, arXiv 2004.02967.

    >>> import torch
    >>> from assay.nn.evonorm_search import LayerGraph
    >>> LayerGraph((("std_wh", (0,)), ("div", (0, 4)))).to_expr()
    '(x / std_wh(x))'
    >>> LayerGraph.from_name("B0").to_expr()
    '(x / max(((v1 * x) + std_wh(x)), std_bwh(x)))'
    >>> LayerGraph.from_name("S0").module(8, groups=2)(torch.randn(2, 8, 4, 4)).shape
    torch.Size([2, 8, 4, 4])
    """

    nodes: tuple[Node, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "nodes", tuple(Node(op, tuple(inputs)) for op, inputs in self.nodes))
        in_range("nodes", self.nodes, bool(self.nodes), "at least one")
        for place, (op, inputs) in enumerate(self.nodes, start=len(INITIAL)):
            in_range("op", op, op in OPERATIONS, ", ".join(OPERATIONS))
            good = len(inputs) == _arity(op) and all(0 <= i < place for i in inputs)
            in_range("inputs", inputs, good, f"{_arity(op)} of 0 to {place - 1} for {op} at {place}")

    @classmethod
    def from_name(cls, name: str) -> LayerGraph:
        """B0, B1, B2, S0, S1, S2, ``"BN-ReLU"`` or ``"GN-SiLU"``; the last two scale by v1 and shift by v0."""
        in_range("name", name, name in _KNOWN, ", ".join(_KNOWN))
        return cls(_KNOWN[name])  # type: ignore[arg-type]

    def module(self, num_features: int, **options: Any) -> GraphLayer:
        """The layer for C = ``num_features``; options as in :class:`GraphLayer`."""
        return GraphLayer(self, num_features, **options)

    @cached_property
    def live(self) -> tuple[int, ...]:
        """The nodes, initial ones included, that the output depends on, in order."""
        needed, first = {len(INITIAL) + len(self.nodes) - 1}, len(INITIAL)
        for place in range(first + len(self.nodes) - 1, first - 1, -1):
            if place in needed:
                needed.update(self.nodes[place - first].inputs)
        return tuple(sorted(needed))

    def to_expr(self) -> str:
        """The formula. Graphs that differ in dead nodes, order or the sides of a sum, product or maximum share it."""
        terms = dict(enumerate(INITIAL))
        for place in self.live:
            if place >= len(INITIAL):
                op, inputs = self.nodes[place - len(INITIAL)]
                parts = [terms[i] for i in inputs]
                if op in BINARY and op != "div":
                    parts.sort()
                terms[place] = f"({_INFIX[op].join(parts)})" if op in _INFIX else f"{op}({', '.join(parts)})"
        return terms[self.live[-1]]

    def __str__(self) -> str:
        return self.to_expr()


def _arity(op: str) -> int:
    return 2 if op in BINARY else 1


_KNOWN = {
    "B0": (("mul", (3, 0)), ("std_wh", (0,)), ("add", (4, 5)), ("std_bwh", (0,)), ("max", (7, 6)), ("div", (0, 8))),
    "B1": (
        ("exp", (1,)),  # 1
        ("add", (0, 4)),
        ("rms_wh", (0,)),
        ("mul", (5, 6)),
        ("std_bwh", (0,)),
        ("max", (8, 7)),
        ("div", (0, 9)),
    ),
    "B2": (("rms_wh", (0,)), ("neg", (0,)), ("add", (4, 5)), ("std_bwh", (0,)), ("max", (7, 6)), ("div", (0, 8))),
    "S0": (("mul", (3, 0)), ("sigmoid", (4,)), ("mul", (0, 5)), ("std_whg", (0,)), ("div", (6, 7))),
    "S1": (("sigmoid", (0,)), ("mul", (0, 4)), ("std_whg", (0,)), ("div", (5, 6))),
    "S2": (("sigmoid", (0,)), ("mul", (0, 4)), ("rms_whg", (0,)), ("div", (5, 6))),
    "BN-ReLU": (
        ("mean_bwh", (0,)),
        ("neg", (4,)),
        ("add", (0, 5)),
        ("std_bwh", (0,)),
        ("div", (6, 7)),
        ("mul", (8, 3)),
        ("add", (9, 2)),
        ("max", (10, 1)),
    ),
    "GN-SiLU": (
        ("mean_whg", (0,)),
        ("neg", (4,)),
        ("add", (0, 5)),
        ("std_whg", (0,)),
        ("div", (6, 7)),
        ("mul", (8, 3)),
        ("add", (9, 2)),
        ("sigmoid", (10,)),
        ("mul", (10, 11)),
    ),
}


class GraphLayer(EvoLayer):
    """A layer that computes a :class:`LayerGraph`.

    Args:
        graph: the graph; nodes that its output does not depend on are left out.
        num_features: C of an input (B, C, *), with at least one dimension after C.
        groups: >= 1, a divisor of C; for the operations over groups.
        nonlinear: False for ``weight x + bias`` alone.
        momentum: weight of the batch in the moving averages, in [0, 1].
        eps: > 0, in divisions, logarithms and roots.

    Raises:
        ValueError: an argument out of range, or an input of another shape.

    >>> import torch
    >>> from assay.nn.evonorm_search import GraphLayer, LayerGraph
    >>> GraphLayer(LayerGraph.from_name("B1"), 8)(torch.randn(2, 8, 4, 4)).shape
    torch.Size([2, 8, 4, 4])
    """

    _least_dim: ClassVar = 3
    v0: nn.Parameter | None
    v1: nn.Parameter | None

    def __init__(
        self,
        graph: LayerGraph,
        num_features: int,
        groups: int = 32,
        nonlinear: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(num_features, nonlinear, eps, factory)
        in_range("momentum", momentum, 0 <= momentum <= 1, "[0, 1]")
        self.graph, self.groups, self.momentum = graph, groups, momentum
        live = graph.live if nonlinear else ()
        first = len(INITIAL)
        self.steps = [(place, *graph.nodes[place - first]) for place in live if place >= first]
        if any(op.endswith("_whg") for _, op, _ in self.steps):
            allowed = f"a divisor of num_features = {num_features}"
            in_range("groups", groups, groups >= 1 and num_features % groups == 0, allowed)
        for place, value in ((2, 0.0), (3, 1.0)):
            parameter = nn.Parameter(torch.full((num_features,), value, **factory)) if place in live else None
            self.register_parameter(INITIAL[place], parameter)
        for place, op, _ in self.steps:
            if op.endswith("_bwh"):
                start = 0.0 if op.startswith("mean") else 1.0
                self.register_buffer(f"running_{place}", torch.full((num_features,), start, **factory))

    def forward(self, input: Tensor) -> Tensor:
        x = self._checked(input)
        if not self.nonlinear:
            return self._affine(x).to(input.dtype)
        # Values are kept as small as they come, with dimensions of size 1; no moment changes by repeating values.
        values: dict[int, Tensor] = {0: x, 1: x.new_zeros([1] * x.dim())}
        for place, v in ((2, self.v0), (3, self.v1)):
            if v is not None:
                values[place] = like_map(v, x)[None]
        for place, op, inputs in self.steps:
            parts = [values[i] for i in inputs]
            if op in BINARY:
                values[place] = BINARY[op](parts[0], parts[1], self.eps)
            elif op in UNARY:
                values[place] = UNARY[op](parts[0], self.eps)
            else:
                values[place] = self._aggregate(place, op, parts[0], x)
        return self._affine(values[self.graph.live[-1]].expand_as(x)).to(input.dtype)

    def _aggregate(self, place: int, op: str, a: Tensor, x: Tensor) -> Tensor:
        moment, over = op.split("_")
        space = tuple(range(2, a.dim()))
        if over == "bwh":
            found = self._batch_moment(place, moment, a, x)
        elif over == "whg" and a.shape[1] > 1:
            grouped = a.unflatten(1, (self.groups, self.num_features // self.groups))
            found = _moment(moment, grouped, tuple(range(2, grouped.dim())))
            found = found.expand(-1, -1, grouped.shape[2], *[-1] * len(space)).flatten(1, 2)
        else:
            found = _moment(moment, a, (1, *space) if over == "whc" else space)
        return found if moment == "mean" else (found + self.eps).sqrt()

    def _batch_moment(self, place: int, moment: str, a: Tensor, x: Tensor) -> Tensor:
        running: Tensor = getattr(self, f"running_{place}")
        if not self.training:
            return like_map(running, x)[None]
        batch, count = _moment(moment, a, (0, *range(2, a.dim()))), values_per_channel(x)
        unbiased = count / max(count - 1, 1) if moment == "std" else 1.0
        move_running_(running, (batch.detach() * unbiased).flatten().expand(self.num_features), self.momentum, count)
        return batch

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, groups={self.groups}, momentum={self.momentum}, {self.graph.to_expr()}"


def _moment(moment: str, a: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Mean, mean of squares or biased variance."""
    if moment == "std":
        a = a - a.mean(dims, keepdim=True)
    return (a if moment == "mean" else a.square()).mean(dims, keepdim=True)


def pick(items: Sequence[Any], rng: Random) -> Any:
    """One of the items, all equally likely."""
    return items[int(rng.random() * len(items))]


def _random_node(place: int, rng: Random, batch: bool) -> Node:
    op = pick(OPERATIONS if batch else SAMPLE_OPERATIONS, rng)
    return Node(op, tuple(pick(range(place), rng) for _ in range(_arity(op))))


def random_graph(rng: Random, *, nodes: int = 10, batch: bool = True) -> LayerGraph:
    """A graph whose operations and their inputs are drawn uniformly, node by node.

    Args:
        rng: a ``numpy.random.Generator`` or ``random.Random``.
        nodes: >= 1, besides the four initial ones.
        batch: allow the moments over the batch (the B series); False for layers in which samples do not meet (S).

    Raises:
        ValueError: an argument out of range.

    >>> import random
    >>> from assay.nn.evonorm_search import random_graph
    >>> len(random_graph(random.Random(0)).nodes)
    10
    """
    in_range("nodes", nodes, nodes >= 1, ">= 1")
    return LayerGraph(tuple(_random_node(len(INITIAL) + i, rng, batch) for i in range(nodes)))


def mutate(graph: LayerGraph, rng: Random, *, batch: bool = True) -> LayerGraph:
    """The graph with another operation, on inputs drawn anew, at one of its nodes.

    Args:
        graph: left as it is.
        rng, batch: as in :func:`random_graph`.

    >>> import random
    >>> from assay.nn.evonorm_search import LayerGraph, mutate
    >>> graph = LayerGraph.from_name("S0")
    >>> changed = mutate(graph, random.Random(0), batch=False)
    >>> sum(old != new for old, new in zip(graph.nodes, changed.nodes))
    1
    """
    place = pick(range(len(graph.nodes)), rng)
    new = graph.nodes[place]
    while new == graph.nodes[place]:
        new = _random_node(len(INITIAL) + place, rng, batch)
    return LayerGraph((*graph.nodes[:place], new, *graph.nodes[place + 1 :]))
