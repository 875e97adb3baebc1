"""How alike the concepts of networks are, how plain, and what they matter: from what trials kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sukashi.core import stats
from sukashi.core.files import canonical
from sukashi.decompositions.matching import matched
from sukashi.experiments.audit.networks import Answers
from sukashi.experiments.workspace import Record
from sukashi.report import words

Array = NDArray[Any]
N_RESAMPLES = 2_000


def summary(records: Sequence[Record], answers: Sequence[Answers], facts: Mapping[str, Any]) -> dict[str, Any]:
    """What each network's concepts are like; every row a dictionary of plain numbers.

    likeness   the mean cosine, over matched concepts, of how much of each is in the same crops, of the model's concepts
               and the reference's; its interval is a bootstrap over images
    own        the same of two halves of one network's images: what other images alone leave of it
    coherence  the mean cosine between the ten crops that hold most of a concept, of different images, in what the
               *reference* holds of them, less what all crops have in common: near 0 for crops drawn at random. A t
               interval over concepts
    explained  which share of the squares of activations the concepts make up
    """
    found = by_model(records)
    kept = {one.label: found[one.label].arrays("concepts") for one in answers}
    first = kept[answers[0].label]
    rows = []
    for one in answers:
        own = kept[one.label]
        pairs, likeness = _alike(first["u"], own["u"], own["image"], facts["seed"])
        _, halves = _alike(own["half 0"], own["half 1"], own["image"], facts["seed"])
        coherence = _coherence(first["a"], own["top"])
        rows.append(
            {
                "model": one.label,
                "spoken_of": one.spoken_of,
                "pairs": pairs,
                "likeness": likeness,
                "own": halves,
                "coherence": _over_concepts(coherence),
                "change": _over_concepts(coherence[pairs[:, 1]] - _coherence(first["a"], first["top"])[pairs[:, 0]]),
                "explained": found[one.label].result["explained"],
                "importance": _importance(own["importance"]),
                "how": found[one.label].result["importance"],
            }
        )
    for row in rows:
        row["pairs"] = row["pairs"].tolist()
    told = [row for row in rows[1:] if row["spoken_of"]]
    return {
        **facts,
        "n_crops": len(first["u"]),
        "n_images": int(first["image"].max()) + 1,
        "models": rows,
        "verdict": _verdict(told, facts, answers[0].label),
        "lines": _lines(told, answers[0].label),
    }


def by_model(records: Sequence[Record]) -> dict[str, Record]:
    """The trial of each network, by its label; networks that are the same one share theirs."""
    found = {canonical(record.about["network"]): record for record in records if record.has("concepts.npz")}
    return {model["label"]: found[canonical(model["identity"])] for model in records[0].result["models"]}


def _alike(one: Array, other: Array, image: Array, seed: int) -> tuple[NDArray[np.int64], dict[str, float]]:
    """(K, 2) which concept is which, and the mean cosine of these with its bootstrap interval over images."""
    pairs = matched(torch.from_numpy(one), torch.from_numpy(other)).pairs.numpy()
    a, b = one[:, pairs[:, 0]].astype(float), other[:, pairs[:, 1]].astype(float)
    n_images = int(image.max()) + 1
    sums = np.zeros((3, n_images, len(pairs)))
    for total, product in zip(sums, (a * b, a * a, b * b), strict=True):
        np.add.at(total, image, product)
    drawn = np.random.default_rng(seed).multinomial(n_images, np.full(n_images, 1 / n_images), N_RESAMPLES)
    cosines = _cosine(*(drawn @ total for total in sums)).mean(1)
    low, high = np.quantile(cosines, (0.025, 0.975))
    mean = _cosine(*(total.sum(0) for total in sums)).mean()
    return pairs, {"mean": float(mean), "low": float(low), "high": float(high)}


def _cosine(product: Array, first: Array, second: Array) -> Array:
    length = np.sqrt(first * second)
    return np.where(length > 0, product / np.where(length > 0, length, 1), 0)


def _coherence(a: Array, top: Array) -> Array:
    """(K,) the mean cosine between different crops of each concept, in activations less their mean."""
    centred = a - a.mean(0)
    unit = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), np.finfo(float).tiny)
    of = unit[top]  # (K, n, D)
    n = of.shape[1]
    found: Array = (np.square(np.linalg.norm(of.sum(1), axis=1)) - n) / (n * (n - 1))
    return found


def _over_concepts(values: Array) -> dict[str, float | None]:
    """The mean over concepts, and its t interval; p of the same test that it is 0."""
    found = stats.crossed(values[None])
    p = stats.t_test(values)
    return {"mean": float(found.mean), "low": float(found.low), "high": float(found.high), "p": p}


def _importance(of_images: Array) -> list[float]:
    """The mean over images of each concept's share."""
    found: list[float] = of_images.mean(0).tolist()
    return found


def _verdict(told: Sequence[Mapping[str, Any]], facts: Mapping[str, Any], reference: str) -> str:
    what = f"{facts['n_concepts']} concepts of {facts['of']} in {facts['layer']}"
    if not told:
        return f"Of the {what} nothing can be said."
    least = min(told, key=lambda row: row["likeness"]["mean"])
    return f"Of the {what}, those of {least['model']} are least like {reference}'s: cosine {_said(least['likeness'])}."


def _lines(told: Sequence[Mapping[str, Any]], reference: str) -> list[str]:
    found = []
    # Corrected for the models that sentences speak of.
    corrected = stats.holm([1.0 if row["change"]["p"] is None else row["change"]["p"] for row in told])
    for row, p in zip(told, corrected, strict=True):
        floor = f"two halves of its own images agree by {_said(row['own'])}"
        change, verb = row["change"], "no detectable change of how plain they are"
        if p < 0.05:
            verb = f"they are {'plainer' if change['mean'] > 0 else 'less plain'} by {_said(change, sign=True)}"
        found.append(f"{row['model']}: concepts like {reference}'s by {_said(row['likeness'])}, {floor}; {verb}.")
    return found


def _said(of: Mapping[str, Any], sign: bool = False) -> str:
    mean, low, high = (words.number(of[name], 2, sign=sign) for name in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def text(found: Mapping[str, Any], reference: str) -> str:
    header = ["model", f"like {reference}'s", "own halves", "coherence", "explained"]
    rows = [
        [
            row["model"],
            *(_said(row[name]) for name in ("likeness", "own", "coherence")),
            words.percent(row["explained"]),
        ]
        for row in found["models"]
    ]
    return words.table(header, rows)


def rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Two rows a model: how like the reference's its concepts are, and how plain."""
    first, *others = found["models"]
    untested = dict.fromkeys(("difference", "p", "p_holm", "changed", "size", "weight"))
    told = []
    for row in others:
        shared = {"model": row["model"], "attribution": "", "better": "higher", **untested, "said": ""}
        like = {"measure": "likeness", "n": found["n_images"], "reference": row["own"]["mean"], **row["likeness"]}
        change = row["change"]
        plain = {
            **{"measure": "coherence", "n": found["n_concepts"], "reference": first["coherence"]["mean"]},
            **{"mean": row["coherence"]["mean"], "difference": change["mean"], "p": change["p"]},
            **{"low": change["low"], "high": change["high"]},
        }
        told += [{**shared, **like}, {**shared, **plain}]
    return told


def tables(records: Sequence[Record]) -> dict[str, bytes]:
    return {}
