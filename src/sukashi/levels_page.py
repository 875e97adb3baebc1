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

from sukashi import page, stats
from sukashi.courses import LEAKY, Course
from sukashi.stats import Interval

LOST = 0.02  # Suwal et al. 2025, sec. 3.1, speak of one to two points


@dataclass(frozen=True)
class Level:
    """A network of a study: which it is, which test images it gets right (B,), and what its recipe says of it."""

    contender: str
    seed: int
    ratio: float
    correct: NDArray[np.bool_]
    figures: Mapping[str, Any]


def summary(levels: Sequence[Level], course: Course) -> dict[str, Any]:
    """The figures of a study's levels, over seeds and images."""
    right = {(level.contender, level.ratio, level.seed): level.correct.astype(float) for level in levels}

    def over_seeds(contender: str, ratio: float) -> NDArray[np.float64]:
        return np.array([right[contender, ratio, seed] for seed in range(course.seeds)])

    dense = over_seeds("dense", 0.0)
    rows, pairs = [], []
    for name in course.contenders:
        for ratio in course.ratios:
            of_level = [level for level in levels if (level.contender, level.ratio) == (name, ratio)]
            rows.append(
                {
                    "contender": name,
                    "ratio": ratio,
                    "accuracy": _share(over_seeds(name, ratio)),
                    "difference": _bounds(stats.crossed(over_seeds(name, ratio) - dense)),
                    "removed": float(np.mean([level.figures["removed"] for level in of_level])),
                    "zeros": float(np.mean([level.figures["zeros"] for level in of_level])),
                }
            )
    for one, other in itertools.combinations(course.contenders, 2):
        for ratio in course.ratios:
            difference = _bounds(stats.crossed(over_seeds(one, ratio) - over_seeds(other, ratio)))
            pairs.append({"first": one, "second": other, "ratio": ratio, "difference": difference})
    return {
        "dense_accuracy": _share(dense),
        "seeds": course.seeds,
        "n_images": dense.shape[1],
        "levels": rows,
        "pairs": pairs,
    }


def verdict(result: Mapping[str, Any], course: Course) -> str:
    """One sentence for each contender: how far it goes before accuracy may have fallen by more than LOST."""
    removed = "weights" if course.scope else "units"
    said = []
    for name in course.contenders:
        rows = [row for row in result["levels"] if row["contender"] == name]
        safe = list(itertools.takewhile(lambda row: row["difference"]["low"] > -LOST, rows))
        last = rows[-1]["difference"]
        leak = "" if course.contenders[name][1] else f" (where {rows[-1]['zeros']:.0%} are zero in the end)"
        said.append(
            f"{name}: "
            + (f"up to {safe[-1]['ratio']:.0%} of the {removed}" if safe else "at no level")
            + f" accuracy is shown to be at most {100 * LOST:g} points lower; at {rows[-1]['ratio']:.0%}{leak} it is "
            f"{100 * last['mean']:+.1f} points from the dense network's ({100 * last['low']:+.1f} to "
            f"{100 * last['high']:+.1f})."
        )
    return " ".join(said)


def draw(result: Mapping[str, Any], course: Course) -> bytes:
    """Accuracy by level with intervals, a line for each contender; as a PNG."""
    figure = Figure(figsize=(8.4, 4.6), layout="constrained")
    axes = figure.subplots()
    dense = result["dense_accuracy"]
    axes.axhspan(dense["low"], dense["high"], color=page.FAINT, alpha=0.5, linewidth=0)
    page.level(axes, dense["mean"], "dense", "--")
    for place, name in enumerate(course.contenders):
        rows = [row for row in result["levels"] if row["contender"] == name]
        mean, low, high = (np.array([row["accuracy"][key] for row in rows]) for key in ("mean", "low", "high"))
        colour = page.colour(name.partition("/")[0], place)
        # Side by side, that intervals at one ratio do not hide each other.
        x = np.array([row["ratio"] for row in rows]) + 0.006 * (place - (len(course.contenders) - 1) / 2)
        axes.errorbar(
            x,
            mean,
            (mean - low, high - mean),
            color=colour,
            linestyle=":" if name.endswith(LEAKY) else "-",
            marker="o",
            markersize=4,
            linewidth=1.6,
            elinewidth=1,
            capsize=2.5,
            label=name,
        )
    removed = "weights" if course.scope else "units"
    axes.set(xlabel=f"fraction of {removed} removed", ylabel="accuracy on test images")
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.legend(frameon=False, fontsize=9, loc="best")
    page.calm(axes)
    return page.png(figure)


def _share(right: NDArray[np.float64]) -> dict[str, float | None]:
    found = stats.crossed(right)
    return {"mean": found.mean, "low": max(0.0, found.low), "high": min(1.0, found.high)}


def _bounds(found: Interval) -> dict[str, float | None]:
    return {"mean": found.mean, "low": found.low, "high": found.high}
