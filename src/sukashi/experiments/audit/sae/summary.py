"""How well autoencoders give back what a layer writes, and what their latents answer to: from what trials kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sukashi.experiments.audit import paired
from sukashi.experiments.audit.networks import Answers, by_label
from sukashi.experiments.audit.neurons import summary as neurons
from sukashi.experiments.workspace import Record
from sukashi.report import words

Array = NDArray[np.float64]
MEASURES: paired.Measures = {
    "nmse": ("lower", "less well given back", "better given back"),
    **neurons.MEASURES,
}


def summary(records: Sequence[Record], answers: Sequence[Answers], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Autoencoders of each network beside the reference's, on test images.

    nmse         sum |x - x'|^2 / sum |x - mean|^2 over the rows of a class's images
    selectivity, separation, class_variance, label_entropy, ablation_impact
                 of the latents that matter most for each class, as of units (`neurons.summary`); a latent that is
                 taken out is 0

    `models` hold, by network and number of active latents, nmse and `explained` = 1 - nmse over all rows, `dead` (the
    share of latents that no test row fires) and `active` (how many a row fires), means over seeds; of the first number
    `stability`: the mean over latents that fire of the largest cosine with any direction of another seed's, both ways
    (None of one seed). `enough` is the least of these numbers by which as much is explained as by the first of the
    reference's. `comparisons` are paired over classes, see `paired.compare`.
    """
    kept = by_model(records)
    values = values_of(kept, facts, answers)
    rows = paired.compare(values, answers, MEASURES)
    models = [
        {
            "model": one.label,
            "k": k,
            **_mean([record.result for record in _of(kept[one.label], k)]),
            "stability": stability(_of(kept[one.label], k)),
        }
        for one in answers
        for k in facts["k"]
    ]
    goal = models[0]["explained"]
    enough = {
        one.label: min(
            (row["k"] for row in models if row["model"] == one.label and row["explained"] >= goal), default=None
        )
        for one in answers
    }
    return {
        **facts,
        "n_classes": len(answers[0].class_names),
        "n_images": len(answers[0].target),
        "models": models,
        "enough": enough,
        "means": neurons.means_of(values),
        "comparisons": rows,
        "verdict": paired.verdict(rows, answers, f"the parts of {facts['layer']} that autoencoders find"),
        "lines": paired.lines(rows, answers),
    }


def by_model(records: Sequence[Record]) -> dict[str, dict[tuple[int, int], Record]]:
    """{label: {(k, seed): its trial}}."""
    return {
        label: {(record.result["k"], record.result["seed"]): record for record in of}
        for label, of in by_label(records, "sae.npz").items()
    }


def _of(trials: Mapping[tuple[int, int], Record], k: int) -> list[Record]:
    """Those of one number of active latents, by seed."""
    return [record for (number, _), record in sorted(trials.items()) if number == k]


def values_of(
    kept: Mapping[str, Mapping[tuple[int, int], Record]], facts: Mapping[str, Any], answers: Sequence[Answers]
) -> dict[str, dict[str, Array]]:
    """{measure: {label: (S, K)}} of the first number of active latents."""
    target, first = answers[0].target, facts["k"][0]
    of_models = {
        label: [of_classes(trials[first, seed].arrays("sae"), target) for seed in range(facts["seeds"])]
        for label, trials in kept.items()
    }
    return {
        measure: {label: np.stack([of[measure] for of in seeds]) for label, seeds in of_models.items()}
        for measure in MEASURES
    }


def of_classes(kept: Mapping[str, Array], target: NDArray[np.int64]) -> dict[str, Array]:
    """{measure: (K,)} of one autoencoder."""
    return {"nmse": kept["nmse"], **neurons.of_classes(kept, target)}


def stability(records: Sequence[Record]) -> float | None:
    """The mean, over pairs of seeds both ways and latents that fire, of the largest cosine with a direction of the
    other's."""
    if len(records) < 2:
        return None
    kept = [record.arrays("sae") for record in records]
    directions = [of["sae decoder"][of["fires"]] for of in kept]
    found = [
        # In parts, for all pairs of latents would take a gigabyte.
        np.concatenate([(one[at : at + 1024] @ other.T).max(1) for at in range(0, len(one), 1024)]).mean()
        for i, one in enumerate(directions)
        for j, other in enumerate(directions)
        if i != j and len(one) and len(other)
    ]
    return float(np.mean(found)) if found else None


def _mean(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {name: float(np.mean([of[name] for of in results])) for name in ("nmse", "explained", "dead", "active")}


def text(found: Mapping[str, Any], reference: str) -> str:
    header = ["model", "k", "nmse", "explained", "dead latents", "active", "stability"]
    body = [
        [
            *(row["model"], str(row["k"]), words.short(row["nmse"], 4), words.percent(row["explained"])),
            *(words.percent(row["dead"]), words.number(row["active"])),
            "–" if row["stability"] is None else words.short(row["stability"]),
        ]
        for row in found["models"]
    ]
    of_latents = [
        [label, *(paired.spoken(found["means"][measure][label]) for measure in MEASURES)]
        for label in found["means"]["nmse"]
    ]
    return "\n".join(
        [
            words.table(header, body),
            "",
            words.table(["model", *(measure.replace("_", " ") for measure in MEASURES)], of_latents),
        ]
    )


def rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each model and measure, against the reference."""
    return paired.table_rows(found["comparisons"])
