"""Put another normalization where a model has layer normalization."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from assay.nn._swap import swap


def convert_layernorm_(module: nn.Module, factory: Callable[[int], nn.Module]) -> nn.Module:
    """Replace every ``torch.nn.LayerNorm`` of a model by ``factory(num_features)``, in place.

    Weight and bias go over where the new layer has parameters of these names and their shape; device, dtype and the
    training flag are kept.

    Args:
        module: the model; or a LayerNorm itself, whose replacement is then returned.
        factory: called with the number of features, for instance ``PowerNorm``.

    Returns:
        ``module``, or its replacement.

    Raises:
        ValueError: a LayerNorm over more than the last dimension.

    Warns:
        NoEffectWarning: there was no LayerNorm.

    >>> from torch import nn
    >>> from assay.nn import PowerNorm, convert_layernorm_
    >>> model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
    >>> convert_layernorm_(model, PowerNorm).norm1.psi2.shape
    torch.Size([16])
    """

    def replace(name: str, norm: nn.Module) -> nn.Module:
        assert isinstance(norm, nn.LayerNorm)
        if len(norm.normalized_shape) != 1:
            raise ValueError(f"{name}: normalized_shape = {norm.normalized_shape} is out of range: one dimension")
        new = factory(norm.normalized_shape[0])
        for key, parameter in norm.named_parameters():
            new.to(parameter.device, parameter.dtype)
            if getattr(new, key, None) is not None and getattr(new, key).shape == parameter.shape:
                setattr(new, key, parameter)
        return new

    return swap(module, nn.LayerNorm, replace)
