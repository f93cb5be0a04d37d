"""The search that found the EvoNorms: layers as graphs of primitive operations, two rejections, and evolution."""

from assay._lazy import exports

__getattr__, __dir__, __all__ = exports(__name__)
