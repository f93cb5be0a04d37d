"""Training batch normalization and only batch normalization, with the control that shows what that is worth."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from assay._checks import in_range
from assay.nn.batchnorm_only.random_subset import RandomSubset, random_per_channel
from assay.nn.batchnorm_only.report import FrozenReport, freeze, unfreeze

if TYPE_CHECKING:
    from assay.bench.recipe import Recipe, Run

__all__ = [
    "BATCHNORM_TYPES",
    "DisabledFeatures",
    "FrozenReport",
    "RandomSubset",
    "batchnorm_only",
    "disabled_features",
    "init_batchnorm_",
    "random_per_channel",
    "unfreeze",
]

BATCHNORM_TYPES: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
SCHEMES = ("uniform", "fixed", "oneone", "positivenegative")


def batchnorm_only(
    model: nn.Module,
    *,
    norm_types: tuple[type[nn.Module], ...] = BATCHNORM_TYPES,
    init: str | None = "uniform",
    train_output: bool = False,
    also: Collection[str] = (),
    generator: torch.Generator | None = None,
) -> FrozenReport:
    """Freeze all of a network but weight and bias of its normalization layers, in place.

    Everything else keeps its first values; statistics are still updated in training, and gradients flow through what is
    frozen. Call it before the optimizer is made and before the model is wrapped or compiled. An optimizer may be given
    all parameters: torch's skip those without gradient, weight decay included.

    Args:
        model: any module.
        norm_types: classes of the layers to train, subclasses included; ``LayerNorm`` and the like too, if asked for.
        init: first values, see :func:`init_batchnorm_`; None leaves them as they are.
        train_output: train the last linear layer or convolution too.
        also: names of further parameters to train.
        generator: of the first values, on the CPU.

    Returns:
        What is trained, what is frozen, and the numbers; :func:`unfreeze` takes it back.

    Raises:
        ValueError: no such layer with parameters; a name in ``also`` that is no parameter; a parameter that a layer
            shares with one of another class.

    Source: J. Frankle, D. J. Schwab, A. S. Morcos, Training BatchNorm and Only BatchNorm, ICLR 2021, arXiv 2003.00152.

    >>> import torch
    >>> from assay.nn import batchnorm_only
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
    >>> report = batchnorm_only(model)
    >>> report.trained, report.trained_count, report.frozen_count
    (('1.weight', '1.bias'), 16, 80)
    """
    layers = dict(_norms(model, norm_types))
    affine = {name: layer for name, layer in layers.items() if layer.weight is not None}
    kinds = ", ".join(kind.__name__ for kind in norm_types)
    in_range("model", type(model).__name__, bool(affine), f"a model with affine layers of {kinds}")
    trained = {id(p) for layer in affine.values() for p in layer.parameters(recurse=False)}
    _check_untied(model, norm_types, trained)
    known = dict(model.named_parameters(remove_duplicate=False))
    for name in also:
        in_range("also", name, name in known, "names of parameters of the model")
        trained.add(id(known[name]))
    if train_output:
        outputs = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))]
        in_range("train_output", train_output, bool(outputs), "False for a model without linear layer or convolution")
        trained |= {id(p) for p in outputs[-1].parameters()}
    if init is not None:
        _initialize(affine.values(), init, generator)
    return freeze(model, trained, skipped=tuple(name for name in layers if name not in affine))


def _norms(model: nn.Module, types: tuple[type[nn.Module], ...]) -> Iterator[tuple[str, nn.Module]]:
    yield from ((name, layer) for name, layer in model.named_modules() if isinstance(layer, types))


def _check_untied(model: nn.Module, types: tuple[type[nn.Module], ...], trained: set[int]) -> None:
    for owner, module in model.named_modules():
        if not isinstance(module, types):
            for name, parameter in module.named_parameters(owner, recurse=False):
                allowed = "parameters that normalization shares with no other layer"
                in_range("model", name, id(parameter) not in trained, allowed)


@torch.no_grad()
def init_batchnorm_(model: nn.Module, scheme: str = "uniform", generator: torch.Generator | None = None) -> nn.Module:
    """First values of weight and bias of all batch normalization layers, in place.

    ==================  ===========  ====
    scheme              weight       bias
    ==================  ===========  ====
    "uniform"           U[0, 1)      0
    "fixed"             1            0
    "oneone"            1            1
    "positivenegative"  U[-1, 1)     0
    ==================  ===========  ====

    Args:
        model: any module.
        scheme: one of the above.
        generator: on the CPU; None: torch's own.

    Returns:
        ``model``.

    Raises:
        ValueError: another scheme.

    >>> import torch
    >>> from assay.nn import init_batchnorm_
    >>> init_batchnorm_(torch.nn.BatchNorm1d(3), "oneone").bias.tolist()
    [1.0, 1.0, 1.0]
    """
    _initialize((layer for _, layer in _norms(model, BATCHNORM_TYPES)), scheme, generator)
    return model


@torch.no_grad()
def _initialize(
    layers: Collection[nn.Module] | Iterator[nn.Module], scheme: str, generator: torch.Generator | None
) -> None:
    in_range("init", scheme, scheme in SCHEMES, ", ".join(SCHEMES))
    for layer in layers:
        weight, bias = layer.weight, getattr(layer, "bias", None)
        if isinstance(weight, Tensor):
            drawn = torch.rand(weight.shape, generator=generator)
            values = {"uniform": drawn, "positivenegative": 2 * drawn - 1}.get(scheme, torch.ones_like(drawn))
            weight.copy_(values)
        if isinstance(bias, Tensor):
            bias.fill_(1.0 if scheme == "oneone" else 0.0)


class DisabledFeatures(dict[str, Tensor]):
    """Masks of the channels whose weight is near 0, by the layer's name, for the model they were read from."""

    def __init__(self, layers: dict[str, nn.Module], threshold: float) -> None:
        super().__init__({name: layer.weight.detach().abs() < threshold for name, layer in layers.items()})  # type: ignore[operator]
        self._layers = layers

    @property
    def share(self) -> float:
        """Share of all channels."""
        return sum(int(mask.sum()) for mask in self.values()) / max(1, sum(mask.numel() for mask in self.values()))

    @property
    def shares(self) -> dict[str, float]:
        """Share of each layer's channels."""
        return {name: mask.double().mean().item() for name, mask in self.items()}

    @torch.no_grad()
    def prune_(self) -> None:
        """Set these weights to 0: the channel is then its bias, whatever comes in."""
        for name, mask in self.items():
            weight = self._layers[name].weight
            assert isinstance(weight, Tensor)
            weight.masked_fill_(mask, 0.0)


def disabled_features(model: nn.Module, threshold: float = 0.01) -> DisabledFeatures:
    """Which channels training has switched off: those whose batch normalization weight is below ``threshold`` in size.

    Args:
        model: any module.
        threshold: > 0.

    Returns:
        A dict of masks by layer, with ``share``, ``shares`` and ``prune_()``, which sets the weights to 0.

    Raises:
        ValueError: threshold out of range.

    >>> import torch
    >>> from assay.nn import disabled_features
    >>> norm = torch.nn.BatchNorm1d(4)
    >>> norm.weight.data[1] = -0.001
    >>> disabled_features(torch.nn.Sequential(norm)).shares
    {'0': 0.25}
    """
    in_range("threshold", threshold, threshold > 0, "> 0")
    return DisabledFeatures({n: m for n, m in _norms(model, BATCHNORM_TYPES) if m.weight is not None}, threshold)


def apply(recipe: Recipe, *, init: str = "uniform", train_output: bool = False) -> Recipe:
    """The recipe with all but the normalization layers frozen at their first values."""
    in_range("init", init, init in SCHEMES, ", ".join(SCHEMES))

    def model(run: Run) -> nn.Module:
        network = recipe.model(run)
        types = (*BATCHNORM_TYPES, nn.LayerNorm, nn.GroupNorm)
        batchnorm_only(network, norm_types=types, init=init, train_output=train_output)
        return network

    return replace(recipe, model=model)
