"""Which images belong together, as those of a patient, so that no split tears them apart."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from itertools import combinations

from sukashi.core.errors import DataError, UsageError
from sukashi.data.images import Found
from sukashi.data.splits import Split

_SHOWN = 3
_FEWEST = 10  # groups by names alone, below which nothing is said
_NUMBERED = re.compile(r"([^/]*\d)[_-]\d+(?:\.\w+)?$")
GROUPS = r"([^/]*\d(?=[_-]\d+(?:\.|$))|[^/]+)[^/]*$"  # what comes before the last number, or else all of the name


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


def unnoticed(found: Found) -> tuple[list[str], list[str]]:
    """Notes and warnings on images whose names number several of one, as 00012_003 does of a patient: where what comes
    before the last number ends in a number itself, many have it in common, and it is no name of a class.
    """
    split_of: dict[str, Counter[str]] = {}
    example: dict[str, str] = {}
    n_images = 0
    for split, (source, _) in found.splits.items():
        named = getattr(source, "names", source.ids)
        n_images += len(named)
        for text in named:
            match = _NUMBERED.search(text)
            if match:
                split_of.setdefault(match[1], Counter())[split] += 1
                example.setdefault(match[1], text)
    several = {group: of for group, of in split_of.items() if of.total() > 1}
    n_several = sum(of.total() for of in several.values())
    if len(several) < max(_FEWEST, 2 * len(found.class_names)) or n_several < n_images / 10:
        return [], []
    name = example[max(several, key=lambda group: several[group].total())]
    said = (
        f"names such as {name.rsplit('/', 1)[-1]!r} look like several images of one patient or scene: {n_several:,} of "
        f"{n_images:,} images are of {len(several):,}"
    )
    remedy = f"; if so, `groups={GROUPS!r}` keeps them together where images are held out"
    torn = {group: of for group, of in several.items() if len(of) > 1}
    if len(found.splits) == 1:
        return [], [f"{said}, and test images are held out one by one: accuracy can flatter{remedy}"]
    if not torn:
        return [said + remedy], []
    n = sum((of for of in torn.values()), Counter())
    where = " and ".join(f"in {split} ({n[split]:,} images)" for split in sorted(n, key=lambda split: split != "train"))
    return [], [f"{said}, and {len(torn):,} of these are {where}: accuracy can flatter{remedy}"]


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
