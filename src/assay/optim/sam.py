"""Masks for the perturbations of :class:`assay.optim.SAM`."""

from assay._lazy import exports

__getattr__, __dir__, __all__ = exports(__name__, shared={"MaskPolicy": "assay.optim._sam"})
