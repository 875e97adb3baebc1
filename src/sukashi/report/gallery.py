"""Galleries: images and, beside each, maps laid over it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from numpy.typing import NDArray

from sukashi.report import figures
from sukashi.report.figures import Drawn

Array = NDArray[Any]
# Pixels of a gallery: of a picture with what is around it, the gap, a line above, what stands below and at the left; a
# page's figures have 160 to the inch.
SIDE, GAP, LINE, BOTTOM, LEFT, DPI = 150, 3, 19, 64, 110, 160
# Colours of what speaks for a class, against it, or matters at all, told apart with any colour vision and in print.
FOR, AGAINST, MATTERS = (np.array(to_rgb(name)) for name in ("#B2182B", "#2166AC", "#762A83"))
OPAQUE = 0.9


@dataclass(frozen=True)
class Picture:
    """An image of a gallery: its pixels (H, W, C) in [0, 1], its class, and every model's map (H, W) by label.

    `wrong` are the models that do not get it right, `marked` the one for whose sake it is shown ("" for none).
    """

    pixels: Array
    title: str
    maps: Mapping[str, Array]
    wrong: tuple[str, ...]
    marked: str


def draw_gallery(pictures: Sequence[Picture], signed: bool) -> Drawn:
    """Images and, beside each, every map laid over it: shares of a map's total, on one scale of colours a row.

    The colours are those of the legend below, where a map is 0 the grey image is seen. `signed` is said of all maps of
    an attribution: what speaks against the class has a colour of its own.
    """
    labels = list(pictures[0].maps)
    height, width = len(pictures) * SIDE, (1 + len(labels)) * SIDE
    # One axes for all: matplotlib takes a tenth of a second for each that it has.
    whole = np.ones((height + BOTTOM, width, 3))
    above = LINE * (1 + max(_broken(label).count("\n") + 1 for label in labels))
    figure = Figure(figsize=((width + LEFT) / DPI, (height + BOTTOM + above) / DPI))
    right, top = width / (width + LEFT), (height + BOTTOM) / (height + BOTTOM + above)
    axes = figure.add_axes((1 - right, 0, right, top))
    axes.set_axis_off()

    def write(x: float, y: float, said: str, **how: Any) -> None:
        axes.text(x, y, said, **{"fontsize": 7.5, "color": figures.INK, "ha": "center", "va": "center", **how})

    for column, label in enumerate(("image", *labels)):
        write((column + 0.5) * SIDE, -6, _broken(label), va="bottom")
    for line, picture in enumerate(pictures):
        write(-8, (line + 0.5) * SIDE, _broken(picture.title), ha="right")
        shares = {label: _share(found) for label, found in picture.maps.items()}
        known = [found for found in shares.values() if found is not None]
        most = (np.quantile(np.abs(known), 0.99) or np.max(np.abs(known))) if known else 1.0
        pixels = _coloured(picture.pixels)
        _place(whole, line, 0, pixels)
        for column, (label, found) in enumerate(shares.items(), start=1):
            if found is None:
                write((column + 0.5) * SIDE, (line + 0.5) * SIDE, "says\nnothing")
            else:
                _place(whole, line, column, _laid_over(pixels.mean(2), found / most, signed))
            if label in picture.wrong:
                box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
                x, y = (column + 1) * SIDE - 8, (line + 1) * SIDE - 10
                write(x, y, "wrong", ha="right", fontweight="bold", bbox=box)
    middle, half = height + BOTTOM // 2, BOTTOM // 8
    levels = np.linspace(-1 if signed else 0, 1, SIDE)
    whole[middle - half : middle + half, SIDE : 2 * SIDE] = _laid_over(np.ones((1, SIDE)), levels[None], signed)
    write(SIDE - 6, middle, "against\nthe class" if signed else "does not\nmatter", ha="right")
    write(2 * SIDE + 6, middle, "for\nthe class" if signed else "matters\nmost", ha="left")
    axes.imshow(whole, interpolation="nearest", aspect="auto", extent=(0, width, height + BOTTOM, 0))
    return figures.drawn(figure)


def draw_rows(rows: Mapping[str, Array]) -> Drawn:
    """Pictures (N, H, W, C) in [0, 1] in a row each, with its name at the left."""
    side, most = SIDE // 2, max(len(of) for of in rows.values())
    height, width = len(rows) * side, most * side
    whole = np.ones((height, width, 3))
    figure = Figure(figsize=((width + LEFT) / DPI, height / DPI))
    axes = figure.add_axes((LEFT / (width + LEFT), 0, width / (width + LEFT), 1))
    axes.set_axis_off()
    for line, (name, pictures) in enumerate(rows.items()):
        axes.text(-8, (line + 0.5) * side, name, fontsize=7.5, color=figures.INK, ha="right", va="center")
        for column, picture in enumerate(pictures):
            colours = _coloured(picture)
            inner = side - GAP
            at = [np.arange(inner) * size // inner for size in colours.shape[:2]]
            top, left = line * side, column * side
            whole[top : top + inner, left : left + inner] = colours[at[0]][:, at[1]]
    axes.imshow(whole, interpolation="nearest", aspect="auto", extent=(0, width, height, 0))
    return figures.drawn(figure)


def _coloured(pixels: Array) -> Array:
    """(H, W, 3) of an image (H, W, C): its colours, or grey where it has another number of channels than three."""
    grey = pixels if pixels.shape[2] == 3 else pixels.mean(2, keepdims=True)
    return np.broadcast_to(grey, (*pixels.shape[:2], 3))


def _laid_over(grey: Array, level: Array, signed: bool) -> Array:
    """(H, W, 3) of a grey image, lightened to be printed, under colours as strong as the levels, 1 the strongest."""
    colours = np.where((level < 0)[..., None], AGAINST, FOR if signed else MATTERS)
    strength = OPAQUE * np.minimum(np.abs(level), 1)[..., None]
    return (1 - strength) * (0.4 + 0.6 * grey[..., None]) + strength * colours


def _place(whole: Array, line: int, column: int, colours: Array) -> None:
    """Put a picture (H, W, 3) into its place, as large as there is room."""
    inner = SIDE - 2 * GAP
    rows, columns = (np.arange(inner) * size // inner for size in colours.shape[:2])
    top, left = line * SIDE + GAP, column * SIDE + GAP
    whole[top : top + inner, left : left + inner] = colours[rows][:, columns]


def _share(found: Array) -> Array | None:
    """A map as shares of the sum of its sizes; None where it says nothing."""
    total = np.abs(found).sum()
    return found / total if np.isfinite(total) and total > 0 else None


def _broken(name: str) -> str:
    """A long name on several lines."""
    return re.sub("[/_ ]", "\n", name) if len(name) > 9 else name
