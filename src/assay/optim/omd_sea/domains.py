"""Convex sets that online learners stay in: their projections, in the Euclidean norm and in that of a matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from assay.optim._wrapper import total_norm


@runtime_checkable
class Domain(Protocol):
    """What ``domain=`` takes: a closed convex set with its projection. ``project_norm(x, H)`` is needed by one mode."""

    def project(self, x: Tensor) -> Tensor:
        """The nearest point of the set to every vector in the last dimension of ``x``."""


class Ball:
    """The ball of all x with ||x - center|| <= radius.

    Args:
        radius: > 0.
        center: a number, for that number in all coordinates, or a vector (d,).

    Raises:
        ValueError: radius out of range.

    >>> import torch
    >>> from assay.online import Ball
    >>> Ball(2.0).project(torch.tensor([[3.0, 4.0], [1.0, 1.0]]))
    tensor([[1.2000, 1.6000],
            [1.0000, 1.0000]])
    """

    def __init__(self, radius: float = 1.0, center: float | Tensor = 0.0) -> None:
        if not radius > 0:
            raise ValueError(f"radius = {radius!r} is out of range: a number > 0")
        self.radius, self.center = radius, center
        self._reach = float(torch.as_tensor(center).abs().max())

    def __repr__(self) -> str:
        return f"Ball({self.radius!r}, {self.center!r})"

    def project(self, x: Tensor) -> Tensor:
        """The nearest point to every vector in the last dimension of ``x``, shape (..., d)."""
        offset = x - self.center
        norm = torch.linalg.vector_norm(offset, dim=-1, keepdim=True)
        return torch.where(norm > self._limit(norm, x.dtype), self.center + offset * (self.radius / norm), x)

    def project_parts(self, parts: list[Tensor]) -> list[Tensor]:
        """:meth:`project` of the vector that these tensors make together, which need not be laid end to end."""
        centers = _split(self.center, parts)
        offsets = parts if self._reach == 0 else [x - c for x, c in zip(parts, centers, strict=True)]
        norm = norm_of(offsets)
        if norm <= self._limit(norm, parts[0].dtype):
            return parts
        scale = self.radius / norm
        return [c + offset * scale for c, offset in zip(centers, offsets, strict=True)]

    def project_norm(self, x: Tensor, H: Tensor) -> Tensor:
        """The point y of the ball with the least (y - x)^T H (y - x); ``x`` (d,), ``H`` (d, d) positive definite.

        It is y = center + (H + mu I)^-1 H (x - center), where Newton's method finds mu >= 0 with y on the sphere.
        """
        offset = x - self.center
        if offset.norm() <= self._limit(offset.norm(), x.dtype):
            return x
        target, mu = H @ offset, 0.0
        for _ in range(100):
            factor = torch.linalg.cholesky(H + mu * torch.eye(len(x), dtype=H.dtype, device=H.device))
            y = torch.cholesky_solve(target[:, None], factor)[:, 0]
            excess = (y.norm() / self.radius - 1).item()
            if excess <= 1e-14:
                break
            slope = torch.linalg.solve_triangular(factor, y[:, None], upper=False).square().sum()
            mu += (y.square().sum() / slope).item() * excess
        return self.center + y * min(1.0, (self.radius / y.norm()).item())

    def argmin(self, c: Tensor) -> Tensor:
        """The point of the ball with the least <c, x>."""
        return self.center - self.radius * c / c.norm().clamp(min=torch.finfo(c.dtype).tiny)

    def _limit(self, norm: Any, dtype: torch.dtype) -> Any:
        # What was projected must stay where it is: its norm is the radius but for rounding.
        return self.radius + 8 * torch.finfo(dtype).eps * (norm + self._reach)


class Box:
    """The box of all x with lo <= x <= hi, coordinate by coordinate.

    Args:
        lo, hi: numbers, or vectors (d,); lo <= hi.

    Raises:
        ValueError: a lower end above its upper end.

    >>> import torch
    >>> from assay.online import Box
    >>> Box(0.0, 1.0).project(torch.tensor([-1.0, 0.5, 3.0]))
    tensor([0.0000, 0.5000, 1.0000])
    """

    def __init__(self, lo: float | Tensor, hi: float | Tensor) -> None:
        if not bool((torch.as_tensor(lo) <= torch.as_tensor(hi)).all()):
            raise ValueError(f"hi = {hi!r} is out of range: at least lo = {lo!r}")
        self.lo, self.hi = lo, hi

    def __repr__(self) -> str:
        return f"Box({self.lo!r}, {self.hi!r})"

    def project(self, x: Tensor) -> Tensor:
        """The nearest point to every vector in the last dimension of ``x``, shape (..., d)."""
        return _clamp(x, self.lo, self.hi)

    def project_parts(self, parts: list[Tensor]) -> list[Tensor]:
        """:meth:`project` of the vector that these tensors make together."""
        ends = zip(parts, _split(self.lo, parts), _split(self.hi, parts), strict=True)
        return [_clamp(x, lo, hi) for x, lo, hi in ends]

    def project_norm(self, x: Tensor, H: Tensor) -> Tensor:
        """The point y of the box with the least (y - x)^T H (y - x); ``x`` (d,), ``H`` (d, d) positive definite."""
        return _by_gradients(x, H, self.project)

    def argmin(self, c: Tensor) -> Tensor:
        """A point of the box with the least <c, x>."""
        return torch.where(c > 0, _as(self.lo, c), _as(self.hi, c))


class Simplex:
    """The simplex of all x >= 0 with coordinates that sum to 1.

    >>> import torch
    >>> from assay.online import Simplex
    >>> Simplex().project(torch.tensor([0.5, 0.9, -1.0]))
    tensor([0.3000, 0.7000, 0.0000])
    """

    def __repr__(self) -> str:
        return "Simplex()"

    def project(self, x: Tensor) -> Tensor:
        """The nearest point to every vector in the last dimension of ``x``, shape (..., d)."""
        slack = 4 * x.shape[-1] * torch.finfo(x.dtype).eps
        inside = (x >= 0).all(-1, keepdim=True) & ((x.sum(-1, keepdim=True) - 1).abs() <= slack)
        falling = x.sort(-1, descending=True).values
        places = torch.arange(1, x.shape[-1] + 1, device=x.device, dtype=x.dtype)
        thresholds = (falling.cumsum(-1) - 1) / places
        last = (falling > thresholds).sum(-1, keepdim=True) - 1
        return torch.where(inside, x, (x - thresholds.gather(-1, last)).clamp(min=0))

    def project_norm(self, x: Tensor, H: Tensor) -> Tensor:
        """The point y of the simplex with the least (y - x)^T H (y - x); ``H`` (d, d) positive definite."""
        return _by_gradients(x, H, self.project)

    def argmin(self, c: Tensor) -> Tensor:
        """The corner of the simplex with the least <c, x>."""
        return torch.zeros_like(c).index_fill(0, c.argmin(), 1.0)


def norm_of(parts: Sequence[Tensor]) -> float:
    """The norm of the vector that these tensors make together, over all shards, in float32 at least."""
    if len(parts) == 1 and not hasattr(parts[0], "to_local"):  # the usual case of online learning, at a tenth the time
        x = parts[0]
        return torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32)).item()
    return total_norm(list(parts)).item()


def project_parts(domain: Domain | None, parts: list[Tensor]) -> list[Tensor]:
    """The projection of the vector that these tensors make together, in their shapes; of None, the tensors."""
    if domain is None:
        return parts
    if hasattr(domain, "project_parts"):
        return domain.project_parts(parts)
    whole = domain.project(torch.cat([x.flatten() for x in parts]))
    return [part.view_as(x) for part, x in zip(whole.split([x.numel() for x in parts]), parts, strict=True)]


def _split(value: float | Tensor, parts: list[Tensor]) -> list[float | Tensor]:
    """A number for each part, or its own piece of a vector."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return [value] * len(parts)
    if any(hasattr(x, "to_local") for x in parts):
        raise RuntimeError("a domain with a vector does not support sharded parameters: give it numbers")
    pieces = value.flatten().split([x.numel() for x in parts])
    return [piece.view_as(x).to(x) for piece, x in zip(pieces, parts, strict=True)]


def _clamp(x: Tensor, lo: float | Tensor, hi: float | Tensor) -> Tensor:
    if isinstance(lo, Tensor) or isinstance(hi, Tensor):
        return torch.minimum(torch.maximum(x, _as(lo, x)), _as(hi, x))
    return x.clamp(lo, hi)


def _as(value: float | Tensor, x: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=x.dtype, device=x.device)


def _by_gradients(x: Tensor, H: Tensor, project: Callable[[Tensor], Tensor]) -> Tensor:
    """Least (y - x)^T H (y - x) over a set, by projected gradients with momentum, to rounding."""
    values = torch.linalg.eigvalsh(H)
    largest, root = values[-1], (values[0] / values[-1]).clamp(min=0).sqrt()
    y = ahead = project(x)
    for _ in range(20_000):
        new = project(ahead - H @ (ahead - x) / largest)
        # Where momentum has led out of the set, new = y says nothing; a point that stays is the one.
        if (new - ahead).abs().max() <= 4 * torch.finfo(x.dtype).eps * (1 + new.abs().max()):
            return new
        ahead, y = new + (1 - root) / (1 + root) * (new - y), new
    return y
