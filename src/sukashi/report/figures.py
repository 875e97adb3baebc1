"""Figures: colours, axes, files."""

from __future__ import annotations

import io
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.text import Text

from sukashi.core.bracketed import plain

# Okabe and Ito's palette, told apart with any colour vision; a criterion keeps its colour in every report.
COLOURS = {
    "drift": "#D55E00",
    "cswap": "#0072B2",
    "cbp": "#56B4E9",
    "amp": "#009E73",
    "taylor": "#E69F00",
    "magnitude": "#CC79A7",
    "random": "#8A8A8A",
    "integrated_gradients": "#332288",
    "internal_influence": "#882255",
    "conductance": "#999933",
    "deeplift": "#44AA99",
    "lrp": "#661100",
    "backtrace": "#117733",
    "saliency": "#AA4499",
    "gradient_x_activation": "#8C6D1F",
}
OTHERS = ("#6699CC", "#888800", "#004488", "#BB5566", "#225555", "#EE8866")
# Of lines of one colour, beside those that a sampling or a mask has: a criterion with options in its name.
DASHES: tuple[Any, ...] = ("-.", (0, (7, 2)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (9, 2, 2, 2)), (0, (5, 5)))
INK, FAINT = "#1F2933", "#D9DEE4"
# Lines are told apart by these where colours are not seen, as in grey print.
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "<", ">", "*", "h", "p")
# Inches: as wide as a page's column. Drawn so, a label of 9 points is still read on a telephone, 400 pixels wide.
WIDTH, DPI = 5.4, 160


def colour(criterion: str, place: int) -> str:
    """The criterion's own colour in every report, or one by its place among others."""
    return COLOURS.get(criterion) or OTHERS[place % len(OTHERS)]


def dashes(contenders: Mapping[str, tuple[str, str | None]]) -> dict[str, Any]:
    """How the line of each contender is drawn, of its (criterion, usual dash): another dash for other options, and
    where None is usual.
    """
    found: dict[str, Any] = {}
    places: Counter[str] = Counter()
    for name, (criterion, usual) in sorted(contenders.items()):
        method = plain(criterion)
        other = usual is None or criterion != method
        found[name] = DASHES[places[method] % len(DASHES)] if other else usual
        places[method] += other
    return found


def level(axes: Axes, height: float, name: str, style: str, *, left: bool = False) -> None:
    """A line at a height with its name at the right, or at the left."""
    axes.axhline(height, color=INK, linewidth=0.9, linestyle=style)
    axes.annotate(
        name,
        (0 if left else 1, height),
        (3 if left else -3, 3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="left" if left else "right",
        va="bottom",
        color=INK,
        fontsize=9,
    )


def bars(axes: Axes, x: Any, bounds: tuple[Any, Any, Any], place: int, **style: Any) -> None:
    """Means with their intervals, (mean, low, high), as points with bars, marked by their place among others."""
    mean, low, high = bounds
    below, above = np.maximum(mean - low, 0), np.maximum(high - mean, 0)
    look: dict[str, Any] = {"marker": MARKERS[place % len(MARKERS)], "markersize": 4, "elinewidth": 1, "capsize": 2.5}
    axes.errorbar(x, mean, (below, above), linewidth=1.5, **look, **style)


def percents(axis: Axis) -> None:
    """Ticks of shares as percents: 2.5% is not 2%, and 50% not 50.0%."""
    axis.set_major_formatter(lambda x, _: f"{100 * x:g}%")


def within(axes: Axes, values: Sequence[float]) -> None:
    """A vertical axis of shares around values that are some: no tick says below 0 or above 1."""
    low, high = min(values), max(values)
    room = max(0.05 * (high - low), 0.02)
    axes.set_ylim(max(low - room, 0), min(high + room, 1) + 0.1 * room)  # a point at 1 is not cut in half


def calm(axes: Axes) -> None:
    """Axes that stay behind what is drawn in them."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK, labelsize=9)
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)


@dataclass(frozen=True)
class Drawn:
    """A figure as it is kept: equal figures give equal bytes."""

    png: bytes
    svg: bytes

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, from the PNG's header."""
        width, height = struct.unpack(">II", self.png[16:24])
        return width, height


def drawn(figure: Figure) -> Drawn:
    """The figure as PNG and SVG. A `$` in a name is a dollar, and starts no formula."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    # Without these a version, a date and random names are stamped on them.
    nobody = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}
    kept = {}
    with rc_context({"svg.hashsalt": "sukashi"}):
        for form, metadata in nobody.items():
            content = io.BytesIO()
            figure.savefig(content, format=form, dpi=DPI, metadata=metadata)
            kept[form] = content.getvalue()
            figure.set_layout_engine("none")  # both in the places that were found for the first
    return Drawn(**kept)
