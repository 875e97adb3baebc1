"""Cells of a saliency audit: every number of every image, and the tables of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sukashi.core.experiment import Columns
from sukashi.experiments.columns import parquet, schema
from sukashi.experiments.workspace import Record
from sukashi.measures import faithfulness

Array = NDArray[np.float64]

# ROAD's curves that are kept, and the measures made of them by what they have.
ORDERS: dict[faithfulness.Order, tuple[int, ...]] = {
    "morf": faithfulness.AOPC_PERCENTAGES["mean"],
    "lerf": faithfulness.PERCENTAGES,
}
OF_CURVES: dict[str, tuple[faithfulness.Order, ...]] = {"aopc": ("morf",), "road": ("morf", "lerf")}
OUTCOMES: tuple[faithfulness.Outcome, ...] = ("accuracy", "probability")
CURVES = tuple(f"{order} {outcome}" for order in ORDERS for outcome in OUTCOMES)


@dataclass(frozen=True)
class Cell:
    """What was measured of one network and attribution: for each measure a value of each image (B,), NaN for none.

    Measures of similarity are of its maps and the reference's; in the reference's own cell, of its maps and those that
    it has when `rounded` otherwise.

    `silent` (B,) marks maps that are constant or not finite, `curves` are ROAD's: {"morf accuracy": (B, P)}. `better`
    is "higher", "lower" or None by measure, `similarities` are those of the measures that compare two maps.
    """

    image_ids: tuple[str, ...]
    silent: NDArray[np.bool_]
    values: dict[str, Array]
    curves: dict[str, Array]
    better: dict[str, str | None]
    similarities: tuple[str, ...]

    def is_similarity(self, measure: str) -> bool:
        """Whether a measure, or the one that it is a part of, compares two maps."""
        return measure.partition("/")[0] in self.similarities

    @staticmethod
    def read(record: Record) -> Cell:
        kept = record.arrays("cell")
        ids, silent = tuple(kept.pop("image_ids").tolist()), kept.pop("silent")
        curves = {name: kept.pop(name) for name in list(kept) if name in CURVES}
        # As the registry had them then: a measure of one's own need not be there now.
        told = record.result
        return Cell(ids, silent, kept, curves, told["better"], tuple(told["similarities"]))


Cells = dict[tuple[str, str], Cell]  # by attribution and label


_CELL: Columns = {
    "model": (str, "the network"),
    "attribution": (str, "what made the maps; empty where a measure reads none"),
}
_IMAGE: Columns = {"image_id": (str, "the image, by its path or number in the data")}
VALUE_COLUMNS: Columns = {
    **_CELL,
    "measure": (str, "what was measured; of one that reads masks, after a /, the concept"),
    **_IMAGE,
    "value": (float, "of this image; NaN where its map is constant or not finite"),
}
CURVE_COLUMNS: Columns = {
    **_CELL,
    "order": (str, "which pixels go first: morf, the most relevant; lerf, the least"),
    "percentage": (float, "of the pixels, that is gone"),
    **_IMAGE,
    "correct": (float, "1 where the network gets the image right then, else 0"),
    "probability": (float, "that of the image's class then"),
}


def values_table(cells: Cells) -> bytes:
    """values.parquet: a row for each image and measure of a cell."""
    parts = [
        pa.table(
            [*_repeated(label, name, measure, n=len(values)), cell.image_ids, values], schema=schema(VALUE_COLUMNS)
        )
        for (name, label), cell in cells.items()
        for measure, values in cell.values.items()
    ]
    return _file(parts, VALUE_COLUMNS)


def curves_table(cells: Cells) -> bytes:
    """curves.parquet: a row for each image and percentage of a curve."""
    parts = []
    for (name, label), cell in cells.items():
        for order, percentages in ORDERS.items():
            if f"{order} accuracy" in cell.curves:
                n = len(cell.image_ids) * len(percentages)
                columns = _repeated(label, name, order, n=n)
                columns.append(np.tile(np.array(percentages, dtype=np.float64), len(cell.image_ids)))
                columns.append(np.repeat(cell.image_ids, len(percentages)).tolist())
                columns += [cell.curves[f"{order} {outcome}"].ravel() for outcome in OUTCOMES]
                parts.append(pa.table(columns, schema=schema(CURVE_COLUMNS)))
    return _file(parts, CURVE_COLUMNS)


def _repeated(*texts: str, n: int) -> list[Any]:
    return [pa.array([text] * n, pa.string()) for text in texts]


def _file(parts: list[pa.Table], columns: Columns) -> bytes:
    return parquet(pa.concat_tables([schema(columns).empty_table(), *parts]))
