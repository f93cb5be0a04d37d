"""The family's contract over every card of it: a room offers its pieces in its own test file."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from assay import catalogue
from assay.data import _contract


def offered(kind: str) -> list[Any]:
    """What the rooms' test files offer under the name ``kind``, as parameters named ``id:piece``."""
    found = []
    for card in (card for card in catalogue.cards() if any(path.startswith("assay.data.") for path in card.paths)):
        package, _, stem = card.module.rpartition(".")
        room = importlib.import_module(f"{package}.test_{stem}")
        pieces = getattr(room, kind, dict)()
        found += [pytest.param(piece, id=f"{card.id}:{name}") for name, piece in pieces.items()]
    return found


@pytest.mark.parametrize("check", _contract.SCORER_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("scorer", offered("scorers"))
def test_scorer(scorer, check):
    check(scorer)


@pytest.mark.parametrize("tracker", offered("trackers"))
def test_tracker_resumes(tracker):
    _contract.resumes(*tracker)


@pytest.mark.parametrize("check", _contract.SAMPLER_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("sampler", offered("samplers"))
def test_sampler(sampler, check):
    check(*sampler)
