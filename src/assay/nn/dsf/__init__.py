"""Attention, state space models and recurrent networks as linear systems of one form."""

from assay._lazy import exports

__getattr__, __dir__, __all__ = exports(__name__)
