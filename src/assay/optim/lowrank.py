"""Projections into subspaces, for low-rank optimizers."""

from assay._lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    shared={
        "Projector": "assay.optim._lowrank",
        "RandomProjector": "assay.optim._lowrank",
        "SVDProjector": "assay.optim._lowrank",
    },
)
