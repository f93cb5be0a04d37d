"""Ways to change the objective: you hold outputs and targets."""

from assay._lazy import exports

__getattr__, __dir__, __all__ = exports(__name__)
