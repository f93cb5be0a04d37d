"""Figures as SVG that takes its colours and its font from the page it stands in. No pyplot, no torch."""

from __future__ import annotations

import functools
import hashlib
import io
import re
import warnings
from collections.abc import Callable
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

WIDTH = 350.0
"""Of every plot, in its own units: about the pixels that a phone gives it, so that text keeps its size."""

# matplotlib wants real colours; these stand for the page's until the SVG is written.
INK, MUTED, LINE, METHOD, BASELINE, GOOD, BAD, PAPER = (f"#0{i}0{i}0{i}" for i in range(1, 9))
_PAGE_COLOURS = {
    INK: "currentColor",
    MUTED: "var(--muted)",
    LINE: "var(--line)",
    METHOD: "var(--method)",
    BASELINE: "var(--baseline)",
    GOOD: "var(--better)",
    BAD: "var(--worse)",
    PAPER: "var(--paper)",
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "assay",
    "text.parse_math": False,
    "font.size": 11.0,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.major.size": 3.0,
    "ytick.major.size": 0.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
}


class Plot(Figure):
    """A figure with what a screen reader says instead of it."""

    title = description = ""


def drawn(plot: Callable[..., Plot | None]) -> Callable[..., str]:
    """Draw under this module's style and return the SVG; an empty string where there is nothing to draw."""

    @functools.wraps(plot)
    def draw(*args: Any, **kwargs: Any) -> str:
        with matplotlib.rc_context(), warnings.catch_warnings():
            matplotlib.rcdefaults()  # whatever the user's own matplotlibrc says
            matplotlib.rcParams.update(_STYLE)
            warnings.filterwarnings("ignore", message="Glyph")  # the page's fonts draw the text, not matplotlib's
            figure = plot(*args, **kwargs)
            return "" if figure is None else _svg(figure)

    return draw


def _svg(figure: Plot) -> str:
    """The figure as an element to stand in a page: no prologue, page's colours and font, ids of its own."""
    file = io.StringIO()
    FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    body = file.getvalue().partition("<svg")[2].partition(">")[2]
    body = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
    # Ids are shared by all that stands in a page; equal ones are left to equal plots alone.
    mark = f"p{hashlib.sha256((figure.title + body).encode()).hexdigest()[:10]}-"
    body = re.sub(r"<[^>]+>", lambda tag: _tag(tag[0], mark), body)
    body = re.sub(r">\s+<", "><", body)
    width, height = (72 * size for size in figure.get_size_inches())
    title, description = escape(figure.title), escape(figure.description)
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-labelledby="{mark}t {mark}d">'
        f'<title id="{mark}t">{title}</title><desc id="{mark}d">{description}</desc>{body}'
    )


def _tag(tag: str, mark: str) -> str:
    """One tag (never text, which may hold anything) with the page's colours and font, its ids made the plot's own."""
    tag = re.sub(r'\bid="', f'id="{mark}', tag)
    tag = re.sub(r'(?:xlink:)?href="#', f'href="#{mark}', tag).replace("url(#", f"url(#{mark}")
    # Matplotlib before 3.10 writes size and family in one word.
    tag = re.sub(r'font: [^;"]*?([\d.]+px) [^;"]*', r"font-size: \1", tag)
    tag = re.sub(r'font-family: [^;"]*;? ?| transform="rotate\(-?0 [^"]*"', "", tag)
    for stand_in, colour in _PAGE_COLOURS.items():
        tag = tag.replace(stand_in, colour)
    return tag


def canvas(title: str, height: float, *, left: float, bottom: float = 34, top: float = 20) -> tuple[Plot, Axes]:
    """One pair of axes with margins in the plot's units."""
    figure = Plot(figsize=(WIDTH / 72, height / 72))
    figure.title = title
    rectangle = (left / WIDTH, bottom / height, (WIDTH - left - 10) / WIDTH, (height - bottom - top) / height)
    return figure, figure.add_axes(rectangle)


def label(axes: Axes, x: str, y: str = "") -> None:
    """Name the axes where there is room on a phone: below at the right, above at the left, both horizontal."""
    axes.set_xlabel(x, loc="right", color=MUTED, fontsize=11, labelpad=3)
    axes.annotate(short(y, 52), (0.004, 0.99), xycoords="figure fraction", color=MUTED, va="top", fontsize=11)


def short(name: str, most: int = 34) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def compact(value: float, _: Any = None) -> str:
    """Tick labels: 20k, 0.95, −0.01."""
    text = f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:.6g}"
    return text.replace("-", "−")


def ticks(axes: Axes, x: int = 5, y: int = 5, whole: bool = False) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(x, integer=whole))
    axes.yaxis.set_major_locator(MaxNLocator(y))
    axes.xaxis.set_major_formatter(FuncFormatter(compact))
    axes.yaxis.set_major_formatter(FuncFormatter(compact))
