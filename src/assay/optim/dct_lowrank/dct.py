"""The orthogonal discrete cosine transform, as a matrix and by FFT."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor


def dct_matrix(n: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """The orthogonal DCT-II matrix C, shape (n, n), made once per size, dtype and device: do not write to it.

    ::

        C[i, j] = sqrt(2 / n) * cos(pi i (2j + 1) / (2n)),        row 0 times 1 / sqrt(2)

    ``x @ C.T`` is :func:`dct2`, ``x @ C`` is :func:`dct3`.

    >>> from assay.optim.lowrank import dct_matrix
    >>> dct_matrix(2)
    tensor([[ 0.7071,  0.7071],
            [ 0.7071, -0.7071]])
    """
    if n < 1:
        raise ValueError(f"n = {n!r} is out of range: an int >= 1")
    return _matrix(n, dtype, torch.device(device))


@functools.cache
def _matrix(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    i = torch.arange(n)
    # Turned back below one period as integers: a large angle would cost digits of the cosine.
    angle = torch.outer(i, 2 * i + 1).remainder_(4 * n)
    C = angle.double().mul_(math.pi / (2 * n)).cos_().mul_(math.sqrt(2 / n))
    C[0] = math.sqrt(1 / n)
    return C.to(device, dtype)


@functools.cache
def _turns(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """sqrt(2 / n) exp(-i pi k / (2n)) for k = 0 ... n // 2, the first one sqrt(1 / n)."""
    k = torch.arange(n // 2 + 1, dtype=torch.float64)
    turns = torch.polar(torch.full_like(k, math.sqrt(2 / n)), -math.pi / (2 * n) * k)
    turns[0] = math.sqrt(1 / n)
    return turns.to(device, dtype.to_complex())


def dct2(x: Tensor, dim: int = -1) -> Tensor:
    """The orthonormal DCT-II along a dimension, in n log n time.

    ::

        X_k = s_k sum_j x_j cos(pi k (2j + 1) / (2n)),        s_0 = sqrt(1 / n), else s_k = sqrt(2 / n)

    By one real FFT of the even entries followed by the odd ones in reverse (J. Makhoul, 1980).

    Args:
        x: real, any shape; half precision is computed in float32.
        dim: of length n >= 1.

    >>> import torch
    >>> from assay.optim.lowrank import dct2
    >>> dct2(torch.tensor([1.0, -1.0]))
    tensor([0.0000, 1.4142])
    """
    y = x.movedim(dim, -1).to(torch.promote_types(x.dtype, torch.float32))
    n = y.shape[-1]
    V = torch.fft.rfft(torch.cat([y[..., ::2], y[..., 1::2].flip(-1)], -1)).mul_(_turns(n, y.dtype, y.device))
    # The other half of the FFT is its mirror image, and so the X_k beyond n / 2 are imaginary parts.
    X = torch.cat([V.real, V.imag[..., 1 : n - n // 2].flip(-1).neg_()], -1)
    return X.to(x.dtype).movedim(-1, dim)


def dct3(x: Tensor, dim: int = -1) -> Tensor:
    """The orthonormal DCT-III along a dimension, the inverse of :func:`dct2`, in n log n time.

    Args:
        x: real, any shape; half precision is computed in float32.
        dim: of length n >= 1.

    >>> import torch
    >>> from assay.optim.lowrank import dct2, dct3
    >>> dct3(dct2(torch.tensor([1.0, 2.0, 3.0]))).round()
    tensor([1., 2., 3.])
    """
    X = x.movedim(dim, -1).to(torch.promote_types(x.dtype, torch.float32))
    n = X.shape[-1]
    half = n // 2 + 1
    mirror = torch.zeros_like(X[..., :half])
    mirror[..., 1:] = X[..., n - half + 1 :].flip(-1)
    V = torch.complex(X[..., :half].contiguous(), mirror.neg_()).div_(_turns(n, X.dtype, X.device))
    y = torch.fft.irfft(V, n=n)
    x_ = torch.empty_like(y)
    x_[..., ::2] = y[..., : (n + 1) // 2]
    x_[..., 1::2] = y[..., (n + 1) // 2 :].flip(-1)
    return x_.to(x.dtype).movedim(-1, dim)
