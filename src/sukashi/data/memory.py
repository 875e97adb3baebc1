"""Images that are tensors already: from a notebook's loaders and datasets, held by this process under a name."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sukashi.core.errors import DataError, UsageError
from sukashi.core.types import Preprocess
from sukashi.data.images import Found, Unreadable

PREFIX = "memory:"
MAX_BYTES = 2**33
_BATCH = 256
_held: dict[str, Found] = {}


@dataclass(frozen=True, eq=False)
class Tensors:
    """Images (N, C, H, W) float32 as a network takes them. An id is a hash of the image: order plays no part."""

    ids: tuple[str, ...]
    x: np.ndarray

    def check(self, row: int) -> tuple[bytes, list[str]]:
        if not np.isfinite(self.x[row]).all():
            raise Unreadable("it holds NaN or Inf")
        return hashlib.blake2b(self.x[row].tobytes(), digest_size=16).digest(), []

    def image(self, row: int) -> np.ndarray:
        return np.asarray(self.x[row])

    def size(self, row: int) -> tuple[int, int]:
        return self.x.shape[3], self.x.shape[2]

    def name(self, row: int) -> str:
        return self.ids[row]


def hold(data: Any) -> str:
    """The name under which `data.load` finds these images in this process: memory:HASH of all images, their shape,
    targets and class names.

    `data` are images (N, C, H, W) and targets (N,) as a pair of tensors, a torch Dataset or DataLoader of them, or
    {"train": such, "test": such, "val": such}. Images are taken as they are, so nothing normalises them again, and kept
    whole.

    Raises UsageError for anything else, DataError for tensors of other shapes and above MAX_BYTES.
    """
    parts = dict(data) if isinstance(data, Mapping) else {"": data}
    if not parts or not set(parts) <= {"", "train", "val", "test"}:
        raise UsageError(f"data must hold train, test and val, got {', '.join(map(str, parts)) or 'nothing'}")
    read = {split: _read(split, part) for split, part in parts.items()}
    shapes = {tuple(x.shape[1:]) for x, _ in read.values()}
    if len(shapes) > 1:
        raise DataError(f"images have shapes {' and '.join(map(str, sorted(shapes)))}: give one shape (C, H, W)")
    n_classes = 1 + max(int(target.max()) for _, target in read.values())
    named = next((names for part in parts.values() if (names := _class_names(part, n_classes))), None)
    channels, height, width = next(iter(shapes))
    found = Found(
        {split: _sorted(split, x, target) for split, (x, target) in read.items()},
        named or tuple(map(str, range(n_classes))),
        preprocess=Preprocess(height, width, channels, (0.0,) * channels, (1.0,) * channels),
    )
    whole = hashlib.sha256(f"{(channels, height, width)} {found.class_names}".encode())
    for split, (source, target) in found.splits.items():
        assert target is not None
        whole.update(f"{split} {source.ids} {target.tolist()}".encode())
    name = whole.hexdigest()[:16]
    _held[name] = found
    return PREFIX + name


def held(name: str) -> Found:
    """What `hold` was given. Raises UsageError where this process holds nothing under that name."""
    if name not in _held:
        raise UsageError(f"{PREFIX}{name} is data in the memory of another process: give the loader or dataset again")
    return _held[name]


def _read(split: str, given: Any) -> tuple[Tensor, Tensor]:
    """Images and targets of one split."""
    where = split or "data"
    if isinstance(given, tuple | list) and len(given) == 2 and all(isinstance(part, Tensor) for part in given):
        batches: Iterable[Any] = [given]
    elif isinstance(given, DataLoader):
        batches = given
    elif isinstance(given, Dataset):
        batches = DataLoader(given, batch_size=_BATCH)
    else:
        raise UsageError(
            f"{where} must be a name, a folder, tensors (images, targets), a torch Dataset or a DataLoader, got a "
            f"{type(given).__name__}"
        )
    xs, targets, n_bytes = [], [], 0
    for batch in batches:
        if not (isinstance(batch, tuple | list) and len(batch) >= 2):
            raise DataError(f"{where} gives a {type(batch).__name__}: it must give (images, targets)")
        x, target = torch.as_tensor(batch[0]), torch.as_tensor(batch[1])
        if x.dim() != 4 or target.shape != (len(x),) or target.is_floating_point():
            raise DataError(
                f"{where} gives images {tuple(x.shape)} and targets {tuple(target.shape)} of {target.dtype}: they must "
                "be (N, C, H, W) and class numbers (N,)"
            )
        xs.append(x.detach().cpu().float())
        targets.append(target.detach().cpu().long())
        n_bytes += xs[-1].numel() * 4
        if n_bytes > MAX_BYTES:
            raise DataError(f"{where} takes more than {MAX_BYTES / 2**30:g} GiB in memory: give a folder of images")
    if not xs:
        raise DataError(f"{where} holds no images")
    return torch.cat(xs), torch.cat(targets)


def _sorted(split: str, x: Tensor, target: Tensor) -> tuple[Tensors, Tensor]:
    """Images in the order of their ids, so that a loader which shuffles gives the same data every time."""
    seen: Counter[str] = Counter()
    ids = []
    for image, number in zip(x.numpy(), target.tolist(), strict=True):
        name = hashlib.blake2b(image.tobytes() + str(number).encode(), digest_size=8).hexdigest()
        ids.append(f"{split or 'memory'}/{name}" + (f"-{seen[name]}" if seen[name] else ""))
        seen[name] += 1
    order = sorted(range(len(ids)), key=ids.__getitem__)
    rows = torch.tensor(order)
    return Tensors(tuple(ids[i] for i in order), x[rows].numpy()), target[rows]


def _class_names(given: Any, n_classes: int) -> tuple[str, ...] | None:
    """The names that torchvision's datasets know their classes by."""
    dataset = given.dataset if isinstance(given, DataLoader) else given
    names = getattr(dataset, "classes", None)
    return tuple(map(str, names)) if isinstance(names, list | tuple) and len(names) >= n_classes else None
