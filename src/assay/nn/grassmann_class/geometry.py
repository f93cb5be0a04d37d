"""The manifold of k-dimensional subspaces of R^n, each given by n x k orthonormal columns; all in batches."""

from __future__ import annotations

import torch
from torch import Tensor

from assay._checks import in_range


def grassmann_rgrad(S: Tensor, egrad: Tensor) -> Tensor:
    """The part of a gradient that moves subspaces: ``egrad - S S^T egrad``, tangent at S.

    Args:
        S: shape (..., n, k), orthonormal columns.
        egrad: gradient with respect to S, of its shape.

    Raises:
        ValueError: shapes that differ.

    Source: H. Wang, Z. Li, W. Zhang, Grassmann Class Representation, ICCV 2023, arXiv 2308.01547.

    >>> import torch
    >>> from assay.nn.functional import grassmann_rgrad
    >>> grassmann_rgrad(torch.tensor([[1.0], [0.0]]), torch.tensor([[5.0], [2.0]])).flatten()
    tensor([0., 2.])
    """
    _check_matrices("egrad", S, egrad)
    return egrad - S @ (S.mT @ egrad)


def grassmann_geodesic_step(S: Tensor, direction: Tensor, t: float | Tensor) -> Tensor:
    """Follow the geodesic from S along a tangent direction for time t; with minus a gradient this is descent.

    With the thin decomposition direction = U diag(s) V^T ::

        S(t) = (S V diag(cos(t s)) + U diag(sin(t s))) V^T

    The principal angles between S and S(t) are ``t s``. Columns stay orthonormal, to rounding.

    Args:
        S: shape (..., n, k), orthonormal columns.
        direction: tangent at S, ``S^T direction = 0``, of its shape; not differentiated through.
        t: a number or a tensor of one element.

    Raises:
        ValueError: shapes that differ.

    Source: H. Wang, Z. Li, W. Zhang, Grassmann Class Representation, ICCV 2023, arXiv 2308.01547.

    >>> import math, torch
    >>> from assay.nn.functional import grassmann_geodesic_step
    >>> S, direction = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [2.0]])
    >>> grassmann_geodesic_step(S, direction, math.pi / 12).flatten()
    tensor([0.8660, 0.5000])
    """
    _check_matrices("direction", S, direction)
    U, s, Vh = torch.linalg.svd(direction, full_matrices=False)
    angles = (t * s)[..., None, :]
    return ((S @ Vh.mT) * angles.cos() + U * angles.sin()) @ Vh


def _check_matrices(name: str, S: Tensor, other: Tensor) -> None:
    allowed = f"the shape of S, {tuple(S.shape)}, (..., n, k)"
    in_range(f"shape of {name}", tuple(other.shape), S.dim() >= 2 and S.shape == other.shape, allowed)


def orthonormal(S: Tensor) -> Tensor:
    """Orthonormal columns for the same subspaces, as near to S as QR gives them.

    The signs are such that R has a positive diagonal: columns that are nearly orthonormal hardly move, and a momentum
    that is given in their basis stays right.
    """
    Q, R = torch.linalg.qr(S)
    diagonal = R.diagonal(dim1=-2, dim2=-1)
    return Q * torch.where(diagonal < 0, -1, 1).to(Q.dtype)[..., None, :]


def angles_between(one: Tensor, other: Tensor) -> Tensor:
    """Principal angles of two subspaces in radians, ascending; by sines where cosines would round small ones off."""
    inner = one.mT @ other
    cosines = torch.linalg.svdvals(inner).clamp(max=1)
    sines = torch.linalg.svdvals(other - one @ inner).clamp(max=1).flip(-1)
    return torch.where(cosines.square() < 0.5, cosines.acos(), sines.asin())
