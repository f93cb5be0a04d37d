"""Ways to choose or change the data: you hold a dataset."""

from assay._lazy import exports

__getattr__, __dir__, __all__ = exports(__name__, shared={"IndexedDataset": "assay.data._indexed"})
