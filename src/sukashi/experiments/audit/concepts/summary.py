"""How alike the concepts of networks are, how plain, and what they matter: from what trials kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats
import torch
from numpy.typing import NDArray

from sukashi.core import stats
from sukashi.decompositions.matching import matched
from sukashi.experiments.audit.networks import Answers, by_label
from sukashi.experiments.workspace import Record
from sukashi.report import words

Array = NDArray[Any]
N_RESAMPLES = 1_000


def summary(records: Sequence[Record], answers: Sequence[Answers], facts: Mapping[str, Any]) -> dict[str, Any]:
    """What each network's concepts are like; every row a dictionary of plain numbers.

    likeness    how alike the reference's concepts of one half of the images and the model's of the other are, see
                `likeness`, the mean of both ways round; of the reference itself that of its own two halves: what other
                images alone leave, and so the most that a model can be expected to have
    coherence   the mean cosine between the ten crops that hold most of a concept, of different images, in what the
                *reference* holds of them, less what all crops have in common: near 0 for crops drawn at random, and
                higher for the reference, whose concepts were made of these numbers. A t interval over concepts
    explained   which share of the squares of activations the concepts make up
    importance  of each concept, the mean over images; `how` says by which estimate
    """
    found = by_model(records)
    kept = {one.label: found[one.label].arrays("concepts") for one in answers}
    first, image = kept[answers[0].label], kept[answers[0].label]["image"]
    rows = []
    for one in answers:
        own, result = kept[one.label], found[one.label].result
        halves = [(first["half 0"], own["half 1"])]
        if one is not answers[0]:
            halves.append((own["half 0"], first["half 1"]))
        rows.append(
            {
                "model": one.label,
                "spoken_of": not one.guesses,
                "pairs": pairs_of(first["u"], own["u"]).tolist(),
                "likeness": likeness(halves, image, facts["seed"]),
                "coherence": _over_concepts(_coherence(first["a"], own["top"][own["u"].any(0)])),
                "explained": result["explained"],
                "importance": own["importance"].mean(0).tolist(),
                "how": result["importance"],
            }
        )
    told = [row for row in rows[1:] if row["spoken_of"]]
    return {
        **facts,
        "n_crops": len(first["u"]),
        "n_images": int(image.max()) + 1,
        "models": rows,
        "verdict": _verdict(told, facts, answers[0].label),
        "lines": _lines(told, rows[0], answers[0].label),
    }


def by_model(records: Sequence[Record]) -> dict[str, Record]:
    """The trial of each network, by its label."""
    return {label: of[0] for label, of in by_label(records, "concepts.npz").items()}


def likeness(
    both: Sequence[tuple[Array, Array]], image: Array, seed: int, n_resamples: int = N_RESAMPLES
) -> dict[str, float]:
    """How alike two networks' concepts are, by how much of each is in the same crops, (N, K) each, of images (N,); of
    several such pairs the mean.

    That is the mean over concepts, paired, of Spearman's rank correlation over crops. Pairs are those of the largest
    sum of these, and what is told of them is from images that did not pair them: either half pairs for the other, for
    pairs look alike in the crops that chose them. The 95 % interval is for new images and these concepts: atanh of the
    mean, and t times the deviation of that in images drawn with replacement, ranks taken anew.
    """
    found, drawn, n_fewest = [], [], len(image)
    for one, other in both:
        rng = np.random.default_rng(seed)  # the same images drawn for each
        for judges in (image % 2 == 0, image % 2 == 1):
            at = pairs_of(one[~judges], other[~judges])
            of = _correlations(one[judges][:, at[:, 0]], other[judges][:, at[:, 1]], image[judges], rng, n_resamples)
            found.append(of[0])
            drawn.append(of[1:])
            n_fewest = min(n_fewest, len(np.unique(image[judges])))
    inside = 1 - np.finfo(float).eps
    mean = float(np.mean(found))
    z = np.arctanh(np.clip(np.mean(drawn, 0), -inside, inside))
    half = float(scipy.stats.t.isf(0.025, n_fewest - 1) * z.std())
    low, high = (float(np.tanh(np.arctanh(np.clip(mean, -inside, inside)) + sign * half)) for sign in (-1, 1))
    return {"mean": mean, "low": low, "high": high}


def pairs_of(one: Array, other: Array) -> NDArray[np.int64]:
    """(K, 2) which concept is which, by Spearman's correlation over crops."""
    ranks = [torch.from_numpy(scipy.stats.rankdata(of, axis=0) - (len(of) + 1) / 2) for of in (one, other)]
    pairs: NDArray[np.int64] = matched(*ranks).pairs.numpy()
    return pairs


def _correlations(one: Array, other: Array, image: Array, rng: np.random.Generator, n_resamples: int) -> Array:
    """(1 + R,) the mean over columns of Spearman's correlation, in the crops as they are and in those of images drawn
    with replacement."""
    numbers, at = np.unique(image, return_inverse=True)
    n = len(numbers)
    times = np.vstack([np.ones(n), rng.multinomial(n, np.full(n, 1 / n), n_resamples)])[:, at]
    total = times.sum(1)
    found = np.zeros(1 + n_resamples)
    for a, b in zip(one.T, other.T, strict=True):
        ranks = [_ranks(of, times) for of in (a, b)]
        centred = [of - (of * times).sum(1, keepdims=True) / total[:, None] for of in ranks]
        product, first, second = ((x * y * times).sum(1) for x, y in (centred, centred[:1] * 2, centred[1:] * 2))
        length = np.sqrt(first * second)
        # A concept that is in no crop, or in all alike, is like none.
        found += np.where(length > 0, product / np.where(length > 0, length, 1), 0)
    whole: Array = found / one.shape[1]
    return whole


def _ranks(values: Array, times: Array) -> Array:
    """(R, N) the mid-ranks of values (N,) where each is there as many `times` (R, N)."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    order = np.argsort(place, kind="stable")
    of_value = np.add.reduceat(times[:, order], np.concatenate([[0], np.cumsum(counts)[:-1]]), axis=1)
    middle: Array = np.cumsum(of_value, axis=1) - of_value / 2
    return middle[:, place]


def _coherence(a: Array, top: Array) -> Array:
    """(K,) the mean cosine between different crops of each concept, in activations less their mean."""
    centred = a - a.mean(0)
    unit = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), np.finfo(float).tiny)
    of = unit[top]  # (K, n, D)
    n = of.shape[1]
    found: Array = (np.square(np.linalg.norm(of.sum(1), axis=1)) - n) / (n * (n - 1))
    return found


def _over_concepts(values: Array) -> dict[str, float]:
    """The mean over concepts, and its t interval."""
    found = stats.crossed(values[None])
    return {"mean": float(found.mean), "low": float(found.low), "high": float(found.high)}


def _verdict(told: Sequence[Mapping[str, Any]], facts: Mapping[str, Any], reference: str) -> str:
    what = f"{facts['n_concepts']} concepts of {facts['of']} in {facts['layer']}"
    if not told:
        return f"Of the {what} nothing can be said."
    least = min(told, key=lambda row: row["likeness"]["mean"])
    how = f"rank correlation {_said(least['likeness'])}"
    return f"Of the {what}, those of {least['model']} are least like {reference}'s: {how}."


def _lines(told: Sequence[Mapping[str, Any]], first: Mapping[str, Any], reference: str) -> list[str]:
    own = f"{reference}'s own, of other images, are like them by {_said(first['likeness'])}"
    return [f"{row['model']}: concepts like {reference}'s by {_said(row['likeness'])}; {own}." for row in told]


def _said(of: Mapping[str, Any]) -> str:
    mean, low, high = (words.number(of[name], 2) for name in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def text(found: Mapping[str, Any], reference: str) -> str:
    header = ["model", f"like {reference}'s", f"coherence, as {reference} sees it", "explained"]
    rows = [
        [row["model"], _said(row["likeness"]), _said(row["coherence"]), words.percent(row["explained"])]
        for row in found["models"]
    ]
    return words.table(header, rows)


def rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row a model: how like the reference's its concepts are, beside what the reference's own halves are."""
    first, *others = found["models"]
    untested = dict.fromkeys(("difference", "p", "p_holm", "changed", "size", "weight"))
    about = {"attribution": "", "measure": "likeness", "better": "higher", "n": found["n_images"], "said": ""}
    own = first["likeness"]["mean"]
    return [{"model": row["model"], **about, **untested, "reference": own, **row["likeness"]} for row in others]
