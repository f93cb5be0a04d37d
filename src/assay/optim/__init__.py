"""Ways to change the update: you hold parameters and gradients."""

from assay._lazy import exports

__getattr__, __dir__, __all__ = exports(__name__, shared={"SAM": "assay.optim._sam"})
