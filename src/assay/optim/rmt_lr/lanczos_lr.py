"""A scheduler that reads learning rate and momentum off the curvature of a batch."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from assay.optim._curvature import lanczos

MOST_MOMENTUM = 0.99
LEAST_RATIO = 1e-4
"""Of lambda_min to lambda_max: the Hessian of a network is singular, and sqrt(0) would mean a momentum of 1."""


class LanczosLR(LRScheduler):
    """Sets learning rate and momentum on the fly, from the spectrum of the Hessian of a batch.

    When it is made, and at every ``interval``-th call of ``step()``, :func:`lanczos` takes ``steps`` products with the
    operator. With lambda_max the largest Ritz value and lambda_min the positive one of the largest weight, where the
    bulk of the spectrum is (at least 1e-4 lambda_max), all groups get Polyak's optimum for a quadratic ::

        r        = (sqrt(lambda_max) - sqrt(lambda_min)) / (sqrt(lambda_max) + sqrt(lambda_min))
        momentum = min(r^2, 0.99)
        lr       = safety * (2 / (sqrt(lambda_max) + sqrt(lambda_min)))^2

    and without ``momentum`` ``lr = safety * 2 / (lambda_max + lambda_min)``. With ``kind="adaptive"`` it is
    ``lr = safety * 2 / (sqrt(lambda_max) + sqrt(lambda_min))``, and betas stay as they are. Without positive
    curvature, or with a product that is not finite, everything stays as it is, with a warning.

    The *batch's* spectrum is the point: it is wider than that of all data, by how much the batch is noisy. So measure
    on batches of the size that is trained with, and give a function that draws fresh ones. Parameters, gradients,
    buffers and torch's random numbers are left as they were.

    Args:
        optimizer: any torch optimizer; its learning rates are replaced.
        operator: what :func:`curvature_operator` returns, or anything that :func:`lanczos` takes; or a function without
            arguments that makes one, called at each measurement.
        steps: Lanczos steps, >= 1: the cost is about ``2 * steps`` gradients on the operator's batches.
        interval: calls of ``step()`` between measurements, >= 1. Call ``step()`` once an epoch, or after every update
            with the updates of an epoch as interval.
        momentum: set ``momentum`` of every group as well; not for ``kind="adaptive"``.
        safety: factor on the learning rate, > 0.
        kind: ``"sgd"``; or ``"adaptive"`` for optimizers that divide by a root of the curvature.
        seed: of the starting vectors; equal on all processes of a group.
        last_epoch: index of the last call of ``step()`` when resuming without a state dict, else -1.

    ``lambda_max``, ``lambda_min`` and ``learned`` (the last pair of lr and momentum, or None) may be read. The
    operator is not in ``state_dict()``.

    Raises:
        ValueError: an argument out of range; ``momentum`` for an optimizer that has none, or that dampens it.

    Source: D. Granziol, S. Zohren, S. Roberts, JMLR 23, 2022, arXiv 2006.09092; B. Polyak, 1964.

    >>> import torch
    >>> from assay.optim import LanczosLR
    >>> w = torch.ones(2, requires_grad=True)
    >>> optimizer = torch.optim.SGD([w], lr=1.0)
    >>> scheduler = LanczosLR(optimizer, torch.diag(torch.tensor([1.0, 4.0])), momentum=False)
    >>> round(scheduler.get_last_lr()[0], 3)
    0.4
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        operator: Any,
        *,
        steps: int = 20,
        interval: int = 1,
        momentum: bool = True,
        safety: float = 1.0,
        kind: str = "sgd",
        seed: int = 0,
        last_epoch: int = -1,
    ) -> None:
        for name, value in (("steps", steps), ("interval", interval)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} = {value!r} is out of range: an integer >= 1")
        if not 0 < safety < math.inf:
            raise ValueError(f"safety = {safety!r} is out of range: > 0 and finite")
        if kind not in ("sgd", "adaptive"):
            raise ValueError(f"kind = {kind!r} is out of range: 'sgd' or 'adaptive'")
        self.sets_momentum = momentum and kind == "sgd"
        if self.sets_momentum and not all("momentum" in group for group in optimizer.param_groups):
            raise ValueError(
                f"momentum = True is out of range: {type(optimizer).__name__} has no such option; "
                "say momentum=False, or kind='adaptive'"
            )
        if self.sets_momentum and any(group.get("dampening") for group in optimizer.param_groups):
            raise ValueError("momentum = True is out of range: the optimizer dampens it; say momentum=False")
        self.operator, self.steps, self.interval = operator, steps, interval
        self.safety, self.kind, self.seed = safety, kind, seed
        self.lambda_max = self.lambda_min = math.nan
        self.learned: tuple[float, float] | None = None
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[Any]:
        """The learning rates for the steps to come; measures, if this is a turn to do so."""
        if self.last_epoch % self.interval == 0:
            self._measure()
        if self.learned is None:
            return [group["lr"] for group in self.optimizer.param_groups]
        self._set_momentum()
        return [self.learned[0]] * len(self.optimizer.param_groups)

    def _measure(self) -> None:
        cards = {p.device for group in self.optimizer.param_groups for p in group["params"] if p.is_cuda}
        try:
            with torch.random.fork_rng(devices=[card.index for card in cards]):
                # What has a shape is an operator already, though SciPy's can also be called.
                op = self.operator if hasattr(self.operator, "shape") else self.operator()
                values, weights = lanczos(op, self.steps, seed=self.seed + self.last_epoch // self.interval)
        except FloatingPointError:
            values, weights = torch.zeros(2, 1, dtype=torch.float64)
        if not values[-1] > 0:
            warnings.warn("no positive, finite curvature: learning rate and momentum stay as they are", stacklevel=2)
            return
        self.lambda_max, self.lambda_min = extremes(values, weights)
        lr, momentum = rates(self.lambda_max, self.lambda_min, self.sets_momentum, self.kind)
        self.learned = (self.safety * lr, momentum)

    def _set_momentum(self) -> None:
        for group in self.optimizer.param_groups:
            if self.sets_momentum and self.learned is not None:
                group["momentum"] = self.learned[1]

    def state_dict(self) -> dict[str, Any]:
        """All but the optimizer and the operator."""
        return {name: value for name, value in super().state_dict().items() if name != "operator"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state, and set the optimizer's groups as they were when it was saved."""
        super().load_state_dict(state_dict)
        for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        self._set_momentum()


def extremes(values: Tensor, weights: Tensor) -> tuple[float, float]:
    """(lambda_max, lambda_min): of Ritz values the largest, and the positive one with the largest weight."""
    largest = values[-1].item()
    bulk = values[weights.masked_fill(values <= 0, -1).argmax()].item()
    return largest, max(bulk, LEAST_RATIO * largest)


def rates(lambda_max: float, lambda_min: float, momentum: bool = True, kind: str = "sgd") -> tuple[float, float]:
    """(lr, momentum) that contract a quadratic with eigenvalues from lambda_min to lambda_max fastest."""
    high, low = math.sqrt(lambda_max), math.sqrt(lambda_min)
    if kind == "adaptive":
        return 2 / (high + low), 0.0
    if not momentum:
        return 2 / (lambda_max + lambda_min), 0.0
    return (2 / (high + low)) ** 2, min(((high - low) / (high + low)) ** 2, MOST_MOMENTUM)
