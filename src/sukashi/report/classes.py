"""What two networks make of each class: whom they find, whom they take for another, how sure they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from numpy.typing import NDArray

from sukashi.core import stats
from sukashi.measures import classwise
from sukashi.report import words

CONFUSED = 12  # classes at most whose confusion is shown cell by cell
HEADED = 3  # classes at most that a heading names
LISTED = 10  # rows of a terminal's table


def compared(arrays: Mapping[str, NDArray[Any]], names: Sequence[str], networks: Sequence[str]) -> dict[str, Any]:
    """Two networks on the same images, class by class.

    `arrays` hold "target" and for each of the two `networks` "NAME answer", "NAME correct", "NAME confidence" and, of
    few classes, "NAME probability". Gives

    rows        of each class with two images or more, the largest loss first: name, n, fell (see `classwise.changes`),
                and of each network sensitivity, specificity, auc: mean, low, high, n, or None
    accuracy_change   of all images, paired: mean, low, high
    balanced_accuracy, overconfidence, calibration_error, confusion   of each network
    """
    target = arrays["target"]
    first, second = (arrays[f"{name} correct"] for name in networks)
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
            "name": names[change.number],
            "n": change.n_images,
            "fell": change.fell,
            **{
                name: {
                    **{what: _plain(of[change.number]) for what, of in shares[name].items()},
                    "auc": _plain(areas[name][change.number]),
                }
                for name in networks
            },
        }
        for change in classwise.changes(first[None], second[None], target, len(names))
    ]
    change = stats.paired([second.astype(float) - first])
    calibration = {
        name: classwise.calibration(arrays[f"{name} confidence"], arrays[f"{name} correct"]) for name in networks
    }
    return {
        "rows": rows,
        "accuracy_change": _plain(change),
        "balanced_accuracy": {
            name: _plain(classwise.balanced_accuracy(arrays[f"{name} correct"], target, len(names)))
            for name in networks
        },
        "overconfidence": {name: _plain(over) for name, (over, _) in calibration.items()},
        "calibration_error": {name: error for name, (_, error) in calibration.items()},
        "confusion": {name: table.tolist() for name, table in tables.items()} if len(names) <= CONFUSED else {},
    }


def fallen(rows: Sequence[Mapping[str, Any]], networks: Sequence[str]) -> str:
    """Covid-19 falls from 88 to 0%, for a heading; empty where no class fell."""
    first, second = networks
    return falls(
        [(row["name"], *(row[name]["sensitivity"]["mean"] for name in (first, second))) for row in rows if row["fell"]]
    )


def falls(classes: Sequence[tuple[str, float, float]]) -> str:
    """Covid-19 falls from 88 to 0%: what became of classes, (name, share before, share after); empty for none."""
    told = [
        f"{words.of_class(name)} falls from {100 * before:.0f} to {100 * after:.0f}%" for name, before, after in classes
    ]
    more = [f"{words.several(len(told) - HEADED, 'more class', 'more classes')} fall"] if len(told) > HEADED else []
    return words.listed([*told[:HEADED], *more]) if told else ""


def overall(found: Mapping[str, Any], networks: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Rows of what is said of all classes together: what it is called, and how it is printed for each network."""

    def bounded(of: Mapping[str, Any] | None, scale: float = 100) -> str:
        if of is None:
            return "–"
        return f"{scale * of['mean']:.1f} ({scale * of['low']:.1f} to {scale * of['high']:.1f})"

    rows = [("balanced accuracy, %", [bounded(found["balanced_accuracy"][name]) for name in networks])]
    rows.append(("confidence minus accuracy, points", [bounded(found["overconfidence"][name]) for name in networks]))
    rows.append(
        ("calibration error (ECE), points", [f"{100 * found['calibration_error'][name]:.1f}" for name in networks])
    )
    return rows


def text(found: Mapping[str, Any], networks: Sequence[str]) -> str:
    """The classes that lost most as a table, and below it what is said of all together."""
    header = [
        "class",
        "images",
        *(f"{what}, {name}" for what in ("sensitivity", "specificity", "AUC") for name in networks),
    ]
    body = [
        [
            *(row["name"] + (" !" if row["fell"] else ""), f"{row['n']:,}"),
            *(
                "–" if row[name][what] is None else f"{row[name][what]['mean']:.3f}"
                for what in ("sensitivity", "specificity", "auc")
                for name in networks
            ),
        ]
        for row in found["rows"][:LISTED]
    ]
    rest = len(found["rows"]) - LISTED
    more = [f"... and {words.several(rest, 'class', 'classes')} that lost less"] if rest > 0 else []
    return "\n".join([words.table(header, body), *more])


def _plain(found: stats.Interval | None) -> dict[str, Any] | None:
    return None if found is None else asdict(found)
