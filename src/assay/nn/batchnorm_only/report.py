"""What is trained and what is frozen, and the way back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class FrozenReport:
    """Names of the parameters that are trained and frozen, their numbers, and what was trained before.

    ``skipped`` are normalization layers without parameters. ``before`` holds the flags that :func:`unfreeze` restores.
    """

    trained: tuple[str, ...]
    frozen: tuple[str, ...]
    skipped: tuple[str, ...]
    trained_count: int
    frozen_count: int
    before: Mapping[str, bool]

    @property
    def share(self) -> float:
        """Trained parameters over all."""
        return self.trained_count / (self.trained_count + self.frozen_count)


def freeze(model: nn.Module, trained: set[int], skipped: tuple[str, ...] = ()) -> FrozenReport:
    """Freeze all parameters but those whose ``id`` is in ``trained``."""
    parameters = dict(model.named_parameters())
    before = {name: parameter.requires_grad for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.requires_grad_(id(parameter) in trained)
    kept = tuple(name for name, parameter in parameters.items() if parameter.requires_grad)
    frozen = tuple(name for name, parameter in parameters.items() if not parameter.requires_grad)
    kept_count, frozen_count = (sum(parameters[name].numel() for name in names) for names in (kept, frozen))
    return FrozenReport(kept, frozen, skipped, kept_count, frozen_count, before)


def unfreeze(model: nn.Module, report: FrozenReport) -> nn.Module:
    """Give every parameter the flag ``requires_grad`` that it had before it was frozen.

    Args:
        model: the model that was frozen.
        report: what freezing it returned.

    Returns:
        ``model``.

    Raises:
        ValueError: the model has no parameter of a name in the report.

    >>> import torch
    >>> from assay.nn import batchnorm_only, unfreeze
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    >>> all(p.requires_grad for p in unfreeze(model, batchnorm_only(model)).parameters())
    True
    """
    parameters = dict(model.named_parameters())
    if missing := sorted(report.before.keys() - parameters.keys()):
        raise ValueError(f"report = {missing} is out of range: parameters of the model")
    for name, flag in report.before.items():
        parameters[name].requires_grad_(flag)
    return model
