"""The one form: a linear system with a diagonal transition that varies in time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from assay._checks import in_range
from assay.nn._scan import linear_scan


@dataclass(frozen=True)
class LTVSystem:
    """A causal map of sequences, computed as a recurrence, as a convolution or as one matrix.

    ::

        h_i = Lambda_i * h_{i-1} + B_i u_i,   h_{-1} = 0
        y_i = C_i h_i + D_i u_i = sum_{j <= i} C_i (Lambda_i ... Lambda_{j+1}) B_j u_j + D_i u_i

    Lambda is diagonal. All three ways give the same; they cost O(L N), O(L^2 N) and O(L^2 N d) for N states.

    Args:
        Lambda: shape (..., L, N).
        B: shape (..., L, N, d_in).
        C: shape (..., L, d_out, N).
        D: shape (..., L, d_out, d_in), or None for 0.

    Inputs u have shape (..., L, d_in), outputs (..., L, d_out).

    Raises:
        ValueError: shapes that do not fit.

    Source: J. Sieber et al., Understanding the differences in Foundation Models, NeurIPS 2024, arXiv 2405.15731.

    >>> import torch
    >>> from assay.nn.dsf import LTVSystem
    >>> ones = torch.ones(3, 1, 1)
    >>> system = LTVSystem(torch.full((3, 1), 0.5), ones, ones)  # y_i = y_{i-1} / 2 + u_i
    >>> system.recurrent(torch.tensor([[1.0], [0.0], [4.0]])).flatten()
    tensor([1.0000, 0.5000, 4.2500])
    >>> system.attention_matrix()
    tensor([[1.0000, 0.0000, 0.0000],
            [0.5000, 1.0000, 0.0000],
            [0.2500, 0.5000, 1.0000]])
    """

    Lambda: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None = None

    def __post_init__(self) -> None:
        steps = self.Lambda.shape[-2:]
        in_range("B", tuple(self.B.shape), self.B.shape[-3:-1] == steps, f"(..., L, N, d_in), (L, N) = {tuple(steps)}")
        good = (self.C.shape[-3], self.C.shape[-1]) == tuple(steps)
        in_range("C", tuple(self.C.shape), good, f"(..., L, d_out, N), (L, N) = {tuple(steps)}")
        if self.D is not None:
            wanted = (steps[0], self.C.shape[-2], self.B.shape[-1])
            in_range("D", tuple(self.D.shape), tuple(self.D.shape[-3:]) == wanted, f"(..., L, d_out, d_in) = {wanted}")

    @property
    def state_dim(self) -> int:
        """N."""
        return self.Lambda.shape[-1]

    def is_stable(self) -> bool:
        """Whether no state ever grows by itself."""
        return bool((self.Lambda.abs() <= 1).all())

    def recurrent(self, u: Tensor) -> Tensor:
        """The output, step by step in one scan."""
        states = linear_scan(self.Lambda, (self.B @ u.unsqueeze(-1)).squeeze(-1), dim=-2)
        return self._read(states, u)

    def convolution(self, u: Tensor) -> Tensor:
        """The output, summed over lags: each step's own kernel against the inputs behind it."""
        inputs = (self.B @ u.unsqueeze(-1)).squeeze(-1)
        weight, states = torch.ones_like(self.Lambda), inputs
        for lag in range(1, self.Lambda.shape[-2]):
            weight = weight * _delayed(self.Lambda, lag - 1)
            states = states + weight * _delayed(inputs, lag)
        return self._read(states, u)

    def _read(self, states: Tensor, u: Tensor) -> Tensor:
        y = (self.C @ states.unsqueeze(-1)).squeeze(-1)
        return y if self.D is None else y + (self.D @ u.unsqueeze(-1)).squeeze(-1)

    def attention_matrix(self) -> Tensor:
        """The matrix (..., L d_out, L d_in) that maps the flattened input to the flattened output, lower triangular."""
        steps, rows = self.Lambda.shape[-2], []
        reached = self.B[..., :0, :, :]
        for i in range(steps):
            reached = torch.cat([reached * self.Lambda[..., i, None, :, None], self.B[..., i : i + 1, :, :]], -3)
            row = self.C[..., i, None, :, :] @ reached
            if self.D is not None:
                row = torch.cat([row[..., :-1, :, :], row[..., -1:, :, :] + self.D[..., i : i + 1, :, :]], -3)
            rows.append(F.pad(row, (0, 0, 0, 0, 0, steps - i - 1)))
        return torch.stack(rows, -4).transpose(-3, -2).flatten(-2).flatten(-3, -2)

    def padded(self, state_dim: int) -> LTVSystem:
        """The same map with further states that nothing enters: a larger system contains every smaller one."""
        in_range("state_dim", state_dim, state_dim >= self.state_dim, f">= {self.state_dim}")
        more = state_dim - self.state_dim
        return LTVSystem(
            F.pad(self.Lambda, (0, more)), F.pad(self.B, (0, 0, 0, more)), F.pad(self.C, (0, more)), self.D
        )


def _delayed(x: Tensor, lag: int) -> Tensor:
    """x (..., L, N) moved ``lag`` steps on, 0 before."""
    return F.pad(x, (0, 0, lag, 0))[..., : x.shape[-2], :]


def equivalent(one: LTVSystem, other: LTVSystem, atol: float = 1e-10) -> bool:
    """Whether two systems are the same map of inputs, whatever their states.

    Args:
        one, other: of equal length and widths.
        atol: largest difference of an entry of their matrices.

    >>> import torch
    >>> from assay.nn.dsf import LTVSystem, equivalent
    >>> system = LTVSystem(torch.rand(4, 2), torch.rand(4, 2, 3), torch.rand(4, 3, 2))
    >>> equivalent(system, system.padded(5))
    True
    """
    return bool((one.attention_matrix() - other.attention_matrix()).abs().max() <= atol)
