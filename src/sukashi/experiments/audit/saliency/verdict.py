"""Saliency maps in words: what comes first on the page, and a sentence for each attribution and subject."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sukashi.experiments.audit.networks import FEW, POPULATIONS, Answers
from sukashi.report import words
from sukashi.report.words import between

CERTAIN = 0.05  # corrected p-values below are changes
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
    "rank_accuracy": ("more on the {}", "less on the {}"),
    "pointing_game": ("more often highest on the {}", "less often highest on the {}"),
    "region_drop": ("more in need of the {}", "less in need of the {}"),
    "complement_drop": ("more in need of all but the {}", "less in need of all but the {}"),
}
UNJUDGED = (
    "Whether the maps lie where the evidence is was not judged: that takes `masks` that say where, and localisation "
    "among the `measures`."
)
NAMED = 3  # models at most of which a sentence gives the names
# What sentences speak of first, how faithful maps are, then how sparse; and last, what a network that breaks sooner has
# more of by the same maps.
FIRST = ("road", "gini")
LAST = ("insertion", "deletion", "aopc")


def said(row: Mapping[str, Any]) -> str:
    """A comparison in words: sparser by .021 [.018, .024], or no detectable change in 480 images [-.002, .003]."""
    if row["n"] < FEW:
        return f"too few images to say ({row['n']})"
    if not row["changed"]:
        low, high = row["low"], row["high"]
        alone = " once corrected" if low > 0 or high < 0 else ""
        return f"no detectable change{alone} in {row['n']} images [{words.short(low)}, {words.short(high)}]"
    measure, _, part = row["measure"].partition("/")
    of_any = (f"better by {measure}", f"worse by {measure}")
    if row["better"] is None:
        of_any = (f"higher in {measure}", f"lower in {measure}")
    pair = WORDS.get(row["measure"]) or WORDS.get(measure, of_any)
    rise = row["difference"] > 0
    word = pair[rise != (row["better"] != "lower")].format(part)
    low, high = sorted(abs(b) if (b > 0) == rise else -abs(b) for b in (row["low"], row["high"]))
    of_confidence = "" if is_told(row["measure"]) else ", which moves with confidence"
    return f"{word} by {words.short(abs(row['difference']))} [{words.short(low)}, {words.short(high)}]{of_confidence}"


def is_told(measure: str) -> bool:
    """Whether a measure may be spoken of: what is in probability moves with the confidence of the network, whatever the
    map.
    """
    return not measure.endswith("/probability")


def _most(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return max(rows, key=lambda row: math.inf if row["size"] is None else abs(row["size"]))


def _sized(row: Mapping[str, Any]) -> str:
    """How large a difference is in standard deviations of the reference's values: .12 SD."""
    return "beside values all the same" if row["size"] is None else f"{words.short(abs(row['size']), 2)} SD"


def verdict(
    told: Sequence[Mapping[str, Any]],
    likenesses: Sequence[Mapping[str, Any]],
    answers: Sequence[Answers],
    fraction: float,
    population: str,
) -> str:
    """What is said first: whether models look at the same places as the reference, then how faithful their maps are.

    `fraction` is that of the pixels which `top_overlap` calls the most relevant, `population` says which images. Of
    models that guess, or have too few images, no more than that is said: whatever their maps show, the first do not
    know these classes and of the second it may be chance.
    """
    others, reference = answers[1:], answers[0].label
    few = [network for network in others if network.few]
    guessing = [network for network in others if network.guesses and not network.few]
    rest = [network.label for network in others if not (network.guesses or network.few)]
    said = []
    if answers[0].guesses:
        said.append(f"{reference}, the reference, is not shown to get more right than one answer for all.")
    if guessing:
        verb = "is" if len(guessing) == 1 else "are"
        said.append(f"{_whose(guessing, others)} {verb} not shown to get more right than one answer for all.")
    if few:
        verb = "has" if len(few) == 1 else "have"
        n = between([len(network.rows) for network in few])
        said.append(f"{_whose(few, others)} {verb} too few images to say anything ({n}).")
    if rest:
        found = [
            _of_places(likenesses, rest, reference, fraction),
            _of_faithfulness(told, rest, reference, population),
        ]
        nothing = f"Nothing was compared with {reference} on {FEW} images or more."
        said.append(" ".join(filter(None, found)) or nothing)
    return " ".join(said)


def _of_places(likenesses: Sequence[Mapping[str, Any]], labels: Sequence[str], reference: str, fraction: float) -> str:
    """Whether maps are where the reference's are, of the model and by the attribution that say it least."""
    measures = [row["measure"] for row in likenesses]
    if not measures:
        return ""
    measure = "top_overlap" if "top_overlap" in measures else measures[0]
    rows = [row for row in likenesses if row["measure"] == measure]
    floor = {row["attribution"]: row for row in rows if row["model"] == reference}
    others = [row for row in rows if row["model"] != reference]
    if not others:
        return ""
    least = min(others, key=lambda row: row["mean"])
    same, own = least["attribution"], floor.get(least["attribution"])
    model, n_attributions = least["model"], len({row["attribution"] for row in others})
    of = [f"{len(labels)} models"] * (len(labels) > 1) + [f"{n_attributions} attributions"] * (n_attributions > 1)
    among = f", the least of {words.listed(of)}" if of else ""
    if measure == "top_overlap":
        tenth = "tenth" if fraction == 0.1 else f"{fraction:.0%}"
        said = f"Of the most relevant {tenth} of the pixels {_percent(least)} are the same in {model} as in {reference}"
        alone = "" if own is None else f" Rounding alone leaves {own['mean']:.0%}"
    else:
        said = f"Maps of {model} have a {measure.replace('_', ' ')} of {_bounded(least)} with those of {reference}"
        alone = "" if own is None else f" Rounding alone leaves {words.short(own['mean'])}"
    if own is not None and least["high"] >= own["low"]:
        alone += ", so that no change of place is shown"
    return f"{said} (by {same}{among}).{alone}{'.' if alone else ''}"


def own(rows: Sequence[Mapping[str, Any]], reference: str) -> list[str]:
    """A sentence on the reference's own maps where they are not shown to be more faithful than an order at random."""
    return [
        f"{reference}'s own {row['attribution']} maps are not shown to be more faithful than an order at random: ROAD "
        f"{_bounded(row)}, at random 0."
        for row in rows
        if row["measure"] == "road" and row["n"] >= FEW and row["low"] <= 0
    ]


def _percent(row: Mapping[str, Any]) -> str:
    bounds = "" if row["low"] is None else f" [{100 * row['low']:.0f}, {100 * row['high']:.0f}]"
    return f"{row['mean']:.0%}{bounds}"


def _of_faithfulness(told: Sequence[Mapping[str, Any]], labels: Sequence[str], reference: str, population: str) -> str:
    """What became of faithfulness by ROAD, or without it of the first measure that is not moved by confidence."""
    measures = sorted({row["measure"]: None for row in told}, key=_rank)
    if not measures:
        return ""
    if measures[0].partition("/")[0] in LAST:
        return (
            f"What {words.listed(measures)} say stands below: a network that breaks sooner has other values by any map."
        )
    measure = measures[0]
    rows = [row for row in told if row["measure"] == measure]
    changes = [row for row in rows if row["changed"]]
    name = "How faithful maps are (ROAD)" if measure == "road" else measure.replace("_", " ").capitalize()
    n = between([row["n"] for row in rows])
    if not changes:
        whose = f"the {n} test images that {population}" if population != POPULATIONS["all"] else f"{n} images"
        return f"{name} is not shown to change in {whose}, which does not show that it is the same."
    by_word: dict[str, list[Mapping[str, Any]]] = {}
    for row in changes:
        by_word.setdefault(row["said"].partition(" by ")[0], []).append(row)
    said = [_in_whose(rows, labels) for rows in by_word.values()]
    return f"{'By ROAD maps' if measure == 'road' else f'By {measure} maps'} are {', but '.join(said)}."


def _in_whose(rows: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> str:
    """More faithful by .1 [.05, .15] in 2 of 3 models, most in a (by lrp; a large change): changes of one direction."""
    most, changed = _most(rows), dict.fromkeys(row["model"] for row in rows)
    whose = most["model"]
    if len(labels) > 1:
        whose = f"{len(changed)} of {len(labels)} models{', most in' if len(changed) > 1 else ','} {whose}"
    return f"{most['said']} in {whose} (by {most['attribution']}; a {most['weight']} change)"


def _rank(measure: str) -> int:
    """Where a measure stands in what is said: faithfulness, sparseness, others, and last what confidence moves."""
    name = measure.partition("/")[0]
    return FIRST.index(name) if name in FIRST else len(FIRST) + (1 + LAST.index(name) if name in LAST else 0)


def confidence(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence on what is measured in probability, where that moved more than anything else that is spoken of."""
    changes = [row for row in rows if row["changed"] and row["size"] is not None]
    unspoken = [row for row in changes if not is_told(row["measure"])]
    if not unspoken:
        return []
    most = _most(unspoken)
    largest = max((abs(row["size"]) for row in changes if is_told(row["measure"])), default=0.0)
    if abs(most["size"]) <= largest:
        return []
    what = most["measure"].removesuffix("/probability")
    return [
        f"What moved most is {what} in probability: by {most['attribution']} {words.short(abs(most['difference']))} "
        f"{'higher' if most['difference'] > 0 else 'lower'} in {most['model']}, a {most['weight']} change "
        f"({_sized(most)}). "
        "A network that is less sure has less probability to lose, so this tells of confidence as much as of maps."
    ]


def _whose(some: Sequence[Answers], others: Sequence[Answers]) -> str:
    return words.listed([n.label for n in some]) if len(some) <= NAMED else f"{len(some)} of {len(others)} models"


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
            for _, words in sorted(by_measure.items(), key=lambda item: _rank(item[0]))
            if words
        ]
        if of_name and not phrases:
            phrases = [f"no detectable change on average in {between([row['n'] for row in of_name])} images"]
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
    bounds = "" if row["low"] is None else f" [{words.short(row['low'])}, {words.short(row['high'])}]"
    return f"{words.short(row['mean'])}{bounds}"


def aims(comparisons: Sequence[Mapping[str, Any]], points: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each model and attribution that points at a concept more than the reference: that which grew most.

    Grew by a change in the sense of `compare`, and is above the concept's share of the pixels.
    """
    area = {(row["model"], row["attribution"], f"{row['measure']}/{row['concept']}"): row["area"] for row in points}
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
