"""What every page is made of: templates, colours, axes, and how numbers are written for people."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sukashi import store
from sukashi.errors import writing

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
INK, FAINT = "#1F2933", "#D9DEE4"


def render(template: str, folder: Path, figures: Mapping[str, bytes], **shown: Any) -> Path:
    """The path of `report.html`, written into a folder from a template and what it shows.

    The PNGs of `figures` are in the page itself and, by name, in the folder's `figures/` too.
    """
    if figures:
        with writing(folder):
            (folder / "figures").mkdir(parents=True, exist_ok=True)
    for name, content in figures.items():
        store.write(folder / "figures" / f"{name}.png", content)
    inlined = {name: base64.b64encode(content).decode() for name, content in figures.items()}
    environment = Environment(
        loader=PackageLoader("sukashi"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "p_value": p_value}
    html = environment.get_template(template).render(figures=inlined, **shown)
    store.write(folder / "report.html", html.encode())
    return folder / "report.html"


def colour(criterion: str, place: int) -> str:
    """The criterion's own colour in every report, or one by its place among others."""
    return COLOURS.get(criterion) or OTHERS[place % len(OTHERS)]


def level(axes: Axes, height: float, name: str, style: str) -> None:
    """A named horizontal line."""
    axes.axhline(height, color=INK, linewidth=0.9, linestyle=style)
    axes.annotate(
        name, (1, height), (-3, 3), textcoords="offset points", ha="right", va="bottom", color=INK, fontsize=8
    )


def bars(axes: Axes, x: Any, mean: Any, low: Any, high: Any, **style: Any) -> None:
    """Means with their intervals as a line of points with bars."""
    below, above = np.maximum(mean - low, 0), np.maximum(high - mean, 0)
    axes.errorbar(x, mean, (below, above), marker="o", markersize=4, elinewidth=1, capsize=2.5, **style)


def calm(axes: Axes) -> None:
    """Axes that stay behind what is drawn in them."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK, labelsize=9)
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)


def png(figure: Figure) -> bytes:
    """The figure as a PNG: equal figures give equal bytes."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=160, metadata={"Software": None})  # else the version is stamped on it
    return content.getvalue()


# --- how things are printed


def percent(value: float) -> str:
    """0.123 is 12.3%."""
    return f"{100 * value:.1f}%"


def printed(value: float | None, form: str) -> str:
    """A figure for people: 270 k, 81.6 M, 1.1 MB, 5.31."""
    if value is None:
        return "–"
    if form == "percent":
        return percent(value)
    if form == "number":
        return f"{value:.2f}"
    prefixes = iter(("", "k", "M", "G", "T", "P"))
    prefix = next(prefixes)
    while value >= 999.5:
        value, prefix = value / 1000, next(prefixes)
    return f"{value:.3g} {prefix}{'B' if form == 'bytes' else ''}".rstrip()


def p_value(p: float | None) -> str:
    """A p-value in two digits."""
    if p is None:
        return "–"
    return "< 0.0001" if p < 0.0001 else f"{p:.2g}"


def seeds(n: int) -> str:
    """1 seed, 2 seeds."""
    return f"{n} seed{'s' if n > 1 else ''}"


def listed(names: Sequence[str]) -> str:
    """One, two and three."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def flat(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every setting that is set, as (dotted name, text)."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flat(inner, f"{path}.{key}" if path else key)
    elif value is not None:
        yield path, ", ".join(map(str, value)) if isinstance(value, list) else str(value)
