"""What maps of networks whose layers are drawn anew (`network.perturbed`) say of an attribution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sukashi.experiments.audit.networks import FEW
from sukashi.experiments.audit.saliency.values import Array
from sukashi.experiments.workspace import Record

# Correlations from which on most, or part, of a map is told to be there whatever a network learned.
MOST, PART = 0.5, 0.1


def values(records: Sequence[Record], names: Sequence[str]) -> tuple[list[dict[str, Any]], list[Array]]:
    """How like the reference's the maps are that it has when layers are drawn anew, image by image, NaN left out.

    Of each row {"attribution", "measure", "layers", "down_to"}: so many layers, the last of them by name. The last row
    of an attribution and measure is of all layers.
    """
    found: list[dict[str, Any]] = []
    rows: list[Array] = []
    by_name = {record.result["attribution"]: record for record in records if "sanity" in record.about}
    for name in names:
        for column, of_images in by_name[name].arrays("sanity").items() if name in by_name else ():
            stage, _, measure = column.partition(" ")
            if np.isfinite(of_images).any():
                rows.append(of_images[np.isfinite(of_images)])
                found.append({"attribution": name, "measure": measure, **by_name[name].result["stages"][int(stage)]})
    return found, rows


def doubts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each attribution: how like its maps are whatever the network learned, by rank correlation, which
    is 0 of maps that have nothing to do with each other."""
    last = {row["attribution"]: row for row in rows if row["measure"] == "rank_correlation" and row["n"] >= FEW}
    return [
        f"{name}: with {_all(row['layers'])} of the reference drawn anew {row['measure']} with its own map is "
        f"{row['mean']:.2f}{_interval(row)}: {_so(row)}."
        for name, row in last.items()
    ]


def _all(n_layers: int) -> str:
    return "the one layer" if n_layers == 1 else f"all {n_layers} layers"


def _interval(row: Mapping[str, Any]) -> str:
    return "" if row["low"] is None else f" [{row['low']:.2f}, {row['high']:.2f}]"


def _so(row: Mapping[str, Any]) -> str:
    if row["low"] >= PART:
        share = "most" if row["low"] >= MOST else "part"
        return f"{share} of such a map does not depend on what the network learned"
    if row["high"] < MOST:
        return "such maps depend on what the network learned, for the most part"
    return "how much of such a map depends on what the network learned can't be told from so few images"
