"""Operators of our own among torch's, under the package's name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.library import CustomOpDef


def opaque(name: str) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Make a function an operator that a compiler calls and does not look into; it changes none of its arguments."""
    return torch.library.custom_op(f"{__package__}::{name}", mutates_args=())
