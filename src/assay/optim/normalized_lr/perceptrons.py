"""The perceptrons: what logistic regression by gradient descent becomes as its step size grows without bound."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor


class PerceptronResult(NamedTuple):
    """What a perceptron found: weights ``theta`` (d,), the number of updates, and whether all examples are right.

    >>> from assay.optim import PerceptronResult, perceptron
    >>> theta, n_iter, solved = perceptron([[1.0], [-2.0]], [1, -1])
    >>> n_iter, solved
    (1, True)
    """

    theta: Tensor
    n_iter: int
    solved: bool


def batch_perceptron(
    X: Any, y: Any, *, normalized: bool = False, max_iter: int = 10_000, theta0: Any = None
) -> PerceptronResult:
    """Add the mean of the misclassified examples, times their label, until there are none.

    With rows a_i of ``X``, n of them, and the misclassified examples S = {i : y_i <a_i, theta> <= 0} ::

        theta = theta + 1/n   sum_{i in S} y_i a_i                 (half of it where theta = 0)
        theta = theta + 1/|S| sum_{i in S} y_i a_i                 normalized

    These are the limits of gradient descent on the logistic loss and of :class:`NormalizedLRGD` for a step size gamma
    to infinity, theta divided by gamma; at theta = 0 logistic regression gives an example half the weight that it gives
    a wrong one. An example with margin 0 counts as wrong. On data that a plane through 0 separates with margin mu,
    with R the largest norm of a row, at most n R^2 / mu^2 updates are needed, normalized R^2 / mu^2, from theta = 0.

    Args:
        X: (n, d), finite; a tensor or what ``torch.as_tensor`` takes. Floating point keeps its dtype and device,
            integers become float64.
        y: (n,), -1 or +1.
        normalized: divide by the number of misclassified examples instead of n.
        max_iter: most updates, >= 1.
        theta0: (d,), where to start; None: zero, as the bounds want it.

    Raises:
        ValueError: an argument out of range.

    Source: A. Tyurin, From Logistic Regression to the Perceptron Algorithm, AAAI 2025, arXiv 2412.08424, sections 5, 6.

    >>> from assay.optim import batch_perceptron
    >>> X, y = [[0.5, -1.0]] + 99 * [[-0.5, -1.0]], [1] + 99 * [-1]
    >>> [batch_perceptron(X, y, normalized=normalized).n_iter for normalized in (False, True)]
    [31, 2]
    """

    def update(signed: Tensor, wrong: Tensor, theta: Tensor) -> Tensor:
        total = wrong.to(signed.dtype) @ signed
        if normalized:
            return total / wrong.sum()
        return total / (len(signed) * (1 if theta.any() else 2))

    return _until_solved(X, y, theta0, max_iter, update)


def perceptron(X: Any, y: Any, *, max_iter: int = 10_000, theta0: Any = None) -> PerceptronResult:
    """Rosenblatt's perceptron: add one misclassified example, times its label, until there are none.

    With rows a_i of ``X`` ::

        theta = theta + y_i a_i              for the next i with y_i <a_i, theta> <= 0

    in the order of the rows, and round again. From theta = 0 it needs at most R^2 / mu^2 updates. Arguments, result
    and errors as in :func:`batch_perceptron`; ``n_iter`` and ``max_iter`` count updates, not examples looked at.

    Source: F. Rosenblatt, 1958; A. Novikoff, 1962; A. Tyurin, AAAI 2025, arXiv 2412.08424, theorem 5.2.

    >>> from assay.optim import perceptron
    >>> perceptron([[1.0, -1.0], [-1.0, -4.0]], [1, -1])
    PerceptronResult(theta=tensor([3., 2.]), n_iter=3, solved=True)
    """
    start = 0

    def update(signed: Tensor, wrong: Tensor, theta: Tensor) -> Tensor:
        nonlocal start
        found = (start + int(wrong.roll(-start).to(torch.uint8).argmax())) % len(signed)
        start = found + 1
        return signed[found]

    return _until_solved(X, y, theta0, max_iter, update)


def _until_solved(
    X: Any, y: Any, theta0: Any, max_iter: int, update: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> PerceptronResult:
    if not isinstance(max_iter, Integral) or max_iter < 1:
        raise ValueError(f"max_iter = {max_iter!r} is out of range: an integer >= 1")
    signed = _signed(X, y)
    theta = signed.new_zeros(signed.shape[1]) if theta0 is None else torch.as_tensor(theta0).detach().to(signed)
    if theta.shape != signed.shape[1:]:
        raise ValueError(f"theta0.shape = {tuple(theta.shape)} is out of range: {tuple(signed.shape[1:])}")
    for n_iter in range(max_iter + 1):
        wrong = signed @ theta <= 0
        if not wrong.any():
            return PerceptronResult(theta, n_iter, True)
        if n_iter < max_iter:
            theta = theta + update(signed, wrong, theta)
    return PerceptronResult(theta, int(max_iter), False)


def _signed(X: Any, y: Any) -> Tensor:
    """The rows y_i a_i."""
    X = torch.as_tensor(X).detach()
    X = X if X.is_floating_point() else X.double()
    y = torch.as_tensor(y, device=X.device)
    if X.dim() != 2 or not X.numel():
        raise ValueError(f"X.shape = {tuple(X.shape)} is out of range: (n, d) with n, d >= 1")
    if y.shape != X.shape[:1]:
        raise ValueError(f"y.shape = {tuple(y.shape)} is out of range: {tuple(X.shape[:1])}")
    if not X.isfinite().all():
        raise ValueError("X holds a value that is not finite")
    if (other := (y != 1) & (y != -1)).any():
        raise ValueError(f"y = {y[other][0].item()} is out of range: -1 or +1")
    return y[:, None].to(X.dtype) * X
