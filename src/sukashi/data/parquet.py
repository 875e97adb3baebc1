"""Parquet files of images with a class number, a class name or an encoded map of classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from sukashi.core import bounded
from sukashi.core.bounded import from_json
from sukashi.core.errors import DataError, nearest
from sukashi.data.classes import numbering
from sukashi.data.images import Encoded, Found, Source, mask_of, numbered
from sukashi.data.masks import boxed, with_masks
from sukashi.data.tree import files_in, is_hidden, split_in

_VOID = ("void", "unlabeled", "unlabelled", "ignore")
_MAX_BYTES = 2**40


@dataclass(frozen=True)
class _Columns:
    """Which columns of a file are read, and what its metadata calls the classes (nothing where it calls them so).

    `places` are those that say where the evidence is, beside labels.
    """

    image: str
    target: str
    is_mask: bool
    class_names: tuple[str, ...]
    places: tuple[str, ...] = ()

    def __str__(self) -> str:
        named = f"the classes {', '.join(self.class_names)}" if self.class_names else "no class names"
        words = ", ".join((self.image, self.target, *self.places))
        return f"the columns {words} and {named}"


def shards(root: Path) -> list[Path]:
    """The Parquet files under a folder that are not hidden, in the order of their names."""
    return [
        path
        for path in files_in(root)
        if path.suffix.lower() == ".parquet" and not path.is_dir() and not is_hidden(path.relative_to(root))
    ]


def parquet(root: Path, paths: Sequence[Path], label: str | None, group: str | None, max_pixels: int) -> Found:
    """Columns `image` (bytes, or a struct of bytes and path) and `label` (number or name) or `mask` (encoded map).

    `label` names another column of labels. Beside labels a `mask` (encoded image, other than 0 inside) or `box` or
    `boxes` (x0, y0, x1, y1 in pixels, or a list of such) says where the evidence is. Class names are in
    the Hugging Face metadata (label) or under `classes` (mask); labels that are text are classes in their sorted order.
    A row's id is its split and number, with the files of a split joined in the order of their names. Its group is in
    the column `group`, where there is one.
    """
    tables: dict[str, list[pa.Table]] = {}
    columns: dict[_Columns, Path] = {}
    for path in paths:
        file = _opened(path)
        chosen = _columns(file.schema_arrow, label, path)
        columns.setdefault(chosen, path)
        tables.setdefault(_split_of(path, root), []).append(_table(file, chosen, group, path))
    if len(columns) > 1:
        (first, a), (second, b) = list(columns.items())[:2]
        raise DataError(f"{a} has {first}, {b} has {second}: all files must have the same")
    chosen = next(iter(columns))
    whole = {split: pa.concat_tables(parts, promote_options="permissive") for split, parts in tables.items()}
    groups = _groups(whole)
    if chosen.is_mask:
        return replace(_masked(whole, chosen.class_names, max_pixels), groups=groups)
    targets, class_names, notes = _classes(whole, chosen)
    splits: dict[str, tuple[Source, Tensor | None]] = {
        split: (_encoded(split, table, max_pixels), targets[split]) for split, table in whole.items()
    }
    found = Found(splits, class_names, notes, groups=groups)
    located = {concept: _located(whole, concept, max_pixels) for concept in chosen.places}
    return with_masks(found, located) if located else found


def _located(whole: Mapping[str, pa.Table], column: str, max_pixels: int) -> Callable[[str], Image.Image | None]:
    """The mask of an image, by its id, out of a column of masks or of boxes."""
    rows = {
        image_id: (table, row)
        for split, table in whole.items()
        for row, image_id in enumerate(numbered(split, len(table)))
    }

    def of(image_id: str) -> Image.Image | None:
        table, row = rows[image_id]
        if (said := table[column][row].as_py()) is None or not len(said):
            return None
        if column == "mask":
            return mask_of(said, max_pixels)
        boxes = said if isinstance(said[0], list) else [said]
        image = table["image"]
        return boxed(boxes, Encoded((image_id,), (image_id,), lambda _: image[row].as_py() or b"", max_pixels).size(0))

    return of


def _groups(whole: Mapping[str, pa.Table]) -> dict[str, list[str | None]] | None:
    """The group of each image, or None where files have no such column."""
    if not all("group" in table.column_names for table in whole.values()):
        return None
    return {
        split: [None if value is None or value == "" else str(value) for value in table["group"].to_pylist()]
        for split, table in whole.items()
    }


def _masked(whole: Mapping[str, pa.Table], class_names: tuple[str, ...], max_pixels: int) -> Found:
    # The last class is void where it is called so; the numbers of those before it stay what they are.
    has_void = class_names[-1].lower() in _VOID
    void = len(class_names) - 1 if has_void else 255
    class_names = class_names[: len(class_names) - has_void]
    legal = frozenset(range(len(class_names))) | {void}
    return Found(
        {split: (_encoded(split, table, max_pixels, legal), None) for split, table in whole.items()},
        class_names,
        (f"pixels of {void} in a mask belong to no class and count nowhere",),
        ignore_index=void,
    )


def _opened(path: Path) -> pq.ParquetFile:
    """The file, of which the schema is read. Raises DataError for what is none, and for more rows than bytes."""
    try:
        bounded.check_file(path, _MAX_BYTES)
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path} is no readable Parquet ({reason}): write it again") from None
    n_rows, n_bytes = file.metadata.num_rows, path.stat().st_size
    if n_rows > n_bytes:  # what a few bytes can say, no memory can hold
        raise DataError(f"{path} claims {n_rows:,} rows in {n_bytes:,} bytes, fewer than images take: write it again")
    return file


def _split_of(path: Path, root: Path) -> str:
    """train, test or val, by a word of the file's name or of a folder's: train.parquet, test-00000.parquet."""
    split = split_in(path.relative_to(root) if root.is_dir() else Path(path.name))
    if split is None:
        raise DataError(f"{path} belongs to no split: its name, or its folder's, must say train, val or test")
    return split


def _metadata(schema: pa.Schema, path: Path) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
    """Class names of each label column, and those of the mask, as far as the schema's metadata tells."""
    metadata = schema.metadata or {}
    try:
        features = from_json(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        labels = {
            name: _names(feature["names"])
            for name, feature in features.items()
            if feature.get("_type") == "ClassLabel" and "names" in feature
        }
        return labels, _names(from_json(metadata.get(b"classes", b"[]")))
    except (ValueError, AttributeError, TypeError) as error:
        raise DataError(f"the metadata of {path} is not as Hugging Face writes it ({error}): write it again") from None


def _names(given: Any) -> tuple[str, ...]:
    """Class names as text: some files hold numbers."""
    if not isinstance(given, list) or not all(isinstance(name, str | int | float) for name in given):
        raise TypeError("class names are no list of names")
    return tuple(map(str, given))


def _columns(schema: pa.Schema, label: str | None, path: Path) -> _Columns:
    """The columns to read. Raises DataError where it is not clear which."""
    label_names, mask_names = _metadata(schema, path)
    columns = schema.names
    for name, times in Counter(columns).most_common(1):
        if times > 1:
            raise DataError(f"{path} has {times} columns {name!r}: drop or rename the others")
    images = [name for name in ("image", "img") if name in columns]
    if label is not None and label not in columns:
        raise DataError(f"{path} has no column {label!r}{nearest(label, columns)}")
    named = [name for name in columns if name in label_names]
    labels = [label] if label else named or [name for name in ("label", "labels") if name in columns]
    has_mask = "mask" in columns and label is None and not labels
    if len(images) != 1 or len(labels) + has_mask != 1:
        remedy = "drop or rename the others"
        if len(images) == 1 and not has_mask:
            remedy = f"give `label` with one of {', '.join(labels or [name for name in columns if name not in images])}"
        raise DataError(
            f"{path} has columns {', '.join(columns)}: one 'image' and either one 'label' or a 'mask' are needed, "
            f"{remedy}"
        )
    if not has_mask:
        places = tuple(name for name in ("mask", "box", "boxes") if name in columns and name != labels[0])
        return _Columns(images[0], labels[0], False, label_names.get(labels[0], ()), places)
    if not mask_names:
        raise DataError(f"{path} has masks and no class names: put a JSON list 'classes' into the schema's metadata")
    return _Columns(images[0], "mask", True, mask_names)


def _table(file: pq.ParquetFile, columns: _Columns, group: str | None, path: Path) -> pa.Table:
    """The columns `image`, `path` (what an image was called), `target` and `group`, whatever way they are written."""
    try:
        has_group = group in file.schema_arrow.names
        more = [*columns.places, *([group] if has_group else [])]
        table = file.read(columns=list(dict.fromkeys([columns.image, columns.target, *more])))
        image, target = _plain(table[columns.image]), _plain(table[columns.target])
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path} is no readable Parquet ({error}): write it again") from None
    called = pa.nulls(len(table), pa.string())
    if pa.types.is_struct(image.type) and image.type.get_field_index("path") >= 0:
        called = pc.struct_field(image, "path").cast(pa.string())
    if columns.is_mask:
        target = _bytes(target, columns.target, path)
    places = {name: _place(_plain(table[name]), name, path) for name in columns.places}
    found = {"image": _bytes(image, columns.image, path), "path": called, "target": target, **places}
    return pa.table(found | ({"group": _plain(table[group])} if has_group else {}))


def _place(column: pa.ChunkedArray, name: str, path: Path) -> pa.ChunkedArray:
    """A column of encoded masks, or of boxes as numbers in lists."""
    if column.null_count == len(column):
        return pa.chunked_array([pa.nulls(len(column), pa.large_binary())])
    if name == "mask":
        return _bytes(column, name, path)
    kind, depth = column.type, 0
    while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        kind, depth = kind.value_type, depth + 1
    if depth not in (1, 2) or not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise DataError(f"{name} of {path} is {column.type}: give x0, y0, x1, y1 in pixels, or a list of such boxes")
    return column.cast(pa.list_(pa.list_(pa.float64()) if depth == 2 else pa.float64()))


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column without a dictionary of its values."""
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _bytes(column: pa.ChunkedArray, name: str, path: Path) -> pa.ChunkedArray:
    """The encoded images of a column: its own, or the field `bytes` of its struct."""
    if pa.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
        column = pc.struct_field(column, "bytes")
    kinds = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_null)
    if not any(is_kind(column.type) for is_kind in kinds):
        raise DataError(
            f"{name} of {path} is {column.type}, not encoded images: put the bytes of each image file there (paths and "
            "pixels are not read)"
        )
    if len(column) and column.null_count == len(column):
        raise DataError(f"{name} of {path} holds no bytes, at most paths: put the bytes of each image file there")
    return column.cast(pa.large_binary())


def _classes(
    whole: Mapping[str, pa.Table], columns: _Columns
) -> tuple[dict[str, Tensor], tuple[str, ...], tuple[str, ...]]:
    """Class numbers (N,) of each split, what classes are called, and what is to be noted of that."""
    kinds = {str(table["target"].type) for table in whole.values()}
    if all(_is_text(table["target"].type) for table in whole.values()):
        return _of_text({split: table["target"].cast(pa.large_string()) for split, table in whole.items()})
    for split, table in whole.items():
        if not pa.types.is_integer(table["target"].type):
            raise DataError(
                f"labels of {split} are {' and '.join(sorted(kinds))}, not class numbers or names: store integers and "
                "the names beside them, or the names"
            )
    n_rows = sum(map(len, whole.values()))
    n_classes = len(columns.class_names)
    targets = {split: _class_numbers(split, table["target"], n_classes, n_rows) for split, table in whole.items()}
    if n_classes:
        return targets, columns.class_names, ()
    counted = range(1 + max((int(numbers.max()) for numbers in targets.values() if len(numbers)), default=-1))
    notes = ("the files hold no class names: classes are called by their numbers",)
    return targets, tuple(map(str, counted)), notes


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_boolean(kind))


def _of_text(
    labels: Mapping[str, pa.ChunkedArray],
) -> tuple[dict[str, Tensor], tuple[str, ...], tuple[str, ...]]:
    for split, column in labels.items():
        if column.null_count:
            raise DataError(f"{column.null_count} labels of {split} are missing: every image needs one")
    names = sorted({name for column in labels.values() for name in pc.unique(column).to_pylist()})
    order = pa.array(names, pa.large_string())
    targets = {
        split: torch.tensor(pc.index_in(column, order).to_numpy(), dtype=torch.int64)
        for split, column in labels.items()
    }
    return targets, tuple(names), ("labels are text: classes are numbered by sorted label", *numbering(names))


def _class_numbers(split: str, column: pa.ChunkedArray, n_classes: int, n_rows: int) -> Tensor:
    """Checked class numbers (N,); without names there are at most as many classes as rows, each with an image."""
    numbers = np.array(pc.fill_null(column, 0))
    missing = np.array(pc.is_null(column))
    most = n_classes or n_rows
    legal = ~missing & (numbers >= 0) & (numbers < most)
    if not legal.all():
        row = int(np.flatnonzero(~legal)[0])
        first = "missing" if missing[row] else int(numbers[row])
        raise DataError(
            f"{int((~legal).sum())} labels of {split} are no class numbers (the first is {first}, "
            f"row {row}): they must lie in [0, {n_classes or 'K'})"
        )
    return torch.from_numpy(numbers.astype(np.int64))


def _encoded(split: str, table: pa.Table, max_pixels: int, legal: frozenset[int] | None = None) -> Encoded:
    def reader(column: str) -> Callable[[int], bytes]:
        cells = table[column]
        return lambda row: cells[row].as_py() or b""

    ids = numbered(split, len(table))
    names = [path or image_id for path, image_id in zip(table["path"].to_pylist(), ids, strict=True)]
    mask = None if legal is None else reader("target")
    return Encoded(ids, names, reader("image"), max_pixels, mask, legal or frozenset())
