"""Activations of a layer and their contexts, drawn over images and positions: what subspaces are found in."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sukashi.attributions.lrp import Rules, factors
from sukashi.core.errors import ModelError
from sukashi.core.types import Batch, Site
from sukashi.network import hooks, surgery
from sukashi.network.canonical import answer, evaluating
from sukashi.network.layers import AttentionCore
from sukashi.network.sites import place


def features(model: nn.Module, layer: str, x: Tensor) -> Site:
    """All features of what a layer writes, as a place: as many as the last layer before, or in it, that has an axis of
    its own wrote, on that axis, or the only one that has as many.

    A block or an activation has no axis of its own; a convolution or BatchNorm writes features on axis 1, a linear
    layer or LayerNorm on the last. Raises ModelError for a layer that there is not, and where no axis or several have
    as many.
    """
    hooks.layer(model, layer)
    known: list[tuple[int, int]] = []  # axis and number of the features of layers that have an axis
    shape: tuple[int, ...] = ()

    def leave(name: str, of: nn.Module, read: Tensor, gives: Tensor) -> None:
        nonlocal shape
        axis = surgery.axis_of(of)
        if not shape and axis is not None:
            known.append((axis, gives.shape[axis]))
        if name == layer:
            shape = tuple(gives.shape)

    with torch.no_grad(), evaluating(model), hooks.followed(model, leave):
        answer(model, x[:2].clone())
    axis, n = known[-1] if known else (1, shape[1] if len(shape) > 1 else 0)
    fitting = [place for place in range(1, len(shape)) if shape[place] == n]
    # Maps of a linear layer may have been turned: where as many rows or columns as features look alike nobody knows.
    turned = axis == -1 and len(shape) == 4 and len(fitting) > 1
    if shape and (turned or axis % len(shape) not in fitting):
        if len(fitting) != 1:
            raise ModelError(
                f"layer {layer!r} writes {shape[1:]} for an image, and the layer before it {n} features: on which axis "
                "they are can't be told, give a layer that ends in a convolution, linear layer or norm"
            )
        axis = fitting[0]
    return place(model, layer, x, axis=axis)


def units(model: nn.Module, layer: str, x: Tensor) -> Site:
    """The features that a layer writes, as `features`, or of attention its heads, each with all that it writes.

    Raises ModelError also for heads that were cut to several widths.
    """
    module = hooks.layer(model, layer)
    if not isinstance(module, AttentionCore):
        return features(model, layer, x)
    widths = [width for width in module.widths if width]
    if len({*widths}) > 1:
        raise ModelError(
            f"the heads of {layer!r} were cut to several widths, {', '.join(map(str, module.widths))}: they are no "
            "units of one kind"
        )
    return place(model, layer, x, units=[range(i * width, (i + 1) * width) for i, width in enumerate(widths)])


def vectors(
    model: nn.Module,
    data: Batch,
    site: Site,
    *,
    positions: int = 20,
    generator: torch.Generator,
    rule: Rules = "alpha1beta0",
    batch_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Activations a and contexts c (N, D), R = a . c, of a site at `positions` places of each image, drawn without
    replacement: image by image, places in their order.

    The site is `sites.place(model, layer, x)`; what is explained is that of the data's objective for each image's
    target, by LRP with a `rule`: Danek and Ramaswamy 2026 take alpha1beta0. All places where an image has no more.
    Draws do not depend on `batch_size`.
    """
    n_places = math.prod(shape_of(model, site, data.x[:1])[2:])
    at = torch.rand(len(data), n_places, generator=generator).argsort(1)[:, :positions].sort(1).values
    a, c = factors(model, data.x, data.target, site, data.objective, rule=rule, at=at, batch_size=batch_size)
    return _rows(a), _rows(c)


def _rows(values: Tensor) -> Tensor:
    """(B, U, P) as (B P, U)."""
    return values.transpose(1, 2).flatten(0, 1).contiguous()


def shape_of(model: nn.Module, site: Site, x: Tensor) -> torch.Size:
    """Of what a site holds for some images, its units' axis second."""
    with torch.no_grad(), evaluating(model), hooks.recorded(model, [site]) as seen:
        model(x.clone())
    return hooks.gather(site, seen[site]).shape
