"""Public names of a family, imported when first asked for; the cards say where they live."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from assay import catalogue


def exports(
    package: str, *, shared: Mapping[str, str] | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """``__getattr__``, ``__dir__`` and ``__all__`` of a package whose names the cards promise.

    ``shared`` maps names that belong to no single method to the module that defines them.
    """
    shared = dict(shared or {})

    def names() -> list[str]:
        return sorted({name for name, _ in catalogue.public_names(package)} | shared.keys())

    def getattr_(name: str) -> Any:
        if name in shared:
            return getattr(importlib.import_module(shared[name]), name)
        for public, card in catalogue.public_names(package):
            if public == name:
                return card.load(name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    sys.modules[package].__class__ = _Package
    return getattr_, names, names()


class _Package(ModuleType):
    """A package where a public name is what its card says, also if the method's folder has the same name."""

    def __setattr__(self, name: str, value: Any) -> None:
        # Importing a subpackage ends with putting it into its parent; there it would hide the function.
        if not (isinstance(value, ModuleType) and name in self.__all__):
            super().__setattr__(name, value)
