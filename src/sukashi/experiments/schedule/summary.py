"""What the levels of a course show: accuracy over seeds and images, differences from dense, in words and a picture."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from sukashi.core import stats
from sukashi.core.stats import Interval
from sukashi.experiments.schedule.settings import LEAKY, Course
from sukashi.report import figures, words

LOST = 0.02  # Suwal et al. 2025, sec. 3.1, speak of one to two points
SAME = 0.01  # fractions removed that are further apart are not the same level


@dataclass(frozen=True)
class Level:
    """A network of a study: which it is, which test images it gets right (B,), and what its recipe says of it."""

    contender: str
    seed: int
    ratio: float
    correct: NDArray[np.bool_]
    figures: Mapping[str, Any]


def summary(levels: Sequence[Level], course: Course) -> dict[str, Any]:
    """The figures of a study's levels, over seeds and images; those of `levels.run`, but for where it was done."""
    right = {(level.contender, level.ratio, level.seed): level.correct.astype(float) for level in levels}
    whole = {level.seed: level.figures["parameters"] for level in levels if level.contender == "dense"}

    def over_seeds(contender: str, ratio: float) -> NDArray[np.float64]:
        return np.array([right[contender, ratio, seed] for seed in range(course.seeds)])

    dense = over_seeds("dense", 0.0)
    rows = {}
    for name in course.contenders:
        for ratio in course.ratios:
            of_level = [level for level in levels if (level.contender, level.ratio) == (name, ratio)]
            rows[name, ratio] = {
                "contender": name,
                "ratio": ratio,
                "accuracy": _share(over_seeds(name, ratio)),
                "difference": _bounds(stats.crossed(over_seeds(name, ratio) - dense)),
                "removed": float(np.mean([level.figures["removed"] for level in of_level])),
                "parameters": float(np.mean([1 - lvl.figures["parameters"] / whole[lvl.seed] for lvl in of_level])),
                "zeros": float(np.mean([level.figures["zeros"] for level in of_level])),
            }
    pairs = []
    for one, other in itertools.combinations(course.contenders, 2):
        for ratio in course.ratios:
            difference = _bounds(stats.crossed(over_seeds(one, ratio) - over_seeds(other, ratio)))
            removed = [rows[name, ratio]["removed"] for name in (one, other)]
            pair = {"first": one, "second": other, "ratio": ratio, "removed": removed, "difference": difference}
            pairs.append(pair | {"so": _so(pair)})
    found = {
        "dense_accuracy": _share(dense),
        "seeds": course.seeds,
        "n_images": dense.shape[1],
        "removes": "weights" if course.scope else "units",
        "levels": list(rows.values()),
        "pairs": pairs,
    }
    return found | {"verdict": _verdict(found, course), "lines": _lines(found, course)}


def cautions(result: Mapping[str, Any], course: Course) -> list[str]:
    """That the images are too few for a verdict; where other fractions were removed than asked for, and why."""
    if course.scope is not None:
        why = "whole numbers of each group go"
    elif course.round_to > 1:
        why = f"widths are rounded up to multiples of {course.round_to}"
    else:
        why = "one unit of each layer stays"
    said, least = [], stats.least_images(LOST)
    if result["n_images"] < least:
        said.append(
            f"{result['n_images']} test images can't show that accuracy is at most {100 * LOST:g} points lower, "
            f"{least} are needed"
        )
    for name in course.contenders:
        rows = [row for row in _rows(result, name) if _apart(row["removed"], row["ratio"])]
        if rows:
            removed = words.listed([words.percent(row["removed"]) for row in rows])
            asked = words.listed([_asked(row) for row in rows])
            said.append(f"{name}: {removed} of the {result['removes']} were removed, {asked} were asked for: {why}")
    return said


def _rows(result: Mapping[str, Any], contender: str) -> list[Any]:
    return [row for row in result["levels"] if row["contender"] == contender]


def _apart(one: float, other: float) -> bool:
    """Whether two fractions removed are not to be spoken of as one."""
    return abs(one - other) > SAME


def _asked(row: Mapping[str, Any]) -> str:
    return f"{100 * row['ratio']:.4g}%"


def _so(pair: Mapping[str, Any]) -> str:
    """What a pair's difference says of its first."""
    if _apart(*pair["removed"]):
        return "not comparable"
    low, high = pair["difference"]["low"], pair["difference"]["high"]
    return "better" if low > 0 else "worse" if high < 0 else "not separated"


def _safe(result: Mapping[str, Any], contender: str) -> list[Any]:
    """The levels at which accuracy is shown not to have fallen by more than LOST: where one is not, a later one may.

    Of equal answers the interval is a point, however few they are: below `stats.least_images` there is no such level.
    """
    if result["n_images"] < stats.least_images(LOST):
        return []
    return [row for row in _rows(result, contender) if row["difference"]["low"] > -LOST]


def _verdict(result: Mapping[str, Any], course: Course) -> str:
    """How far one may go, as a heading. What was only masked at the start is no level of sparsity."""
    names = [name for name, (_, enforced) in course.contenders.items() if enforced] or list(course.contenders)
    furthest = {name: safe[-1]["removed"] for name in names if (safe := _safe(result, name))}
    if not furthest:
        return f"At no level is accuracy shown to be at most {100 * LOST:g} points lower"
    most = max(furthest.values())
    who = words.listed([name for name in furthest if furthest[name] == most])
    return (
        f"Accuracy is at most {100 * LOST:g} points lower at {words.percent(most)} of the {result['removes']} removed "
        f"({who})"
    )


def _lines(result: Mapping[str, Any], course: Course) -> list[str]:
    """One sentence for each contender: where accuracy has not fallen by more than LOST, and its last level."""

    def level(row: Mapping[str, Any], of: str = "") -> str:
        asked = f" ({_asked(row)} asked for)" if _apart(row["removed"], row["ratio"]) else ""
        return f"{words.percent(row['removed'])}{of}{asked}"

    of = f" of the {result['removes']} removed"

    said = []
    for name in course.contenders:
        safe, row = _safe(result, name), _rows(result, name)[-1]
        last = row["difference"]
        leak = "" if course.contenders[name][1] else f" (where {row['zeros']:.0%} are zero in the end)"
        said.append(
            f"{name}: "
            + (f"at {words.listed([*map(level, safe[:-1]), level(safe[-1], of)])}" if safe else "at no level")
            + f" accuracy is shown to be at most {100 * LOST:g} points lower; at {level(row)}{leak} it is "
            f"{100 * last['mean']:+.1f} points from the dense network's ({100 * last['low']:+.1f} to "
            f"{100 * last['high']:+.1f})."
        )
    return said


def draw(result: Mapping[str, Any], course: Course) -> bytes:
    """Accuracy by level with intervals, a line for each contender; as a PNG."""
    figure = Figure(figsize=(8.4, 4.6), layout="constrained")
    axes = figure.subplots()
    dense = result["dense_accuracy"]
    axes.axhspan(dense["low"], dense["high"], color=figures.FAINT, alpha=0.5, linewidth=0)
    figures.level(axes, dense["mean"], "dense", "--")
    for place, name in enumerate(course.contenders):
        rows = _rows(result, name)
        mean, low, high = (np.array([row["accuracy"][key] for row in rows]) for key in ("mean", "low", "high"))
        colour = figures.colour(name.partition("/")[0], place)
        # Side by side, that intervals at one level do not hide each other.
        x = np.array([row["removed"] for row in rows]) + 0.006 * (place - (len(course.contenders) - 1) / 2)
        style = ":" if name.endswith(LEAKY) else "-"
        figures.bars(axes, x, mean, low, high, color=colour, linestyle=style, linewidth=1.6, label=name)
    axes.set(xlabel=f"fraction of the {result['removes']} that was removed", ylabel="accuracy on test images")
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.legend(frameon=False, fontsize=9, loc="best")
    figures.calm(axes)
    return figures.png(figure)


def _share(right: NDArray[np.float64]) -> dict[str, float | None]:
    """Of one seed the interval that the page of its training shows, which is for images alone too."""
    if len(right) == 1:
        return _bounds(stats.share(int(right.sum()), right.size))
    found = stats.crossed(right)
    return {"mean": found.mean, "low": max(0.0, found.low), "high": min(1.0, found.high)}


def _bounds(found: Interval) -> dict[str, float | None]:
    return {"mean": found.mean, "low": found.low, "high": found.high}
