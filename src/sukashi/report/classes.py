"""What networks make of each class: whom they find, whom they take for another, how sure they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from numpy.typing import NDArray

from sukashi.core import stats
from sukashi.measures import classwise
from sukashi.report import words

CONFUSED = 12  # classes at most whose confusion is shown cell by cell
HEADED = 3  # classes at most that a heading names
LISTED = 10  # rows of a terminal's table
SHARES = {"sensitivity": "sensitivity", "specificity": "specificity", "auc": "AUC"}
FELL = "sensitivity fell by ten points or more, and is shown to have fallen (95% for all classes together)"


def by_class(arrays: Mapping[str, NDArray[Any]], names: Sequence[str], networks: Sequence[str]) -> dict[str, Any]:
    """One network, or two on the same images, class by class.

    `arrays` hold "target" and for each of the `networks` "NAME answer", "NAME correct", "NAME confidence" and, of
    few classes, "NAME probability". Gives

    rows        of each class with two images or more, the largest loss first: name, n, of each network sensitivity,
                specificity, auc: mean, low, high, n, or None; of two the `change` of sensitivity, paired, and whether
                it `fell`, see `classwise.changes`
    accuracy_change   of two networks, of all images, paired: mean, low, high, else None
    one_answer  of each network the class that it takes every image for, or None
    balanced_accuracy, overconfidence, calibration_error, confusion   of each network; balanced accuracy of one answer
                has no bounds, for it is 1 by the number of classes whatever the images
    """
    target, two = arrays["target"], len(networks) > 1
    first, last = (arrays[f"{name} correct"] for name in (networks[0], networks[-1]))
    tables = {name: classwise.confusion(arrays[f"{name} answer"], target, len(names)) for name in networks}
    areas = {
        name: classwise.auc(arrays[f"{name} probability"], target, len(names))
        if f"{name} probability" in arrays
        else [None] * len(names)
        for name in networks
    }
    shares = {
        name: {"sensitivity": classwise.sensitivity(table), "specificity": classwise.specificity(table)}
        for name, table in tables.items()
    }
    rows = [
        {
            "name": names[of.number],
            "n": of.n_images,
            **({"change": _plain(of.change), "fell": of.fell} if two else {}),
            **{
                name: {
                    **{what: _plain(found[of.number]) for what, found in shares[name].items()},
                    "auc": _plain(areas[name][of.number]),
                }
                for name in networks
            },
        }
        for of in classwise.changes(first[None], last[None], target, len(names))
    ]
    one_answer = {name: _one_answer(arrays[f"{name} answer"], names) for name in networks}
    balanced = {name: classwise.balanced_accuracy(arrays[f"{name} correct"], target, len(names)) for name in networks}
    calibration = {
        name: classwise.calibration(arrays[f"{name} confidence"], arrays[f"{name} correct"]) for name in networks
    }
    return {
        "rows": rows,
        "accuracy_change": _plain(stats.paired([last.astype(int) - first])) if two else None,
        "one_answer": one_answer,
        "balanced_accuracy": {
            name: _plain(of if one_answer[name] is None else replace(of, low=None, high=None))
            for name, of in balanced.items()
        },
        "overconfidence": {name: _plain(over) for name, (over, _) in calibration.items()},
        "calibration_error": {name: error for name, (_, error) in calibration.items()},
        "confusion": {name: table.tolist() for name, table in tables.items()} if len(names) <= CONFUSED else {},
    }


def _one_answer(answer: NDArray[Any], names: Sequence[str]) -> str | None:
    """The class that a network takes every image for; None where it tells any apart."""
    if (answer != answer[0]).any():
        return None
    return names[answer[0]] if answer[0] >= 0 else "a class that the data does not have"


def fallen(rows: Sequence[Mapping[str, Any]], networks: Sequence[str]) -> str:
    """Covid-19 falls from 88 to 0%, for a heading; empty where no class fell."""
    first, second = networks
    return falls(
        [(row["name"], *(row[name]["sensitivity"]["mean"] for name in (first, second))) for row in rows if row["fell"]]
    )


def too_small(rows: Sequence[Mapping[str, Any]], margin: float = classwise.FALL) -> str:
    """Which classes have too few images to show that they lose at most `margin`; empty where none has.

    `rows` have the name of a class and the number `n` of its images.
    """
    least = stats.least_images(margin)
    small = [f"{words.of_class(row['name'])} ({row['n']:,})" for row in rows if row["n"] < least]
    if not small:
        return ""
    more = [words.several(len(small) - HEADED, "more class", "more classes")] if len(small) > HEADED else []
    return (
        f"Too few images to show that a class loses at most {words.points(margin)}, even where all answers are equal: "
        f"{words.listed([*small[:HEADED], *more])}; it takes {least:,}."
    )


def falls(classes: Sequence[tuple[str, float, float]]) -> str:
    """Covid-19 falls from 88 to 0%: what became of classes, (name, share before, share after); empty for none."""
    told = [
        f"{words.of_class(name)} falls from {100 * before:.0f} to {100 * after:.0f}%" for name, before, after in classes
    ]
    more = [words.several(len(told) - HEADED, "more class falls", "more classes fall")] if len(told) > HEADED else []
    return words.listed([*told[:HEADED], *more]) if told else ""


def overall(found: Mapping[str, Any], networks: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Rows of what is said of all classes together: what it is called, and how it is printed for each network."""

    def bounded(of: Mapping[str, Any]) -> str:
        return words.span(of, 100) if of["low"] is not None else f"{100 * of['mean']:.1f} (one answer for all)"

    rows = [("balanced accuracy, %", [bounded(found["balanced_accuracy"][name]) for name in networks])]
    rows.append(("confidence minus accuracy, points", [bounded(found["overconfidence"][name]) for name in networks]))
    rows.append(
        ("calibration error (ECE), points", [f"{100 * found['calibration_error'][name]:.1f}" for name in networks])
    )
    return rows


def text(found: Mapping[str, Any], networks: Sequence[str]) -> str:
    """The classes that lost most as a table, and below it what is said of all together."""

    def share(of: Mapping[str, Any] | None) -> str:
        return "–" if of is None else f"{of['mean']:.3f}"

    def columns(row: Mapping[str, Any], what: str) -> list[str]:
        return [share(row[name][what]) for name in networks]

    two = len(networks) > 1
    heads = [[f"{what}, {name}" if two else what for name in networks] for what in SHARES.values()]
    header = ["class", "images", *heads[0], *(["change, points"] if two else []), *heads[1], *heads[2]]
    body = []
    for row in found["rows"][:LISTED]:
        of = row.get("change")
        change = [] if of is None else [words.span(of, 100, sign=True)]
        mark = " !" if two and row["fell"] else ""
        first, *others = (columns(row, what) for what in SHARES)
        body.append([row["name"] + mark, f"{row['n']:,}", *first, *change, *others[0], *others[1]])
    rest = len(found["rows"]) - LISTED
    said = [f"... and {words.several(rest, 'class', 'classes')} that lost less"] if two and rest > 0 else []
    said += [f"... and {words.several(rest, 'class', 'classes')} more"] if not two and rest > 0 else []
    said += [f"! {FELL}"] if two and any(row["fell"] for row in found["rows"]) else []
    said += list(filter(None, [too_small(found["rows"])])) if two else []
    return "\n".join([words.table(header, body), *said])


def _plain(found: stats.Interval | None) -> dict[str, Any] | None:
    return None if found is None else asdict(found)
