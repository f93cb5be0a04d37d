"""The mean of a network's last checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def average_checkpoints(state_dicts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean of several ``state_dict()`` of one network: the intermediate model that is fine-tuned without masks.

    Each floating-point (or complex) entry is the mean over the checkpoints, taken in float64 and given in the entry's
    own dtype; what is no such tensor, as batch normalization's integer counter, is the last checkpoint's.

    Args:
        state_dicts: at least one; read one after the other, so a generator that loads files holds one at a time.

    Returns:
        A new dict with the same entries; nothing in it is shared with the checkpoints.

    Raises:
        ValueError: no checkpoint, or two with other names or shapes.

    Source:
        Yavuz, Yang: Policy Gradient-Driven Noise Mask, 2024, arXiv 2406.14568.

    Example:
        >>> import torch
        >>> from assay.data import average_checkpoints
        >>> average_checkpoints({"weight": torch.tensor([k / 2]), "steps": torch.tensor(k)} for k in (1, 2))
        {'weight': tensor([0.7500]), 'steps': tensor(2)}
    """
    sums: dict[str, Tensor] = {}
    last: dict[str, Any] = {}
    number = 0
    for number, state in enumerate(state_dicts, 1):
        if number > 1 and state.keys() != last.keys():
            other = sorted(state.keys() ^ last.keys())
            raise ValueError(f"checkpoint {number} and those before it differ in the entries {other}")
        for name, value in state.items():
            if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
                if number > 1 and value.shape != last[name].shape:
                    shapes = f"{tuple(value.shape)} is out of range: {tuple(last[name].shape)}"
                    raise ValueError(f"{name}.shape = {shapes}, as in the checkpoints before it")
                wide = value.detach().to(torch.promote_types(value.dtype, torch.float64))
                sums[name] = sums[name] + wide.to(sums[name].device) if number > 1 else wide
        last = dict(state)
    if number == 0:
        raise ValueError("state_dicts is empty: at least one checkpoint is needed")
    copies = {name: value.clone() if isinstance(value, Tensor) else value for name, value in last.items()}
    return copies | {name: (total / number).to(last[name].dtype) for name, total in sums.items()}
