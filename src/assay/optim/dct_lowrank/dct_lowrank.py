"""DCT-AdamW: Adam on the columns of a cosine basis that hold most of each gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from assay.optim._lowrank import LowRankOptimizer, Projector, Shards, adam, local, rank_of, wide
from assay.optim._rule import at_least_zero, below_one
from assay.optim.dct_lowrank.dct import dct2, dct3, dct_matrix
from assay.optim.dct_lowrank.feedback import Residual
from assay.optim.dct_lowrank.projector import BASES, NORMS, TRANSFORMS, DCTProjector, check_choice

__all__ = ["DCTAdamW", "DCTProjector", "LowRankAdamW", "dct2", "dct3", "dct_matrix"]

MOMENTS = ("low_exp_avg", "low_exp_avg_sq")


class _SubspaceAdamW(LowRankOptimizer):
    """The step of AdamW in a subspace that ``make_projector`` chooses."""

    slots = ("exp_avg", "exp_avg_sq")

    @staticmethod
    def check(options: Mapping[str, Any]) -> None:
        at_least_zero(options, "eps", "weight_decay")
        below_one(options, "betas")
        rank_of(options["rank"], 1)
        check_choice("rotate", options["rotate"], (True, False, "reference"))
        check_choice("ef_bits", options["ef_bits"], (None, 8, 4))
        for name in ("update_gap", "max_dim"):
            if not options[name] >= 1:
                raise ValueError(f"{name} = {options[name]!r} is out of range: an int >= 1")

    @staticmethod
    def rule(
        p: Any, g: Any, m: Any, v: Any, *, lr: Any, t: Any, betas: tuple[float, float], eps: float, weight_decay: float,
    ) -> None:  # fmt: skip
        p.mul_(1 - lr * weight_decay).sub_(adam(g, m, v, t=t, betas=betas, eps=eps).mul_(lr))

    def projects(self, p: Tensor, group: Mapping[str, Any]) -> bool:
        if p.dim() < 2 or p.numel() == 0:
            return False
        sides = (p.shape[0], p.numel() // p.shape[0])
        # Convolutions are no embeddings, however many numbers a kernel has.
        if p.dim() == 2 and max(sides) >= group["max_dim"]:
            return False
        return bool(group["force_lowrank"] or rank_of(group["rank"], min(sides)) < min(sides))

    def make_projector(self, shape: tuple[int, int], group: Mapping[str, Any]) -> Projector:
        """The projector of a matrix in this group."""
        raise NotImplementedError

    def step_matrix(self, p: Tensor, g: Tensor, t: int, group: Mapping[str, Any]) -> None:
        state, lr = self.state[p], group["lr"]
        projector = self.make_projector((p.shape[0], p.numel() // p.shape[0]), group)
        projector.memory = state
        shards = Shards(p, projector)
        projector.total = shards.total
        A = shards.take(g).flatten(1).to(wide(p.dtype))
        residual = Residual(state, shards, p, projector.right, group["ef_bits"])
        if group["error_feedback"]:
            A = residual.add_to(A)
        chosen = t == 1 or t % group["update_gap"] == 0
        low = projector.update(A) if chosen else projector.project(A)
        m, v = (shards.take(state[name]) if name in state else torch.zeros_like(low) for name in MOMENTS)
        if chosen and t > 1:
            m, v = _follow(projector, m, v, group["rotate"])
        if group["error_feedback"]:
            residual.keep(A - projector.lift(low))
        direction = adam(low, m, v, t=t, betas=group["betas"], eps=group["eps"])
        for name, moment in zip(MOMENTS, (m, v), strict=True):
            state[name] = shards.keep(moment, projector.low_shape)
        mine = local(p)
        update = shards.part(projector.lift(direction)).view(mine.shape)
        mine.mul_(1 - lr * group["weight_decay"]).sub_(update.mul_(lr).to(p.dtype))


def _follow(projector: Projector, m: Tensor, v: Tensor, rotate: bool | str) -> tuple[Tensor, Tensor]:
    """The moments in the columns that were just chosen."""
    if rotate == "reference":
        return m, v
    if rotate:
        return projector.rotate(m), projector.rotate(v).abs_()
    stays = ~projector.changed()
    return tuple(x * (stays if projector.right else stays[:, None]) for x in (m, v))  # type: ignore[return-value]


class DCTAdamW(_SubspaceAdamW):
    """DCT-AdamW: AdamW on the r columns of a cosine basis that hold most of each gradient; no SVD, no stored basis.

    For a matrix W (n, m) with n >= m, gradient G_t and Q the orthogonal cosine basis of side m; otherwise transposed::

        A = G_t + E                                           (without error feedback: A = G_t)
        if t = 1 or t % update_gap = 0:
            idx = the r columns of A Q with the largest norm  (DCTProjector)
            m, v <- those of columns that stay, at their new place; 0 for the others
        a = A Q[:, idx]                                       E = A - a Q[:, idx]^T
        m = beta1 * m + (1 - beta1) * a                       v = beta2 * v + (1 - beta2) * a^2
        u = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)
        W = (1 - lr * weight_decay) * W - lr * u Q[:, idx]^T

    Convolution kernels count as matrices (out, -1). Vectors, matrices with a side >= ``max_dim`` (embeddings, output
    layers) and those whose smaller side is at most r are stepped by AdamW itself. Per matrix m and v are (n, r), and
    idx is r integers; E is as large as W (in the dtype of W), or 1 or 1/2 byte an element with ``ef_bits``.

    Args:
        params: parameters, or groups of them with options of their own; real, with dense gradients.
        lr: learning rate, >= 0; a number or a tensor of one element.
        betas: decay rates of the two averages, each in [0, 1).
        eps: added to the denominator, >= 0.
        weight_decay: decoupled decay, >= 0.
        rank: r, an int >= 1, or a share of the smaller side in (0, 1].
        update_gap: steps between two choices of columns, >= 1.
        rotate: let the moments follow their columns. False: the moments of a place whose column has changed begin at 0.
            ``"reference"``: they stay at their place, and so mix different columns, as the authors' code has it.
        error_feedback: add to the next gradient what this projection left out.
        ef_bits: None keeps E whole; 8 or 4 in so many bits, by row between its smallest and largest element.
        basis: ``"dct2"``, the DCT-II; ``"dct3"``, the DCT-III, which the authors' matmul form uses.
        transform: ``"matmul"`` with one Q per size, or ``"fft"`` (also ``"makhoul"``) without any.
        norm: of the columns, 1 or 2; 2 loses least.
        max_dim: side from which a matrix is not projected, >= 1.
        force_lowrank: project also where r is the smaller side.
        maximize: ascend.
        foreach, compile: as in the other optimizers, for what is not projected.
        fused: no native kernel yet; True is refused.

    Raises:
        ValueError: an argument out of range.
        RuntimeError: a sparse gradient or a complex parameter.

    Source: I.-V. Modoranu et al., SVD-Free Low-Rank Adaptive Gradient Optimization for Large Language Models, 2025,
    arXiv 2505.17967.

    >>> import torch
    >>> from assay.optim import DCTAdamW
    >>> model = torch.nn.Linear(64, 32)
    >>> optimizer = DCTAdamW(model.parameters(), lr=1e-3, rank=8)
    >>> model(torch.randn(4, 64)).square().mean().backward()
    >>> optimizer.step()
    >>> optimizer.state[model.weight]["low_exp_avg"].shape
    torch.Size([8, 64])
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rank: float = 128,
        update_gap: int = 1,
        rotate: bool | str = True,
        error_feedback: bool = True,
        ef_bits: int | None = None,
        basis: str = "dct2",
        transform: str = "matmul",
        norm: int = 1,
        max_dim: int = 32_000,
        force_lowrank: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        compile: bool = False,
        fused: bool | None = None,
    ) -> None:
        defaults: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "rank": rank}
        defaults |= {"update_gap": update_gap, "rotate": rotate, "error_feedback": error_feedback, "ef_bits": ef_bits}
        defaults |= {"basis": basis, "transform": transform, "norm": norm}
        defaults |= {"max_dim": max_dim, "force_lowrank": force_lowrank}
        super().__init__(params, defaults, maximize=maximize, foreach=foreach, compile=compile, fused=fused)

    @staticmethod
    def check(options: Mapping[str, Any]) -> None:
        _SubspaceAdamW.check(options)
        for name, allowed in (("basis", BASES), ("transform", TRANSFORMS), ("norm", NORMS)):
            check_choice(name, options[name], allowed)

    def make_projector(self, shape: tuple[int, int], group: Mapping[str, Any]) -> Projector:
        settings = {name: group[name] for name in ("basis", "transform", "norm")}
        return DCTProjector(shape, group["rank"], **settings)


class LowRankAdamW(_SubspaceAdamW):
    """AdamW in a subspace of each matrix that any projector chooses; :class:`DCTAdamW` with another choice.

    The update is that of :class:`DCTAdamW`, for Q with orthonormal columns. A new subspace takes the moments along:
    m <- m R and v <- |v R| with R = Q_before^T Q.

    Args:
        params, lr, betas, eps, weight_decay: as in :class:`DCTAdamW`.
        projector: called with a shape (n, m) and the rank; returns a :class:`Projector`, as the class
            :class:`SVDProjector` does.
        rank, update_gap, rotate, error_feedback, ef_bits, max_dim, force_lowrank: as in :class:`DCTAdamW`.
        maximize, foreach, compile, fused: as in :class:`DCTAdamW`.

    Raises:
        ValueError: an argument out of range.
        RuntimeError: a sparse gradient or a complex parameter.

    Source: I.-V. Modoranu et al., arXiv 2505.17967, 2025; with an SVD it is close to J. Zhao et al., GaLore, ICML 2024,
    arXiv 2403.03507.

    >>> import torch
    >>> from assay.optim.lowrank import LowRankAdamW, SVDProjector
    >>> model = torch.nn.Linear(16, 8)
    >>> optimizer = LowRankAdamW(model.parameters(), projector=SVDProjector, rank=4, update_gap=10)
    >>> model(torch.randn(4, 16)).square().mean().backward()
    >>> optimizer.step()
    >>> optimizer.state[model.weight]["low_exp_avg"].shape
    torch.Size([4, 16])
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        projector: Callable[[tuple[int, int], float], Projector],
        rank: float = 128,
        update_gap: int = 1,
        rotate: bool | str = True,
        error_feedback: bool = True,
        ef_bits: int | None = None,
        max_dim: int = 32_000,
        force_lowrank: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        compile: bool = False,
        fused: bool | None = None,
    ) -> None:
        self._projector = projector
        defaults: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "rank": rank}
        defaults |= {"update_gap": update_gap, "rotate": rotate, "error_feedback": error_feedback, "ef_bits": ef_bits}
        defaults |= {"max_dim": max_dim, "force_lowrank": force_lowrank}
        super().__init__(params, defaults, maximize=maximize, foreach=foreach, compile=compile, fused=fused)

    def make_projector(self, shape: tuple[int, int], group: Mapping[str, Any]) -> Projector:
        return self._projector(shape, group["rank"])

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_projector": self._projector}
