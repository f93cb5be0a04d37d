"""The HyperZZW operator, the slow-fast encoder block, and the Terminator network."""

from __future__ import annotations

from assay.nn.hyperzzw.network import SFNEBlock, Terminator, slow_neural_loss
from assay.nn.hyperzzw.operators import (
    RGU,
    GlobalHyperZZW,
    GroupIBS,
    HyperChannelInteraction,
    HyperInteraction,
    LocalHyperZZW,
    hyper_zzw_elementwise,
)
from assay.nn.hyperzzw.slow_net import ContextSlowNet, SlowNet

__all__ = [
    "RGU",
    "ContextSlowNet",
    "GlobalHyperZZW",
    "GroupIBS",
    "HyperChannelInteraction",
    "HyperInteraction",
    "LocalHyperZZW",
    "SFNEBlock",
    "SlowNet",
    "Terminator",
    "hyper_zzw_elementwise",
    "slow_neural_loss",
]
