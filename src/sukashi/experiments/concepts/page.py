"""The page of concepts: what each subspace tells, and the images that it responds to."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from sukashi.experiments.concepts.summary import ConceptsResult
from sukashi.experiments.workspace import Workspace
from sukashi.report import figures, words
from sukashi.report.figures import WIDTH, Drawn
from sukashi.report.gallery import Picture, draw_gallery
from sukashi.report.page import Page


def page(result: ConceptsResult, space: Workspace) -> Page:
    arrays = space.records()[0].arrays("gallery")
    drawn: dict[str, Drawn] = {}
    alts: dict[str, str] = {}
    if result.history:
        best = max(max(values) for values in result.history)
        drawn["ascent"] = _draw_ascent(result.history)
        alts["ascent"] = (
            f"The objective of {words.several(len(result.history), 'trial')}, which ends at {best:.3g} at best."
        )
    for of in result.subspaces:
        k = of["subspace"]
        rows = [i for i, shown in enumerate(result.pictures) if shown["subspace"] == k]
        pictures = [_picture(result, arrays, i) for i in rows]
        drawn[f"subspace-{k}"] = draw_gallery(pictures, signed=bool((arrays["maps"][rows] < 0).any()))
        classes = words.listed([result.pictures[i]["class"] for i in rows])
        alts[f"subspace-{k}"] = (
            f"The test images most relevant to subspace {k}, of {classes}, with maps of the layer and of each subspace"
        )
    return Page(
        "experiments/concepts/page.html.j2",
        drawn,
        {
            "result": result,
            "title": f"Concepts of {result.of} in {result.layer} of {result.model}",
            "warnings": result.warnings,
            "alts": alts,
            "told": list(result.subspaces[0]["tells"]),
            "settings": dict(words.flat(space.identity)),
            "run": (space.logged("run") or [{}])[-1],
        },
    )


def _picture(result: ConceptsResult, arrays: Any, i: int) -> Picture:
    """An image with the map of the layer and that of each subspace."""
    pixels = arrays["pixels"][i] / 255
    maps = np.stack([_enlarged(values, pixels.shape[:2]) for values in arrays["maps"][i]])
    labels = {("layer" if k == 0 else f"subspace {k - 1}"): values for k, values in enumerate(maps)}
    return Picture(pixels, result.pictures[i]["class"], labels, (), "")


def _enlarged(values: Any, size: tuple[int, int]) -> Any:
    """A map of a layer's positions (h, w) as large as its image, bilinear."""
    return np.asarray(Image.fromarray(values.astype(np.float32)).resize(size[::-1], Image.Resampling.BILINEAR))


def _draw_ascent(history: list[list[float]]) -> Drawn:
    figure = Figure(figsize=(WIDTH, 2.6), layout="constrained")
    axes = figure.subplots()
    for number, values in enumerate(history):
        axes.plot(
            10 * np.arange(len(values)), values, color=figures.OTHERS[number % len(figures.OTHERS)], linewidth=1.5
        )
    axes.set(xlabel="step", ylabel="objective J")
    figures.calm(axes)
    return figures.drawn(figure)
