"""The contract of the family over the layers of all its cards."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
from torch import nn

from assay.catalogue import Card, cards
from assay.nn._contract import CHECKS, Example

CARDS = [card for card in cards() if card.family == "nn"]


def examples_of(card: Card) -> list[Example]:
    room, _, stem = card.module.rpartition(".")
    return getattr(importlib.import_module(f"{room}.test_{stem}"), "EXAMPLES", [])


EXAMPLES = [example for card in CARDS for example in examples_of(card)]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_layer(example: Example, check: Callable[[Example], None]) -> None:
    check(example)


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.id)
def test_every_public_layer_has_an_example(card: Card) -> None:
    public = [card.load(name) for name in card.public if "." not in name]
    layers = {piece for piece in public if isinstance(piece, type) and issubclass(piece, nn.Module)}
    assert layers <= {example.make.func for example in examples_of(card)}
