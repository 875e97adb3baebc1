"""What the levels of a schedule show, from their folder alone: accuracy, and how far it is from dense."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from sukashi.core import stats
from sukashi.core.bracketed import plain
from sukashi.core.errors import UsageError
from sukashi.core.experiment import Columns, Result
from sukashi.core.stats import Interval
from sukashi.experiments.columns import as_json, shared
from sukashi.experiments.schedule.settings import LEAKY
from sukashi.experiments.workspace import Record, Workspace
from sukashi.report import words

LOST = 0.02  # Suwal et al. 2025, sec. 3.1, speak of one to two points
SAME = 0.01  # fractions removed that are further apart are not the same level


class ScheduleResult(Result):
    """Networks pruned and trained to several levels.

    options  of each criterion
    levels   of each contender and ratio, ascending: ratio_asked; whether its networks, of every seed, and those before
             it are `shown` to be at most 2 points less accurate; units_removed or weights_removed (with a scope; the
             other is None), the mean fraction that was removed of the dense network's; parameters_removed; the share
             of weights that are zero in the end, zeros_in_masked_layers; accuracy and its difference from the dense
             network of the same seed, {"mean", "low", "high"} for new seeds and new images, `each` of the seeds
    pairs    of two contenders at the same ratio: difference, first minus second, what was `removed` of each, and `so`;
             where that is more than a point apart, they are "not comparable"
    """

    kind: ClassVar[str] = "schedule"
    columns: ClassVar[Columns] = {
        **shared("model", "weights_sha256", "data"),
        "schedule": (str, "what a level starts from, and whether it rewinds"),
        "contender": (str, f"a criterion; with /{LEAKY} its masks hold at the start of a level only"),
        **shared("criterion", "options", "calibration", "scope", "ratio_asked"),
        "shown": (bool, "whether this level, and every one before it, is shown to be at most 2 points less accurate"),
        **shared("units_removed", "weights_removed", "parameters_removed"),
        "zeros_in_masked_layers": (float, "the share of the masked layers' weights that is zero in the end"),
        "n_seeds": (int, "seeds that all figures of a row are over"),
        **shared("n_images"),
        "accuracy_mean": (float, "the share of the test images that are right, mean over seeds"),
        "accuracy_low": (float, "its 95 % interval, for new seeds and new images: from"),
        "accuracy_high": (float, "to"),
        "difference_mean": (float, "accuracy less that of the dense network of the same seed, mean over seeds"),
        "difference_low": (float, "its 95 % interval, for new seeds and new images: from"),
        "difference_high": (float, "to"),
    }

    model: str
    weights_sha256: str | None
    data: str
    calibration: int
    options: dict[str, dict[str, Any]]
    schedule: str
    scope: str | None
    removes: str
    contenders: list[str]
    seeds: int
    n_images: int
    dense_accuracy: dict[str, Any]
    levels: list[dict[str, Any]]
    pairs: list[dict[str, Any]]
    verdict: str
    lines: list[str]

    def overview(self) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
        of_weights = self.removes == "weights"
        interval = "each seed" if self.seeds == 2 else "95% interval"
        header = [
            *("contender", f"{self.removes} removed", "asked for"),
            *("zeros at the end" if of_weights else "parameters removed", "accuracy, %", interval),
            *("against dense, points", interval),
        ]
        rows = []
        for row in self.levels:
            right, change = row["accuracy"], row["difference"]
            less = row["zeros_in_masked_layers" if of_weights else "parameters_removed"]
            rows.append(
                [
                    *(row["contender"], f"{removed(row):.1%}", f"{row['ratio_asked']:.1%}", f"{less:.1%}"),
                    *(f"{100 * right['mean']:.1f}", words.spread(right, 100)),
                    *(f"{100 * change['mean']:+z.1f}", words.spread(change, 100, sign=True)),
                ]
            )
        return header, rows

    def text(self) -> str:
        mean, spread = 100 * self.dense_accuracy["mean"], words.spread(self.dense_accuracy, 100)
        on = f"on {words.several(self.n_images, 'test image')}, {words.seeds(self.seeds)}"
        said = [words.table(*self.overview()), "", f"dense accuracy {mean:.1f} % ({spread}) {on}", ""]
        said += [self.verdict, *self.lines, *self.remarks()]
        return "\n".join([*said, *words.where(self)])

    def table(self) -> list[dict[str, Any]]:
        """A row for each level."""
        flat = []
        for row in self.levels:
            bounds = {
                f"{name}_{key}": row[name][key]
                for name in ("accuracy", "difference")
                for key in ("mean", "low", "high")
            }
            criterion = criterion_of(row["contender"])
            about = {"criterion": plain(criterion), "options": as_json(self.options[criterion]), "n_seeds": self.seeds}
            found = {**dict(self), **row, **bounds, **about}
            flat.append({column: found[column] for column in self.columns})
        return flat


@dataclass(frozen=True)
class Outcome:
    """A network of a schedule: which it is, which test images it gets right (B,), and what was measured of it."""

    contender: str
    seed: int
    ratio: float
    correct: NDArray[np.bool_]
    figures: Mapping[str, Any]


def summary(space: Workspace) -> ScheduleResult:
    """Raises UsageError where levels are not finished."""
    records = space.records()
    if len(records) < space.n_trials:
        raise UsageError(
            f"{space.folder} has {len(records)} of {words.several(space.n_trials, 'network')} finished: "
            "give the same command again"
        )
    identity = space.identity
    found = of_outcomes([_outcome(record) for record in records if record.about["until"] is None], identity)
    found["warnings"] = [*space.shown["warnings"], *found["warnings"]]
    return ScheduleResult(
        model=identity["model"]["spec"],
        weights_sha256=identity["model"]["weights_sha256"],
        data=identity["data"]["spec"],
        calibration=identity["data"]["calibration"],
        options=identity["options"],
        notes=space.shown["notes"],
        **found,
    )


def of_outcomes(outcomes: Sequence[Outcome], identity: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a result, but for model and data."""
    right = {(one.contender, one.ratio, one.seed): one.correct.astype(float) for one in outcomes}
    whole = {one.seed: one.figures["parameters"] for one in outcomes if one.contender == "dense"}
    names = list(dict.fromkeys(one.contender for one in outcomes if one.contender != "dense"))
    what = "weights" if identity["scope"] else "units"

    def over_seeds(contender: str, ratio: float) -> NDArray[np.float64]:
        return np.array([right[contender, ratio, seed] for seed in range(identity["seeds"])])

    dense = over_seeds("dense", 0.0)
    rows = {}

    def bounds(of: Callable[[NDArray[np.float64]], Interval], values: NDArray[np.float64]) -> dict[str, Any]:
        found = of(values)
        return {"mean": found.mean, "low": found.low, "high": found.high, "each": values.mean(axis=1).tolist()}

    for name in names:
        change = np.array([over_seeds(name, ratio) - dense for ratio in identity["ratios"]])
        gained, lost = ((sign * change > 0).sum(axis=2) for sign in (1, -1))
        n_shown = stats.shown_up_to(gained, lost, dense.shape[1], LOST, level=_level(names))
        for place, ratio in enumerate(identity["ratios"]):
            of_level = [one for one in outcomes if (one.contender, one.ratio) == (name, ratio)]
            gone = float(np.mean([one.figures["removed"] for one in of_level]))
            rows[name, ratio] = {
                "contender": name,
                "ratio_asked": ratio,
                "shown": place < n_shown,
                "accuracy": bounds(stats.accuracy, over_seeds(name, ratio)),
                "difference": bounds(stats.paired, over_seeds(name, ratio) - dense),
                "units_removed": gone if what == "units" else None,
                "weights_removed": gone if what == "weights" else None,
                "parameters_removed": float(
                    np.mean([1 - one.figures["parameters"] / whole[one.seed] for one in of_level])
                ),
                "zeros_in_masked_layers": float(np.mean([one.figures["zeros_in_masked_layers"] for one in of_level])),
            }
    pairs = []
    for one, other in itertools.combinations(names, 2):
        for ratio in identity["ratios"]:
            difference = bounds(stats.paired, over_seeds(one, ratio) - over_seeds(other, ratio))
            gone_of = [removed(rows[name, ratio]) for name in (one, other)]
            pair = {"first": one, "second": other, "ratio_asked": ratio, "removed": gone_of, "difference": difference}
            pairs.append(pair | {"so": _so(pair)})
    found = {
        "schedule": identity["schedule"],
        "scope": identity["scope"],
        "removes": what,
        "contenders": names,
        "seeds": identity["seeds"],
        "n_images": dense.shape[1],
        "dense_accuracy": bounds(stats.accuracy, dense),
        "levels": list(rows.values()),
        "pairs": pairs,
    }
    warned = cautions(found, identity["round_to"])
    return found | {"verdict": _verdict(found), "lines": _lines(found), "warnings": warned}


def removed(row: Mapping[str, Any]) -> float:
    """What was removed at a level, of units or of weights."""
    return float(row["weights_removed"] if row["units_removed"] is None else row["units_removed"])


def cautions(found: Mapping[str, Any], round_to: int) -> list[str]:
    """That the images are too few for a verdict; where other fractions were removed than asked for, and why."""
    if found["scope"] is not None:
        why = "whole numbers of each group go"
    elif round_to > 1:
        why = f"widths are rounded up to multiples of {round_to}"
    else:
        why = "one unit of each layer stays"
    said, least = [], stats.least_images(LOST, level=_level(found["contenders"]))
    if found["n_images"] < least:
        said.append(
            f"{words.several(found['n_images'], 'test image')} can't show that accuracy is at most "
            f"{words.points(LOST)} lower, {least} are needed"
        )
    for name in found["contenders"]:
        rows = [row for row in rows_of(found, name) if _apart(removed(row), row["ratio_asked"])]
        if rows:
            gone = words.listed([words.percent(removed(row)) for row in rows])
            asked = words.listed([_asked(row) for row in rows])
            said.append(f"{name}: {gone} of the {found['removes']} were removed, {asked} were asked for: {why}")
    return said


def _shown(found: Mapping[str, Any], contender: str) -> list[Any]:
    return [row for row in rows_of(found, contender) if row["shown"]]


def rows_of(found: Mapping[str, Any], contender: str) -> list[Any]:
    return [row for row in found["levels"] if row["contender"] == contender]


def _outcome(record: Record) -> Outcome:
    about, arrays = record.about, record.arrays("correct")
    correct = np.unpackbits(arrays["correct"], count=int(arrays["n"])).astype(bool)
    return Outcome(about["contender"], about["seed"], about["ratio_asked"], correct, record.result)


def criterion_of(contender: str) -> str:
    return contender.removesuffix(f"/{LEAKY}")


def _enforced(name: str) -> bool:
    return not name.endswith(f"/{LEAKY}")


def _apart(one: float, other: float) -> bool:
    """Whether two fractions removed are not to be spoken of as one."""
    return abs(one - other) > SAME


def _asked(row: Mapping[str, Any]) -> str:
    return f"{100 * row['ratio_asked']:.4g}%"


def _so(pair: Mapping[str, Any]) -> str:
    """What a pair's difference says of its first."""
    if _apart(*pair["removed"]):
        return "not comparable"
    low, high = pair["difference"]["low"], pair["difference"]["high"]
    return "better" if low > 0 else "worse" if high < 0 else "not separated"


def _level(contenders: Sequence[str]) -> float:
    """The level of each contender's tests: all together name a network that lost more in 2.5 % of cases at most."""
    return 1 - 0.025 / len(contenders)


def _verdict(found: Mapping[str, Any]) -> str:
    """How far one may go, as a heading. What was only masked at the start is no level of sparsity."""
    names = list(filter(_enforced, found["contenders"])) or found["contenders"]
    furthest = {name: max(gone) for name in names if (gone := [removed(row) for row in _shown(found, name)])}
    if not furthest:
        return f"At no level is accuracy shown to be at most {words.points(LOST)} lower"
    most = max(furthest.values())
    who = words.listed([name for name in furthest if furthest[name] == most])
    return (
        f"Accuracy is at most {words.points(LOST)} lower at {words.percent(most)} of the {found['removes']} removed "
        f"({who})"
    )


def _lines(found: Mapping[str, Any]) -> list[str]:
    """One sentence for each contender: where accuracy has not fallen by more than LOST, and its last level."""

    def level(row: Mapping[str, Any], of: str = "") -> str:
        asked = f" ({_asked(row)} asked for)" if _apart(removed(row), row["ratio_asked"]) else ""
        return f"{words.percent(removed(row))}{of}{asked}"

    of = f" of the {found['removes']} removed"
    said = []
    for name in found["contenders"]:
        safe, row = _shown(found, name), rows_of(found, name)[-1]
        last = row["difference"]
        leak = "" if _enforced(name) else f" (where {row['zeros_in_masked_layers']:.0%} are zero in the end)"
        said.append(
            f"{name}: "
            + (f"at {words.listed([*map(level, safe[:-1]), level(safe[-1], of)])}" if safe else "at no level")
            + f" accuracy is shown to be at most {words.points(LOST)} lower; at {level(row)}{leak} it is "
            f"{100 * last['mean']:+z.1f} points from the dense network's ({words.spread(last, 100, sign=True)})."
        )
    return said
