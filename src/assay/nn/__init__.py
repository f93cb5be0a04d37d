"""Ways to change the network: you hold a model."""

from assay._lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    shared={
        "NoEffectWarning": "assay.nn._swap",
        "ProjectionHead": "assay.nn._projection",
        "SelectiveSSM": "assay.nn._ssm",
        "convert_layernorm_": "assay.nn._convert",
        "linear_scan": "assay.nn._scan",
        "selective_scan": "assay.nn._scan",
        "swap": "assay.nn._swap",
    },
)
