"""Datasets with image ids that never change, checked before anything is computed from them.

`dataset` is what comes of them, `images` turns one file into numbers, `splits` samples and batches, `folders`, `listed`
(CSV), `parquet`, `shapes` and `downloads` know where images come from, `masks` where in them the evidence is.
Everything random (held-out, calibration, limit) ranks images by a hash of their id, so a choice does not depend on
their order, on other images or on a generator's state.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sukashi.core import progress
from sukashi.core.errors import DataError, UsageError, nearest
from sukashi.data import downloads, folders, grouping, listed, memory, parquet
from sukashi.data.classes import check_classes
from sukashi.data.dataset import HELD_OUT, Data
from sukashi.data.images import (
    DEEP,
    Encoded,
    Found,
    Pixels,
    Source,
    TooLarge,
    Unreadable,
    bad_images,
    deep,
    numbered,
)
from sukashi.data.masks import masks_beside, masks_given
from sukashi.data.memory import hold
from sukashi.data.shapes import Shapes
from sukashi.data.splits import Batches, Split
from sukashi.data.tree import is_plain_split, split_of

__all__ = ["Batches", "Data", "Split", "check_classes", "check_there", "hold", "load", "names"]

ORDER = ("train", "val", "test")
"""Splits in the order they are read and named."""

MAX_PIXELS = 64_000_000
"""Pixels an image may have unless `max_pixels` says otherwise."""

_NAMED = ("digits", "shapes", "torchvision")


def load(
    spec: str | Path,
    *,
    seed: int = 0,
    skip_bad: bool = False,
    class_map: Mapping[str, int] | None = None,
    only: Sequence[str] | None = None,
    label: str | None = None,
    groups: str | None = None,
    max_pixels: int = MAX_PIXELS,
    masks: Sequence[str] = (),
) -> Data:
    """A dataset by name or folder, every image checked.

    `spec`: `digits`, `shapes` with options (`shapes:watermark=0.9,size=64`), `torchvision:NAME`, a folder of class
    folders (train/CLASS/*.png and test/ or val/, or CLASS/* alone), a folder of images and of a CSV with their names
    and labels, or a folder of Parquet files with columns `image` and `label` or `mask`. `label` names the column of
    labels where it is called otherwise or there are several. `seed` draws the held-out test split of a dataset without
    one. `skip_bad` leaves unreadable images out and lists them in `bad`; otherwise they are fatal. `class_map` gives
    each class the model's number, `only` leaves all classes out but these, see `Data.only`. `groups` says which images
    belong together, as those of a patient, so that none of them is held out without the others: a column of Parquet or
    CSV, or a pattern (`re`) whose one group in brackets is found in the images' names. `masks` are folders that say
    where the evidence is, as folders called masks do: each holds images named as those of the data, not 0 inside.

    Raises UsageError (unknown spec or option), DataError (unreadable images, empty classes, images above `max_pixels`
    or without a group).
    """
    _check_asked(class_map, only, max_pixels)
    name, found = _found(spec, label, groups, max_pixels)
    found = masks_given(masks, found, max_pixels)
    _check_names(name, found)
    number = _numbers(name, found, class_map)
    class_names = tuple(found.class_names[k] for k in torch.argsort(number).tolist())
    of_images = None if groups is None else grouping.groups_of(name, found, groups)
    noticed, torn = grouping.unnoticed(found) if groups is None else ([], [])
    read, digests = _read(name, found, number, class_names, of_images)
    bad = tuple(pair for split in read.values() for pair in split.bad)
    if bad and not skip_bad:
        raise bad_images(name, bad, "replace them, or leave them out with `skip_bad=True`")
    for split in read.values():
        _check_presence(split, name)
    read, scaled = _one_depth(name, read)
    splits, renamed = _with_test(name, read, seed)
    sha256 = _sha256(splits, digests)
    whole = Data(
        name,
        class_names,
        train=splits["train"],
        test=splits["test"],
        val=splits.get("val"),
        bad=bad,
        sha256=sha256,
        splits_sha256=sha256,
        held_out_by=seed if _is_whole(read) else None,
        ignore_index=found.ignore_index,
        preprocess=found.preprocess,
        outputs=None if class_map is None else tuple(sorted(class_map.values())),
        _masks=found.masks,
        _facts=found.facts,
        _converted=tuple((of.name, rule, n) for of in read.values() for rule, n in sorted(of.notes.items())),
        _notes=(*found.notes, *noticed, *renamed),
        _warnings=(
            *found.warnings,
            *(f"{len(of.bad)} unreadable image(s) of {of.name} left out" for of in read.values() if of.bad),
            *scaled,
            *(said for split in splits.values() for said in _lonely_classes(split)),
            *_duplicates(splits, digests),
            *grouping.shared(splits),
            *torn,
        ),
    )
    return whole if only is None else whole.only(only)


def in_memory(spec: str | Path) -> bool:
    """Whether it names images that this process holds."""
    return isinstance(spec, str) and spec.startswith(memory.PREFIX)


def check_there(spec: str | Path) -> None:
    """Refuse a name that is none, and a folder or file that is not there, before anything is read."""
    if not str(spec):
        raise UsageError("data must not be empty: give a folder, or a name such as digits")
    if isinstance(spec, str) and (spec.partition(":")[0] in _NAMED or spec.startswith(memory.PREFIX)):
        return
    path = Path(spec).expanduser()
    if not path.is_dir() and not _is_parquet(path):
        near = nearest(str(spec), names())  # a name of ours first: folders lie beside by chance
        known = f", and no such folder{near if 'did you mean' in near else _beside(path) or near}"
        raise UsageError(f"unknown data {str(spec)!r}{': it is no folder' if path.exists() else known}")


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() == ".parquet" and path.exists() and not path.is_dir()


def _check_asked(class_map: Mapping[str, int] | None, only: Sequence[str] | None, max_pixels: int) -> None:
    if not 1 <= max_pixels <= (Image.MAX_IMAGE_PIXELS or max_pixels):
        raise UsageError(
            f"`max_pixels` must be in [1, {Image.MAX_IMAGE_PIXELS}], got {max_pixels}: Pillow refuses more, "
            f"so raise PIL.Image.MAX_IMAGE_PIXELS first"
        )
    if class_map is not None and only is not None:
        raise UsageError("both `class_map` and `only` number the classes: choose one")


def names() -> dict[str, str]:
    """What `load` knows by name, with one line about each."""
    return {
        "digits": "1,797 handwritten digits, 8 x 8 grey, embedded in scikit-learn",
        "shapes": "generated; every concept's pixels are known; options size, n, watermark: shapes:watermark=0.9",
        **{f"torchvision:{name}": about for name, (_, about) in downloads.KNOWN.items()},
    }


def _with_test(name: str, splits: Mapping[str, Split], seed: int) -> tuple[dict[str, Split], list[str]]:
    """The same with train and test splits, whatever the dataset has, and a sentence where val is test."""
    if _is_whole(splits):
        (pool,) = splits.values()
        return _held_out(pool, seed), []
    if "train" not in splits:
        raise DataError(
            f"{name} has only {' and '.join(splits)}: a train split is needed, so add one or rename a split"
        )
    if "test" in splits:
        return dict(splits), []
    renamed = {"test" if key == "val" else key: split for key, split in splits.items()}
    return renamed, [f"{name} has no test split: val is used as test"]


def _is_whole(splits: Mapping[str, Split]) -> bool:
    """Whether a dataset has no split but one to learn from, so that images are held out of it."""
    return "" in splits or set(splits) == {"train"}


def _found(spec: str | Path, label: str | None, groups: str | None, max_pixels: int) -> tuple[str, Found]:
    check_there(spec)
    if isinstance(spec, str) and (spec.partition(":")[0] in _NAMED or spec.startswith(memory.PREFIX)):
        if label is not None:
            raise UsageError(f"{spec} has no columns, `label={label!r}` is for those of Parquet and CSV: leave it out")
        return _by_name(spec, max_pixels)
    path = Path(spec).expanduser()
    if _is_parquet(path):
        name, found = path.stem, parquet.parquet(path, [path], label, groups, max_pixels)
    else:
        name, found = path.resolve().name, _in_folder(path, label, groups, max_pixels)
    apart = _apart(path.absolute()) if len(found.splits) == 1 else []
    for told in apart:
        warnings.warn(told, stacklevel=4)  # before images are read, which takes long
    return name, replace(found, warnings=(*found.warnings, *apart))


def _apart(path: Path) -> list[str]:
    """A warning where a split is given alone and others of its dataset lie beside it."""
    is_alike = _is_parquet if _is_parquet(path) else lambda other: other.is_dir() and is_plain_split(other.name)
    others: list[str] = []
    if is_alike(path) and split_of(path.name) is not None:
        with contextlib.suppress(OSError):
            others = [
                other.name
                for other in sorted(path.parent.iterdir())
                if split_of(other.name) not in (None, split_of(path.name)) and is_alike(other)
            ]
    if not others:
        return []
    return [
        f"{path.name} is read alone, and not {', '.join(others[:3])} beside it: give the folder that holds them all, "
        f"`data={str(path.parent)!r}`, to test on images of their own"
    ]


def _beside(path: Path) -> str:
    """What lies beside a path that is not there and is called almost so, as the end of an error; or ""."""
    with contextlib.suppress(OSError):
        around = [
            entry.name
            for entry in path.parent.iterdir()
            if not entry.name.startswith(".") and (entry.is_dir() or entry.suffix == ".parquet")
        ]
        if close := difflib.get_close_matches(path.name, sorted(around), n=3, cutoff=0.6):
            return f": did you mean {' or '.join(str(path.parent / name) for name in close)}?"
    return ""


def _by_name(spec: str, max_pixels: int) -> tuple[str, Found]:
    name, _, options = spec.partition(":")
    match name:
        case "digits":
            if options:
                raise UsageError(f"digits takes no options, got {options!r}: write digits")
            return spec, _digits()
        case "shapes":
            return spec, Shapes.parse(options).found()
        case "memory":
            return spec, memory.held(options)
        case _:
            return options, downloads.torchvision(options, max_pixels)


def _in_folder(root: Path, label: str | None, groups: str | None, max_pixels: int) -> Found:
    """What Parquet files say, or class folders, or a CSV where there are no class folders or a column is named."""
    if shards := parquet.shards(root):
        return parquet.parquet(root, shards, label, groups, max_pixels)
    tables = listed.tables(root)
    if label is not None and not tables:
        raise UsageError(f"{root} has neither Parquet nor CSV, `label={label!r}` is a column of these: leave it out")
    if tables and (label is not None or not folders.has_classes(root)):
        return masks_beside(root, listed.listed_images(root, tables, label, groups, max_pixels), max_pixels)
    found = masks_beside(root, folders.image_folder(root, max_pixels), max_pixels)
    if not tables:
        return found
    unread = f"{tables[0].relative_to(root)} is not read: classes are the folders; `label=COLUMN` takes it instead"
    return replace(found, warnings=(*found.warnings, unread))


def _digits() -> Found:
    from sklearn.datasets import load_digits  # a second of import that no other dataset needs

    digits = load_digits()
    pixels = Pixels(numbered("digits", len(digits.images)), (digits.images / 16).astype(np.float32))
    return Found({"": (pixels, torch.from_numpy(digits.target.astype(np.int64)))}, tuple("0123456789"))


def _check_names(name: str, found: Found) -> None:
    """Refuse classes that can't be told apart, and fewer than two of them where an image has one."""
    same = [class_name for class_name, times in Counter(found.class_names).items() if times > 1]
    if same:
        raise DataError(f"{name} has several classes called {same[0]!r}: give each its own name")
    if found.ignore_index is None and len(found.class_names) == 1:
        raise DataError(f"{name} has one class, {found.class_names[0]!r}, and two are needed: add images of another")
    try:
        "".join((*found.class_names, *(i for source, _ in found.splits.values() for i in source.ids))).encode()
    except UnicodeEncodeError:
        raise DataError(f"{name} has file or class names that are no UTF-8: rename them") from None


def _numbers(name: str, found: Found, class_map: Mapping[str, int] | None) -> Tensor:
    """The number (K,) that each class gets."""
    if class_map is None:
        return torch.arange(len(found.class_names))
    if found.ignore_index is not None:
        raise UsageError(
            f"{name} has masks, whose pixels are class numbers already: a `class_map` is for one class an image"
        )
    for alien in (name for name in class_map if name not in found.class_names):
        raise DataError(f"`class_map` has {alien!r}, which is no class of the data{nearest(alien, found.class_names)}")
    numbers = sorted(class_map.values())
    if set(class_map) != set(found.class_names) or len(set(numbers)) < len(numbers) or min(numbers, default=0) < 0:
        raise DataError(
            f"`class_map` must give each of {', '.join(found.class_names)} its own number, got {dict(class_map)}"
        )
    return torch.tensor([numbers.index(class_map[class_name]) for class_name in found.class_names])


def _read(
    name: str, found: Found, number: Tensor, class_names: tuple[str, ...], groups: Mapping[str, str] | None
) -> tuple[dict[str, Split], dict[str, bytes]]:
    """The splits as they are there, with the group of each image, and a digest of each image."""
    splits: dict[str, Split] = {}
    digests: dict[str, bytes] = {}
    for key in sorted(found.splits, key=("", *ORDER).index):
        source, targets = found.splits[key]
        targets = None if targets is None else number[targets]
        split = _checked(key or name, source, targets, class_names, digests)
        splits[key] = replace(split, groups=None if groups is None else tuple(groups[i] for i in split.image_ids))
    return splits, digests


def _checked(
    title: str, source: Source, targets: Tensor | None, class_names: tuple[str, ...], digests: dict[str, bytes]
) -> Split:
    """The split of every readable image; notes each one's digest."""
    bad: list[tuple[str, str]] = []
    too_large: list[tuple[str, str]] = []
    notes: Counter[str] = Counter()
    rows = []
    with progress.task(f"checking {title}", len(source.ids)) as task:
        for row, image_id in enumerate(source.ids):
            try:
                digests[image_id], rules = source.check(row)
                notes.update(rules)
                rows.append(row)
            except Unreadable as error:
                bad.append((source.name(row), str(error)))
            except TooLarge as error:
                too_large.append((source.name(row), str(error)))
            task.advance()
    if too_large:
        raise bad_images(title, too_large, "they are above the cap on pixels, which `max_pixels` sets")
    at = np.array(rows, dtype=np.int64)
    kept = None if targets is None else targets[torch.from_numpy(at)]
    return Split(title, class_names, tuple(source.ids[row] for row in rows), tuple(bad), dict(notes), source, at, kept)


def _one_depth(name: str, splits: dict[str, Split]) -> tuple[dict[str, Split], list[str]]:
    """The same with all 16-bit grey images on one scale, that of as many bits as any of them uses, and a warning."""
    used = [DEEP[rule] for split in splits.values() for rule in split.notes if rule in DEEP]
    bits = max(used, default=16)
    if not used:
        return splits, []
    scaled = {}
    for key, split in splits.items():
        n = sum(n for rule, n in split.notes.items() if rule in DEEP)
        rules = {rule: n for rule, n in split.notes.items() if rule not in DEEP} | ({deep(bits): n} if n else {})
        source = replace(split._source, bits=bits) if isinstance(split._source, Encoded) else split._source
        scaled[key] = replace(split, notes=rules, _source=source)
    if bits == 16:
        return scaled, []
    return scaled, [
        f"no 16-bit image of {name} holds a value above {2**bits - 1:,}: they are read as {bits} bits, divided by "
        f"{2**bits - 1:,} and not by 65,535"
    ]


def _check_presence(split: Split, spec: str) -> None:
    """Refuse a split without images, or with a class that has none."""
    if len(split) == 0:
        raise DataError(f"{split.name} holds no images: add some, or remove it")
    if split.has_masks:
        return
    # Labels of a folder are made here, those of tensors by somebody who may count from 1.
    off = spec.startswith(memory.PREFIX) and split.counts[0] == 0
    counted = "; labels count from 0, so where yours count from 1 take 1 from each" if off else ""
    if empty := [split.class_names[k] for k, count in enumerate(split.counts.tolist()) if count == 0]:
        raise DataError(
            f"{split.name} has no image of {', '.join(map(repr, empty))}: classes are never renumbered, so add images "
            f"or take the class out of every split{counted}"
        )


def _lonely_classes(split: Split) -> list[str]:
    counts = [] if split.has_masks else split.counts.tolist()
    lonely = [split.class_names[k] for k, count in enumerate(counts) if count == 1]
    return [f"one image only in {split.name}, left out of per-class statistics: {', '.join(lonely)}"] if lonely else []


def _held_out(pool: Split, seed: int) -> dict[str, Split]:
    """Train and test: `HELD_OUT` of each class, at least one image, goes to the test split."""
    target = torch.zeros(len(pool), dtype=torch.int64) if pool.has_masks else pool.targets
    counts = torch.bincount(target)
    if int(counts.min()) < 2:
        raise DataError(
            f"class {pool.class_names[int(counts.argmin())]!r} has one image and there is no test split, holding one "
            f"out needs two of every class: add images or a test split"
        )
    train, test = pool.parted(HELD_OUT, "held out", seed, least=1)
    return {"train": replace(train, name="train"), "test": replace(test, name="test")}


def _sha256(splits: Mapping[str, Split], digests: Mapping[str, bytes]) -> str:
    whole = hashlib.sha256()
    for name in sorted(splits):
        split = splits[name]
        targets = [-1] * len(split) if split.has_masks else split.targets.tolist()
        for image_id, target, group in zip(split.image_ids, targets, split.groups or repeat(""), strict=False):
            whole.update(f"{name} {image_id} {target} {group}".encode() + digests[image_id])
    return whole.hexdigest()


def _duplicates(splits: Mapping[str, Split], digests: Mapping[str, bytes]) -> list[str]:
    """A note, and a warning, for each pair of splits that share an image by the hash of its bytes."""
    notes = []
    order = [name for name in ORDER if name in splits]
    for i, first in enumerate(order):
        seen = {digests[image_id][:16]: image_id for image_id in splits[first].image_ids}
        for second in order[i + 1 :]:
            same = [f"{b} = {seen[d]}" for b in splits[second].image_ids if (d := digests[b][:16]) in seen]
            if same:
                listed = ", ".join(same[:3]) + (", ..." if len(same) > 3 else "")
                notes.append(f"{len(same)} image(s) of {second} are also in {first}, byte for byte: {listed}")
                warnings.warn(notes[-1], stacklevel=3)
    return notes
