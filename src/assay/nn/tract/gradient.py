"""The gradient of TrAct: the plain one times (X^T X / b + l I)^-1, for linear layers and convolutions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from assay._checks import in_range

Padding = tuple[tuple[int, int], ...]  # before and after, for each dimension of the images

_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def tract_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, l: float = 0.1) -> Tensor:
    """``torch.nn.functional.linear`` with the weight's gradient of TrAct.

    The output is the plain one. With X the b rows of the input and G those of the output's gradient ::

        grad weight = G^T X (X^T X / b + l I)^-1            plain: G^T X

    and the gradients of bias and input are plain. A step with it is the least change of the weights, in the ridge's
    sense, that moves the outputs as far down their own gradient as possible. It is computed with the smaller of the two
    equal systems, of n equations or of b, in float32 at least. There is no second derivative.

    Args:
        input: shape (*, n).
        weight: shape (m, n).
        bias: shape (m,), or None.
        l: > 0, the ridge; in units of the inputs' variance.

    Raises:
        ValueError: l is not > 0 and finite.

    Source: F. Petersen, C. Borgelt, S. Ermon, TrAct, NeurIPS 2024, arXiv 2410.23970.

    >>> import torch
    >>> from assay.nn.functional import tract_linear
    >>> weight = torch.zeros(1, 2, requires_grad=True)
    >>> tract_linear(torch.tensor([[3.0, 4.0]]), weight).sum().backward()
    >>> weight.grad * (25 + 0.1)  # of one row x: G^T x / (|x|^2 + l)
    tensor([[3.0000, 4.0000]])
    """
    check_ridge(l)
    return _Linear.apply(input, weight, bias, l)


def check_ridge(l: float) -> None:
    in_range("l", l, 0 < l < math.inf, "> 0 and finite")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None, l: float) -> Tensor:
        return F.linear(input, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, bias, ctx.l = inputs
        ctx.save_for_backward(input, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        grads: list[Tensor | None] = [None, None, None, None]
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grads[0] = (grad @ weight.to(grad.dtype)).to(input.dtype)
            if ctx.needs_input_grad[1]:
                rows, along = (x.reshape(-1, x.shape[-1]) for x in (input, grad))
                grads[1] = _preconditioned(rows, along, ctx.l).to(weight.dtype)
            if ctx.needs_input_grad[2]:
                grads[2] = grad.flatten(0, -2).sum(0).to(ctx.bias_dtype)
        return tuple(grads)


def _preconditioned(rows: Tensor, grad: Tensor, l: float) -> Tensor:
    """G^T X (X^T X / b + l I)^-1 for ``rows`` X (..., b, n) and ``grad`` G (..., b, m)."""
    dtype = torch.promote_types(torch.promote_types(rows.dtype, grad.dtype), torch.float32)
    rows, grad = rows.to(dtype), grad.to(dtype)
    count, width = rows.shape[-2:]
    if not rows.numel():
        return grad.mT @ rows
    if count < width:
        return grad.mT @ _solve(rows @ rows.mT / count, rows, l)
    return _solve(rows.mT @ rows / count, rows.mT @ grad, l).mT


def _solve(gram: Tensor, right: Tensor, l: float) -> Tensor:
    """(gram + l I)^-1 right."""
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    # A ridge below the rounding of the matrix would be lost in it, and the factorization might fail.
    ridge = (diagonal.sum(-1, keepdim=True) * torch.finfo(gram.dtype).eps).clamp_min(l)
    factor, _ = torch.linalg.cholesky_ex(gram + torch.diag_embed(ridge.expand_as(diagonal)))
    return torch.cholesky_solve(right, factor)


class Convolution(torch.autograd.Function):
    """A batched convolution that pads with zeros; each group of channels has its own X, of patches."""

    @staticmethod
    def forward(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, ...],
        padding: str | tuple[int, ...],
        dilation: tuple[int, ...],
        groups: int,
        l: float,
    ) -> Tensor:
        return _CONVOLUTIONS[weight.dim() - 2](input, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, bias, ctx.stride, padding, ctx.dilation, ctx.groups, ctx.l = inputs
        ctx.padding = pads(padding, weight.shape[2:], ctx.dilation)
        ctx.save_for_backward(input, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        grads: list[Tensor | None] = [None] * 8
        padded = F.pad(input, [side for pair in reversed(ctx.padding) for side in pair])
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                whole = _input_gradient(padded, weight.to(grad.dtype), grad, ctx.stride, ctx.dilation, ctx.groups)
                grads[0] = _inner(whole, ctx.padding).to(input.dtype)
            if ctx.needs_input_grad[1]:
                rows = patches(padded, weight.shape[2:], ctx.stride, ctx.dilation, ctx.groups)
                along = grad.flatten(2).unflatten(1, (ctx.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)
                grads[1] = _preconditioned(rows, along, ctx.l).reshape(weight.shape).to(weight.dtype)
            if ctx.needs_input_grad[2]:
                grads[2] = grad.flatten(2).sum((0, 2)).to(ctx.bias_dtype)
        return tuple(grads)


def pads(padding: Any, kernel: Sequence[int], dilation: Sequence[int]) -> Padding:
    """Padding before and after each dimension, as torch's convolutions understand theirs."""
    if padding == "valid":
        return ((0, 0),) * len(kernel)
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((p, p) for p in padding)


def _input_gradient(
    padded: Tensor, weight: Tensor, grad: Tensor, stride: Sequence[int], dilation: Sequence[int], groups: int
) -> Tensor:
    none = [0] * len(stride)
    found, _, _ = torch.ops.aten.convolution_backward(
        grad, padded.to(grad.dtype), weight, None, stride, none, dilation, False, none, groups, [True, False, False]
    )
    return found


def _inner(padded: Tensor, padding: Padding) -> Tensor:
    for dim, (before, after) in enumerate(padding, start=2):
        padded = padded.narrow(dim, before, padded.shape[dim] - before - after)
    return padded


def patches(
    padded: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], groups: int
) -> Tensor:
    """What a convolution's outputs see of an input that is padded already: (groups, outputs, values in a patch)."""
    spatial = len(kernel)
    for dim, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
        padded = padded.unfold(dim, d * (k - 1) + 1, s)[..., ::d]
    grouped = padded.unflatten(1, (groups, -1))  # N, groups, C, places ..., kernel ...
    order = [1, 0, *range(3, 3 + spatial), 2, *range(3 + spatial, 3 + 2 * spatial)]
    return grouped.permute(order).flatten(2 + spatial).flatten(1, 1 + spatial)


@torch.no_grad()
def precondition_first_layer_grad_(module: nn.Module, inputs: Tensor, l: float = 0.1) -> nn.Module:
    """Turn the plain gradient of a layer's weight into that of TrAct, in place, after ``backward``.

    ``module.weight.grad`` becomes ``grad (X^T X / b + l I)^-1``, for loops that hold the layer's inputs and whose model
    should stay as it is. Layer and inputs as they were in the one forward pass that made the gradient.

    Args:
        module: a ``torch.nn.Linear`` or ``Conv1d``, ``2d``, ``3d``.
        inputs: what the layer was given: shape (*, n) or (N, C, *).
        l: > 0, the ridge.

    Returns:
        ``module``.

    Raises:
        TypeError: another kind of layer.
        ValueError: l is not > 0 and finite, or the weight has no gradient.

    >>> import torch
    >>> from assay.nn.functional import precondition_first_layer_grad_
    >>> layer, x = torch.nn.Linear(4, 2), torch.randn(16, 4)
    >>> layer(x).square().mean().backward()
    >>> precondition_first_layer_grad_(layer, x).weight.grad.shape
    torch.Size([2, 4])
    """
    check_ridge(l)
    if isinstance(module, nn.Linear):
        rows = inputs.reshape(1, -1, inputs.shape[-1])
    elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        batch = inputs if inputs.dim() == module.weight.dim() else inputs.unsqueeze(0)
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        padded = F.pad(batch, module._reversed_padding_repeated_twice, mode=mode)
        rows = patches(padded, module.kernel_size, module.stride, module.dilation, module.groups)
    else:
        raise TypeError(f"module = {module!r} is out of range: a Linear, Conv1d, Conv2d or Conv3d")
    grad = module.weight.grad
    if grad is None:
        raise ValueError("module.weight.grad = None is out of range: the gradient of a backward pass")
    dtype = torch.promote_types(torch.promote_types(rows.dtype, grad.dtype), torch.float32)
    rows = rows.to(dtype)
    plain = grad.to(dtype).reshape(len(rows), -1, rows.shape[-1])
    grad.copy_(_solve(rows.mT @ rows / max(1, rows.shape[1]), plain.mT, l).mT.reshape(grad.shape))
    return module
