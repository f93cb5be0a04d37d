"""Kappas of a whole tensor: norms whose gradient at an entry depends on the others."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from assay.optim.lion_k.kappas import EPS, Kappa, wide


@dataclass(frozen=True)
class TopK(Kappa):
    """``K(y)`` = sum of the k largest ``|y_i|``; grad ``sign(y)`` on those, else 0.

    ``K*(x) = 0`` where ``sum |x_i| <= k`` and ``max |x_i| <= 1``. ``k`` >= 1; in a smaller tensor all entries count.
    """

    k: int

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"k = {self.k!r} is out of range: an integer >= 1")

    def value(self, y: Tensor) -> Tensor:
        size = wide(y).abs().flatten()
        return size.topk(min(self.k, size.numel())).values.sum()

    def grad(self, y: Tensor, eps: float = EPS) -> Tensor:
        return _on_whole(self._signs, y)

    def _signs(self, y: Tensor) -> Tensor:
        flat = y.flatten()
        chosen = flat.abs().topk(min(self.k, flat.numel())).indices
        return torch.zeros_like(flat).scatter(0, chosen, flat.sign().gather(0, chosen)).view(y.shape)

    def project(self, x: Tensor) -> Tensor:
        size = x.abs().flatten()
        if size.clamp(max=1).sum() <= self.k:
            return x.clamp(-1, 1)
        # sum of clamp(size - cut, 0, 1) falls with cut and is linear between these breaks: find where it is k.
        breaks, order = torch.cat([size - 1, size]).sort()
        slopes = torch.cat([-torch.ones_like(size), torch.ones_like(size)])[order].cumsum(0)[:-1]
        sums = size.numel() + torch.cat([slopes.new_zeros(1), (slopes * breaks.diff()).cumsum(0)])
        i = int((sums > self.k).sum()) - 1
        cut = breaks[i] + (self.k - sums[i]) / slopes[i]
        return (x.abs() - cut).clamp(0, 1) * x.sign()


@dataclass(frozen=True)
class Lp(Kappa):
    """``K(y) = |y|_p`` of the whole tensor; grad ``sign(y) |y|^(p-1) / |y|_p^(p-1)``.

    ``K*(x) = 0`` where ``|x|_q <= 1`` with 1/p + 1/q = 1. ``p`` in [1, inf).
    """

    p: float

    def __post_init__(self) -> None:
        if not 1 <= self.p < math.inf:
            raise ValueError(f"p = {self.p!r} is out of range: [1, inf)")

    def value(self, y: Tensor) -> Tensor:
        return torch.linalg.vector_norm(wide(y), self.p)

    def grad(self, y: Tensor, eps: float = EPS) -> Tensor:
        # In units of the largest entry: the powers neither overflow nor vanish.
        size = wide(y).abs()
        size = size / size.max().clamp(min=eps)
        norm = size.pow(self.p).sum().clamp(min=1).pow(1 / self.p)
        return y.sign() * (size / norm).pow(self.p - 1).to(y.dtype)

    def project(self, x: Tensor) -> Tensor:
        if self.p == 1:
            return x.clamp(-1, 1)
        q, a = self.p / (self.p - 1), x.abs().double()
        if torch.linalg.vector_norm(a, q) <= 1:
            return x
        from scipy.optimize import brentq

        def excess(mu: float) -> float:
            return torch.linalg.vector_norm(_shrunk(a, mu * q, q - 1), q).item() - 1

        # The nearest w minimizes |w - a|^2 / 2 + mu |w|_q^q for the mu that gives it length 1.
        mu = brentq(excess, 0, torch.linalg.vector_norm(a, self.p).item() / q)
        w = _shrunk(a, mu * q, q - 1)
        return (w / torch.linalg.vector_norm(w, q)).to(x.dtype) * x.sign()

    def entry_size(self, p: Any) -> float:
        return p.numel() ** (1 / self.p - 1)


@dataclass(frozen=True)
class L2(Kappa):
    """``K(y) = |y|_2`` of the whole tensor; grad ``y / |y|_2``; ``K*(x) = 0`` where ``|x|_2 <= 1``."""

    def value(self, y: Tensor) -> Tensor:
        return torch.linalg.vector_norm(wide(y))

    def grad_(self, y: Tensor, eps: float = EPS) -> Tensor:
        return y.div_(torch.linalg.vector_norm(wide(y)).clamp(min=eps))

    def project(self, x: Tensor) -> Tensor:
        return x / torch.linalg.vector_norm(x).clamp(min=1)

    def entry_size(self, p: Any) -> float:
        return p.numel() ** -0.5


@dataclass(frozen=True)
class L2Rows(Kappa):
    """``K(y) = sum over i of |y[i]|_2``; grad ``y[i] / |y[i]|_2``; ``K*(x) = 0`` where every ``|x[i]|_2 <= 1``.

    A vector is one row.
    """

    @staticmethod
    def _norms(y: Tensor) -> Tensor:
        """The norms of the rows, in the shape that divides ``y``."""
        return torch.linalg.vector_norm(wide(y), dim=tuple(range(y.ndim > 1, y.ndim)), keepdim=True)

    def value(self, y: Tensor) -> Tensor:
        return self._norms(y).sum()

    def grad_(self, y: Tensor, eps: float = EPS) -> Tensor:
        return y.div_(self._norms(y).clamp(min=eps))

    def project(self, x: Tensor) -> Tensor:
        return x / self._norms(x).clamp(min=1)

    def entry_size(self, p: Any) -> float:
        return (math.prod(p.shape[1:]) if p.ndim > 1 else p.numel()) ** -0.5


@dataclass(frozen=True)
class Nuclear(Kappa):
    """``K(Y)`` = sum of the singular values; grad ``U V^T`` of ``Y = U S V^T``; ``K*(X) = 0`` where all are <= 1.

    This is Muon with decay. Tensors of more than two dimensions count as matrices of their rows; those of less have
    the L1 kappa. ``ns_steps`` >= 1 steps of Newton and Schulz with Muon's coefficients give singular values of about
    0.7 to 1.2 in place of 1, so that the constraint holds as loosely; None computes the decomposition.
    """

    ns_steps: int | None = 5

    def __post_init__(self) -> None:
        if self.ns_steps is not None and (not isinstance(self.ns_steps, int) or self.ns_steps < 1):
            raise ValueError(f"ns_steps = {self.ns_steps!r} is out of range: None or an integer >= 1")

    def value(self, y: Tensor) -> Tensor:
        y = wide(y)
        return y.abs().sum() if y.ndim < 2 else torch.linalg.matrix_norm(y.flatten(1), "nuc")

    def grad_(self, y: Any, eps: float = EPS) -> Any:
        if y.ndim < 2:
            return y.sign_()
        return _on_whole(lambda whole: self._orthogonal(wide(whole).flatten(1), eps).to(whole).view(whole.shape), y)

    def _orthogonal(self, y: Tensor, eps: float) -> Tensor:
        if self.ns_steps is None:
            u, s, v = torch.linalg.svd(y, full_matrices=False)
            # Directions of rounding alone have no part in the gradient: it is 0 at 0.
            least = (s.max() * (max(y.shape) * torch.finfo(y.dtype).eps)).clamp(min=eps)
            return (u * (s > least).to(s)) @ v
        tall = y.shape[0] > y.shape[1]
        x = (y.mT if tall else y) / torch.linalg.vector_norm(y).clamp(min=eps)
        for _ in range(self.ns_steps):
            square = x @ x.mT
            x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
        return x.mT if tall else x

    def project(self, x: Tensor) -> Tensor:
        if x.ndim < 2:
            return x.clamp(-1, 1)
        u, s, v = torch.linalg.svd(x.flatten(1), full_matrices=False)
        return x if s.max() <= 1 else ((u * s.clamp(max=1)) @ v).view(x.shape)

    def elementwise(self, p: Tensor) -> bool:
        return p.ndim < 2

    def entry_size(self, p: Any) -> float:
        return 1.0 if p.ndim < 2 else max(p.shape[0], math.prod(p.shape[1:])) ** -0.5


def _on_whole(function: Any, y: Any) -> Any:
    """``function`` of a sharded tensor as one, sharded again; every process computes all of it."""
    if not hasattr(y, "full_tensor"):
        return function(y)
    from torch.distributed.tensor import DTensor, Replicate

    found = DTensor.from_local(function(y.full_tensor()), y.device_mesh, [Replicate()] * y.device_mesh.ndim)
    return found.redistribute(placements=y.placements)


def _shrunk(a: Tensor, c: float, r: float) -> Tensor:
    """The w >= 0 with w + c w^r = a, entry by entry."""
    if c == 0:
        return a
    # Written with an exponent R >= 1, u + ... is convex: Newton's steps from above fall on the root.
    one, other, R = (1.0, c, r) if r >= 1 else (c, 1.0, 1 / r)
    u = torch.minimum(a / one, (a / other).pow(1 / R))  # at most twice the root
    for _ in range(12):
        u = u - (one * u + other * u.pow(R) - a) / (one + other * R * u.pow(R - 1))
    return u if r >= 1 else u.pow(R)
