"""Looking at a model without leaving a trace."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """All modules in evaluation mode; afterwards each has its own flag back, also where they differed."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        # The flag, not eval(): a module that overrides train() must not notice.
        for module, _ in flags:
            module.training = False
        yield
    finally:
        for module, training in flags:
            module.training = training
