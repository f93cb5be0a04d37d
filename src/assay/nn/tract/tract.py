"""TrAct: first-layer weights that move as if the layer's outputs were what is trained."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from assay.nn._swap import like, swap
from assay.nn.tract.gradient import Convolution, check_ridge, precondition_first_layer_grad_, tract_linear

if TYPE_CHECKING:
    from assay.bench.recipe import Recipe, Run

__all__ = [
    "TrAct",
    "TrActConv1d",
    "TrActConv2d",
    "TrActConv3d",
    "TrActLinear",
    "precondition_first_layer_grad_",
    "tract_linear",
    "untract",
]


class TrActLinear(nn.Linear):
    """``torch.nn.Linear`` as a network's first layer, with the weight's gradient of TrAct.

    Output, parameters and ``state_dict`` are those of ``torch.nn.Linear``; the weight's gradient is, with X the b rows
    of the input and G those of the output's gradient ::

        G^T X (X^T X / b + l I)^-1

    Args:
        in_features, out_features, bias, device, dtype: as in ``torch.nn.Linear``.
        l: > 0, the ridge, for inputs of mean 0 and variance 1.

    Raises:
        ValueError: l is not > 0 and finite.

    Source: F. Petersen, C. Borgelt, S. Ermon, TrAct, NeurIPS 2024, arXiv 2410.23970.

    >>> import torch
    >>> from assay.nn import TrActLinear
    >>> model = torch.nn.Sequential(TrActLinear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
    >>> model(torch.randn(32, 64)).shape
    torch.Size([32, 10])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        l: float = 0.1,
    ) -> None:
        check_ridge(l)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.l = l

    def forward(self, input: Tensor) -> Tensor:
        return tract_linear(input, self.weight, self.bias, self.l)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, l={self.l}"


class _TrActConv(_ConvNd):
    """What :class:`TrActConv1d`, ``2d`` and ``3d`` share; each has a plain convolution behind it."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        l: float = 0.1,
    ) -> None:
        check_ridge(l)
        shape = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
        super().__init__(*shape, bias, padding_mode, device, dtype)  # type: ignore[arg-type]
        self.l = l

    def forward(self, input: Tensor) -> Tensor:
        padding = self.padding
        single = input.dim() == len(self.kernel_size) + 1
        batch = input.unsqueeze(0) if single else input
        if self.padding_mode != "zeros":
            batch = F.pad(batch, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0,) * len(self.kernel_size)
        output = Convolution.apply(
            batch, self.weight, self.bias, self.stride, padding, self.dilation, self.groups, self.l
        )
        return output.squeeze(0) if single else output

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, l={self.l}"


class TrActConv1d(_TrActConv, nn.Conv1d):
    """TrAct for ``torch.nn.Conv1d``: see :class:`TrActConv2d`, which has the same arguments.

    >>> import torch
    >>> from assay.nn import TrActConv1d
    >>> TrActConv1d(1, 8, 5, stride=2)(torch.randn(3, 1, 40)).shape
    torch.Size([3, 8, 18])
    """


class TrActConv2d(_TrActConv, nn.Conv2d):
    """``torch.nn.Conv2d`` as a network's first layer, with the weight's gradient of TrAct.

    Output, parameters and ``state_dict`` are those of ``torch.nn.Conv2d``. The weight's gradient is that of
    :class:`TrActLinear` on the patches: one row of X for each place of each output, with what it sees, padding
    included; channels of different ``groups`` have systems of their own.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            in ``torch.nn.Conv2d``.
        l: > 0, the ridge, for inputs of mean 0 and variance 1.

    Raises:
        ValueError: l is not > 0 and finite.

    Source: F. Petersen, C. Borgelt, S. Ermon, TrAct, NeurIPS 2024, arXiv 2410.23970.

    >>> import torch
    >>> from assay.nn import TrActConv2d
    >>> TrActConv2d(3, 8, 3, padding="same")(torch.randn(2, 3, 16, 16)).shape
    torch.Size([2, 8, 16, 16])
    """


class TrActConv3d(_TrActConv, nn.Conv3d):
    """TrAct for ``torch.nn.Conv3d``: see :class:`TrActConv2d`, which has the same arguments.

    >>> import torch
    >>> from assay.nn import TrActConv3d
    >>> TrActConv3d(1, 4, 3)(torch.randn(2, 1, 5, 6, 7)).shape
    torch.Size([2, 4, 3, 4, 5])
    """


_LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: TrActLinear,
    nn.Conv1d: TrActConv1d,
    nn.Conv2d: TrActConv2d,
    nn.Conv3d: TrActConv3d,
}


def TrAct(module: nn.Module, l: float = 0.1) -> nn.Module:
    """A first layer as it is, but for the gradient of its weight: ``model.conv1 = TrAct(model.conv1)``.

    Weight and bias are the same objects, so an optimizer made before goes on updating them, and a checkpoint of the
    plain model fits. For training from scratch, on standardized inputs; rate and all else stay as they were. For the
    other way see :func:`untract`.

    Args:
        module: a ``torch.nn.Linear``, ``Conv1d``, ``Conv2d`` or ``Conv3d``, of that very class and without
            parametrizations.
        l: > 0, the ridge.

    Returns:
        A :class:`TrActLinear`, :class:`TrActConv1d`, ``2d`` or ``3d``.

    Raises:
        TypeError: another kind of layer.
        ValueError: l is not > 0 and finite.

    Source: F. Petersen, C. Borgelt, S. Ermon, TrAct, NeurIPS 2024, arXiv 2410.23970.

    >>> import torch
    >>> from assay.nn import TrAct
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU())
    >>> model[0] = TrAct(model[0])
    >>> model[0]
    TrActConv2d(3, 16, kernel_size=(3, 3), stride=(1, 1), l=0.1)
    """
    if type(module) not in _LAYERS:
        kinds = ", ".join(kind.__name__ for kind in _LAYERS)
        raise TypeError(f"module = {module!r} is out of range: one of the classes {kinds}, without parametrizations")
    return like(module, _LAYERS[type(module)], l=l).train(module.training)


def untract(module: nn.Module) -> nn.Module:
    """The plain layer of one with TrAct, with the same weight and bias.

    Raises:
        TypeError: not a layer with TrAct.

    >>> import torch
    >>> from assay.nn import TrAct, untract
    >>> untract(TrAct(torch.nn.Linear(4, 2)))
    Linear(in_features=4, out_features=2, bias=True)
    """
    plain = next((plain for plain, ours in _LAYERS.items() if type(module) is ours), None)
    if plain is None:
        raise TypeError(f"module = {module!r} is out of range: a layer made by TrAct")
    return like(module, plain).train(module.training)


def apply(recipe: Recipe, *, l: float = 0.1) -> Recipe:
    """The recipe with TrAct on the network's first linear layer or convolution."""
    check_ridge(l)

    def model(run: Run) -> nn.Module:
        network = recipe.model(run)
        first = next((name for name, layer in network.named_modules() if type(layer) in _LAYERS), None)
        return swap(network, tuple(_LAYERS), lambda name, layer: TrAct(layer, l) if name == first else layer)

    return replace(recipe, model=model)
