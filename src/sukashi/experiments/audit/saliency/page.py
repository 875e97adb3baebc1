"""The panel of saliency maps: what changed and whether it matters, curves, differences, galleries of maps."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from sukashi.experiments.audit.saliency.summary import cells_of
from sukashi.experiments.audit.saliency.values import ORDERS, Array
from sukashi.experiments.audit.saliency.verdict import is_told
from sukashi.experiments.audit.summary import AuditResult
from sukashi.experiments.workspace import Record, Workspace
from sukashi.report import figures, words
from sukashi.report.figures import WIDTH, Drawn

PANEL = (3.7, 2.9)
# Pixels of a gallery: of a picture with what is around it, the gap, a line above, what stands below and at the left; a
# page's figures have 160 to the inch.
SIDE, GAP, LINE, BOTTOM, LEFT, DPI = 150, 3, 19, 64, 110, 160
# Colours of what speaks for a class, against it, or matters at all, told apart with any colour vision and in print.
FOR, AGAINST, MATTERS = (np.array(to_rgb(name)) for name in ("#B2182B", "#2166AC", "#762A83"))
OPAQUE = 0.9
MODEL = "model"  # at the left is which


@dataclass(frozen=True)
class Picture:
    """An image of a gallery: its pixels (H, W, C) in [0, 1], its class, and every model's map (H, W) by label.

    `wrong` are the models that do not get it right, `marked` the one for whose sake it is shown ("" for none).
    """

    pixels: Array
    title: str
    maps: Mapping[str, Array]
    wrong: tuple[str, ...]
    marked: str


def panel(result: AuditResult, found: Mapping[str, Any], space: Workspace) -> tuple[dict[str, Drawn], dict[str, Any]]:
    """The figures of the panel, and what its template shows."""
    records = space.records()
    curves = {key: cell.curves for key, cell in cells_of(records).items()}
    pictures = {record.result["attribution"]: pictures_of(record) for record in records if record.has("gallery.npz")}
    told = {**found, "models": result.models, "reference": result.reference}
    drawn = [measure for measure in found["measures"] if "/" not in measure]
    figures = {"changes": draw_changes(told, drawn)} if drawn else {}
    if any("morf accuracy" in of_cell for of_cell in curves.values()):
        figures["morf"] = draw_curves(told, curves, ORDERS["morf"])
    alts = {"changes": _changes_alt(found, drawn), "morf": _morf_alt(curves)}
    for name, of_name in pictures.items():
        signed = any((found < 0).any() for picture in of_name for found in picture.maps.values())
        for part, some in (
            ("gallery", [picture for picture in of_name if not picture.marked]),
            ("changed", changed(of_name, result.reference)),
        ):
            if some:
                figures[f"{part}-{name}"] = draw_gallery(some, signed)
        wrong = [f"{p.title}, wrong: {', '.join(p.wrong)}" if p.wrong else p.title for p in of_name if not p.marked]
        alts[f"gallery-{name}"] = (
            f"{name} maps of {', '.join(p for p in of_name[0].maps)} over {len(wrong)} images, of {'; '.join(wrong)}"
        )
        alts[f"changed-{name}"] = "; ".join(
            f"{row['image_id']}, {row['target']}: {row['measure']} of the {name} maps of {result.reference} and "
            f"{row['model']} is {row['value']:.3f}"
            for row in found["moved"]
            if row["attribution"] == name
        )
    n_images = {model["label"]: model["n_images"] for model in result.models}
    silent = [
        f"{n} of {n_images[label]} {name} maps of {label} are constant or not finite, and left out"
        for label, counts in ((model["label"], model["silent"]) for model in found["models"])
        for name, n in counts.items()
        if n
    ]
    shown = {
        "found": found,
        "rows": {(row["model"], row["attribution"], row["measure"]): row for row in found["comparisons"]},
        "own": {(row["attribution"], row["measure"]): row for row in found["own"]},
        "unspoken": [
            measure
            for measure in dict.fromkeys(row["measure"] for row in found["comparisons"])
            if measure not in found["measures"]
        ],
        "silent": silent,
        "warnings": [
            *(
                f"{words.listed(of)} {'is' if len(of) == 1 else 'are'} left out: {reason}"
                for reason, of in words.by_reason(found["refused"]).items()
            ),
            *silent,
        ],
        "similar": {(row["model"], row["attribution"], row["measure"]): row for row in found["similarities"]},
        "similarities": list(dict.fromkeys(row["measure"] for row in found["similarities"])),
        "pointing": {
            (row["model"], row["attribution"], f"{row['measure']}/{row['concept']}"): row for row in found["pointing"]
        },
        "places": list(dict.fromkeys(f"{row['measure']}/{row['concept']}" for row in found["pointing"])),
        "regions": {(row["model"], row["measure"]): row for row in found["regions"]},
        "lost": list(dict.fromkeys(row["measure"] for row in found["regions"] if is_told(row["measure"]))),
        "sane": {(row["attribution"], row["measure"], row["layers"]): row for row in found["sanity"]},
        "depths": list(dict.fromkeys((row["layers"], row["down_to"]) for row in found["sanity"])),
        "galleries": list(pictures),
        "alts": alts,
    }
    return figures, shown


def _changes_alt(found: Mapping[str, Any], measures: Sequence[str]) -> str:
    """The figure of changes in words."""
    told = [
        f"{row['model']}, {row['attribution']}, {row['measure']} {row['difference']:+z.3f}"
        for row in found["comparisons"]
        if row["measure"] in measures and row["low"] is not None
    ]
    return f"Differences from the reference: {'; '.join(told)}." if told else "No difference was measured (0 models)."


def _morf_alt(curves: Mapping[tuple[str, str], Mapping[str, Array]]) -> str:
    """The curves in words: accuracy where half of the pixels that ROAD takes are gone."""
    told = []
    for (name, label), of in curves.items():
        values = of.get("morf accuracy", np.empty((0, 1)))
        values = values[np.isfinite(values).all(1)]
        if len(values):
            share = ORDERS["morf"][values.shape[1] // 2]
            told.append(f"{label}, {name} {words.percent(values.mean(0)[values.shape[1] // 2])} at {share:g}%")
    return f"Accuracy where the most relevant pixels are removed: {'; '.join(told)}."


def settings(space: Workspace) -> dict[str, Any]:
    """What was measured, and how the maps were made: the channels and options of each attribution."""
    made = [record.about["attribution"] for record in space.records() if "attribution" in record.about]
    attributions = {name: {"channels": channels, **options} for name, channels, options in made}
    return {"measures": list(space.identity["measures"]), "attributions": attributions}


def pictures_of(record: Record) -> list[Picture]:
    """The pictures that the trial of a gallery has kept."""
    arrays, labels = record.arrays("gallery"), record.result["labels"]
    return [
        Picture(
            pixels=arrays["pixels"][i],
            title=about["title"],
            maps={label: arrays["maps"][place, i] for place, label in enumerate(labels)},
            wrong=tuple(about["wrong"]),
            marked=about["marked"],
        )
        for i, about in enumerate(record.result["pictures"])
    ]


def series(result: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """The models beside the reference by what pruned them, in order of ratio.

    One series named "", as they come, where that isn't known or no series has two ratios: there is nothing to follow.
    """
    others = result["models"][1:]
    if any(model["ratio"] is None for model in others):
        return {"": others}
    found: dict[str, list[Mapping[str, Any]]] = {}
    for model in sorted(others, key=lambda model: model["ratio"]):
        found.setdefault(model["series"], []).append(model)
    return found if any(models[0]["ratio"] < models[-1]["ratio"] for models in found.values()) else {"": others}


def draw_changes(result: Mapping[str, Any], measures: Sequence[str]) -> Drawn:
    """Differences from the reference with intervals: a row of panels a measure, a column an attribution."""
    groups, names = series(result), result["attributions"]
    by_ratio = "" not in groups
    order = [model["label"] for model in result["models"][1:]]
    figure, panels = _panels(len(measures), len(names), below=0.4 if by_ratio else 0.04 * max(map(len, order)))
    rows = {(row["model"], row["attribution"], row["measure"]): row for row in result["comparisons"]}
    for i, measure in enumerate(measures):
        for j, name in enumerate(names):
            axes = panels[i][j]
            axes.axhline(0, color=figures.INK, linewidth=0.9, linestyle="--")
            for place, (group, of_group) in enumerate(groups.items()):
                found = [(model, rows.get((model["label"], name, measure))) for model in of_group]
                known = [(model, row) for model, row in found if row is not None and row["low"] is not None]
                if not known:
                    continue
                shift = 0.006 * (place - (len(groups) - 1) / 2)
                x = [model["ratio"] + shift if by_ratio else order.index(model["label"]) for model, _ in known]
                mean, low, high = (np.array([row[key] for _, row in known]) for key in ("difference", "low", "high"))
                colour = figures.colour(group.partition(",")[0], place) if group else figures.OTHERS[0]
                style = "-" if by_ratio else "none"
                figures.bars(axes, x, (mean, low, high), place, color=colour, linestyle=style, label=group)
                guesses = [i for i, (model, _) in enumerate(known) if model["guesses"]]
                hollow: dict[str, Any] = {"markersize": 4, "markerfacecolor": "white", "color": colour, "zorder": 3}
                if guesses:
                    axes.plot(np.array(x)[guesses], mean[guesses], "o", **hollow)
            if i == 0:
                axes.set_title(name, fontsize=10, color=figures.INK)
            if j == 0:
                axes.set_ylabel(f"{measure}, change")
            axes.margins(y=0.2)
            if by_ratio:
                figures.percents(axes.xaxis)
                if i == len(measures) - 1:
                    axes.set_xlabel("removed")
            else:
                named = order if i == len(measures) - 1 else [""] * len(order)
                axes.set_xticks(range(len(order)), named, rotation=30, ha="right")
                axes.set_xlim(-0.6, len(order) - 0.4)
            figures.calm(axes)
    if by_ratio:
        handles, named = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, named, frameon=False, fontsize=9, loc="outside lower center", ncols=max(1, len(named)))
    return figures.drawn(figure)


def draw_curves(
    result: Mapping[str, Any], curves: Mapping[tuple[str, str], Mapping[str, Array]], percentages: Sequence[float]
) -> Drawn:
    """Accuracy while the most relevant pixels go: a row for each attribution, a column for each series of models."""
    groups, names = series(result), result["attributions"]
    figure, panels = _panels(len(names), len(groups))
    together = "" in groups
    if together:
        figure.set_size_inches(WIDTH, PANEL[1] * len(names) + 0.3 * math.ceil((1 + len(groups[""])) / 2))
    share = np.array(percentages) / 100
    for i, name in enumerate(names):
        for j, (group, of_group) in enumerate(groups.items()):
            axes = panels[i][j]
            lines = [(result["reference"], figures.INK, "--")]
            shades = colormaps["viridis"](np.linspace(0.05, 0.88, max(2, len(of_group))))
            lines += [
                (model["label"], shade, ":" if model["guesses"] else "-")
                for model, shade in zip(of_group, shades, strict=False)
            ]
            for label, colour, style in lines:
                values = curves[name, label]["morf accuracy"]
                values = values[np.isfinite(values).all(1)]
                if not len(values):
                    continue
                mean = values.mean(0)
                half = 1.96 * values.std(0) / np.sqrt(len(values))
                axes.fill_between(share, mean - half, mean + half, color=colour, alpha=0.13, linewidth=0)
                axes.plot(share, mean, style, color=colour, linewidth=1.5, label=label)
            axes.set_ylim(0, 1.02)
            axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            if i == 0 and group:
                axes.set_title(group, fontsize=10, color=figures.INK)
            if j == 0:
                axes.set_ylabel(f"accuracy, {name}")
            if i == len(names) - 1:
                axes.set_xlabel("most relevant pixels removed")
            figures.calm(axes)
            if not together:
                axes.legend(frameon=False, fontsize=7.5, loc="best")
    if together:
        handles, named = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, named, frameon=False, fontsize=9, loc="outside lower left", ncols=2)
    return figures.drawn(figure)


def changed(pictures: Sequence[Picture], reference: str) -> list[Picture]:
    """Those shown for the sake of a model, with its map beside the reference's and no other."""
    return [
        replace(
            picture,
            title=f"{picture.title} {picture.marked}",
            maps={reference: picture.maps[reference], MODEL: picture.maps[picture.marked]},
            wrong=tuple(MODEL if label == picture.marked else label for label in picture.wrong),
        )
        for picture in pictures
        if picture.marked
    ]


def draw_gallery(pictures: Sequence[Picture], signed: bool) -> Drawn:
    """Images and, beside each, every map laid over it: shares of a map's total, on one scale of colours a row.

    The colours are those of the legend below, where a map is 0 the grey image is seen. `signed` is said of all maps of
    an attribution: what speaks against the class has a colour of its own.
    """
    labels = list(pictures[0].maps)
    height, width = len(pictures) * SIDE, (1 + len(labels)) * SIDE
    # One axes for all: matplotlib takes a tenth of a second for each that it has.
    whole = np.ones((height + BOTTOM, width, 3))
    above = LINE * (1 + max(_broken(label).count("\n") + 1 for label in labels))
    figure = Figure(figsize=((width + LEFT) / DPI, (height + BOTTOM + above) / DPI))
    right, top = width / (width + LEFT), (height + BOTTOM) / (height + BOTTOM + above)
    axes = figure.add_axes((1 - right, 0, right, top))
    axes.set_axis_off()

    def write(x: float, y: float, said: str, **how: Any) -> None:
        axes.text(x, y, said, **{"fontsize": 7.5, "color": figures.INK, "ha": "center", "va": "center", **how})

    for column, label in enumerate(("image", *labels)):
        write((column + 0.5) * SIDE, -6, _broken(label), va="bottom")
    for line, picture in enumerate(pictures):
        write(-8, (line + 0.5) * SIDE, _broken(picture.title), ha="right")
        shares = {label: _share(found) for label, found in picture.maps.items()}
        known = [found for found in shares.values() if found is not None]
        most = (np.quantile(np.abs(known), 0.99) or np.max(np.abs(known))) if known else 1.0
        pixels = np.broadcast_to(picture.pixels, (*picture.pixels.shape[:2], 3))
        _place(whole, line, 0, pixels)
        for column, (label, found) in enumerate(shares.items(), start=1):
            if found is None:
                write((column + 0.5) * SIDE, (line + 0.5) * SIDE, "says\nnothing")
            else:
                _place(whole, line, column, _laid_over(pixels.mean(2), found / most, signed))
            if label in picture.wrong:
                box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
                x, y = (column + 1) * SIDE - 8, (line + 1) * SIDE - 10
                write(x, y, "wrong", ha="right", fontweight="bold", bbox=box)
    middle, half = height + BOTTOM // 2, BOTTOM // 8
    levels = np.linspace(-1 if signed else 0, 1, SIDE)
    whole[middle - half : middle + half, SIDE : 2 * SIDE] = _laid_over(np.ones((1, SIDE)), levels[None], signed)
    write(SIDE - 6, middle, "against\nthe class" if signed else "does not\nmatter", ha="right")
    write(2 * SIDE + 6, middle, "for\nthe class" if signed else "matters\nmost", ha="left")
    axes.imshow(whole, interpolation="nearest", aspect="auto", extent=(0, width, height + BOTTOM, 0))
    return figures.drawn(figure)


def _laid_over(grey: Array, level: Array, signed: bool) -> Array:
    """(H, W, 3) of a grey image, lightened to be printed, under colours as strong as the levels, 1 the strongest."""
    colours = np.where((level < 0)[..., None], AGAINST, FOR if signed else MATTERS)
    strength = OPAQUE * np.minimum(np.abs(level), 1)[..., None]
    return (1 - strength) * (0.4 + 0.6 * grey[..., None]) + strength * colours


def _place(whole: Array, line: int, column: int, colours: Array) -> None:
    """Put a picture (H, W, 3) into its place, as large as there is room."""
    inner = SIDE - 2 * GAP
    rows, columns = (np.arange(inner) * size // inner for size in colours.shape[:2])
    top, left = line * SIDE + GAP, column * SIDE + GAP
    whole[top : top + inner, left : left + inner] = colours[rows][:, columns]


def _panels(n_rows: int, n_columns: int, below: float = 0.4) -> tuple[Figure, Any]:
    figure = Figure(figsize=(PANEL[0] * n_columns, PANEL[1] * n_rows + below), layout="constrained")
    return figure, figure.subplots(n_rows, n_columns, squeeze=False)


def _share(found: Array) -> Array | None:
    """A map as shares of the sum of its sizes; None where it says nothing."""
    total = np.abs(found).sum()
    return found / total if np.isfinite(total) and total > 0 else None


def _broken(name: str) -> str:
    """A long name on several lines."""
    return re.sub("[/_ ]", "\n", name) if len(name) > 9 else name
