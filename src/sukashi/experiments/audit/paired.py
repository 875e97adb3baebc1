"""Figures of classes: those of a network less the reference's, class by class, tested together and put in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sukashi.core import stats
from sukashi.experiments.audit.networks import Answers
from sukashi.report import words

CERTAIN = 0.05
LEAST = 5  # classes, below which nothing is said: the sign alone of four differences has p = 1/8
NAMED = 3  # of what changed, in one sentence
Array = NDArray[np.float64]
Measures = Mapping[str, tuple[str | None, str, str]]
"""Of each measure which way is better ("higher", "lower" or None), and the words for more and for less of it."""


def compare(
    values: Mapping[str, Mapping[str, Array]], answers: Sequence[Answers], measures: Measures
) -> list[dict[str, Any]]:
    """Each model against the reference in each of `values`, {measure/place: {label: (S, K)}}, seed by seed on the
    classes for which both have one. Seeds are those of what a network is looked at by, as an autoencoder is trained.

    {"model", "measure", "better", "n", "reference", "mean", "difference", "low", "high", "p", "p_holm", "size",
    "weight", "changed", "said"}: means over seeds and classes, that of the differences with a t interval for other
    classes and, of several seeds, other seeds (`stats.crossed`), the p-value of that test before and after Holm's
    correction over all rows of models that sentences may speak of, the difference in standard deviations of the
    reference's values over classes. A row of fewer than LEAST classes has not `changed`.
    """
    found = []
    for name, of in values.items():
        better = measures[name.partition("/")[0]][0]
        for one in answers[1:]:
            a, b = of[one.label], of[answers[0].label]
            both = np.isfinite(a).all(0) & np.isfinite(b).all(0)
            if not both.any():
                continue
            a, b = a[:, both], b[:, both]
            bounds, p = _tested(a - b)
            of_reference = b.mean(0)
            spread = float(of_reference.std(ddof=1)) if len(of_reference) > 1 else 0.0
            size = bounds.mean / spread if spread else None
            found.append(
                {
                    **{"model": one.label, "measure": name, "better": better, "n": a.shape[1]},
                    **{"reference": float(b.mean()), "mean": float(a.mean()), "difference": bounds.mean},
                    **{"low": bounds.low, "high": bounds.high, "size": size, "weight": words.weight(size)},
                    "p": p,
                }
            )
    spoken = {one.label for one in answers[1:] if not one.guesses}
    for group in (True, False):
        of_group = [row for row in found if (row["model"] in spoken) is group]
        for row, p_holm in zip(of_group, stats.holm([row["p"] for row in of_group]), strict=True):
            row |= {"p_holm": float(p_holm), "changed": bool(p_holm < CERTAIN and row["n"] >= LEAST)}
            row["said"] = said(row, measures)
    return found


def _tested(differences: Array) -> tuple[stats.Interval, float]:
    """The mean of differences (S, K) with its interval, and the p-value that it is 0."""
    n_seeds, n = differences.shape
    if n == 1:
        return stats.Interval(float(differences.mean()), None, None, n_seeds), 1.0
    bounds = stats.crossed(differences)
    if n_seeds > 1:
        return bounds, stats.crossed_test(differences)
    p = stats.t_test(differences[0])
    # All differ by the same: the sign alone.
    return bounds, p if p is not None else 2.0 ** (1 - n) if differences.any() else 1.0


def said(row: Mapping[str, Any], measures: Measures) -> str:
    """A comparison in words: more selective by .02 [.01, .03], or no detectable change in 10 classes [-.002, .003]."""
    if row["n"] < LEAST:
        return f"too few classes to say ({row['n']})"
    low, high, short = row["low"], row["high"], words.short
    if not row["changed"]:
        alone = " once corrected" if low > 0 or high < 0 else ""
        return f"no detectable change{alone} in {row['n']} classes [{short(low)}, {short(high)}]"
    _, more, less = measures[row["measure"].partition("/")[0]]
    rise = row["difference"] > 0
    low, high = sorted(abs(b) if (b > 0) == rise else -abs(b) for b in (low, high))
    return f"{more if rise else less} by {short(abs(row['difference']))} [{short(low)}, {short(high)}]"


def verdict(rows: Sequence[Mapping[str, Any]], answers: Sequence[Answers], what: str) -> str:
    """Of how many models, and in which, something was found to have changed."""
    told = [one.label for one in answers[1:] if not one.guesses]
    if not told:
        return f"Of {what} nothing can be said: no model but the reference is shown to know the classes."
    changed = {label: [row for row in rows if row["model"] == label and row["changed"]] for label in told}
    some = [label for label, of in changed.items() if of]
    if not some:
        return f"Of {what} nothing is shown to have changed."
    most = max((row for of in changed.values() for row in of), key=_size)
    of = words.listed(some) if len(some) <= NAMED else f"{len(some)} of {len(told)} models"
    return (
        f"{what[0].upper()}{what[1:]} have changed in {of}; most, {most['model']}: {_of_place(most)} ({_sized(most)})."
    )


def lines(rows: Sequence[Mapping[str, Any]], answers: Sequence[Answers]) -> list[str]:
    """A sentence a model: what changed most, and how much did not."""
    found = []
    for one in answers[1:]:
        own = [row for row in rows if row["model"] == one.label]
        if one.guesses or not own:
            continue
        changed = sorted((row for row in own if row["changed"]), key=_size, reverse=True)
        named = "; ".join(f"{_of_place(row)} ({_sized(row)})" for row in changed[:NAMED])
        rest = len(own) - len(changed)
        more = f"; {len(changed) - NAMED} more" if len(changed) > NAMED else ""
        still = f"no detectable change in {rest} of {len(own)} figures" if rest else ""
        found.append(f"{one.label}: {'; '.join(filter(None, [f'{named}{more}', still]))}.")
    return found


def _of_place(row: Mapping[str, Any]) -> str:
    _, _, place = row["measure"].partition("/")
    return f"{row['said']}{f' at {place}' if place else ''}"


def _size(row: Mapping[str, Any]) -> float:
    return np.inf if row["size"] is None else abs(row["size"])


def _sized(row: Mapping[str, Any]) -> str:
    return "beside values all the same" if row["size"] is None else f"{words.short(abs(row['size']), 2)} SD"


def table_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the audit's table."""
    return [{**row, "attribution": ""} for row in rows]


def over_classes(values: Array, *, share: bool = False) -> dict[str, Any]:
    """The mean of (S, K) over seeds and classes that have a value, its t interval, and how many classes these are; of
    shares an interval within [0, 1]."""
    own = values[:, np.isfinite(values).all(0)]
    if not own.size:
        return {"mean": None, "low": None, "high": None, "n": 0}
    bounds = (0.0, 1.0) if share else None
    found = stats.crossed(own, bounds=bounds) if own.shape[1] > 1 else stats.Interval(float(own.mean()), None, None, 1)
    return {"mean": found.mean, "low": found.low, "high": found.high, "n": own.shape[1]}


def spoken(of: Mapping[str, Any]) -> str:
    """.812 (.790 to .834)."""
    if of["mean"] is None:
        return "–"
    if of["low"] is None:
        return words.short(of["mean"])
    return f"{words.short(of['mean'])} ({words.short(of['low'])} to {words.short(of['high'])})"
