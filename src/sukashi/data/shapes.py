"""Generated images whose every concept is known: which pixels are shape, texture, background and watermark.

The class is the shape. Position, size, angle, colour and texture are drawn independently of it, so nothing but the
shape tells the class, unless a watermark is asked for: then a mark in the corner tells it too, and a model may learn
that instead. An image's facts depend on its id alone: with or without the watermark, or with another number of images,
it is otherwise the same picture.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sukashi.core.errors import UsageError, nearest
from sukashi.data.images import Found, Pixels, Source, numbered
from sukashi.data.memory import MAX_BYTES

SHAPES = ("circle", "ring", "square", "triangle", "cross", "crescent")
COLOURS = {
    "red": (0.90, 0.20, 0.18),
    "yellow": (0.95, 0.85, 0.20),
    "green": (0.25, 0.80, 0.30),
    "cyan": (0.25, 0.85, 0.90),
    "blue": (0.30, 0.42, 0.98),
    "magenta": (0.90, 0.32, 0.85),
}
TEXTURES = ("stripes", "dots", "checks")
CONCEPTS = ("shape", "texture", "background", "watermark")

_MARK = np.array([[c == "#" for c in row] for row in ("### # #", "#   ## ", "### #  ", "  # ## ", "### # #")])
_SPLITS = ("train", "test")


@dataclass(frozen=True)
class Shapes:
    """`size` pixels square, `n` training images a class (a quarter of it for testing).

    `watermark` is the fraction of circles that carry the mark; of every other class 1 - watermark do: 1 tells circles
    apart perfectly, 0.5 tells nothing, None draws no mark at all.
    """

    size: int = 32
    n: int = 200
    watermark: float | None = None

    @staticmethod
    def parse(options: str) -> Shapes:
        """From `size=64,watermark=0.9`; `watermark` alone is `watermark=1`."""
        given: dict[str, Any] = {}
        known = [field.name for field in fields(Shapes)]
        for option in filter(None, options.split(",")):
            name, _, value = option.partition("=")
            if name not in known:
                raise UsageError(f"shapes has no option {name!r}{nearest(name, known)}")
            if len(value) > 20:
                raise UsageError(f"shapes: {name} must be a number, got {len(value)} characters: write {name}=...")
            try:
                given[name] = float(value or 1) if name == "watermark" else int(value)
            except ValueError:
                raise UsageError(f"shapes: {name} must be a number, got {value!r}: write {name}=...") from None
        shapes = Shapes(**given)
        if shapes.size < 16:
            raise UsageError(f"shapes: size must be at least 16, got {shapes.size}: smaller shapes look alike")
        if shapes.n < 4:
            raise UsageError(f"shapes: n must be at least 4, got {shapes.n}: a quarter of it becomes the test split")
        if shapes.watermark is not None and not 0.5 <= shapes.watermark <= 1:
            raise UsageError(
                f"shapes: watermark must be in [0.5, 1], got {shapes.watermark}: the fraction of circles that carry it"
            )
        n_bytes = 3 * shapes.size**2 * len(SHAPES) * (shapes.n + shapes.n // 4)
        if n_bytes > MAX_BYTES:
            raise UsageError(
                f"shapes: size={shapes.size} and n={shapes.n} make {n_bytes / 2**30:,.0f} GiB, at most "
                f"{MAX_BYTES / 2**30:g} are kept in memory: ask for smaller or fewer images"
            )
        return shapes

    def found(self) -> Found:
        """Both splits drawn, and what is true about each image."""
        splits: dict[str, tuple[Source, Tensor | None]] = {}
        for split, n in zip(_SPLITS, (self.n, self.n // 4), strict=True):
            ids = numbered(split, n * len(SHAPES))
            pixels = np.stack([self._drawn(self._fact(image_id))[0] for image_id in ids])
            splits[split] = (Pixels(ids, pixels), torch.arange(len(ids)) % len(SHAPES))
        return Found(splits, SHAPES, masks=self.masks, facts=self.facts)

    def masks(self, image_id: str) -> dict[str, Image.Image | None]:
        """The mask of each concept.

        Shape, background and watermark share out the pixels between them; texture is the dark part of the shape.
        """
        _, masks = self._drawn(self._fact(image_id))
        return {concept: Image.fromarray(np.uint8(255) * masks[concept]) for concept in CONCEPTS}

    def facts(self, image_ids: Sequence[str]) -> list[dict[str, Any]]:
        """What each image shows: shape, x, y, radius (pixels), angle (radians), colour, texture, watermark."""
        return [self._fact(image_id) for image_id in image_ids]

    def _fact(self, image_id: str) -> dict[str, Any]:
        match = re.fullmatch(r"(train|test)/(\d+)", image_id)
        if match is None:
            raise UsageError(f"shapes has no image {image_id!r}: ids are train/00000 or test/00000")
        number = int(match[2])
        # The order of these draws is part of the dataset: a new one goes to the end.
        draw = np.random.default_rng((_SPLITS.index(match[1]), number))
        radius = self.size * draw.uniform(0.24, 0.34)
        x, y = draw.uniform(radius + 1, self.size - 1 - radius, size=2)
        angle = draw.uniform(-0.35, 0.35)
        colour = list(COLOURS)[draw.integers(len(COLOURS))]
        texture = TEXTURES[draw.integers(len(TEXTURES))]
        ground = draw.uniform(0.1, 0.3)
        slope = draw.uniform(-0.08, 0.08, size=2)
        noise = int(draw.integers(2**31))
        luck = draw.uniform()
        shape = SHAPES[number % len(SHAPES)]
        share = 0.0 if self.watermark is None else self.watermark if shape == SHAPES[0] else 1 - self.watermark
        return {
            "shape": shape,
            "x": float(x),
            "y": float(y),
            "radius": float(radius),
            "angle": float(angle),
            "colour": colour,
            "texture": texture,
            "watermark": bool(luck < share),
            "ground": float(ground),
            "slope": (float(slope[0]), float(slope[1])),
            "noise": noise,
        }

    def _drawn(self, fact: dict[str, Any]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Pixels (H, W, 3) uint8 and the mask (H, W) of each concept."""
        centre = np.arange(self.size) + 0.5
        down, right = np.meshgrid(centre - fact["y"], centre - fact["x"], indexing="ij")
        cos, sin = np.cos(fact["angle"]), np.sin(fact["angle"])
        u, v = cos * right + sin * down, cos * down - sin * right
        outside = _distance(fact["shape"], u, v, fact["radius"])
        ink = _ink(fact["texture"], u, v, self.size / 6)
        mark = np.zeros((self.size, self.size), dtype=bool)
        if fact["watermark"]:
            glyph = np.kron(_MARK, np.ones((self.size // 32 or 1,) * 2, dtype=bool))
            mark[-1 - glyph.shape[0] : -1, -1 - glyph.shape[1] : -1] = glyph

        grid = (centre / self.size - 0.5)[:, None] * fact["slope"][0] + (centre / self.size - 0.5) * fact["slope"][1]
        noise = np.random.default_rng(fact["noise"]).normal(0, 0.02, (self.size, self.size))
        ground = (fact["ground"] + grid + noise)[..., None]
        paint = np.array(COLOURS[fact["colour"]]) * np.where(ink, 0.62, 1.0)[..., None]
        cover = np.clip(0.5 - outside, 0, 1)[..., None]
        image = ground * (1 - cover) + paint * cover
        image[mark] = 0.15 * image[mark] + 0.85
        shape = (outside < 0) & ~mark
        masks = {"shape": shape, "texture": shape & ink, "background": ~shape & ~mark, "watermark": mark}
        return np.round(255 * np.clip(image, 0, 1)).astype(np.uint8), masks


def _distance(shape: str, u: np.ndarray, v: np.ndarray, radius: float) -> np.ndarray:
    """Distance in pixels of each point to the shape's edge, negative inside; all shapes fit a circle of `radius`."""

    def box(half_u: float, half_v: float) -> np.ndarray:
        inside: np.ndarray = np.maximum(np.abs(u) - half_u, np.abs(v) - half_v)
        return inside

    edge: np.ndarray
    if shape == "circle":
        edge = np.hypot(u, v) - radius
    elif shape == "ring":
        edge = np.abs(np.hypot(u, v) - 0.72 * radius) - 0.28 * radius
    elif shape == "square":
        edge = box(radius / np.sqrt(2), radius / np.sqrt(2))
    elif shape == "triangle":
        normals = (np.pi / 2 + np.arange(3) * 2 * np.pi / 3)[:, None, None]
        edge = np.max(np.cos(normals) * u + np.sin(normals) * v, axis=0) - radius / 2
    elif shape == "cross":
        edge = np.minimum(box(0.95 * radius, 0.3 * radius), box(0.3 * radius, 0.95 * radius))
    else:
        assert shape == "crescent"
        edge = np.maximum(np.hypot(u, v) - radius, 0.8 * radius - np.hypot(u - 0.55 * radius, v))
    return edge


def _ink(texture: str, u: np.ndarray, v: np.ndarray, period: float) -> np.ndarray:
    """Where the texture is dark, in the shape's own coordinates."""
    ink: np.ndarray
    a, b = u / period % 1, v / period % 1
    if texture == "stripes":
        ink = (u + v) / (np.sqrt(2) * period) % 1 < 0.5
    elif texture == "dots":
        ink = np.hypot(a - 0.5, b - 0.5) < 0.36
    else:
        assert texture == "checks"
        ink = (a < 0.5) ^ (b < 0.5)
    return ink
