"""Tensors on the wire: lossy compressors that say how many bytes they take."""

from assay._lazy import exports

__getattr__, __dir__, __all__ = exports(__name__)
