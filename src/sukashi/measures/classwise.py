"""What a classifier does class by class: whom it finds, whom it takes for another, how sure it is.

Every figure comes from single images: `answer` (B,) is the class that each is given (-1 for one that the data does not
have), `target` (B,) the class it has, both numbered in [0, n_classes).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import norm

from sukashi.core.stats import Interval, accuracy, crossed, paired, score, share

Array = NDArray[np.float64]

N_BINS = 15  # of confidence, as in Guo et al. 2017
EDGE = 1e-9
FALL = 0.1  # ten points: less of a class is no headline


def confusion(answer: NDArray[Any], target: NDArray[Any], n_classes: int) -> NDArray[np.int64]:
    """(K, K + 1) how many images of each class (row) are given each class (column); the last column counts those that
    are given a class the data does not have."""
    cells = np.zeros((n_classes, n_classes + 1), dtype=np.int64)
    np.add.at(cells, (target, np.where(answer < 0, n_classes, answer)), 1)
    return cells


def sensitivity(table: NDArray[np.int64]) -> list[Interval | None]:
    """Of each class the share of its images that are found (recall), by Wilson; None for a class without images."""
    return [share(int(row[k]), int(row.sum())) if row.sum() else None for k, row in enumerate(table)]


def specificity(table: NDArray[np.int64]) -> list[Interval | None]:
    """Of each class the share of the others' images that are not taken for it, by Wilson; None where all have it."""
    found = []
    for k, row in enumerate(table):
        n = int(table.sum() - row.sum())
        found.append(share(n - int(table[:, k].sum() - row[k]), n) if n else None)
    return found


def balanced_accuracy(right: NDArray[Any], target: NDArray[Any], n_classes: int) -> Interval:
    """The mean sensitivity of the classes that have images, for new images of each class: 1 / K for one answer for all.

    `right` (B,) says which images are right. The standard error is that of a mean of independent shares,
    sqrt(sum_k p_k (1 - p_k) / n_k) / K, and the bounds are those of `stats.score` (with n = K^2 / sum_k 1 / n_k where
    no class has an error to show).
    """
    own = np.arange(n_classes)[:, None] == target
    n = own.sum(axis=1)
    present = n > 0
    found, n = (own & (right > 0)).sum(axis=1)[present] / n[present], n[present]
    variance = (found * (1 - found) / n).sum() / len(n) ** 2
    return score(float(found.mean()), float(variance), len(n) ** 2 / (1 / n).sum())


def guesses(right: NDArray[Any], target: NDArray[Any], n_classes: int) -> bool:
    """Whether a network is not shown to know these classes: neither its accuracy is above the largest class's share,
    which one answer for all images gets right, nor its balanced accuracy above that of one answer (95 % intervals)."""
    n_present = len(np.unique(target))
    largest = max((target == k).mean() for k in range(n_classes))
    above = share(int((right > 0).sum()), len(right)).low > largest
    return not above and balanced_accuracy(right, target, n_classes).low <= 1 / n_present


def auc(probability: Array, target: NDArray[Any], n_classes: int) -> list[Interval | None]:
    """Of each class the area under the ROC curve of its probability (B, K) against all others: how often an image of
    the class is given more than an image of another, ties by half (Mann and Whitney).

    Bounds are those areas A that a score test leaves, |area - A| <= z sqrt(V(A)), with Hanley and McNeil's (1982)
    variance as Newcombe (2006, method 5) takes it for m images of the class and n others:

        V(A) = A (1 - A) (1 + N (1 - A) / (2 - A) + N A / (1 + A)) / (m n),  N = (m + n) / 2 - 1

    DeLong's variance, taken at the area that was found, holds the truth in 90 % only where areas are near 1. None where
    the class, or all else, has fewer than two images.
    """
    found: list[Interval | None] = []
    for k in range(n_classes):
        own = target == k
        n_own, n_other = int(own.sum()), int((~own).sum())
        if min(n_own, n_other) < 2:
            found.append(None)
            continue
        area = float(_placed(probability[own, k], probability[~own, k]).mean())
        found.append(Interval(area, *_areas_left(area, n_own, n_other), len(target)))
    return found


def _areas_left(area: float, n_own: int, n_other: int) -> tuple[float, float]:
    """The lowest and highest area that the score test of `auc` leaves."""

    def beyond(other: float) -> float:
        n = (n_own + n_other) / 2 - 1
        variance = other * (1 - other) * (1 + n * (1 - other) / (2 - other) + n * other / (1 + other))
        return float(abs(area - other) - norm.ppf(0.975) * np.sqrt(variance / (n_own * n_other)))

    inside = min(max(area, EDGE), 1 - EDGE)  # at the edges the test has no width
    low = 0.0 if area == 0 else float(brentq(beyond, 0.0, inside))
    return low, 1.0 if area == 1 else float(brentq(beyond, inside, 1.0))


def _placed(values: Array, among: Array) -> Array:
    """The share of `among` below each value, equal ones by half."""
    ordered = np.sort(among)
    both = np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")
    return np.asarray(both / (2 * len(among)))


def calibration(confidence: Array, correct: NDArray[Any]) -> tuple[Interval, float]:
    """How much surer a network is than right: the mean over images of confidence less outcome, with a 95 % interval for
    new images, above 0 where it is too sure; and the expected calibration error over 15 bins of confidence of equal
    width, sum_b |sum over the bin of (confidence - outcome)| / B (Guo et al. 2017, eq. 3).

    `confidence` (B,) is the probability of the class that each image is given. The calibration error of a network that
    is never off is above 0 too, by the noise of its bins, and so has no interval here: compare it on the same images.
    """
    over = confidence - correct
    bins = np.minimum((confidence * N_BINS).astype(int), N_BINS - 1)
    error = np.abs(np.bincount(bins, weights=over, minlength=N_BINS)).sum() / len(over)
    return crossed([over], bounds=(-1, 1)), float(error)


@dataclass(frozen=True)
class Change:
    """A class's sensitivity before and after, and their difference on the same images, over seeds; and whether it
    `fell`: by ten points or more, and shown to be a loss."""

    number: int
    n_images: int
    dense: Interval
    cut: Interval
    change: Interval
    fell: bool


def changes(dense: NDArray[Any], cut: NDArray[Any], target: NDArray[Any], n_classes: int) -> list[Change]:
    """What became of each class with two images or more, the largest loss first.

    `dense` and `cut` (S, B) say which images each seed's network gets right. Each interval is one of 95 %, of a
    difference that of `stats.paired`; what fell is so by such intervals of 95 % for all classes together (Bonferroni).
    """
    found = []
    for k in range(n_classes):
        own = target == k
        if own.sum() >= 2:
            before, after = dense[:, own], cut[:, own]
            difference = after.astype(int) - before
            change, surer = paired(difference), paired(difference, level=1 - 0.05 / n_classes)
            fell = change.mean <= -FALL and surer.high < 0
            found.append(Change(k, int(own.sum()), accuracy(before), accuracy(after), change, fell))
    return sorted(found, key=lambda one: float(one.change.mean))
