"""PA&DA: a super-network trained on paths and on examples that are drawn by the size of their gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from assay.data._watching import WatchedBatches
from assay.data.pada.grad_norm_sampler import GradNormSampler
from assay.data.pada.mixing import pada_mix
from assay.data.pada.path_sampler import PathSampler, path_grad_norms
from assay.data.pada.super_network import CellSuperNetwork, Zero

if TYPE_CHECKING:
    from assay.bench.recipe import Batch, Recipe, Run

__all__ = [
    "CellSuperNetwork",
    "GradNormSampler",
    "PathSampler",
    "Zero",
    "pada_mix",
    "path_grad_norms",
]


def apply(recipe: Recipe, *, tau: float = 1.0) -> Recipe:
    """The data half of the method as a run's batches: examples drawn by the errors that they had an epoch before.

    The weight of importance rises from 0 to ``tau`` over the run's epochs.
    """
    if not 0 <= tau <= 1:
        raise ValueError(f"tau = {tau!r} is out of range: [0, 1]")

    def batch(run: Run) -> WatchedBatches:
        if run.task.classes is None:
            raise ValueError("pada needs a classification task")
        sampler = GradNormSampler(run.size, generator=run.order)

        def note(run: Run, batch: Batch, logits: Tensor) -> None:
            sampler.record(batch.index, logits, batch.target)

        return WatchedBatches(_Batches(run, sampler, tau), note)

    return replace(recipe, batch=batch)


class _Batches:
    """Epochs of the sampler as batches of one size, the remainder left out; its epoch ends where the next begins."""

    def __init__(self, run: Run, sampler: GradNormSampler, tau: float) -> None:
        self.run, self.sampler, self.tau, self.epoch = run, sampler, tau, 0

    def __iter__(self) -> Iterator[Tensor]:
        if self.epoch:
            self.sampler.step(self.tau * min(1.0, (self.epoch - 1) / self.run.epochs))
        self.epoch += 1
        size = min(self.run.size, self.run.budget.batch_size)
        drawn = torch.tensor(list(self.sampler))
        return iter(drawn[: len(drawn) // size * size].split(size))
