"""Torchvision's downloadable datasets, by name; fetched once, checked by hash and kept in the user's cache folder.

Torchvision's own reader of CIFAR unpickles, so CIFAR comes from its authors' binary version: the same images in the
same order.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sukashi.core.errors import DataError, UsageError, nearest
from sukashi.data.folders import image_folder
from sukashi.data.images import Found, Pixels, Source, numbered

# Name: md5 of the archive, its folder, the training files, the test file, the file of class names, bytes of labels an
# image (the last of them is the class).
_CIFAR = {
    "CIFAR10": (
        "c32a1d4ab5d03f1284b67883e8d87530",
        "cifar-10-batches-bin",
        tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        "test_batch.bin",
        "batches.meta.txt",
        1,
    ),
    "CIFAR100": (
        "03b5dce01913d631647c71ecec9e9cb8",
        "cifar-100-binary",
        ("train.bin",),
        "test.bin",
        "fine_label_names.txt",
        2,
    ),
}


def _mnist(name: str, cache: Path, max_pixels: int) -> Found:
    from torchvision import datasets

    train, test = (getattr(datasets, name)(cache, train=train, download=True) for train in (True, False))
    return _found((train.data.numpy(), train.targets), (test.data.numpy(), test.targets), train.classes)


def _planes(name: str, cache: Path, max_pixels: int) -> Found:
    from torchvision import datasets

    train, test = (getattr(datasets, name)(cache, split=split, download=True) for split in ("train", "test"))
    class_names = getattr(train, "classes", tuple("0123456789"))
    return _found(
        (train.data.transpose(0, 2, 3, 1), train.labels), (test.data.transpose(0, 2, 3, 1), test.labels), class_names
    )


def _cifar(name: str, cache: Path, max_pixels: int) -> Found:
    from torchvision.datasets.utils import download_url

    archive = cache / f"{name.replace('CIFAR', 'cifar-')}-binary.tar.gz"
    download_url(f"https://www.cs.toronto.edu/~kriz/{archive.name}", cache, md5=_CIFAR[name][0])
    return cifar_archive(name, archive)


def cifar_archive(name: str, archive: Path) -> Found:
    """CIFAR10 or CIFAR100 from the binary version, read inside the archive: nothing is written."""
    _, folder, train, test, names, n_labels = _CIFAR[name]
    with tarfile.open(archive) as tar:

        def read(member: str) -> bytes:
            stream = tar.extractfile(f"{folder}/{member}")
            assert stream is not None, "a file of an archive whose hash is known"
            return stream.read()

        def records(encoded: bytes) -> tuple[np.ndarray, np.ndarray]:
            rows = np.frombuffer(encoded, dtype=np.uint8).reshape(-1, n_labels + 3072)
            return rows[:, n_labels:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), rows[:, n_labels - 1]

        return _found(records(b"".join(map(read, train))), records(read(test)), read(names).decode().split())


def _eurosat(name: str, cache: Path, max_pixels: int) -> Found:
    from torchvision import datasets

    datasets.EuroSAT(cache, download=True)
    return image_folder(cache / "eurosat" / "2750", max_pixels)


def _imagenette(name: str, cache: Path, max_pixels: int) -> Found:
    from torchvision import datasets

    datasets.Imagenette(cache, size="320px", download=True)
    return image_folder(cache / "imagenette2-320", max_pixels)


def _found(train: tuple[np.ndarray, Any], test: tuple[np.ndarray, Any], class_names: Sequence[str]) -> Found:
    splits: dict[str, tuple[Source, Tensor | None]] = {
        split: (
            Pixels(numbered(split, len(pixels)), np.ascontiguousarray(pixels)),
            torch.as_tensor(np.asarray(targets).astype(np.int64)),
        )
        for split, (pixels, targets) in (("train", train), ("test", test))
    }
    return Found(splits, tuple(class_names))


KNOWN: dict[str, tuple[Callable[[str, Path, int], Found], str]] = {
    "MNIST": (_mnist, "70,000 handwritten digits, 28 x 28 grey"),
    "FashionMNIST": (_mnist, "70,000 pieces of clothing, 28 x 28 grey"),
    "KMNIST": (_mnist, "70,000 cursive Japanese characters, 28 x 28 grey"),
    "CIFAR10": (_cifar, "60,000 photographs of 10 classes, 32 x 32"),
    "CIFAR100": (_cifar, "60,000 photographs of 100 classes, 32 x 32"),
    "SVHN": (_planes, "99,289 house numbers, 32 x 32"),
    "STL10": (_planes, "13,000 photographs of 10 classes, 96 x 96"),
    "EuroSAT": (_eurosat, "27,000 satellite images of 10 land uses, 64 x 64"),
    "Imagenette": (_imagenette, "13,394 photographs of 10 ImageNet classes, 320 pixels"),
}


def torchvision(name: str, max_pixels: int) -> Found:
    """A dataset of `KNOWN`, from the cache folder or the network; DataError in one sentence where neither has it."""
    if name not in KNOWN:
        raise UsageError(f"unknown torchvision dataset {name!r}{nearest(name, KNOWN)}")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sukashi"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        return KNOWN[name][0](name, cache, max_pixels)
    except (OSError, RuntimeError) as error:  # urllib's errors are OSErrors, torchvision's own are RuntimeErrors
        raise DataError(
            f"torchvision:{name} is not in {cache} and cannot be downloaded ({error}): connect to a network once"
        ) from None
