"""Watermarks: a text or a logo laid over images, half transparent, where one knows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from sukashi.core.errors import UsageError
from sukashi.core.types import Preprocess


@dataclass(frozen=True)
class Watermark:
    """A mark: the letters of `text`, or the `logo` in their place, in `colour` and as opaque as `opacity` says.

    `size` is the height of its letters (or of the logo) as a share of the image's shorter side, `at` where its left
    upper corner is, in shares of width and height. `font` is a file of a font that has the letters, `number` which of
    those in it; the one that Pillow brings has Latin ones only. A logo is an image: its alpha, or where it has none how
    dark it is, says where the mark is.

    ImageNet's, of stock photographs, is six CJK letters across the middle, white and half transparent: size=36 / 224,
    at=(.01, .4) (Danek and Ramaswamy's code), with any font that has them.

    Raises UsageError for a mark without text and logo, or with both, and numbers out of range.
    """

    text: str = ""
    size: float = 0.15
    at: tuple[float, float] = (0.05, 0.8)
    opacity: float = 0.5
    colour: tuple[float, float, float] = (1.0, 1.0, 1.0)
    font: str | None = None
    number: int = 0
    logo: str | None = None

    def __post_init__(self) -> None:
        if bool(self.text) == bool(self.logo):
            raise UsageError("a watermark needs a text or a logo, one of them")
        for name, values in (("at", self.at), ("opacity", (self.opacity,)), ("colour", self.colour)):
            if not all(0 <= value <= 1 for value in values):
                raise UsageError(f"{name} of a watermark must be in [0, 1], got {getattr(self, name)}")
        if not 0 < self.size <= 1:
            raise UsageError(f"size of a watermark must be in (0, 1], a share of the shorter side, got {self.size}")

    def alpha(self, height: int, width: int) -> Tensor:
        """(H, W) in [0, 1] how much of each pixel is the mark's: `opacity` inside it, less at its rims, 0 elsewhere.

        Raises UsageError where nothing of it is seen, as a font without its letters draws.
        """
        canvas = Image.new("L", (width, height), 0)
        pixels = max(1, round(self.size * min(height, width)))
        corner = (round(self.at[0] * width), round(self.at[1] * height))
        if self.logo is not None:
            canvas.paste(self._logo(pixels), corner)
        else:
            ImageDraw.Draw(canvas).text(corner, self.text, fill=255, font=self._font(pixels))
        alpha = torch.from_numpy(np.asarray(canvas, dtype=np.float32) / 255) * self.opacity
        if not alpha.any():
            raise UsageError(
                f"nothing of the watermark is seen in {height} x {width} pixels: give another place, a larger size, or "
                "a font that has its letters"
            )
        return alpha

    def _font(self, pixels: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
        if self.font is None:
            return ImageFont.load_default(pixels)
        try:
            return ImageFont.truetype(self.font, pixels, index=self.number)
        except OSError as error:
            raise UsageError(f"{self.font} is no font that can be read ({error}): give a file of TrueType") from None

    def _logo(self, pixels: int) -> Image.Image:
        path = Path(self.logo or "")
        try:
            image = Image.open(path).convert("RGBA")
        except OSError as error:
            raise UsageError(f"{path} is no image that can be read ({error})") from None
        where = image.getchannel("A")
        if where.getextrema() == (255, 255):
            where = image.convert("L").point(lambda value: 255 - value)
        return where.resize((max(1, round(pixels * image.width / image.height)), pixels))


def stamped(x: Tensor, mark: Watermark, preprocess: Preprocess) -> Tensor:
    """Images (B, C, H, W) as a network reads them, with a mark: (1 - alpha) x + alpha colour, in [0, 1] before scaling.

    Of grey images the mark's colour is its mean. Raises what `Watermark.alpha` does.
    """
    alpha = mark.alpha(*x.shape[2:]).to(x)
    colour = torch.tensor(mark.colour if x.shape[1] == 3 else (sum(mark.colour) / 3,) * x.shape[1]).to(x)
    mean, std = (torch.tensor(of).to(x) for of in (preprocess.mean, preprocess.std))
    return x * (1 - alpha) + alpha * ((colour - mean) / std)[:, None, None]
