"""Attributions made of gradients: at one point, or along the straight line from a baseline to the image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, TypeVar

import numpy as np
import torch
from pydantic import Field
from timm.layers.drop import DropPath
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from sukashi.attributions import attributions
from sukashi.core.errors import DataError, ModelError, UsageError
from sukashi.core.objective import CLASSIFICATION, Objective
from sukashi.core.precision import without_tf32
from sukashi.core.registry import BatchSize
from sukashi.core.types import Site
from sukashi.network import hooks
from sukashi.network.canonical import answer

Held = dict[Site, list[Tensor]]
Count = Annotated[int, Field(ge=1)]
Baseline = float | Tensor
Key = TypeVar("Key")


@attributions.register("saliency", source="Simonyan et al. 2014, sec. 3", signed=False)
def saliency(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    sites: Sequence[Site],
    objective: Objective = CLASSIFICATION,
    *,
    batch_size: BatchSize = 64,
) -> dict[Site, Tensor]:
    """Absolute slope of the target's logit: |dF / da| at every position a of a unit.

    Simonyan et al. take the largest of the input's channels; we leave the channels apart. At a site that several layers
    read, each read has its own slope. `batch_size` bounds the rows in one pass.

    Raises DataError for no images and for targets that are not one class number an image, ModelError for layers in
    training mode, sites that hooks cannot take and an output that is not logits (B, K).
    """
    check(model, x, target, objective)

    def explain(rows: slice) -> dict[Site, Tensor]:
        _, slopes = slopes_at(model, x[rows], target[rows], sites, objective)
        return {site: hooks.gather(site, slopes.pop(site)).abs() for site in sites}

    return in_parts(explain, len(x), batch_size)


@attributions.register("gradient_x_activation", source="Molchanov et al. 2017, eq. 8, of the logit")
def gradient_x_activation(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    sites: Sequence[Site],
    objective: Objective = CLASSIFICATION,
    *,
    batch_size: BatchSize = 64,
) -> dict[Site, Tensor]:
    """First-order share of the target's logit: a dF / da, with its sign.

    Summed over the positions of a unit it is the logit's derivative by a gate on the unit. Molchanov et al. take the
    loss (criterion `taylor`). `batch_size` bounds the rows in one pass.

    Raises DataError for no images and for targets that are not one class number an image, ModelError for layers in
    training mode, sites that hooks cannot take and an output that is not logits (B, K).
    """
    check(model, x, target, objective)

    def explain(rows: slice) -> dict[Site, Tensor]:
        held, slopes = slopes_at(model, x[rows], target[rows], sites, objective)
        return {site: _gathered(site, held, slopes) for site in sites}

    return in_parts(explain, len(x), batch_size)


@attributions.register("internal_influence", source="Leino et al. 2018, eq. 1, uniform on a line")
def internal_influence(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    sites: Sequence[Site],
    objective: Objective = CLASSIFICATION,
    *,
    steps: Count = 16,
    baseline: Baseline = 0.0,
    batch_size: BatchSize = 64,
) -> dict[Site, Tensor]:
    """Mean slope of the target's logit along the path of inputs: the integral of dF / da over s in [0, 1].

    Slopes are those at the inputs b + s (x - b), s in [0, 1]. Leino et al. average over any distribution of interest;
    ours is uniform between the baseline b and the image, as in captum. Gauss-Legendre quadrature in `steps` points:
    exact where the slope is a polynomial in s of a degree below 2 * steps, and free of the ends, where a zero baseline
    sits on the kinks of a ReLU network. `baseline` is a number or a tensor that broadcasts to x, in preprocessed units:
    0 is the mean colour. `batch_size` bounds the rows (images times steps) in one pass.

    Raises DataError for no images and for targets that are not one class number an image, ModelError for layers in
    training mode, sites that hooks cannot take and an output that is not logits (B, K), UsageError for a baseline
    of another shape.
    """
    check(model, x, target, objective)
    start = start_of(x, baseline)

    def explain(rows: slice) -> dict[Site, Tensor]:
        mean = _mean_slopes(model, x[rows], start[rows], target[rows], sites, objective, steps, batch_size)
        return {site: hooks.gather(site, mean.pop(site)) for site in sites}

    return in_parts(explain, len(x), batch_size // steps)


@attributions.register("integrated_gradients", source="Sundararajan et al. 2017, eq. 1; Bauvin et al. 2025, table 1")
def integrated_gradients(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    sites: Sequence[Site],
    objective: Objective = CLASSIFICATION,
    *,
    steps: Count = 16,
    baseline: Baseline = 0.0,
    batch_size: BatchSize = 64,
) -> dict[Site, Tensor]:
    """Change of a unit from the baseline, times the mean slope along the path: (a(x) - a(b)) * internal influence.

    At the input site it is integrated gradients to the letter. Inside the network it is what table 1 of Bauvin et al.
    says, gradients averaged from a baseline to the actual input: the path is that of the inputs, one for all sites. It
    equals integrated gradients of the rest of the network (captum's LayerIntegratedGradients, one pass a layer) where
    a is linear in the input, and differs elsewhere: there a does not move on a straight line, and only `conductance`
    is complete. Quadrature, `baseline` and `batch_size` as for `internal_influence`.

    Raises DataError for no images and for targets that are not one class number an image, ModelError for layers in
    training mode, sites that hooks cannot take and an output that is not logits (B, K), UsageError for a baseline
    of another shape.
    """
    check(model, x, target, objective)
    start = start_of(x, baseline)

    def explain(rows: slice) -> dict[Site, Tensor]:
        mean = _mean_slopes(model, x[rows], start[rows], target[rows], sites, objective, steps, batch_size)
        with torch.no_grad(), hooks.recorded(model, sites) as ends:
            model(torch.cat([x[rows], start[rows]]))
        change = {site: [torch.sub(*tensor.chunk(2)) for tensor in ends.pop(site)] for site in sites}
        return {site: _gathered(site, change, mean) for site in sites}

    return in_parts(explain, len(x), batch_size // steps)


@attributions.register("conductance", source="Dhamdhere et al. 2019, total conductance")
def conductance(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    sites: Sequence[Site],
    objective: Objective = CLASSIFICATION,
    *,
    steps: Count = 16,
    baseline: Baseline = 0.0,
    batch_size: BatchSize = 64,
) -> dict[Site, Tensor]:
    """Integrated gradients of all inputs that flow through a unit: the integral of dF / da da along the path of inputs.

    Trapezoids over `steps` equal intervals of the path from the baseline to the image: the sum over them of the change
    of a times the mean of dF / da at both ends. Exact for linear networks (captum takes the slope at the first end, and
    its default points leave the ends of the path out); the error of smooth ones falls with the square of `steps`. The
    sum over a layer that cuts the network is F(x) - F(b). `baseline` is a number or a tensor that broadcasts to x, in
    preprocessed units. `batch_size` bounds the rows (images times steps + 1) in one pass, two at least.

    Raises DataError for no images and for targets that are not one class number an image, ModelError for layers in
    training mode, sites that hooks cannot take and an output that is not logits (B, K), UsageError for a baseline
    of another shape.
    """
    check(model, x, target, objective)
    start = start_of(x, baseline)
    n_points = steps + 1
    points = torch.linspace(0, 1, n_points, dtype=torch.float64)
    # Parts of a path that is longer than a pass share the point between them.
    size = max(2, min(batch_size, n_points))

    def explain(rows: slice) -> dict[Site, Tensor]:
        total: Held = {}
        for first in range(0, steps, size - 1):
            part = points[first : first + size]
            held, slopes = _along(model, x[rows], start[rows], target[rows], sites, objective, part)
            for site in sites:
                flows = [
                    # Twice the trapezoid; differences first, for they are what is small.
                    (a[1:] - a[:-1]).mul_(g[1:] + g[:-1]).sum(0)
                    for a, g in zip(held.pop(site), slopes.pop(site), strict=True)
                ]
                total[site] = [a + b for a, b in zip(total[site], flows, strict=True)] if first else flows
        return {site: hooks.gather(site, total.pop(site)) / 2 for site in sites}

    return in_parts(explain, len(x), batch_size // n_points)


def check(model: nn.Module, x: Tensor, target: Tensor, objective: Objective) -> None:
    """Refuse what could only be explained wrongly.

    Raises DataError for no images and for targets that are not one class number an image, ModelError for layers that
    make an image's answer depend on chance or on other images.
    """
    objective.check_target(target, len(x))
    if not len(x):
        raise DataError("there is no image to explain: give one at least")
    for name, module in model.named_modules():
        norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if module.training and (norm or isinstance(module, _RANDOM)):
            raise ModelError(
                f"layer {name!r} is in training mode, where other images or chance change an answer: call model.eval()"
            )
        if norm and module.running_mean is None:
            raise ModelError(
                f"layer {name!r} keeps no running statistics, so that images change each other: use BatchNorm with "
                "track_running_stats=True"
            )


def check_pixels(name: str, sites: Sequence[Site]) -> None:
    """Refuse sites that an attribution of the input alone has nothing to say of."""
    for site in sites:
        if site.kind != "pixel" or site.layer:
            raise UsageError(
                f"{name} explains the pixels alone, not site {site.layer!r} of kind {site.kind!r}: give "
                "sites.input_site(x), or use lrp"
            )


_RANDOM = (nn.modules.dropout._DropoutNd, StochasticDepth, DropPath)


def start_of(x: Tensor, baseline: Baseline) -> Tensor:
    """The baseline of each image, shaped like x.

    Raises UsageError for a baseline that does not broadcast to x.
    """
    value = torch.as_tensor(baseline, dtype=x.dtype, device=x.device).detach()
    try:
        return value.expand_as(x)
    except RuntimeError:
        raise UsageError(
            f"baseline has shape {tuple(value.shape)}, which does not broadcast to images {tuple(x.shape)}: give a "
            f"number or {tuple(x.shape[1:])}"
        ) from None


def in_parts(explain: Callable[[slice], dict[Key, Tensor]], n_images: int, size: int) -> dict[Key, Tensor]:
    """What `explain` gives for consecutive rows, at most `size` of them and at least one at a time, side by side."""
    size = max(1, size)
    with without_tf32():
        parts = [explain(slice(first, first + size)) for first in range(0, n_images, size)]
    if len(parts) == 1:
        return parts[0]
    return {key: torch.cat([part.pop(key) for part in parts]) for key in list(parts[0])}


def slopes_at(
    model: nn.Module, x: Tensor, target: Tensor, sites: Sequence[Site], objective: Objective
) -> tuple[Held, Held]:
    """What sites hold, and the slope there of what is explained, as `hooks.recorded` shapes them; detached."""
    with torch.enable_grad(), hooks.recorded(model, sites) as seen:
        # A copy, for the model may write into what it is given. Rows do not meet in eval mode: the gradient of their
        # sum is each one's own.
        total = objective.explained(answer(model, x.detach().clone()), target).sum()
        tensors = [tensor for site in sites for tensor in seen[site]]
        gradients = iter(torch.autograd.grad(total, tensors, materialize_grads=True))
    held = {site: [tensor.detach() for tensor in seen[site]] for site in sites}
    return held, {site: [next(gradients) for _ in seen[site]] for site in sites}


def _along(
    model: nn.Module,
    x: Tensor,
    start: Tensor,
    target: Tensor,
    sites: Sequence[Site],
    objective: Objective,
    points: Tensor,
) -> tuple[Held, Held]:
    """What sites hold and the slopes there, (S, B, N, positions...), at S points of the path from `start` to x."""
    s = points.to(x).view(-1, *[1] * x.dim())
    path = start + s * (x - start)
    split = (len(points), len(x))
    found = slopes_at(model, path.flatten(0, 1), target.repeat(len(points)), sites, objective)
    held, slopes = ({site: [t.unflatten(0, split) for t in tensors[site]] for site in sites} for tensors in found)
    return held, slopes


def _mean_slopes(
    model: nn.Module,
    x: Tensor,
    start: Tensor,
    target: Tensor,
    sites: Sequence[Site],
    objective: Objective,
    steps: int,
    batch_size: int,
) -> Held:
    """The integral over s in [0, 1] of the slopes at start + s (x - start), by Gauss and Legendre."""
    nodes, weights = (torch.from_numpy(array) for array in np.polynomial.legendre.leggauss(steps))
    mean: Held = {}
    for s, w in zip(((nodes + 1) / 2).split(batch_size), (weights / 2).split(batch_size), strict=True):
        _, slopes = _along(model, x, start, target, sites, objective, s)
        for site in sites:
            sums = [torch.tensordot(w.to(g), g, 1) for g in slopes.pop(site)]
            mean[site] = [a + b for a, b in zip(mean[site], sums, strict=True)] if site in mean else sums
    return mean


def _gathered(site: Site, one: Held, other: Held) -> Tensor:
    """The product of two tensors a read, as units; both are let go, so that a pass does not hold everything twice."""
    return hooks.gather(site, [a * b for a, b in zip(one.pop(site), other.pop(site), strict=True)])
