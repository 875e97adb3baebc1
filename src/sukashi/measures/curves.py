"""Accuracy of cuts: as a curve over what was removed, as one area, and how far it goes without loss."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn

from sukashi.core import progress, stats
from sukashi.core.errors import DataError, UsageError
from sukashi.core.stats import Interval
from sukashi.core.types import Batch, Curve, Mask, Plan, Site
from sukashi.measures.accuracy import Replies, replies
from sukashi.measures.cost import flops, n_parameters
from sukashi.network import surgery

# Fractions removed at which Sankarapu et al. 2025 (sec. 4.2) measure.
THRESHOLDS = (0.15, 0.3, 0.5, 0.7)
# A ratio becomes a whole number of units, so the point asked for as 0.7 may lie at 0.699: still measured at 0.7.
REACH = 0.005


def curve(
    model: nn.Module,
    sites: Sequence[Site],
    plan: Plan,
    ratios: Sequence[float],
    images: Batch | Iterable[Batch],
    device: torch.device | str | None = None,
    mode: str = "cut",
    repair: Callable[[nn.Module, surgery.Table], None] | None = None,
) -> Curve:
    """Which images a network gets right, dense and physically cut at each ratio of units and after each pass of a plan.

    Points are sorted by units removed, the dense one first. `fraction` is measured: one minus the parameters of the cut
    copy over those of the model. With `mode="zero"` units are silenced in a copy that keeps its parameters, and
    `fraction` is that of the units. No count is rounded; the same cut is evaluated once. `images` is one batch, or
    batches that can be gone through again in the same order; `device` is where the copies run (default: the model's).
    `repair` is given each copy that lost something, and what that was, and may change its weights in place.

    Raises UsageError for a plan of other sites or a ratio outside [0, 1), DataError for images that change from pass to
    pass, ModelError for logits that are not finite.
    """
    if set(sites) != set(plan.sites):
        raise UsageError(f"the plan speaks of {len(plan.sites)} other sites than the model's {len(sites)}: rank again")
    asked = [(plan.mask(ratio).n_removed, ratio) for ratio in ratios]
    points = sorted({(0, 0.0), *asked}) + [(n_removed, float("nan")) for n_removed in plan.passes]
    points.sort(key=lambda point: point[0])
    counts = sorted({n_removed for n_removed, _ in points})
    device = next(model.parameters()).device if device is None else torch.device(device)
    n_dense = n_parameters(model)
    first = next(iter([images] if isinstance(images, Batch) else images), None)
    if first is None:
        raise DataError("there are no images to measure accuracy on: give a split that holds some")
    example = first.x[:1].to(device)
    measured: dict[int, tuple[float, int, Replies]] = {}
    with progress.task("curve", len(counts)) as task:
        for n_removed in counts:
            keep = plan.mask_of(n_removed).keep
            small = copy.deepcopy(model).to(device)
            table = surgery.MODES[mode](small, Mask({site: keep[site] for site in sites}))
            if repair is not None:
                repair(small, table)
            found = replies(small, images)
            if n_removed and found.image_ids != measured[0][2].image_ids:
                raise DataError("the images change from one pass to the next: give batches in a fixed order")
            gone = 1 - n_parameters(small) / n_dense if mode == "cut" else n_removed / plan.n_units
            measured[n_removed] = gone, flops(small, example), found
            task.advance(note=f"removed {n_removed}, accuracy {found.correct.mean():.3f}")
    rows, dense = [measured[n_removed] for n_removed, _ in points], measured[0][2]
    return Curve(
        ratio=np.array([ratio for _, ratio in points]),
        n_removed=np.array([n_removed for n_removed, _ in points]),
        fraction=np.array([gone for gone, _, _ in rows]),
        flops=np.array([of_image for _, of_image, _ in rows]),
        answer=np.stack([of.answer for _, _, of in rows]),
        correct=np.stack([of.correct for _, _, of in rows]),
        target=dense.target,
        image_ids=dense.image_ids,
    )


def sauce(fraction: ArrayLike, accuracies: ArrayLike, chance: float, *, relative: bool = False) -> float:
    """Area under accuracy against the fraction of parameters removed, times 100; in percent, higher is better.

        SAUCE = 100 * integral_0^1 a(f) df

    by the trapezoid rule over the given points and the endpoint (1, `chance`). `relative` divides by the dense
    accuracy. The C-SWAP paper names the area but prints no formula: this reading fits its figures best. Between the
    largest measured fraction and 1 the line is a guess, so report that fraction too.

    Raises UsageError where the points do not start at 0, are not sorted, or are not all in [0, 1].
    """
    f, a = np.asarray(fraction, dtype=np.float64), np.asarray(accuracies, dtype=np.float64)
    if f.ndim != 1 or f.shape != a.shape or not len(f):
        raise UsageError(f"fractions {f.shape} and accuracies {a.shape} must be as many, one for each point")
    if f[0] != 0 or not (np.diff(f) >= 0).all() or f[-1] > 1:
        raise UsageError(f"fractions must rise from 0 (the dense network) to at most 1, got {f.tolist()}")
    if not ((a >= 0) & (a <= 1)).all() or not 0 <= chance <= 1:
        raise UsageError("accuracies and chance must be in [0, 1]")
    if relative and a[0] == 0:
        raise UsageError("the dense network gets nothing right: an area relative to its accuracy means nothing")
    area = float(np.trapezoid([*a, chance], [*f, 1.0]))
    return 100 * area / (float(a[0]) if relative else 1.0)


def asked(curve: Curve) -> Curve:
    """The points at the ratios asked for, by what is gone. All that holds contenders against each other is read off
    these: the points after passes, which a progressive criterion has and others don't, would make its grid a finer one.
    """
    rows = np.flatnonzero(~np.isnan(curve.ratio))
    rows = rows[np.argsort(curve.n_removed[rows], kind="stable")]
    of_points = {name: getattr(curve, name)[rows] for name in ("ratio", "n_removed", "fraction", "flops")}
    return replace(curve, **of_points, answer=curve.answer[rows], correct=curve.correct[rows])


def sauce_of(curve: Curve, chance: float, *, relative: bool = False) -> float:
    """`sauce` of a curve, over the ratios asked for."""
    points = asked(curve)
    return sauce(points.fraction, points.accuracy, chance, relative=relative)


def areas(curve: Curve, chance: float, *, relative: bool = False) -> NDArray[np.float64]:
    """(B,) the SAUCE of each image's own answers, right or wrong at each ratio asked for; their mean is `sauce_of` the
    curve.

    Of `relative`, a ratio of two means, it is each image's share in first order (the delta method):
    R + (area - R dense) / mean(dense), with R the relative SAUCE.
    """
    points = asked(curve)
    answers = points.correct.astype(np.float64)
    closed = np.vstack([answers, np.full(answers.shape[1], chance)])
    found = 100 * np.trapezoid(closed, [*points.fraction, 1.0], axis=0)
    if not relative:
        return np.asarray(found)
    dense = answers[0]
    whole = found.mean() / dense.mean()
    return np.asarray(whole + (found - whole * dense) / dense.mean())


def at(curves: Sequence[Curve], fractions: Sequence[float]) -> list[Interval | None]:
    """Accuracy at these fractions removed, over the seeds' curves and their images; None past what every seed measured.

    Between the ratios asked for an image counts by straight lines between its two answers, so accuracy lies on the
    straight line between theirs. Intervals are those of `stats.crossed`, for new seeds and new images, within [0, 1].
    """
    found = stats.crossed([_answers(curve, fractions) for curve in curves], bounds=(0, 1))
    return [
        Interval(float(found.mean[i]), float(found.low[i]), float(found.high[i]), found.n)
        if fraction <= reach(curves) + REACH
        else None
        for i, fraction in enumerate(fractions)
    ]


def reach(curves: Sequence[Curve]) -> float:
    """The largest fraction that every one of them measured, at a ratio asked for."""
    return min(float(asked(curve).fraction.max()) for curve in curves)


def _answers(curve: Curve, fractions: Sequence[float]) -> NDArray[np.float64]:
    """(B, F) how right each image is at these fractions, on straight lines between the ratios asked for."""
    points = asked(curve)
    weights = [np.interp(fractions, points.fraction, point) for point in np.eye(len(points.ratio))]
    return np.asarray(points.correct.T @ np.array(weights))


def lossless(curves: Sequence[Curve], margin: float, *, level: float = 0.975) -> float:
    """The ratio asked for up to which the cut of every seed is shown to lose at most `margin`; 0.0 where the first is
    not.

    Cuts are tried from the smallest to the largest, each against the dense network on the same images, by
    `stats.shown_up_to` at `level`, one-sided. A bound and no estimate: in a share of `level` of test sets a cut that
    loses more than `margin` is not named, and the more images, the nearer the bound comes. Nothing is interpolated.

    Raises UsageError for a margin outside (0, 1), or curves of other ratios.
    """
    points = [asked(curve) for curve in curves]
    ratios = points[0].ratio
    if any(not np.array_equal(curve.ratio, ratios) for curve in points):
        raise UsageError("the seeds' curves were measured at different ratios: measure them again")
    change = np.stack(
        [curve.correct[1:].astype(np.int8) - curve.correct[0].astype(np.int8) for curve in points], axis=1
    )  # (L, S, B)
    gained, lost = (change > 0).sum(axis=2), (change < 0).sum(axis=2)
    n_shown = stats.shown_up_to(gained, lost, change.shape[2], margin, level=level) if len(change) else 0
    return float(ratios[n_shown])
