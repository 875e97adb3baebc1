"""Activations of a layer and their contexts, drawn over images and positions: what subspaces are found in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sukashi.attributions.lrp import factors
from sukashi.core.types import Batch, Site
from sukashi.network import hooks, surgery
from sukashi.network.sites import place


@dataclass(frozen=True)
class Vectors:
    """`a` and `c` (N, D), R = a . c; `image` (N,) and `position` (N,) say of which row of the data and where."""

    a: Tensor
    c: Tensor
    image: Tensor
    position: Tensor


def features(model: nn.Module, layer: str, x: Tensor) -> Site:
    """All features of what a layer writes, as a place: on the axis that the last layer before them says, in it too.

    A block or an activation has no axis of its own; a convolution or BatchNorm writes features on axis 1, a linear
    layer or LayerNorm on the last. Raises ModelError for a layer that there is not.
    """
    hooks.layer(model, layer)
    axes: list[tuple[str, int | None]] = []
    with torch.no_grad(), hooks.followed(model, lambda name, of, read, gives: axes.append((name, surgery.axis_of(of)))):
        model(x[:2])
    before = [name for name, _ in axes]
    known = [axis for _, axis in axes[: before.index(layer) + 1] if axis is not None] if layer in before else []
    return place(model, layer, x, axis=known[-1] if known else 1)


def vectors(
    model: nn.Module,
    data: Batch,
    site: Site,
    *,
    positions: int = 20,
    generator: torch.Generator,
    batch_size: int = 64,
    lrp: Mapping[str, Any] | None = None,
) -> Vectors:
    """Activations and contexts of a site at `positions` places of each image, drawn without replacement.

    The site is `sites.place(model, layer, x)`; what is explained is that of the data's objective for each image's
    target. `lrp` are options of the attribution of that name: Danek and Ramaswamy 2026 take rule alpha1beta0. All
    places where an image has no more. Draws do not depend on `batch_size`.
    """
    n_places = math.prod(_shape(model, site, data.x[:1])[2:])
    drawn = torch.rand(len(data), n_places, generator=generator).argsort(1)[:, :positions].sort(1).values
    options = {"rule": "alpha1beta0", **(lrp or {})}
    a, c = factors(model, data.x, data.target, site, data.objective, at=drawn, batch_size=batch_size, **options)
    image = torch.arange(len(data)).repeat_interleave(drawn.shape[1])
    return Vectors(_rows(a), _rows(c), image, drawn.flatten())


def _rows(values: Tensor) -> Tensor:
    """(B, U, P) as (B P, U)."""
    return values.transpose(1, 2).flatten(0, 1).contiguous()


def _shape(model: nn.Module, site: Site, x: Tensor) -> torch.Size:
    """Of what a site holds for some images, its units' axis second."""
    with torch.no_grad(), hooks.recorded(model, [site]) as seen:
        model(x)
    return hooks.gather(site, seen[site]).shape
