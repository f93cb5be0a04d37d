"""What torch does to a checkpoint while loading it, undone where an optimizer needs that."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def as_saved(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> Iterator[tuple[Tensor, str, Tensor]]:
    """(parameter, name, tensor) of a checkpoint that was just loaded, with the dtypes in which it was saved.

    ``load_state_dict`` casts every tensor of the state to its parameter's dtype: codes to numbers, and the float32
    state of a parameter in half precision to half precision.
    """
    saved, mine = (
        itertools.chain.from_iterable(group["params"] for group in groups)
        for groups in (state_dict["param_groups"], optimizer.param_groups)
    )
    for key, p in zip(saved, mine, strict=True):
        for name, value in state_dict["state"].get(key, {}).items():
            if isinstance(value, Tensor):
                yield p, name, value.to(device=p.device)
