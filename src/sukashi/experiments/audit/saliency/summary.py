"""What may be said of saliency maps: differences paired by image, tested together, and in words."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sukashi.core import stats
from sukashi.core.files import canonical
from sukashi.experiments.audit.networks import FEW, POPULATIONS, Answers
from sukashi.experiments.audit.saliency import places, sanity, verdict
from sukashi.experiments.audit.saliency.values import Array, Cell, Cells, curves_table, values_table
from sukashi.experiments.audit.saliency.verdict import CERTAIN, is_told, said
from sukashi.experiments.workspace import Record
from sukashi.report import words

PAIRS = 5  # of maps that changed most, for each attribution
POINTING = ("localisation", "rank_accuracy", "pointing_game")  # whose chance level is a concept's share of the pixels
NO_MAP = ""  # in place of an attribution where a measure reads no map


def summary(records: Sequence[Record], answers: Sequence[Answers], facts: Mapping[str, Any]) -> dict[str, Any]:
    """What the values of all cells say; every row a dictionary of plain numbers.

    `verdict` and `lines` speak of nothing but `measures`, which are those of the page's first table, of models that do
    not guess, and of FEW images at least.
    """
    names, seed = facts["attributions"], facts["seed"]
    cells, regions = cells_of(records), regions_of(records)
    comparisons = compare(answers, cells | regions, [*names, *([NO_MAP] if regions else [])], seed)
    similarities = alike(answers, cells, names, seed)
    points = pointing(answers, cells, names, seed)
    left_out = {one.label for one in answers[1:] if not one.spoken_of}
    spoken_of = {one.label for one in answers[1:]} - left_out
    spoken, likenesses = (
        [row for row in rows if row["model"] not in left_out and row["n"] >= FEW and is_told(row["measure"])]
        for rows in (comparisons, similarities)
    )
    told = [row for row in spoken if row["attribution"] != NO_MAP]
    measures = [row["measure"] for row in comparisons if row["attribution"] != NO_MAP and is_told(row["measure"])]
    of_reference = own(cells, names, answers[0].label, seed)
    about, values = sanity.values(records, names)
    sane = [row | bounds for row, bounds in zip(about, _means(values, seed), strict=True)]
    return {
        "attributions": list(names),
        "measures": list(dict.fromkeys(measures)),
        "refused": facts["refused"],
        "models": [
            {
                "label": one.label,
                "silent": {name: int(cells[name, one.label].silent.sum()) for name in names},
                "means": {
                    name: {
                        measure: float(values[np.isfinite(values)].mean()) if np.isfinite(values).any() else None
                        for measure, values in cells[name, one.label].values.items()
                    }
                    for name in names
                },
            }
            for one in answers
        ],
        "verdict": verdict.verdict(told, likenesses, answers, _fraction(records), _population(records)),
        "lines": [
            *verdict.nearness(likenesses, names, answers[0].label),
            *verdict.lines(told, names, len(answers) - 1 - len(left_out)),
            *verdict.confidence([row for row in comparisons if row["model"] not in left_out]),
            *verdict.aims(told, points),
            *verdict.own(of_reference, answers[0].label),
            *places.needs([row for row in spoken if row["attribution"] == NO_MAP], answers[0].label),
            *sanity.doubts(sane),
            *([] if points or regions else [verdict.UNJUDGED]),
        ],
        "own": of_reference,
        "n_tested": sum(family(row, spoken_of) == (True, True) for row in comparisons),
        "comparisons": comparisons,
        "similarities": similarities,
        "pointing": points,
        "regions": [row for row in comparisons if row["attribution"] == NO_MAP],
        "sanity": sane,
        "moved": moved(answers, cells, names),
    }


def _fraction(records: Sequence[Record]) -> float:
    """Which fraction of the pixels `top_overlap` calls the highest."""
    asked = (record.about.get("measures", {}).get("top_overlap") for record in records)
    return float(next((options["fraction"] for options in asked if options), 0.1))


def _population(records: Sequence[Record]) -> str:
    return POPULATIONS[next(record.about["population"] for record in records if "population" in record.about)]


def tables(records: Sequence[Record]) -> dict[str, bytes]:
    """values.parquet and curves.parquet."""
    cells = cells_of(records) | regions_of(records)
    return {"values.parquet": values_table(cells), "curves.parquet": curves_table(cells)}


def cells_of(records: Sequence[Record]) -> Cells:
    """{(attribution, label): cell}, attribution by attribution, the reference first."""
    by_key = {record.key: record for record in records}
    return {
        (gallery.about["gallery"], label): Cell.read(by_key[gallery.about["cells"][label]])
        for gallery in records
        if "gallery" in gallery.about
        for label in gallery.result["labels"]
    }


def regions_of(records: Sequence[Record]) -> Cells:
    """{(NO_MAP, label): what the network loses with regions of the images}."""
    found = {canonical(r.about["network"]): Cell.read(r) for r in records if "regions" in r.about}
    models = records[0].result["models"] if found else []
    return {(NO_MAP, model["label"]): found[canonical(model["identity"])] for model in models}


def compare(answers: Sequence[Answers], cells: Cells, names: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """Each model against the reference by each attribution and measure, on the images for which both have a value.

    {"model", "attribution", "measure", "better", "n", "reference", "mean", "difference", "low", "high", "p", "p_holm",
    "size", "changed", "said"}: means over the images, their mean difference with a 95 % bootstrap interval, the p-value
    of the paired t test before and after Holm's correction over the rows of its `family`, the difference in standard
    deviations of the reference's values, and in words. Where all images differ by the same, t has no value and p is
    that of the signs.
    A row of fewer than FEW images has not `changed`, whatever its p-value.
    """
    found: list[dict[str, Any]] = []
    differences, spreads = [], []
    for name in names:
        of_reference = cells[name, answers[0].label]
        for network in answers[1:]:
            cell = cells[name, network.label]
            at = _places(of_reference.image_ids, cell.image_ids)
            for measure in of_reference.values:
                if cell.is_similarity(measure):
                    continue  # has no value of its own for each model: see `alike`
                a, b = cell.values[measure], of_reference.values[measure][at]
                both = np.isfinite(a) & np.isfinite(b)
                if not both.any():
                    continue
                a, b = a[both], b[both]
                p = stats.t_test(a - b)
                differences.append(a - b)
                spreads.append(float(b.std(ddof=1)) if len(b) > 1 else 0.0)
                found.append(
                    {
                        "model": network.label,
                        "attribution": name,
                        "measure": measure,
                        "better": cell.better[measure.partition("/")[0]],
                        "reference": float(b.mean()),
                        "mean": float(a.mean()),
                        "p": p if p is not None else 2.0 ** (1 - len(a)) if (a - b).any() else 1.0,
                    }
                )
    corrected = _corrected(found, {one.label for one in answers if one.spoken_of})
    for row, p_holm, spread, bounds in zip(found, corrected, spreads, _means(differences, seed), strict=True):
        row |= {"n": bounds["n"], "difference": bounds["mean"], "low": bounds["low"], "high": bounds["high"]}
        row |= {"p_holm": p_holm, "changed": p_holm < CERTAIN and row["n"] >= FEW}
        row["size"] = row["difference"] / spread if spread else None
        row["weight"] = words.weight(row["size"])
        row["said"] = said(row)
    return found


def family(row: Mapping[str, Any], spoken: Collection[str]) -> tuple[bool, bool]:
    """With which others a comparison is corrected for being many: with those that sentences may speak of, or by itself
    what is left out of them, models as well as measures that move with confidence."""
    return row["model"] in spoken, is_told(row["measure"])


def _corrected(rows: Sequence[Mapping[str, Any]], spoken: Collection[str]) -> list[float]:
    families: dict[tuple[bool, bool], list[int]] = {}
    for place, row in enumerate(rows):
        families.setdefault(family(row, spoken), []).append(place)
    found = [1.0] * len(rows)
    for members in families.values():
        for place, p in zip(members, stats.holm([rows[i]["p"] for i in members]).tolist(), strict=True):
            found[place] = p
    return found


def own(cells: Cells, names: Sequence[str], reference: str, seed: int) -> list[dict[str, Any]]:
    """What the reference's maps are like: {"attribution", "measure", "n", "mean", "low", "high"}, a bootstrap over all
    images that any model is audited on."""
    found = {
        (name, measure): values[np.isfinite(values)]
        for name in names
        for measure, values in cells[name, reference].values.items()
        if not cells[name, reference].is_similarity(measure) and np.isfinite(values).any()
    }
    return [
        {"attribution": name, "measure": measure} | bounds
        for (name, measure), bounds in zip(found, _means([*found.values()], seed), strict=True)
    ]


def alike(answers: Sequence[Answers], cells: Cells, names: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """How like the reference's the maps of each model are: {"model", "attribution", "measure", "better", "itself", "n",
    "mean", "low", "high"}, a bootstrap over images.

    The rows of the reference itself hold its maps against those it has when `perturbed.rounded` otherwise: what is no
    less alike than they are was not moved by a cut, but by noise.
    """
    found = {
        (network.label, name, measure): values[np.isfinite(values)]
        for name in names
        for network in answers
        for measure, values in cells[name, network.label].values.items()
        if cells[name, network.label].is_similarity(measure) and np.isfinite(values).any()
    }
    return [
        {
            "model": label,
            "attribution": name,
            "measure": measure,
            "better": cells[name, label].better[measure.partition("/")[0]],
            "itself": label == answers[0].label,
        }
        | bounds
        for (label, name, measure), bounds in zip(found, _means([*found.values()], seed), strict=True)
    ]


def pointing(answers: Sequence[Answers], cells: Cells, names: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """Where maps point: {"model", "attribution", "measure", "concept", "n", "mean", "low", "high", "area"}.

    `mean` is that of a measure of a concept, such as the share of positive relevance on it; `area` is the concept's
    share of the pixels in the images that show it, which is what a map has by chance.
    """
    found: list[dict[str, Any]] = []
    every = cells[names[0], answers[0].label]
    columns = [column for column in every.values if column.partition("/")[0] in POINTING]
    shares = []
    for name in names:
        for network in answers:
            cell = cells[name, network.label]
            at = _places(answers[0].image_ids, cell.image_ids)
            for column in columns:
                values, (measure, _, concept) = cell.values[column], column.partition("/")
                some = np.isfinite(values)
                if some.any():
                    area = float(answers[0].areas[concept][at][some].mean())
                    shares.append(values[some])
                    about = {"model": network.label, "attribution": name, "measure": measure, "concept": concept}
                    found.append({**about, "area": area})
    return [row | bounds for row, bounds in zip(found, _means(shares, seed), strict=True)]


def moved(answers: Sequence[Answers], cells: Cells, names: Sequence[str]) -> list[dict[str, Any]]:
    """The pairs of maps that changed most, PAIRS for each attribution and no image twice, of models that don't guess.

    {"attribution", "model", "image_id", "target", "measure", "value"}: by the first measure of similarity there is, or
    by the difference in the first measure.
    """
    found = []
    target = dict(zip(answers[0].image_ids, answers[0].target.tolist(), strict=True))
    for name in names:
        of_reference = cells[name, answers[0].label]
        pairs = []
        for network in answers[1:]:
            if not network.spoken_of:
                continue
            cell = cells[name, network.label]
            measure = next(filter(cell.is_similarity, cell.values), next(iter(cell.values), None))
            if measure is None:
                continue
            values, change = cell.values[measure], -cell.values[measure]
            if not cell.is_similarity(measure):
                values = values - of_reference.values[measure][_places(of_reference.image_ids, cell.image_ids)]
                change = np.abs(values)
            some = np.flatnonzero(np.isfinite(values))
            pairs += [(float(change[i]), network.label, cell.image_ids[i], measure, float(values[i])) for i in some]
        pairs.sort(key=lambda pair: (-pair[0], pair[1:3]))
        seen: set[str] = set()
        for _, label, image_id, measure, value in pairs:
            if image_id in seen or len(seen) == PAIRS:
                continue
            seen.add(image_id)
            about = {"attribution": name, "model": label, "image_id": image_id}
            class_name = answers[0].class_names[target[image_id]]
            found.append(about | {"target": class_name, "measure": measure, "value": value})
    return found


def _places(of: Sequence[str], wanted: Sequence[str]) -> NDArray[np.int64]:
    place = {image_id: i for i, image_id in enumerate(of)}
    return np.array([place[image_id] for image_id in wanted])


def _means(rows: Sequence[Array], seed: int) -> list[dict[str, Any]]:
    """{"n", "mean", "low", "high"} of each row of values, a bootstrap: rows of one length are drawn together."""
    found: dict[int, dict[str, Any]] = {}
    for n in {len(row) for row in rows}:
        at = [i for i, row in enumerate(rows) if len(row) == n]
        drawn = stats.bootstrap(np.stack([rows[i] for i in at], 1), generator=np.random.default_rng(seed))
        bounds = {"mean": drawn.mean, "low": drawn.low, "high": drawn.high}
        for column, i in enumerate(at):
            found[i] = {"n": n} | {name: None if b is None else float(b[column]) for name, b in bounds.items()}
    return [found[i] for i in range(len(rows))]


def text(found: Mapping[str, Any], reference: str) -> str:
    """The comparisons as a table; those in probability are on the page, beside what that says."""
    rows = [
        [
            *(row["model"], row["attribution"], row["measure"], f"{row['reference']:.3f}", f"{row['mean']:.3f}"),
            row["said"] + (f", {row['weight']}" if row["changed"] else ""),
        ]
        for row in found["comparisons"]
        if is_told(row["measure"])
    ]
    refused = [f"left out: {', '.join(of)}: {reason}" for reason, of in words.by_reason(found["refused"]).items()]
    return "\n".join([words.table(["model", "attribution", "measure", reference, "model", "so"], rows), *refused])


def rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each comparison, then one for each likeness of a model's maps to the reference's, beside that which the
    reference's have to themselves when rounded otherwise. A likeness is no difference, and nothing is tested.
    """
    of_reference = {(row["attribution"], row["measure"]): row["mean"] for row in found["similarities"] if row["itself"]}
    untested = dict.fromkeys(("difference", "p", "p_holm", "changed", "size", "weight"))
    return [
        *found["comparisons"],
        *(
            {**row, **untested, "reference": of_reference.get((row["attribution"], row["measure"])), "said": ""}
            for row in found["similarities"]
            if not row["itself"]
        ),
    ]
