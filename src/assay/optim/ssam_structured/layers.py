"""Linear and convolutional layers that may send an approximate gradient down: through a part of their weights only."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.nn import swap


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, mask)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (g,) = grads
        x, weight, mask = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        rows = g.reshape(-1, g.shape[-1])
        return (
            g @ (weight * mask) if wants_x else None,
            rows.t() @ x.reshape(-1, x.shape[-1]) if wants_weight else None,
            rows.sum(0) if wants_bias else None,
            None,
        )


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, stride: Any, padding: Any,
        dilation: Any, groups: int,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight, mask)
        ctx.how = stride, padding, dilation, False, (0, 0), groups
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (g,) = grads
        x, weight, mask = ctx.saved_tensors
        # The gradients of weight and bias do not depend on the weight: one masked call gives all three.
        backward = torch.ops.aten.convolution_backward
        found = backward(g, x, weight * mask, [weight.shape[0]], *ctx.how, list(ctx.needs_input_grad[:3]))
        return (*found, None, None, None, None, None)


class _ImplicitSparse(nn.Module):
    """What the two layers share: a mask, and whether it is used."""

    weight: Any
    mask: Tensor | None
    origin: bool

    def _begin(self) -> None:
        self.origin = True
        # Not in the state_dict, whose keys are then those of the layer that this one stands for.
        self.register_buffer("mask", None, persistent=False)

    def set_origin(self, origin: bool) -> None:
        """True: the layer is exact, as its torch counterpart. False: its input's gradient goes through the mask."""
        self.origin = origin

    def set_mask(self, mask: Tensor | None) -> None:
        """Which weights the input's gradient goes through, in the weight's shape; None: all."""
        if mask is not None and mask.shape != self.weight.shape:
            raise ValueError(f"mask.shape = {tuple(mask.shape)} is out of range: {tuple(self.weight.shape)}")
        self.mask = None if mask is None else mask.detach().to(self.weight.device, torch.bool)


class ImplicitSparseLinear(_ImplicitSparse, nn.Linear):
    """A linear layer whose input's gradient may be computed from a part of the weights.

    With y = x W^T + b and the gradient g of y, in the mode ``set_origin(False)`` and with a mask M ::

        grad W = g^T x        grad b = sum g        grad x = g (W * M)

    The output, grad W and grad b are exact. So M makes sparse the product that hardware can shorten, and it is only the
    layers below that see another gradient. In the mode ``set_origin(True)``, in which a layer begins, and without a
    mask, it is ``torch.nn.Linear``. Derivatives of second order are those of the formulas above.

    Shapes: x (..., in_features), y (..., out_features), M as ``weight`` (out_features, in_features).

    Args:
        in_features, out_features, bias, device, dtype: as of ``torch.nn.Linear``.

    Raises:
        ValueError: ``set_mask`` with a mask of another shape.

    Source: P. Mi et al., Systematic Investigation of Sparse Perturbed SAM, 2023, arXiv 2306.17504.

    >>> import torch
    >>> from assay.nn import ImplicitSparseLinear
    >>> layer = ImplicitSparseLinear(2, 1, bias=False)
    >>> _ = torch.nn.init.ones_(layer.weight)
    >>> layer.set_mask(torch.tensor([[True, False]]))
    >>> layer.set_origin(False)
    >>> x = torch.ones(1, 2, requires_grad=True)
    >>> layer(x).sum().backward()
    >>> x.grad, layer.weight.grad
    (tensor([[1., 0.]]), tensor([[1., 1.]]))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._begin()

    def forward(self, input: Tensor) -> Tensor:
        if self.origin or self.mask is None:
            return super().forward(input)
        x, weight, bias = _autocast(input, self.weight, self.bias)
        return _Linear.apply(x, weight, bias, self.mask)


class ImplicitSparseConv2d(_ImplicitSparse, nn.Conv2d):
    """A convolution whose input's gradient may be computed from a part of the weights.

    As :class:`ImplicitSparseLinear`, for every stride, padding, dilation and number of groups: in the mode
    ``set_origin(False)`` the output and the gradients of weight and bias are exact, and the gradient of the input is
    that of a convolution with W * M.

    Shapes: x (b, in_channels, h, w) or (in_channels, h, w), M as ``weight``.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype:
            as of ``torch.nn.Conv2d``.

    Raises:
        ValueError: ``set_mask`` with a mask of another shape.

    Source: P. Mi et al., Systematic Investigation of Sparse Perturbed SAM, 2023, arXiv 2306.17504.

    >>> import torch
    >>> from assay.nn import ImplicitSparseConv2d
    >>> layer = ImplicitSparseConv2d(1, 4, 3, padding=1)
    >>> layer.set_mask(torch.zeros(4, 1, 3, 3))
    >>> layer.set_origin(False)
    >>> x = torch.ones(1, 1, 5, 5, requires_grad=True)
    >>> layer(x).sum().backward()
    >>> x.grad.any().item(), layer.weight.grad.any().item()
    (False, True)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Any = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        self._begin()

    def forward(self, input: Tensor) -> Tensor:
        if self.origin or self.mask is None:
            return super().forward(input)
        x, weight, bias = _autocast(input, self.weight, self.bias)
        padding = self.padding
        if self.padding_mode != "zeros" or isinstance(padding, str):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, mode), (0, 0)
        batch = x if x.dim() == 4 else x.unsqueeze(0)
        y = _Conv2d.apply(batch, weight, bias, self.mask, self.stride, padding, self.dilation, self.groups)
        return y if x.dim() == 4 else y.squeeze(0)


def to_implicit_sparse(module: nn.Module) -> nn.Module:
    """Exchange every ``Linear`` and ``Conv2d`` in a model, in place, for its implicitly sparse form.

    The new layers hold the very parameters of the old ones, under the same names, and begin in the exact mode without
    a mask: the model computes what it did, and an optimizer made before goes on. Subclasses of the two are left alone
    (see :func:`assay.nn.swap`).

    Args:
        module: the network; it may itself be such a layer.

    Returns:
        ``module``, or its replacement if it is itself such a layer.

    Warns:
        NoEffectWarning: the model has none of them.

    Source: P. Mi et al., Systematic Investigation of Sparse Perturbed SAM, 2023, arXiv 2306.17504.

    >>> import torch
    >>> from assay.nn import to_implicit_sparse
    >>> to_implicit_sparse(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU()))
    Sequential(
      (0): ImplicitSparseLinear(in_features=4, out_features=8, bias=True)
      (1): ReLU()
    )
    """
    forms = {nn.Linear: ImplicitSparseLinear, nn.Conv2d: ImplicitSparseConv2d}
    kinds = {type(layer) for layer in module.modules()} & forms.keys()
    for old in kinds or forms.keys():
        module = swap(module, old, forms[old])
    return module


def implicit_layers(model: nn.Module) -> list[_ImplicitSparse]:
    """The implicitly sparse layers of a model."""
    return [layer for layer in model.modules() if isinstance(layer, _ImplicitSparse)]


def _autocast(*tensors: Any) -> tuple[Any, ...]:
    """The tensors as autocast hands them to a layer: a function of our own it does not know."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(None if x is None else x.to(torch.get_autocast_dtype(kind)) for x in tensors)
