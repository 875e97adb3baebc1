"""How large circuits are and how good, class by class: from what trials kept."""

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
Trials = Mapping[tuple[float, int], Record]
MEASURES: paired.Measures = {
    "nodes": (None, "more of the nodes", "fewer of the nodes"),
    "edges": (None, "more of the edges", "fewer of the edges"),
    "accuracy": ("higher", "more accurate circuits", "less accurate circuits"),
    "complement": (None, "more left in what a circuit leaves out", "less left in what a circuit leaves out"),
    "random": (None, "more accurate random parts of that size", "less accurate random parts of that size"),
    "quality": ("higher", "better circuits", "worse circuits"),
}


def summary(records: Sequence[Record], answers: Sequence[Answers], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Circuits of each network beside the reference's, means over seeds, of the penalty whose circuits are best on
    validation images.

    nodes        the share of all nodes that is in the circuit of a class
    edges        the share of all weights between nodes that are not zero and whose both ends are in it
    accuracy     on as many test images of the class as of all others: which of both a circuit says
    complement   the same of all that is not in it; a network of which nothing is left says one answer to all, 1/2
    random       the same of as many random nodes of each place, mean of draws
    quality      accuracy (1 - edges), normalised circuit quality as all printed values of Zhang 2026 are

    `models` hold their means over classes and of `whole` (the accuracy of the whole network), `edges_out` (weights
    whose output is in it), `printed_quality` (as eq. 12 of Zhang 2026 has it), `edges_random` (of random nodes) and
    `edges_reference` (of the reference's circuits in this network, so of its zeros alone; None where nodes are not the
    same), `penalty`, and `stability`: the nodes that the circuits of two seeds share, as a share of those that either
    has, with `by_chance` that of random ones of their sizes (None of one seed). `sweep` has each penalty's validation
    accuracy, nodes, edges, `edges_of_own` (of those that are not zero) and quality by these. `shares` (places) are the
    mean share of each place's nodes, in the order of the pass, whose `kinds` say what they are. `comparisons` are
    paired over classes and seeds, see `paired.compare`.
    """
    found = by_model(records)
    chosen = {one.label: best(found[one.label], facts) for one in answers}
    values = values_of(found, chosen, facts)
    rows = paired.compare(values, answers, MEASURES)
    return {
        **facts,
        "n_classes": len(answers[0].class_names),
        "models": [
            _of_model(one.label, found[one.label], chosen[one.label], facts)
            | {"edges_reference": _reference(found[one.label], chosen[answers[0].label], facts)}
            for one in answers
        ],
        "sweep": [
            {"model": one.label, "penalty": penalty, **_sweep(found[one.label], penalty, facts)}
            for one in answers
            for penalty in facts["penalties"]
        ],
        "means": {
            name: {label: paired.over_classes(of[label], share=True) for label in of} for name, of in values.items()
        },
        "comparisons": rows,
        "verdict": paired.verdict(rows, answers, "the circuits of classes"),
        "lines": paired.lines(rows, answers),
    }


def by_model(records: Sequence[Record]) -> dict[str, dict[tuple[float, int], Record]]:
    """{label: {(penalty, seed): its trial}}."""
    return {
        label: {(record.result["penalty"], record.result["seed"]): record for record in of}
        for label, of in by_label(records, "circuits.npz").items()
    }


def best(trials: Trials, facts: Mapping[str, Any]) -> float:
    """The penalty of the highest quality on validation images, mean over classes and seeds; of equal ones the first.

    Edges count there as a share of the network's own that are not zero: of all weights a sparse network would have few
    whatever is kept, and choose to keep more of its nodes.
    """
    return float(max(facts["penalties"], key=lambda penalty: _sweep(trials, penalty, facts)["quality"]))


def _sweep(trials: Trials, penalty: float, facts: Mapping[str, Any]) -> dict[str, float]:
    kept = [trials[penalty, seed].arrays("circuits") for seed in range(facts["seeds"])]
    of_own = [of["edges"] / of["edges whole"] for of in kept]
    return {
        "validation": float(np.mean([of["validation"] for of in kept])),
        "nodes": float(np.mean([of["masks"].mean() for of in kept])),
        "edges": float(np.mean([of["edges"] for of in kept])),
        "edges_of_own": float(np.mean(of_own)),
        "quality": float(
            np.mean([quality(of["validation"], own).mean() for of, own in zip(kept, of_own, strict=True)])
        ),
    }


def values_of(
    found: Mapping[str, Trials], chosen: Mapping[str, float], facts: Mapping[str, Any]
) -> dict[str, dict[str, Array]]:
    """{measure: {label: (S, K)}} of each network's best penalty."""
    of_models = {
        label: [of_classes(trials[chosen[label], seed].arrays("circuits")) for seed in range(facts["seeds"])]
        for label, trials in found.items()
    }
    return {
        name: {label: np.stack([of[name] for of in seeds]) for label, seeds in of_models.items()} for name in MEASURES
    }


def of_classes(kept: Mapping[str, Array]) -> dict[str, Array]:
    """{measure: (K,)} of one trial."""
    accuracy = kept["right"].mean(1)
    return {
        "nodes": kept["masks"].mean(1),
        "edges": kept["edges"],
        "accuracy": accuracy,
        "complement": kept["right complement"].mean(1),
        "random": kept["right random"].mean(1),
        "quality": quality(accuracy, kept["edges"]),
    }


def quality(accuracy: Array, edges: Array) -> Array:
    """Normalised circuit quality as all of Zhang's printed values are: accuracy (1 - share of edges)."""
    return accuracy * (1 - edges)


def printed_quality(accuracy: Array, whole: Array, nodes: Array) -> Array:
    """The same as eq. 12 prints it: accuracy over that of the whole network, times (1 - share of nodes)."""
    return accuracy / whole * (1 - nodes)


def _of_model(label: str, trials: Trials, penalty: float, facts: Mapping[str, Any]) -> dict[str, Any]:
    records = [trials[penalty, seed] for seed in range(facts["seeds"])]
    kept = [record.arrays("circuits") for record in records]
    of = [of_classes(arrays) for arrays in kept]
    sizes = records[0].result["sizes"]
    whole = [arrays["right whole"].mean(1) for arrays in kept]
    printed = [printed_quality(one["accuracy"], all_, one["nodes"]) for one, all_ in zip(of, whole, strict=True)]
    both = _stability([arrays["masks"].astype(bool) for arrays in kept])
    starts = np.cumsum([0, *sizes[:-1]])
    shares = np.mean([np.add.reduceat(arrays["masks"].mean(0), starts) / sizes for arrays in kept], axis=0)

    def mean(values: Sequence[Array]) -> float:
        return float(np.mean(values))

    return {
        "model": label,
        "penalty": penalty,
        "n_nodes": sum(sizes),
        **{name: mean([one[name] for one in of]) for name in MEASURES},
        "whole": mean(whole),
        "edges_out": mean([arrays["edges out"] for arrays in kept]),
        "edges_random": mean([arrays["edges random"] for arrays in kept]),
        "printed_quality": mean(printed),
        "stability": both[0],
        "by_chance": both[1],
        "kinds": records[0].result["kinds"],
        "shares": shares.tolist(),
    }


def _reference(trials: Trials, penalty: float, facts: Mapping[str, Any]) -> float | None:
    """The edges that the reference's circuits of its own penalty have in a network."""
    kept = [trials[penalty, seed].arrays("circuits") for seed in range(facts["seeds"])]
    found = [of["edges reference"].mean() for of in kept if "edges reference" in of]
    return float(np.mean(found)) if found else None


def _stability(masks: Sequence[NDArray[np.bool_]]) -> tuple[float | None, float | None]:
    """The mean Jaccard index of two seeds' circuits of a class, and its value for independent masks of their sizes."""
    if len(masks) < 2:
        return None, None
    shared, chance = [], []
    for i, one in enumerate(masks):
        for other in masks[i + 1 :]:
            either = (one | other).sum(1)
            shared.append(np.where(either, (one & other).sum(1) / np.maximum(either, 1), 1).mean())
            a, b = one.mean(1), other.mean(1)
            both = a * b
            chance.append(np.where(a + b > 0, both / np.maximum(a + b - both, 1e-12), 1).mean())
    return float(np.mean(shared)), float(np.mean(chance))


def text(found: Mapping[str, Any], reference: str) -> str:
    header = ["model", "penalty", *MEASURES]
    rows = [
        [row["model"], f"{row['penalty']:g}", *(paired.spoken(found["means"][name][row["model"]]) for name in MEASURES)]
        for row in found["models"]
    ]
    return words.table(header, rows)


def rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each model and measure, against the reference."""
    return paired.table_rows(found["comparisons"])
