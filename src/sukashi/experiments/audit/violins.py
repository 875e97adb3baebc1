"""Distributions over classes, drawn: a row of panels a measure, a column a place, in each a network beside another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from sukashi.report import figures, words
from sukashi.report.figures import WIDTH, Drawn

MANY = 20  # values, above which their outline says more than themselves
HEIGHT = 1.35  # of a panel, inches
BESIDE = 3  # panels, of one place


def draw_violins(
    values: Mapping[str, Mapping[str, NDArray[Any]]], measures: Sequence[str], places: Sequence[str]
) -> Drawn:
    """`values` are {measure/place: {label: (K,)}}: each class a point, of many classes their outline, and the mean. Of
    one place measures stand side by side."""
    labels = list(next(iter(values.values())))
    single = len(places) == 1
    n_rows, n_columns = (-(-len(measures) // BESIDE), BESIDE) if single else (len(measures), len(places))
    figure = Figure(figsize=(WIDTH, HEIGHT * n_rows + 0.2 * len(labels) + 0.4), layout="constrained")
    panels = figure.subplots(n_rows, n_columns, squeeze=False, sharey="none" if single else "row", sharex=True)
    cells = [(measure, place) for measure in measures for place in places]
    for number, axes in enumerate(panels.flat):
        if number >= len(cells):
            axes.set_axis_off()
            continue
        measure, place = cells[number]
        for x, label in enumerate(labels):
            own = values[f"{measure}/{place}"][label]
            own = own[np.isfinite(own)]
            if len(own):
                _draw(axes, x, own, figures.OTHERS[x % len(figures.OTHERS)] if x else figures.INK, label)
        name = measure.replace("_", " ")
        if single or number < n_columns:
            axes.set_title(name if single else place, fontsize=9, color=figures.INK)
        if not single and number % n_columns == 0:
            axes.set_ylabel(name.replace(" ", "\n"), fontsize=9)
        axes.set_xlim(-0.6, len(labels) - 0.4)
        axes.set_xticks([])
        figures.calm(axes)
        axes.grid(axis="x", visible=False)
    handles, named = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, named, frameon=False, fontsize=9, loc="outside lower center", ncols=1)
    return figures.drawn(figure)


def _draw(axes: Axes, x: int, own: NDArray[Any], colour: str, label: str) -> None:
    """One network's values at x."""
    if len(own) > MANY and np.ptp(own) > 0:
        bodies: Any = axes.violinplot([own], [x], widths=0.8, showextrema=False)["bodies"]
        bodies[0].set(facecolor=colour, alpha=0.35)
    else:
        spots = x + 0.5 * (np.arange(len(own)) / max(len(own) - 1, 1) - 0.5)
        axes.plot(spots, own, "o", color=colour, alpha=0.5, markersize=2.5, markeredgewidth=0)
    axes.plot([x - 0.35, x + 0.35], [own.mean()] * 2, color=colour, linewidth=2, label=label)


def violins_alt(means: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """The figure in words: the means."""
    told = [
        f"{name}, {label} {words.short(of['mean'])}"
        for name, by_label in means.items()
        for label, of in by_label.items()
        if of["mean"] is not None
    ]
    return f"Figures of classes: means {'; '.join(told)}."
