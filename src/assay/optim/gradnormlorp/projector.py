"""GaLore's projector: the leading singular vectors of a gradient, kept for many steps."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from assay.optim._lowrank import SVDProjector, rank_of, wide

TYPES = ("std", "reverse_std", "right", "left", "full")


class GaLoreProjector:
    """GaLore's projector of a gradient G (out, in) on its r leading singular vectors, renewed every few steps.

    With the thin SVD U S V^T of the gradient at a renewal ::

        right: low = G P^T,       back(low) = scale * low P            P = V^T[:r],  low is (out, r)
        left:  low = P^T G,       back(low) = scale * P low            P = U[:, :r], low is (r, in)
        full:  low = L^T G P^T,   back(low) = scale * L low P          L = U[:, :r], low is (r, r)

    ``proj_type`` ``"std"`` is right where out >= in and left elsewhere, which makes P the smaller; ``"reverse_std"`` is
    the other way round. At a renewal ``project_back(project(G))`` is ``scale`` times the nearest matrix of rank r.

    Args:
        rank: r, an int >= 1 (cut to the smaller side), or a share of the smaller side in (0, 1].
        update_proj_gap: steps between two renewals, >= 1.
        scale: factor of what goes back.
        proj_type: ``"std"``, ``"reverse_std"``, ``"right"``, ``"left"`` or ``"full"``.
        dtype: of the stored P; None: that of the gradients.

    Raises:
        ValueError: an argument out of range.

    Source: J. Zhao et al., GaLore, ICML 2024, arXiv 2403.03507.

    >>> import torch
    >>> from assay.optim import GaLoreProjector
    >>> projector = GaLoreProjector(rank=2, update_proj_gap=50)
    >>> low = projector.project(torch.randn(6, 4))
    >>> low.shape, projector.project_back(low).shape
    (torch.Size([6, 2]), torch.Size([6, 4]))
    """

    def __init__(
        self,
        rank: float,
        update_proj_gap: int = 200,
        scale: float = 1.0,
        proj_type: str = "std",
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        rank_of(rank, 1)
        if proj_type not in TYPES:
            raise ValueError(f"proj_type = {proj_type!r} is out of range: {', '.join(map(repr, TYPES))}")
        if not update_proj_gap >= 1:
            raise ValueError(f"update_proj_gap = {update_proj_gap!r} is out of range: an int >= 1")
        self.rank, self.update_proj_gap, self.scale, self.proj_type = rank, update_proj_gap, scale, proj_type
        self.dtype = dtype
        self.memory: MutableMapping[str, Any] = {}
        """The tensors that are kept: a dict of its own, or the state that an optimizer lends."""
        self._calls = 0

    def project(self, grad: Tensor, step: int | None = None) -> Tensor:
        """The low part of a gradient (out, in), in float32 at least; P is renewed first where it is due.

        ``step`` counts from 0; None: as many as there were calls.
        """
        if grad.dim() != 2:
            raise ValueError(f"grad.shape = {tuple(grad.shape)} is out of range: (out, in)")
        step = self._calls if step is None else step
        self._calls = step + 1
        sides = self._sides(grad.shape)
        low = grad.to(wide(grad.dtype))
        if step % self.update_proj_gap == 0 or not self.memory.keys() >= {f"basis_{side}" for side in sides}:
            self._renew(low, sides, self.dtype or grad.dtype)
        if "left" in sides:
            low = self._basis("left", low).T @ low
        return low @ self._basis("right", low) if "right" in sides else low

    def project_back(self, low: Tensor) -> Tensor:
        """``scale`` times the matrix (out, in) of which ``low`` is the low part."""
        if "basis_left" in self.memory:
            low = self._basis("left", low) @ low
        if "basis_right" in self.memory:
            low = low @ self._basis("right", low).T
        return low * self.scale

    def state_dict(self) -> dict[str, Any]:
        """The stored bases, and how many gradients were projected."""
        kept = {name: value for name, value in self.memory.items() if name.startswith("basis_")}
        return {**kept, "calls": self._calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self.memory.update({name: value for name, value in state.items() if name != "calls"})
        self._calls = state["calls"]

    def _sides(self, shape: Sequence[int]) -> tuple[str, ...]:
        if self.proj_type == "full":
            return ("left", "right")
        if self.proj_type in ("right", "left"):
            return (self.proj_type,)
        return ("right",) if (shape[0] >= shape[1]) == (self.proj_type == "std") else ("left",)

    def _renew(self, G: Tensor, sides: Sequence[str], dtype: torch.dtype) -> None:
        made = SVDProjector(G.shape, self.rank, side=sides[0], dtype=dtype)
        if len(sides) == 1:
            made.choose(G)
            self.memory[f"basis_{sides[0]}"] = made.memory["basis"]
        else:  # one decomposition for both
            left, _, right = torch.linalg.svd(G, full_matrices=False)
            self.memory["basis_left"] = left[:, : made.rank].to(dtype).contiguous()
            self.memory["basis_right"] = right[: made.rank].T.to(dtype).contiguous()

    def _basis(self, side: str, like: Tensor) -> Tensor:
        basis: Tensor = self.memory[f"basis_{side}"]
        return basis.to(like.dtype)
