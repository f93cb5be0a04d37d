"""Sums over lists of weights and gradients, whole or sharded, and the projection that they give."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

LIST = 4_194_304
"""Elements that one list holds, unless a single tensor has more: half precision is copied to float32 list by list."""


@dataclass
class Like:
    """Weights and gradients of one device and precision, sharded alike, with their places in what was asked for."""

    mesh: Any = None
    placements: tuple[Any, ...] = ()
    places: list[int] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    size: int = 0

    def over_shards(self, sums: Tensor) -> Tensor:
        """What sums over this process's shards come to over all of them, in one message per sharded dimension."""
        if self.mesh is None:
            return sums
        from torch.distributed.tensor import DTensor, Partial, Replicate

        parts = [Partial() if placement.is_shard() else Replicate() for placement in self.placements]
        return DTensor.from_local(sums.double(), self.mesh, parts, run_check=False).full_tensor()

    def norms(self, tensors: list[Tensor]) -> Tensor:
        """The 2-norm of each tensor, shape (n,)."""
        own = torch.stack(list(torch._foreach_norm(tensors)))
        # A square would under- or overflow early, so it is taken only where shards need it, and in float64.
        return own if self.mesh is None else self.over_shards(own.double().square()).sqrt()

    def dots(self, ones: list[Tensor], others: list[Tensor]) -> Tensor:
        """The inner product of each pair, shape (n,)."""
        pairs = zip(ones, others, strict=True)
        return self.over_shards(torch.stack([torch.linalg.vecdot(x.reshape(-1), y.reshape(-1)) for x, y in pairs]))


def alike(params: Iterable[Tensor]) -> Iterator[Like]:
    """Parameters with a dense, real gradient, in lists that are run together."""
    # Sizes are those of the whole tensors, so that all processes make the same lists and meet in the same messages.
    open_lists: dict[Any, Like] = {}
    for place, p in enumerate(params):
        grad: Any = p.grad
        if grad is None or grad.layout != torch.strided or grad.is_complex() or p.is_complex():
            continue
        weight: Any = p.detach()
        mesh, placements = None, ()
        if hasattr(weight, "to_local"):
            mesh, placements = weight.device_mesh, tuple(weight.placements)
            if tuple(grad.placements) != placements:
                grad = p.grad = grad.redistribute(mesh, placements)
            weight, grad = weight.to_local(), grad.to_local()
        key = (weight.device, weight.dtype, grad.dtype, mesh, placements)
        group = open_lists.setdefault(key, Like(mesh, placements))
        if group.size and group.size + p.numel() > LIST:
            yield open_lists[key]
            group = open_lists[key] = Like(mesh, placements)
        group.places.append(place)
        group.weights.append(weight)
        group.grads.append(grad)
        group.size += p.numel()
    yield from open_lists.values()


def wide(tensors: list[Tensor]) -> list[Tensor]:
    """In float32 at least; the very tensors where they are that already."""
    return [x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]


@torch.no_grad()
def project_(params: Iterable[Tensor], rescale: bool, eps: float) -> None:
    """See :func:`assay.optim.orthogonalize_grad_`."""
    for like in alike(params):
        w, g = wide(like.weights), wide(like.grads)
        square, norm, dots = like.norms(w).square(), like.norms(g), like.dots(w, g)
        subtract(w, g, ratio(dots, square + eps))
        # Where g is nearly parallel to w, rounding leaves much of what remains along w; that is taken as well, but not
        # what eps is meant to leave.
        meant = ratio(torch.full_like(square, eps), square + eps)
        meant = torch.where(meant > torch.finfo(g[0].dtype).eps, meant, 0)
        subtract(w, g, ratio(like.dots(w, g) - meant * dots, square + eps))
        perp = like.norms(g)
        scale = ratio(norm, perp + eps) if rescale else torch.ones_like(perp)
        scale = torch.where(perp <= tiny(g[0].dtype) * norm, 0, scale)
        torch._foreach_mul_(g, list(scale.to(g[0].dtype).unbind()))
        for grad, projected in zip(like.grads, g, strict=True):
            if grad is not projected:
                grad.copy_(projected)


def ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0."""
    return torch.where(b == 0, 0, a / b)


def subtract(w: list[Tensor], g: list[Tensor], shares: Tensor) -> None:
    """g <- g - share * w, in place."""
    for x, y, share in zip(g, w, shares.to(g[0].dtype).unbind(), strict=True):
        x.addcmul_(y, share, value=-1)


def tiny(dtype: torch.dtype) -> float:
    """The share of a gradient below which what is orthogonal to the weight is rounding."""
    return 1e-12 if dtype == torch.float64 else 1e-6


@torch.no_grad()
def alignment(params: Iterable[Tensor]) -> dict[int, Tensor]:
    """|cos(w, g)|, 0-d, of each parameter that has a gradient, by its place."""
    found: dict[int, Tensor] = {}
    for like in alike(params):
        w, g = wide(like.weights), wide(like.grads)
        cosines = ratio(like.dots(w, g).abs(), like.norms(w) * like.norms(g)).clamp(max=1)
        found |= dict(zip(like.places, cosines.to(g[0].dtype).unbind(), strict=True))
    return found
