"""Convex functions that shape the step of Lion-K, and the constraints that they stand for."""

from assay._lazy import exports

__getattr__, __dir__, __all__ = exports(__name__)
