"""What may be said of saliency maps: differences paired by image, tested together, and in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sukashi.core import stats
from sukashi.experiments.audit.networks import FEW, Answers
from sukashi.experiments.audit.saliency.values import Array, Cell, Cells, curves_table, values_table
from sukashi.experiments.workspace import Record
from sukashi.report import words

CERTAIN = 0.05  # corrected p-values below are changes
PAIRS = 5  # of maps that changed most, for each attribution
# What it means that a measure is higher, or lower, in the sense of its fact `better`.
WORDS = {
    "gini": ("sparser", "less sparse"),
    "road": ("more faithful", "less faithful"),
    "road/probability": ("more faithful in probability", "less faithful in probability"),
    # Of these a network that breaks sooner, whatever pixels go, has more by the same maps: ROAD takes that off.
    "aopc": ("quicker to take accuracy", "slower to take accuracy"),
    "aopc/probability": ("quicker to take probability", "slower to take probability"),
    "deletion": ("quicker to take probability", "slower to take probability"),
    "insertion": ("quicker to bring probability", "slower to bring probability"),
    "localisation": ("more on the {}", "less on the {}"),
}
NAMED = 3  # models at most of which a sentence gives the names
# Cohen's (1988) names for a difference, in standard deviations of the reference's values over images.
SIZES = {0.2: "slight", 0.5: "small", 0.8: "moderate", math.inf: "large"}


def summary(records: Sequence[Record], answers: Sequence[Answers], facts: Mapping[str, Any]) -> dict[str, Any]:
    """What the values of all cells say; every row a dictionary of plain numbers.

    `verdict` and `lines` speak of nothing but `measures`, which are those of the page's first table, of models that do
    not guess, and of FEW images at least.
    """
    names, seed = facts["attributions"], facts["seed"]
    cells = cells_of(records)
    comparisons = compare(answers, cells, names, seed)
    measures = [measure for measure in dict.fromkeys(row["measure"] for row in comparisons) if _is_told(measure)]
    similarities = alike(answers, cells, names, seed)
    points = pointing(answers, cells, names, seed)
    left_out = {one.label for one in answers[1:] if one.guesses or one.few}
    told, likenesses = (
        [row for row in rows if row["model"] not in left_out and row["n"] >= FEW and _is_told(row["measure"])]
        for rows in (comparisons, similarities)
    )
    said_of_each = lines(told, names, len(answers) - 1 - len(left_out))
    return {
        "attributions": list(names),
        "measures": measures,
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
        "verdict": verdict(told, answers),
        "lines": [*said_of_each, *nearness(likenesses, names, answers[0].label), *aims(told, points)],
        "comparisons": comparisons,
        "similarities": similarities,
        "pointing": points,
        "moved": moved(answers, cells, names),
    }


def tables(records: Sequence[Record]) -> dict[str, bytes]:
    """values.parquet and curves.parquet."""
    cells = cells_of(records)
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


def compare(answers: Sequence[Answers], cells: Cells, names: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """Each model against the reference by each attribution and measure, on the images for which both have a value.

    {"model", "attribution", "measure", "better", "n", "reference", "mean", "difference", "low", "high", "p", "p_holm",
    "size", "changed", "said"}: means over the images, their mean difference with a 95 % bootstrap interval, the p-value
    of the paired t test before and after Holm's correction over all rows, the difference in standard deviations of the
    reference's values, and in words. Where all images differ by the same, t has no value and p is that of the signs.
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
    corrected = stats.holm([row["p"] for row in found]).tolist()
    for row, p_holm, spread, bounds in zip(found, corrected, spreads, _means(differences, seed), strict=True):
        row |= {"n": bounds["n"], "difference": bounds["mean"], "low": bounds["low"], "high": bounds["high"]}
        row |= {"p_holm": p_holm, "changed": p_holm < CERTAIN and row["n"] >= FEW}
        row["size"] = row["difference"] / spread if spread else None
        row["weight"] = _weight(row["size"])
        row["said"] = said(row)
    return found


def said(row: Mapping[str, Any]) -> str:
    """A comparison in words: sparser by .021 [.018, .024], or no detectable change in 480 images [-.002, .003]."""
    if row["n"] < FEW:
        return f"too few images to say ({row['n']})"
    if not row["changed"]:
        low, high = row["low"], row["high"]
        alone = " once corrected" if low > 0 or high < 0 else ""
        return f"no detectable change{alone} in {row['n']} images [{_short(low)}, {_short(high)}]"
    measure, _, part = row["measure"].partition("/")
    words = WORDS.get(row["measure"]) or WORDS.get(measure, (f"better by {measure}", f"worse by {measure}"))
    rise = row["difference"] > 0
    word = words[rise != (row["better"] == "higher")].format(part)
    low, high = sorted(abs(b) if (b > 0) == rise else -abs(b) for b in (row["low"], row["high"]))
    of_confidence = "" if _is_told(row["measure"]) else ", which moves with confidence"
    return f"{word} by {_short(abs(row['difference']))} [{_short(low)}, {_short(high)}]{of_confidence}"


def _is_told(measure: str) -> bool:
    """Whether a measure may be spoken of.

    Variants are not: those of road and aopc in probability move with the confidence of the network, whatever the map.
    """
    return "/" not in measure or measure.startswith("localisation/")


def _weight(size: float | None) -> str:
    # Beside values that are all the same any difference is large.
    return next((word for least, word in SIZES.items() if size is not None and abs(size) < least), "large")


def _most(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return max(rows, key=lambda row: math.inf if row["size"] is None else abs(row["size"]))


def _sized(row: Mapping[str, Any]) -> str:
    """How large a difference is in standard deviations of the reference's values: .12 SD."""
    return "beside values all the same" if row["size"] is None else f"{_short(abs(row['size']), 2)} SD"


def verdict(told: Sequence[Mapping[str, Any]], answers: Sequence[Answers]) -> str:
    """What is said first: the maps of which models changed, on average over images, and whose most.

    Of models that guess, or have too few images, no more than that is said: whatever their maps show, the first do not
    know these classes and of the second it may be chance.
    """
    others = answers[1:]
    guessing = [network for network in others if network.guesses]
    few = [network for network in others if network.few and not network.guesses]
    rest = [network.label for network in others if not (network.guesses or network.few)]
    said = []
    if answers[0].guesses:
        said.append(f"{answers[0].label}, the reference, gets no more right than guessing would.")
    if guessing:
        verb = "gets" if len(guessing) == 1 else "get"
        said.append(f"{_whose(guessing, others)} {verb} no more right than guessing would.")
    if few:
        verb = "has" if len(few) == 1 else "have"
        n = _range([len(network.rows) for network in few])
        said.append(f"{_whose(few, others)} {verb} too few images to say anything ({n}).")
    if rest:
        of_rest = f"Of the other {len(rest)}: " if said and len(rest) > 1 else ""
        said.append(of_rest + _of_changes(told, rest, answers[0].label))
    return " ".join(said)


def _of_changes(told: Sequence[Mapping[str, Any]], labels: Sequence[str], reference: str) -> str:
    changes = [row for row in told if row["changed"]]
    changed = list(dict.fromkeys(row["model"] for row in changes))
    if not told:
        return f"No measure with a value for each model was compared with {reference}'s on {FEW} images or more."
    if not changed:
        measures = list(dict.fromkeys(row["measure"] for row in told))
        do_not = f"{words.listed(measures)} {'does' if len(measures) == 1 else 'do'} not"
        return (
            f"No detectable change in {_range([row['n'] for row in told])} images: on average {do_not} tell the maps "
            f"of {words.listed(labels)} from {reference}'s, which does not show that they are the same."
        )
    most = _most(changes)
    whose, which = most["model"], ""
    if len(labels) > 1:
        whose = f"{len(changed)} of {len(labels)} models" + (f", {whose}," if len(changed) == 1 else "")
        which = f", most (in standard deviations, SD) those of {most['model']}" if len(changed) > 1 else ""
    return (
        f"The maps of {whose} changed beside those of {reference}{which}: by {most['attribution']} they are "
        f"{most['said']}, a {most['weight']} change ({_sized(most)})."
    )


def _whose(some: Sequence[Answers], others: Sequence[Answers]) -> str:
    return words.listed([n.label for n in some]) if len(some) <= NAMED else f"{len(some)} of {len(others)} models"


def _range(counts: Sequence[int]) -> str:
    """480, or 480 to 492."""
    low, high = min(counts), max(counts)
    return f"{low}" if low == high else f"{low} to {high}"


def lines(told: Sequence[Mapping[str, Any]], names: Sequence[str], n_models: int) -> list[str]:
    """A sentence for each attribution: in how many models its maps became what, and where most."""
    found = []
    for name in names:
        of_name = [row for row in told if row["attribution"] == name]
        by_measure: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
        for row in of_name:
            words = by_measure.setdefault(row["measure"], {})
            if row["changed"]:
                words.setdefault(row["said"].partition(" by ")[0], []).append(row)
        phrases = [
            ", but ".join(_in_models(word, rows, n_models) for word, rows in words.items())
            for words in by_measure.values()
            if words
        ]
        if of_name and not phrases:
            phrases = [f"no detectable change on average in {_range([row['n'] for row in of_name])} images"]
        found += [f"{name}: {'; '.join(phrases)}."] if phrases else []
    return found


def _in_models(word: str, rows: Sequence[Mapping[str, Any]], n_models: int) -> str:
    """Sparser in 2 of 5 models, in SD most in a, by .021 [.018, .024] (gini, slight: .12 SD)."""
    most = _most(rows)
    where = ""
    if n_models > 1:
        where = f" in {len(rows)} of {n_models} models, "
        where += f"in SD most in {most['model']}," if len(rows) > 1 else f"{most['model']},"
    amount = most["said"].partition(" by ")[2]
    return f"{word}{where} by {amount} ({most['measure']}, {most['weight']}: {_sized(most)})"


def nearness(similarities: Sequence[Mapping[str, Any]], names: Sequence[str], reference: str) -> list[str]:
    """A sentence for each attribution: how like the reference's the maps are that are least so, and what noise leaves.

    By the first measure of similarity there is.
    """
    found = []
    for name in names:
        rows = [row for row in similarities if row["attribution"] == name]
        rows = [row for row in rows if row["measure"] == rows[0]["measure"]]
        others = [row for row in rows if row["model"] != reference]
        if not others:
            continue
        least = min(others, key=lambda row: row["mean"])
        said = f"{name}: {least['measure']} with the map of {reference} is {_bounded(least)} for {least['model']}"
        said += f", the lowest of {len(others)}" if len(others) > 1 else ""
        own = [f"; rounding alone leaves {_bounded(row)}" for row in rows if row["model"] == reference]
        found.append("".join([said, *own, "."]))
    return found


def _bounded(row: Mapping[str, Any]) -> str:
    bounds = "" if row["low"] is None else f" [{_short(row['low'])}, {_short(row['high'])}]"
    return f"{_short(row['mean'])}{bounds}"


def aims(comparisons: Sequence[Mapping[str, Any]], points: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each model and attribution that points at a concept more than the reference: that which grew most.

    Grew by a change in the sense of `compare`, and is above the concept's share of the pixels.
    """
    area = {(row["model"], row["attribution"], f"localisation/{row['concept']}"): row["area"] for row in points}
    grown: dict[tuple[str, str], Mapping[str, Any]] = {}
    for row in comparisons:
        key = row["model"], row["attribution"]
        if row["measure"].startswith("localisation/") and row["changed"] and row["difference"] > 0:
            before = grown.get(key)
            if row["mean"] > area[*key, row["measure"]] and (before is None or _growth(row) > _growth(before)):
                grown[key] = row
    return [
        f"{label} points at the {row['measure'].partition('/')[2]}: there lies {row['mean']:.0%} of the positive "
        f"relevance of its {name} maps, of the reference's {row['reference']:.0%}, on "
        f"{area[label, name, row['measure']]:.1%} of the pixels."
        for (label, name), row in grown.items()
    ]


def _growth(row: Mapping[str, Any]) -> float:
    return float(row["mean"] / max(row["reference"], 1e-12))


def alike(answers: Sequence[Answers], cells: Cells, names: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """How like the reference's the maps of each model are: {"model", "attribution", "measure", "n", "mean", "low",
    "high"}, a bootstrap over images.

    The rows of the reference itself hold its maps against those it has when `cells.rounded` otherwise: what is no
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
        {"model": label, "attribution": name, "measure": measure} | bounds
        for (label, name, measure), bounds in zip(found, _means([*found.values()], seed), strict=True)
    ]


def pointing(answers: Sequence[Answers], cells: Cells, names: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """Where maps point: {"model", "attribution", "concept", "n", "mean", "low", "high", "area"}.

    `mean` is the share of positive relevance on a concept, `area` that of the pixels, in the images that show it.
    """
    found: list[dict[str, Any]] = []
    every = cells[names[0], answers[0].label]
    columns = [column for column in every.values if column.startswith("localisation/")]
    shares = []
    for name in names:
        for network in answers:
            cell = cells[name, network.label]
            at = _places(answers[0].image_ids, cell.image_ids)
            for column in columns:
                values, concept = cell.values[column], column.partition("/")[2]
                some = np.isfinite(values)
                if some.any():
                    area = float(answers[0].areas[concept][at][some].mean())
                    shares.append(values[some])
                    found.append({"model": network.label, "attribution": name, "concept": concept, "area": area})
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
            if network.guesses:
                continue
            cell = cells[name, network.label]
            measure = next(filter(cell.is_similarity, cell.values), next(iter(cell.values)))
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


def _short(value: float, digits: int = 3) -> str:
    """.021, -.004, 10.200."""
    whole, _, part = f"{round(value, digits) + 0.0:.{digits}f}".partition(".")  # no -.000
    return f"{whole.removesuffix('0') if abs(value) < 1 else whole}.{part}"


def text(found: Mapping[str, Any], reference: str) -> str:
    """The comparisons as a table; those in probability are on the page, beside what that says."""
    rows = [
        [
            *(row["model"], row["attribution"], row["measure"], f"{row['reference']:.3f}", f"{row['mean']:.3f}"),
            row["said"] + (f", {row['weight']}" if row["changed"] else ""),
        ]
        for row in found["comparisons"]
        if row["measure"] in found["measures"]
    ]
    refused = [f"left out: {name}: {reason}" for name, reason in found["refused"].items()]
    return "\n".join([words.table(["model", "attribution", "measure", reference, "model", "so"], rows), *refused])


def rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each comparison."""
    return list(found["comparisons"])
