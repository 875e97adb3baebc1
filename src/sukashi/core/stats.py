"""Means with intervals and paired comparisons: what may be said of differences between seeds, images and criteria."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

from sukashi.core.errors import UsageError

Array = NDArray[np.float64]

BLOCK = 10_000_000  # counts at a time, 80 MB


@dataclass(frozen=True)
class Interval:
    """A mean of `n` values and the bounds of its confidence interval; None where one value bounds nothing.

    Mean and bounds are floats, or arrays where each value was an array.
    """

    mean: Any
    low: Any
    high: Any
    n: int


def bootstrap(
    values: ArrayLike, *, generator: np.random.Generator, level: float = 0.95, n_resamples: int = 10_000
) -> Interval:
    """Mean over axis 0 with the percentile bootstrap interval (Efron 1979): quantiles of resampled means.

    `values` (n,), or (n, ...) where all columns are drawn alike: each gets what it would alone, to the last bit, and
    the draws, which are most of the work, are made once. It is too narrow below some 20 values.

    Raises: UsageError for no values, NaN or Inf, or a level outside (0, 1).
    """
    x = _checked(values, level)
    n, shape = len(x), x.shape[1:]
    columns = np.ascontiguousarray(x.reshape(n, -1).T)
    mean = _plain(columns.mean(axis=1).reshape(shape))
    if n == 1:
        return Interval(mean, None, None, 1)
    means = []
    for size in _blocks(n_resamples, n):
        counts = _counts(n, size, generator)
        # Not counts @ x: the last bits of one column would depend on how many stand beside it.
        means.append(np.stack([counts @ column for column in columns], axis=1) / n)
    low, high = _quantiles(np.concatenate(means).reshape(n_resamples, *shape), level)
    return Interval(mean, low, high, n)


def share(n_right: int, n: int, *, level: float = 0.95) -> Interval:
    """n_right / n with Wilson's score interval (1927): what more images could show of one network's accuracy.

    Raises: UsageError where n_right is not in [0, n], n is 0, or the level outside (0, 1).
    """
    if not 0 <= n_right <= n or n == 0:
        raise UsageError(f"a share needs 0 <= n_right <= n and n > 0, got {n_right} of {n}")
    _checked([n_right], level)
    low, high = _wilson(n_right / n, n, stats.norm.ppf((1 + level) / 2))
    return Interval(n_right / n, float(low), float(high), n)


def accuracy(right: ArrayLike, *, level: float = 0.95) -> Interval:
    """Accuracy of one network for each seed, `right` (S, B) of 0 and 1: Wilson's interval of the one network that all
    seeds give, else that of `crossed` within [0, 1]; `n` is S.

    Raises: as `share` and `crossed`.
    """
    x = _checked(right, level)
    if (x == x[0]).all():
        return replace(share(round(x[0].sum()), x.shape[1], level=level), n=len(x))
    return crossed(x, level=level, bounds=(0, 1))


def paired(differences: ArrayLike, *, level: float = 0.95) -> Interval:
    """How much a second network's accuracy is above a first one's: `differences` (S, B) of each seed's pair are 1 on
    images that only the second gets right, -1 on those that only the first does, else 0; `n` is S.

    Of one seed the bounds are those differences that Tango's score test leaves (see `not_lower`): equal answers bound
    the change by z^2 / (n + z^2), where Wald's interval has no width. Of several it is the test of the mean shares,
    with Cochran's critical value in place of z and as many images as would be as sure (see `crossed` and `score`).

    Raises: as `crossed`, and UsageError for other differences.
    """
    x = _checked(differences, level)
    if not np.isin(x, (-1, 0, 1)).all():
        raise UsageError("differences of answers must be -1, 0 or 1: give right answers less right answers")
    gained, lost, n, critical = (x > 0).mean(), (x < 0).mean(), float(x.shape[1]), stats.norm.ppf((1 + level) / 2)
    if len(x) > 1:
        of_seeds, of_images = _variances(x)
        critical = float(_critical((1 - level) / 2, of_seeds, of_images, x.shape))
        if of_seeds + of_images > 0:
            n = float((gained + lost - (gained - lost) ** 2) / (of_seeds + of_images))
    low = _lowest_change(gained, lost, n, critical)
    return Interval(float(gained - lost), low, -_lowest_change(lost, gained, n, critical), len(x))


def _lowest_change(gained: float, lost: float, n: float, critical: float) -> float:
    """The lowest difference of shares that the score test leaves."""
    found = gained - lost

    def beyond(change: float) -> float:
        return float(found - change - critical * np.sqrt(_variance(gained, lost, change) / n))

    # At the difference found the test has no width where all images, or none, changed: it is no bound.
    return -1.0 if found == -1 else float(optimize.brentq(beyond, -1.0, found - 1e-12))


def _variance(gained: Any, lost: Any, change: float) -> Any:
    """That of one image's difference, at the likeliest shares under a mean of `change` (Tango 1998): 2 q + change
    (1 - change), with q the likeliest share that is lost, the larger root of 2 q^2 + B q + C = 0 for
    B = (2 - gained + lost) change - (gained + lost) and C = -lost change (1 - change).
    """
    linear, constant = (2 - gained + lost) * change - (gained + lost), -lost * change * (1 - change)
    q = (np.sqrt(np.maximum(linear**2 - 8 * constant, 0)) - linear) / 4
    return np.maximum(2 * q + change * (1 - change), 0)  # what rounding takes


def score(share: float, variance: float, n: float, *, level: float = 0.95) -> Interval:
    """A share in [0, 1] that was found with a squared standard error, and bounds that stay in [0, 1]: Wilson's, with
    the number of images that would be as sure, n = share (1 - share) / variance, as Dean and Pagano (2015) recommend
    for samples in clusters. `n` is that number where the variance is 0, as of a share of 0 or 1.

    Raises: UsageError for a share outside [0, 1] or a level outside (0, 1).
    """
    if not 0 <= share <= 1:
        raise UsageError(f"a share lies in [0, 1], got {share}")
    _checked([share], level)
    low, high = _score(share, variance, n, stats.norm.ppf((1 + level) / 2), (0, 1))
    return Interval(share, low, high, round(n))


def _score(mean: Any, variance: Any, n: float, critical: Any, bounds: tuple[float, float]) -> tuple[Any, Any]:
    """The bounds of `score` for means between `bounds`, in arrays."""
    least, width = bounds[0], bounds[1] - bounds[0]
    share, squared = np.clip((mean - least) / width, 0, 1), variance / width**2
    as_many = np.where(squared > 0, share * (1 - share) / np.where(squared > 0, squared, 1), n)
    low, high = _wilson(share, as_many, critical)
    return _plain(least + width * low), _plain(least + width * high)


def _wilson(share: Any, n: Any, critical: Any) -> tuple[Any, Any]:
    """Those shares p that a score test leaves: (p - share)^2 <= critical^2 p (1 - p) / n."""
    middle = (share * n + critical**2 / 2) / (n + critical**2)
    half = critical / (n + critical**2) * np.sqrt(share * (1 - share) * n + critical**2 / 4)
    return np.maximum(middle - half, 0.0), np.minimum(middle + half, 1.0)  # what rounding adds


def crossed(values: ArrayLike, *, level: float = 0.95, bounds: tuple[float, float] | None = None) -> Interval:
    """Mean of `values` (S, B, ...) over seeds and images with a t interval for new seeds *and* new images; `n` is S.

        m +- c sqrt(a + b),  c = (a t_{S-1} + b t_{B-1}) / (a + b),
        a = var(means of seeds) / S,  b = var(means of images) / B

    and b no less than independent answers of the seeds would leave it: networks that go wrong on opposite images cancel
    each other in the means of these, and other seeds need not. With t at (1 + level) / 2, c is Cochran's critical value
    for two variances (Cochran and Cox 1950, sec. 4.14), exact where one of them is 0. With one seed a = 0 and it speaks
    of new images alone. Noise of seed and image together is in both variances, so the interval is a little wide.
    Satterthwaite's degrees of freedom hold less at two or three seeds (benchmarks/coverage.py), and a percentile
    bootstrap of three seeds much less.

    A mean of values within `bounds` has an interval within them: that of `score` with c in place of z.

    Raises: as `bootstrap`, and UsageError for one image.
    """
    x = _checked(values, level)
    of_seeds, of_images = _variances(x)
    mean, variance = x.mean(axis=(0, 1)), of_seeds + of_images
    critical = _critical((1 - level) / 2, of_seeds, of_images, x.shape)
    if bounds is None:
        half = critical * np.sqrt(variance)
        return Interval(_plain(mean), _plain(mean - half), _plain(mean + half), len(x))
    low, high = _score(mean, variance, x.shape[1], critical, bounds)
    return Interval(_plain(mean), low, high, len(x))


def crossed_test(values: ArrayLike) -> float:
    """Two-sided p-value that the mean of `values` (S, B) is 0 for new seeds and new images: 1 - level of the interval
    of `crossed` that ends at 0.

    Raises: as `crossed`.
    """
    x = _checked(values, 0.95)
    of_seeds, of_images = _variances(x)
    mean, error = abs(x.mean()), np.sqrt(of_seeds + of_images)
    if error == 0:
        return float(mean == 0)

    def beyond(tail: float) -> float:
        return float(_critical(tail, of_seeds, of_images, x.shape) - mean / error)

    least = 1e-12  # below it quantiles of t lose their digits, and no smaller p-value is of use
    return 0.0 if beyond(least) < 0 else 2 * float(optimize.brentq(beyond, least, 0.5))


def _variances(x: Array) -> tuple[Any, Any]:
    """The squared standard errors that seeds and images give the mean of (S, B, ...)."""
    n_seeds, n_images = x.shape[:2]
    if n_images < 2:
        raise UsageError("an interval over images needs at least 2 of them, got 1")
    of_images = x.mean(axis=0).var(axis=0, ddof=1)
    if n_seeds > 1:
        of_images = np.maximum(of_images, x.var(axis=1, ddof=1).mean(axis=0) / n_seeds)
    of_images = of_images / n_images
    of_seeds = x.mean(axis=1).var(axis=0, ddof=1) / n_seeds if n_seeds > 1 else np.zeros_like(of_images)
    return of_seeds, of_images


def _critical(tail: float, of_seeds: Any, of_images: Any, shape: tuple[int, ...]) -> Any:
    """Cochran's critical value with `tail` beyond it: the mean of Student's two, weighted by the variances."""
    by_seeds, by_images = (stats.t.isf(tail, max(n - 1, 1)) for n in shape[:2])
    both = of_seeds + of_images
    return np.where(both > 0, (of_seeds * by_seeds + of_images * by_images) / np.where(both > 0, both, 1), by_images)


def ratio(first: ArrayLike, second: ArrayLike, *, level: float = 0.95) -> Interval:
    """How many times as large `second` (n,) is as `first` (n,), pair by pair: the median of second / first.

    Its bounds are those ratios that a sign test at `level` leaves (the k-th from either end, k the largest with
    P(Bin(n, 1/2) < k) <= (1 - level) / 2): whatever the distribution, they hold the median at least so often. Below six
    pairs no test can show anything at 95 %, and the bounds are 0 and Inf. Of two networks timed in turns, what disturbs
    both of a turn alike is in no ratio, and what disturbs one now and then moves no median.

    Raises: as `bootstrap`, and UsageError for what is not positive or not as many.
    """
    x, y = _checked(first, level), _checked(second, level)
    if x.shape != y.shape or (x <= 0).any() or (y <= 0).any():
        raise UsageError(f"a ratio needs as many positive values on both sides, got {len(x)} and {len(y)}")
    n, found = len(x), np.sort(y / x)
    k = int((stats.binom.cdf(np.arange(n), n, 0.5) <= (1 - level) / 2).sum())
    low, high = (float(found[k - 1]), float(found[n - k])) if k else (0.0, math.inf)
    return Interval(float(np.median(found)), low, high, n)


def t_test(differences: Array) -> float | None:
    """Two-sided p-value that `differences` (n,) have mean 0; None for fewer than two, or all the same."""
    if len(differences) < 2 or np.ptp(differences) == 0:
        return None
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def not_lower(n_gained: ArrayLike, n_lost: ArrayLike, n: int, margin: float, *, level: float = 0.975) -> Any:
    """Whether pairs show that a share is at most `margin` lower: a bool, or an array of them for arrays of counts.

    Of `n` images on which two networks were tried, `n_gained` (b) only the second gets right and `n_lost` (c) only the
    first. Tango's score test (1998, Statistics in Medicine 17:891) of H0: p_b - p_c <= -margin, one-sided:

        T = (b - c + n margin) / sqrt(n (2 q - margin (1 + margin))) >= z_level

    with q the likeliest p_c under p_b - p_c = -margin (see `_variance`). Unlike McNemar's test it asks about a margin,
    and unlike Wald's it does not call equal answers on few images a proof: b = c = 0 needs n >= z^2 (1 / margin - 1).

    Raises: UsageError for a margin or a level outside (0, 1), or counts that do not fit n.
    """
    check_margin(margin)
    _checked([0], level)
    b, c = np.asarray(n_gained, dtype=np.float64), np.asarray(n_lost, dtype=np.float64)
    if n < 1 or (b < 0).any() or (c < 0).any() or (b + c > n).any():
        raise UsageError(f"gained and lost images must be counts that n = {n} holds, got {b} and {c}")
    error = np.sqrt(n * _variance(b / n, c / n, -margin))
    shown = b - c + n * margin >= stats.norm.ppf(level) * error
    return bool(shown) if np.ndim(shown) == 0 else shown


def shown_up_to(n_gained: ArrayLike, n_lost: ArrayLike, n: int, margin: float, *, level: float = 0.975) -> int:
    """How many networks, in their order, pass `not_lower` before the first that does not.

    Counts (L,), or (L, S) where a network is tried S times and must pass each. Tests stop at the first that fails, so
    there is nothing to correct for their number (Maurer, Hothorn and Lehmacher 1995): the chance to count a network
    that loses more than `margin` stays below 1 - level.

    Raises: as `not_lower`.
    """
    shown = np.asarray(not_lower(n_gained, n_lost, n, margin, level=level))
    return int(np.logical_and.accumulate(shown.reshape(len(shown), -1).all(axis=1)).sum())


def level_of_each(n_families: int) -> float:
    """The level of each of several families of one-sided tests, all of which together are wrong in 2.5 % at most."""
    return 1 - 0.025 / n_families


def least_images(margin: float, *, level: float = 0.975) -> int:
    """The number of images below which not even equal answers pass `not_lower`: z^2 (1 / margin - 1), rounded up."""
    check_margin(margin)
    return math.ceil(float(stats.norm.ppf(level)) ** 2 * (1 / margin - 1))


def least_margin(n: int, *, level: float = 0.975) -> float:
    """The smallest margin that equal answers on `n` images can show: z^2 / (n + z^2)."""
    z = float(stats.norm.ppf(level))
    return z**2 / (n + z**2)


def check_margin(margin: float) -> None:
    """Refuse a margin outside (0, 1)."""
    if not 0 < margin < 1:
        raise UsageError(
            f"margin must be in (0, 1), got {margin}: it is how much accuracy may be lower, 0.01 for one point"
        )


def holm(p_values: Sequence[float]) -> Array:
    """The p-values corrected for being many (Holm 1979), in the order given: max_{j<=i} min(1, (m - j + 1) p_(j))."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    stepped = np.minimum(1.0, (len(p) - np.arange(len(p))) * p[order])
    corrected = np.empty_like(p)
    corrected[order] = np.maximum.accumulate(stepped)
    return corrected


def _checked(values: ArrayLike, level: float) -> Array:
    x = np.asarray(values, dtype=np.float64)
    if not 0 < level < 1:
        raise UsageError(f"level must be in (0, 1), got {level}: 0.95 means 95 %")
    if len(x) == 0:
        raise UsageError("an interval needs at least one value, got none")
    if not np.isfinite(x).all():
        raise UsageError("an interval of NaN or Inf means nothing: leave the failed trials out and say so")
    return x


def _blocks(n_resamples: int, n: int) -> Iterator[int]:
    """How many resamples of n things are drawn at once."""
    size = max(1, BLOCK // n)
    for start in range(0, n_resamples, size):
        yield min(size, n_resamples - start)


def _counts(n: int, n_resamples: int, generator: np.random.Generator) -> Array:
    """(n_resamples, n): how often each of n things is drawn in n draws with replacement."""
    drawn = generator.integers(n, size=(n_resamples, n)) + n * np.arange(n_resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=n * n_resamples).reshape(n_resamples, n).astype(np.float64)


def _quantiles(means: Array, level: float) -> tuple[Any, Any]:
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return _plain(low), _plain(high)


def _plain(value: Any) -> Any:
    return float(value) if np.ndim(value) == 0 else value
