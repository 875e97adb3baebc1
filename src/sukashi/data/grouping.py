"""Which images belong together, as those of a patient, so that no split tears them apart."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import combinations

from sukashi.core.errors import DataError, UsageError
from sukashi.data.images import Found
from sukashi.data.splits import Split

_SHOWN = 3


def groups_of(name: str, found: Found, asked: str) -> dict[str, str]:
    """The group of each image by its id: the value in the column `asked`, or what that pattern finds in its name.

    Raises UsageError for what is neither, DataError where images have no group.
    """
    by_id: dict[str, str | None] = {}
    if found.groups is not None:
        for split, (source, _) in found.splits.items():
            by_id |= dict(zip(source.ids, found.groups[split], strict=True))
    else:
        pattern = _pattern(name, asked)
        for source, _ in found.splits.values():
            named = getattr(source, "names", source.ids)
            matches = (pattern.search(text) for text in named)
            by_id |= {i: match and match[1] for i, match in zip(source.ids, matches, strict=True)}
    alone = [image_id for image_id, group in by_id.items() if not group]
    if alone:
        few = ", ".join(alone[:_SHOWN]) + (", ..." if len(alone) > _SHOWN else "")
        raise DataError(
            f"{len(alone)} of {len(by_id)} images of {name} have no group by {asked!r} ({few}): every image needs one, "
            "so correct the column or the pattern, or take these images away"
        )
    return {image_id: group for image_id, group in by_id.items() if group}


def _pattern(name: str, asked: str) -> re.Pattern[str]:
    remedy = r"give the name of a column of Parquet or CSV, or a pattern such as 'patient(\d+)_'"
    try:
        pattern = re.compile(asked)
    except re.error as error:
        raise UsageError(f"`groups={asked!r}` is no column of {name} and no pattern ({error}): {remedy}") from None
    if pattern.groups != 1:
        raise UsageError(
            f"`groups={asked!r}` is no column of {name}, and a pattern must have one group in brackets, this has "
            f"{pattern.groups}: {remedy}"
        )
    return pattern


def shared(splits: Mapping[str, Split]) -> list[str]:
    """A warning for each pair of splits that have images of the same groups."""
    told = []
    for (first, a), (second, b) in combinations(splits.items(), 2):
        both = set(a.groups or ()) & set(b.groups or ())
        if both:
            n = [sum(group in both for group in split.groups or ()) for split in (a, b)]
            told.append(
                f"{len(both)} group{'s' if len(both) > 1 else ''} ({', '.join(sorted(both)[:_SHOWN])}"
                f"{', ...' if len(both) > _SHOWN else ''}) are in {first} ({n[0]} image{'s' * (n[0] != 1)}) "
                f"and in {second} ({n[1]}): accuracy can flatter"
            )
    return told
