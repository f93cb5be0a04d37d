"""The contract of the family over the losses of all its cards."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import pytest

from assay.catalogue import Card, cards
from assay.losses._contract import CHECKS, MEMORY_CHECKS, Example, Exempt, Memory

CARDS = [card for card in cards() if card.family == "losses"]


def examples_of(card: Card) -> list[Any]:
    room, _, stem = card.module.rpartition(".")
    return getattr(importlib.import_module(f"{room}.test_{stem}"), "EXAMPLES", [])


EXAMPLES = [example for card in CARDS for example in examples_of(card)]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("example", [e for e in EXAMPLES if isinstance(e, Example)], ids=str)
def test_loss(example: Example, check: Callable[[Example], None]) -> None:
    check(example)


@pytest.mark.parametrize("check", MEMORY_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("memory", [e for e in EXAMPLES if isinstance(e, Memory)], ids=str)
def test_loss_with_a_memory(memory: Memory, check: Callable[[Memory], None]) -> None:
    check(memory)


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.id)
def test_every_public_loss_has_an_example(card: Card) -> None:
    public = [card.load(name) for name in card.public if "." not in name]
    losses = {f for f in public if inspect.isfunction(f) and "reduction" in inspect.signature(f).parameters}
    assert losses <= {example.loss for example in examples_of(card) if isinstance(example, Example | Exempt)}
