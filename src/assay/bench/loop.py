"""The one reference loop that compare and claims use; users with a loop of their own never meet it."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from assay.bench.recipe import Batch, Budget, Recipe, Run
from assay.bench.tasks import Task

FINISHED, DIVERGED = "finished", "diverged"
_EVALUATION_BATCH = 512


@dataclass
class Fit:
    """What a training run came to. ``seconds`` is training and preparation, evaluation left out."""

    status: str
    model: nn.Module
    steps: int
    examples: int
    seconds: float
    preparation: float
    curve: list[dict[str, float]] = field(default_factory=list)
    validation: float | None = None
    validation_loss: float | None = None
    test: float | None = None
    optimizer_bytes: int = 0
    parameters: int = 0
    fingerprint: str = ""


def fit(
    recipe: Recipe,
    task: Task,
    budget: Budget | None = None,
    seed: int = 0,
    *,
    device: str = "cpu",
    test: bool = False,
    before_update: Callable[[Run], None] | None = None,
) -> Fit:
    """Train ``task`` by ``recipe`` until ``budget`` is spent, and measure it on validation data (and on ``test``).

    Equal seeds give equal initial weights and an equal order of equally many examples, whatever the method draws.
    ``before_update(run)`` is called once a step, between backward and the optimizer's step. A loss that is not
    finite ends the run as *diverged*, with the curve so far.
    """
    budget = budget or task.budget
    run = Run(recipe, task, budget, seed, device)
    clock = _Clock()
    with clock:
        objective, factor, batches = _prepare(run)
        rates = [group["lr"].clone() if isinstance(group["lr"], Tensor) else group["lr"] for group in _groups(run)]
    result = Fit(DIVERGED, run.model, 0, 0, 0.0, preparation=clock.seconds)
    marks = iter([math.ceil((k + 1) / budget.evaluations * budget.examples) for k in range(budget.evaluations)])
    mark = next(marks, math.inf)
    torch.manual_seed(seed + 1)  # dropout and the like: the same draws however many the preparation made
    run.model.train()
    finite = True
    while finite and run.examples < budget.examples:
        with clock:
            batch = next(batches)
            _set_rates(run, rates, factor(run.progress))
            finite = _step(run, objective, batch, before_update)
        if finite and run.examples >= mark:
            validation = evaluate(task, run.model, task.validation, device)
            point = {"examples": run.examples, "step": run.step, "seconds": clock.seconds, "validation": validation}
            result.curve.append(point)
            mark = next((m for m in marks if m > run.examples), math.inf)
    result.steps, result.examples, result.seconds = run.step, run.examples, clock.seconds
    result.optimizer_bytes = state_bytes(run.optimizer)
    result.parameters = sum(p.numel() for p in run.model.parameters())
    result.fingerprint = _fingerprint(run.model)
    if finite:
        evaluated_at_end = bool(result.curve) and result.curve[-1]["step"] == run.step
        if budget.evaluations:
            last = result.curve[-1]["validation"] if evaluated_at_end else None
            result.validation = evaluate(task, run.model, task.validation, device) if last is None else last
            by_loss = replace(task, metric=task.loss, whole_split=False)
            result.validation_loss = evaluate(by_loss, run.model, task.validation, device)
        result.test = evaluate(task, run.model, task.test, device) if test else None
        measured = [value for value in (result.validation, result.test) if value is not None]
        result.status = FINISHED if all(map(math.isfinite, measured)) else DIVERGED
    return result


def _prepare(run: Run) -> tuple[Any, Callable[[float], float], Iterator[Batch]]:
    """Fill the six seams in their order; what draws random numbers does so from the run's seed."""
    recipe = run.recipe
    torch.manual_seed(run.seed)
    run.data = recipe.data(run)
    if run.size == 0:
        raise ValueError("the data seam left no training example")
    torch.manual_seed(run.seed)  # a pilot in the data seam must not change the initial weights
    run.model = recipe.model(run).to(run.device)
    objective = recipe.objective(run)
    run.optimizer = recipe.update(run)
    factor = recipe.schedule(run)
    return objective, factor, _batches(run)


def _batches(run: Run) -> Iterator[Batch]:
    """Epoch after epoch from the batch seam, gathered, moved to the device and announced to the seam."""
    source = run.recipe.batch(run)
    announce = getattr(source, "before_update", None)
    epoch = 0
    while True:
        empty = True
        for chosen in source:
            empty = False
            index = torch.as_tensor(chosen)
            inputs, targets = gather(run.data, index)
            batch = Batch(index, _to(inputs, run.device), _to(targets, run.device), epoch)
            if announce:
                announce(run, batch)
            yield batch
        if empty:
            raise ValueError(f"the batch seam yielded no batch from {run.size} examples")
        epoch += 1


def _step(run: Run, objective: Any, batch: Batch, before_update: Callable[[Run], None] | None) -> bool:
    """One update; False if the loss was not finite (the weights then stay as they were)."""
    first: list[float] = []

    def closure() -> Tensor:
        run.optimizer.zero_grad()
        loss = objective(run.model, batch)
        loss.backward()
        if not first:
            first.append(loss.detach().item())
            if not math.isfinite(first[0]):
                raise _NotFinite
            if before_update:
                before_update(run)
        return loss

    try:
        run.optimizer.step(closure)  # type: ignore[arg-type]  # torch itself passes the tensor on
    except _NotFinite:
        return False
    run.step += 1
    run.examples += len(batch.index)
    return True


class _NotFinite(Exception):
    """The loss is infinite or not a number."""


class _Clock:
    """Seconds spent inside its ``with`` blocks, the device's queued work included."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - self._start


def _groups(run: Run) -> list[dict[str, Any]]:
    return run.optimizer.param_groups


def _set_rates(run: Run, rates: list[Any], factor: float) -> None:
    for group, rate in zip(_groups(run), rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].copy_(rate * factor)
        else:
            group["lr"] = rate * factor


def gather(dataset: Any, index: Tensor) -> tuple[Any, Any]:
    """Inputs and targets of the chosen examples, stacked; datasets of tensors are indexed without a Python loop."""
    tensors = getattr(dataset, "tensors", None)
    if tensors is not None and type(dataset) is torch.utils.data.TensorDataset:
        inputs, targets = tensors
        return inputs[index], targets[index]
    if type(dataset) is torch.utils.data.Subset:
        return gather(dataset.dataset, torch.as_tensor(dataset.indices)[index])
    many = getattr(dataset, "__getitems__", None)
    positions = index.tolist()
    inputs, targets = default_collate(many(positions) if many else [dataset[i] for i in positions])
    return inputs, targets


def _to(value: Any, device: str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _to(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_to(item, device) for item in value)
    return value


@torch.no_grad()
def evaluate(task: Task, model: nn.Module, dataset: Any, device: str = "cpu") -> float:
    """The task's metric of a model on a dataset, in eval mode; the model's mode is put back."""
    training = model.training
    model.eval()
    size, total, outputs, targets = len(dataset), 0.0, [], []
    try:
        for start in range(0, size, _EVALUATION_BATCH):
            index = torch.arange(start, min(start + _EVALUATION_BATCH, size))
            inputs, target = gather(dataset, index)
            output, target = model(_to(inputs, device)), _to(target, device)
            if task.whole_split:
                outputs.append(output)
                targets.append(target)
            else:
                total += float(task.metric(output, target)) * len(index)
    finally:
        model.train(training)
    return float(task.metric(torch.cat(outputs), torch.cat(targets))) if task.whole_split else total / size


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in an optimizer's state, step counters included, each storage counted once."""
    seen: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):  # a wrapper, such as of 8-bit codes
            visit([getattr(value, name) for name in value.__tensor_flatten__()[0]])
        elif isinstance(value, Tensor):
            storage = value.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            for item in value.values():
                visit(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                visit(item)

    visit(optimizer.state_dict()["state"])
    return sum(seen.values())


def _fingerprint(model: nn.Module) -> str:
    """Digest of the final weights: two runs with equal digests did exactly the same."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
