"""The soft top-k operator: sigmoids that share a threshold and sum to k."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from assay.losses.decoupled_softmax.sharded import Group, largest_of, logsumexp_of, total_of

Chunks = Callable[[], Iterable[Tensor]]
"""Gives the columns of a matrix (N, C), some at a time; those of score -inf take no part."""


def soft_topk(x: Tensor, k: int | Tensor, alpha: float = 1.0, n_iter: int = 64, *, group: Group = None) -> Tensor:
    """A smooth indicator of each row's k largest entries.

    ``y_c = sigmoid(alpha (x_c + t))`` where t, one number a row, solves ``sum_c y_c = k``; it is found by bisection.
    For alpha -> inf, y is 1 at the k largest and 0 elsewhere; for alpha -> 0 it is k / C everywhere. An entry of -inf
    has y = 0. With v_c = alpha y_c (1 - y_c), the gradient follows from the equation for t ::

        d y_c / d x_j = v_c ([c = j] - v_j / sum v)

    Args:
        x: (N, C), floating point; half precision is computed in float32.
        k: an integer in [1, C - 1], or one for each row (N,).
        alpha: sharpness, above 0.
        n_iter: halvings of the interval of t, at least 1; each costs a pass over x.
        group: the process group over whose ranks the columns are cut; None: all columns are here.

    Returns:
        y (N, C), rows that sum to k: to about 1e-6 with 32 halvings, 1e-10 with 64 in float64.

    Raises:
        ValueError: an argument out of range.

    Source:
        Gupta et al.: Dual-encoders for Extreme Multi-label Classification, ICLR 2024, arXiv 2310.10636.

    Example:
        >>> import torch
        >>> from assay.losses import soft_topk
        >>> soft_topk(torch.tensor([[3.0, 2.0, 0.0, -1.0]]), k=2)
        tensor([[0.8808, 0.7311, 0.2689, 0.1192]])
    """
    return torch.sigmoid(_exponents(x, k, alpha, n_iter, group)).to(x.dtype)


def log_soft_topk(x: Tensor, k: int | Tensor, alpha: float = 1.0, n_iter: int = 64, *, group: Group = None) -> Tensor:
    """The logarithm of :func:`soft_topk`, exact also where it is tiny.

    ``log y_c = z_c - log(1 + exp(z_c))`` with z = alpha (x + t); ``d log y_c / d x_j = alpha (1 - y_c) ([c = j] - v_j
    / sum v)``.

    Args:
        x, k, alpha, n_iter, group: as in :func:`soft_topk`.

    Returns:
        log y (N, C).

    Raises:
        ValueError: an argument out of range.

    Source:
        Gupta et al., arXiv 2310.10636.

    Example:
        >>> import torch
        >>> from assay.losses import log_soft_topk
        >>> log_soft_topk(torch.tensor([[3.0, 2.0, 0.0, -1.0]]), k=2)
        tensor([[-0.1269, -0.3133, -1.3133, -2.1269]])
    """
    return F.logsigmoid(_exponents(x, k, alpha, n_iter, group)).to(x.dtype)


def _exponents(x: Tensor, k: int | Tensor, alpha: float, n_iter: int, group: Group) -> Tensor:
    """alpha (x + t)."""
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"x = {x.dtype} of shape {tuple(x.shape)} is out of range: floating point (N, C)")
    check_bisection(alpha, n_iter)
    check_k(k, len(x), x.shape[1] if group is None else None)
    shifted = centred(x.to(torch.promote_types(x.dtype, torch.float32)), group)
    return alpha * (shifted + threshold(shifted, k, alpha, n_iter, group))


def check_bisection(alpha: float, n_iter: int) -> None:
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha = {alpha!r} is out of range: above 0")
    if isinstance(n_iter, bool) or not isinstance(n_iter, int) or n_iter < 1:
        raise ValueError(f"n_iter = {n_iter!r} is out of range: an integer >= 1")


def check_k(k: Any, rows: int, columns: int | None) -> None:
    """``columns`` is None where they are cut over ranks, of which each knows only its own."""
    if isinstance(k, Tensor):
        if k.shape != (rows,) or k.is_floating_point() or k.dtype == torch.bool:
            raise ValueError(f"k = {k.dtype} of shape {tuple(k.shape)} is out of range: integers ({rows},)")
        if k.device.type != "cpu" or torch.compiler.is_compiling():
            return  # a look at its values would make the device wait
        values = k.tolist()
    elif isinstance(k, int) and not isinstance(k, bool):
        values = [k]
    else:
        raise ValueError(f"k = {k!r} is out of range: an integer, or one a row")
    for value in values:
        if value < 1 or (columns is not None and value >= columns):
            allowed = "an integer >= 1" if columns is None else f"an integer in [1, {columns - 1}]"
            raise ValueError(f"k = {value} is out of range: {allowed}")


def centred(x: Tensor, group: Group = None) -> Tensor:
    """x with 0 as largest entry of each row, for precision; nothing here depends on a row's offset."""
    return x - largest_of(x.detach().amax(1, keepdim=True), group)


def threshold(x: Tensor, k: int | Tensor, alpha: float, n_iter: int, group: Group = None) -> Tensor:
    """t (N, 1) with ``sum_c sigmoid(alpha (x_c + t)) = k``, differentiable with respect to x (N, C)."""
    return _Threshold.apply(x, k, alpha, n_iter, group)


class _Threshold(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, k: int | Tensor, alpha: float, n_iter: int, group: Group) -> Tensor:
        t = bisected(lambda: (x,), k, alpha, n_iter, group)
        ctx.save_for_backward(x, t)
        ctx.alpha, ctx.group = alpha, group
        return t

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, t = ctx.saved_tensors
        # dt/dx_c = - v_c / sum v. As a softmax of log v it has a value also where every y is 0 or 1 in floating point.
        log_v = log_slopes(ctx.alpha * (x + t))
        shares = torch.exp(log_v - logsumexp_of(log_v, ctx.group))
        return -total_of(gradients[0], ctx.group) * shares, None, None, None, None


def log_slopes(z: Tensor) -> Tensor:
    """log of y (1 - y) for y = sigmoid(z)."""
    return F.logsigmoid(z) + F.logsigmoid(-z)


def bisected(chunks: Chunks, k: int | Tensor, alpha: float, n_iter: int, group: Group = None) -> Tensor:
    """The threshold (N, 1) by halving; no gradient."""
    wanted = k[:, None] if isinstance(k, Tensor) else k
    top = bottom = None
    for x in chunks():
        # An entry of -inf takes no part, and must not make the interval infinite.
        lowest = -x.masked_fill(x.isneginf(), math.inf).amin(1, keepdim=True)
        highest = x.amax(1, keepdim=True)
        top = highest if top is None else torch.maximum(top, highest)
        bottom = lowest if bottom is None else torch.maximum(bottom, lowest)
    assert top is not None and bottom is not None
    lo, hi = -largest_of(top, group) - 10 / alpha, largest_of(bottom, group) + 10 / alpha
    for _ in range(n_iter):
        middle = (lo + hi) / 2
        mass = sum(torch.sigmoid(alpha * (x + middle)).sum(1, keepdim=True) for x in chunks())
        low = total_of(torch.as_tensor(mass), group) < wanted
        lo, hi = torch.where(low, middle, lo), torch.where(low, hi, middle)
    return (lo + hi) / 2
