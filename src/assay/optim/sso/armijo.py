"""Gradient descent that looks for its step: long at first, shorter until the loss falls enough."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from assay.optim._rule import NOT_OPTIONS
from assay.optim._wrapper import total_norm

FLOOR = 1e-6
"""A step below this ends the search."""


class ArmijoGD(torch.optim.Optimizer):
    """Gradient descent with a backtracking line search, for a loss that is the same each time it is asked for.

    With w all parameters as one vector, f the closure's loss and d its gradient at w ::

        a = expand * lr
        while f(w - a d) > f(w) - c * a * ||d||^2:   a = backtrack * a          (Armijo's condition)
        w = w - a d,   lr = a

    The search ends after ``max_trials``, or where a < 1e-6; the step is then taken with the last a, whatever the loss.
    The accepted step stands in the group as its ``lr``, where the next search starts and where schedulers may drive it.
    ``grad_norm`` is ||d|| of the last step.

    ``step(closure)`` asks for the loss once with its gradient, and once for each trial. The closure zeroes the
    gradients, computes the loss, calls backward and returns the loss; if it has an argument ``backward``, it is called
    with ``backward=False`` for the trials, where no gradient is needed. ``step`` returns the loss at w.

    Args:
        params: parameters, one group.
        lr: the step from which the first search starts, > 0.
        c: share of the fall that a line would promise which is enough, in (0, 1).
        backtrack: factor of a trial that failed, in (0, 1).
        expand: factor on the last step with which a search starts, >= 1.
        max_trials: >= 1.

    Raises:
        ValueError: an argument out of range, or a second group.
        RuntimeError: a step without a closure; a sparse gradient; sharded parameters.

    Source: L. Armijo, 1966; as the inner solver of J. W. Lavington et al., ICML 2023, arXiv 2302.02607.

    >>> import torch
    >>> from assay.optim import ArmijoGD
    >>> w = torch.nn.Parameter(torch.tensor([3.0, -1.0]))
    >>> optimizer = ArmijoGD([w])
    >>> def closure(backward=True):
    ...     loss = (w * torch.tensor([1.0, 2.0])).square().sum()
    ...     if backward:
    ...         optimizer.zero_grad()
    ...         loss.backward()
    ...     return loss
    >>> for _ in range(100):
    ...     loss = optimizer.step(closure)
    >>> bool(loss < 1e-6)
    True
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1.0,
        c: float = 0.1,
        backtrack: float = 0.9,
        expand: float = 2.0,
        max_trials: int = 100,
    ) -> None:
        defaults = {"lr": lr, "c": c, "backtrack": backtrack, "expand": expand, "max_trials": max_trials}
        super().__init__(params, {**defaults, "grad_norm": float("nan")})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Meet the parameters; there is one step for all of them, and so one group."""
        options = {**self.defaults, **param_group}
        _positive(options, "lr")
        check_search(options)
        add_only_group(self, param_group, super().add_param_group)

    @property
    def grad_norm(self) -> float:
        """The gradient's norm where the last step began."""
        return self.param_groups[0]["grad_norm"]

    @torch.no_grad()
    def step(self, closure: Callable[..., Any] | None = None) -> Any:
        """One search and one step; returns the loss where it began."""
        if closure is None:
            raise RuntimeError("ArmijoGD compares losses: call step(closure)")
        (group,) = self.param_groups
        with torch.enable_grad():
            loss = closure()
        params = [p for p in group["params"] if p.grad is not None]
        if any(p.grad.is_sparse for p in params):
            raise RuntimeError("ArmijoGD does not support sparse gradients")
        start, grads = [p.detach().clone() for p in params], [p.grad.clone() for p in params]
        group["grad_norm"] = norm = total_norm(grads).item()
        value, a = float(loss), group["expand"] * float(group["lr"])

        ask = _without_gradient(closure)
        for _ in range(group["max_trials"]):
            _move(params, start, grads, a)
            if ask() <= value - group["c"] * a * norm**2:
                break
            a *= group["backtrack"]
            if a < FLOOR:
                break
        _move(params, start, grads, a)
        group["lr"] = a
        return loss


def _move(params: list[Tensor], start: list[Tensor], direction: list[Tensor], a: float) -> None:
    """To start - a * direction."""
    for p, x, d in zip(params, start, direction, strict=True):
        torch.sub(x, d, alpha=a, out=p.detach())


def check_search(options: Mapping[str, Any]) -> None:
    """Refuse a line search's option that is out of range."""
    for name in ("c", "backtrack"):
        if not 0 < options[name] < 1:
            raise ValueError(f"{name} = {options[name]!r} is out of range: (0, 1)")
    if not options["expand"] >= 1:
        raise ValueError(f"expand = {options['expand']!r} is out of range: a number >= 1")
    if not options["max_trials"] >= 1:
        raise ValueError(f"max_trials = {options['max_trials']!r} is out of range: >= 1")


def add_only_group(
    optimizer: torch.optim.Optimizer, param_group: dict[str, Any], add: Callable[[dict[str, Any]], None]
) -> None:
    """Add the group, if it is the first; its options must be known, and its parameters real and whole."""
    name = type(optimizer).__name__
    if unknown := param_group.keys() - optimizer.defaults.keys() - NOT_OPTIONS:
        raise TypeError(f"{name} has no option {', '.join(map(repr, sorted(unknown)))}")
    if optimizer.param_groups:
        raise ValueError(f"a second group is out of range: {name} takes one step for all parameters")
    add(param_group)
    if any(hasattr(p, "to_local") or p.is_complex() for p in optimizer.param_groups[0]["params"]):
        raise RuntimeError(f"{name} does not support sharded or complex parameters: processes would search apart")


def _positive(options: Mapping[str, Any], name: str) -> None:
    if not options[name] > 0:
        raise ValueError(f"{name} = {options[name]!r} is out of range: a number > 0")


def _without_gradient(closure: Callable[..., Any]) -> Callable[[], float]:
    """The loss alone, as a number; a closure without the argument ``backward`` takes the gradient as well."""
    if "backward" in inspect.signature(closure).parameters:
        return lambda: float(closure(backward=False))
    return lambda: float(torch.enable_grad()(closure)())
