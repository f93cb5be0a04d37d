"""The dynamical systems framework: attention, state space models and recurrent networks in one form."""

from __future__ import annotations

from assay.nn.dsf.conversions import (
    elu_plus_one,
    from_linear_attention,
    from_normalized_attention,
    from_qlstm,
    from_s6,
    from_softmax_attention,
    from_ssd,
)
from assay.nn.dsf.layers import QLSTM, NormalizedAttention
from assay.nn.dsf.recall import mqar
from assay.nn.dsf.system import LTVSystem, equivalent

__all__ = [
    "QLSTM",
    "LTVSystem",
    "NormalizedAttention",
    "elu_plus_one",
    "equivalent",
    "from_linear_attention",
    "from_normalized_attention",
    "from_qlstm",
    "from_s6",
    "from_softmax_attention",
    "from_ssd",
    "mqar",
]
