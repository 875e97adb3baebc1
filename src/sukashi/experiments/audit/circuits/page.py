"""The panel of circuits: how large and how good they are, and where in the network their nodes lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from sukashi.experiments.audit.circuits.summary import MEASURES, by_model, values_of
from sukashi.experiments.audit.summary import AuditResult
from sukashi.experiments.audit.violins import draw_violins, violins_alt
from sukashi.experiments.workspace import Workspace
from sukashi.report import figures, words
from sukashi.report.figures import WIDTH, Drawn

COLUMNS = 4  # of panels, where places are of several kinds


def panel(result: AuditResult, found: Mapping[str, Any], space: Workspace) -> tuple[dict[str, Drawn], dict[str, Any]]:
    """The figures of the panel, and what its template shows."""
    chosen = {row["model"]: row["penalty"] for row in found["models"]}
    values = values_of(by_model(space.records()), chosen, found)
    of_one = {f"{name}/circuits": {label: own.mean(0) for label, own in of.items()} for name, of in values.items()}
    return {
        "circuits": draw_violins(of_one, list(MEASURES), ["circuits"]),
        "circuit-places": draw_places(found["models"]),
    }, {
        "found": found,
        "measures": list(MEASURES),
        "rows": {(row["model"], row["measure"]): row for row in found["comparisons"]},
        "alt": violins_alt(found["means"]),
        "places_alt": _places_alt(found["models"]),
        "warnings": [],
    }


def draw_places(models: Sequence[Mapping[str, Any]]) -> Drawn:
    """Which share of each place's nodes is in a circuit: a panel a kind, block by block; a line a network."""
    kinds = list(dict.fromkeys(kind for row in models for kind in row["kinds"]))
    n_columns = min(COLUMNS, len(kinds))
    n_rows = -(-len(kinds) // n_columns)
    figure = Figure(figsize=(WIDTH, 1.35 * n_rows + 0.2 * len(models) + 0.4), layout="constrained")
    panels = figure.subplots(n_rows, n_columns, squeeze=False, sharey=True)
    for number, axes in enumerate(panels.flat):
        if number >= len(kinds):
            axes.set_axis_off()
            continue
        for place, row in enumerate(models):
            own = [share for kind, share in zip(row["kinds"], row["shares"], strict=True) if kind == kinds[number]]
            colour = figures.OTHERS[place % len(figures.OTHERS)] if place else figures.INK
            marker = figures.MARKERS[place % len(figures.MARKERS)]
            axes.plot(range(1, len(own) + 1), own, color=colour, marker=marker, markersize=3, label=row["model"])
        axes.set_title(kinds[number].replace("_", " "), fontsize=9, color=figures.INK)
        axes.set_ylim(-0.03, 1.03)
        figures.percents(axes.yaxis)
        axes.xaxis.get_major_locator().set_params(integer=True)
        figures.calm(axes)
    handles, named = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, named, frameon=False, fontsize=9, loc="outside lower center", ncols=1)
    return figures.drawn(figure)


def _places_alt(models: Sequence[Mapping[str, Any]]) -> str:
    told = []
    for row in models:
        kinds = dict.fromkeys(row["kinds"])
        of = {
            kind: [share for own, share in zip(row["kinds"], row["shares"], strict=True) if own == kind]
            for kind in kinds
        }
        told.append(f"{row['model']}, " + ", ".join(f"{k} {words.percent(sum(s) / len(s))}" for k, s in of.items()))
    return f"Share of nodes in a circuit, mean over blocks: {'; '.join(told)}."
