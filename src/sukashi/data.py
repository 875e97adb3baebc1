"""Images, targets and ids that never change: datasets, splits, calibration sampling.

An image becomes numbers by one fixed chain, whatever file, worker or batch it comes in: Pillow decodes it, `_plain`
brings it to 8-bit grey, 8-bit RGB or 16-bit grey, then channels, size, [0, 1] and (x - mean) / std follow the model's
`Preprocess`. Everything random (held-out, calibration, limit) ranks images by a hash of their id, so a choice does not
depend on their order, on other images or on a generator's state.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from sukashi import progress
from sukashi.errors import DataError, ModelError, UsageError
from sukashi.registry import nearest
from sukashi.types import Batch, Preprocess

HELD_OUT = 0.2
"""Fraction of each class that becomes the test split where a dataset brings none."""

MAX_PIXELS = 64_000_000
"""Pixels an image may have unless `max_pixels` says otherwise."""

# Named, because Pillow otherwise tries every plugin it has; EPS, for one, starts Ghostscript.
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pnm"}
_ORIENTATION = 0x0112

_GREY = "greyscale: repeated where a model wants three channels"
_RULES = {
    "1": _GREY,
    "L": _GREY,
    "I": "16-bit grey: divided by 65535",
    "I;16": "16-bit grey: divided by 65535",
    "I;16B": "16-bit grey: divided by 65535",
    "P": "palette: looked up as RGB",
    "RGB": "",
    "LA": "",
    "PA": "",
    "RGBA": "",
    "CMYK": "CMYK: converted to RGB by Pillow, without a colour profile",
    "YCbCr": "YCbCr: converted to RGB",
}


class _Unreadable(Exception):
    """An image that cannot be used; the message is the reason."""


class _TooLarge(Exception):
    """An image above the pixel cap: fatal even where bad images are skipped, because a setting decides."""


# --- one image ------------------------------------------------------------------------------------------------------


def _open(encoded: bytes, max_pixels: int) -> Image.Image:
    """The image with its header read and its pixels not yet decoded."""
    if not encoded:
        raise _Unreadable("no bytes")
    try:
        image = Image.open(io.BytesIO(encoded), formats=_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _TooLarge(str(error)) from None
    except UnidentifiedImageError:
        raise _Unreadable("not an image") from None
    except Exception as error:  # Pillow's readers let anything escape on hostile bytes: struct, Key, Syntax, EOF errors
        raise _Unreadable(f"header cannot be read: {error}") from None
    if image.width * image.height > max_pixels:
        raise _TooLarge(f"{image.width} x {image.height} pixels")
    if image.mode not in _RULES or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise _Unreadable(f"{image.format} of mode {image.mode} has no fixed scale to [0, 1]")
    return image


def _decoded(encoded: bytes, max_pixels: int) -> Image.Image:
    image = _open(encoded, max_pixels)
    try:
        image.load()
    except Exception as error:  # as above: what a broken stream raises depends on the codec
        raise _Unreadable(f"cannot be decoded: {error}") from None
    return image


def _check(encoded: bytes, max_pixels: int) -> list[str]:
    """The conversion rules an image needs, by its header; raises where it cannot be used.

    A JPEG or PNG that ends with its end marker was not truncated, which costs a third of decoding it. Any other is
    decoded to find out.
    """
    image = _open(encoded, max_pixels)
    rules = [_RULES[image.mode]] if _RULES[image.mode] else []
    if image.has_transparency_data:
        rules.append("transparent: laid over white")
    if image.format == "PNG" and encoded[24] == 16 and not image.mode.startswith("I"):
        rules.append("16-bit colour: upper 8 bits kept")
    if getattr(image, "is_animated", False):
        rules.append("several frames: the first one used")
    if image.getexif().get(_ORIENTATION, 1) != 1:
        rules.append("EXIF orientation: applied")
    whole_jpeg = image.format == "JPEG" and encoded.endswith(b"\xff\xd9")
    if image.format == "PNG" and encoded.endswith(b"IEND\xaeB`\x82"):
        try:
            image.verify()  # the checksum of every chunk
        except Exception as error:
            raise _Unreadable(f"cannot be decoded: {error}") from None
    elif not whole_jpeg:
        _decoded(encoded, max_pixels)
    return rules


def _plain(image: Image.Image) -> Image.Image:
    """The upright image as L or RGB (8 bits) or F (grey in [0, 1], from 16 bits)."""
    if image.getexif().get(_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # Pillow's own conversion saturates at 255
        return Image.fromarray(np.asarray(image, dtype=np.float32) / 65535)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    if image.mode in ("1", "L"):
        return image.convert("L")
    return image if image.mode in ("RGB", "F") else image.convert("RGB")


def _fitted(image: Image.Image, preprocess: Preprocess) -> np.ndarray:
    """The plain image as float32 (C, H, W) in [0, 1].

    RGB becomes grey by the luma of ITU-R BT.601 (0.299 R + 0.587 G + 0.114 B), grey becomes RGB by repetition, and the
    size is met by Pillow's antialiased bilinear filter without keeping the aspect, in the depth the image has.
    """
    if preprocess.channels == 1 and image.mode == "RGB":
        image = image.convert("L")
    if image.size != (preprocess.width, preprocess.height):
        image = image.resize((preprocess.width, preprocess.height), Image.Resampling.BILINEAR)
    scale = np.float32(1 if image.mode == "F" else 255)
    pixels = np.asarray(image, dtype=np.float32) / scale
    if pixels.ndim == 2:
        return np.broadcast_to(pixels, (preprocess.channels, *pixels.shape))
    return pixels.transpose(2, 0, 1)


# --- where images come from -----------------------------------------------------------------------------------------


class _Source(Protocol):
    """A numbered set of images: `ids` for ever, `names` for messages."""

    @property
    def ids(self) -> tuple[str, ...]: ...

    def check(self, row: int) -> tuple[bytes, list[str]]:
        """A digest of the image's bytes, and the conversion rules it needs; raises where it cannot be used."""

    def image(self, row: int) -> Image.Image:
        """The decoded image, plain."""

    def name(self, row: int) -> str:
        """What a message calls the image."""


def _digest(encoded: bytes) -> bytes:
    return hashlib.blake2b(encoded, digest_size=16).digest()


@dataclass(frozen=True, eq=False)
class _Pixels:
    """Images in memory: uint8 (N, H, W) or (N, H, W, 3), or float32 (N, H, W) in [0, 1]."""

    ids: tuple[str, ...]
    pixels: np.ndarray

    def check(self, row: int) -> tuple[bytes, list[str]]:
        return _digest(self.pixels[row].tobytes()), [_GREY] if self.pixels.ndim == 3 else []

    def image(self, row: int) -> Image.Image:
        return Image.fromarray(self.pixels[row])

    def name(self, row: int) -> str:
        return self.ids[row]


@dataclass(frozen=True, eq=False)
class _Encoded:
    """Images as encoded bytes, decoded when asked for; `read_mask` where each has a map of classes."""

    ids: tuple[str, ...]
    names: Sequence[str]
    read: Callable[[int], bytes]
    max_pixels: int
    read_mask: Callable[[int], bytes] | None = None
    legal: frozenset[int] = frozenset()

    def check(self, row: int) -> tuple[bytes, list[str]]:
        encoded = self.read(row)
        rules = _check(encoded, self.max_pixels)
        if self.read_mask is not None:
            size, image_size = self.mask(row).size, _open(encoded, self.max_pixels).size
            if size != image_size:
                raise _Unreadable(f"mask is {size[0]} x {size[1]} pixels, image {image_size[0]} x {image_size[1]}")
        return _digest(encoded), rules

    def image(self, row: int) -> Image.Image:
        return _plain(_decoded(self.read(row), self.max_pixels))

    def mask(self, row: int) -> Image.Image:
        assert self.read_mask is not None
        try:
            mask = _decoded(self.read_mask(row), self.max_pixels)
        except _Unreadable as error:
            raise _Unreadable(f"mask: {error}") from None
        if mask.mode not in ("L", "P", "I;16", "I"):
            raise _Unreadable(f"mask has mode {mask.mode}, not one class number a pixel")
        alien = sorted(set(np.unique(np.asarray(mask)).tolist()) - self.legal)
        if alien:
            raise _Unreadable(f"mask holds {alien[0]}, which is no class number")
        return mask

    def name(self, row: int) -> str:
        return f"{self.ids[row]} ({self.names[row]})" if self.names[row] != self.ids[row] else self.ids[row]


# --- splits ---------------------------------------------------------------------------------------------------------


def _by_hash(ids: Sequence[str], purpose: str, seed: int) -> list[int]:
    """Positions in a random order that depends on each id alone, never on the other images."""
    return sorted(range(len(ids)), key=lambda i: hashlib.blake2b(f"{purpose}/{seed}/{ids[i]}".encode()).digest())


@dataclass(frozen=True, eq=False)
class Split:
    """Images of one split, or of a subset of one: same order, same ids, same pixels every time.

    `targets` (N,) int64 class numbers; `image_ids` N strings that a subset keeps; `bad` the (image, reason) pairs that
    were skipped when the split was read, `notes` how many of its images needed each conversion rule.
    """

    name: str
    class_names: tuple[str, ...]
    image_ids: tuple[str, ...]
    bad: tuple[tuple[str, str], ...]
    notes: Mapping[str, int]
    _source: _Source = field(repr=False)
    _rows: np.ndarray = field(repr=False)
    _targets: Tensor | None = field(repr=False)

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def targets(self) -> Tensor:
        """Class numbers (N,) int64; UsageError where a target is a map (its batches hold them)."""
        if self._targets is None:
            raise UsageError(f"{self.name} has a map of classes an image, not one class: read targets from its batches")
        return self._targets

    @property
    def counts(self) -> Tensor:
        """Images of each class (K,). One alone has no spread: leave such a class out of per-class statistics."""
        return torch.bincount(self.targets, minlength=len(self.class_names))

    def subset(self, rows: Sequence[int] | Tensor | np.ndarray) -> Split:
        """The images at these positions, in this order."""
        at = np.asarray(rows, dtype=np.int64)
        return replace(
            self,
            image_ids=tuple(self.image_ids[i] for i in at),
            _rows=self._rows[at],
            _targets=None if self._targets is None else self._targets[torch.from_numpy(at)],
        )

    def calibration(self, n_per_class: int, seed: int) -> Split:
        """`n_per_class` images of every class, drawn by seed; a smaller sample is part of a larger one.

        Raises UsageError for a split with masks, DataError where a class has too few images.
        """
        if n_per_class < 1:
            raise UsageError(f"n_per_class must be at least 1, got {n_per_class}: it is the number of images a class")
        if self._targets is None:
            raise UsageError(f"{self.name} has masks, so no sample can be balanced by class: use limit(n)")
        for number, count in enumerate(self.counts.tolist()):
            if count < n_per_class:
                raise DataError(
                    f"class {self.class_names[number]!r} has {count} images in {self.name}, a calibration set needs "
                    f"{n_per_class} of every class: ask for at most {int(self.counts.min())} or add images"
                )
        rank = self._rank_in_class("calibration", seed)
        return self.subset(np.flatnonzero(rank < n_per_class))

    def limit(self, n: int, seed: int = 0) -> Split:
        """At most `n` images, as evenly over the classes as they allow; a smaller one is part of a larger one."""
        if n >= len(self):
            return self
        if self._targets is not None and n < len(self.class_names):
            raise UsageError(f"limit must be at least {len(self.class_names)}, got {n}: every class needs an image")
        rank = self._rank_in_class("limit", seed)
        place = {row: i for i, row in enumerate(_by_hash(self.image_ids, "limit", seed))}
        first = sorted(range(len(self)), key=lambda i: (rank[i], place[i]))[:n]
        return self.subset(sorted(first))

    def _rank_in_class(self, purpose: str, seed: int) -> np.ndarray:
        """Place (N,) of each image in a random order of its class; with masks, all are one class."""
        rank = np.empty(len(self), dtype=np.int64)
        seen: Counter[int] = Counter()
        target = [0] * len(self) if self._targets is None else self._targets.tolist()
        for row in _by_hash(self.image_ids, purpose, seed):
            rank[row] = seen[target[row]]
            seen[target[row]] += 1
        return rank

    def batches(self, preprocess: Preprocess, batch_size: int, workers: int = 0) -> Batches:
        """Batches in the split's order, to be iterated as often as wanted; `workers` threads decode ahead."""
        return Batches(self, preprocess, batch_size, workers)

    def whole(self, preprocess: Preprocess, workers: int = 0) -> Batch:
        """Every image in one batch."""
        x = torch.empty(len(self), preprocess.channels, preprocess.height, preprocess.width)
        targets = []
        start = 0
        for batch in self.batches(preprocess, 256, workers):
            x[start : start + len(batch)] = batch.x
            targets.append(batch.target)
            start += len(batch)
        return Batch(x, torch.cat(targets), self.image_ids)

    def _batch(self, preprocess: Preprocess, start: int, stop: int) -> Batch:
        rows = self._rows[start:stop].tolist()
        x = np.empty((len(rows), preprocess.channels, preprocess.height, preprocess.width), dtype=np.float32)
        masks = np.empty((len(rows), preprocess.height, preprocess.width), dtype=np.int64)
        bad = []
        for i, row in enumerate(rows):
            try:
                x[i] = _fitted(self._source.image(row), preprocess)
                if self._targets is None:
                    assert isinstance(self._source, _Encoded)
                    size = (preprocess.width, preprocess.height)
                    masks[i] = np.asarray(self._source.mask(row).resize(size, Image.Resampling.NEAREST))
            except _Unreadable as error:
                bad.append((self._source.name(row), str(error)))
        if bad:
            raise _bad_images(self.name, bad, "they passed the check of their headers, so remove or replace them")
        shape = (1, preprocess.channels, 1, 1)
        mean, std = torch.tensor(preprocess.mean).view(shape), torch.tensor(preprocess.std).view(shape)
        target = torch.from_numpy(masks) if self._targets is None else self._targets[start:stop]
        return Batch((torch.from_numpy(x) - mean) / std, target, self.image_ids[start:stop])


@dataclass(frozen=True, eq=False)
class Batches:
    """Batches of a split, the same ones each time they are iterated and for any number of workers."""

    split: Split
    preprocess: Preprocess
    batch_size: int
    workers: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.workers < 0:
            raise UsageError(f"workers must be at least 0, got {self.workers}: 0 decodes without threads")
        if self.preprocess.channels not in (1, 3):
            raise UsageError(
                f"images have 1 or 3 channels, the model wants {self.preprocess.channels}: pick another model"
            )

    def __len__(self) -> int:
        return -(-len(self.split) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        spans = [(i, min(i + self.batch_size, len(self.split))) for i in range(0, len(self.split), self.batch_size)]
        if self.workers == 0:
            for start, stop in spans:
                yield self.split._batch(self.preprocess, start, stop)
            return
        # Threads, not processes: Pillow decodes and resizes outside the interpreter lock, and nothing is pickled.
        pool = ThreadPoolExecutor(self.workers)
        ahead: deque[Future[Batch]] = deque()
        try:
            for start, stop in spans:
                ahead.append(pool.submit(self.split._batch, self.preprocess, start, stop))
                if len(ahead) > self.workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _bad_images(where: str, bad: Sequence[tuple[str, str]], remedy: str) -> DataError:
    listed = "\n".join(f"  {name}: {reason}" for name, reason in bad)
    return DataError(f"{len(bad)} images of {where} cannot be used; {remedy}:\n{listed}")


# --- datasets -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Data:
    """A dataset: `train` to choose and to fit on, `test` to measure on, `val` where the dataset has both.

    `notes` are sentences a report must show: conversions, a held-out split, duplicates, classes without spread.
    `ignore_index` is the target of pixels without a class, None where targets are one class an image.
    """

    name: str
    class_names: tuple[str, ...]
    train: Split
    test: Split
    val: Split | None
    notes: tuple[str, ...]
    ignore_index: int | None = None
    _ground_truth: Callable[[Sequence[str]], dict[str, Tensor]] | None = field(default=None, repr=False)

    @property
    def n_classes(self) -> int:
        return len(self.class_names)

    @property
    def bad(self) -> tuple[tuple[str, str], ...]:
        """Every image that was skipped, with the reason."""
        return tuple(dict.fromkeys(pair for split in _splits(self) for pair in split.bad))

    def ground_truth(self, image_ids: Sequence[str]) -> dict[str, Tensor]:
        """Where each concept is: bool masks (B, H, W) of these images by concept; UsageError where nobody knows."""
        if self._ground_truth is None:
            raise UsageError(f"{self.name} has no ground-truth masks of concepts: only generated data (shapes) does")
        return self._ground_truth(image_ids)


def _splits(data: Data) -> list[Split]:
    return [data.train, data.test] + ([data.val] if data.val is not None else [])


@dataclass(frozen=True, eq=False)
class _Raw:
    """A split as it is found, before any image was looked at."""

    source: _Source
    targets: Tensor | None


def load(
    spec: str | Path,
    *,
    seed: int = 0,
    skip_bad: bool = False,
    class_map: Mapping[str, int] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Data:
    """A dataset by name or folder, every image checked.

    `spec`: `digits`, `shapes` with options (`shapes:watermark=0.9,size=64`), `torchvision:NAME`, a folder of class
    folders (train/CLASS/*.png and test/ or val/, or CLASS/* alone) or a folder of Parquet files with columns `image`
    and `label` or `mask`. `seed` draws the held-out test split of a dataset without one. `skip_bad` leaves unreadable
    images out and lists them in `bad`; otherwise they are fatal. `class_map` gives each class the model's number.

    Raises UsageError (unknown spec or option), DataError (unreadable images, empty classes, images above `max_pixels`).
    """
    if not 1 <= max_pixels <= (Image.MAX_IMAGE_PIXELS or max_pixels):
        raise UsageError(
            f"max_pixels must be in [1, {Image.MAX_IMAGE_PIXELS}], got {max_pixels}: Pillow itself warns above that, "
            f"so raise PIL.Image.MAX_IMAGE_PIXELS first"
        )
    name, _, options = str(spec).partition(":")
    if name == "digits" and not options:
        return _finish("digits", {"": _digits()}, tuple("0123456789"), seed, skip_bad, class_map)
    folder = Path(spec)
    if not folder.exists():
        raise UsageError(f"unknown data {str(spec)!r}{nearest(str(spec), names())}, or a folder that exists")
    files = sorted(folder.rglob("*.parquet")) if folder.is_dir() else [folder] if folder.suffix == ".parquet" else []
    if not files:
        raise DataError(f"{folder} holds no Parquet files")
    raw, class_names, ignore_index = _parquet(folder, files, max_pixels)
    return _finish(folder.resolve().name, raw, class_names, seed, skip_bad, class_map, ignore_index)


def names() -> dict[str, str]:
    """What `load` knows by name, with one line about each."""
    return {"digits": "1,797 handwritten digits, 8 x 8 grey, embedded in scikit-learn"}


def _finish(
    name: str,
    raw: Mapping[str, _Raw],
    class_names: tuple[str, ...],
    seed: int,
    skip_bad: bool,
    class_map: Mapping[str, int] | None,
    ignore_index: int | None = None,
) -> Data:
    """Check every image and every class, hold out a test split where there is none, and collect the notes.

    The key "" of `raw` stands for images that were never split.
    """
    number = _numbers(class_names, class_map)
    notes: list[str] = []
    splits: dict[str, Split] = {}
    digests: dict[str, bytes] = {}
    bad: list[tuple[str, str]] = []
    for split_name, found in raw.items():
        title = split_name or name
        targets = None if found.targets is None else number[found.targets]
        splits[split_name], of_split = _checked(title, found.source, targets, class_names)
        digests |= of_split
        bad += splits[split_name].bad
    if bad and not skip_bad:
        raise _bad_images(name, bad, "replace them, or leave them out with skip_bad")
    if class_map is not None:
        order = sorted(range(len(class_names)), key=lambda k: int(number[k]))
        class_names = tuple(class_names[k] for k in order)
        splits = {key: replace(split, class_names=class_names) for key, split in splits.items()}
    for key, split in splits.items():
        if bad:
            notes.append(f"{len(split.bad)} unreadable images of {key or name} left out")
        notes += [f"{n} images of {key or name}: {rule}" for rule, n in sorted(split.notes.items())]
        _check_classes_present(split)
    pool = splits.pop("", None) or (splits.pop("train") if set(splits) == {"train"} else None)
    if pool is not None:
        splits["train"], splits["test"] = _hold_out(pool, seed)
        notes.append(
            f"{name} has no test split: {HELD_OUT:.0%} of each class held out by seed {seed}, "
            f"{len(splits['test'])} images"
        )
    if "train" not in splits:
        raise DataError(f"{name} has only {', '.join(splits)}: a train split is needed")
    if "test" not in splits:
        splits["test"] = splits.pop("val")
        notes.append(f"{name} has no test split: val is used as test")
    notes += [note for split in splits.values() if (note := _lonely_classes(split))]
    notes += _duplicates(splits, digests)
    return Data(
        name, class_names, splits["train"], splits["test"], splits.get("val"), tuple(notes), ignore_index=ignore_index
    )


def _numbers(class_names: Sequence[str], class_map: Mapping[str, int] | None) -> Tensor:
    """The number (K,) that each class gets."""
    if class_map is None:
        return torch.arange(len(class_names))
    if set(class_map) != set(class_names) or sorted(class_map.values()) != list(range(len(class_names))):
        raise DataError(
            f"class_map must give each of {', '.join(class_names)} its own number in [0, {len(class_names)}), "
            f"got {dict(class_map)}"
        )
    return torch.tensor([class_map[name] for name in class_names])


def _checked(
    title: str, source: _Source, targets: Tensor | None, class_names: tuple[str, ...]
) -> tuple[Split, dict[str, bytes]]:
    """The split of every readable image, and each image's digest by id."""
    bad: list[tuple[str, str]] = []
    too_large: list[tuple[str, str]] = []
    notes: Counter[str] = Counter()
    digests: dict[str, bytes] = {}
    rows = []
    with progress.task(f"checking {title}", len(source.ids)) as task:
        for row, image_id in enumerate(source.ids):
            try:
                digests[image_id], rules = source.check(row)
                notes.update(rules)
                rows.append(row)
            except _Unreadable as error:
                bad.append((source.name(row), str(error)))
            except _TooLarge as error:
                too_large.append((source.name(row), str(error)))
            task.advance()
    if too_large:
        raise _bad_images(title, too_large, "they are above the cap on pixels, which max_pixels sets")
    at = np.array(rows, dtype=np.int64)
    ids = tuple(source.ids[row] for row in rows)
    kept = None if targets is None else targets[torch.from_numpy(at)]
    return Split(title, class_names, ids, tuple(bad), dict(notes), source, at, kept), digests


def _check_classes_present(split: Split) -> None:
    if len(split) == 0:
        raise DataError(f"{split.name} holds no images: add some, or remove it")
    if split._targets is None:
        return
    empty = [split.class_names[k] for k, count in enumerate(split.counts.tolist()) if count == 0]
    if empty:
        raise DataError(
            f"{split.name} has no image of {', '.join(map(repr, empty))}: classes are never renumbered, so add "
            f"images or take the class out of every split"
        )


def _lonely_classes(split: Split) -> str:
    if split._targets is None:
        return ""
    lonely = [split.class_names[k] for k, count in enumerate(split.counts.tolist()) if count == 1]
    return f"one image only in {split.name}, left out of per-class statistics: {', '.join(lonely)}" if lonely else ""


def _hold_out(pool: Split, seed: int) -> tuple[Split, Split]:
    """Train and test: `HELD_OUT` of each class, at least one image, goes to the test split."""
    rank = pool._rank_in_class("held out", seed)
    counts = torch.tensor([len(pool)]) if pool._targets is None else pool.counts
    if int(counts.min()) < 2:
        lonely = pool.class_names[int(counts.argmin())]
        raise DataError(
            f"class {lonely!r} has one image and there is no test split, holding one out needs two of every class: "
            f"add images or a test split"
        )
    target = np.zeros(len(pool), dtype=np.int64) if pool._targets is None else pool.targets.numpy()
    n_out = np.maximum(1, np.floor(HELD_OUT * counts.numpy() + 0.5)).astype(np.int64)
    out = rank < n_out[target]
    return (
        replace(pool.subset(np.flatnonzero(~out)), name="train"),
        replace(pool.subset(np.flatnonzero(out)), name="test"),
    )


def _duplicates(splits: Mapping[str, Split], digests: Mapping[str, bytes]) -> list[str]:
    """A note, and a warning, for each pair of splits that share an image by the hash of its bytes."""
    notes = []
    order = [name for name in ("train", "val", "test") if name in splits]
    for i, first in enumerate(order):
        seen = {digests[image_id]: image_id for image_id in splits[first].image_ids}
        for second in order[i + 1 :]:
            same = [(image_id, seen[d]) for image_id in splits[second].image_ids if (d := digests[image_id]) in seen]
            if same:
                notes.append(
                    f"{len(same)} images of {second} are also in {first}, byte for byte: "
                    + ", ".join(f"{a} = {b}" for a, b in same[:3])
                    + (", ..." if len(same) > 3 else "")
                )
                warnings.warn(notes[-1], stacklevel=4)
    return notes


def _numbered(split: str, n: int) -> tuple[str, ...]:
    width = max(5, len(str(n - 1)))
    return tuple(f"{split}/{row:0{width}d}" for row in range(n))


# --- digits ---------------------------------------------------------------------------------------------------------


def _digits() -> _Raw:
    from sklearn.datasets import load_digits  # a second of import that no other dataset needs

    digits = load_digits()
    pixels = (digits.images / 16).astype(np.float32)
    return _Raw(_Pixels(_numbered("digits", len(pixels)), pixels), torch.from_numpy(digits.target.astype(np.int64)))


# --- Parquet --------------------------------------------------------------------------------------------------------

_SPLIT_NAME = re.compile(r"^(train|test|val|valid|validation)(?![a-z])")


def _split_of(path: Path, root: Path) -> str:
    """train, test or val, from the file's name or a folder above it: train.parquet, test-00000-of-00002.parquet."""
    parts = (path.relative_to(root) if root.is_dir() else Path(path.name)).parts
    for part in reversed(parts):
        if match := _SPLIT_NAME.match(part.lower()):
            return "val" if match[1].startswith("val") else match[1]
    raise DataError(f"{path} belongs to no split: its name, or its folder's, must start with train, val or test")


def _parquet(root: Path, files: Sequence[Path], max_pixels: int) -> tuple[dict[str, _Raw], tuple[str, ...], int | None]:
    tables: dict[str, list[pa.Table]] = {}
    for path in files:
        try:
            tables.setdefault(_split_of(path, root), []).append(pq.read_table(path))
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path} is not a readable Parquet file ({error}): copy it again") from None
    columns = {_columns(table, root) for shards in tables.values() for table in shards}
    if len(columns) > 1:
        raise DataError(f"the files of {root} differ in columns or class names: {' / '.join(map(str, columns))}")
    image, target, is_mask, class_names = columns.pop()
    whole = {split: pa.concat_tables([t.select([image, target]) for t in shards]) for split, shards in tables.items()}
    if is_mask:
        # The last class is void where it is called so; the class numbers before it stay what they are.
        void = (
            len(class_names) - 1 if class_names and class_names[-1].lower() in ("void", "unlabeled", "ignore") else 255
        )
        class_names = class_names[:void]
        legal = frozenset(range(len(class_names))) | {void}
        raw = {s: _Raw(_encoded(s, t, image, max_pixels, target, legal), None) for s, t in whole.items()}
        return raw, class_names, void
    targets = {split: _class_numbers(split, table[target], len(class_names)) for split, table in whole.items()}
    if not class_names:
        class_names = tuple(str(k) for k in range(max(int(t.max()) for t in targets.values()) + 1))
    return {s: _Raw(_encoded(s, t, image, max_pixels), targets[s]) for s, t in whole.items()}, class_names, None


def _columns(table: pa.Table, root: Path) -> tuple[str, str, bool, tuple[str, ...]]:
    """Image column, target column, whether that holds masks, and the class names (none where the file has none)."""
    metadata = table.schema.metadata or {}
    features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    columns = set(table.column_names)
    images = [name for name in ("image", "img") if name in columns]
    labels = [k for k, f in features.items() if k in columns and isinstance(f, dict) and f.get("_type") == "ClassLabel"]
    labels = labels or [name for name in ("label", "labels") if name in columns]
    if not images or (len(labels) != 1 and "mask" not in columns):
        raise DataError(
            f"{root} has columns {', '.join(table.column_names)}: an `image` and either one `label` or a `mask` "
            f"are needed"
        )
    if "mask" in columns:
        return images[0], "mask", True, tuple(json.loads(metadata.get(b"classes", b"[]")))
    return images[0], labels[0], False, tuple(features.get(labels[0], {}).get("names", ()))


def _class_numbers(split: str, column: pa.ChunkedArray, n_classes: int) -> Tensor:
    if not pa.types.is_integer(column.type):
        raise DataError(
            f"labels of {split} are {column.type}, not class numbers: store integers and the names beside them"
        )
    numbers = torch.tensor(pc.fill_null(column, -1).to_numpy(), dtype=torch.int64)
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
) -> _Encoded:
    def reader(column: str) -> Callable[[int], bytes]:
        cells = table[column]
        if pa.types.is_struct(cells.type):
            cells = pc.struct_field(cells, "bytes")
        return lambda row: cells[row].as_py() or b""

    ids = _numbered(split, len(table))
    names: Sequence[str] = ids
    if pa.types.is_struct(table[image].type) and table[image].type.get_field_index("path") >= 0:
        names = [
            path or image_id
            for path, image_id in zip(pc.struct_field(table[image], "path").to_pylist(), ids, strict=True)
        ]
    return _Encoded(ids, names, reader(image), max_pixels, reader(mask) if mask else None, legal)


# --- model and data -------------------------------------------------------------------------------------------------


def check_classes(model_names: Sequence[str] | None, data_names: Sequence[str], n_classes: int) -> None:
    """Refuse a model and data that do not mean the same by a class number.

    ModelError where their counts differ; DataError where a name both know has another number in each. Names only one of
    them knows say nothing (a synset number against a word), and None means the model knows none. Data loaded with a
    `class_map` is in the model's order already: pass None.
    """
    if n_classes != len(data_names):
        raise ModelError(
            f"the model has {n_classes} classes and the data {len(data_names)}: "
            f"use a model of {len(data_names)} classes"
        )
    position = {_folded(name): number for number, name in enumerate(model_names or ())}
    for number, name in enumerate(data_names):
        known = position.get(_folded(name), number)
        if known != number:
            raise DataError(
                f"class {name!r} is number {known} of the model and {number} of the data: the order must be the "
                f"same, so give a class_map from name to the model's number"
            )


def _folded(name: Any) -> str:
    return str(name).strip().casefold()
