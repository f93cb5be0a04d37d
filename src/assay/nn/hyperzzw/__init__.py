"""Slow networks that make kernels, the operator that applies them to features, and the network built of both."""

from assay._lazy import exports

__getattr__, __dir__, __all__ = exports(__name__)
