"""PowerNorm: batch normalization for transformers, by running quadratic means in both directions."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from assay._checks import in_range
from assay.nn._compiled import kept
from assay.nn._tokens import Tokens, check_tokens, scaled, scaled_backward


def _group_scale(x: Tensor, groups: int, eps: float) -> Tensor:
    grouped = x.unflatten(-1, (groups, -1))
    return (grouped * _inverse(grouped.square(), eps)).flatten(-2)


def _inverse(squares: Tensor, eps: float) -> Tensor:
    return (squares.mean(-1, keepdim=True) + eps).rsqrt()


class GroupScale(nn.Module):
    """Each token's groups of channels over their root mean square: ``x / sqrt(mean over the group of x^2 + eps)``.

    Args:
        groups: >= 1, a divisor of the channels, which are the last dimension.
        eps: > 0.

    Raises:
        ValueError: an argument out of range, or channels that ``groups`` does not divide.

    >>> import torch
    >>> from assay.nn import GroupScale
    >>> GroupScale(groups=2)(torch.tensor([[3.0, 3.0, -0.5, 0.5]]))
    tensor([[ 1.0000,  1.0000, -1.0000,  1.0000]])
    """

    def __init__(self, groups: int = 1, eps: float = 1e-5) -> None:
        super().__init__()
        in_range("groups", groups, groups >= 1, ">= 1")
        in_range("eps", eps, 0 < eps < math.inf, "> 0 and finite")
        self.groups, self.eps = groups, eps

    def forward(self, input: Tensor) -> Tensor:
        in_range("groups", self.groups, input.shape[-1] % self.groups == 0, f"a divisor of C = {input.shape[-1]}")
        dtype = torch.promote_types(input.dtype, torch.float32)
        return _group_scale(input.to(dtype), self.groups, self.eps).to(input.dtype)

    def extra_repr(self) -> str:
        return f"groups={self.groups}, eps={self.eps}"


class _Backward(NamedTuple):
    """What the backward pass needs beside tensors of the forward one: the buffer that it moves, and constants."""

    nu: Tensor
    alpha: float
    tokens: Tokens
    eps: float


class _Approximate(torch.autograd.Function):
    """weight xhat + bias, xhat = x / sqrt(psi + eps), with nu for what the batch's own psi would take off a gradient.

    x is rows * inverse, of shape (tokens, groups, 1), where there is a group scale. The buffer nu is read as it was at
    the forward pass, and moved in the backward pass. ``batch`` is the mean of x^2 over the tokens that count.
    """

    @staticmethod
    def forward(
        rows: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        inverse: Tensor | None,
        psi: Tensor,
        psi_back: Tensor | None,
        batch: Tensor,
        nu: Tensor,
        rest: _Backward,
    ) -> Tensor:
        return scaled(_times(rows, inverse), psi, weight, bias, rest.eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        rows, weight, bias, *saved, ctx.rest = inputs
        ctx.save_for_backward(rows, weight, *saved)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, inverse, psi, psi_back, batch, nu = ctx.saved_tensors
        buffer, alpha, tokens, eps = ctx.rest
        x, total = _times(rows, inverse), psi + eps
        found, weight_grad, bias_grad = scaled_backward(grad, x, psi, weight, eps)
        product = weight_grad if weight is None else weight_grad * weight
        if tokens.real is None:
            product = tokens.shared_mean(product)
        else:  # the weight's gradient has padded tokens in it
            g = grad if weight is None else grad * weight
            product = tokens.mean(g * x) * total.rsqrt()
        share = 1 - alpha
        now, product = kept(buffer, product)  # together, so that the buffer is read now and not in the forward pass
        tokens.update_(buffer, now * (1 - share * batch / total) + share * product)
        found = found.addcmul_(x, *kept(nu / total), value=-1)
        if psi_back is not None:
            found = found.mul_((total / (psi_back + eps)).sqrt())
        if inverse is not None:  # through the group scale: inverse (found - x mean(found x))
            found, x, rows = (t.unflatten(-1, (inverse.shape[1], -1)) for t in (found, x, rows))
            along = x.mul_(found).mean(-1, keepdim=True)
            found = found.mul_(inverse).addcmul_(rows, along * inverse.square(), value=-1).flatten(-2)
        if weight is None:
            return found, *[None] * 8
        return found, weight_grad.to(weight.dtype), bias_grad.to(ctx.bias_dtype), *[None] * 6


def _times(rows: Tensor, inverse: Tensor | None) -> Tensor:
    return rows if inverse is None else (rows.unflatten(-1, (inverse.shape[1], -1)) * inverse).flatten(-2)


class _QuadraticNorm(nn.Module):
    """What :class:`PowerNorm` and :class:`PowerNormV` share: parameters, the running psi^2, and evaluation."""

    psi2: Tensor
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        num_features: int,
        eps: float,
        alpha_fwd: float,
        affine: bool,
        groups: int,
        group_scale: bool,
        sync: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        in_range("num_features", num_features, num_features >= 1, ">= 1")
        in_range("eps", eps, 0 < eps < math.inf, "> 0 and finite")
        in_range("alpha_fwd", alpha_fwd, 0 <= alpha_fwd < 1, "[0, 1)")
        in_range("groups", groups, groups >= 1 and num_features % groups == 0, f"a divisor of {num_features}")
        self.num_features, self.eps, self.alpha_fwd, self.affine = num_features, eps, alpha_fwd, affine
        self.groups, self.group_scale, self.sync = groups, group_scale, sync
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        for name, value in (("weight", 1.0), ("bias", 0.0)):
            parameter = nn.Parameter(torch.full((num_features,), value, **factory)) if affine else None
            self.register_parameter(name, parameter)
        self.register_buffer("psi2", torch.ones(num_features, **factory))

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        check_tokens(input, self.num_features, padding_mask)
        rows = input.reshape(-1, self.num_features).to(torch.promote_types(input.dtype, torch.float32))
        if self.training:
            y = self._train(rows, Tokens.of(rows, padding_mask, self.sync))
        else:
            y = scaled(self._scaled(rows), self.psi2.to(rows.dtype), self.weight, self.bias, self.eps)
        return y.view(input.shape).to(input.dtype)

    def _scaled(self, rows: Tensor) -> Tensor:
        return _group_scale(rows, self.groups, self.eps) if self.group_scale else rows

    def _train(self, rows: Tensor, tokens: Tokens) -> Tensor:
        """Of rows before the group scale."""
        raise NotImplementedError

    def _exactly(self, x: Tensor, psi: Tensor) -> Tensor:
        """With the gradient through psi, where it has one."""
        y = x * (psi + self.eps).rsqrt()
        if self.weight is None or self.bias is None:
            return y
        return torch.addcmul(self.bias.to(y.dtype), y, self.weight.to(y.dtype))

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, alpha_fwd={self.alpha_fwd}, affine={self.affine}, "
            f"groups={self.groups if self.group_scale else None}"
        )


class PowerNorm(_QuadraticNorm):
    """Channels over the running root of their mean square, in place of ``torch.nn.LayerNorm`` in a transformer.

    After :class:`GroupScale`, with means over the real tokens of a batch, per channel, and none subtracted ::

        xhat = x / sqrt(psi2 + eps),   output = weight xhat + bias
        psi2 <- alpha_fwd psi2 + (1 - alpha_fwd) mean(x^2)                                      after it was used
        dL/dx = (g - nu xhat) / sqrt(psi2 + eps),   g = weight dL/doutput
        nu <- nu (1 - (1 - alpha_bkw) mean(xhat^2)) + (1 - alpha_bkw) mean(g xhat)              in the backward pass

    nu stands for the gradient through psi2, which a running value does not have. In the first ``warmup_steps`` steps
    the batch's own mean square is used in both passes, and psi2 is the mean of those. In evaluation psi2 is fixed, and
    no token depends on another.

    Args:
        num_features: C of an input (..., C), the layout of (B, T, C), (T, B, C) and (N, C).
        eps: > 0.
        alpha_fwd, alpha_bkw: in [0, 1), what is kept of psi2 and nu at each step.
        affine: learn ``weight`` and ``bias``, of shape (C,).
        warmup_steps: >= 0; about a tenth of the training.
        groups, group_scale: of the :class:`GroupScale` before it, and whether there is one; the number of attention
            heads is usual.
        approx_backward: False for the exact gradient, in which psi2 is a constant after the warm-up.
        batch_first: as in ``torch.nn.Transformer``; all tokens count alike, so nothing depends on it.
        sync: take the means over all processes of ``torch.distributed``.
        reference_quirks: compute as the authors' code does where it differs from the paper, see the card.

    ``padding_mask``, of the input's shape without C, is True for padding: tokens that count in no mean.

    Raises:
        ValueError: an argument out of range, or an input or a mask of another shape.

    Source: S. Shen et al., PowerNorm, ICML 2020, arXiv 2003.07845.

    >>> import torch
    >>> from assay.nn import PowerNorm
    >>> norm = PowerNorm(16, groups=4, warmup_steps=100)
    >>> norm(torch.randn(2, 5, 16), padding_mask=torch.tensor([[False] * 5, [False] * 3 + [True] * 2])).shape
    torch.Size([2, 5, 16])
    """

    nu: Tensor
    step: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        alpha_fwd: float = 0.9,
        alpha_bkw: float = 0.9,
        affine: bool = True,
        warmup_steps: int = 4000,
        groups: int = 1,
        group_scale: bool = True,
        approx_backward: bool = True,
        batch_first: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        sync: bool = False,
        reference_quirks: bool = False,
    ) -> None:
        super().__init__(num_features, eps, alpha_fwd, affine, groups, group_scale, sync, device, dtype)
        in_range("alpha_bkw", alpha_bkw, 0 <= alpha_bkw < 1, "[0, 1)")
        in_range("warmup_steps", warmup_steps, warmup_steps >= 0, ">= 0")
        self.alpha_bkw, self.warmup_steps, self.approx_backward = alpha_bkw, warmup_steps, approx_backward
        self.batch_first, self.reference_quirks = batch_first, reference_quirks
        self.register_buffer("nu", torch.zeros(num_features, device=device, dtype=dtype))
        self.register_buffer("step", torch.tensor(0, device=device))

    def _train(self, rows: Tensor, tokens: Tokens) -> Tensor:
        quirks, (before, nu) = self.reference_quirks, kept(self.psi2, self.nu)
        before, step = before.to(rows.dtype), self.step + 1
        if self.approx_backward:
            batch, y = self._approximately(rows, tokens, before, nu, step <= self.warmup_steps)
        else:
            x = self._scaled(rows)
            batch = tokens.mean(x.square())
            y = self._exactly(x, torch.where(step <= self.warmup_steps, batch, before))
        with torch.no_grad():
            average = before + (batch - before) / step
            warm = step < self.warmup_steps
            if quirks:
                moved = torch.where(warm, average, before).lerp(batch, 1 - self.alpha_fwd)
            else:
                moved = torch.where(warm, average, before.lerp(batch, 1 - self.alpha_fwd))
            tokens.update_(self.psi2, moved)
            self.step.copy_(step)
        return y

    def _approximately(
        self, rows: Tensor, tokens: Tokens, before: Tensor, nu: Tensor, warm: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The batch's mean square and the output; ``before`` is the running mean square, for after the warm-up."""
        with torch.no_grad():
            squares, inverse = rows.square(), None
            if self.group_scale:
                grouped = squares.unflatten(-1, (self.groups, -1))
                inverse = _inverse(grouped, self.eps)
                squares = grouped.mul_(inverse.square()).flatten(-2)
            batch = tokens.mean(squares)
            psi, counted, square, back = torch.where(warm, batch, before), tokens, batch, None
            if self.reference_quirks:  # padding counts in the backward pass, which divides by the batch's own psi
                counted, back = Tokens.of(rows, None, self.sync), batch
                square = counted.mean(squares)
        rest = _Backward(self.nu, self.alpha_bkw, counted, self.eps)
        return batch, _Approximate.apply(rows, self.weight, self.bias, inverse, psi, back, square, nu, rest)


class PowerNormV(_QuadraticNorm):
    """PN-V, PowerNorm without running values in training: ``x / sqrt(mean(x^2) + eps)`` over the batch's real tokens.

    The gradient is exact, through the mean; evaluation uses the running psi2. The paper's ablation between batch
    normalization and :class:`PowerNorm`, whose arguments these are.

    Raises:
        ValueError: an argument out of range, or an input or a mask of another shape.

    Source: S. Shen et al., PowerNorm, ICML 2020, arXiv 2003.07845.

    >>> import torch
    >>> from assay.nn import PowerNormV
    >>> PowerNormV(2, group_scale=False)(torch.tensor([[3.0, 1.0], [-3.0, 1.0]]))
    tensor([[ 1.0000,  1.0000],
            [-1.0000,  1.0000]], grad_fn=<ViewBackward0>)
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        alpha_fwd: float = 0.9,
        affine: bool = True,
        groups: int = 1,
        group_scale: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        sync: bool = False,
    ) -> None:
        super().__init__(num_features, eps, alpha_fwd, affine, groups, group_scale, sync, device, dtype)

    def _train(self, rows: Tensor, tokens: Tokens) -> Tensor:
        x = self._scaled(rows)
        batch = tokens.mean(x.square())
        with torch.no_grad():
            tokens.update_(self.psi2, self.psi2.to(rows.dtype).lerp(batch, 1 - self.alpha_fwd))
        return self._exactly(x, batch)
