"""How numbers and lists are written for people."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sukashi.core.experiment import Result

# Cohen's (1988) names for a difference, in standard deviations of the reference's values over images.
SIZES = {0.2: "slight", 0.5: "small", 0.8: "moderate", math.inf: "large"}


def percent(value: float) -> str:
    """0.123 is 12.3%."""
    return f"{100 * value:z.1f}%"


def number(value: float, digits: int = 1, *, sign: bool = False) -> str:
    """0.04 is 0.0 and so is -0.04, or +0.0 with its sign."""
    return f"{value:{'+' if sign else ''}z.{digits}f}"


def printed(value: float | None, form: str) -> str:
    """A figure for people: 270 k, 81.6 M, 1.1 MB; milliseconds in three digits, as 0.0531, 5.31 or 1,234."""
    if value is None:
        return "–"
    if form == "percent":
        return percent(value)
    if form == "ms":
        return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f}" if value > 0 else "0"
    prefixes = iter(("", "k", "M", "G", "T", "P"))
    prefix = next(prefixes)
    while value >= 999.5:
        value, prefix = value / 1000, next(prefixes)
    return f"{value:.3g} {prefix}{'B' if form == 'bytes' else ''}".rstrip()


def span(of: Mapping[str, Any], scale: float = 1, *, sign: bool = False) -> str:
    """A mean with its bounds: +1.3 (-0.2 to +2.8)."""
    mean, low, high = (number(scale * of[name], sign=sign) for name in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def spread(of: Mapping[str, Any], scale: float = 1, *, sign: bool = False) -> str:
    """What bounds a mean over seeds: 81.2 to 84.0, or of two seeds, which bound too little, each: 81.2, 84.0."""
    if len(of.get("each", ())) == 2:
        return ", ".join(number(scale * seed, sign=sign) for seed in of["each"])
    return f"{number(scale * of['low'], sign=sign)} to {number(scale * of['high'], sign=sign)}"


def short(value: float, digits: int = 3) -> str:
    """.021, -.004, 10.200."""
    whole, _, part = f"{round(value, digits) + 0.0:.{digits}f}".partition(".")  # no -.000
    return f"{whole.removesuffix('0') if abs(value) < 1 else whole}.{part}"


def weight(size: float | None) -> str:
    """What a difference is called, of so many standard deviations."""
    # Beside values that are all the same any difference is large.
    return next((word for least, word in SIZES.items() if size is not None and abs(size) < least), "large")


def p_value(p: float | None) -> str:
    """A p-value in two digits."""
    if p is None:
        return "–"
    return "< 0.0001" if p < 0.0001 else f"{p:.2g}"


def points(share: float) -> str:
    """0.01 is 1 point, 0.025 is 2.5 points."""
    return f"{100 * share:g} point{'' if share == 0.01 else 's'}"


def several(n: int, noun: str, plural: str = "") -> str:
    """1 seed, 2 seeds, 1,000 images, 3 criteria."""
    return f"{n:,} {noun if n == 1 else plural or noun + 's'}"


def between(counts: Sequence[int]) -> str:
    """480 to 492, or 500 where all are."""
    least, most = min(counts), max(counts)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def of_class(name: str) -> str:
    """A class by its name, and one whose name is a number as what it is: class 3."""
    return f"class {name}" if name.isdigit() else name


def seeds(n: int) -> str:
    """1 seed, 2 seeds."""
    return several(n, "seed")


def listed(names: Sequence[str], last: str = "and") -> str:
    """One, two and three."""
    return f" {last} ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def flat(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every setting that is set, as (dotted name, text); an empty list is not."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flat(inner, f"{path}.{key}" if path else key)
    elif value not in (None, []):
        yield path, ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def duration(seconds: float) -> str:
    """40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Rows of text under a header, in columns as wide as they need."""
    return rows([header, *body])


def by_reason(refused: Mapping[str, str]) -> dict[str, list[str]]:
    """{reason: who was refused for it}, that none is said twice."""
    found: dict[str, list[str]] = {}
    for name, reason in refused.items():
        found.setdefault(reason, []).append(name)
    return found


def rows(cells: Sequence[Sequence[str]]) -> str:
    """Rows of text in columns as wide as they need."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
    return "\n".join(line.rstrip() for line in lines)


def where(result: Result) -> list[str]:
    """The last lines of what a command prints: whether anything was done, and where the page is."""
    done = ["", f"{result.out} was finished already: nothing was done"] if result.finished else []
    return [*done, *(f"note: {note}" for note in mixed(result.versions)), "", f"Report: {result.report}"]


def mixed(versions: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence where trials of one folder were done by different versions: by which, as far as these differ."""
    if len(versions) < 2:
        return []
    differ = [name for name in versions[0] if name != "trials" and len({of.get(name) for of in versions}) > 1]
    told = [f"{of['trials']} by {', '.join(f'{name} {of.get(name)}' for name in differ)}" for of in versions]
    return [f"trials of this folder were done by different versions: {listed(told)}; another folder makes them alike"]
