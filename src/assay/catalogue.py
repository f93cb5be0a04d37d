"""The catalogue: every method's card, read without importing torch.

A method is a folder ``assay/<family>/.../<id>/`` (dashes as underscores) that holds a ``card.md``. The card's front
matter, TOML between two lines ``+++``, is the only registry: listing, tables, tests and the bench read it.
"""

from __future__ import annotations

import functools
import importlib
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).parent
KINDS = ("method", "analysis", "evaluation", "survey", "position")
SEAMS = ("data", "batch", "model", "objective", "update", "schedule")
HEADINGS = ("Use", "What it does", "Options", "Cost", "Claim", "Differences", "Limits")


class CardError(ValueError):
    """A card whose front matter cannot be used; the message names the file and the field."""


class UnknownMethod(ValueError):
    """A name that is in no card; the message offers the nearest ones."""

    def __init__(self, name: str, known: list[str], what: str = "method") -> None:
        import difflib

        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(near)}?" if near else f" Known: {', '.join(sorted(known))}."
        super().__init__(f"unknown {what} {name!r}.{hint}")


@dataclass(frozen=True)
class Card:
    """What a card's front matter says of a method.

    ``public`` are the names that users import: from ``assay.<family>``, from a module in it (``functional.name``), or,
    where another family's users would look for it, by the whole path (``assay.metrics.global_auc``).
    ``apply`` names a function ``Recipe -> Recipe`` of the room; without it ``piece`` is put at the card's seam in the
    usual way of that seam. ``space`` maps a tunable option to its default and its sampler (see ``bench.space``).
    """

    id: str
    name: str
    family: str
    kind: str
    paper: str
    authors: str
    year: int
    arxiv: str
    public: tuple[str, ...]
    claim: str
    seam: str = ""
    piece: str = ""
    apply: str = ""
    replaces: str = ""
    extra: str = ""
    space: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    folder: Path = SOURCE
    body: str = ""

    @property
    def module(self) -> str:
        """Dotted name of the room's main module, ``assay.optim.adamp.adamp``."""
        inside = self.folder.relative_to(SOURCE).parts
        return ".".join(("assay", *inside, inside[-1]))

    @property
    def paths(self) -> tuple[str, ...]:
        """The public names with the packages that offer them, ``assay.optim.AdamP``."""
        return tuple(name if name.startswith("assay.") else f"assay.{self.family}.{name}" for name in self.public)

    def files(self) -> dict[str, Path]:
        """The five files that make a complete room, by role."""
        stem = self.folder.name
        names = {"code": f"{stem}.py", "card": "card.md", "claim": "claim.py", "test": f"test_{stem}.py"}
        return {role: self.folder / name for role, name in (names | {"evidence": "evidence.json"}).items()}

    def load(self, name: str) -> Any:
        """Import the room and return its object ``name``; a missing extra becomes an ImportError with the command."""
        try:
            return getattr(importlib.import_module(self.module), name)
        except ImportError as error:
            if not self.extra:
                raise
            raise ImportError(f"{self.id} needs an extra: pip install 'assay-ml[{self.extra}]' ({error})") from error


def read_card(path: Path) -> Card:
    """Parse one ``card.md``; raises :class:`CardError` for anything missing, unknown or of the wrong kind."""
    parts = path.read_text(encoding="utf-8").split("+++\n", 2)
    if len(parts) != 3 or parts[0].strip():
        raise CardError(f"{path}: a card starts with TOML front matter between two lines '+++'")
    _, front, body = parts
    try:
        said = tomllib.loads(front)
    except tomllib.TOMLDecodeError as error:
        raise CardError(f"{path}: {error}") from error
    known = {f.name for f in fields(Card)} - {"folder", "body"}
    required = known - {"seam", "piece", "apply", "replaces", "extra", "space"}
    if unknown := said.keys() - known:
        raise CardError(f"{path}: unknown field {sorted(unknown)}; allowed: {sorted(known)}")
    if missing := required - said.keys():
        raise CardError(f"{path}: missing field {sorted(missing)}")
    if said["kind"] not in KINDS:
        raise CardError(f"{path}: kind = {said['kind']!r}; allowed: {', '.join(KINDS)}")
    if said.get("seam", "") not in ("", *SEAMS):
        raise CardError(f"{path}: seam = {said['seam']!r}; allowed: {', '.join(SEAMS)}")
    return Card(**{**said, "public": tuple(said["public"])}, folder=path.parent, body=body.strip())


@functools.cache
def cards() -> tuple[Card, ...]:
    """All cards, sorted by family and id."""
    found = (read_card(path) for path in SOURCE.glob("*/**/card.md"))
    return tuple(sorted(found, key=lambda card: (card.family, card.id)))


def find(name: str) -> Card:
    """The card with this id; raises :class:`UnknownMethod` with the nearest ids."""
    for card in cards():
        if card.id == name:
            return card
    raise UnknownMethod(name, [card.id for card in cards()])


def search(pattern: str = "*", *, family: str = "", seam: str = "", kind: str = "") -> list[Card]:
    """Cards whose id, name or public names match ``pattern`` (a glob, or a word that occurs in one of them)."""
    return [
        card
        for card in cards()
        if _matches(card, pattern.lower())
        and (not family or card.family == family)
        and (not seam or card.seam == seam)
        and (not kind or card.kind == kind)
    ]


def _matches(card: Card, pattern: str) -> bool:
    words = [word.lower() for word in (card.id, card.name, *card.public)]
    glob = any(mark in pattern for mark in "*?[")
    return any(fnmatchcase(word, pattern) if glob else pattern in word for word in words)


def public_names(package: str) -> Iterator[tuple[str, Card]]:
    """Pairs (name, card) that a package such as ``assay.optim`` or ``assay.nn.functional`` offers."""
    for card in cards():
        for path in card.paths:
            owner, _, name = path.rpartition(".")
            if owner == package:
                yield name, card
