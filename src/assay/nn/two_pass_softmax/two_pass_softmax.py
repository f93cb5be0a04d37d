"""Two-pass softmax: exponentials as pairs of mantissa and exponent, which need no maximum and lose no long sum."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay._checks import in_range

BACKENDS = ("auto", "reference", "compile", "cpp", "triton")
LONG = 2**20  # elements of a row from which the error of torch's float32 sum is 1e-4 and more
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


def _add(mantissa: Tensor, exponent: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the pairs in the last dimension, which stays with size 1, at the largest exponent; in float64."""
    if not mantissa.shape[-1]:
        shape = (*mantissa.shape[:-1], 1)
        return mantissa.new_zeros(shape).double(), exponent.new_full(shape, -torch.inf).double()
    largest = exponent.amax(-1, keepdim=True)
    # Of two pairs (0, -inf) the shift would be inf - inf.
    shift = (exponent - largest).masked_fill(exponent == -torch.inf, -torch.inf)
    return (mantissa * shift.exp2()).sum(-1, keepdim=True, dtype=torch.float64), largest.double()


def _chunks(x: Tensor, chunk_size: int, filler: float) -> Tensor:
    """The last dimension as [chunks, elements of a chunk], the last chunk filled up."""
    size = x.shape[-1]
    if size <= chunk_size:
        return x.unsqueeze(-2)
    if size % chunk_size:
        x = F.pad(x, (0, -size % chunk_size), value=filler)
    return x.unflatten(-1, (-1, chunk_size))


def _pieces(x: Tensor, chunk_size: int) -> tuple[Tensor, ...]:
    """``x`` cut along its last dimension, where what is computed in between would not fit in the cache."""
    if torch.compiler.is_compiling() or not x.numel():
        return (x,)
    rows = x.numel() // x.shape[-1]
    return x.split(chunk_size * max(1, PIECE // (chunk_size * rows)), -1)


def _pass_1(x: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """The pair of the sum over the last dimension, which stays with size 1, in float64."""
    sums = [_add(*extexp(_chunks(piece, chunk_size, -torch.inf))) for piece in _pieces(x, chunk_size)]
    mantissas, exponents = (torch.cat(parts, -2).squeeze(-1) for parts in zip(*sums, strict=True))
    return _add(mantissas, exponents)


def _two_pass(x: Tensor, chunk_size: int) -> Tensor:
    mantissa, exponent = _pass_1(x, chunk_size)
    factor, exponent = (1 / mantissa).to(x.dtype), exponent.to(x.dtype)

    def pass_2(piece: Tensor) -> Tensor:
        mantissas, exponents = extexp(piece)
        return mantissas * factor * (exponents - exponent).exp2()

    return torch.cat([pass_2(piece) for piece in _pieces(x, chunk_size)], -1)


def _shifted_exp(x: Tensor, largest: Tensor) -> Tensor:
    mantissa, exponent = extexp(x - largest)
    return mantissa * exponent.exp2()


def _sum(x: Tensor, chunk_size: int) -> Tensor:
    return _chunks(x, chunk_size, 0).sum(-1, dtype=torch.float64).sum(-1, keepdim=True)


def _recompute(x: Tensor, chunk_size: int) -> Tensor:
    if not x.shape[-1]:
        return x.clone()
    largest = x.amax(-1, keepdim=True)
    total = _sum(_shifted_exp(x, largest), chunk_size)
    return _shifted_exp(x, largest) * (1 / total).to(x.dtype)


def _reload(x: Tensor, chunk_size: int) -> Tensor:
    if not x.shape[-1]:
        return x.clone()
    y = _shifted_exp(x, x.amax(-1, keepdim=True))
    return y.mul_((1 / _sum(y, chunk_size)).to(x.dtype))


@functools.cache
def _compiled() -> Callable[[Tensor, int], Tensor]:
    return torch.compile(_two_pass, fullgraph=True)


def _compile(x: Tensor, chunk_size: int) -> Tensor:
    return _two_pass(x, chunk_size) if torch.compiler.is_compiling() else _compiled()(x, chunk_size)


_ROUTES = {"reference": _two_pass, "compile": _compile, "recompute": _recompute, "reload": _reload}


class _Softmax(torch.autograd.Function):
    """Softmax over the last dimension by one of the routes; the derivative needs the output alone."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, route: str, chunk_size: int) -> Tensor:
        return _ROUTES[route](x, chunk_size)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, str, int], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (y,) = ctx.saved_tensors
        weighted = grad * y
        return weighted - y * weighted.sum(-1, keepdim=True), None, None


def _along(x: Tensor, dim: int, route: str, chunk_size: int) -> Tensor:
    """Softmax over ``dim``, in float32 at least, contiguous as torch's."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if not x.dim():
        return _Softmax.apply(wide.unsqueeze(0), route, chunk_size).squeeze(0).to(x.dtype)
    return _Softmax.apply(wide.movedim(dim, -1), route, chunk_size).movedim(-1, dim).to(x.dtype).contiguous()


def _check(x: Tensor, dim: int, chunk_size: int, dtype: torch.dtype | None = None) -> None:
    dtype, dims = dtype or x.dtype, max(1, x.dim())
    in_range("dtype", dtype, dtype.is_floating_point, "a floating dtype")
    in_range("dim", dim, isinstance(dim, int) and -dims <= dim < dims, f"[{-dims}, {dims - 1}]")
    in_range("chunk_size", chunk_size, isinstance(chunk_size, int) and chunk_size >= 1, "an integer >= 1")


def two_pass_softmax(
    input: Tensor,
    dim: int = -1,
    dtype: torch.dtype | None = None,
    *,
    backend: str = "auto",
    chunk_size: int = 4096,
    out: Tensor | None = None,
) -> Tensor:
    """Softmax without a maximum, from exponentials as pairs of mantissa and exponent; in place of ``torch.softmax``.

    ::

        e^x_i = m_i * 2^n_i                             n_i an integer: see extexp
        M 2^N = sum_j m_j 2^n_j                         pass 1, over ``dim``; N = max_j n_j
        y_i   = m_i / M * 2^(n_i - N)                   pass 2
        dx_i  = y_i (dy_i - sum_j dy_j y_j)

    The pairs of a chunk are added at the chunk's largest exponent, then the chunks in the same way, in float64: the sum
    keeps its accuracy where torch's loses it. Of 2^22 elements torch's probabilities are off by 1e-3, these by 2e-7.

    An entry of -inf gets exactly 0; a row of nothing else, or with +inf or NaN, is NaN. Half precision is computed in
    float32 and returned as it came.

    Args:
        input: floating, or any with ``dtype``; any shape.
        dim: the dimension that sums to one.
        dtype: floating; what the input is converted to first, and the result's dtype. None: the input's.
        backend: "reference", torch's operations one by one; "compile", the same through ``torch.compile``; "auto",
            the reference for rows of 2^20 elements and more, except in float64, and ``torch.softmax`` for all others,
            where it is faster and as good as float32 is. "cpp" and "triton" are kernels that are not part of this
            installation.
        chunk_size: elements that are added at one exponent, >= 1.
        out: a tensor of the result's shape and dtype to write to; not with a gradient.

    Raises:
        ValueError: an argument out of range.
        RuntimeError: "cpp" or "triton"; ``out`` with an input that requires a gradient.

    Source: M. Dukhan, A. Ablavatski, The Two-Pass Softmax Algorithm, 2020, arXiv 2001.04438.

    >>> import torch
    >>> from assay.nn.functional import two_pass_softmax
    >>> two_pass_softmax(torch.tensor([1e4, 1e4, -torch.inf]), backend="reference")
    tensor([0.5000, 0.5000, 0.0000])
    """
    _check(input, dim, chunk_size, dtype)
    in_range("backend", backend, backend in BACKENDS, ", ".join(BACKENDS))
    if backend in ("cpp", "triton"):
        raise RuntimeError(f"backend = {backend!r}: this kernel is not part of this installation")
    x = input if dtype is None else input.to(dtype)
    if out is not None:
        fits = out.shape == x.shape and out.dtype == x.dtype
        in_range("out", (tuple(out.shape), out.dtype), fits, f"shape {tuple(x.shape)} and {x.dtype}")
        if torch.is_grad_enabled() and input.requires_grad:
            raise RuntimeError("out: what is written to a given tensor has no gradient; input requires one")
    if backend == "auto":
        size = x.shape[dim] if x.dim() else 1
        if size < LONG or x.dtype == torch.float64:
            return torch.softmax(x, dim, out=out)
        backend = "reference"
    y = _along(x, dim, backend, chunk_size)
    return y if out is None else out.copy_(y)


def three_pass_softmax(x: Tensor, dim: int = -1, variant: str = "recompute") -> Tensor:
    """Softmax by the three passes that :func:`two_pass_softmax` is compared with, from the same exponential.

    ::

        mu = max_j x_j;    s = sum_j e^(x_j - mu);    y_i = e^(x_i - mu) / s        over ``dim``

    "recompute" takes the exponentials anew in the third pass: 4 n numbers read or written. "reload" keeps them in the
    output and scales that: one exponential each, 5 n numbers. (Two passes: two exponentials, 3 n numbers.)

    Args:
        x: floating, any shape.
        dim: the dimension that sums to one.
        variant: "recompute" or "reload".

    Raises:
        ValueError: an argument out of range.

    Source: M. Dukhan, A. Ablavatski, The Two-Pass Softmax Algorithm, 2020, arXiv 2001.04438.

    >>> import torch
    >>> from assay.nn.functional import three_pass_softmax
    >>> three_pass_softmax(torch.tensor([0.0, 0.0]), 0, "reload")
    tensor([0.5000, 0.5000])
    """
    _check(x, dim, 4096)
    in_range("variant", variant, variant in ("recompute", "reload"), "recompute or reload")
    return _along(x, dim, variant, 4096)


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
    _check(x, dim, chunk_size)
    dtype = torch.promote_types(x.dtype, torch.float32)
    mantissa, exponent = _pass_1(x.movedim(dim, -1) if x.dim() else x.unsqueeze(0), chunk_size)
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


class TwoPassSoftmax(nn.Module):
    """:func:`assay.nn.functional.two_pass_softmax` as a layer, in place of ``torch.nn.Softmax``.

    ::

        y_i = m_i / M * 2^(n_i - N)        e^x_i = m_i 2^n_i,  M 2^N = sum_j m_j 2^n_j over ``dim``

    Input and output have the same shape and dtype. Rows of less than 2^20 elements are left to ``torch.softmax``.

    Args:
        dim: the dimension that sums to one.

    Raises:
        ValueError: ``dim`` is no integer.

    Source: M. Dukhan, A. Ablavatski, The Two-Pass Softmax Algorithm, 2020, arXiv 2001.04438.

    >>> import torch
    >>> from assay.nn import TwoPassSoftmax
    >>> TwoPassSoftmax(dim=0)(torch.tensor([5.0, 5.0]))
    tensor([0.5000, 0.5000])
    """

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        in_range("dim", dim, isinstance(dim, int), "an integer")
        self.dim = dim

    def forward(self, input: Tensor) -> Tensor:
        return two_pass_softmax(input, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


def softmax_backend_report(n: int, repeats: int = 15) -> list[dict[str, Any]]:
    """What every backend takes on this machine for one float32 row of ``n`` normal numbers of deviation 3.

    The backends take turns, after a first round that does not count, and write to a tensor given to them.

    Args:
        n: elements of the row, >= 1.
        repeats: rounds, >= 1.

    Returns:
        For ``torch.softmax`` ("torch") and each backend its "milliseconds" (the median) and its largest relative
        "error" to float64; both None where the backend is not part of this installation.

    Raises:
        ValueError: an argument out of range.

    >>> from assay.nn.functional import softmax_backend_report
    >>> [row["backend"] for row in softmax_backend_report(50, repeats=1)]
    ['torch', 'auto', 'reference', 'compile', 'cpp', 'triton']
    """
    for name, value in (("n", n), ("repeats", repeats)):
        in_range(name, value, isinstance(value, int) and value >= 1, "an integer >= 1")
    x = 3 * torch.randn(n, generator=torch.Generator().manual_seed(0))
    exact, out = x.double().softmax(0), torch.empty(n)
    calls: dict[str, Callable[[], Tensor]] = {"torch": lambda: torch.softmax(x, 0, out=out)}
    for backend in BACKENDS:
        calls[backend] = functools.partial(two_pass_softmax, x, 0, backend=backend, out=out)
    errors: dict[str, float | None] = {}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for name, call in calls.items():
        try:
            errors[name] = ((call() - exact).abs() / exact).max().item()
        except RuntimeError:
            errors[name] = None
    for _ in range(repeats):
        for name, error in errors.items():
            if error is not None:
                start = time.perf_counter()
                calls[name]()
                times[name].append(1000 * (time.perf_counter() - start))
    return [
        {"backend": name, "milliseconds": statistics.median(times[name]) if times[name] else None, "error": error}
        for name, error in errors.items()
    ]
