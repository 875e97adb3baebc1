"""Images with their labels in a CSV: beside them, or one CSV a split."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sukashi.core import bounded
from sukashi.core.errors import DataError, nearest
from sukashi.data.classes import numbering
from sukashi.data.folders import file_reader, is_image
from sukashi.data.images import Encoded, Found, Source
from sukashi.data.tree import files_in, folders_in, is_hidden, is_plain_split, split_in, split_of, unread

_FILE = ("file", "filename", "file_name", "filepath", "path", "image", "image_id", "image_name", "img", "id")
_LABEL = ("label", "labels", "class", "class_name", "category", "target")
_MAX_BYTES = 2**30


@dataclass(frozen=True)
class _Row:
    """A line of a CSV: the image it names, its label, its split ("" where nothing says one) and its group."""

    image: Path
    label: str
    split: str
    group: str | None


def tables(root: Path) -> list[Path]:
    """The CSV files at the top of a folder and of its folders of splits, without those that no split names if some are
    named so."""
    places = [root, *(folder for folder in folders_in(root) if split_of(folder.name))]
    found = sorted(
        path
        for place in places
        for path in place.iterdir()
        if path.suffix.lower() == ".csv" and not is_hidden(Path(path.name))
    )
    return [path for path in found if split_in(path.relative_to(root))] or found


def listed_images(root: Path, found: Sequence[Path], label: str | None, group: str | None, max_pixels: int) -> Found:
    """Images under `root` that CSV files name, with the class in the column `label`, or in one that is called so.

    A file is named by its path or its last parts, with or without its suffix. Its split is in a column `split`, or the
    CSV's own name or folder or that of the image says it. Classes are numbered by sorted label; an image's id is its
    path inside `root`. Its group is in the column `group`, where there is one.
    """
    images = [path for path in files_in(root) if is_image(path) and not is_hidden(path.relative_to(root))]
    by_name = _by_name(images, root)
    rows = [row for path in found for row in _rows(path, root, by_name, label, group)]
    for image, times in Counter(row.image for row in rows).most_common(1):
        if times > 1:
            raise DataError(f"{found[0]} names {image.relative_to(root)} {times} times: an image has one label")
    if "" in (names := {row.split for row in rows}) and len(names) > 1:
        outside = next(row.image for row in rows if not row.split)
        raise DataError(
            f"{root}: {outside.relative_to(root)} belongs to no split and other images do: give all of them one"
        )
    class_names = tuple(sorted({row.label for row in rows}))
    number = {name: k for k, name in enumerate(class_names)}
    splits: dict[str, tuple[Source, Tensor | None]] = {}
    groups: dict[str, list[str | None]] = {}
    for split in sorted(names):
        inside = sorted((row for row in rows if row.split == split), key=lambda row: row.image)
        paths = [row.image for row in inside]
        groups[split] = [row.group for row in inside]
        ids = tuple(path.relative_to(root).as_posix() for path in paths)
        targets = torch.tensor([number[row.label] for row in inside], dtype=torch.int64)
        splits[split] = (Encoded(ids, ids, file_reader(paths, max_pixels), max_pixels), targets)
    notes = (f"labels are those of {', '.join(path.relative_to(root).as_posix() for path in found)}",)
    left = len(images) - len(rows)
    warned = (f"{left} image(s) of {root.name} left out: no CSV names them",) if left else ()
    has_groups = all(one is not None for of_split in groups.values() for one in of_split)
    known = {split: [one or None for one in of_split] for split, of_split in groups.items()} if has_groups else None
    return Found(splits, class_names, (*notes, *numbering(class_names)), warned, known)


def _by_name(images: Sequence[Path], root: Path) -> Mapping[str, list[Path]]:
    """Images by what may name them: the last parts of their path, with and without the suffix."""
    found: dict[str, list[Path]] = {}
    for path in images:
        parts = path.relative_to(root).parts
        for start in range(len(parts)):
            name = "/".join(parts[start:])
            for key in (name, name.removesuffix(path.suffix)):
                found.setdefault(key, []).append(path)
    return found


def _rows(
    table: Path, root: Path, by_name: Mapping[str, list[Path]], label: str | None, group: str | None
) -> Iterator[_Row]:
    lines = _lines(table)
    columns = next(lines, [])
    file_at, label_at = _column(table, columns, _FILE), _column(table, columns, _LABEL, label)
    split_at = columns.index("split") if "split" in columns else None
    group_at = columns.index(group) if group in columns else None
    for number, line in enumerate(lines, 2):
        if len(line) != len(columns) or not line[label_at]:
            raise DataError(f"line {number} of {table} has no label or other columns than the first: write it again")
        said = split_in(table.relative_to(root)) if split_at is None else split_of(line[split_at])
        if split_at is not None and said is None:
            raise DataError(f"line {number} of {table} has split {line[split_at]!r}: it must be train, test or val")
        image = _named(line[file_at], said, by_name, root, f"line {number} of {table}")
        of_group = None if group_at is None else line[group_at]
        yield _Row(image, line[label_at], said or _split_around(image, root), of_group)


def _lines(table: Path) -> Iterator[list[str]]:
    """The cells of each line, without spaces around them."""
    try:
        text = bounded.read(table, _MAX_BYTES).decode("utf-8-sig")
        first = text.partition("\n")[0]
        reader = csv.reader(io.StringIO(text), delimiter=max(",;\t", key=first.count), strict=True)
        yield from ([cell.strip() for cell in line] for line in reader if line)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{table} can't be read as CSV in UTF-8 ({reason}): write it again") from None


def _column(table: Path, columns: Sequence[str], known: Sequence[str], asked: str | None = None) -> int:
    """Where the column is that was asked for, or the one of those known."""
    if asked is not None and columns.count(asked) != 1:
        raise DataError(f"{table} has no one column {asked!r}{nearest(asked, columns)}")
    at = [i for i, column in enumerate(columns) if column.casefold() in known] if asked is None else []
    if asked is None and len(at) != 1:
        remedy = "" if known is _FILE else ", or give `label=COLUMN`"
        raise DataError(
            f"{table} has the columns {', '.join(columns) or 'none'}: one must be called {', '.join(known)}{remedy}"
        )
    return columns.index(asked) if asked is not None else at[0]


def _named(said: str, split: str | None, by_name: Mapping[str, list[Path]], root: Path, where: str) -> Path:
    """The one image of that name, which is in the folder of the split where several are called so."""
    found = by_name.get(said.replace("\\", "/").removeprefix("./"), [])
    if len(found) > 1:
        exact = [path for path in found if path.relative_to(root).as_posix() == said]
        found = exact or [path for path in found if _split_around(path, root) == (split or "")]
    if len(found) != 1:
        if reasons := unread([Path(said)]):
            raise DataError(f"{where} names {said!r}: {reasons[0]}, and name that one")
        many = f"{len(found)} images" if found else "no image"
        raise DataError(f"{where} names {said!r}, and {many} under {root} is called so: correct the name")
    return found[0]


def _split_around(image: Path, root: Path) -> str:
    """The split whose folder an image is in, or ""."""
    folders = image.relative_to(root).parts[:-1]
    return next((split_of(name) or "" for name in folders if is_plain_split(name)), "")
