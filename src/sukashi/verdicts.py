"""What may be said of an audit's numbers: differences paired by image, tested together, and in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sukashi import page, stats
from sukashi.audited import Array, Cells, Network, masks, size_of
from sukashi.measures import measures as registry

CERTAIN = 0.05  # corrected p-values below are changes
PAIRS = 5  # of maps that changed most, for each attribution
# What it means that a measure is higher, or lower, in the sense of its fact `better`.
WORDS = {
    "gini": ("sparser", "less sparse"),
    "road": ("more faithful", "less faithful"),
    # Of these a network that breaks sooner, whatever pixels go, has more by the same maps: ROAD takes that off.
    "aopc": ("quicker to fall", "slower to fall"),
    "deletion": ("quicker to fall", "slower to fall"),
    "insertion": ("quicker to rise", "slower to rise"),
    "localisation": ("more on the {}", "less on the {}"),
}
# Cohen's (1988) names for a difference, in standard deviations of the reference's values over images.
SIZES = {0.2: "slight", 0.5: "small", 0.8: "moderate", math.inf: "large"}


def summary(networks: Sequence[Network], cells: Cells, names: Sequence[str], seed: int) -> dict[str, Any]:
    """What the values of all cells say; every row a dictionary of plain numbers."""
    comparisons = compare(networks, cells, names, seed)
    similarities = alike(networks, cells, names, seed)
    points = pointing(networks, cells, names, seed)
    guessing = {network.label for network in networks[1:] if network.guesses}
    told = [row for row in comparisons if row["model"] not in guessing]
    said_of_each = lines(told, names, len(networks) - 1 - len(guessing)) if told else []
    likeness = nearness([row for row in similarities if row["model"] not in guessing], names, networks[0].label)
    return {
        "reference": networks[0].label,
        "attributions": list(names),
        "models": [
            {
                "label": network.label,
                "series": network.series,
                "ratio": network.ratio,
                "accuracy": float(network.right.mean()),
                "guesses": network.guesses,
                "n_images": len(network.rows),
                "silent": {name: int(cells[name, network.label].silent.sum()) for name in names},
                "means": {
                    name: {
                        measure: float(values[np.isfinite(values)].mean()) if np.isfinite(values).any() else None
                        for measure, values in cells[name, network.label].values.items()
                    }
                    for name in names
                },
            }
            for network in networks
        ],
        "n_images": len(networks[0].right),
        "verdict": verdict(comparisons, networks),
        "lines": [*said_of_each, *likeness, *aims(told, points)],
        "comparisons": comparisons,
        "similarities": similarities,
        "pointing": points,
        "moved": moved(networks, cells, names),
    }


def compare(networks: Sequence[Network], cells: Cells, names: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """Each model against the reference by each attribution and measure, on the images for which both have a value.

    {"model", "attribution", "measure", "n", "reference", "mean", "difference", "low", "high", "p", "p_holm", "size",
    "changed", "said"}: means over the images, their mean difference with a 95 % bootstrap interval, the p-value of the
    paired t test before and after Holm's correction over all rows, the difference in standard deviations of the
    reference's values, and in words. Where all images differ by the same, t has no value and p is that of the signs.
    """
    found: list[dict[str, Any]] = []
    differences, spreads = [], []
    for name in names:
        of_reference = cells[name, networks[0].label]
        for network in networks[1:]:
            cell = cells[name, network.label]
            at = _places(of_reference.image_ids, cell.image_ids)
            for measure in of_reference.values:
                if _is_similarity(measure):
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
                        "reference": float(b.mean()),
                        "mean": float(a.mean()),
                        "p": p if p is not None else 2.0 ** (1 - len(a)) if (a - b).any() else 1.0,
                    }
                )
    corrected = stats.holm([row["p"] for row in found]).tolist()
    for row, p_holm, spread, bounds in zip(found, corrected, spreads, _means(differences, seed), strict=True):
        row |= {"n": bounds["n"], "difference": bounds["mean"], "low": bounds["low"], "high": bounds["high"]}
        row |= {"p_holm": p_holm, "changed": p_holm < CERTAIN, "size": row["difference"] / spread if spread else None}
        row |= {"weight": _weight(row["size"])}
        row["said"] = said(row)
    return found


def said(row: Mapping[str, Any]) -> str:
    """A comparison in words: sparser by .021 [.018, .024], or no detectable change."""
    if not row["changed"]:
        low, high = row["low"], row["high"]
        if low is None:
            return "no detectable change"
        alone = " once corrected" if low > 0 or high < 0 else ""
        return f"no detectable change{alone} [{_short(low)}, {_short(high)}]"
    measure, _, part = row["measure"].partition("/")
    method = registry[measure]
    words = WORDS.get(measure, (f"better by {measure}", f"worse by {measure}"))
    rise = row["difference"] > 0
    word = words[rise != (method.facts["better"] == "higher")].format(part)
    low, high = sorted(abs(b) if (b > 0) == rise else -abs(b) for b in (row["low"], row["high"]))
    return f"{word} by {_short(abs(row['difference']))} [{_short(low)}, {_short(high)}]"


def _weight(size: float | None) -> str:
    # Beside values that are all the same any difference is large.
    return next((word for least, word in SIZES.items() if size is not None and abs(size) < least), "large")


def _most(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return max(rows, key=lambda row: math.inf if row["size"] is None else abs(row["size"]))


def verdict(comparisons: Sequence[Mapping[str, Any]], networks: Sequence[Network]) -> str:
    """What is said first: the maps of how many models changed, on average over images, and whose most.

    Models that guess are counted and then left out: whatever their maps show, they do not know these classes.
    """
    others = [network.label for network in networks[1:] if not network.guesses]
    n_guess = len(networks) - 1 - len(others)
    if n_guess:
        rest = verdict(comparisons, [networks[0], *(n for n in networks[1:] if not n.guesses)]) if others else ""
        whose = f"{n_guess} of {len(networks) - 1} models" if len(networks) > 2 else networks[1].label
        verb = "gets" if len(networks) == 2 or n_guess == 1 else "get"
        of_rest = f" Of the other {len(others)}: " if len(others) > 1 else " "
        return f"{whose} {verb} no more right than guessing would.{of_rest if rest else ''}{rest}"
    reference = networks[0].label
    comparisons = [row for row in comparisons if row["model"] in others]
    changes = [row for row in comparisons if row["changed"]]
    changed = [label for label in others if any(row["model"] == label for row in changes)]
    if not comparisons:
        return f"No measure with a value for each model was compared with {reference}'s on the same images."
    if not changed:
        measures = page.listed(list(dict.fromkeys(row["measure"].partition("/")[0] for row in comparisons)))
        whose = f"the maps of {page.listed(others)} from {reference}'s"
        return f"No detectable change: on average over images {measures} do not tell {whose}."
    most = _most(changes)
    whose = f"{len(changed)} of {len(others)} models" if len(others) > 1 else others[0]
    which = f", most of all {most['model']}'s" if len(others) > 1 else ""
    return (
        f"The maps of {whose} changed beside those of {reference}{which}: by {most['attribution']} they are "
        f"{most['said']}, a {most['weight']} change."
    )


def lines(comparisons: Sequence[Mapping[str, Any]], names: Sequence[str], n_models: int) -> list[str]:
    """A sentence for each attribution: in how many models its maps became what, and where most."""
    found = []
    for name in names:
        by_word: dict[str, list[Mapping[str, Any]]] = {}
        for row in comparisons:
            if row["attribution"] == name and row["changed"]:
                by_word.setdefault(row["said"].partition(" by ")[0], []).append(row)
        phrases = []
        for word, rows in by_word.items():
            most = _most(rows)
            labels = {row["model"] for row in rows}
            how_many = f" in {len(labels)} of {n_models} models, most in {most['model']}" if n_models > 1 else ""
            amount = most["said"].partition(" by ")[2]
            phrases.append(f"{word}{how_many} by {amount} ({most['measure']}, {most['weight']})")
        found.append(f"{name}: " + ("; ".join(phrases) or "no detectable change on average") + ".")
    return found


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


def alike(networks: Sequence[Network], cells: Cells, names: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """How like the reference's the maps of each model are: {"model", "attribution", "measure", "n", "mean", "low",
    "high"}, a bootstrap over images.

    The rows of the reference itself hold its maps against those it has when `audited.rounded` otherwise: what is no
    less alike than they are was not moved by a cut, but by noise.
    """
    found = {
        (network.label, name, measure): values[np.isfinite(values)]
        for name in names
        for network in networks
        for measure, values in cells[name, network.label].values.items()
        if _is_similarity(measure) and np.isfinite(values).any()
    }
    return [
        {"model": label, "attribution": name, "measure": measure} | bounds
        for (label, name, measure), bounds in zip(found, _means([*found.values()], seed), strict=True)
    ]


def pointing(networks: Sequence[Network], cells: Cells, names: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """Where maps point: {"model", "attribution", "concept", "n", "mean", "low", "high", "area"}.

    `mean` is the share of positive relevance on a concept, `area` that of the pixels, in the images that show it.
    """
    found: list[dict[str, Any]] = []
    reference = networks[0]
    every = cells[names[0], reference.label]
    columns = [column for column in every.values if column.startswith("localisation/")]
    truth = masks(reference.setting, every.image_ids, size_of(reference.loaded.preprocess)) if columns else {}
    areas = {concept: mask.double().mean((1, 2)).numpy() for concept, mask in truth.items()}
    shares = []
    for name in names:
        for network in networks:
            cell = cells[name, network.label]
            at = _places(every.image_ids, cell.image_ids)
            for column in columns:
                values, concept = cell.values[column], column.partition("/")[2]
                some = np.isfinite(values)
                if some.any():
                    area = float(areas[concept][at][some].mean())
                    shares.append(values[some])
                    found.append({"model": network.label, "attribution": name, "concept": concept, "area": area})
    return [row | bounds for row, bounds in zip(found, _means(shares, seed), strict=True)]


def moved(networks: Sequence[Network], cells: Cells, names: Sequence[str]) -> list[dict[str, Any]]:
    """The pairs of maps that changed most, PAIRS for each attribution and no image twice, of models that don't guess.

    {"attribution", "model", "image_id", "target", "measure", "value"}: by the first measure of similarity there is, or
    by the difference in the first measure.
    """
    found = []
    target = dict(zip(networks[0].batch.image_id, networks[0].batch.target.tolist(), strict=True))
    for name in names:
        of_reference = cells[name, networks[0].label]
        pairs = []
        for network in networks[1:]:
            if network.guesses:
                continue
            cell = cells[name, network.label]
            measure = next(filter(_is_similarity, cell.values), next(iter(cell.values)))
            values, change = cell.values[measure], -cell.values[measure]
            if not _is_similarity(measure):
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
            class_name = networks[0].setting.data.class_names[target[image_id]]
            found.append(about | {"target": class_name, "measure": measure, "value": value})
    return found


def _is_similarity(measure: str) -> bool:
    name = measure.partition("/")[0]
    return "reference" in registry[name].facts.get("reads", ())


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


def _short(value: float) -> str:
    """.021, -.004, 10.200."""
    whole, _, part = f"{round(value, 3) + 0.0:.3f}".partition(".")  # no -.000
    return f"{whole.removesuffix('0') if abs(value) < 1 else whole}.{part}"
