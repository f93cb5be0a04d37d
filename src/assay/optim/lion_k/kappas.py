"""Convex functions K that shape the step of Lion-K, and those among them that act on each entry by itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

EPS = 1e-12
"""Norms below this are taken for it where a gradient divides by them."""


class Kappa:
    """A convex, even function K of one tensor, with its subgradient and its conjugate.

    The conjugate is ``K*(x) = max over y of <x, y> - K(y)``; where it is finite is the domain of K*, a convex set that
    holds every gradient of K. For a norm K it is 0 in the unit ball of the dual norm and infinite outside.

    A subclass gives ``value``, ``grad`` and ``project``, and ``penalty`` where K* is not 0 in its domain; it is
    best a frozen dataclass. One that acts on each entry alone says so in ``elementwise`` and uses only methods of
    tensors in ``grad_``; then it also runs on lists and in pieces. To load a checkpoint of an optimizer that holds one
    of your own with ``weights_only=True``, name the class to ``torch.serialization.add_safe_globals``.

    >>> import torch
    >>> from assay.optim.kappas import Huber
    >>> kappa, y = Huber(0.5), torch.tensor([0.25, -2.0])
    >>> x = kappa.grad(y)
    >>> x.tolist(), kappa.in_domain(x), kappa.in_domain(2 * x)
    ([0.5, -1.0], True, False)
    >>> (kappa.value(y) + kappa.conjugate(x) - x @ y).item()
    0.0
    """

    def value(self, y: Tensor) -> Tensor:
        """K(y), a 0-d tensor."""
        raise NotImplementedError

    def grad(self, y: Any, eps: float = EPS) -> Any:
        """A subgradient of K at ``y``, in its dtype, 0 at 0; norms are divided by where above ``eps``, else by it."""
        return self.grad_(y.clone(), eps)

    def grad_(self, y: Any, eps: float = EPS) -> Any:
        """The same, and ``y`` may be overwritten."""
        return self.grad(y, eps)

    def project(self, x: Tensor) -> Tensor:
        """The nearest point to ``x`` of the domain of K*."""
        raise NotImplementedError

    def penalty(self, x: Tensor) -> Tensor:
        """K* at a point of its domain."""
        return x.new_zeros(())

    def conjugate(self, x: Tensor) -> Tensor:
        """K*(x), a 0-d tensor; infinite outside the domain."""
        nearest = self.project(wide(x))
        return self.penalty(nearest) if self.in_domain(x) else nearest.new_full((), math.inf)

    def distance(self, x: Tensor) -> Tensor:
        """Euclidean distance of ``x`` to the domain of K*, a 0-d tensor."""
        x = wide(x)
        return torch.linalg.vector_norm(x - self.project(x))

    def in_domain(self, x: Tensor, atol: float | None = None) -> bool:
        """Whether K* is finite within ``atol`` of ``x``; None allows for rounding."""
        atol = 1000 * torch.finfo(wide(x).dtype).eps if atol is None else atol
        return bool(self.distance(x) <= atol)

    def elementwise(self, p: Tensor) -> bool:
        """Whether K of a tensor like ``p`` is a sum over its entries, so that ``p`` may be cut and packed."""
        return False

    def entry_size(self, p: Any) -> float:
        """Typical size of the entries of ``grad`` for a tensor like ``p``: 1 where ``lr`` is the step of an entry."""
        return 1.0


class Box(Kappa):
    """Functions with sum over the entries whose slopes fill [-1, 1]: the domain of K* is that box."""

    def project(self, x: Tensor) -> Tensor:
        return x.clamp(-1, 1)

    def elementwise(self, p: Tensor) -> bool:
        return True


@dataclass(frozen=True)
class L1(Box):
    """``K(y) = sum |y_i|``; grad ``sign(y)``; ``K*(x) = 0`` where ``max |x_i| <= 1``. This is Lion."""

    def value(self, y: Tensor) -> Tensor:
        return wide(y).abs().sum()

    def grad_(self, y: Any, eps: float = EPS) -> Any:
        return y.sign_()


@dataclass(frozen=True)
class SoftThreshold(Box):
    """``K(y) = sum max(|y_i| - e, 0)``; grad ``sign(y)`` where ``|y| > e``, else 0.

    ``K*(x) = e sum |x_i|`` where ``max |x_i| <= 1``: weights become sparse. ``e`` >= 0.
    """

    e: float

    def __post_init__(self) -> None:
        if not self.e >= 0:
            raise ValueError(f"e = {self.e!r} is out of range: a number >= 0")

    def value(self, y: Tensor) -> Tensor:
        return (wide(y).abs() - self.e).clamp(min=0).sum()

    def grad_(self, y: Any, eps: float = EPS) -> Any:
        return y.sub_(y.clamp_min(-self.e).clamp_max_(self.e)).sign_()

    def penalty(self, x: Tensor) -> Tensor:
        return self.e * x.abs().sum()


@dataclass(frozen=True)
class Huber(Box):
    """``K(y) = sum h(y_i)`` with h(u) = u^2 / 2e up to |u| = e and |u| - e/2 beyond; grad ``clip(y / e, -1, 1)``.

    ``K*(x) = e/2 |x|^2`` where ``max |x_i| <= 1``. ``e`` > 0.
    """

    e: float

    def __post_init__(self) -> None:
        if not self.e > 0:
            raise ValueError(f"e = {self.e!r} is out of range: a number > 0")

    def value(self, y: Tensor) -> Tensor:
        size = wide(y).abs()
        near = size.clamp(max=self.e)
        return (near.square() / (2 * self.e) + (size - near)).sum()

    def grad_(self, y: Any, eps: float = EPS) -> Any:
        return y.div_(self.e).clamp_min_(-1).clamp_max_(1)

    def penalty(self, x: Tensor) -> Tensor:
        return self.e / 2 * x.square().sum()


@dataclass(frozen=True)
class LogCosh(Box):
    """``K(y) = sum log cosh y_i``; grad ``tanh(y)``.

    ``K*(x) = sum ((1 + x_i) log(1 + x_i) + (1 - x_i) log(1 - x_i)) / 2`` where ``max |x_i| <= 1``.
    """

    def value(self, y: Tensor) -> Tensor:
        size = wide(y).abs()
        return (size + torch.nn.functional.softplus(-2 * size) - math.log(2)).sum()

    def grad_(self, y: Any, eps: float = EPS) -> Any:
        return y.tanh_()

    def penalty(self, x: Tensor) -> Tensor:
        return (torch.xlogy(1 + x, 1 + x) + torch.xlogy(1 - x, 1 - x)).sum() / 2


@dataclass(frozen=True)
class HalfSquare(Kappa):
    """``K(y) = |y|^2 / 2``; grad ``y``; ``K*(x) = |x|^2 / 2`` everywhere: momentum with weight decay."""

    def value(self, y: Tensor) -> Tensor:
        return wide(y).square().sum() / 2

    def grad_(self, y: Any, eps: float = EPS) -> Any:
        return y

    def project(self, x: Tensor) -> Tensor:
        return x

    def penalty(self, x: Tensor) -> Tensor:
        return x.square().sum() / 2

    def elementwise(self, p: Tensor) -> bool:
        return True


def wide(x: Tensor) -> Tensor:
    """In float32 at least: sums in half precision lose their digits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
