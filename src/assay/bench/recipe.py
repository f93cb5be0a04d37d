"""What a training run is made of: a task, a budget and a recipe with six seams."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.utils.data import Dataset

    from assay.bench.loop import Fit
    from assay.bench.tasks import Task

    type_dataset = Dataset[Any]


@dataclass(frozen=True)
class Budget:
    """How much training a run may do: ``steps`` batches of ``batch_size`` examples, ``evaluations`` looks on the way.

    What is held equal is the number of examples, ``steps * batch_size``: for a fixed batch size that is the number of
    steps, and a method that changes the batch size gets no extra data for it.
    """

    steps: int = 300
    batch_size: int = 64
    evaluations: int = 10

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch_size", 1), ("evaluations", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} = {value!r} is out of range: an integer >= {least}")

    @property
    def examples(self) -> int:
        return self.steps * self.batch_size

    def scaled(self, fraction: float, *, evaluations: int | None = None) -> Budget:
        """The same budget with ``fraction`` of the steps (at least one)."""
        evaluations = self.evaluations if evaluations is None else evaluations
        return replace(self, steps=max(1, round(self.steps * fraction)), evaluations=evaluations)


@dataclass(frozen=True, slots=True)
class Batch:
    """Examples with their positions in the training set and the epoch (from 0) in which they are visited."""

    index: Tensor
    input: Any
    target: Any
    epoch: int


class Batches(Protocol):
    """The batch seam: one pass over the data, again and again; each item is a list or tensor of indices."""

    def __iter__(self) -> Iterator[Any]: ...


Objective = Callable[[Callable[[Any], Any], Batch], Tensor]
Factor = Callable[[float], float]


@dataclass(frozen=True)
class Recipe:
    """How to train: one builder for each seam, called with the :class:`Run` in this order.

    ``data(run)`` returns the training set; ``model(run)`` the network; ``objective(run)`` a function
    ``(model, batch) -> loss``; ``update(run)`` the optimizer of ``run.model``; ``schedule(run)`` a function from
    progress in [0, 1) to the factor on every learning rate; ``batch(run)`` an iterable that yields the index lists of
    one epoch each time it is iterated, and may have a method ``before_update(run, batch)``.
    """

    data: Callable[[Run], type_dataset]
    model: Callable[[Run], nn.Module]
    objective: Callable[[Run], Objective]
    update: Callable[[Run], torch.optim.Optimizer]
    schedule: Callable[[Run], Factor]
    batch: Callable[[Run], Batches]


class Run:
    """A training run in progress: what the seams may look at, filled in as the run is put together."""

    def __init__(self, recipe: Recipe, task: Task, budget: Budget, seed: int, device: str) -> None:
        self.recipe, self.task, self.budget, self.seed, self.device = recipe, task, budget, seed, device
        self.order = torch.Generator().manual_seed(seed)
        """Draws the order of the data, and nothing else: equal seeds give equal orders whatever the method draws."""
        self.step = 0
        self.examples = 0
        self.data: type_dataset
        self.model: nn.Module
        self.optimizer: torch.optim.Optimizer

    @property
    def progress(self) -> float:
        """Share of the budget that is spent, in [0, 1]."""
        return min(1.0, self.examples / self.budget.examples)

    @property
    def size(self) -> int:
        """Number of training examples, after the data seam."""
        return len(self.data)  # type: ignore[arg-type]

    @property
    def epochs(self) -> int:
        """Number of epochs that the budget holds with its batch size, the last one perhaps unfinished."""
        used = self.size - self.size % min(self.size, self.budget.batch_size)  # the remainder is left out
        return -(-self.budget.examples // used)

    def fit(
        self,
        recipe: Recipe,
        *,
        fraction: float = 1.0,
        seed: int | None = None,
        before_update: Callable[[Run], None] | None = None,
    ) -> Fit:
        """A preparatory training run on ``fraction`` of this run's budget; its cost counts as this run's."""
        from assay.bench.loop import fit

        budget = self.budget.scaled(fraction, evaluations=0)
        seed = self.seed if seed is None else seed
        return fit(recipe, self.task, budget, seed, device=self.device, before_update=before_update)
