"""The page of a schedule: how far one may go, accuracy at each level, whether one contender beats another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from sukashi.core.bracketed import plain
from sukashi.experiments.schedule.settings import LEAKY
from sukashi.experiments.schedule.summary import ScheduleResult, criterion_of, removed
from sukashi.experiments.workspace import Workspace
from sukashi.report import figures, words
from sukashi.report.figures import WIDTH, Drawn
from sukashi.report.page import Page


def page(result: ScheduleResult, space: Workspace) -> Page:
    scope = "" if result.scope is None else f", scope {result.scope}"
    names = ", ".join(space.identity["criteria"])
    return Page(
        "experiments/schedule/page.html.j2",
        {"accuracy": draw(result)},
        {
            "result": result,
            "alt": _alt(result),
            "images": words.several(result.n_images, "test image"),
            "seeds": words.seeds(result.seeds),
            "title": f"{result.schedule}: {result.model}, {names}{scope}",
            "warnings": result.warnings,
            "gone": [removed(row) for row in result.levels],
            "settings": dict(words.flat(space.identity)),
            "run": (space.logged("run") or [{}])[-1],
        },
    )


def _alt(result: ScheduleResult) -> str:
    """What the figure shows, in words."""
    told = [f"dense {words.percent(result.dense_accuracy['mean'])}"]
    for name in result.contenders:
        rows = [row for row in result.levels if row["contender"] == name]
        told.append(
            f"{name} "
            + ", ".join(f"{words.percent(row['accuracy']['mean'])} at {words.percent(removed(row))}" for row in rows)
        )
    return f"Accuracy by the fraction of the {result.removes} that was removed: {'; '.join(told)}."


def _span(of: Mapping[str, Any]) -> tuple[float, float, float]:
    """A mean with its interval, or with two seeds, which bound too little, with these."""
    two = len(of["each"]) == 2
    return of["mean"], *((min(of["each"]), max(of["each"])) if two else (of["low"], of["high"]))


def draw(result: ScheduleResult) -> Drawn:
    """Accuracy by level with intervals, a line for each contender."""
    figure = Figure(figsize=(WIDTH, 4.2 + 0.2 * len(result.contenders)), layout="constrained")
    axes = figure.subplots()
    dense = result.dense_accuracy
    _, dense_low, dense_high = _span(dense)
    axes.axhspan(dense_low, dense_high, color=figures.FAINT, alpha=0.5, linewidth=0)
    figures.level(axes, dense["mean"], "dense", "--")
    criteria = {name: criterion_of(name) for name in result.contenders}
    dashes = figures.dashes({name: (of, ":" if name.endswith(LEAKY) else "-") for name, of in criteria.items()})
    for place, name in enumerate(result.contenders):
        rows = [row for row in result.levels if row["contender"] == name]
        mean, low, high = (np.array(of) for of in zip(*(_span(row["accuracy"]) for row in rows), strict=True))
        colour = figures.colour(plain(criteria[name]), place)
        # Side by side, that intervals at one level do not hide each other.
        x = np.array([removed(row) for row in rows]) + 0.006 * (place - (len(result.contenders) - 1) / 2)
        figures.bars(axes, x, (mean, low, high), place, color=colour, linestyle=dashes[name], label=name)
    figures.within(axes, [value for row in result.levels for value in _span(row["accuracy"])] + [dense_low, dense_high])
    axes.set(xlabel=f"fraction of the {result.removes} that was removed", ylabel="accuracy on test images")
    figures.percents(axes.xaxis)
    figures.percents(axes.yaxis)
    figure.legend(
        frameon=False,
        fontsize=9,
        loc="outside lower left",
        ncols=2 if all(len(n) < 24 for n in result.contenders) else 1,
    )
    figures.calm(axes)
    return figures.drawn(figure)
