"""Average precision: how well a score tells images with something from those without."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit
from scipy.stats import norm
from sklearn.metrics import average_precision_score

from sukashi.core.stats import Interval


def average_precision(score: NDArray[Any], has: NDArray[Any], *, level: float = 0.95) -> Interval | None:
    """The mean, over the images that have it, of the share of those that have it among all with no lower a score.

    Equal scores stand together. A score that tells nothing has the share of images that
    have it. Bounds are Boyd et al.'s (2013) on the logit scale, logit(AP) -+ z / sqrt(m AP (1 - AP)) for m images that
    have it; None where fewer than two have it, or lack it.
    """
    has = np.asarray(has, dtype=bool)
    n_own = int(has.sum())
    if min(n_own, len(has) - n_own) < 2:
        return None
    mean = float(average_precision_score(has, score))
    inside = min(max(mean, 0.5 / n_own), 1 - 0.5 / n_own)  # at the edges the logit has no width
    half = norm.ppf((1 + level) / 2) / math.sqrt(n_own * inside * (1 - inside))
    low, high = (float(expit(logit(inside) + sign * half)) for sign in (-1, 1))
    return Interval(mean, min(low, mean), max(high, mean), len(has))
