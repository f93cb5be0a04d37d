"""Batches that hold equally many examples of each of several classes."""

from __future__ import annotations

from collections.abc import Iterator
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler


class PairBatchSampler(Sampler[list[int]]):
    """Batches of ``classes_per_batch`` classes with ``per_class`` examples of each, those of a class side by side.

    Each epoch shuffles every class and cuts it into groups of ``per_class``; a batch takes one group from each of
    ``classes_per_batch`` different classes, drawn at random in proportion to the groups that they have left. An epoch
    visits each example at most once and has as many batches as can be made so: the largest B with ::

        sum over classes of min(B, floor(size of the class / per_class)) >= classes_per_batch B

    What is left over stays out of this epoch. The batches follow from ``seed`` and the epoch alone: call
    :meth:`set_epoch` before each, or all epochs are the same. In a process group the epoch's batches are dealt out,
    ``rank`` getting every ``world_size``-th, equally many for all: no example goes to two processes.

    ``state_dict()`` says how far the epoch has come, and after ``load_state_dict()`` the next iteration goes on from
    there. A DataLoader with workers asks for batches ahead of their use: count the batches that were used yourself
    and write that number to ``"position"``.

    Args:
        labels: (N,) tensor, array or list; example i of the dataset has ``labels[i]``.
        classes_per_batch: at least 1, at most the number of classes.
        per_class: at least 1.
        seed: at least 0.
        rank, world_size: of this process and of the group, ``0 <= rank < world_size``.
        skip_small: leave classes of fewer than ``per_class`` examples out instead of refusing them.

    Raises:
        ValueError: an argument out of range, labels that are no vector, a class that is too small, too few batches
            for the group, or the state of another sampler.

    Source:
        The batches of 65 pairs of Chen, Deng, AAAI 2019, arXiv 1901.07169, for any number of classes and examples.

    Example:
        >>> from assay.data import PairBatchSampler
        >>> labels = [0, 0, 0, 0, 1, 1, 1, 2, 2]
        >>> sampler = PairBatchSampler(labels, classes_per_batch=2, per_class=2)
        >>> len(sampler)
        2
        >>> [[labels[i] for i in batch] for batch in sampler]
        [[0, 0, 1, 1], [0, 0, 2, 2]]
    """

    def __init__(
        self,
        labels: Any,
        classes_per_batch: int = 65,
        per_class: int = 2,
        seed: int = 0,
        *,
        rank: int = 0,
        world_size: int = 1,
        skip_small: bool = False,
    ) -> None:
        for name, value, least in (
            ("classes_per_batch", classes_per_batch, 1),
            ("per_class", per_class, 1),
            ("seed", seed, 0),
            ("world_size", world_size, 1),
            ("rank", rank, 0),
        ):
            _whole(name, value, least)
        if rank >= world_size:
            raise ValueError(f"rank = {rank} is out of range: [0, {world_size})")
        values = np.asarray(labels.detach().cpu() if isinstance(labels, torch.Tensor) else labels)
        if values.ndim != 1 or len(values) == 0:
            raise ValueError(f"labels.shape = {values.shape} is out of range: (N,) with N >= 1")
        classes, self._class_of, sizes = np.unique(values, return_inverse=True, return_counts=True)
        self._groups = sizes // per_class
        if not skip_small and (small := classes[self._groups == 0]).size:
            raise ValueError(
                f"per_class = {per_class} is out of range for {small.size} of the classes, such as {small[0]!s} with "
                f"{sizes[self._groups == 0][0]} example(s): skip_small=True leaves them out"
            )
        if classes_per_batch > (usable := int((self._groups > 0).sum())):
            raise ValueError(f"classes_per_batch = {classes_per_batch} is out of range: [1, {usable}], the classes")
        self.classes_per_batch, self.per_class, self.seed = classes_per_batch, per_class, seed
        self.rank, self.world_size = rank, world_size
        self.epoch, self._position, self._start = 0, 0, 0
        self._firsts = np.cumsum(sizes) - sizes
        self._batches = _most_batches(self._groups, classes_per_batch)
        if self._batches < world_size:
            raise ValueError(f"world_size = {world_size} is out of range: [1, {self._batches}], the epoch's batches")

    def __len__(self) -> int:
        """Batches of one epoch for one process."""
        return self._batches // self.world_size

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, counted from 0; saying the current one again changes nothing."""
        _whole("epoch", epoch, 0)
        if epoch != self.epoch:
            self.epoch, self._position, self._start = epoch, 0, 0

    def __iter__(self) -> Iterator[list[int]]:
        start = self._position = self._start
        self._start = 0
        for number, batch in enumerate(self._epoch()):
            mine, whose = divmod(number, self.world_size)
            if mine == len(self):
                break
            if whose == self.rank and mine >= start:
                self._position = mine + 1
                yield batch.tolist()
        self._position = 0

    def _epoch(self) -> Iterator[np.ndarray]:
        """The batches of all processes."""
        draw = np.random.default_rng([self.seed, self.epoch])
        order = np.lexsort((draw.random(len(self._class_of)), self._class_of))
        left, used = self._planned(draw), np.zeros_like(self._groups)
        for remaining in range(self._batches, 0, -1):
            # A class with a group for every batch that is left must be in this one; the others are drawn in
            # proportion to their groups (the largest of u^(1/groups)).
            keys = draw.random(len(left)) ** (1 / np.maximum(left, 1e-9))
            keys = np.where(left == remaining, 2.0, np.where(left == 0, -1.0, keys))
            chosen = np.argpartition(-keys, self.classes_per_batch - 1)[: self.classes_per_batch]
            chosen = draw.permutation(chosen)
            places = (self._firsts + used * self.per_class)[chosen, None] + np.arange(self.per_class)
            left[chosen] -= 1
            used[chosen] += 1
            yield order[places].ravel()

    def _planned(self, draw: np.random.Generator) -> np.ndarray:
        """How many groups of each class the epoch uses: no more than it has batches, and together just enough."""
        groups = np.repeat(np.arange(len(self._groups)), np.minimum(self._groups, self._batches))
        kept = draw.permutation(groups)[: self._batches * self.classes_per_batch]
        return np.bincount(kept, minlength=len(self._groups))

    def state_dict(self) -> dict[str, Any]:
        """The sampler's settings, the epoch, and how many of its batches were handed out."""
        return {**self._settings(), "epoch": self.epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the state was taken; the settings must be those of this sampler."""
        for name, value in self._settings().items():
            if state[name] != value:
                raise ValueError(f"{name} = {state[name]!r} in the state is out of range: {value!r}")
        _whole("epoch", state["epoch"], 0)
        _whole("position", state["position"], 0)
        self.epoch = state["epoch"]
        self._position = self._start = state["position"]

    def _settings(self) -> dict[str, Any]:
        names = ("classes_per_batch", "per_class", "seed", "world_size")
        return {"size": len(self._class_of), **{name: getattr(self, name) for name in names}}


def _most_batches(groups: np.ndarray, classes_per_batch: int) -> int:
    """The largest B with sum of min(B, groups) >= classes_per_batch B."""
    low, high = 0, int(groups.sum()) // classes_per_batch
    while low < high:
        middle = (low + high + 1) // 2
        if np.minimum(groups, middle).sum() >= classes_per_batch * middle:
            low = middle
        else:
            high = middle - 1
    return low


def _whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} = {value!r} is out of range: an integer >= {least}")
