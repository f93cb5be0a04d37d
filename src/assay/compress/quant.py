"""Tensors as codes of few bits."""

from assay._lazy import exports

__getattr__, __dir__, __all__ = exports(__name__)
