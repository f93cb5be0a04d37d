"""The Gaussian kernel of tokens, and the inverse of a small one of them by Newton's iteration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from assay._checks import in_range


def gaussian_kernel(q: Tensor, k: Tensor) -> Tensor:
    """``S_ij = exp(-|q_i - k_j|^2 / 2)``, in (0, 1], shapes (..., N, d) and (..., M, d) to (..., N, M).

    >>> import torch
    >>> from assay.nn import gaussian_kernel
    >>> gaussian_kernel(torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0]])).flatten()
    tensor([1.0000, 0.6065])
    """
    halves = (0.5 * x.square().sum(-1, keepdim=True) for x in (q, k))
    return (q @ k.mT - next(halves) - next(halves).mT).clamp(max=0).exp()


def newton_pinv(A: Tensor, max_iter: int = 20, ridge: float = 0.01) -> Tensor:
    """The inverse of A + ridge I by Newton's iteration, without a solver, with the gradient of the inverse.

    ::

        A' = A + ridge I,   V = 2 c A' / |A|^2,   max_iter times V <- 2 V - V A' V        gradient: -V^T g V^T

    for |A| the largest sum of absolute values in a row (with ``ridge``, if that is large), and c = 0.9. It converges
    for symmetric positive definite A', quadratically once V is near; the backward pass takes two products, and is exact
    where V is.

    Args:
        A: shape (..., m, m), symmetric and positive (semi)definite.
        max_iter: >= 0.
        ridge: >= 0.

    Raises:
        ValueError: an argument out of range, or a matrix that is not square.

    Source: J. Lu et al., Softmax-free Linear Transformers, IJCV 2024, arXiv 2207.03341.

    >>> import torch
    >>> from assay.nn import newton_pinv
    >>> newton_pinv(torch.tensor([[2.0, 0.0], [0.0, 0.5]]), ridge=0.0).round(decimals=3)
    tensor([[0.5000, 0.0000],
            [0.0000, 2.0000]])
    """
    in_range("A", tuple(A.shape), A.dim() >= 2 and A.shape[-1] == A.shape[-2], "shape (..., m, m)")
    in_range("max_iter", max_iter, isinstance(max_iter, int) and max_iter >= 0, "an integer >= 0")
    in_range("ridge", ridge, ridge >= 0, ">= 0")
    return _NewtonInverse.apply(A, max_iter, ridge)


class _NewtonInverse(torch.autograd.Function):
    @staticmethod
    def forward(A: Tensor, max_iter: int, ridge: float) -> Tensor:
        shifted = A + ridge * torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
        largest = A.abs().sum(-1).amax(-1)[..., None, None]
        # The authors' start leaves the ridge out, which diverges where it is more than a twentieth of the largest sum.
        largest = torch.where(ridge < 0.05 * largest, largest, largest + ridge)
        V = 1.8 / largest.square() * shifted
        for _ in range(max_iter):
            V = 2 * V - V @ shifted @ V
        return V

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (V,) = ctx.saved_tensors
        return -V.mT @ grad @ V.mT, None, None
