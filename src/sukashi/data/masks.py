"""Where the evidence is in images, as people drew it: files of the images' names, or columns beside them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from sukashi.core.errors import DataError, UsageError
from sukashi.core.types import Preprocess
from sukashi.data.folders import file_reader, is_image
from sukashi.data.images import Found, Masks, Source, TooLarge, Unreadable, bad_images, mask_of, resized
from sukashi.data.tree import IMAGES, MASKS, files_in

Key = tuple[str, ...]


def masks_beside(root: Path, found: Found, max_pixels: int) -> Found:
    """The data with the masks that lie in folders `masks` among their images, if there are any."""
    everything = files_in(root, masks=True)
    if not any(part.casefold() == MASKS for path in everything for part in path.relative_to(root).parts[:-1]):
        return found
    files = [path for path in sorted({*everything} - {*files_in(root)}) if is_image(path)]
    if not files:
        return found
    note = (
        f"{len(files)} image{'s' if len(files) > 1 else ''} in folders called masks taken for masks, and for no class"
    )
    return replace(with_files(found, "mask", root, files, max_pixels), notes=(*found.notes, note))


def masks_given(folders: Iterable[str | Path], found: Found, max_pixels: int) -> Found:
    """The data with the masks of these folders, each a concept of the folder's name.

    Raises UsageError for what is no folder, and two of one name; DataError for a folder without images.
    """
    known: set[str] = set()
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise UsageError(f"`masks={str(folder)!r}` is no folder: give one that holds masks under the images' names")
        name = folder.resolve().name
        concept = "mask" if name.casefold() == MASKS else name
        if concept in known:
            raise UsageError(f"two folders of masks are called {name}, as concepts are: rename one")
        known.add(concept)
        files = [path for path in files_in(folder, masks=True) if is_image(path)]
        if not files:
            raise DataError(f"{folder} holds no image, and so no mask: give the folder that holds them")
        found = with_files(found, concept, folder, files, max_pixels)
    return found


def with_files(found: Found, concept: str, root: Path, files: Sequence[Path], max_pixels: int) -> Found:
    """The data with masks out of files under `root`, which are called as the images are but for the suffix."""
    by_key: dict[Key, list[Path]] = defaultdict(list)
    for path in files:
        by_key[_key(path.relative_to(root).as_posix())].append(path)
    images = Counter(_key(image_id) for source, _ in found.splits.values() for image_id in source.ids)

    def of(image_id: str) -> Image.Image | None:
        key = _key(image_id)
        paths = by_key.get(key, [])
        if not paths:
            return None
        if len(paths) > 1:
            raise Unreadable(f"both {paths[0]} and {paths[1]} are masks of it: remove one")
        if images[key] > 1:
            raise Unreadable(f"{paths[0]} would be the mask of {images[key]} images of one name: rename them")
        return mask_of(file_reader(paths, max_pixels)(0), max_pixels)

    return with_masks(found, {concept: of})


def with_masks(found: Found, masks: Mapping[str, Callable[[str], Image.Image | None]]) -> Found:
    """The data with further masks, each of a concept."""
    known = found.masks

    def every(image_id: str) -> Mapping[str, Image.Image | None]:
        before = {} if known is None else known(image_id)
        return {**before, **{concept: of(image_id) for concept, of in masks.items()}}

    return replace(found, masks=every)


def _key(image_id: str) -> Key:
    """By what an image and its mask are found to be of one name: class/images/1.jpg and class/masks/1.png."""
    *folders, name = PurePosixPath(image_id).parts
    return *(part for part in folders if part.casefold() not in (MASKS, IMAGES)), PurePosixPath(name).stem


def boxed(boxes: Sequence[Sequence[float]], size: tuple[int, int]) -> Image.Image:
    """A mask of a size (width, height) that is inside boxes (x0, y0, x1, y1), in pixels from the top left corner.

    Every pixel that a box touches is inside. Raises Unreadable for a box that is none, or lies outside the image.
    """
    width, height = size
    mask = Image.new("L", size)
    for box in boxes:
        x0, y0, x1, y1 = box if len(box) == 4 else (0, 0, 0, 0)
        if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
            raise Unreadable(f"box {list(box)} is not x0, y0, x1, y1 in pixels of an image of {width} x {height}")
        corners = int(x0), int(y0), int(np.ceil(x1)) - 1, int(np.ceil(y1)) - 1
        ImageDraw.Draw(mask).rectangle(corners, fill=255)
    return mask


def masks_drawn(
    masks: Masks, image_ids: Sequence[str], sources: Mapping[str, tuple[Source, int]], preprocess: Preprocess
) -> dict[str, Tensor]:
    """Where each concept is, (B, H, W) bool, as a model reads images; nowhere in those of which there is no mask.

    `sources` say where each image is read. Raises DataError for masks that can't be used.
    """
    size = preprocess.height, preprocess.width
    found: dict[str, np.ndarray] = {}
    bad: list[tuple[str, str]] = []
    for row, image_id in enumerate(image_ids):
        source, at = sources[image_id]
        try:
            for concept, mask in masks(image_id).items():
                inside = found.setdefault(concept, np.zeros((len(image_ids), *size), dtype=bool))
                if mask is not None:
                    _check_shape(mask.size, source.size(at))
                    inside[row] = np.asarray(resized(mask, preprocess, Image.Resampling.NEAREST)) > 0
        except (Unreadable, TooLarge) as error:
            bad.append((source.name(at), str(error)))
    if bad:
        raise bad_images("the masks", bad, "replace them, or take them away")
    return {concept: torch.from_numpy(inside) for concept, inside in found.items()}


def _check_shape(mask: tuple[int, int], image: tuple[int, int]) -> None:
    """A mask may be smaller or larger than its image, but shows the same part of it: the same shape, to a pixel."""
    if abs(mask[0] * image[1] - mask[1] * image[0]) > max(*mask, *image):
        raise Unreadable(
            f"its mask has the shape of another image: {mask[0]} x {mask[1]} pixels, not {image[0]} x {image[1]}"
        )
