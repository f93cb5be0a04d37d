"""Which parameters make a block, and the order in which the blocks have their turn."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

ORDERS = ("random", "ascending", "descending", "fixed")
ALWAYS = -1
"""The place of parameters that train during all visits."""

Named = list[tuple[str, nn.Parameter]]

_LAYER = re.compile(r"(?:.*?\.)?(?:layers?|blocks?|h)\.\d+(?=\.)")
_EMBEDDING = re.compile(r"embed|(?:^|\.)wte(?:\.|$)|(?:^|\.)wpe(?:\.|$)")


def infer_blocks(
    named_params: Iterable[tuple[str, Tensor]], *, include_embedding: bool = False, include_head: bool = False
) -> list[list[str]]:
    """Blocks for a model with a numbered list of layers: one for each layer, as lists of name prefixes.

    A layer is the shortest prefix of a name that ends in a number after ``layers``, ``layer``, ``blocks``, ``block`` or
    ``h``, as in ``model.layers.0``. What is in no layer counts as embedding if its name has ``embed``, ``wte`` or
    ``wpe`` in it, and as head otherwise (the last normalization, for instance, is part of the head).

    Args:
        named_params: pairs of a name and a parameter, as ``model.named_parameters()`` gives them.
        include_embedding: put a block with the embedding before the layers; without it the embedding is in no block.
        include_head: put a block with the head after the layers; without it the head is in no block.

    Returns:
        One list for each block, in the order of the names.

    Raises:
        ValueError: no name has a numbered layer; the blocks have to be written by hand then.

    Source: Q. Luo, H. Yu, X. Li, BAdam, NeurIPS 2024, arXiv 2404.02827.

    >>> import torch
    >>> from assay.optim import infer_blocks
    >>> model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(9, 4), "head": torch.nn.Linear(4, 9)})
    >>> model["layers"] = torch.nn.ModuleList([torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)])
    >>> infer_blocks(model.named_parameters(), include_embedding=True)
    [['embed.weight'], ['layers.0'], ['layers.1']]
    """
    layers: dict[str, None] = {}
    embedding: list[str] = []
    head: list[str] = []
    for name, _ in named_params:
        if found := _LAYER.match(name):
            layers[found.group()] = None
        else:
            (embedding if _EMBEDDING.search(name) else head).append(name)
    if not layers:
        raise ValueError("named_params is out of range: no name has a layer such as 'layers.0.'; give blocks by hand")
    blocks = [[prefix] for prefix in layers]
    if include_embedding and embedding:
        blocks.insert(0, embedding)
    if include_head and head:
        blocks.append(head)
    return blocks


def named_groups(params: Any, start: int = 0) -> list[dict[str, Any]]:
    """Parameters in any of torch's forms, or a Module, as groups whose ``params`` are pairs (name, parameter).

    What has no name is called by its position, from ``start``.
    """
    listed = list(params.named_parameters() if isinstance(params, nn.Module) else params)
    groups = listed if listed and isinstance(listed[0], dict) else [{"params": listed}]
    found = []
    for group in groups:
        members = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        if members and not isinstance(members[0], tuple):
            numbers = map(str, range(start, start + len(members)))
            members = list(zip(group.get("param_names", numbers), members, strict=False))
        start += len(members)
        found.append({**group, "params": members})
    return found


def for_base(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups as torch's optimizers hold them; of the names of one tensor the first counts."""
    found = []
    for group in groups:
        once = {id(p): (name, p) for name, p in reversed(group["params"])}.values()
        names, params = [name for name, _ in reversed(once)], [p for _, p in reversed(once)]
        found.append({**group, "params": params, "param_names": names})
    return found


def homes(named: Named, blocks: Sequence[Sequence[str]], always: Sequence[str]) -> dict[nn.Parameter, int]:
    """The first block of each parameter that has one, or :data:`ALWAYS`."""
    found: dict[nn.Parameter, int] = {}
    for name, p in named:
        places = (i for i, prefixes in enumerate(blocks) if under(name, prefixes))
        home = ALWAYS if under(name, always) else next(places, len(blocks))
        if home < found.get(p, len(blocks)):
            found[p] = home
    return found


def under(name: str, prefixes: Sequence[str]) -> bool:
    """Whether one of the prefixes is the beginning of this name, in whole components: layers.1 is none of layers.10."""
    return any(not prefix or f"{name}.".startswith(f"{prefix.rstrip('.')}.") for prefix in prefixes)


class Turns:
    """Which block is next: in an epoch every block has one turn."""

    def __init__(self, order: str, count: int, seed: int) -> None:
        self.order, self.count = order, count
        self.generator = torch.Generator().manual_seed(seed)
        self.queue: list[int] = []

    def next(self) -> int:
        self._fill()
        return self.queue.pop(0)

    def take(self, index: int) -> None:
        """A turn out of order is this block's turn of the epoch."""
        self._fill()
        if index in self.queue:
            self.queue.remove(index)

    def _fill(self) -> None:
        if self.queue:
            return
        if self.order == "random":
            self.queue = torch.randperm(self.count, generator=self.generator).tolist()
        elif self.order == "fixed":
            self.queue = [0]
        else:
            self.queue = list(range(self.count))[:: -1 if self.order == "descending" else 1]

    def state(self) -> dict[str, Any]:
        return {"queue": list(self.queue), "rng": self.generator.get_state()}

    def load(self, state: dict[str, Any]) -> None:
        self.queue = list(state["queue"])
        self.generator.set_state(state["rng"].cpu())
