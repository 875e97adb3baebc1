"""What pages about dense and cut networks share: what they cost, which classes lost most, categories."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from sukashi.core.stats import ratio
from sukashi.core.types import Plan
from sukashi.report import figures, words
from sukashi.report.figures import INK, WIDTH, Drawn

Array = NDArray[np.float64]

KEPT = "#0072B2"
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
    "peak_bytes": ("peak memory", "bytes"),
    "bytes": ("file size", "bytes"),
}
LATENCY = "latency, ms (median)"
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


def cost_table(
    columns: Mapping[str, Mapping[str, Any]],
    clocks: Mapping[str, Mapping[str, Mapping[str, float]]],
    n_images: int,
    note: str,
) -> dict[str, Any] | None:
    """Rows of (name, printed figures, factors of the dense one), in the order of FIGURES; None where none is known.

    `columns` are the dense network's figures and those of others by name, `clocks` rows of latency {noun: {name: its
    latency}}, see `timed`, `n_images` on how many images accuracy is.
    """
    rows: list[tuple[str, list[str], list[str]]] = []
    first = next(iter(columns.values()), {})
    for name, (_, form) in FIGURES.items():
        values = [figures.get(name) for figures in columns.values()]
        if any(value is not None for value in values):
            dense = values[0]
            told = [
                f"× {value / dense:.2f}" if dense and value is not None and form != "percent" else ""
                for value in values[1:]
            ]
            rows.append((_called(name, first, n_images), [words.printed(value, form) for value in values], ["", *told]))
    for noun, latency in clocks.items():
        dense_ms = statistics.median(of["dense_ms"] for of in latency.values())
        times = [dense_ms, *(latency[name]["cut_ms"] if name in latency else None for name in [*columns][1:])]
        told = [f"× {factor(latency[name])}" if name in latency else "" for name in columns]
        rows.append((noun, [words.printed(ms, "ms") for ms in times], told))
    return {"columns": list(columns), "rows": rows, "note": note} if rows else None


def figure_rows(columns: Mapping[str, Mapping[str, Any]], n_images: int) -> list[tuple[str, list[str]]]:
    """What each figure is called, accuracy with its `n_images`, and how it is printed for each network."""
    first = next(iter(columns.values()))
    return [
        (_called(name, first, n_images), [words.printed(of.get(name), form) for of in columns.values()])
        for name, (_, form) in FIGURES.items()
        if any(of.get(name) is not None for of in columns.values())
    ]


def _called(name: str, dense: Mapping[str, Any], n_images: int) -> str:
    noun, _ = FIGURES[name]
    if name == "accuracy":
        return f"{noun} on {words.several(n_images, 'test image')}"
    return at_once(noun, dense.get("batch_size")) if name == "peak_bytes" else noun


def at_once(noun: str, n_images: int | None) -> str:
    """What is measured of so many images at once: latency, ms (median), of 32 images."""
    return f"{noun}, of {words.several(n_images, 'image')}" if n_images else noun


def images_at_once(n_images: int | str) -> str:
    """So many images in a sentence about time."""
    return "one image" if int(n_images) == 1 else f"{n_images} images at once"


def timed(turns: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, float]:
    """What the milliseconds of a dense network and of one or several cut ones come to, `dense_ms` and `cut_ms` of each
    pair timed in turns: their medians, and the `factor` of the dense network's time, its bounds the widest of any pair.
    """
    factors = [ratio(of["dense_ms"], of["cut_ms"]) for of in turns]
    return {
        **{name: statistics.median([ms for of in turns for ms in of[name]]) for name in ("dense_ms", "cut_ms")},
        "factor": statistics.geometric_mean([each.mean for each in factors]),
        "low": min(each.low for each in factors),
        "high": max(each.high for each in factors),
    }


def factor(latency: Mapping[str, float]) -> str:
    """The factor of the dense network's time, with its bounds."""
    return f"{latency['factor']:.2f} ({latency['low']:.2f} to {latency['high']:.2f})"


def slower(latency: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A sentence for each network that is shown to take longer than the dense one."""
    return [
        f"{name}: the cut network takes {factor(of)} times as long as the dense one; odd channel counts are the usual "
        "reason, see `round_to`."
        for name, of in latency.items()
        if of["low"] > 1
    ]


def layer_rows(layers: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """What was taken of each layer as a table: its header, and a row for each; of units, or of single weights."""
    if layers and "weights" in layers[0]:
        header = ["layer", "weights", "removed", "share"]
        return header, [
            [of["layer"], *_counts(of["weights"], of["removed"]), _share(of["removed"], of["weights"])] for of in layers
        ]
    return ["layer", "kind", "units", "kept", "share kept", "parameters", "left"], [
        [
            *(of["layer"] + (f" (+ {len(of['with'])} coupled)" if of["with"] else ""), of["kind"]),
            *(*_counts(of["units"], of["kept"]), _share(of["kept"], of["units"])),
            *_counts(of["parameters"], of["parameters_kept"]),
        ]
        for of in layers
    ]


def _counts(*counts: int) -> list[str]:
    return [f"{count:,}" for count in counts]


def _share(part: int, whole: int) -> str:
    return words.percent(part / whole)


def draw_layers(layers: Sequence[Mapping[str, Any]]) -> Drawn:
    """The share of its units that each layer keeps, as a bar, from input (above) to output."""
    n, longest = len(layers), max(len(of["layer"]) for of in layers)
    height, size = (0.24, 9) if n <= 40 else (0.17, 7)
    figure = Figure(figsize=(min(4.4 + 0.06 * longest, WIDTH), 0.5 + height * n), layout="constrained")
    axes = figure.subplots()
    figures.calm(axes)
    axes.grid(False)
    axes.barh(range(n), 1, 0.76, color=figures.FAINT)
    axes.barh(range(n), [of["kept"] / of["units"] for of in layers], 0.76, color=KEPT)
    for row, of in enumerate(layers):
        axes.text(1.02, row, f"{of['kept']} of {of['units']}", va="center", color=INK, fontsize=size)
    axes.set(xlim=(0, 1.3), ylim=(n - 0.4, -0.6), xticks=[0, 0.5, 1])
    axes.spines["bottom"].set_bounds(0, 1)
    axes.set_yticks(range(n), [of["layer"] for of in layers], fontsize=size)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    return figures.drawn(figure)


def categories_alt(plans: Mapping[str, Sequence[Plan]]) -> str:
    """What `draw_categories` shows in words: the share of each category among all units."""
    told = []
    for name, of in plans.items():
        shares = {
            category: float(np.mean([(plan.category == category).mean() for plan in of]))
            for category in CATEGORY_COLOURS
        }
        said = [f"{words.percent(share)} {category or 'undecided'}" for category, share in shares.items() if share]
        told.append(f"{name} {', '.join(said)}")
    return f"Of all units are by {'; '.join(told)}. Layer by layer in the figure."


def draw_categories(plans: Mapping[str, Sequence[Plan]]) -> Drawn:
    """Stacked shares of a site's units, sites from input to output: the paper's figure 12."""
    layers = [site.layer for site in next(iter(plans.values()))[0].sites]
    figure = Figure(figsize=(max(WIDTH, 0.16 * len(layers)), 1.4 + 1.4 * len(plans)), layout="constrained")
    rows = figure.subplots(len(plans), sharex=True, squeeze=False)[:, 0]
    for axes, (criterion, of_criterion) in zip(rows, plans.items(), strict=True):
        bottom = np.zeros(len(layers))
        for category, colour in CATEGORY_COLOURS.items():
            share = _shares(of_criterion, category)
            if share.any():
                # Hatched, that it is told from the critical in grey print too.
                how = {"hatch": "////", "edgecolor": "white", "linewidth": 0} if category == "detrimental" else {}
                axes.bar(range(len(layers)), share, 0.84, bottom, color=colour, label=category or "undecided", **how)
            bottom += share
        axes.set(ylim=(0, 1), xlim=(-0.6, len(layers) - 0.4), yticks=[0, 0.5, 1])
        axes.set_title(criterion, loc="left", fontsize=10, color=INK)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        figures.calm(axes)
        axes.grid(False)
    rows[-1].set_xticks(range(len(layers)), layers, rotation=90, fontsize=8)
    handles = {label: handle for axes in rows for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figures.drawn(figure)
