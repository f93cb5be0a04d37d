"""Two-pass softmax: exponentials as pairs of mantissa and exponent, which need no maximum and lose no long sum."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from assay._checks import in_range
from assay.nn.two_pass_softmax.pairs import check, chunks, extexp, pass_1, pieces
from assay.nn.two_pass_softmax.pairs import extexp_logsumexp as extexp_logsumexp
from assay.nn.two_pass_softmax.pairs import extexp_sum as extexp_sum

BACKENDS = ("auto", "reference", "compile", "cpp", "triton")
LONG = 2**20  # elements of a row from which the error of torch's float32 sum is 1e-4 and more


def _two_pass(x: Tensor, chunk_size: int) -> Tensor:
    mantissa, exponent = pass_1(x, chunk_size)
    factor, exponent = (1 / mantissa).to(x.dtype), exponent.to(x.dtype)

    def pass_2(piece: Tensor) -> Tensor:
        mantissas, exponents = extexp(piece)
        return mantissas * factor * (exponents - exponent).exp2()

    return torch.cat([pass_2(piece) for piece in pieces(x, chunk_size)], -1)


def _shifted_exp(x: Tensor, largest: Tensor) -> Tensor:
    mantissa, exponent = extexp(x - largest)
    return mantissa * exponent.exp2()


def _sum(x: Tensor, chunk_size: int) -> Tensor:
    return chunks(x, chunk_size, 0).sum(-1, dtype=torch.float64).sum(-1, keepdim=True)


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
    check(input, dim, chunk_size, dtype)
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
    check(x, dim, 4096)
    in_range("variant", variant, variant in ("recompute", "reload"), "recompute or reload")
    return _along(x, dim, variant, 4096)


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
