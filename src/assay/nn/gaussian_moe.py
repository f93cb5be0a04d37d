"""Mixtures of Gaussian experts behind a top-K softmax gate, as statistical models: fitted, sampled and compared."""

from assay._lazy import exports

__getattr__, __dir__, __all__ = exports(__name__)
