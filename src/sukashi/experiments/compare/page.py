"""The page of a comparison: who leads, accuracy against what is gone, what it costs, which classes it hits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from sukashi.core.bracketed import plain
from sukashi.core.types import Curve
from sukashi.experiments.compare import verdict
from sukashi.experiments.compare.contenders import Contender, contenders
from sukashi.experiments.compare.summary import CompareResult
from sukashi.experiments.workspace import Workspace
from sukashi.measures import curves
from sukashi.measures.curves import THRESHOLDS
from sukashi.repairs import NONE
from sukashi.report import classes, figures, words
from sukashi.report.figures import COLOURS, MARKERS, OTHERS, WIDTH, Drawn
from sukashi.report.networks import (
    LATENCY,
    MODES,
    at_once,
    categories_alt,
    cost_table,
    draw_categories,
    has_categories,
    slower,
)
from sukashi.report.page import Page

DASHES = {
    ("random", NONE): "-",
    ("confidence", NONE): ":",
    ("clustering", NONE): "--",
    ("random", "refit"): "--",
    ("random", "norm"): ":",
}
# What the fraction on the axis is of.
REMOVED = {"cut": "parameters removed", "zero": "units zeroed"}


def page(result: CompareResult, space: Workspace) -> Page:
    found = contenders(space)
    colours = _colours(found)
    with_categories = {one.name: one.plans for one in found if has_categories(one.plans)}
    drawn = {
        "curves": _draw_curves(found, colours, REMOVED[result.mode], units=False),
        **({"units": _draw_curves(found, colours, "units removed", units=True)} if result.mode == "cut" else {}),
    }
    if with_categories:
        drawn["categories"] = draw_categories(with_categories)
    leader = result.contenders[0]
    seeds = {of["n"] for of in result.sauce.values()}
    repaired = any(of["repair"] != NONE for of in result.methods.values())
    return Page(
        "experiments/compare/page.html.j2",
        drawn,
        {
            "result": result,
            "title": f"{result.model} on {result.data}",
            "warnings": [*result.warnings, *slower(result.latency)],
            "colours": colours,
            "alts": _alts(result),
            "categories_alt": categories_alt(with_categories),
            "removed": REMOVED[result.mode],
            "fractions": THRESHOLDS,
            "differences": [pair for pair in result.differences if pair["first"] == leader],
            "pairs": verdict.pairs_of(len(result.differences)),
            "lower": words.points(result.margin),
            "faster": verdict.faster(result.speed),
            "fell": classes.FELL,
            "small": classes.too_small(result.classes["rows"], result.margin),
            "repaired": repaired,
            # Of two seeds a table shows each, for the t interval of two says next to nothing.
            "two_seeds": "; with two seeds, which bound too little, each of them" if 2 in seeds else "",
            "costs": cost_table(
                result.costs,
                {at_once(LATENCY, result.costs["dense"].get("batch_size")): result.latency} if result.latency else {},
                result.n_images,
                "The network cut for real beside the dense one, with half of the units removed."
                + (" What a repair mends costs the same." if repaired else ""),
            ),
            "settings": {
                **dict(words.flat(space.identity)),
                "seeds finished": ", ".join(map(str, sorted({seed for one in found for seed in one.seeds}))),
                "test images": f"{result.n_images:,}",
                "dense accuracy": words.percent(result.dense_accuracy),
                "the largest class alone": words.percent(result.chance),
            },
            "mode": MODES[result.mode],
            "run": (space.logged("run") or [{}])[-1],
        },
    )


def curves_alt(result: Mapping[str, Any]) -> str:
    """What the curves of a comparison show, in words: SAUCE of each contender and its accuracy where half is gone."""
    told = []
    for name in result["contenders"]:
        half = result["accuracy_at"][name]["0.5"]
        said = "not measured at 50%" if half is None else f"accuracy {words.percent(half['mean'])} at 50%"
        told.append(f"{name} SAUCE {result['sauce'][name]['mean']:.1f}, {said}")
    return f"Accuracy against the fraction of {REMOVED[result['mode']]}: {'; '.join(told)}."


def _alts(result: CompareResult) -> dict[str, str]:
    told = []
    for name, levels in result.levels.items():
        at = min(levels, key=lambda level: abs(level["ratio_asked"] - 0.5))
        told.append(f"{name} {words.percent(at['accuracy']['mean'])} at {words.percent(at['units_removed'])}")
    return {
        "curves": curves_alt(result.to_json()),
        "units": f"Accuracy against the fraction of units removed: {'; '.join(told)}.",
    }


def draw_curves(space: Workspace, mode: str) -> Drawn:
    """Accuracy against what is gone, a line for each contender."""
    found = contenders(space)
    return _draw_curves(found, _colours(found), REMOVED[mode], units=False)


def _colours(found: Sequence[Contender]) -> dict[str, str]:
    """A colour for each contender: that of its method, whatever its options."""
    others = itertools.cycle(OTHERS)
    methods = {one.name: plain(one.criterion) for one in found}
    of_method = {name: COLOURS.get(name) or next(others) for name in sorted(set(methods.values()))}
    return {name: of_method[method] for name, method in methods.items()}


def _by_units(curve: Curve, n_units: int) -> Curve:
    """The same curve against the share of units."""
    return replace(curve, fraction=curve.n_removed / n_units)


def _draw_mean(axes: Axes, drawn: Sequence[Curve], colour: str, mark: str, **line: Any) -> None:
    """The mean of the seeds' curves, in their interval where it bounds anything."""
    fractions = np.linspace(0, curves.reach(drawn), 101)
    points = [found for found in curves.at(drawn, fractions.tolist()) if found is not None]
    mean, low, high = ([getattr(point, name) for point in points] for name in ("mean", "low", "high"))
    axes.plot(fractions, mean, color=colour, marker=mark, markersize=4, linewidth=1.8, **line)
    if len(drawn) != 2:
        axes.fill_between(fractions, low, high, color=colour, alpha=0.12, linewidth=0)


def _draw_points(axes: Axes, drawn: Sequence[Curve], colour: str, mark: str) -> None:
    """What was measured after progressive passes, and of two seeds at each ratio too."""
    for curve in drawn:
        after_pass = np.isnan(curve.ratio)
        if len(drawn) == 2:
            points = curve.fraction[~after_pass], curve.accuracy[~after_pass]
            axes.plot(*points, linestyle="", marker=".", markersize=4, color=colour, alpha=0.6)
        axes.plot(
            curve.fraction[after_pass],
            curve.accuracy[after_pass],
            linestyle="",
            marker=mark,
            markersize=6.5,
            zorder=5,
            color=colour,
            markeredgecolor="white",
            markeredgewidth=0.6,
        )


def _draw_curves(found: Sequence[Contender], colours: Mapping[str, str], removed: str, *, units: bool) -> Drawn:
    """Accuracy against what is gone, of units or of what the curves count. Two seeds bound nothing: their points."""
    figure = Figure(figsize=(WIDTH, 4.2 + 0.2 * math.ceil(len(found) / 2)), layout="constrained")
    axes = figure.subplots()
    result = found[0].results[0]
    figures.level(axes, result["dense_accuracy"], "dense", "--")
    figures.level(axes, result["chance"], "one answer for all", ":", left=True)
    marks = {name: MARKERS[i % len(MARKERS)] for i, name in enumerate(sorted(one.name for one in found))}
    dashes = figures.dashes({one.name: (one.criterion, DASHES.get((one.sampling, one.repair))) for one in found})
    for place, one in reversed(list(enumerate(found))):  # the best is drawn last, on top
        drawn = [_by_units(curve, one.plans[0].n_units) if units else curve for curve in one.curves]
        colour, mark = colours[one.name], marks[one.name]
        label = f"{one.name}  {one.sauce.mean:.1f}"
        _draw_mean(axes, drawn, colour, mark, linestyle=dashes[one.name], label=label, markevery=(2 * place % 10, 10))
        _draw_points(axes, drawn, colour, mark)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel=f"fraction of {removed}", ylabel="accuracy")
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    handles, labels = axes.get_legend_handles_labels()
    # Below the curves: among them no place is free of one network's curves or another's.
    figure.legend(
        handles[::-1],
        labels[::-1],
        title="criterion, SAUCE",
        frameon=False,
        alignment="left",
        loc="outside lower left",
        ncols=2 if max(map(len, labels)) < 30 else 1,
        fontsize=9,
    )
    figures.calm(axes)
    return figures.drawn(figure)
