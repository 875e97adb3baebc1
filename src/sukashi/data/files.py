"""Folders of images and of Parquet files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from sukashi.core.errors import DataError
from sukashi.data.images import SUFFIXES, Encoded, Found, Source, numbered

_SPLITS = {"train": "train", "test": "test", "val": "val", "valid": "val", "validation": "val"}
_VOID = ("void", "unlabeled", "unlabelled", "ignore")


# --- image folders --------------------------------------------------------------------------------------------------


def image_folder(root: Path, max_pixels: int) -> Found:
    """root/train/CLASS/*.png with root/test or root/val beside it, or root/CLASS/*.png alone.

    Classes are numbered by sorted folder name; an image's id is its path inside `root`.
    """
    folders = _visible_folders(root)
    found = {_SPLITS[folder.name]: folder for folder in folders if folder.name in _SPLITS}
    if found and len(found) < len(folders):
        raise DataError(
            f"{root} holds {', '.join(folder.name for folder in folders)}: either splits (train, test, val) or "
            f"classes, never both or two names of one split; rename or move folders"
        )
    found = found or {"": root}
    classes = {split: tuple(folder.name for folder in _visible_folders(path)) for split, path in found.items()}
    class_names = tuple(sorted(set().union(*classes.values())))
    for split, present in classes.items():
        if missing := [name for name in class_names if name not in present]:
            raise DataError(
                f"{found[split]} has no folder for {', '.join(missing)}, another split has one: "
                f"every split needs every class"
            )
    if not class_names:
        raise DataError(
            f"{root} holds neither Parquet files nor class folders: it needs train/CLASS/*.png or CLASS/*.png"
        )
    splits: dict[str, tuple[Source, Tensor | None]] = {}
    notes = []
    for split, path in found.items():
        files = [[f for f in sorted((path / name).rglob("*")) if _is_image(f, root)] for name in class_names]
        paths = [file for of_class in files for file in of_class]
        ids = tuple(file.relative_to(root).as_posix() for file in paths)
        targets = torch.tensor([k for k, of_class in enumerate(files) for _ in of_class], dtype=torch.int64)
        splits[split] = (Encoded(ids, ids, _file_reader(paths), max_pixels), targets)
        if others := sum(1 for file in path.rglob("*") if file.is_file()) - len(paths):
            notes.append(
                f"{others} file(s) of {path.name} ignored: hidden, in no class folder, or no image by their suffix"
            )
    return Found(splits, class_names, tuple(notes))


def _visible_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _is_image(path: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
    return path.suffix.lower() in SUFFIXES and path.is_file() and not hidden


def _file_reader(paths: Sequence[Path]) -> Callable[[int], bytes]:
    return lambda row: paths[row].read_bytes()


# --- Parquet --------------------------------------------------------------------------------------------------------


def parquet(root: Path, files: Sequence[Path], max_pixels: int) -> Found:
    """Columns `image` (bytes, or a struct of bytes and path) and `label` (class number) or `mask` (encoded class map).

    Class names are in the Hugging Face metadata (label) or under `classes` (mask). A row's id is its split and number,
    with the files of a split joined in the order of their names.
    """
    tables: dict[str, list[pa.Table]] = {}
    columns = set()
    for path in files:
        try:
            table = pq.ParquetFile(path).read()
            label_names, mask_names = _metadata(table)
        except (pa.ArrowException, OSError, ValueError, AttributeError, TypeError) as error:
            raise DataError(f"{path} or its metadata is no readable Parquet ({error}): write it again") from None
        columns.add(_columns(table, label_names, mask_names, path))
        tables.setdefault(_split_of(path, root), []).append(table)
    if len(columns) > 1:
        raise DataError(f"the files of {root} differ in columns or class names: {' / '.join(map(str, columns))}")
    image, target, is_mask, class_names = columns.pop()
    whole = {
        split: pa.concat_tables([table.select([image, target]) for table in shards], promote_options="permissive")
        for split, shards in tables.items()
    }
    if is_mask:
        # The last class is void where it is called so; the numbers of those before it stay what they are.
        has_void = class_names[-1].lower() in _VOID
        void = len(class_names) - 1 if has_void else 255
        class_names = class_names[: len(class_names) - has_void]
        legal = frozenset(range(len(class_names))) | {void}
        return Found(
            {split: (_encoded(split, table, image, max_pixels, target, legal), None) for split, table in whole.items()},
            class_names,
            (f"pixels of {void} in a mask belong to no class and count nowhere",),
            ignore_index=void,
        )
    targets = {split: _class_numbers(split, table[target], len(class_names)) for split, table in whole.items()}
    notes: tuple[str, ...] = ()
    if not class_names:
        class_names = tuple(str(k) for k in range(max(int(t.max()) for t in targets.values()) + 1))
        notes = ("the files hold no class names: classes are called by their numbers",)
    splits: dict[str, tuple[Source, Tensor | None]] = {
        split: (_encoded(split, table, image, max_pixels), targets[split]) for split, table in whole.items()
    }
    return Found(splits, class_names, notes)


def _split_of(path: Path, root: Path) -> str:
    """train, test or val, by the first word of the file's name or of a folder's: train.parquet, test-00000.parquet."""
    inside = path.relative_to(root) if root.is_dir() else Path(path.name)
    for part in reversed(inside.parts):
        if (word := re.split(r"[^a-z]", part.lower())[0]) in _SPLITS:
            return _SPLITS[word]
    raise DataError(f"{path} belongs to no split: its name, or its folder's, must start with train, val or test")


def _metadata(table: pa.Table) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
    """Class names of each label column, and those of the mask, as far as the schema's metadata tells."""
    metadata = table.schema.metadata or {}
    features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    labels = {
        name: tuple(f["names"]) for name, f in features.items() if f.get("_type") == "ClassLabel" and "names" in f
    }
    return labels, tuple(json.loads(metadata.get(b"classes", b"[]")))


def _columns(
    table: pa.Table, label_names: dict[str, tuple[str, ...]], mask_names: tuple[str, ...], path: Path
) -> tuple[str, str, bool, tuple[str, ...]]:
    """Image column, target column, whether that holds masks, and the class names (none where the file has none)."""
    columns = table.column_names
    images = [name for name in ("image", "img") if name in columns]
    labels = [name for name in columns if name in label_names] or [c for c in ("label", "labels") if c in columns]
    if len(images) != 1 or len(labels) + ("mask" in columns) != 1:
        raise DataError(
            f"{path} has columns {', '.join(columns)}: one `image` and either one `label` or a `mask` are needed, "
            f"drop or rename the others"
        )
    if labels:
        return images[0], labels[0], False, label_names.get(labels[0], ())
    if not mask_names:
        raise DataError(f"{path} has masks and no class names: put a JSON list `classes` into the schema's metadata")
    return images[0], "mask", True, mask_names


def _class_numbers(split: str, column: pa.ChunkedArray, n_classes: int) -> Tensor:
    if not pa.types.is_integer(column.type):
        raise DataError(
            f"labels of {split} are {column.type}, not class numbers: store integers and the names beside them"
        )
    numbers = torch.tensor(pc.fill_null(column.cast(pa.int64()), -1).to_numpy())
    legal = (numbers >= 0) & ((numbers < n_classes) if n_classes else True)
    if not bool(legal.all()):
        row = int((~legal).nonzero()[0])
        raise DataError(
            f"{int((~legal).sum())} labels of {split} are no class numbers (the first is {int(numbers[row])}, "
            f"row {row}): they must lie in [0, {n_classes or 'K'})"
        )
    return numbers


def _encoded(
    split: str,
    table: pa.Table,
    image: str,
    max_pixels: int,
    mask: str | None = None,
    legal: frozenset[int] = frozenset(),
) -> Encoded:
    def reader(column: str) -> Callable[[int], bytes]:
        cells = table[column]
        if pa.types.is_struct(cells.type):
            cells = pc.struct_field(cells, "bytes")
        return lambda row: cells[row].as_py() or b""

    ids = numbered(split, len(table))
    names: Sequence[str] = ids
    if pa.types.is_struct(table[image].type) and table[image].type.get_field_index("path") >= 0:
        names = [
            path or image_id
            for path, image_id in zip(pc.struct_field(table[image], "path").to_pylist(), ids, strict=True)
        ]
    return Encoded(ids, names, reader(image), max_pixels, reader(mask) if mask else None, legal)
