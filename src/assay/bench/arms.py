"""From a user's word to something that can be trained: an arm is a recipe with its tunable space."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from assay import catalogue
from assay.bench.recipe import Budget, Recipe, Run
from assay.bench.space import check_space, trial_options
from assay.bench.spec import Spec
from assay.bench.tasks import Task

Apply = Callable[..., Recipe]


@dataclass(frozen=True)
class Part:
    """One method (or torch optimizer) of an arm: where it goes, what it accepts, what of it is tuned."""

    spec: Spec
    seam: str
    apply: Apply
    space: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Arm:
    """What is compared: parts applied one after the other to the default recipe."""

    name: str
    parts: tuple[Part, ...]

    @functools.cached_property
    def space(self) -> dict[str, Mapping[str, Any]]:
        """Tunable options ``part.option``; learning rates first, so that all arms meet the same ones in a trial."""
        options = {
            f"{part.spec.name}.{option}": sampler
            for part in self.parts
            for option, sampler in part.space.items()
            if option not in part.spec.options
        }
        return dict(sorted(options.items(), key=lambda item: not item[0].endswith(".lr")))

    def options(self, trial: int) -> dict[str, Any]:
        return trial_options(self.space, trial)

    def recipe(self, options: Mapping[str, Any]) -> Recipe:
        """The recipe at these values of the tunable options."""
        recipe = DEFAULT_RECIPE
        for part in self.parts:
            prefix = f"{part.spec.name}."
            tuned = {key.removeprefix(prefix): value for key, value in options.items() if key.startswith(prefix)}
            recipe = part.apply(recipe, **{**tuned, **part.spec.options})
        return recipe


class EpochBatches:
    """The usual batches: each epoch in a new random order, all of one size, the remainder left out."""

    def __init__(self, size: int, batch_size: int, order: torch.Generator) -> None:
        self.size, self.batch_size, self.order = size, min(size, batch_size), order

    def __iter__(self) -> Any:
        permutation = torch.randperm(self.size, generator=self.order)
        return iter(permutation[: self.size // self.batch_size * self.batch_size].split(self.batch_size))


def linear_decay(progress: float, warmup: float = 0.05) -> float:
    """The default schedule: up over the first twentieth of the run, then linearly down to zero."""
    return min((progress + 0.002) / warmup, 1.0) * (1.0 - progress)


def _task_loss(run: Run) -> Any:
    return lambda model, batch: run.task.loss(model(batch.input), batch.target)


DEFAULT_RECIPE = Recipe(
    data=lambda run: run.task.train,
    model=lambda run: run.task.model(),
    objective=_task_loss,
    update=lambda run: torch.optim.AdamW(run.model.parameters()),
    schedule=lambda run: linear_decay,
    batch=lambda run: EpochBatches(run.size, run.budget.batch_size, run.order),
)


@dataclass(frozen=True)
class _Torch:
    """An optimizer of torch as a baseline, with its fastest implementation."""

    optimizer: Callable[..., torch.optim.Optimizer]
    space: Mapping[str, Mapping[str, Any]]
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def apply(self, recipe: Recipe, **options: Any) -> Recipe:
        settings = {**self.fixed, **options}
        return replace(recipe, update=lambda run: self.optimizer(run.model.parameters(), **settings))


BASELINES: dict[str, _Torch] = {
    "adamw": _Torch(
        torch.optim.AdamW,
        {"lr": {"default": 1e-3, "log": [1e-4, 3e-2]}, "weight_decay": {"default": 1e-2, "log": [1e-4, 3e-1]}},
        {"fused": True},
    ),
    "sgd": _Torch(
        torch.optim.SGD,
        {"lr": {"default": 1e-1, "log": [1e-3, 1.0]}, "weight_decay": {"default": 1e-4, "log": [1e-6, 1e-2]}},
        {"momentum": 0.9, "nesterov": True, "fused": True},
    ),
}


def resolve(specs: tuple[Spec, ...], base: tuple[Spec, ...] = ()) -> Arm:
    """The arm of these specs on top of a baseline's, whose seams it takes over where both change one."""
    parts = [_part(spec) for spec in specs]
    for i, part in enumerate(parts):
        for other in parts[:i]:
            if part.seam == other.seam and part.seam not in ("model", "data"):
                raise ValueError(f"{other.spec.name} and {part.spec.name} both change the {part.seam}: choose one")
    taken = {part.seam for part in parts} - {"model", "data"}
    below = [part for part in map(_part, base) if part.seam not in taken]
    return Arm("+".join(map(str, specs)), (*below, *parts))


def _part(spec: Spec) -> Part:
    if spec.name in BASELINES:
        known = BASELINES[spec.name]
        part = Part(spec, "update", known.apply, known.space)
        _check_options(spec, known.optimizer, skip={"params"})
    else:
        card = _find(spec.name)
        if not card.seam:
            raise ValueError(f"{spec.name} is no piece of a training run ({card.kind}); try: assay run {spec.name}")
        part = Part(spec, card.seam, _apply_of(card), card.space)
        target = card.load(card.apply or card.piece)
        _check_options(spec, target, skip={"params", "recipe", "input", "target"})
    check_space(part.space)
    _dry_run(part)
    return part


def _find(name: str) -> catalogue.Card:
    try:
        return catalogue.find(name)
    except catalogue.UnknownMethod:
        known = [card.id for card in catalogue.cards()] + list(BASELINES)
        raise catalogue.UnknownMethod(name, known) from None


def _apply_of(card: catalogue.Card) -> Apply:
    """The room's own ``apply``, or what is usual at the seam."""
    if card.apply:
        return card.load(card.apply)
    piece = card.load(card.piece)
    if card.seam == "update":
        return lambda recipe, **options: replace(recipe, update=lambda run: piece(run.model.parameters(), **options))
    if card.seam == "objective":
        return lambda recipe, **options: replace(
            recipe,
            objective=lambda run: lambda model, batch: piece(model(batch.input), batch.target, **options),
        )
    if card.seam == "model" and card.replaces:
        return functools.partial(_swapped, replaced=card.replaces, piece=piece)
    raise catalogue.CardError(f"{card.id}: a {card.seam} method needs a function 'apply'")


def _swapped(recipe: Recipe, *, replaced: str, piece: type[nn.Module], **options: Any) -> Recipe:
    from assay.nn import swap

    old = getattr(torch.nn, replaced.removeprefix("torch.nn."))
    return replace(recipe, model=lambda run: swap(recipe.model(run), old, piece, **options))


def _check_options(spec: Spec, target: Callable[..., Any], skip: set[str]) -> None:
    allowed = [name for name in inspect.signature(target).parameters if name not in skip]
    for option in spec.options:
        if option not in allowed:
            raise ValueError(f"{spec.name} has no option {option!r}; allowed: {', '.join(allowed)}")


def _dry_run(part: Part) -> None:
    """Meet the pinned options once, on nothing, so that a value out of range is refused before any training."""
    recipe = part.apply(DEFAULT_RECIPE, **part.spec.options)
    if part.seam == "update":
        run = Run.__new__(Run)
        run.budget, run.model = Budget(), nn.Linear(1, 1)
        recipe.update(run)


def arms_for(methods: list[tuple[Spec, ...]], baseline: tuple[Spec, ...]) -> list[Arm]:
    """The baseline first, then the methods on top of it, each once."""
    arms = [resolve(baseline)]
    for specs in methods:
        arm = resolve(specs, baseline)
        if arm.name not in [other.name for other in arms]:
            arms.append(arm)
    return arms


def task_of(task: Task | str) -> Task:
    """A task given as such or by name."""
    from assay.bench.tasks import resolve_task

    return task if isinstance(task, Task) else resolve_task(task)
