"""The panel of saliency maps: what changed and whether it matters, curves, differences, galleries of maps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from sukashi.experiments.audit.saliency.summary import cells_of
from sukashi.experiments.audit.saliency.values import ORDERS, Array
from sukashi.experiments.audit.saliency.verdict import is_told
from sukashi.experiments.audit.summary import AuditResult
from sukashi.experiments.workspace import Record, Workspace
from sukashi.report import figures, words
from sukashi.report.figures import WIDTH, Drawn
from sukashi.report.gallery import Picture, draw_gallery

PANEL = (3.7, 2.9)
MODEL = "model"  # at the left is which


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


def _panels(n_rows: int, n_columns: int, below: float = 0.4) -> tuple[Figure, Any]:
    figure = Figure(figsize=(PANEL[0] * n_columns, PANEL[1] * n_rows + below), layout="constrained")
    return figure, figure.subplots(n_rows, n_columns, squeeze=False)
