"""Where the tokens of a deep selective state space model go: to the origin, or away."""

from assay._lazy import exports

__getattr__, __dir__, __all__ = exports(__name__)
