"""StableMax: softmax with a ramp in place of the exponential, so that a confident answer keeps its gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay._checks import in_range


class _LogRamp(torch.autograd.Function):
    """log s(x) = sign(x) log(1 + |x|), with its derivative 1 / (1 + |x|).

    Automatic differentiation would make the derivative at 0 a 0, as that of |x| is, and a layer of zeros would never
    learn. What is kept for the backward pass is the input as it came, not its copy in ``dtype``.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, dtype: torch.dtype) -> Tensor:
        x = input.to(dtype)
        return x.abs().log1p_().copysign_(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, torch.dtype], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (input,) = ctx.saved_tensors
        return (grad / (input.to(grad.dtype).abs() + 1)).to(input.dtype), None


def _log_ramp(input: Tensor, dtype: torch.dtype | None) -> Tensor:
    """log s(input), computed in ``dtype`` (None: the input's), but in float32 at least."""
    dtype = input.dtype if dtype is None else dtype
    in_range("dtype", dtype, dtype.is_floating_point, "a floating dtype")
    return _LogRamp.apply(input, torch.promote_types(dtype, torch.float32))


def stablemax(input: Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> Tensor:
    """Probabilities from logits by a ramp s in place of softmax's exponential.

    ::

        s(x) = x + 1 if x >= 0, else 1 / (1 - x)
        p_i  = s(input_i) / sum_j s(input_j)                        sums over ``dim``

    It is softmax of sign(x) log(1 + |x|), which is how it is computed. The order of the logits is kept. Unlike softmax
    it changes when a number is added to all logits, or when they are multiplied: zero and scale have a meaning.

    A logit of -inf gets probability 0 and gradient 0, as in a mask; a slice of nothing else gives NaN, as does +inf.
    Half precision is computed in float32 and returned as it came.

    Args:
        input: floating, any shape.
        dim: the dimension that sums to one.
        dtype: floating; what the input is converted to first, and the result's dtype. None: the input's.

    Raises:
        ValueError: a dtype that is not floating.

    Source: L. Prieto et al., Grokking at the Edge of Numerical Stability, ICLR 2025, arXiv 2501.04697, equation 6.

    >>> import torch
    >>> from assay.nn.functional import stablemax
    >>> stablemax(torch.tensor([3.0, 0.0, -1.0]))  # 4 : 1 : 1/2
    tensor([0.7273, 0.1818, 0.0909])
    """
    return F.softmax(_log_ramp(input, dtype), dim).to(dtype or input.dtype)


def log_stablemax(input: Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> Tensor:
    """The logarithm of :func:`stablemax`, computed without a quotient; arguments as there.

    ::

        log p_i = sign(input_i) log(1 + |input_i|) - log sum_j s(input_j)
        d log p_i / d input_k = ([i = k] - p_k) / (1 + |input_k|)

    Raises:
        ValueError: a dtype that is not floating.

    Source: L. Prieto et al., Grokking at the Edge of Numerical Stability, ICLR 2025, arXiv 2501.04697.

    >>> import torch
    >>> from assay.nn.functional import log_stablemax
    >>> log_stablemax(torch.tensor([3.0, 0.0, -1.0])).exp()
    tensor([0.7273, 0.1818, 0.0909])
    """
    return F.log_softmax(_log_ramp(input, dtype), dim).to(dtype or input.dtype)


class StableMax(nn.Module):
    """:func:`assay.nn.functional.stablemax` as a layer, in place of ``torch.nn.Softmax``.

    ::

        s(x) = x + 1 if x >= 0, else 1 / (1 - x);    y_i = s(x_i) / sum_j s(x_j) over ``dim``

    Input and output have the same shape and dtype; a logit of -inf gets weight 0, so it may stand in attention.

    Args:
        dim: the dimension that sums to one.

    Raises:
        ValueError: ``dim`` is no integer.

    Source: L. Prieto et al., Grokking at the Edge of Numerical Stability, ICLR 2025, arXiv 2501.04697.

    >>> import torch
    >>> from assay.nn import StableMax
    >>> StableMax(dim=-1)(torch.tensor([3.0, 0.0, -1.0]))
    tensor([0.7273, 0.1818, 0.0909])
    """

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        in_range("dim", dim, isinstance(dim, int), "an integer")
        self.dim = dim

    def forward(self, input: Tensor) -> Tensor:
        return stablemax(input, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class LogStableMax(StableMax):
    """:func:`assay.nn.functional.log_stablemax` as a layer, in place of ``torch.nn.LogSoftmax``.

    >>> import torch
    >>> from assay.nn import LogStableMax
    >>> LogStableMax()(torch.tensor([3.0, 0.0, -1.0])).exp()
    tensor([0.7273, 0.1818, 0.0909])
    """

    def forward(self, input: Tensor) -> Tensor:
        return log_stablemax(input, self.dim)


def stablemax_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    dtype: torch.dtype | None = torch.float64,
) -> Tensor:
    """Cross-entropy of :func:`assay.nn.functional.stablemax`, in place of ``torch.nn.functional.cross_entropy``.

    For an example with logits z = ``input`` and class y = ``target`` ::

        p_i            = s(z_i) / sum_j s(z_j)            s(x) = x + 1 if x >= 0, else 1 / (1 - x)
        loss           = -w_y log p_y
        d loss / d z_i = w_y (p_i - [i = y]) / (1 + |z_i|)

    Everything else is torch's: ``target`` may hold probabilities q, with loss -sum_k w_k q_k log p_k, and label
    smoothing takes q = (1 - label_smoothing) q + label_smoothing / C.

    A logit of -inf has probability and gradient 0, and the loss is inf if the target has mass on it. +inf gives NaN.

    Args:
        input: logits, floating, shape (C,), (N, C) or (N, C, d1, ...).
        target: classes, integers of shape (), (N,) or (N, d1, ...); or probabilities, of the shape of ``input``.
        weight: a factor for each class, shape (C,).
        ignore_index: a class that counts for nothing, if the target holds classes.
        reduction: "mean" (with classes, weighted by w_y), "sum" or "none".
        label_smoothing: in [0, 1].
        dtype: float32, float64, or None for the input's and float32 at least: what the loss is computed in.

    Returns:
        The loss, in float32; for float64 inputs in what it was computed in.

    Raises:
        ValueError: an argument out of range, or shapes that do not fit.

    Source: L. Prieto et al., Grokking at the Edge of Numerical Stability, ICLR 2025, arXiv 2501.04697.

    >>> import torch
    >>> from assay.losses import stablemax_cross_entropy
    >>> logits, right = torch.tensor([[3.0, 0.0, -1.0], [200.0, 0.0, -9.0]]), torch.tensor([0, 0])
    >>> stablemax_cross_entropy(logits, right, reduction="none")
    tensor([0.3185, 0.0055])
    >>> torch.nn.functional.cross_entropy(logits, right, reduction="none") == 0
    tensor([False,  True])
    """
    in_range("reduction", reduction, reduction in ("mean", "sum", "none"), "mean, sum or none")
    in_range("label_smoothing", label_smoothing, 0 <= label_smoothing <= 1, "[0, 1]")
    in_range("dtype", dtype, dtype in (None, torch.float32, torch.float64), "torch.float32, torch.float64 or None")
    in_range("input.shape", tuple(input.shape), input.dim() >= 1, "(C,), (N, C) or (N, C, d1, ...)")
    classes = min(1, input.dim() - 1)
    fits = input.shape if target.is_floating_point() else input.shape[:classes] + input.shape[classes + 1 :]
    in_range("target.shape", tuple(target.shape), target.shape == fits, str(tuple(fits)))
    if weight is not None:
        in_range("weight.shape", tuple(weight.shape), weight.shape == input.shape[classes : classes + 1], "(C,)")

    logits = _log_ramp(input, dtype)
    if target.is_floating_point():
        target = target.to(logits.dtype)
        if not label_smoothing:
            # Where both are 0, q log p is 0: a number whose exponential is 0 says so, the logarithm itself does not.
            logits = logits.masked_fill((target == 0) & (input == -torch.inf), -1e4)
    if weight is not None:
        weight = weight.to(logits.dtype)
    loss = F.cross_entropy(logits, target, weight, None, ignore_index, None, reduction, label_smoothing)
    return loss if input.dtype == torch.float64 else loss.float()
