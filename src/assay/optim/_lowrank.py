"""Low-rank optimizers: what projects a matrix into a subspace and back, and the part of a step that they share.

A projector works on matrices of one shape, from the right (low = G Q, for the columns of G) or from the left
(low = Q^T G), with Q of orthonormal columns. Optimizers keep their moments in the shape of ``low``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from assay.optim._rule import RuleOptimizer

SIDES = ("right", "left")


def rank_of(rank: float, side: int) -> int:
    """The rank in numbers: an int as it is, a float as a share of ``side``; from 1 to ``side``."""
    if isinstance(rank, bool) or not rank > 0 or (isinstance(rank, float) and rank > 1):
        raise ValueError(f"rank = {rank!r} is out of range: an int >= 1 or a share in (0, 1]")
    return max(1, min(side, round(rank * side) if isinstance(rank, float) else rank))


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def _alone(sums: Tensor) -> Tensor:
    return sums


class Projector:
    """Between matrices G of one shape (n, m) and their part in a subspace of dimension r; a subclass chooses it.

    With Q of orthonormal columns, by default on the smaller side ::

        right: low = G Q,     lift(low) = low Q^T      Q is (m, r), low is (n, r)
        left:  low = Q^T G,   lift(low) = Q low        Q is (n, r), low is (r, m)

    ``update(G)`` chooses Q anew and returns G's low part, ``project`` and ``lift`` use the Q there is, and
    ``rotate(state)`` carries what was written in the Q before the last update over to the new one, by Q_before^T Q. A
    subclass states ``choose`` and ``columns``, and keeps tensors in ``memory`` only: a dict of its own, or the state
    that an optimizer lends it.

    Args:
        shape: (n, m).
        rank: r, an int >= 1 (cut to the smaller side), or a share of the smaller side in (0, 1].
        side: ``"right"`` or ``"left"``; None: right if n >= m.
    """

    rowwise: ClassVar[bool] = False
    """Whether Q depends on the rows of G (right; its columns, left) only through sums over them: see ``total``."""

    def __init__(self, shape: Sequence[int], rank: float, *, side: str | None = None) -> None:
        if len(shape) != 2:
            raise ValueError(f"shape = {tuple(shape)} is out of range: two sides")
        if side not in (None, *SIDES):
            raise ValueError(f"side = {side!r} is out of range: None, 'right' or 'left'")
        self.shape = (shape[0], shape[1])
        self.rank = rank_of(rank, min(self.shape))
        self.right = shape[0] >= shape[1] if side is None else side == "right"
        self.size = shape[1] if self.right else shape[0]
        self.memory: MutableMapping[str, Any] = {}
        self.total: Callable[[Tensor], Tensor] = _alone
        """Adds up over processes what each summed over its own rows; set by optimizers for sharded matrices."""
        self._before: Tensor | None = None

    @property
    def low_shape(self) -> tuple[int, int]:
        """The shape of G's low part."""
        return (self.shape[0], self.rank) if self.right else (self.rank, self.shape[1])

    def choose(self, G: Tensor) -> None:
        """Choose Q for this matrix, and keep it in ``memory``."""
        raise NotImplementedError

    def columns(self, dtype: torch.dtype) -> Tensor:
        """Q, shape (side, r)."""
        raise NotImplementedError

    def update(self, G: Tensor) -> Tensor:
        """Choose Q for G, and return G's low part."""
        self._before = self.columns(wide(G.dtype)) if self.memory_is_set() else None
        self.choose(G)
        return self.project(G)

    def memory_is_set(self) -> bool:
        """Whether a Q was chosen already."""
        return "basis" in self.memory

    def project(self, G: Tensor) -> Tensor:
        """The low part of G, in float32 at least."""
        G = G.to(wide(G.dtype))
        Q = self.columns(G.dtype)
        return G @ Q if self.right else Q.T @ G

    def lift(self, low: Tensor) -> Tensor:
        """The matrix (n, m) of which ``low`` is the low part, with nothing outside the subspace."""
        Q = self.columns(low.dtype)
        return low @ Q.T if self.right else Q @ low

    def rotate(self, state: Tensor) -> Tensor:
        """What ``state``, of the low shape, is in the columns chosen last; at the first choice it stays."""
        if self._before is None:
            return state
        R = self._before.T @ self.columns(self._before.dtype)
        R = R.to(state.dtype)
        return state @ R if self.right else R.T @ state

    def changed(self) -> Tensor:
        """Which of the r columns are others than before the last update, as booleans."""
        assert self._before is not None
        return torch.ones(self.rank, dtype=torch.bool, device=self._before.device)


class SVDProjector(Projector):
    """The projector on the r leading singular vectors of G: the nearest to G, and the dearest.

    Args:
        shape, rank, side: as in :class:`Projector`.
        dtype: of the stored Q; None: float32, or float64 for such matrices.

    >>> import torch
    >>> from assay.optim.lowrank import SVDProjector
    >>> G = torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]])
    >>> projector = SVDProjector(G.shape, rank=1)
    >>> projector.lift(projector.update(G)).round()
    tensor([[0., 0.],
            [0., 4.],
            [0., 0.]])
    """

    def __init__(
        self, shape: Sequence[int], rank: float, *, side: str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(shape, rank, side=side)
        self.dtype = dtype

    def choose(self, G: Tensor) -> None:
        # Half-precision singular vectors would not be orthogonal.
        left, _, right = torch.linalg.svd(G.to(wide(G.dtype)), full_matrices=False)
        basis = right[: self.rank].T if self.right else left[:, : self.rank]
        self.memory["basis"] = basis.to(self.dtype or basis.dtype).contiguous()

    def columns(self, dtype: torch.dtype) -> Tensor:
        basis: Tensor = self.memory["basis"]
        return basis.to(dtype)


class RandomProjector(Projector):
    """The projector on a random subspace, drawn anew at every update: what any choice has to beat.

    Args:
        shape, rank, side: as in :class:`Projector`.
        seed: of the draws; the k-th one of two projectors of one shape and seed is the same.

    >>> import torch
    >>> from assay.optim.lowrank import RandomProjector
    >>> projector = RandomProjector((64, 32), rank=8)
    >>> low = projector.update(torch.ones(64, 32))
    >>> low.shape, bool(torch.allclose(projector.project(projector.lift(low)), low, atol=1e-4))
    (torch.Size([64, 8]), True)
    """

    def __init__(self, shape: Sequence[int], rank: float, *, side: str | None = None, seed: int = 0) -> None:
        super().__init__(shape, rank, side=side)
        self.seed = seed

    def choose(self, G: Tensor) -> None:
        draws = int(self.memory.get("draws", 0))
        # On the CPU, so that every device draws the same.
        noise = torch.randn(self.size, self.rank, generator=torch.Generator().manual_seed(self.seed + draws))
        self.memory["basis"] = torch.linalg.qr(noise.to(G.device, wide(G.dtype))).Q
        self.memory["draws"] = torch.tensor(draws + 1)

    def columns(self, dtype: torch.dtype) -> Tensor:
        basis: Tensor = self.memory["basis"]
        return basis.to(dtype)


def gathered(x: Any) -> Tensor:
    """The whole of a sharded tensor, on every process."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def local(x: Any) -> Tensor:
    """This process's part of a sharded tensor; writing to it is writing to the tensor."""
    return x.to_local() if hasattr(x, "to_local") else x


def local_part(x: Tensor, p: Any) -> Tensor:
    """The part of a computed tensor, equal on every process, that belongs to this process's part of ``p``."""
    if not hasattr(p, "device_mesh"):
        return x
    from torch.distributed.tensor import DTensor, Replicate

    everywhere = DTensor.from_local(x, p.device_mesh, [Replicate()] * p.device_mesh.ndim)
    return everywhere.redistribute(placements=p.placements).to_local()


class Shards:
    """What a step computes with where a parameter is spread over processes; alone, every method is the identity.

    If the parameter is sharded along the side that is not projected, and the projector allows it, each process works on
    its own part (``apart``); otherwise every process gathers the whole matrix and computes the same.
    """

    def __init__(self, p: Tensor, projector: Projector) -> None:
        self.p, self.mesh = p, getattr(p, "device_mesh", None)
        self.placements = getattr(p, "placements", ())
        self.apart = False
        if self.mesh is not None:
            kept = 0 if projector.right else 1
            # A shard of another type than Shard is strided: its rows are not where its place says.
            ours = (x.is_replicate() or (type(x).__name__ == "Shard" and x.dim == kept) for x in self.placements)
            self.apart = projector.rowwise and (kept == 0 or p.dim() == 2) and all(ours)

    def take(self, x: Tensor) -> Tensor:
        """What this process computes with, of a gradient or a state."""
        if self.apart and getattr(x, "placements", self.placements) != self.placements:
            x = x.redistribute(placements=self.placements)  # type: ignore[attr-defined]
        return local(x) if self.apart else gathered(x)

    def keep(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        """A state as it is to be kept, so that a checkpoint sees one tensor of this shape."""
        if not self.apart:
            return x
        from torch.distributed.tensor import DTensor

        strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        return DTensor.from_local(x, self.mesh, self.placements, shape=torch.Size(shape), stride=strides)

    def part(self, x: Tensor) -> Tensor:
        """This process's part of a matrix that was computed."""
        return x if self.apart else local_part(x, self.p)

    def total(self, sums: Tensor) -> Tensor:
        """The sum over processes of what each has summed over its own part."""
        if not self.apart:
            return sums
        from torch.distributed.tensor import DTensor, Partial, Replicate

        placements = [Replicate() if x.is_replicate() else Partial() for x in self.placements]
        return DTensor.from_local(sums, self.mesh, placements).full_tensor()


def adam(g: Any, m: Any, v: Any, *, t: Any, betas: tuple[float, float], eps: float) -> Any:
    """Adam's direction for a gradient, on averages that it renews; of tensors, or of lists of them."""
    beta1, beta2 = betas
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    return m.div(v.sqrt().div_((1 - beta2**t) ** 0.5).add_(eps)).mul_(1 / (1 - beta1**t))


class LowRankOptimizer(RuleOptimizer):
    """An optimizer that projects the matrices among its parameters, and steps the others by its rule.

    A subclass states ``rule`` (what it does to a parameter that is not projected), ``projects`` and ``step_matrix``.
    """

    @classmethod
    def slots_of(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        return () if "projected" in options else cls.slots

    def projects(self, p: Tensor, group: Mapping[str, Any]) -> bool:
        """Whether this parameter is projected."""
        raise NotImplementedError

    def step_matrix(self, p: Tensor, g: Tensor, t: int, group: Mapping[str, Any]) -> None:
        """Step t of a projected parameter; convolution kernels count as matrices (out, -1)."""
        raise NotImplementedError

    def _step_group(self, group: dict[str, Any]) -> None:
        projected = [p.grad is not None and self.projects(p, group) for p in group["params"]]
        for p, yes in zip(group["params"], projected, strict=True):
            if yes:
                t, (_, g) = self._tensors(p, {**group, "projected": True})
                self.step_matrix(p, g, t, group)
        others = [p for p, yes in zip(group["params"], projected, strict=True) if not yes]
        super()._step_group({**group, "params": others})
