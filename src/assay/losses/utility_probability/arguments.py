"""Checks of arguments that the room's parts share; each names the argument, its value and the allowed range."""

from __future__ import annotations

import torch
from torch import Tensor


def precise(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def floating(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"{name}.dtype = {tensor.dtype} is out of range: floating point")
    if tensor.dim() < 1:
        raise ValueError(f"{name}.shape = () is out of range: (..., C)")


def choices_fit(name: str, scores: Tensor, target: Tensor, least: int = 1) -> None:
    floating(name, scores)
    if scores.dim() <= least or target.shape != scores.shape[:-1]:
        shapes = f"{tuple(target.shape)} with {name} of shape {tuple(scores.shape)}"
        raise ValueError(f"target.shape = {shapes} is out of range: all but the last dimension")
    if target.is_floating_point() or target.dtype == torch.bool:
        raise ValueError(f"target.dtype = {target.dtype} is out of range: integer")
