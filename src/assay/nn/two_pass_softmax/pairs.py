"""Exponentials as pairs of mantissa and exponent, and the sums of such pairs: pass 1 of the two."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from assay._checks import in_range

PIECE = 2**16  # elements that the reference has in work at a time, outside of a compiler

_LOG2E = 1 / math.log(2)
# ln 2 in two parts: the first has 32 bits, so that its product with an exponent below 2^20 is exact.
_LN2_HIGH, _LN2_LOW = float.fromhex("0x1.62e42feep-1"), float.fromhex("0x1.a39ef35793c76p-33")
_HALF_LN2 = 0.3466
# The paper's polynomial of degree 5 for e^t on [-ln 2 / 2, ln 2 / 2], highest power first.
_POWERS = tuple(
    map(float.fromhex, ("0x1.0F9F9Cp-7", "0x1.573A1Ap-5", "0x1.555A80p-3", "0x1.FFFDC6p-2", "0x1.FFFFF6p-1", "1"))
)


def extexp(x: Tensor) -> tuple[Tensor, Tensor]:
    """The exponential as a pair (mantissa, exponent), for any finite ``x`` without overflow or underflow.

    ::

        exponent = round(x / ln 2)
        mantissa = e^(x - exponent * ln 2)              e^x = mantissa * 2^exponent

    The mantissa lies in [0.707, 1.415], the exponent is an integer kept as a floating number. The mantissa is the
    paper's polynomial of degree 5, in float64 the exponential. -inf is (0, -inf), +inf (1, inf), NaN (NaN, NaN).
    In float32 the pair is good to the last bits for |x| < 1.1e7; beyond, neighbouring inputs differ by whole
    exponents. The gradient of the mantissa is the mantissa, that of the exponent 0.

    Args:
        x: floating, any shape; half precision gives a pair in float32.

    Raises:
        ValueError: ``x`` is not floating.

    Source: M. Dukhan, A. Ablavatski, The Two-Pass Softmax Algorithm, 2020, arXiv 2001.04438.

    >>> import torch
    >>> from assay.nn.functional import extexp
    >>> extexp(torch.tensor([0.0, 1000.0]))
    (tensor([1.0000, 0.8095]), tensor([   0., 1443.]))
    """
    in_range("x.dtype", x.dtype, x.dtype.is_floating_point, "a floating dtype")
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    infinite = x.isinf()
    finite = x.masked_fill(infinite, 0)
    # In float64 throughout: a rounded product with ln 2 would cost 1e-4 of the mantissa at |x| = 1000.
    wide = finite.double()
    largest = torch.finfo(x.dtype).max
    exponent = (wide.detach() * _LOG2E).round().clamp(-largest, largest).to(x.dtype)
    whole = exponent.double()
    rest = ((wide - whole * _LN2_HIGH) - whole * _LN2_LOW).clamp(-_HALF_LN2, _HALF_LN2).to(x.dtype)
    if x.dtype == torch.float64:
        mantissa = rest.exp()
    else:
        mantissa = rest * _POWERS[0] + _POWERS[1]
        for power in _POWERS[2:]:
            mantissa = mantissa * rest + power
    return mantissa.masked_fill(x == -torch.inf, 0), torch.where(infinite, x.detach(), exponent)


def add(mantissa: Tensor, exponent: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the pairs in the last dimension, which stays with size 1, at the largest exponent; in float64."""
    if not mantissa.shape[-1]:
        shape = (*mantissa.shape[:-1], 1)
        return mantissa.new_zeros(shape).double(), exponent.new_full(shape, -torch.inf).double()
    largest = exponent.amax(-1, keepdim=True)
    # Of two pairs (0, -inf) the shift would be inf - inf.
    shift = (exponent - largest).masked_fill(exponent == -torch.inf, -torch.inf)
    return (mantissa * shift.exp2()).sum(-1, keepdim=True, dtype=torch.float64), largest.double()


def chunks(x: Tensor, chunk_size: int, filler: float) -> Tensor:
    """The last dimension as [chunks, elements of a chunk], the last chunk filled up."""
    size = x.shape[-1]
    if size <= chunk_size:
        return x.unsqueeze(-2)
    if size % chunk_size:
        x = F.pad(x, (0, -size % chunk_size), value=filler)
    return x.unflatten(-1, (-1, chunk_size))


def pieces(x: Tensor, chunk_size: int) -> tuple[Tensor, ...]:
    """``x`` cut along its last dimension, where what is computed in between would not fit in the cache."""
    if torch.compiler.is_compiling() or not x.numel():
        return (x,)
    rows = x.numel() // x.shape[-1]
    return x.split(chunk_size * max(1, PIECE // (chunk_size * rows)), -1)


def pass_1(x: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """The pair of the sum over the last dimension, which stays with size 1, in float64."""
    sums = [add(*extexp(chunks(piece, chunk_size, -torch.inf))) for piece in pieces(x, chunk_size)]
    mantissas, exponents = (torch.cat(parts, -2).squeeze(-1) for parts in zip(*sums, strict=True))
    return add(mantissas, exponents)


def check(x: Tensor, dim: int, chunk_size: int, dtype: torch.dtype | None = None) -> None:
    dtype, dims = dtype or x.dtype, max(1, x.dim())
    in_range("dtype", dtype, dtype.is_floating_point, "a floating dtype")
    in_range("dim", dim, isinstance(dim, int) and -dims <= dim < dims, f"[{-dims}, {dims - 1}]")
    in_range("chunk_size", chunk_size, isinstance(chunk_size, int) and chunk_size >= 1, "an integer >= 1")


def extexp_sum(x: Tensor, dim: int = -1, chunk_size: int = 4096) -> tuple[Tensor, Tensor]:
    """The sum of exponentials over ``dim`` as a pair (mantissa, exponent), which neither overflows nor underflows.

    ::

        sum_j e^x_j = mantissa * 2^exponent             exponent = max_j of extexp(x_j)'s

    Pairs are added at the larger exponent of the two. The mantissa is not brought back to [0.7, 1.42]: it grows to as
    much as 1.42 times the number of summands. The sum of nothing, or of e^-inf, is (0, -inf); +inf gives NaN.

    Args:
        x: floating, any shape; half precision gives a pair in float32.
        dim: the dimension that is summed.
        chunk_size: elements that are added at one exponent, >= 1.

    Raises:
        ValueError: an argument out of range.

    Source: M. Dukhan, A. Ablavatski, The Two-Pass Softmax Algorithm, 2020, arXiv 2001.04438, algorithm 3.

    >>> import torch
    >>> from assay.nn.functional import extexp_sum
    >>> extexp_sum(torch.full((8,), 1000.0))  # 8 times 0.8095 * 2^1443
    (tensor(6.4757), tensor(1443.))
    """
    check(x, dim, chunk_size)
    dtype = torch.promote_types(x.dtype, torch.float32)
    mantissa, exponent = pass_1(x.movedim(dim, -1) if x.dim() else x.unsqueeze(0), chunk_size)
    return mantissa.squeeze(-1).to(dtype), exponent.squeeze(-1).to(dtype)


def extexp_logsumexp(x: Tensor, dim: int = -1) -> Tensor:
    """log sum_j e^x_j over ``dim``, from :func:`extexp_sum`: log(mantissa) + exponent * ln 2.

    Arguments and errors as there; a result in the dtype of ``x``.

    >>> import torch
    >>> from assay.nn.functional import extexp_logsumexp
    >>> extexp_logsumexp(torch.full((8,), 1000.0))
    tensor(1002.0795)
    """
    mantissa, exponent = extexp_sum(x, dim)
    return (mantissa.double().log() + exponent.double() * math.log(2)).to(x.dtype)
