"""Ways to make tensors small: you hold weights, states or activations."""

from assay._lazy import exports

__getattr__, __dir__, __all__ = exports(__name__)
