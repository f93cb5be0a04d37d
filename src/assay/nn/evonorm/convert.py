"""Put EvoNorms where a model has batch normalization, with or without an activation after it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from assay.nn._swap import swap
from assay.nn.evonorm.layers import evonorm

_MODULES = (nn.ReLU, nn.ReLU6, nn.SiLU)
_FUNCTIONS = (F.relu, F.relu6, F.silu, torch.relu, torch.relu_)
_METHODS = ("relu", "relu_")


def convert_bn_act_(module: nn.Module, norm: str | Callable[..., nn.Module]) -> nn.Module:
    """Replace every ``BatchNorm2d``, together with a ReLU, ReLU6 or SiLU right after it, by one layer, in place.

    A batch normalization whose output goes nowhere but into an activation becomes a layer with ``nonlinear=True``, and
    the activation is taken out; any other becomes one with ``nonlinear=False``. What comes after a layer is read from
    the ``forward`` of the module that holds it, by ``torch.fx``. An activation module that was there for this alone
    becomes an ``Identity``. Where it is also used elsewhere (torchvision's residual blocks) or is a function, the
    module that holds the pair becomes an ``fx.GraphModule`` of the same layers, under the same names.

    Weight, bias and running variance go over where the new layer has them; device, dtype and training flag are kept.

    Args:
        module: the model; if it is itself replaced, use what is returned.
        norm: a name for :func:`assay.nn.evonorm`, or a callable ``(num_features, nonlinear=...) -> module``, for
            instance ``functools.partial(EvoNormS0, group_size=8)``.

    Returns:
        ``module``, or its replacement.

    Raises:
        ValueError: ``torch.fx`` cannot trace a module that holds a batch normalization. The model is then as it was.

    Warns:
        NoEffectWarning: there was no BatchNorm2d.

    >>> from torch import nn
    >>> from assay.nn import convert_bn_act_
    >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU())
    >>> convert_bn_act_(model, "B0")[1:]
    Sequential(
      (1): EvoNormB0(16, nonlinear=True, eps=0.001, momentum=0.1)
      (2): Identity()
    )
    """
    make = partial(evonorm, norm) if isinstance(norm, str) else norm
    modules = dict(module.named_modules())
    holders = {name: m for name, m in modules.items() if any(type(c) is nn.BatchNorm2d for c in m.children())}
    graphs = {name: _traced(name, holder) for name, holder in holders.items()}
    followed = {name: _activations(holder, graphs[name]) for name, holder in holders.items()}
    paired = {
        holders[name].get_submodule(str(node.all_input_nodes[0].target))
        for name, nodes in followed.items()
        for node in nodes
    }
    whole = swap(module, nn.BatchNorm2d, lambda _, old: _replacement(old, make, old in paired))

    rewritten: dict[nn.Module, nn.Module] = {}
    for name, nodes in followed.items():
        if left := _take_out(holders[name], graphs[name], nodes):
            rewritten[holders[name]] = _without(left, holders[name], graphs[name])
    for parent in modules.values():
        for key, child in parent._modules.items():
            if child in rewritten:
                setattr(rewritten.get(parent, parent), key, rewritten[child])
    return rewritten.get(whole, whole)


class _Shallow(fx.Tracer):
    """Follows the forward pass of one module and steps into none of those that it holds."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _traced(name: str, holder: nn.Module) -> fx.Graph:
    try:
        return _Shallow().trace(holder)
    except Exception as error:  # whatever a forward pass does with a value that is not there
        raise ValueError(f"{name or 'module'} of class {type(holder).__name__} cannot be traced: {error}") from error


def _activations(holder: nn.Module, graph: fx.Graph) -> list[fx.Node]:
    """The activations that are the only thing done with the output of a batch normalization."""
    found = []
    for node in graph.nodes:
        if node.op == "call_module" and type(holder.get_submodule(node.target)) is nn.BatchNorm2d:
            after = next(iter(node.users)) if len(node.users) == 1 else None
            if after is not None and _is_activation(holder, after):
                found.append(after)
    return found


def _is_activation(holder: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(holder.get_submodule(str(node.target)), _MODULES)
    return node.target in (_FUNCTIONS if node.op == "call_function" else _METHODS)


def _replacement(old: nn.Module, make: Callable[..., nn.Module], nonlinear: bool) -> nn.Module:
    assert isinstance(old, nn.BatchNorm2d)
    new: Any = make(old.num_features, nonlinear=nonlinear)
    for key, tensor in (*old.named_parameters(), *old.named_buffers()):
        if tensor.is_floating_point():
            new.to(tensor.device, tensor.dtype)
        if getattr(new, key, None) is not None and getattr(new, key).shape == tensor.shape:
            setattr(new, key, tensor)
    return new


def _take_out(holder: nn.Module, graph: fx.Graph, nodes: list[fx.Node]) -> list[fx.Node]:
    """Make Identities of the activation modules that are called for nothing else; the calls that are left."""
    left = []
    for node in nodes:
        calls = [other for other in graph.nodes if (other.op, other.target) == (node.op, node.target)]
        if node.op == "call_module" and all(call in nodes for call in calls):
            holder.set_submodule(str(node.target), nn.Identity())
        else:
            left.append(node)
    return left


def _without(nodes: list[fx.Node], holder: nn.Module, graph: fx.Graph) -> nn.Module:
    for node in nodes:
        node.replace_all_uses_with(node.all_input_nodes[0])
        graph.erase_node(node)
    return fx.GraphModule(holder, graph, type(holder).__name__).train(holder.training)
