"""A cell search space whose networks share their weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from assay.data._checks import count


class Zero(nn.Module):
    """The operation that cuts an edge: zeros in the shape of its input."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.zeros_like(input)


class CellSuperNetwork(nn.Module):
    """All networks of a cell search space in one: every edge holds every operation, a path says which ones act.

    A cell is a directed acyclic graph of ``nodes`` nodes, the first its input, the last its output ::

        node_j = sum over i < j of operation[path[edge(i, j)]](node_i)

    with edges in the order (0,1), (0,2), (1,2), (0,3), ...; all cells follow the same path but have weights of their
    own. This is the space of NAS-Bench-201 for 4 nodes and its five operations. An operation keeps the shape of its
    input.

    Args:
        stem: from inputs to the first cell's input.
        operations: K factories, each called without arguments for every edge of every cell.
        head: from the last cell's output to the network's.
        nodes: at least 2.
        cells: at least 1.

    Raises:
        ValueError: an argument out of range, or a path that does not fit.

    Source:
        Weight sharing by single paths as in Lu et al.: PA&DA, CVPR 2023, arXiv 2302.14772; the cell of Dong, Yang:
        NAS-Bench-201, ICLR 2020, arXiv 2001.00326.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from assay.data import CellSuperNetwork
        >>> net = CellSuperNetwork(nn.Identity(), [nn.Identity, lambda: nn.Linear(4, 4)], nn.Linear(4, 2), nodes=3)
        >>> net.num_edges, net(torch.ones(5, 4), path=[0, 1, 0]).shape
        (3, torch.Size([5, 2]))
        >>> {k: len(modules) for k, modules in net.active([0, 1, 0]).items()}
        {0: 2, 1: 1}
    """

    def __init__(
        self,
        stem: nn.Module,
        operations: Sequence[Callable[[], nn.Module]],
        head: nn.Module,
        *,
        nodes: int = 4,
        cells: int = 1,
    ) -> None:
        super().__init__()
        if not operations:
            raise ValueError("operations = [] is out of range: at least one")
        if count("nodes", nodes) < 2:
            raise ValueError(f"nodes = {nodes!r} is out of range: an integer >= 2")
        self.stem, self.head, self.nodes = stem, head, nodes
        self.num_choices, self.num_edges = len(operations), nodes * (nodes - 1) // 2
        self.cells = nn.ModuleList(
            nn.ModuleList(nn.ModuleList(make() for make in operations) for _ in range(self.num_edges))
            for _ in range(count("cells", cells))
        )

    def forward(self, input: Tensor, path: Sequence[int]) -> Tensor:
        """The output of the network that ``path`` chooses, one operation number for each edge."""
        self._check(path)
        x = self.stem(input)
        for cell in self.cells:
            held = [x]
            edge = 0
            for j in range(1, self.nodes):
                held.append(sum(cell[edge + i][path[edge + i]](held[i]) for i in range(j)))  # type: ignore[index]
                edge += j
            x = held[-1]
        return self.head(x)

    def active(self, path: Sequence[int]) -> dict[int, list[nn.Module]]:
        """For each operation on the path its modules, over edges and cells: what ``path_grad_norms`` takes."""
        self._check(path)
        found: dict[int, list[nn.Module]] = {}
        for cell, (edge, k) in itertools.product(self.cells, enumerate(path)):
            found.setdefault(k, []).append(cell[edge][k])  # type: ignore[index]
        return dict(sorted(found.items()))

    def paths(self) -> Iterator[tuple[int, ...]]:
        """All num_choices ** num_edges paths."""
        return itertools.product(range(self.num_choices), repeat=self.num_edges)

    def _check(self, path: Sequence[int]) -> None:
        if len(path) != self.num_edges or not all(0 <= k < self.num_choices for k in path):
            raise ValueError(
                f"path = {list(path)} is out of range: {self.num_edges} operations from 0 to {self.num_choices - 1}"
            )
