"""The control of training batch normalization alone: as many parameters, drawn among the weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from assay._checks import in_range
from assay.nn.batchnorm_only.report import FrozenReport, freeze, unfreeze


class _Entries(nn.Module):
    """Some entries of a weight as a parameter of their own."""

    index: Tensor

    def __init__(self, index: Tensor, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("index", index.to(weight.device))
        self.values = nn.Parameter(weight.detach().flatten()[self.index].clone())

    def forward(self, weight: Tensor) -> Tensor:
        return weight.flatten().scatter(0, self.index, self.values).view_as(weight)


@dataclass(frozen=True)
class RandomSubset:
    """A model of which some entries of some weights are trained; ``report`` counts them as parameters of their own."""

    model: nn.Module
    indices: dict[str, Tensor]
    report: FrozenReport

    @property
    def count(self) -> int:
        """Trained entries."""
        return sum(index.numel() for index in self.indices.values())

    def remove(self) -> nn.Module:
        """Make the weights plain parameters again, as trained, with the flags that they had; returns the model."""
        for name in self.indices:
            parametrize.remove_parametrizations(self.model.get_submodule(name), "weight")
        return unfreeze(self.model, self.report)


def random_per_channel(
    model: nn.Module,
    per_channel: int | None = 2,
    *,
    count: int | None = None,
    types: tuple[type[nn.Module], ...] = (nn.Conv2d,),
    generator: torch.Generator | None = None,
) -> RandomSubset:
    """Freeze a model but for a few weights of each output channel, drawn at random: the control of the paper.

    Two in each channel of a convolution are as many as its batch normalization has. They become a parameter of their
    own (``torch.nn.utils.parametrize``), so that neither momentum nor weight decay reaches the others; normalization
    keeps its first weight and bias.

    Args:
        model: any module, in place.
        per_channel: weights drawn among those into each output channel, at most all of them; None with ``count``.
        count: weights drawn among all of a layer instead.
        types: classes of the layers, subclasses included.
        generator: of the draw, on the CPU.

    Returns:
        The drawn indices into the flattened weights by layer, the report, and ``remove()``.

    Raises:
        ValueError: no such layer, a weight that two of them share, or not exactly one of ``per_channel`` and ``count``,
            >= 1.

    Source: J. Frankle, D. J. Schwab, A. S. Morcos, Training BatchNorm and Only BatchNorm, ICLR 2021, arXiv 2003.00152.

    >>> import torch
    >>> from assay.nn import random_per_channel
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.BatchNorm2d(8))
    >>> random_per_channel(model).count
    16
    """
    in_range("per_channel", per_channel, (per_channel is None) != (count is None), "None if, and only if, count is not")
    for name, number in (("per_channel", per_channel), ("count", count)):
        in_range(name, number, number is None or number >= 1, ">= 1")
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, types)}
    kinds = ", ".join(kind.__name__ for kind in types)
    in_range("model", type(model).__name__, bool(layers), f"a model with layers of {kinds}")
    weights = {id(layer.weight) for layer in layers.values()}
    in_range("model", type(model).__name__, len(weights) == len(layers), "a model whose layers share no weight")
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    indices, trained = {}, set()
    for name, layer in layers.items():
        weight = layer.weight
        assert isinstance(weight, Tensor)
        if count is None:
            assert per_channel is not None
            fan_in = weight[0].numel()
            order = torch.rand(len(weight), fan_in, generator=generator).argsort(1)[:, :per_channel]
            index = (order + fan_in * torch.arange(len(weight))[:, None]).flatten()
        else:
            index = torch.randperm(weight.numel(), generator=generator)[:count]
        entries = _Entries(index, weight)
        parametrize.register_parametrization(layer, "weight", entries, unsafe=True)
        indices[name] = index
        trained.add(id(entries.values))
    report = freeze(model, trained)
    return RandomSubset(model, indices, FrozenReport(**{**vars(report), "before": before}))
