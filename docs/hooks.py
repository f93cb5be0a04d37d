"""Make the method pages from the cards and their recorded evidence when the site is built."""

from __future__ import annotations

import io
from typing import Any

import matplotlib
from mkdocs.structure.files import File, Files

from assay import catalogue
from assay.bench import claims
from assay.catalogue import Card

matplotlib.use("Agg")
SPEED = {"Optimizers": "optim", "Losses and data": "losses", "Layers": "nn"}


def on_config(config: Any) -> Any:
    """The navigation: guides first, then the methods by family."""
    families = sorted({card.family for card in catalogue.cards()})
    methods: list[Any] = ["methods/index.md"]
    methods += [{f: [f"methods/{card.id}.md" for card in catalogue.search(family=f)]} for f in families]
    config["nav"] = [
        {"Assay": "index.md"},
        {"Use one": "use.md"},
        {"Choose one": "compare.md"},
        {"Trust one": "claims.md"},
        {"Beside other libraries": "interoperate.md"},
        {"Speed": [{name: f"speed-{page}.md"} for name, page in SPEED.items()]},
        {"Methods": methods},
    ]
    return config


def on_files(files: Files, config: Any) -> Files:
    """One page and one figure a method, and the table of all."""
    files.append(File.generated(config, "methods/index.md", content=_index()))
    for card in catalogue.cards():
        found = claims.recorded(card)
        files.append(File.generated(config, f"methods/{card.id}.md", content=_page(card, found)))
        if found:
            image = io.BytesIO()
            claims.figure(card, found[0]).savefig(image, format="png", dpi=130, bbox_inches="tight")
            files.append(File.generated(config, f"methods/{card.id}.png", content=image.getvalue()))
    return files


def _index() -> str:
    rows = [f"| [{c.id}]({c.id}.md) | {c.family} | {c.seam or c.kind} | {c.claim} |" for c in catalogue.cards()]
    return "\n".join(["# Methods", "", "| method | family | seam | its paper's claim |", "|---|---|---|---|", *rows])


def _page(card: Card, found: Any) -> str:
    names = ", ".join(f"`{path}`" for path in card.paths)
    source = f"[arXiv {card.arxiv}](https://arxiv.org/abs/{card.arxiv})"
    lines = [
        card.body.partition("\n")[0] if card.body.startswith("# ") else f"# {card.name}",
        "",
        f"*{card.paper}*, {card.authors}, {card.year}, {source}.",
        "",
        f"Public: {names}.",
        "",
        card.body.partition("\n")[2] if card.body.startswith("# ") else card.body,
    ]
    if found:
        evidence, said = found
        lines += [
            "",
            "## Evidence",
            "",
            f"Verdict: **{evidence.verdict}**.",
            "",
            f"![The claim's figure]({card.id}.png)",
        ]
        lines += ["", "| check | observed | 95 % interval | bound | verdict |", "|---|---|---|---|---|"]
        for c in evidence.checks:
            interval = "exact" if c.low == c.high else f"{c.low:.4g} to {c.high:.4g}"
            sense = {"<=": "at most", ">=": "at least"}[c.sense]
            lines.append(f"| {c.name} | {c.observed:.4g} | {interval} | {sense} {c.bound:.4g} | {c.verdict} |")
        lines += ["", *(f"- {note}" for note in evidence.notes)]
        versions = ", ".join(f"{name} {version}" for name, version in said["versions"].items())
        lines += ["", f"Recorded {said['date']} by `{said['command']}` on {said['machine']['processor']} ({versions})."]
    # In the repository a card stands four folders deep; on the site beside the guides.
    return "\n".join(lines).replace("(../../../../docs/", "(../")
