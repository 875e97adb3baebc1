"""The figures of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sukashi.core import stats
from sukashi.core.stats import Interval
from sukashi.core.types import Curve
from sukashi.experiments.compare.store import Record, Store
from sukashi.measures.curves import THRESHOLDS, at, cautions, lossless


def summary(store: Store, margin: float) -> dict[str, Any]:
    """The figures of a finished comparison, as `compare --json` prints them."""
    records: dict[str, list[Record]] = {}
    for record in store.finished():
        records.setdefault(record.trial.contender, []).append(record)
    names = store.study.get("contenders", store.study["criteria"])
    ordered = {name: records[name] for name in names if name in records}
    curves = {name: [record.curve() for record in found] for name, found in ordered.items()}
    first = next(iter(ordered))
    return {
        "sauce": {
            name: _bounds(stats.interval([record.result["sauce"] for record in found]))
            for name, found in ordered.items()
        },
        "lossless": {name: _lossless(found, curves[name], margin) for name, found in ordered.items()},
        "accuracy_at": {
            name: {
                f"{fraction:g}": found and _bounds(found)
                for fraction, found in zip(
                    THRESHOLDS,
                    at(of_name, THRESHOLDS),
                    strict=True,
                )
            }
            for name, of_name in curves.items()
        },
        "dense_accuracy": ordered[first][0].result["dense_accuracy"],
        "curves": {name: [_points(curve, False) for curve in of_name] for name, of_name in curves.items()},
        "passes": {name: [_points(curve, True) for curve in of_name] for name, of_name in curves.items()},
        "notes": list(cautions(len(curves[first][0].image_ids), margin)),
        "refused": store.refused(),
        "out": str(store.folder),
    }


def _lossless(records: Sequence[Record], curves: Sequence[Curve], margin: float) -> dict[str, Any]:
    """What `curves.lossless` finds, as a fraction on the curves' axis and as a ratio of units."""
    plan = records[0].plan()
    assert plan is not None, "a finished trial has a plan"
    found = lossless(curves, margin, generator=np.random.default_rng(0))
    bounds = {"mean": found.mean, "low": found.low, "high": found.high}
    return {
        "margin": margin,
        "fraction": {name: float(value[0]) for name, value in bounds.items()},
        "ratio": {name: float(value[1]) / plan.n_units for name, value in bounds.items()},
    }


def _bounds(found: Interval) -> dict[str, float | None]:
    return {"mean": found.mean, "low": found.low, "high": found.high}


def _points(curve: Curve, passes: bool) -> list[dict[str, float]]:
    rows = np.flatnonzero(np.isnan(curve.ratio) == passes)
    return [{"fraction": float(curve.fraction[r]), "accuracy": float(curve.accuracy[r])} for r in rows]
