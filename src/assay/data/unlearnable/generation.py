"""The loop in which noise and weights take turns, from one step to the next and from one process to the next."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset, default_collate

from assay.data.unlearnable.noise import Noise, add, as_image, examples

Optimizer = torch.optim.Optimizer | Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer] | None
Checkpoint = str | os.PathLike[str] | None


class Generation:
    """Noise under way. What a run needs to go on, and no more, is its ``state_dict()``.

    ``noise_step(x, y)`` is the noise of a batch for the model as it is, and ``view(x, y)`` what the model is trained
    on in place of a batch with noise.
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: Any,
        *,
        noise_step: Callable[[Tensor, Any], Tensor],
        view: Callable[[Tensor, Any], Tensor],
        numbers: dict[str, Any],
        batch_size: int,
        optimizer: Optimizer,
        lr_schedule: Callable[[int], float] | None,
        generator: torch.Generator | None,
        transform_generator: Any,
    ) -> None:
        self.model, self.dataset, self.noise_step, self.view = model, dataset, noise_step, view
        self.radius, self.perturb_freq, self.train_steps = (
            numbers[n] for n in ("radius", "perturb_freq", "train_steps")
        )
        self.size, self.batch_size = len(dataset), min(batch_size, len(dataset))
        self.steps = self.train_steps + (-(-self.size // self.batch_size) if numbers["regenerate"] else 0)
        self.optimizer, self.factor = _optimizer(model, optimizer), lr_schedule or _default_schedule(optimizer)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.generator = generator
        # One generator may serve both; twice the same state does no harm.
        self.generators = [g for g in (generator, transform_generator) if isinstance(g, torch.Generator)]
        self.like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
        ends, _ = fetch(dataset, [0, self.size - 1])
        self.noise = torch.zeros((self.size, *ends.shape[1:]), dtype=torch.int8)
        self.order = torch.arange(0)
        self.done = 0
        # By these, a checkpoint is known to belong to this run: its arguments and a trace of its data.
        self.numbers = {**numbers, "batch_size": self.batch_size, "noise.shape": tuple(self.noise.shape)}
        self.numbers["sum of the first and last image"] = ends.double().sum().item()

    def run(self, checkpoint: Checkpoint, every: int) -> Noise:
        """All steps that are left: first those that train, then one for each batch that gets its final noise."""
        path = None if checkpoint is None else Path(checkpoint)
        if path and path.exists():
            self.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        with _training(self.model), torch.enable_grad():
            try:
                while self.done < self.steps:
                    self._train() if self.done < self.train_steps else self._regenerate()
                    self.done += 1
                    if path and (self.done % every == 0 or self.done == self.steps):
                        _write(self.state_dict(), path)
            finally:
                self._set_rates(1.0)
                self.optimizer.zero_grad()
        return Noise(self.noise)

    def _train(self) -> None:
        positions = self._next_batch()
        x, y = self._batch(positions)
        if (self.done + 1) % self.perturb_freq == 0:
            self._store(positions, self.noise_step(x, y))
        z = self.view(add(x, self.noise[positions].to(x.device)), y)
        self._set_rates(self.factor(self.done))
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(z), y)
        if not loss.isfinite():
            raise FloatingPointError(f"the model's loss is {loss.item()} in step {self.done}: lower its learning rate")
        loss.backward()
        self.optimizer.step()

    def _regenerate(self) -> None:
        start = (self.done - self.train_steps) * self.batch_size
        positions = torch.arange(start, min(start + self.batch_size, self.size))
        self._store(positions, self.noise_step(*self._batch(positions)))

    def _next_batch(self) -> Tensor:
        """Every epoch in a new order, as far as whole batches go; a remainder waits for the final pass."""
        place = self.done % (self.size // self.batch_size) * self.batch_size
        if place == 0:
            device = "cpu" if self.generator is None else self.generator.device
            self.order = torch.randperm(self.size, generator=self.generator, device=device).cpu()
        return self.order[place : place + self.batch_size]

    def _batch(self, positions: Tensor) -> tuple[Tensor, Any]:
        images, labels = fetch(self.dataset, positions.tolist())
        images = images.to(self.like.dtype) / 255 if images.dtype == torch.uint8 else images.to(self.like.dtype)
        return images.to(self.like.device), labels.to(self.like.device)

    def _store(self, positions: Tensor, delta: Tensor) -> None:
        limit = int(255 * self.radius + 1e-6)  # rounding must not lead out of a radius that is no multiple of 1 / 255
        self.noise[positions] = (255 * delta).round().clamp(-limit, limit).cpu().to(torch.int8)

    def _set_rates(self, factor: float) -> None:
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor

    def state_dict(self) -> dict[str, Any]:
        cuda = self.like.device if self.like.is_cuda else None
        return {
            "numbers": self.numbers,
            "done": self.done,
            "noise": self.noise,
            "order": self.order,
            "rates": self.rates,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generators": [generator.get_state() for generator in self.generators],
            "random": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(cuda) if cuda else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        differ = [name for name, value in self.numbers.items() if state["numbers"].get(name) != value]
        if differ:
            said = ", ".join(
                f"{name} = {state['numbers'].get(name)!r} against {self.numbers[name]!r}" for name in differ
            )
            raise ValueError(f"checkpoint is that of another run: {said}")
        self.done, self.rates = state["done"], state["rates"]
        self.noise, self.order = state["noise"], state["order"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for generator, saved in zip(self.generators, state["generators"], strict=True):
            generator.set_state(saved)
        torch.set_rng_state(state["random"])
        if state["cuda"] is not None:
            torch.cuda.set_rng_state(state["cuda"], self.like.device)


def fetch(dataset: Any, positions: list[int]) -> tuple[Tensor, Any]:
    """Images (b, ...), uint8 or floating point in [0, 1], and labels, on the CPU."""
    if type(dataset) is TensorDataset:
        images, labels = as_image(dataset[positions]), dataset.tensors[1][positions]
    else:
        rows = examples(dataset, positions)
        images = torch.stack([as_image(row) for row in rows])
        labels = default_collate([row[1] for row in rows])
    if not isinstance(labels, Tensor):
        raise ValueError(f"dataset yields labels that collate to a {type(labels).__name__}, not to a tensor")
    if images.is_floating_point() and not bool(((images >= 0) & (images <= 1)).all()):
        reach = f"images reach from {images.min():.4g} to {images.max():.4g}"
        raise ValueError(f"{reach}: they lie in [0, 1], before any normalization, which belongs into the model")
    return images, labels


def _optimizer(model: nn.Module, optimizer: Optimizer) -> torch.optim.Optimizer:
    if optimizer is None:
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer(model.parameters())


def _default_schedule(optimizer: Optimizer) -> Callable[[int], float]:
    return (lambda step: 0.1 ** (step // 2000)) if optimizer is None else (lambda step: 1.0)


@contextlib.contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """In training mode; afterwards every module has its own flag back."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.train()
        yield
    finally:
        for module, training in flags:
            module.training = training


def _write(state: dict[str, Any], path: Path) -> None:
    """All of it or nothing: a process that is killed while it writes leaves the file before in place."""
    unfinished = path.with_name(path.name + ".unfinished")
    torch.save(state, unfinished)
    os.replace(unfinished, path)
