"""Ways to change the network: you hold a model."""

from assay._lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__, "nn", shared={"swap": "assay.nn._swap", "NoEffectWarning": "assay.nn._swap"}
)
