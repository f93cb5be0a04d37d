"""Exchange the layers of an existing model: what every drop-in layer of the family is put in with."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

# One setting under the names that torch's own layers give it.
_SYNONYMS = ({"num_features", "num_channels", "normalized_shape"}, {"affine", "elementwise_affine"})
_ABSENT = object()


class NoEffectWarning(UserWarning):
    """A method that was applied has changed nothing."""


def swap(
    model: nn.Module,
    old: type[nn.Module] | tuple[type[nn.Module], ...],
    new: type[nn.Module] | Callable[..., nn.Module],
    **options: Any,
) -> nn.Module:
    """Replace every layer of class ``old`` in ``model``, in place, by a layer ``new`` that takes over what maps.

    A class ``new`` is called with the arguments of its signature that the old layer knows, ``options`` before them:
    ``swap(model, nn.BatchNorm2d, BatchGroupNorm2d, num_groups=4)`` keeps ``num_features``, ``eps``, ``momentum``,
    ``affine``, device and dtype. Parameters of the same name and shape become the new layer's own, as the same
    objects: tied weights stay tied, frozen ones frozen, and an optimizer made before goes on updating them. A layer
    that was frozen as a whole stays so, its new parameters included. Buffers are copied if all that share a name share
    the shape (running statistics are one thing; half of them would be wrong). The training flag is kept; hooks are not.

    A callable ``new`` is called as ``new(name, module, **options)`` with the layer's dotted name; what it returns is
    put in as it is, and returning ``module`` itself leaves that layer alone.

    A layer that stands at several places is replaced by one layer at all of them. Only the very classes in ``old``
    count, not their subclasses: a subclass is there for what it does differently, and that would be lost unasked
    (the output projection inside torch's attention is a ``Linear`` whose ``forward`` is never called). Name the
    subclass in ``old`` to have it replaced too. Where torch's transformer encoder would step past the new layers in
    evaluation, through its fused kernel, it is told not to.

    Args:
        model: the network; it may itself be a layer to replace.
        old: a layer class or a tuple of them.
        new: a layer class, or a callable ``(name, module) -> module``.
        options: further arguments of ``new``; they win over those of the old layer.

    Returns:
        ``model``, or its replacement if ``model`` itself was replaced.

    Raises:
        TypeError: ``old`` is no layer class; ``new`` needs an argument that neither the old layer nor ``options``
            has, does not know one of ``options``, or returns no module. The model is then as it was.

    Warns:
        NoEffectWarning: nothing was replaced.

    >>> from torch import nn
    >>> from assay.nn import swap
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8, eps=1e-6), nn.ReLU())
    >>> swap(model, nn.LayerNorm, nn.RMSNorm)[1]
    RMSNorm((8,), eps=1e-06, elementwise_affine=True)
    >>> swap(model, nn.Linear, lambda name, layer: nn.Identity() if name == "0" else layer)[0]
    Identity()
    """
    kinds = old if isinstance(old, tuple) else (old,)
    if not kinds or not all(isinstance(kind, type) and issubclass(kind, nn.Module) for kind in kinds):
        raise TypeError(f"old = {old!r} is out of range: a subclass of torch.nn.Module or a tuple of them")
    modules = dict(model.named_modules())
    exchanged: dict[nn.Module, nn.Module] = {}
    for name, module in modules.items():
        if type(module) in kinds:
            layer = like(module, new, **options) if isinstance(new, type) else new(name, module, **options)
            if not isinstance(layer, nn.Module):
                raise TypeError(f"new returned {layer!r} for {name!r}: a torch.nn.Module is wanted")
            if layer is not module:
                exchanged[module] = layer.train(module.training)
    if not exchanged:
        _warn(kinds, modules)
    _leave_fused_encoder(modules, exchanged)
    for parent in modules.values():
        for key, child in parent._modules.items():
            if child in exchanged:
                setattr(parent, key, exchanged[child])
    return exchanged.get(model, model)


def like(module: nn.Module, new: type[nn.Module], **options: Any) -> nn.Module:
    """A layer of class ``new`` with the settings, parameters and buffers of ``module`` that map (see :func:`swap`)."""
    accepted = inspect.signature(new).parameters
    known = {name: _setting(module, name) for name in accepted if name not in options}
    settings = {name: value for name, value in known.items() if value is not _ABSENT} | options
    wanted = [name for name, p in accepted.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if missing := [name for name in wanted if name not in settings]:
        raise TypeError(
            f"{new.__name__} needs {', '.join(missing)}, unknown to {type(module).__name__}: give it as an option"
        )
    layer = new(**settings)
    sample, parameters = _sample(module), list(module.parameters())
    if sample is not None and not {"device", "dtype"} <= accepted.keys():
        layer.to(sample.device, sample.dtype)
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        layer.requires_grad_(False)
    _carry(_named(module.named_parameters), _named(layer.named_parameters), layer)
    before, after = _named(module.named_buffers), _named(layer.named_buffers)
    if all(before[name].shape == after[name].shape for name in before.keys() & after.keys()):
        _carry({name: buffer.clone() for name, buffer in before.items()}, after, layer)
    return layer


def _named(tensors: Callable[..., Iterator[tuple[str, torch.Tensor]]]) -> dict[str, torch.Tensor]:
    return dict(tensors(remove_duplicate=False))


def _carry(source: dict[str, torch.Tensor], target: dict[str, torch.Tensor], layer: nn.Module) -> None:
    for name in source.keys() & target.keys():
        if source[name].shape == target[name].shape:
            owner, _, key = name.rpartition(".")
            setattr(layer.get_submodule(owner), key, source[name])


def _setting(module: nn.Module, name: str) -> Any:
    """What ``module`` was built with under an argument called ``name``, as far as its attributes tell."""
    if name in ("device", "dtype"):
        sample = _sample(module)
        return _ABSENT if sample is None else getattr(sample, name)
    if name in module._parameters:  # ``bias=True`` became a parameter, ``bias=False`` None
        return module._parameters[name] is not None
    same = next((names for names in _SYNONYMS if name in names), {name})
    value = next((vars(module)[known] for known in (name, *sorted(same)) if known in vars(module)), _ABSENT)
    if isinstance(value, tuple) and name in ("num_features", "num_channels"):
        return value[0] if len(value) == 1 else _ABSENT
    return value


def _sample(module: nn.Module) -> torch.Tensor | None:
    """A floating-point tensor of ``module``, to read device and dtype from."""
    return next((t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()), None)


def _leave_fused_encoder(modules: dict[str, nn.Module], exchanged: dict[nn.Module, nn.Module]) -> None:
    """In eval mode torch's encoder may compute norms and linears itself from their weights: never through ours."""
    for parent in modules.values():
        if isinstance(parent, (nn.TransformerEncoderLayer, nn.TransformerEncoder)) and any(
            child in exchanged for child in parent.modules()
        ):
            if isinstance(parent, nn.TransformerEncoderLayer):
                parent.activation_relu_or_gelu = 0
            else:
                parent.use_nested_tensor = False


def _warn(kinds: tuple[type[nn.Module], ...], modules: dict[str, nn.Module]) -> None:
    names = " or ".join(kind.__name__ for kind in kinds)
    derived = sorted({type(module).__name__ for module in modules.values() if isinstance(module, kinds)})
    hint = f"; subclasses are only replaced when named: {', '.join(derived)}" if derived else ""
    warnings.warn(f"swap changed nothing: the model has no {names}{hint}", NoEffectWarning, stacklevel=3)
