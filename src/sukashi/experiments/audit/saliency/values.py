"""Cells of a saliency audit: every number of every image, and the tables of them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

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
    is "higher" or "lower" by measure, `similarities` are those of the measures that compare two maps.
    """

    image_ids: tuple[str, ...]
    silent: NDArray[np.bool_]
    values: dict[str, Array]
    curves: dict[str, Array]
    better: dict[str, str]
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


_TEXT, _NUMBER = pa.string(), pa.float64()
_VALUES = pa.schema({"model": _TEXT, "attribution": _TEXT, "measure": _TEXT, "image_id": _TEXT, "value": _NUMBER})
_CURVES = pa.schema(
    {"model": _TEXT, "attribution": _TEXT, "order": _TEXT, "percentage": _NUMBER, "image_id": _TEXT}
    | {"correct": _NUMBER, "probability": _NUMBER}
)


def values_table(cells: Cells) -> bytes:
    """values.parquet: a row for each image and measure of a cell."""
    parts = [
        pa.table([*_repeated(label, name, measure, n=len(values)), cell.image_ids, values], schema=_VALUES)
        for (name, label), cell in cells.items()
        for measure, values in cell.values.items()
    ]
    return _parquet(parts, _VALUES)


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
                parts.append(pa.table(columns, schema=_CURVES))
    return _parquet(parts, _CURVES)


def _repeated(*texts: str, n: int) -> list[Any]:
    return [pa.array([text] * n, pa.string()) for text in texts]


def _parquet(parts: Sequence[Any], schema: Any) -> bytes:
    content = io.BytesIO()
    pq.write_table(pa.concat_tables([schema.empty_table(), *parts]), content)
    return content.getvalue()
