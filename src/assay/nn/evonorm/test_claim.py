"""The claim on a small network, where a broken variant of B0 is caught, and its figure."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from torch import Tensor, nn

from assay.bench.claims import recorded
from assay.bench.evidence import FAILS, HOLDS, Bench
from assay.catalogue import find
from assay.nn import evonorm
from assay.nn.evonorm.claim import B0, BATCH_RELU, BATCH_SIZE, claim, figure

room = importlib.import_module("assay.nn.evonorm.claim")


def everywhere(norm: Callable[..., nn.Module]) -> nn.Module:
    """A network that sees the same at every place, so that without a nonlinearity it knows the mean pixel alone."""

    def conv(inputs: int, outputs: int, stride: int) -> nn.Module:
        return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False, padding_mode="circular")

    body = (nn.Unflatten(1, (1, 8, 8)), conv(1, 16, 1), norm(16), conv(16, 32, 2), norm(32))
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def without_maximum(name: str, num_features: int) -> nn.Module:
    """The broken variant of the card: the deviation of the batch alone, whatever the other one is."""

    def rival(x: Tensor, var: Tensor, mean: Tensor) -> Tensor:
        return x.new_tensor(-1.0)

    layer = evonorm(name, num_features)
    layer._rival = rival
    return layer


def test_the_claim_does_not_hold_for_a_layer_without_the_maximum(monkeypatch):
    monkeypatch.setattr(room, "residual", everywhere)
    # Batch normalization learns so slowly that it comes out in the middle between the two.
    monkeypatch.setattr(room, "EPOCHS", {BATCH_SIZE: 4})
    monkeypatch.setattr(room, "SEEDS", {BATCH_SIZE: 4})
    monkeypatch.setattr(room, "RATES", {BATCH_SIZE: {B0: 0.1, BATCH_RELU: 0.005}})
    real, broken = (claim(Bench(), method=method, parts=("B0",)) for method in (evonorm, without_maximum))
    assert (real.checks[0].verdict, broken.checks[0].verdict) == (HOLDS, FAILS)


def test_the_claim_is_drawn():
    evidence, _ = recorded(find("evonorm"))
    assert figure(evidence) is not None
