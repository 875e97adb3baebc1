"""What a folder of data holds: its files, also behind links, and which names are those of splits."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from sukashi.core.errors import DataError
from sukashi.data.images import SUFFIXES

_SPLITS = {
    **dict.fromkeys(("train", "training", "trainset"), "train"),
    **dict.fromkeys(("test", "testing", "testset"), "test"),
    **dict.fromkeys(("val", "valid", "validation", "valset", "dev", "eval", "evaluation"), "val"),
}
_FILLERS = frozenset({"set", "data", "dataset", "split", "image", "images", "img", "imgs"})
MASKS, IMAGES = "masks", "images"
_LEFT_BEHIND = frozenset({"__MACOSX", "__pycache__", "@eaDir"})  # by archivers, interpreters and file servers


def split_of(name: str) -> str | None:
    """train, test or val, as a name's first word says, or else the only word that says so: seg_train, Testing."""
    return _first(name) or _only(name)


def split_in(path: Path) -> str | None:
    """The split that a path inside a dataset names, by first words before other words and a file before its folders."""
    parts = path.parts[::-1]
    return next((split for said in (_first, _only) for part in parts if (split := said(part)) is not None), None)


def _first(name: str) -> str | None:
    return _SPLITS.get(next(iter(_words(name)), ""))


def _only(name: str) -> str | None:
    said = {_SPLITS[word] for word in _words(name) if word in _SPLITS}
    return said.pop() if len(said) == 1 else None


def is_plain_split(name: str) -> bool:
    """Whether a name says a split and nothing else: Train, val2017, test_images, but not train_station."""
    words = [word for word in _words(name) if word not in _FILLERS]
    return len(words) == 1 and words[0] in _SPLITS


def _words(name: str) -> list[str]:
    return re.findall("[a-z]+", re.sub("(?<=[a-z])(?=[A-Z])", " ", name).lower())


def is_hidden(path: Path) -> bool:
    """Whether a path inside a dataset is not of it: hidden, or left behind by other programs."""
    return any(part.startswith(".") or part in _LEFT_BEHIND for part in path.parts)


def folders_in(folder: Path) -> list[Path]:
    """The folders in a folder that are not hidden and hold no masks, sorted.

    Raises DataError for a link that leads nowhere.
    """
    inside = sorted(path for path in folder.iterdir() if not is_hidden(Path(path.name)))
    for path in inside:
        if leads_nowhere(path) and not path.suffix:
            raise DataError(f"{path} is a link that leads nowhere: mend it or remove it")
    return [path for path in inside if path.is_dir() and not is_masks(path)]


def is_masks(folder: Path) -> bool:
    """Whether a folder is called masks and holds what is beside it again: folders or images of the same names.

    Beside it is also what is in a folder images there. Of a class that is called so neither is true.
    """
    if folder.name.casefold() != MASKS:
        return False
    here, images = folder.parent, folder.parent / IMAGES
    beside = _named(here) | (_named(images) if images.is_dir() else set())
    return bool(_named(folder) & beside)


def _named(folder: Path) -> set[tuple[bool, str]]:
    """The names of the folders and, without suffix, of the images in a folder; none where it can't be looked into."""
    try:
        inside = [path for path in folder.iterdir() if not is_hidden(Path(path.name))]
    except OSError:  # who reads it says so
        return set()
    files = {(False, path.stem) for path in inside if path.suffix.lower() in SUFFIXES and not path.is_dir()}
    return files | {(True, path.name) for path in inside if path.is_dir()}


def leads_nowhere(path: Path) -> bool:
    """Whether a path is a link to what is not there."""
    return path.is_symlink() and not path.exists()


def files_in(folder: Path, masks: bool = False) -> list[Path]:
    """All that is under a folder and no folder, sorted, also behind links; with `masks` those in folders of masks too.

    Each folder is looked into once, at its own place rather than behind a link; a link back to where it is reached from
    is not followed. Such a link stands for itself.
    """
    met = {_inode(above) for above in folder.resolve().parents}
    found: list[Path] = []
    ahead = [folder]
    while ahead:
        links = []
        for place, folders, files in os.walk(ahead.pop(0), onerror=partial(_refuse, folder.parent)):
            here = Path(place)
            if _inode(here) in met:
                found.append(here)
                folders.clear()
                continue
            met.add(_inode(here))
            if not masks:
                folders[:] = [name for name in folders if not is_masks(here / name)]
            found += [here / name for name in files]
            links += [here / name for name in folders if (here / name).is_symlink()]
        ahead += sorted(links)
    return sorted(found)


def _refuse(root: Path, error: OSError) -> None:
    if not is_hidden(Path(error.filename).relative_to(root)):
        raise DataError(f"{error.filename} can't be looked into ({error.strerror}): give the right to read it")


def _inode(path: Path) -> tuple[int, int]:
    at = path.stat()
    return at.st_dev, at.st_ino


_UNREAD = {
    **dict.fromkeys((".dcm", ".dicom", ".ima"), ("DICOM", "PNG with dcm2pnm (DCMTK) or pydicom")),
    **dict.fromkeys((".heic", ".heif", ".hif"), ("HEIC", "PNG or JPEG with heif-convert or ImageMagick")),
    ".avif": ("AVIF", "PNG or JPEG with avifdec or ImageMagick"),
    **dict.fromkeys((".jxl",), ("JPEG XL", "PNG with djxl")),
    **dict.fromkeys((".jp2", ".j2k", ".jpx"), ("JPEG 2000", "PNG with opj_decompress or ImageMagick")),
    **dict.fromkeys(
        (".nii", ".nii.gz", ".mha", ".nrrd"), ("a volume", "PNG slice by slice, with SimpleITK or nibabel")
    ),
    **dict.fromkeys(
        (".dng", ".cr2", ".cr3", ".nef", ".arw", ".raw"), ("a raw photograph", "PNG with dcraw or darktable")
    ),
    **dict.fromkeys((".svs", ".ndpi", ".mrxs"), ("a whole slide", "PNG tiles with OpenSlide")),
    **dict.fromkeys((".npy", ".npz", ".mat", ".h5", ".hdf5"), ("an array", "PNG, or give tensors from Python")),
    **dict.fromkeys((".svg", ".pdf"), ("a drawing", "PNG at the size you want")),
}


def unread(paths: Iterable[Path]) -> list[str]:
    """A sentence for each format among files that may be images and are not read: which, and what to do."""
    counted = Counter(suffix for path in paths if (suffix := _suffix(path)) in _UNREAD)
    return [
        f"{n} {suffix} file{'s' if n > 1 else ''}: {_UNREAD[suffix][0]} is not read, convert to {_UNREAD[suffix][1]}"
        for suffix, n in sorted(counted.items(), key=lambda pair: (-pair[1], pair[0]))
    ]


def _suffix(path: Path) -> str:
    return ".nii.gz" if path.name.lower().endswith(".nii.gz") else path.suffix.lower()


def suffixes(paths: Iterable[Path]) -> str:
    """How many files there are of each suffix: `18 .avif, 2 without a suffix`."""
    counted = Counter(path.suffix.lower() for path in paths)
    parts = [f"{n} {suffix or 'without a suffix'}" for suffix, n in counted.most_common()]
    return ", ".join(parts[:4]) + (", ..." if len(parts) > 4 else "")
