"""How users name methods: ``adamp``, ``adamp(delta=0.05)``, ``adamp+ps-kd``, several with commas between."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Spec:
    """One name with the options that the user pinned."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        if not self.options:
            return self.name
        return f"{self.name}({', '.join(f'{key}={value!r}' for key, value in self.options.items())})"


def parse_specs(words: str | Iterable[str]) -> list[tuple[Spec, ...]]:
    """Each comma-separated word becomes a tuple of the specs that its plus signs join.

    >>> [[str(spec) for spec in arm] for arm in parse_specs("adamp(delta=0.05)+ps-kd, grand-el2n")]
    [['adamp(delta=0.05)', 'ps-kd'], ['grand-el2n']]
    """
    words = [words] if isinstance(words, str) else list(words)
    arms = [arm for word in words for arm in _cut(word, ",")]
    return [tuple(_parse(part) for part in _cut(arm, "+")) for arm in arms]


def _cut(text: str, mark: str) -> list[str]:
    """Split at a mark that stands outside brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        if character == mark and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += character
    parts = [part.strip() for part in parts]
    if not all(parts):
        raise ValueError(f"an empty name in {text!r}")
    return parts


def _parse(word: str) -> Spec:
    name, bracket, rest = word.partition("(")
    if not bracket:
        return Spec(word)
    try:
        call = ast.parse(f"f({rest}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or not all(keyword.arg for keyword in call.keywords):
            raise ValueError
        options = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"cannot read {word!r}: options are written NAME(key=value, ...)") from error
    return Spec(name.strip(), options)
