"""Batches of a size that may change between one and the next."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sized
from typing import Any, Protocol

import torch
from torch.utils.data import Sampler


class SizeController(Protocol):
    """What the sampler asks of a controller, such as ``AdaptiveBatchSize``."""

    size: int

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class AdaptiveBatchSampler(Sampler[list[int]]):
    """Batches of indices for a ``DataLoader``, each of the controller's size at the moment when it is drawn.

    One iteration is an epoch: every index once, in a new random order; the last batch may be smaller. Each batch is
    a list of ``min(controller.size, what is left)`` indices.

    Hand it to ``DataLoader(..., batch_sampler=sampler)``. Workers fetch ahead, so with ``num_workers`` > 0 a new size
    arrives ``num_workers * prefetch_factor`` batches later, and the state counts what was fetched, not what was used.

    Args:
        data_source: anything with a length, usually the dataset.
        controller: where the size comes from.
        shuffle: a new random order each epoch; otherwise 0, 1, 2, ...
        drop_last: leave out the last batch of an epoch where it would be smaller.
        generator: draws the order; None means one of the sampler's own, seeded from torch's global generator.

    Source: Lau, Liu and Kolar, arXiv 2402.11215, 2024.

    Example:
        >>> from assay.optim import AdaptiveBatchSampler, AdaptiveBatchSize
        >>> controller = AdaptiveBatchSize(2, max_batch_size=4)
        >>> for indices in AdaptiveBatchSampler(range(9), controller, shuffle=False):
        ...     print(indices)
        ...     controller.size = 4
        [0, 1]
        [2, 3, 4, 5]
        [6, 7, 8]
    """

    def __init__(
        self,
        data_source: Sized,
        controller: SizeController,
        *,
        shuffle: bool = True,
        drop_last: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        self.data_source, self.controller, self.shuffle, self.drop_last = data_source, controller, shuffle, drop_last
        if generator is None:
            generator = torch.Generator().manual_seed(int(torch.empty((), dtype=torch.int64).random_().item()))
        self.generator = generator
        self._epoch_start = generator.get_state()
        self._position = 0
        self._resumed = False

    @property
    def batch_size(self) -> int:
        """Size of the next batch."""
        return self.controller.size

    def __len__(self) -> int:
        """Number of batches of a whole epoch, were the size to stay as it is."""
        count = len(self.data_source) / self.controller.size
        return math.floor(count) if self.drop_last else math.ceil(count)

    def __iter__(self) -> Iterator[list[int]]:
        if not self._resumed:
            self._epoch_start, self._position = self.generator.get_state(), 0
        self._resumed = False
        total, position = len(self.data_source), self._position
        order = torch.randperm(total, generator=self.generator) if self.shuffle else torch.arange(total)
        while position < total:
            batch = order[position : position + self.controller.size].tolist()
            if self.drop_last and len(batch) < self.controller.size:
                break
            position += len(batch)
            self._position = position
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Where in which epoch the sampler is, and the controller's state; loads with ``weights_only=True``."""
        return {
            "epoch_start": self._epoch_start.clone(),
            "position": self._position,
            "controller": self.controller.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The next iteration goes on in mid-epoch: the same order, after the batches that had been drawn.

        An epoch whose examples were all drawn is over, and the next iteration begins a new one.
        """
        self._epoch_start, self._position = state_dict["epoch_start"].clone(), state_dict["position"]
        self.controller.load_state_dict(state_dict["controller"])
        self.generator.set_state(self._epoch_start)
        self._resumed = True
        left = len(self.data_source) - self._position
        if self._position and left < (self.controller.size if self.drop_last else 1):
            self._resumed = False
            if self.shuffle:
                torch.randperm(len(self.data_source), generator=self.generator)
