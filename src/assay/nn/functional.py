"""The layers of :mod:`assay.nn` as functions."""

from assay._lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    shared={"linear_scan": "assay.nn._scan", "selective_scan": "assay.nn._scan"},
)
