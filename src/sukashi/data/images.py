"""One image: from encoded bytes to the numbers a model sees, by one fixed chain.

Pillow decodes; `_plain` brings every mode to 8-bit grey, 8-bit RGB or 16-bit grey; `fitted` meets a model's
`Preprocess`.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from sukashi.core.errors import DataError
from sukashi.core.types import Preprocess

# Named, because Pillow otherwise tries every plugin it has; EPS, for one, starts Ghostscript.
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pnm"}
)
_ORIENTATION = 0x0112
_MAX_RESIZED = 2**26  # pixels on the way to a crop

GREY = "greyscale: repeated where a model wants three channels"
_ROTATED = "EXIF orientation: applied"
_BITS = (8, 10, 12, 14, 16)  # that cameras and detectors fill of 16
_MODES = {
    "1": GREY,
    "L": GREY,
    "I": "",
    "I;16": "",
    "I;16B": "",
    "P": "palette: looked up as RGB",
    "RGB": "",
    "LA": "",
    "PA": "",
    "RGBA": "",
    "CMYK": "CMYK: converted to RGB by Pillow, without a colour profile",
    "YCbCr": "YCbCr: converted to RGB",
}


def deep(bits: int) -> str:
    """The rule of an image of 16 bits, of which so many are used."""
    return f"16-bit grey{'' if bits == 16 else f' of {bits} bits'}: divided by {2**bits - 1}"


DEEP = {deep(bits): bits for bits in _BITS}


class Unreadable(Exception):
    """An image that cannot be used; the message is the reason."""


class TooLarge(Exception):
    """An image above the pixel cap: fatal even where bad images are skipped, because a setting decides."""


def bad_images(where: str, bad: Sequence[tuple[str, str]], remedy: str) -> DataError:
    """The error that lists every one of them."""
    listed = "\n".join(f"  {name}: {reason}" for name, reason in bad)
    return DataError(f"{len(bad)} image(s) of {where} cannot be used; {remedy}:\n{listed}")


@contextmanager
def _reading() -> Iterator[None]:
    """Turn whatever Pillow raises into a reason: on hostile bytes it lets struct, Key, Syntax and EOF errors escape."""
    try:
        yield
    except (Unreadable, TooLarge):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooLarge(str(error)) from None
    except UnidentifiedImageError:
        raise Unreadable("not an image") from None
    except Exception as error:
        raise Unreadable(f"cannot be decoded: {error}") from None


def _open(encoded: bytes, max_pixels: int) -> Image.Image:
    """The image with its header read and its pixels not yet decoded."""
    if not encoded:
        raise Unreadable("no bytes")
    image = Image.open(io.BytesIO(encoded), formats=_FORMATS)
    if image.width * image.height > max_pixels:
        raise TooLarge(f"{image.width} x {image.height} pixels")
    if image.mode not in _MODES or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise Unreadable(f"{image.format} of mode {image.mode} has no fixed scale to [0, 1]")
    return image


def _rules(encoded: bytes, max_pixels: int) -> list[str]:
    """The conversion rules an image needs; raises where it cannot be used.

    A JPEG that ends with its end marker was not truncated: knowing that costs a third of decoding it. Any other image
    is decoded to find out.
    """
    image = _open(encoded, max_pixels)
    rules = [_MODES[image.mode]] if _MODES[image.mode] else []
    is_deep = image.mode.startswith("I")
    if is_deep:
        most = int(np.asarray(image).max())
        rules.append(deep(next(bits for bits in _BITS if most < 2**bits or bits == 16)))
    if image.has_transparency_data and not is_deep:
        rules.append("transparent: laid over white")
    if image.format == "PNG" and encoded[24] == 16 and not is_deep:
        rules.append("16-bit colour: upper 8 bits kept")
    if getattr(image, "is_animated", False):
        rules.append("several frames: the first one used")
    if _is_turned(image):
        rules.append(_ROTATED)
    if image.format != "JPEG" or not encoded.endswith(b"\xff\xd9"):
        image.load()
    return rules


def _is_turned(image: Image.Image) -> bool:
    """Whether an EXIF orientation says that the image does not stand upright; most numbers mean nothing."""
    return image.getexif().get(_ORIENTATION) in range(2, 9)


def _plain(image: Image.Image, bits: int = 16) -> Image.Image:
    """The upright image as L or RGB (8 bits) or F (grey in [0, 1], from 16 bits, of which `bits` are used)."""
    if _is_turned(image):
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # Pillow's own conversion saturates at 255
        return Image.fromarray(np.asarray(image, dtype=np.float32) / (2**bits - 1))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    if image.mode in ("1", "L"):
        return image.convert("L")
    return image if image.mode in ("RGB", "F") else image.convert("RGB")


def mask_of(encoded: bytes, max_pixels: int) -> Image.Image:
    """A mask as L, 255 inside: where any colour is above 0, and of a JPEG, which blurs, above half of its highest.

    Transparency plays no part. Raises Unreadable and TooLarge.
    """
    with _reading():
        image = _open(encoded, max_pixels)
        if _is_turned(image):
            raise Unreadable("it has an EXIF orientation, and nothing says which way up it is meant: save it upright")
        if image.mode not in ("1", "L", "LA", "RGB", "RGBA") and not image.mode.startswith("I"):
            image = image.convert("RGB")
        values = np.asarray(image)
    if image.mode in ("LA", "RGBA"):
        values = values[..., :-1]
    values = values.max(2) if values.ndim == 3 else values
    return Image.fromarray(np.uint8(255) * (values > (values.max() / 2 if image.format == "JPEG" else 0)))


def sized(image: Image.Image | np.ndarray, preprocess: Preprocess) -> np.ndarray:
    """The plain image as uint8 (C, H, W), or as float32 in [0, 1] where it is deeper than 8 bits.

    RGB becomes grey by the luma of ITU-R BT.601 (0.299 R + 0.587 G + 0.114 B), grey becomes RGB by repetition, and the
    size is met by Pillow's antialiased bilinear filter, in the depth the image has; see `resized`. An image that is
    planes (C, H, W) already is taken as it is.
    """
    if isinstance(image, np.ndarray):
        return image
    if preprocess.channels == 1 and image.mode == "RGB":
        image = image.convert("L")
    pixels = np.asarray(resized(image, preprocess, Image.Resampling.BILINEAR))
    if pixels.ndim == 2:
        return np.broadcast_to(pixels, (preprocess.channels, *pixels.shape))
    return pixels.transpose(2, 0, 1)


def resized(image: Image.Image, preprocess: Preprocess, how: Image.Resampling) -> Image.Image:
    """The image at a model's size: squashed, or the centre of what its shorter side is resized to.

    The latter as torchvision's Resize and CenterCrop do it, numbers rounded alike, so that pixels are the same.
    """
    size = width, height = preprocess.width, preprocess.height
    if preprocess.shorter is None:
        return image if image.size == size else image.resize(size, how)
    box = [-(-side * preprocess.shorter // min(size)) for side in size]  # that the whole image has to cover
    if image.width * box[1] >= image.height * box[0]:
        whole = box[1] * image.width // image.height, box[1]
    else:
        whole = box[0], box[0] * image.height // image.width
    left, top = (round((full - side) / 2) for full, side in zip(whole, size, strict=True))
    corners = left, top, left + width, top + height
    if whole[0] * whole[1] > _MAX_RESIZED:  # a strip: no more of it than is taken, the same but for a rounding
        x, y = (of / full for full, of in zip(whole, image.size, strict=True))
        return image.resize(size, how, box=(left * x, top * y, corners[2] * x, corners[3] * y))
    return (image if image.size == whole else image.resize(whole, how)).crop(corners)


def fitted(image: Image.Image | np.ndarray, preprocess: Preprocess) -> np.ndarray:
    """What `sized` gives as float32 (C, H, W) in [0, 1]."""
    pixels = sized(image, preprocess)
    return pixels if pixels.dtype == np.float32 else pixels.astype(np.float32) / np.float32(255)


Masks = Callable[[str], Mapping[str, Image.Image | None]]


class Source(Protocol):
    """A numbered set of images: `ids` for ever, `names` for messages."""

    @property
    def ids(self) -> tuple[str, ...]: ...

    def check(self, row: int) -> tuple[bytes, list[str]]:
        """A digest of the image's bytes (16, then 16 of its mask's), and the rules it needs; raises if unusable."""

    def image(self, row: int) -> Image.Image | np.ndarray:
        """The decoded image, plain; or its planes (C, H, W) as a network takes them."""

    def size(self, row: int) -> tuple[int, int]:
        """Width and height; raises Unreadable where a turn makes it unclear which is which."""

    def name(self, row: int) -> str:
        """What a message calls the image."""


def _digest(encoded: bytes) -> bytes:
    return hashlib.blake2b(encoded, digest_size=16).digest()


@dataclass(frozen=True, eq=False)
class Pixels:
    """Images in memory: uint8 (N, H, W) or (N, H, W, 3), or float32 (N, H, W) in [0, 1]."""

    ids: tuple[str, ...]
    pixels: np.ndarray

    def check(self, row: int) -> tuple[bytes, list[str]]:
        return _digest(self.pixels[row].tobytes()), [GREY] if self.pixels.ndim == 3 else []

    def image(self, row: int) -> Image.Image:
        return Image.fromarray(self.pixels[row])

    def size(self, row: int) -> tuple[int, int]:
        return self.pixels.shape[2], self.pixels.shape[1]

    def name(self, row: int) -> str:
        return self.ids[row]


@dataclass(frozen=True, eq=False)
class Encoded:
    """Images as encoded bytes, decoded when asked for; `read_mask` where each has a map of classes, `bits` how many are
    used of 16 in grey images that have so many.
    """

    ids: tuple[str, ...]
    names: Sequence[str]
    read: Callable[[int], bytes]
    max_pixels: int
    read_mask: Callable[[int], bytes] | None = None
    legal: frozenset[int] = frozenset()
    bits: int = 16

    def check(self, row: int) -> tuple[bytes, list[str]]:
        with _reading():
            encoded = self.read(row)
            rules = _rules(encoded, self.max_pixels)
        if self.read_mask is not None:
            if _ROTATED in rules:
                raise Unreadable("it has an EXIF orientation, and nothing says which way up its mask is")
            if (mask := self.mask(row).size) != (size := self.image(row).size):
                raise Unreadable(f"mask is {mask[0]} x {mask[1]} pixels, image {size[0]} x {size[1]}")
            return _digest(encoded) + _digest(self.read_mask(row)), rules
        return _digest(encoded), rules

    def image(self, row: int) -> Image.Image:
        with _reading():
            return _plain(_open(self.read(row), self.max_pixels), self.bits)

    def size(self, row: int) -> tuple[int, int]:
        with _reading():
            image = _open(self.read(row), self.max_pixels)
            if _is_turned(image):
                raise Unreadable("it has an EXIF orientation, and nothing says which way up its mask is")
            return image.size

    def mask(self, row: int) -> Image.Image:
        """The map of class numbers, checked to hold nothing else."""
        assert self.read_mask is not None
        try:
            with _reading():
                mask = _open(self.read_mask(row), self.max_pixels)
                mask.load()
        except Unreadable as error:
            raise Unreadable(f"mask: {error}") from None
        if mask.mode not in ("L", "P", "I;16", "I"):
            raise Unreadable(f"mask has mode {mask.mode}, not one class number a pixel")
        alien = sorted(set(np.unique(np.asarray(mask)).tolist()) - self.legal)
        if alien:
            raise Unreadable(f"mask holds {alien[0]}, which is no class number")
        return mask

    def name(self, row: int) -> str:
        return f"{self.ids[row]} ({self.names[row]})" if self.names[row] != self.ids[row] else self.ids[row]


@dataclass(frozen=True, eq=False)
class Found:
    """A dataset as a reader finds it, before any image was looked at.

    `splits` maps train, test and val, or "" for images that were never split, to their source and targets (N,), None
    where each image has a map of classes instead. `warnings` are sentences as `notes` are, of what may make figures
    mean something else. `groups` are the values of the column that was asked for, where there is one, of each split's
    images, None where one is missing. `masks` gives of an image's id where the evidence is (`mask_of`), by concept,
    None where nobody drew it. `preprocess` is there for images that are tensors as a network takes them: nothing is
    left to be done.
    """

    splits: Mapping[str, tuple[Source, Tensor | None]]
    class_names: tuple[str, ...]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    groups: Mapping[str, Sequence[str | None]] | None = None
    ignore_index: int | None = None
    masks: Masks | None = None
    facts: Callable[[Sequence[str]], list[dict[str, Any]]] | None = None
    preprocess: Preprocess | None = None


def numbered(split: str, n: int) -> tuple[str, ...]:
    """Ids of rows: train/00000, train/00001, ..."""
    width = max(5, len(str(n - 1)))
    return tuple(f"{split}/{row:0{width}d}" for row in range(n))
