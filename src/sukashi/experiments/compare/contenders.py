"""The finished trials of a comparison, contender by contender."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sukashi.core.errors import DataError, ModelError, UsageError
from sukashi.core.stats import Interval, accuracy, crossed
from sukashi.core.types import Curve, Plan
from sukashi.criteria.plans import plan_of
from sukashi.experiments.workspace import Desk, Record, Workspace
from sukashi.measures import curves
from sukashi.repairs import NONE

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Contender:
    """The finished trials of a criterion with a sampling and a repair, by seed."""

    name: str
    criterion: str
    sampling: str
    repair: str
    seeds: tuple[int, ...]
    keys: tuple[str, ...]
    results: list[dict[str, Any]]
    curves: list[Curve]
    plans: list[Plan]

    def areas(self, *, relative: bool = False) -> Array:
        """(S, B) the SAUCE of each seed's curve for each test image, over the ratios asked for."""
        chance = float(self.results[0]["chance"])
        return np.stack([curves.areas(curve, chance, relative=relative) for curve in self.curves])

    @cached_property
    def sauce(self) -> Interval:
        """For new seeds and new test images."""
        return crossed(self.areas(), bounds=(0, 100))

    @property
    def reach(self) -> float:
        """The largest fraction that every seed measured, at a ratio asked for."""
        return curves.reach(self.curves)

    def rows(self, ratio: float) -> list[int]:
        """The point of each seed's curve at a ratio asked for, the nearest."""
        return [int(np.nanargmin(np.abs(curve.ratio - ratio))) for curve in self.curves]

    def one_answer_from(self, ratios: Sequence[float]) -> float | None:
        """The ratio from which on the networks of all seeds give one answer to every image; None where the last of
        `ratios`, which rise, leaves more."""
        found = None
        for ratio in reversed([ratio for ratio in ratios if ratio > 0]):
            if self.at(ratio)["one_answer"] < len(self.curves):
                break
            found = ratio
        return found

    def at(self, ratio: float) -> dict[str, Any]:
        """What is gone and what is left at a ratio asked for, over the seeds: of units, parameters and FLOPs the mean,
        of accuracy the mean with its interval for new seeds and new images, and `each` seed's; of how many seeds the
        network gives `one_answer` to every image."""
        rows = self.rows(ratio)
        pairs = list(zip(self.curves, rows, strict=True))
        dense = self.curves[0].flops[0]
        right = np.stack([curve.correct[row] for curve, row in pairs])
        return {
            "ratio_asked": ratio,
            "units_removed": float(np.mean([curve.n_removed[row] for curve, row in pairs])) / self.plans[0].n_units,
            "removed": float(np.mean([curve.fraction[row] for curve, row in pairs])),
            "flops_removed": float(1 - np.mean([curve.flops[row] for curve, row in pairs]) / dense) if dense else None,
            "accuracy": accuracy(right),
            "each": right.mean(axis=1),
            "one_answer": sum(bool((curve.answer[row] == curve.answer[row][0]).all()) for curve, row in pairs),
        }


def name_of(criterion: str, sampling: str, repair: str = NONE) -> str:
    """What competes: a criterion, how images were sampled where not at random, and what repairs its cuts, as in
    taylor/confidence+refit.
    """
    sampled = criterion if sampling == "random" else f"{criterion}/{sampling}"
    return sampled if repair == NONE else f"{sampled}+{repair}"


def named(record: Record) -> str:
    """What a trial stands for."""
    return name_of(record.about["criterion"], sampling_of(record), repair_of(record))


def contenders(space: Workspace) -> list[Contender]:
    """Best mean SAUCE first; criteria that refused the model are left out.

    Raises UsageError where no trial is finished, ModelError where every criterion refused the model, DataError where
    trials were tested on different images.
    """
    by_name: dict[str, list[Record]] = {}
    for record in space.records():
        if "refused" not in record.result:
            by_name.setdefault(named(record), []).append(record)
    if not by_name:
        reasons = list(refused(space).values())
        if reasons and len(space.records()) == space.n_trials:
            spec = space.identity["model"]["spec"]
            raise ModelError(f"{spec} is refused by every criterion; first: {reasons[0]}")
        raise UsageError(
            f"{space.folder} holds no finished trial: give the same `sukashi.compare` again to go on with it"
        )
    found = []
    for name, records in sorted(by_name.items()):
        records.sort(key=lambda record: int(record.about["seed"]))
        found.append(
            Contender(
                name=name,
                criterion=records[0].about["criterion"],
                sampling=sampling_of(records[0]),
                repair=repair_of(records[0]),
                seeds=tuple(record.about["seed"] for record in records),
                keys=tuple(record.key for record in records),
                results=[record.result for record in records],
                curves=[curve_of(record) for record in records],
                plans=[plan_of(record.arrays("plan")) for record in records],
            )
        )
    if len({curve.image_ids for one in found for curve in one.curves}) > 1:
        raise DataError("the trials of this folder were tested on different images: run it again into another folder")
    return sorted(found, key=lambda one: -one.sauce.mean)


def refused(space: Workspace) -> dict[str, str]:
    """Why contenders are left out that refused the model."""
    return {named(record): record.result["refused"] for record in space.records() if "refused" in record.result}


def sampling_of(record: Record) -> str:
    return str(record.about["data"].get("sampling", "random"))


def repair_of(record: Record) -> str:
    return str(record.about.get("repair", NONE))


def save_curve(desk: Desk, curve: Curve) -> None:
    arrays = {
        "ratio": curve.ratio.astype(np.float64),
        "n_removed": curve.n_removed.astype(np.int64),
        "fraction": curve.fraction.astype(np.float64),
        "flops": curve.flops.astype(np.int64),
        "answer": curve.answer.astype(np.int32),
        "target": curve.target.astype(np.int32),
        "correct": np.packbits(curve.correct.astype(bool), axis=1),
        "image_ids": np.array(curve.image_ids, dtype=np.str_),
    }
    desk.save("curve", arrays)


def curve_of(record: Record) -> Curve:
    arrays = record.arrays("curve")
    image_ids = tuple(arrays["image_ids"].tolist())
    correct = np.unpackbits(arrays["correct"], axis=1, count=len(image_ids)).astype(bool)
    names = "ratio", "n_removed", "fraction", "flops", "answer", "target"
    return Curve(**{name: arrays[name] for name in names}, correct=correct, image_ids=image_ids)
