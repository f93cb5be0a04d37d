"""The projector on chosen columns of a cosine basis: what it remembers of a matrix is r numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from assay.optim._lowrank import Projector, wide
from assay.optim.dct_lowrank.dct import dct2, dct3, dct_matrix

BASES, TRANSFORMS, NORMS = ("dct2", "dct3"), ("matmul", "fft", "makhoul"), (1, 2)


class DCTProjector(Projector):
    """The projector on the r columns of a fixed cosine basis that hold most of a matrix; no SVD, and no basis to store.

    With Q the orthogonal cosine basis of G's projected side (right; the left is its transpose) ::

        S     = G Q                                           the DCT of every row
        score = ||S[:, j]||                                   of each column j
        idx   = the r columns with the largest score, ascending
        low   = S[:, idx] = G Q[:, idx]                       lift(low) = low Q[:, idx]^T

    ``memory`` holds ``indices`` alone. What is lost is known: ``||G - lift(low)||^2`` is ``||G||^2`` less the squares
    of the chosen ``||S[:, j]||``; with norm 2 it is the least among all choices of r columns. Columns of two choices
    are equal or orthogonal, so ``rotate`` moves what stays to its new place and begins the others at zero.

    Args:
        shape: (n, m) of the matrices.
        rank: r, an int >= 1 (cut to the smaller side), or a share of the smaller side in (0, 1].
        side: ``"right"`` or ``"left"``; None: right if n >= m.
        basis: ``"dct2"``, Q = C^T with C = :func:`dct_matrix`, or ``"dct3"``, Q = C.
        transform: ``"matmul"`` keeps one Q per size for all projectors; ``"fft"`` (or ``"makhoul"``, its author) needs
            n m log m operations and no Q. The numbers are the same.
        norm: of the scores, 1 or 2.

    Raises:
        ValueError: an argument out of range.

    Source: I.-V. Modoranu et al., arXiv 2505.17967, 2025.

    >>> import torch
    >>> from assay.optim.lowrank import DCTProjector
    >>> projector = DCTProjector((4, 3), rank=1)
    >>> low = projector.update(torch.ones(4, 3))
    >>> projector.indices, projector.lift(low).allclose(torch.ones(4, 3))
    (tensor([0], dtype=torch.int32), True)
    """

    rowwise = True

    def __init__(
        self,
        shape: Sequence[int],
        rank: float,
        *,
        side: str | None = None,
        basis: str = "dct2",
        transform: str = "matmul",
        norm: int = 1,
    ) -> None:
        super().__init__(shape, rank, side=side)
        check_choice("basis", basis, BASES)
        check_choice("transform", transform, TRANSFORMS)
        check_choice("norm", norm, NORMS)
        self.basis, self.norm, self.fft = basis, norm, transform != "matmul"

    @property
    def indices(self) -> Tensor:
        """The columns chosen last, ascending, (r,) int32."""
        found: Tensor = self.memory["indices"]
        return found

    @property
    def axis(self) -> int:
        """The dimension of G and of ``low`` that the columns are numbered along."""
        return 1 if self.right else 0

    def memory_is_set(self) -> bool:
        return "indices" in self.memory

    def transformed(self, G: Tensor) -> Tensor:
        """S, shape (n, m): all of G in the cosine basis."""
        G = G.to(wide(G.dtype))
        if self.fft:
            return dct2(G, self.axis) if self.basis == "dct2" else dct3(G, self.axis)
        C = dct_matrix(self.size, G.dtype, G.device)
        Q = C.T if self.basis == "dct2" else C
        return G @ Q if self.right else Q.T @ G

    def update(self, G: Tensor) -> Tensor:
        S = self.transformed(G)
        self._before = self.memory.get("indices")
        sizes = S.abs() if self.norm == 1 else S.square()
        scores = self.total(sizes.sum(1 - self.axis))
        # Stable, so that equal scores choose the same columns everywhere.
        best = scores.sort(descending=True, stable=True).indices[: self.rank]
        self.memory["indices"] = best.sort().values.to(torch.int32)
        return S.index_select(self.axis, self.indices)

    def columns(self, dtype: torch.dtype) -> Tensor:
        C = dct_matrix(self.size, dtype, self.indices.device)
        return C.index_select(0, self.indices).T if self.basis == "dct2" else C.index_select(1, self.indices)

    def project(self, G: Tensor) -> Tensor:
        return self.transformed(G).index_select(self.axis, self.indices) if self.fft else super().project(G)

    def lift(self, low: Tensor) -> Tensor:
        if not self.fft:
            return super().lift(low)
        full = (low.shape[0], self.size) if self.right else (self.size, low.shape[1])
        S = low.new_zeros(full).index_copy_(self.axis, self.indices.long(), low)
        return dct3(S, self.axis) if self.basis == "dct2" else dct2(S, self.axis)

    def rotate(self, state: Tensor) -> Tensor:
        if self._before is None:
            return state
        place = torch.searchsorted(self._before, self.indices).clamp_(max=self.rank - 1)
        stays = self._before[place] == self.indices
        return state.index_select(self.axis, place).mul_(stays if self.right else stays[:, None])

    def changed(self) -> Tensor:
        assert self._before is not None
        return self._before != self.indices


def check_choice(name: str, value: object, allowed: Sequence[object]) -> None:
    """Refuse a value that is not one of the few allowed."""
    if value not in allowed:
        raise ValueError(f"{name} = {value!r} is out of range: {', '.join(map(repr, allowed))}")
