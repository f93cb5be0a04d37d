"""Unified normalization: channels over smoothed quadratic means, which folds into the next linear layer."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from assay._checks import in_range
from assay.nn._compiled import kept
from assay.nn._tokens import Tokens, check_tokens, scaled, scaled_backward
from assay.nn.unified_norm.fusion import FusionReport, fuse_unified_norm

__all__ = ["FusionReport", "UnifiedNorm", "fuse_unified_norm"]

_LEAST_COMPENSATED = 1000  # steps before gradients are compensated, as in the authors' code
_COMPENSATION = 5.0


class _Backward(NamedTuple):
    """What the backward pass needs beside tensors: buffers that it moves, and constants."""

    window: Tensor
    average: Tensor
    tokens: Tokens
    momentum: float
    eps: float
    warmup: int


class _Unified(torch.autograd.Function):
    """weight x / sqrt(var + eps) + bias, with gradients that are smoothed over the last batches."""

    @staticmethod
    def forward(
        rows: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        var: Tensor,
        ratio: Tensor,
        skip: Tensor,
        step: Tensor,
        rest: _Backward,
    ) -> Tensor:
        return scaled(rows, var, weight, bias, rest.eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        rows, weight, bias, var, ratio, skip, step, ctx.rest = inputs
        ctx.save_for_backward(rows, weight, var, ratio, skip, step)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, var, ratio, skip, step = ctx.saved_tensors
        window, average, tokens, momentum, eps, warmup = ctx.rest
        scale = ratio if weight is None else weight.to(ratio.dtype) * ratio
        found, weight_grad, bias_grad = scaled_backward(grad, rows, var, scale, eps)
        if tokens.real is None:
            own = tokens.shared_mean(weight_grad * scale)
        else:  # the weight's gradient has padded tokens in it
            own = tokens.mean(grad * rows) * scale * (var + eps).rsqrt()
        before = average.to(own.dtype)
        filled = _put(window.to(own.dtype), torch.where(skip, before, own), step)
        smooth = (step > len(window)) & (step >= warmup) & ~skip
        mean = torch.where(smooth, filled.mean(0), own)
        moved = torch.lerp(mean, before, momentum)
        tokens.update_(window, filled)
        tokens.update_(average, moved)
        taken = torch.where(skip, mean, moved) / (var + eps)
        found = found.addcmul_(rows, *kept(taken), value=-1)
        if weight is None:
            return found, *[None] * 7
        return found, (weight_grad * ratio).to(weight.dtype), bias_grad.to(ctx.bias_dtype), *[None] * 5


def _put(window: Tensor, row: Tensor, step: Tensor) -> Tensor:
    """The window with ``row`` in the place of this step."""
    here = torch.arange(len(window), device=window.device) == step % len(window)
    return torch.where(here[:, None], row, window)


class UnifiedNorm(nn.Module):
    """Channels over a smoothed root mean square, in place of ``torch.nn.LayerNorm``; free in inference.

    With q the mean of x^2 over the real tokens of the batch, per channel, and no mean subtracted ::

        var = geometric mean of the last M values of q          after the warm-up, else q
        output = weight x / sqrt(var + eps) + bias
        running_var <- momentum running_var + (1 - momentum) var

    The gradient with respect to x is ``(g - a z) / sqrt(var + eps)`` with z = x / sqrt(var + eps), g = r weight
    dL/doutput, r = sqrt((var + eps) / (running_var + eps)) within [1/5, 5] (1 in the first max(1000, ``warmup_steps``)
    steps), and a the running average of the arithmetic mean of the last values of mean(g z); that of the weight is
    r sum(z dL/doutput).

    With ``outlier_filtration`` a batch in which arithmetic and geometric mean of the window differ by more than M times
    the variance of its roots, in any channel, leaves no trace in the windows: it is normalized by its own q.

    In evaluation the layer is a fixed scale and shift of each channel, which :func:`fuse_unified_norm` folds into the
    next linear layers.

    Args:
        num_features: C of an input (..., C).
        window_size: M >= 1, or a pair for both passes; 1 is no smoothing over a window.
        warmup_steps: >= 0, steps with the batch's own q.
        outlier_filtration: as above; usual for images, not for text.
        eps: > 0.
        momentum: in [0, 1), what is kept of the running values at each step.
        affine: learn ``weight`` and ``bias``, of shape (C,).
        sync: take the means over all processes of ``torch.distributed``.
        reference_quirks: compute as the authors' code does, see the card.

    ``padding_mask``, of the input's shape without C, is True for padding: tokens that count in no mean.

    Raises:
        ValueError: an argument out of range, or an input or a mask of another shape.

    Source: Q. Yang et al., Unified Normalization, ACM MM 2022, arXiv 2208.01313.

    >>> import torch
    >>> from assay.nn import UnifiedNorm
    >>> UnifiedNorm(16, warmup_steps=100)(torch.randn(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_var: Tensor
    ema_gz: Tensor
    fwd_window: Tensor
    bwd_window: Tensor
    step: Tensor
    skip_counter: Tensor

    def __init__(
        self,
        num_features: int,
        window_size: int | tuple[int, int] = 4,
        warmup_steps: int = 4000,
        outlier_filtration: bool = False,
        eps: float = 1e-5,
        momentum: float = 0.9,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        sync: bool = False,
        reference_quirks: bool = False,
    ) -> None:
        super().__init__()
        sizes = (window_size, window_size) if isinstance(window_size, int) else tuple(window_size)
        in_range("num_features", num_features, num_features >= 1, ">= 1")
        in_range("window_size", window_size, len(sizes) == 2 and min(sizes) >= 1, ">= 1, or two such numbers")
        in_range("warmup_steps", warmup_steps, warmup_steps >= 0, ">= 0")
        in_range("eps", eps, 0 < eps < math.inf, "> 0 and finite")
        in_range("momentum", momentum, 0 <= momentum < 1, "[0, 1)")
        self.num_features, self.window_size, self.warmup_steps = num_features, sizes, warmup_steps
        self.outlier_filtration, self.eps, self.momentum, self.affine = outlier_filtration, eps, momentum, affine
        self.sync, self.reference_quirks = sync, reference_quirks
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        for name, value in (("weight", 1.0), ("bias", 0.0)):
            parameter = nn.Parameter(torch.full((num_features,), value, **factory)) if affine else None
            self.register_parameter(name, parameter)
        self.register_buffer("running_var", torch.ones(num_features, **factory))
        self.register_buffer("ema_gz", torch.zeros(num_features, **factory))
        self.register_buffer("fwd_window", torch.zeros(sizes[0], num_features, **factory))
        self.register_buffer("bwd_window", torch.zeros(sizes[1], num_features, **factory))
        for name in ("step", "skip_counter"):
            self.register_buffer(name, torch.tensor(0, device=device))

    def reset_warmup(self) -> None:
        """Start the warm-up anew with empty windows, before a trained model is trained further."""
        for buffer in (self.step, self.fwd_window, self.bwd_window):
            buffer.zero_()

    def folded(self) -> tuple[Tensor, Tensor]:
        """Scale and shift (C,) of each channel in evaluation."""
        scale = (self.running_var.to(torch.promote_types(self.running_var.dtype, torch.float32)) + self.eps).rsqrt()
        if self.weight is None or self.bias is None:
            return scale, torch.zeros_like(scale)
        return scale * self.weight, self.bias.to(scale.dtype)

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        check_tokens(input, self.num_features, padding_mask)
        rows = input.reshape(-1, self.num_features).to(torch.promote_types(input.dtype, torch.float32))
        if self.training:
            y = self._train(rows, Tokens.of(rows, padding_mask, self.sync))
        else:
            y = scaled(rows, self.running_var.to(rows.dtype), self.weight, self.bias, self.eps)
        return y.view(input.shape).to(input.dtype)

    def _train(self, rows: Tensor, tokens: Tokens) -> Tensor:
        with torch.no_grad():
            step, running, window = kept(self.step, self.running_var, self.fwd_window)
            step, running = step + 1, running.to(rows.dtype)
            q = tokens.mean(rows.square())
            var, window, skip = self._statistic(q, window.to(rows.dtype), running, step)
            ratio = ((var + self.eps) / (running + self.eps)).sqrt().clamp(1 / _COMPENSATION, _COMPENSATION)
            plain = (step <= max(_LEAST_COMPENSATED, self.warmup_steps)) | skip
            ratio = torch.where(plain, 1.0, ratio)
        counted = Tokens.of(rows, None, self.sync) if self.reference_quirks else tokens
        rest = _Backward(self.bwd_window, self.ema_gz, counted, self.momentum, self.eps, self.warmup_steps)
        y = _Unified.apply(rows, self.weight, self.bias, var, ratio, skip, step, rest)
        with torch.no_grad():
            tokens.update_(self.fwd_window, window)
            tokens.update_(self.running_var, torch.lerp(var, running, self.momentum))
            self.step.copy_(step)
            self.skip_counter.add_(skip)
        return y

    def _statistic(self, q: Tensor, before: Tensor, running: Tensor, step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What to divide by, squared; the window with this batch in it; and whether the batch is an outlier."""
        size, tiny = len(before), torch.finfo(q.dtype).tiny
        window = _put(before, q, step)
        warm = step >= self.warmup_steps
        # A step counter that was loaded without its windows says nothing about how full they are.
        full = torch.ones_like(warm) if self.reference_quirks else (window != 0).any(1).all()
        skip = torch.zeros_like(warm)
        if self.outlier_filtration:
            spread = before.sqrt().var() if before.numel() > 1 else before.new_zeros(())
            mean, geometric = window.mean(0), window.clamp_min(tiny).log().mean(0).exp()
            rounding = 16 * torch.finfo(q.dtype).eps * mean
            skip = warm & full & (mean - geometric > size * spread + rounding).any()
            window = torch.where(skip, _put(before, running, step), window)
        if size == 1:
            return q, window, skip
        smooth = (step > size) & warm & full & ~skip
        return torch.where(smooth, window.clamp_min(tiny).log().mean(0).exp(), q), window, skip

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, window_size={self.window_size}, warmup_steps={self.warmup_steps}, "
            f"outlier_filtration={self.outlier_filtration}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.affine}"
        )
