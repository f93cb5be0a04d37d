"""How strongly a known loss may curve in the outputs that it is given."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

LOSSES: dict[Any, tuple[Any, float]] = {
    nn.BCEWithLogitsLoss: (F.binary_cross_entropy_with_logits, 1 / 4),
    nn.CrossEntropyLoss: (F.cross_entropy, 1 / 2),
    nn.MSELoss: (F.mse_loss, 2.0),
}
"""The loss as a module and as a function, and the largest second derivative of an example's loss."""


def smoothness(loss_fn: Callable[[Tensor], Tensor], z: Tensor) -> float:
    """L of a known loss at outputs of this shape: the largest second derivative, over n where it is a mean.

    ``loss_fn`` is a ``functools.partial`` of a module or function of :data:`LOSSES` with a bound ``target``, without
    weights.
    """
    if not isinstance(loss_fn, functools.partial) or "target" not in loss_fn.keywords or loss_fn.args:
        raise _unknown(loss_fn)
    function, said = loss_fn.func, dict(loss_fn.keywords)
    target = said.pop("target")
    matches = [entry for module, entry in LOSSES.items() if type(function) is module or function is entry[0]]
    if not matches:
        raise _unknown(loss_fn)
    ((plain, curvature),) = matches
    defaults = inspect.signature(plain).parameters
    names = [name for name in ("weight", "pos_weight", "reduction", "ignore_index") if name in defaults]
    if function is plain:
        options = {name: said.get(name, defaults[name].default) for name in names}
    else:
        options = {name: getattr(function, name, None) for name in names}
    if any(options.get(name) is not None for name in ("weight", "pos_weight")):
        raise _unknown(loss_fn)
    if options["reduction"] == "sum":
        return curvature
    if plain is not F.cross_entropy:
        return curvature / z.numel()
    if target.is_floating_point():
        return curvature / target.shape[0] if target.dim() else curvature
    return curvature / max(1, int((target != options["ignore_index"]).sum()))


def _unknown(loss_fn: Any) -> ValueError:
    known = "functools.partial(nn.CrossEntropyLoss(), target=y), nn.BCEWithLogitsLoss or nn.MSELoss, without weights"
    return ValueError(f"lr = 'smoothness' is out of range for loss_fn = {loss_fn!r}: it is known for {known}")
