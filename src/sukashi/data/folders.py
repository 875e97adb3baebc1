"""Folders of class folders of images."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from sukashi.core import bounded
from sukashi.core.errors import DataError
from sukashi.data.classes import numbering
from sukashi.data.images import SUFFIXES, Encoded, Found, Source, TooLarge, Unreadable
from sukashi.data.tree import (
    files_in,
    folders_in,
    is_hidden,
    is_masks,
    is_plain_split,
    leads_nowhere,
    split_of,
    suffixes,
    unread,
)

_BYTES_A_PIXEL, _HEADER = 8, 2**26  # an encoded image of so many pixels has no more bytes, whatever its format


def image_folder(root: Path, max_pixels: int) -> Found:
    """root/train/CLASS/*.png with root/test or root/val beside it, or root/CLASS/*.png alone.

    Classes are numbered by sorted folder name; an image's id is its path inside `root`. Links are followed.
    """
    found, notes = split_folders(root)
    class_names = _class_names(root, found)
    splits: dict[str, tuple[Source, Tensor | None]] = {}
    warned: list[str] = []
    for split, path in found.items():
        inside = [files_in(path / name) for name in class_names]
        of_class = [_images(path / name, held, root) for name, held in zip(class_names, inside, strict=True)]
        paths = [image for images in of_class for image in images]
        ids = tuple(image.relative_to(root).as_posix() for image in paths)
        targets = torch.tensor([k for k, images in enumerate(of_class) for _ in images], dtype=torch.int64)
        splits[split] = (Encoded(ids, ids, file_reader(paths, max_pixels), max_pixels), targets)
        others = _others(path, {*chain(*inside)} - {*paths}, class_names)
        warned += unread(others)
        notes += _ignored(path, others)
    warned += _layers(root, found, class_names)
    return Found(splits, class_names, (*notes, *numbering(class_names)), tuple(warned))


def has_classes(root: Path) -> bool:
    """Whether there are class folders, two at least."""
    found, _ = split_folders(root)
    return len({folder.name for path in found.values() for folder in folders_in(path)}) > 1


def split_folders(root: Path) -> tuple[dict[str, Path], list[str]]:
    """The folder of each split, or {"": root} where the folders are classes; and what there is to be noted of that.

    Folders are splits where all of them are named so. One named so among others is a class where it holds images as
    they do.
    """
    folders = folders_in(root)
    splits = [folder for folder in folders if is_plain_split(folder.name) or (split_of(folder.name) and _deep(folder))]
    named = {split_of(folder.name) or "": folder for folder in splits}
    plain = [folder for folder in splits if is_plain_split(folder.name)]
    if splits and len(named) == len(folders):
        return {split: _below(folder, split) for split, folder in named.items()}, []
    if len(named) < 2 and not plain:
        return {"": root}, []
    if len(splits) == 1 and len(folders) > 2 and not _deep(splits[0]):
        return {"": root}, [f"{splits[0].name} is a class like the {len(folders) - 1} folders beside it, not a split"]
    raise DataError(
        f"{root} holds {', '.join(folder.name for folder in folders)}: either splits (train, test, val) or "
        f"classes, never both or two names of one split; rename or move folders"
    )


def _deep(folder: Path) -> bool:
    """Whether a folder holds folders, as those of splits do."""
    return bool(folders_in(folder))


def _below(folder: Path, split: str) -> Path:
    """The folder of a split without those of the same split that are wrapped around it: seg_train/seg_train."""
    while len(inside := folders_in(folder)) == 1 and split_of(inside[0].name) == split:
        folder = inside[0]
    return folder


def _class_names(root: Path, found: dict[str, Path]) -> tuple[str, ...]:
    """Sorted names of the class folders. Raises DataError where splits differ, or fewer than two are there."""
    classes = {split: [folder.name for folder in folders_in(path)] for split, path in found.items()}
    class_names = sorted(set().union(*classes.values()))
    for split, present in classes.items():
        if not present and class_names:
            _refuse_none(root, {split: found[split]})
        if missing := [name for name in class_names if name not in present]:
            raise DataError(
                f"{found[split]} has no folder for {', '.join(missing)}, another split has one: "
                f"every split needs every class"
            )
    if not class_names:
        _refuse_none(root, found)
    inside = {name: folders_in(path / name) for path in found.values() for name in class_names}
    if len(class_names) == 1:
        _refuse_one(root, next(iter(found.values())) / class_names[0], inside[class_names[0]])
    if any(within and all(is_plain_split(folder.name) for folder in within) for within in inside.values()):
        raise DataError(
            f"{root} holds {', '.join(class_names)} with splits inside: give one of them, or put classes into splits "
            "(train/CLASS/*.png)"
        )
    return tuple(class_names)


def _refuse_none(root: Path, found: Mapping[str, Path]) -> NoReturn:
    """Refuse a dataset, or a split of it, that has no class folders: that has images beside each other, or none."""
    for folder in found.values():
        images = [path for path in folder.iterdir() if is_image(path) and not is_hidden(Path(path.name))]
        if images:
            raise DataError(
                f"{folder} holds {len(images)} image{'s' * (len(images) > 1)} and no class folders, so nothing says "
                "what they show: put them into a folder for each class (CLASS/*.png), or their names and labels into a "
                "CSV beside them; where they are one class of several, give the folder that holds those of all"
            )
    raise DataError(
        f"{root} holds neither Parquet files nor class folders: it needs train/CLASS/*.png or CLASS/*.png, or a CSV of "
        "files and labels"
    )


def _refuse_one(root: Path, folder: Path, inside: Sequence[Path]) -> None:
    held = ", ".join(path.name for path in inside[:5]) + (", ..." if len(inside) > 5 else "")
    if not inside:
        remedy = "labels come from class folders, CLASS/*.png, from a CSV beside the images, or from Parquet"
    elif folder.parent == root:
        remedy = f"it holds {held}, so give {folder}"
    else:
        remedy = f"it holds {held}, so move these up into {folder.parent}"
    raise DataError(f"{root} holds one class, {folder.name!r}, and two are needed: {remedy}")


def _images(folder: Path, held: Sequence[Path], root: Path) -> list[Path]:
    """The images among what a class holds, by their suffix; and links that lead nowhere, which are none any more."""
    seen = [path for path in held if not is_hidden(path.relative_to(root))]
    images = [path for path in seen if is_image(path)]
    if seen and not images:
        known = ", ".join(sorted(SUFFIXES))
        remedy = "; ".join(unread(seen)) or f"convert them to one of {known}, or take the folder away"
        raise DataError(f"{folder} holds no image by its suffix, but {suffixes(seen)}: {remedy}")
    return images


def is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES or leads_nowhere(path)


def _others(folder: Path, others: set[Path], class_names: Sequence[str]) -> set[Path]:
    """`others`, which class folders hold, and what is beside these."""
    beside = [path for path in folder.iterdir() if path.name not in class_names and not is_masks(path)]
    for path in beside:
        others |= {*files_in(path)} if path.is_dir() else {path}
    return others


def _ignored(folder: Path, others: set[Path]) -> list[str]:
    if not others:
        return []
    return [
        f"{len(others)} file(s) of {folder.name} ignored ({suffixes(others)}): hidden, in no class folder, or no image "
        "by their suffix"
    ]


def _layers(root: Path, found: dict[str, Path], class_names: Sequence[str]) -> list[str]:
    """A note where every class holds the same folders, which may be the classes."""
    inside = {tuple(p.name for p in folders_in(path / name)) for path in found.values() for name in class_names}
    if len(inside) > 1 or len(names := inside.pop()) < 2:
        return []
    return [f"every class folder of {root.name} holds the folders {', '.join(names[:4])}, read as parts of the class"]


def file_reader(paths: Sequence[Path], max_pixels: int) -> Callable[[int], bytes]:
    """Reads the image of a row. Raises Unreadable for what is no file any more, TooLarge for one of too many bytes."""
    most = _HEADER + _BYTES_A_PIXEL * max_pixels

    def read(row: int) -> bytes:
        if leads_nowhere(paths[row]):
            raise Unreadable("a link that leads nowhere")
        try:
            return bounded.read(paths[row], most)
        except OSError as error:
            if error.errno == errno.EFBIG:
                raise TooLarge(str(error.strerror)) from None
            raise Unreadable(error.strerror or str(error)) from None

    return read
