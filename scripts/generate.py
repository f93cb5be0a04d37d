"""Write what is made from the cards: the README's table of methods and the packages' stubs for editors.

python scripts/generate.py           write
python scripts/generate.py --check   exit with 1 and say so if something is out of date
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from pathlib import Path

from assay import catalogue
from assay.catalogue import Card

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- methods: made by 'make generate' -->", "<!-- /methods -->"


def verdict(card: Card) -> str:
    """The recorded verdict, straight from the evidence."""
    path = card.files()["evidence"]
    return json.loads(path.read_text(encoding="utf-8"))["verdict"] if path.exists() else "not recorded"


def table() -> str:
    """One row per method: what it is, where it goes, what was claimed and what was found."""
    lines = ["| method | seam | its paper's claim | found here |", "|---|---|---|---|"]
    for card in catalogue.cards():
        folder = card.folder.relative_to(ROOT).as_posix()
        paper = f"[{card.year}](https://arxiv.org/abs/{card.arxiv})"
        name = f"[`{card.id}`]({folder}/card.md) {card.name}, {paper}"
        lines.append(f"| {name} | {card.seam or card.kind} | {card.claim} | {verdict(card)} |")
    return "\n".join(lines)


def readme() -> str:
    """The README with a fresh table between its two marks."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{table()}\n{END}{tail}"


def stub(package: str) -> str:
    """Static imports of the names that a package finds lazily, for type checkers and editors."""
    imports = [f"from {card.module} import {name} as {name}" for name, card in catalogue.public_names(package)]
    imports += [f"from {module} import {name} as {name}" for name, module in shared_names(package).items()]
    return "\n".join(["# Made from the cards by 'make generate'.", *sorted(imports)]) + "\n"


def shared_names(package: str) -> dict[str, str]:
    """The ``shared`` argument of ``exports(...)`` in a package."""
    path = ROOT / "src" / Path(*package.split("."))
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.keyword) and node.arg == "shared":
            return ast.literal_eval(node.value)
    return {}


def outputs() -> dict[Path, str]:
    """Every generated file with the text that it should have."""
    files = {ROOT / "README.md": readme()}
    for path in [*catalogue.SOURCE.glob("*/__init__.py"), *catalogue.SOURCE.glob("*/[a-z]*.py")]:
        if "= exports(" in path.read_text(encoding="utf-8"):
            module = path.parent if path.stem == "__init__" else path.with_suffix("")
            files[path.with_suffix(".pyi")] = stub(".".join(("assay", *module.relative_to(catalogue.SOURCE).parts)))
    return files


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = [path for path, text in outputs().items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        print(f"{'out of date' if check else 'written'}: {path.relative_to(ROOT)}")
        if not check:
            path.write_text(outputs()[path], encoding="utf-8")
    if check and stale:
        print("run: make generate")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
