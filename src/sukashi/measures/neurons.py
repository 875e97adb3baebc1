"""What single units answer to: how well they tell classes apart, how evenly they respond, and what hangs on them.

Zhang 2026 (IMPACT), sec. 3.2. Activations are of images, one number an image and unit: which one is the caller's
choice (there the class token's for `selectivity`, the largest of the patches for the others).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sukashi.attributions.patching import patching
from sukashi.core.errors import DataError, ModelError
from sukashi.core.precision import without_tf32
from sukashi.core.types import Batch, Site
from sukashi.network import hooks
from sukashi.network.canonical import canonical
from sukashi.network.sites import place
from sukashi.network.tokens import tokens_of

_NUMBERS = 2**22  # sorted at once


def selectivity(activations: Tensor, target: Tensor, n_classes: int) -> Tensor:
    """(U, K) float64 the area under the ROC curve of each unit's activations (N, U) for each class against all others
    (eq. 3): how often an image of the class is given more than another, ties by half. 1/2 tells nothing, 0 is as plain
    as 1, the other way round. NaN for a class that no image has, or all have.

    One sort of each unit's activations for all classes: ranks, ties in the middle, summed by class (Mann and Whitney).
    Raises DataError for activations that are not finite.
    """
    _check(activations, target)
    parts = activations.split(max(1, _NUMBERS // max(1, len(activations))), dim=1)
    return torch.cat([_areas(part, target, n_classes) for part in parts])


def _areas(activations: Tensor, target: Tensor, n_classes: int) -> Tensor:
    n, n_units = activations.shape
    values, order = activations.T.contiguous().sort(dim=1)
    place = torch.arange(n, device=values.device).expand(n_units, -1)
    edge = values[:, 1:] != values[:, :-1]
    own = torch.ones(n_units, 1, dtype=torch.bool, device=values.device)
    first = torch.where(torch.cat([own, edge], 1), place, 0).cummax(1).values
    last = torch.where(torch.cat([edge, own], 1), place, n).flip(1).cummin(1).values.flip(1)
    rank = (first + last).double() / 2 + 1
    of = target.to(order.device)[order] + n_classes * torch.arange(n_units, device=order.device)[:, None]
    sums = torch.bincount(of.flatten(), weights=rank.flatten(), minlength=n_units * n_classes)
    has = target.bincount(minlength=n_classes).to(sums)
    areas: Tensor = (sums.view(n_units, n_classes) - has * (has + 1) / 2) / (has * (n - has))
    return areas.where((has > 0) & (has < n), torch.nan)


def higher(activations: Tensor, target: Tensor, n_classes: int) -> Tensor:
    """(U, K) bool whether a unit's activations (N, U) are higher in a class than in all images on average: which way it
    tells the class, so that a unit that is low in it is as selective as one that is high, by the area or 1 - the area.

    Asked of other images than `selectivity`, it leaves a unit that tells nothing at 1/2; the larger of both areas would
    not.
    """
    _check(activations, target)
    member = _members(activations, target, n_classes)
    mean: Tensor = member @ activations.double() / member.sum(1)[:, None]
    return (mean >= activations.double().mean(0)).T


def class_variance(largest: Tensor, target: Tensor, n_classes: int) -> Tensor:
    """(U, K) float64 the coefficient of variation of each unit's largest activations (N, U) within each class (eq. 4):
    their standard deviation (of n - 1) over their mean. Lower is more even.

    NaN where the mean is not above 0, as of a GELU that most images of a class leave at rest, and for a class of fewer
    than two images. Raises DataError for activations that are not finite.
    """
    _check(largest, target)
    member = _members(largest, target, n_classes)
    has = member.sum(1)
    mean = member @ largest.double() / has[:, None]
    off = largest.double() - mean[target.to(mean.device)]
    spread = (member @ off.square() / (has[:, None] - 1)).sqrt()
    found: Tensor = (spread / mean).where((mean > 0) & (has[:, None] > 1), torch.nan)
    return found.T


def label_entropy(largest: Tensor, target: Tensor, n_classes: int) -> Tensor:
    """(U,) float64 -sum_c P(c) log P(c), in nats, with P(c) the share of class c in each unit's largest activations
    (N, U) (eq. 6, 7): 0 for a unit that one class alone excites, log K for one that all do alike.

    P is of means over the images of a class, not sums, so that a class is not more for having more images; the same
    where all have as many. Activations below 0 count as 0, for shares have no sign. NaN for a unit that nothing
    excites. Raises DataError for activations that are not finite.
    """
    _check(largest, target)
    member = _members(largest, target, n_classes)
    member = member[member.any(1)]
    mean = member @ largest.double().clamp(min=0) / member.sum(1)[:, None]
    share = mean / mean.sum(0)
    entropy: Tensor = -torch.special.xlogy(share, share).sum(0)
    return entropy


@torch.no_grad()
def ablation_impact(model: nn.Module, batch: Batch, site: Site, without: Tensor, means: Tensor) -> Tensor:
    """(B,) float64 by how much the logit of each image's target falls when units become their means, in lengths of the
    image's logits: (F_c(x) - F_c^without(x)) / |F(x)| (eq. 2).

    `without` (K, U) bool are the units that are taken out for images of each class, all at once; `means` (U, R) those
    of `hooks.means`.
    """
    gates = (~without).to(batch.x)
    found = []
    with without_tf32():
        for part in batch.in_passes():
            whole = model(part.x.clone())
            with hooks.ablated(model, {site: gates[part.target]}, {site: means}):
                left = model(part.x.clone())
            fall = (batch.objective.explained(of, part.target) for of in (whole, left))
            length = batch.objective.answers(whole).double().norm(dim=1)
            found.append((next(fall).double() - next(fall).double()) / length)
    return torch.cat(found).cpu()


def _members(activations: Tensor, target: Tensor, n_classes: int) -> Tensor:
    """(K, N) float64 1 for the images of a class."""
    classes = torch.arange(n_classes, device=activations.device)
    return (classes[:, None] == target.to(activations.device)).double()


def _check(activations: Tensor, target: Tensor) -> None:
    assert activations.dim() == 2, "activations are (images, units)"
    assert len(activations) == len(target), "activations have a target each"
    if not activations.isfinite().all():
        raise DataError("activations hold NaN or Inf: such a network answers nothing, check its weights")


@dataclass(frozen=True)
class Layout:
    """How the positions lie that a layer holds: `class_token` is the place of the token that logits are read from, or
    None; the first `before` positions are no patches or pixels, the others are `grid` rows and columns, None where that
    can't be told. `unknown` says why it can't be told which tokens are patches."""

    class_token: int | None = None
    before: int = 0
    grid: tuple[int, int] | None = None
    unknown: str = ""


def layout(model: nn.Module, site: Site, x: Tensor) -> Layout:
    """That of what a site holds of images x (B, C, H, W).

    Of tokens it is seen on the network's canonical form (`tokens_of`); a class token is one of those before the patches
    on which the logits depend after the last block.
    """
    with torch.no_grad(), hooks.recorded(model, [site]) as seen:
        model(x.clone())
    shape = seen[site][0].shape[2:]
    if len(shape) != 1:
        return Layout(grid=(shape[0], shape[1]) if len(shape) == 2 else None)
    try:
        form = canonical(model, x).double()
        tokens = tokens_of(form, x[:1].double())
        read = _read(form, tokens.last, x[:1].double())
    except ModelError as error:
        return Layout(unknown=str(error))
    grid = tokens.rows, tokens.columns
    if shape[0] == tokens.rows * tokens.columns:
        return Layout(grid=grid)
    if shape[0] != tokens.n_before + tokens.rows * tokens.columns:
        return Layout(unknown=f"{site.layer!r} holds {shape[0]} tokens, and the blocks {len(read)}")
    own = read[: tokens.n_before].nonzero()[:, 0].tolist()
    return Layout(own[0] if own else None, tokens.n_before, grid)


def _read(form: nn.Module, last: str, x: Tensor) -> Tensor:
    """(T,) bool on which tokens of the last block logits depend."""
    site = place(form, last, x, axis=-1)
    with torch.enable_grad(), hooks.recorded(form, [site]) as seen:
        of = form(x.clone()).square().sum()
        (slope,) = torch.autograd.grad(of, seen[site][0])
    found: Tensor = (slope != 0).any(1)[0]
    return found


@torch.no_grad()
def responses(model: nn.Module, site: Site, batch: Batch, lies: Layout) -> tuple[Tensor, Tensor]:
    """Of each unit one number an image, (N, U) each: its activation at the class token, or else its mean over all
    positions, and its largest at any patch or position. A unit of several features, as a head, is their Euclidean
    length (Zhang 2026, appendix A.2).
    """
    found: list[tuple[Tensor, Tensor]] = []
    with without_tf32(), hooks.recorded(model, [site]) as seen:
        for part in batch.in_passes():
            model(part.x.clone())
            of = _of_units(site, seen[site])
            pooled = of.mean(2) if lies.class_token is None else of[:, :, lies.class_token]
            found.append((pooled, of[:, :, lies.before :].amax(2)))
    return torch.cat([a for a, _ in found]), torch.cat([b for _, b in found])


def _of_units(site: Site, tensors: Sequence[Tensor]) -> Tensor:
    """(B, U, P) what a unit holds at each position."""
    of = hooks.gather(site, tensors)
    width = len(site.members[0].index[0])
    if width == 1:
        return of.flatten(2) if of.dim() > 2 else of[:, :, None]
    lengths: Tensor = of.unflatten(2, (width, -1)).norm(dim=2)
    return lengths


def looked_at(
    model: nn.Module, site: Site, mean: Tensor, chosen: Batch, batch: Batch, lies: Layout, n_classes: int, n: int
) -> dict[str, Tensor]:
    """What the n units of a site that matter most for each class answer to in a batch: `top` (K, n) which they are, by
    the `chosen` training images; their `selectivity`, `separation`, `variance` and `entropy` (K, n), and what hangs on
    all of them, `impact` (B,). Without a unit means with it at its `mean` (U, R).
    """
    pooled, largest = responses(model, site, batch, lies)
    of_chosen, _ = responses(model, site, chosen, lies)
    matter = patching(model, chosen.x, chosen.target, [site], {site: mean}, chosen.objective)[site]
    top = most(matter, chosen, n_classes, n)
    without = torch.zeros(n_classes, site.n_units, dtype=torch.bool, device=top.device).scatter_(1, top, True)
    area = selectivity(pooled, batch.target, n_classes)
    of_units = {
        "selectivity": area,
        "separation": area.where(higher(of_chosen, chosen.target, n_classes), 1 - area),
        "variance": class_variance(largest, batch.target, n_classes),
    }
    return {
        "top": top,
        **{name: of.T.gather(1, top) for name, of in of_units.items()},
        "entropy": label_entropy(largest, batch.target, n_classes)[top],
        "impact": ablation_impact(model, batch, site, without, mean),
    }


def most(matter: Tensor, data: Batch, n_classes: int, n: int) -> Tensor:
    """(K, n) for each class the units whose loss would take most from the logit, (B, U), on average over its images; of
    equal ones the first."""
    mean = torch.stack([matter[data.target == k].double().mean(0) for k in range(n_classes)])
    order: Tensor = mean.argsort(dim=1, descending=True, stable=True)
    return order[:, :n]
