"""Linear models as scikit-learn estimators."""

from assay._lazy import exports

__getattr__, __dir__, __all__ = exports(__name__)
