"""What became of the units that matter most: class by class, from what trials kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sukashi.experiments.audit import paired
from sukashi.experiments.audit.networks import Answers, by_label
from sukashi.experiments.workspace import Record
from sukashi.report import words

Array = NDArray[np.float64]
HANGS = "ablation_impact"
SHARES = ("selectivity", "separation")  # lie in [0, 1]
# Which way is better, and what more and less of it is.
MEASURES: paired.Measures = {
    "selectivity": ("higher", "more selective", "less selective"),
    "separation": ("higher", "better at telling the class", "worse at telling the class"),
    "class_variance": ("lower", "less even within a class", "more even within a class"),
    "label_entropy": ("lower", "excited by more classes", "excited by fewer classes"),
    HANGS: (None, "more hangs on them", "less hangs on them"),
}


def summary(records: Sequence[Record], answers: Sequence[Answers], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Means over the units that matter most for a class, class by class, of each network beside the reference's.

    selectivity      the area under the ROC curve of a unit for the class, on all test images
    separation       the same the way the unit tells the class in training images: one that is low in it tells it too
    class_variance   the coefficient of variation of its largest activation over the class's test images
    label_entropy    of its largest activations over classes, in nats
    ablation_impact  how far the class's logit falls when all of these units become their means, in lengths of logits

    `means` hold each by layer; `comparisons` are paired over classes, see `paired.compare`; `no_value` counts the pairs
    of unit and class without a `class_variance`.
    """
    found = by_model(records)
    kept = {one.label: found[one.label].arrays("neurons") for one in answers}
    values = {
        f"{measure}/{layer}": {
            one.label: of_classes(kept[one.label], answers[0].target, f"{i} ")[measure][None] for one in answers
        }
        for i, layer in enumerate(facts["layers"])
        for measure in MEASURES
    }
    rows = paired.compare(values, answers, MEASURES)
    what = "the units that matter most for each class"
    return {
        **facts,
        "n_classes": len(answers[0].class_names),
        "n_images": len(answers[0].target),
        "units": {one.label: found[one.label].result["units"] for one in answers},
        "means": means_of(values),
        "no_value": {
            one.label: [int(np.isnan(kept[one.label][f"{i} variance"]).sum()) for i in range(len(facts["layers"]))]
            for one in answers
        },
        "comparisons": rows,
        "verdict": paired.verdict(rows, answers, what),
        "lines": paired.lines(rows, answers),
    }


def means_of(values: Mapping[str, Mapping[str, Array]]) -> dict[str, dict[str, dict[str, Any]]]:
    """{measure/place: {label: its mean over classes}}."""
    return {
        name: {label: paired.over_classes(own, share=name.partition("/")[0] in SHARES) for label, own in of.items()}
        for name, of in values.items()
    }


def by_model(records: Sequence[Record]) -> dict[str, Record]:
    """The trial of each network, by its label."""
    return {label: of[0] for label, of in by_label(records, "neurons.npz").items()}


def of_classes(kept: Mapping[str, Array], target: NDArray[np.int64], what: str = "") -> dict[str, Array]:
    """{measure: (K,)} the mean over the units that matter most for each class, of arrays whose names begin with `what`;
    NaN where none has one."""
    impact, n_classes = kept[f"{what}impact"], len(kept[f"{what}top"])
    names = {"class_variance": "variance", "label_entropy": "entropy"}
    means = {measure: _mean(kept[what + names.get(measure, measure)]) for measure in MEASURES if measure != HANGS}
    return means | {HANGS: np.array([_mean(impact[target == k][None])[0] for k in range(n_classes)])}


def _mean(values: Array) -> Array:
    """The mean of each row, of what is finite in it."""
    has = np.isfinite(values)
    n = has.sum(1)
    found: Array = np.where(n, np.where(has, values, 0).sum(1) / np.maximum(n, 1), np.nan)
    return found


def text(found: Mapping[str, Any], reference: str) -> str:
    header = ["layer", "model", *(measure.replace("_", " ") for measure in MEASURES)]
    return words.table(
        header,
        [
            [layer, label, *(paired.spoken(found["means"][f"{measure}/{layer}"][label]) for measure in MEASURES)]
            for layer in found["layers"]
            for label in found["means"][f"selectivity/{layer}"]
        ],
    )


def rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each model, layer and measure, against the reference."""
    return paired.table_rows(found["comparisons"])
