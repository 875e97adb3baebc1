"""What pages about dense and cut networks share: what they cost, which classes lost most, categories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from sukashi.core.types import Plan
from sukashi.report import figures, words
from sukashi.report.figures import INK

Array = NDArray[np.float64]

N_WORST = 5
SLOWER = 1.05  # times as long as the dense network; less is what two clockings of one network differ by
CATEGORY_COLOURS = {"critical": "#0072B2", "neutral": "#C9CDD2", "detrimental": "#D55E00", "": "#EEF0F2"}
# Each figure of a network: what the page calls it, and how it is printed.
FIGURES = {
    "accuracy": ("accuracy", "percent"),
    "units_removed": ("units removed", "percent"),
    "weights_removed": ("weights removed", "percent"),
    "parameters_removed": ("parameters removed", "percent"),
    "zeros_in_masked_layers": ("zeros in the masked layers", "percent"),
    "zeros_in_all": ("zeros in all parameters", "percent"),
    "parameters": ("parameters", "count"),
    "flops": ("FLOPs an image", "count"),
    "latency_ms": ("latency, ms", "number"),
    "peak_bytes": ("peak memory", "bytes"),
    "bytes": ("file size", "bytes"),
}
MODES = {
    "cut": "Units were removed physically: every accuracy is that of a network with smaller layers.",
    "zero": "Units were zeroed, not cut out: nothing reads them any more, while shape, size and speed stay those of "
    "the dense network. Logits are those of a physical cut.",
    "sparse": "Single weights were set to zero. Masked zeros are not compression: the network keeps its shape, a zero "
    "is stored and multiplied like any number, and neither size nor latency falls on this hardware.",
}


def has_categories(plans: Sequence[Plan]) -> bool:
    return any((plan.category != "").any() for plan in plans)


def _shares(plans: Sequence[Plan], category: str) -> Array:
    """(sites,) the mean share of a category among the units of each site."""
    positions = range(len(plans[0].sites))
    found = [[(plan.category[plan.site == position] == category).mean() for position in positions] for plan in plans]
    return np.asarray(np.mean(found, axis=0))


def cost_table(columns: Mapping[str, Mapping[str, Any]], note: str) -> dict[str, Any] | None:
    """Rows of (name, printed figures, factors of the dense one), in the order of FIGURES; None where none is known."""
    rows = []
    for name, (noun, form) in FIGURES.items():
        values = [figures.get(name) for figures in columns.values()]
        if any(value is not None for value in values):
            dense = values[0]
            factors = [value / dense if dense and value is not None and form != "percent" else None for value in values]
            rows.append((noun, [words.printed(value, form) for value in values], [None, *factors[1:]]))
    return {"columns": list(columns), "rows": rows, "note": note} if rows else None


def figure_rows(
    columns: Mapping[str, Mapping[str, Any]], latency_ms: Mapping[str, float]
) -> list[tuple[str, list[str]]]:
    """What each figure is called, and how it is printed for each network."""
    told = {name: {**of, "latency_ms": latency_ms.get(name)} for name, of in columns.items()}
    return [
        (noun, [words.printed(of.get(name), form) for of in told.values()])
        for name, (noun, form) in FIGURES.items()
        if any(of.get(name) is not None for of in told.values())
    ]


def slower(columns: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A sentence for each network that takes longer than the dense one, by more than a clock's noise."""
    dense = columns.get("dense", {}).get("latency_ms")
    return [
        f"{name}: the cut network takes {figures['latency_ms'] / dense:.2f} times as long as the dense one; odd "
        "channel counts are the usual reason, see --round-to."
        for name, figures in columns.items()
        if dense and round(figures.get("latency_ms", 0) / dense, 2) > SLOWER
    ]


def worst_classes(about: Mapping[str, Any], dense: Array, cut: Array) -> list[dict[str, Any]]:
    lost = dense - cut
    order = [int(k) for k in np.argsort(-lost, kind="stable") if np.isfinite(lost[k])][:N_WORST]
    return [
        {"name": about["class_names"][k], "n": about["class_counts"][k], "dense": dense[k], "cut": cut[k]}
        for k in order
    ]


def draw_categories(plans: Mapping[str, Sequence[Plan]]) -> bytes:
    """Stacked shares of a site's units, sites from input to output: the paper's figure 12."""
    figure = Figure(figsize=(8.4, 1.2 + 1.6 * len(plans)), layout="constrained")
    rows = figure.subplots(len(plans), sharex=True, squeeze=False)[:, 0]
    layers = [site.layer for site in next(iter(plans.values()))[0].sites]
    for axes, (criterion, of_criterion) in zip(rows, plans.items(), strict=True):
        bottom = np.zeros(len(layers))
        for category, colour in CATEGORY_COLOURS.items():
            share = _shares(of_criterion, category)
            if share.any():
                axes.bar(np.arange(len(layers)), share, 0.84, bottom, color=colour, label=category or "undecided")
            bottom += share
        axes.set(ylim=(0, 1), xlim=(-0.6, len(layers) - 0.4), yticks=[0, 0.5, 1])
        axes.set_title(criterion, loc="left", fontsize=10, color=INK)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        figures.calm(axes)
        axes.grid(False)
    rows[-1].set_xticks(range(len(layers)), layers, rotation=90, fontsize=7)
    handles = {label: handle for axes in rows for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside upper right", ncols=4, frameon=False, fontsize=9)
    return figures.png(figure)
