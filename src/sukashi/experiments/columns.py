"""Columns that tables of several kinds have, and files of tables, whose columns say what they hold; what is of one kind
alone is in the `columns` of its result.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sukashi.core.experiment import Columns

_TYPES = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}

_SHARED: Columns = {
    "model": (str, "the network, as it was named"),
    "weights_sha256": (str, "of the weights it began with; none where each seed draws its own"),
    "data": (str, "the images, as they were named"),
    "criterion": (str, "by which units or weights go"),
    "sampling": (str, "how calibration images were chosen"),
    "repair": (str, "what mended the cut network, by the same images; none: nothing"),
    "options": (str, "of the criterion, those that were given, as JSON"),
    "calibration": (int, "calibration images a class"),
    "seed": (int, "of all that is drawn"),
    "scope": (str, "of single weights: within what the lowest go; none where units go"),
    "ratio_asked": (float, "the fraction of UNITS (with a scope of weights) that was asked to go"),
    "n_units_removed": (int, "units that are gone"),
    "units_removed": (float, "the fraction of all units that is gone"),
    "weights_removed": (float, "with a scope: the fraction of the weights in it that is zero"),
    "parameters_removed": (float, "the fraction of the dense network's parameters that is gone"),
    "flops_removed": (float, "the fraction of the dense network's FLOPs that is gone"),
    "accuracy": (float, "the share of the test images that are right"),
    "n_images": (int, "test images"),
}


def shared(*names: str) -> Columns:
    return {name: _SHARED[name] for name in names}


def as_json(options: Mapping[str, Any]) -> str:
    """Options as one text, equal where they are equal."""
    return json.dumps(dict(options), sort_keys=True)


def schema(columns: Columns) -> pa.Schema:
    """Fields that say what they hold, under "description" in their metadata."""
    return pa.schema(
        [pa.field(name, _TYPES[of], metadata={"description": said}) for name, (of, said) in columns.items()]
    )


def parquet(table: pa.Table) -> bytes:
    """The file of a table."""
    content = io.BytesIO()
    pq.write_table(table, content)
    return content.getvalue()
