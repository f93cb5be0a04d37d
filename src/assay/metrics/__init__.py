"""Measures of retrieval and ranking that the experiments here and their users share."""

from assay._lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    shared={
        "mean_average_precision": "assay.metrics._retrieval",
        "mean_reciprocal_rank": "assay.metrics._retrieval",
        "ndcg": "assay.metrics._retrieval",
        "nmi": "assay.metrics._retrieval",
        "precision_at_k": "assay.metrics._retrieval",
        "recall_at_k": "assay.metrics._retrieval",
        "same_label_pairs": "assay.metrics._retrieval",
    },
)
