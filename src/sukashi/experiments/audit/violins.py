"""Distributions over classes, drawn: a row of panels a measure, a column a place, in each a network beside another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from sukashi.report import figures, words
from sukashi.report.figures import WIDTH, Drawn

MANY = 20  # values, above which their outline says more than themselves
HEIGHT = 1.35  # of a panel, inches


def draw_violins(
    values: Mapping[str, Mapping[str, NDArray[Any]]], measures: Sequence[str], places: Sequence[str]
) -> Drawn:
    """`values` are {measure/place: {label: (K,)}}: each class a point, of many classes their outline, and the mean."""
    labels = list(next(iter(values.values())))
    below = 0.2 * len(labels) + 0.1
    figure = Figure(figsize=(WIDTH, HEIGHT * len(measures) + below + 0.3), layout="constrained")
    panels = figure.subplots(len(measures), len(places), squeeze=False, sharey="row", sharex=True)
    for i, measure in enumerate(measures):
        for j, place in enumerate(places):
            axes = panels[i][j]
            for x, label in enumerate(labels):
                own = values[f"{measure}/{place}"][label]
                own = own[np.isfinite(own)]
                colour = figures.OTHERS[x % len(figures.OTHERS)] if x else figures.INK
                if not len(own):
                    continue
                if len(own) > MANY and np.ptp(own) > 0:
                    (body,) = axes.violinplot([own], [x], widths=0.8, showextrema=False)["bodies"]
                    body.set(facecolor=colour, alpha=0.35)
                else:
                    spots = x + 0.5 * (np.arange(len(own)) / max(len(own) - 1, 1) - 0.5)
                    axes.plot(spots, own, "o", color=colour, alpha=0.5, markersize=2.5, markeredgewidth=0)
                axes.plot([x - 0.35, x + 0.35], [own.mean()] * 2, color=colour, linewidth=2, label=label)
            if i == 0:
                axes.set_title(place, fontsize=9, color=figures.INK)
            if j == 0:
                axes.set_ylabel(measure.replace("_", "\n"), fontsize=9)
            axes.set_xlim(-0.6, len(labels) - 0.4)
            axes.set_xticks([])
            figures.calm(axes)
    handles, named = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, named, frameon=False, fontsize=9, loc="outside lower center", ncols=1)
    return figures.drawn(figure)


def violins_alt(means: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """The figure in words: the means."""
    told = [
        f"{name}, {label} {words.short(of['mean'])}"
        for name, by_label in means.items()
        for label, of in by_label.items()
        if of["mean"] is not None
    ]
    return f"Figures of classes: means {'; '.join(told)}."
