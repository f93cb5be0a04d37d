"""Networks that grow while they train, and the score that says where."""

from assay._lazy import exports

__getattr__, __dir__, __all__ = exports(__name__)
