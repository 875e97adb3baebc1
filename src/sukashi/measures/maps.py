"""What saliency maps show: how few pixels hold them, whether they lie where they should, how alike two of an image are.

These measures read maps of `attributions.maps.saliency_map` and not the model. NaN stands for a map with nothing to
say, and is for the caller to count and leave out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from sukashi.core.errors import UsageError
from sukashi.core.types import Maps, Measurement
from sukashi.measures import measures

_ROWS = 4  # maps sorted at once: at 224 pixels they stay in a processor's cache
_LEAST = 6  # pixels a side: SSIM's window reaches five beyond the border, by reflection


@measures.register("gini", source="Suwal et al. 2025, eq. 1 (Hurley and Rickard 2009)", better="higher")
def gini(maps: Maps) -> Measurement:
    """How few pixels hold a map's absolute values: the Gini index; (B,) float64, in [0, 1].

        G = 1 - 2 sum_k a_(k) / |a|_1 (d - k + 1/2) / d = sum_k (2k - d - 1) a_(k) / (d sum a)

    with a_(k) the k-th smallest of d absolute values. One pixel alone gives 1 - 1/d, a constant 0; zeros, NaN and Inf
    give NaN. Sorted in the precision of the maps, summed in float64; Quantus adds 1e-7 to every value.

    Maps score differently by how channels are joined (`attributions.maps`). Values per channel have a Gini of their
    own, higher than all on the images we tried (.53 against .44 for slopes, .63 against .61 for integrated gradients,
    of a ResNet-20): we take none.
    """
    values = maps.values.detach().flatten(1)
    d = values.shape[1]
    weights = 2 * torch.arange(1, d + 1, dtype=torch.float64, device=values.device) - d - 1
    found = []
    for part in values.split(_ROWS):
        ordered = _sorted(part.abs()).double()
        found.append((ordered @ weights) / (d * ordered.sum(1)))
    # 0 / 0 is NaN, and so is whatever NaN and Inf take part in
    return Measurement(torch.cat(found), maps.image_id, "Gini index")


def _sorted(values: Tensor) -> Tensor:
    """(B, d) each row from its smallest up, NaN last; on a processor in place, by NumPy: 17 times as fast as torch.

    (NumPy knows no bfloat16.)
    """
    if values.device.type != "cpu" or values.dtype == torch.bfloat16:
        return values.sort(dim=1).values
    values.numpy().sort(axis=1)
    return values


@measures.register("localisation", source="Arras et al. 2022 (CLEVR-XAI), relevance mass accuracy", better="higher")
def localisation(maps: Maps, masks: Mapping[str, Maps]) -> dict[str, Measurement]:
    """Share of a map's positive relevance that lies inside each concept's mask; (B,) float64, in [0, 1].

    sum_{p in mask} a_p^+ / sum_p a_p^+. A concept's mask is True where the evidence is. A map that points nowhere in
    particular has the mask's share of the image. NaN where no relevance is positive, a map is not finite, or the mask
    is empty, which no map could point at.

    Raises UsageError for masks that are not boolean, of another shape or of other images.
    """
    positive = maps.values.double().flatten(1).clamp(min=0)
    finite = maps.values.flatten(1).isfinite().all(1)
    found = {}
    for concept, inside in _inside(maps, masks).items():
        share = (positive * inside).sum(1) / positive.sum(1)
        share = share.where(finite & inside.any(1), torch.nan)
        found[concept] = Measurement(share, maps.image_id, "share of positive relevance")
    return found


@measures.register("rank_accuracy", source="Arras et al. 2022 (CLEVR-XAI), relevance rank accuracy", better="higher")
def rank_accuracy(maps: Maps, masks: Mapping[str, Maps]) -> dict[str, Measurement]:
    """Share of a map's highest pixels, as many as a concept has, that lie inside its mask; (B,) float64, in [0, 1].

    |highest k and mask| / k with k the pixels of the mask; of equal pixels those that come first, row by row. A map
    that points nowhere in particular has the mask's share of the image. NaN where a map is constant or not finite, or
    the mask is empty.

    Raises UsageError for masks that are not boolean, of another shape or of other images.
    """
    order = maps.values.flatten(1).argsort(dim=1, descending=True, stable=True)
    found = {}
    for concept, inside in _inside(maps, masks).items():
        k = inside.sum(1)
        hits = inside.gather(1, order).cumsum(1).gather(1, (k - 1).clamp(min=0)[:, None])[:, 0]
        share = _told(hits.double() / k, maps.values)
        found[concept] = Measurement(share, maps.image_id, "share of the highest pixels")
    return found


@measures.register("pointing_game", source="Zhang et al. 2018, sec. 4.1, without a tolerance", better="higher")
def pointing_game(maps: Maps, masks: Mapping[str, Maps]) -> dict[str, Measurement]:
    """Whether a map's highest pixel lies inside each concept's mask; (B,) float64, 1 or 0.

    Of equal pixels the first, row by row. Zhang et al. also count hits within 15 pixels of an object, which is most of
    a small image: we don't. A map that points nowhere in particular hits in the mask's share of the image. NaN where a
    map is constant or not finite, or the mask is empty.

    Raises UsageError for masks that are not boolean, of another shape or of other images.
    """
    highest = _highest(maps.values, 1)
    found = {}
    for concept, inside in _inside(maps, masks).items():
        hit = (inside & highest).any(1).double().where(inside.any(1), torch.nan)
        found[concept] = Measurement(_told(hit, maps.values), maps.image_id, "hits")
    return found


@measures.register("rank_correlation", source="Spearman 1904; of saliency maps Adebayo et al. 2018", better="higher")
def rank_correlation(maps: Maps, reference_maps: Maps) -> Measurement:
    """Spearman's correlation of a map with the reference's of the same image; (B,) float64, in [-1, 1].

    Pearson's correlation of the pixels' ranks, equal pixels at the mean of their ranks. NaN where a map is constant or
    not finite.
    """
    both = _pair(maps, reference_maps)
    one, other = (rank - rank.mean(1, keepdim=True) for rank in map(_midranks, both))
    found = (one * other).sum(1) / (one.norm(dim=1) * other.norm(dim=1))
    return Measurement(_told(found, *both), maps.image_id, "correlation")


@measures.register("ssim", source="Wang et al. 2004, eq. 13; of saliency maps Adebayo et al. 2018", better="higher")
def ssim(maps: Maps, reference_maps: Maps) -> Measurement:
    """Structural similarity of a map and the reference's of the same image; (B,) float64, at most 1.

    torchmetrics' (Gaussian window, sigma 1.5; K1 = 0.01, K2 = 0.03, range 1), with each map divided by its own largest
    absolute value first: maps have no common unit. Where one of both has a negative value both are then brought from
    [-1, 1] to [0, 1], m -> (1 + m) / 2: SSIM is a product of likenesses of means and of deviations, and of a map and
    its negative both are negative, so that opposite maps would be alike. NaN where a map is constant or not finite.

    Raises UsageError for maps of less than six pixels a side.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure  # seconds, that few commands need

    both = _pair(maps, reference_maps)
    height, width = both[0].shape[1:]
    if min(height, width) < _LEAST:
        raise UsageError(f"maps of {height} x {width} pixels are too small for SSIM: {_LEAST} a side")
    # What has no largest value is NaN in the end, and must not make others so on the way.
    scaled = [(m.double() / m.double().abs().amax((1, 2), keepdim=True)).nan_to_num(0, 0, 0)[:, None] for m in both]
    signed = (torch.minimum(*scaled) < 0).flatten(1).any(1)[:, None, None, None]
    one, other = (torch.where(signed, (1 + m) / 2, m) for m in scaled)
    found = structural_similarity_index_measure(one, other, data_range=1.0, reduction="none")
    assert isinstance(found, Tensor)
    return Measurement(_told(found.view(len(maps)), *both), maps.image_id, "structural similarity")


@measures.register("top_overlap", source="Ghorbani et al. 2019 (top-k intersection)", better="higher")
def top_overlap(
    maps: Maps, reference_maps: Maps, *, fraction: Annotated[float, Field(gt=0, le=1)] = 0.1
) -> Measurement:
    """Share of the reference's highest pixels that are among the map's highest too; (B,) float64, in [0, 1].

    The highest are exactly k = int(H W fraction) pixels, at least one; of equal ones those that come first, row by row.
    Two maps that have nothing to do with each other share `fraction`. NaN where a map is constant or not finite.
    """
    both = _pair(maps, reference_maps)
    k = max(1, int(both[0][0].numel() * fraction))
    one, other = (_highest(m, k) for m in both)
    return Measurement(_told((one & other).sum(1).double() / k, *both), maps.image_id, "share of pixels")


def _pair(maps: Maps, beside: Maps) -> tuple[Tensor, Tensor]:
    _check(maps, beside)
    return maps.values, beside.values


def _inside(maps: Maps, masks: Mapping[str, Maps]) -> dict[str, Tensor]:
    """(B, P) whether a pixel is inside, by concept."""
    for mask in masks.values():
        _check(maps, mask)
        if mask.values.dtype != torch.bool:
            raise UsageError(f"masks are of dtype {mask.values.dtype}: give booleans, True where the evidence is")
    return {concept: mask.values.flatten(1) for concept, mask in masks.items()}


def _check(maps: Maps, beside: Maps) -> None:
    if maps.values.shape != beside.values.shape:
        raise UsageError(
            f"maps of shape {tuple(maps.values.shape)} and what they are held against, "
            f"{tuple(beside.values.shape)}, must be of one shape"
        )
    if maps.image_id != beside.image_id:
        raise UsageError(
            "maps and what they are held against are of different images, or in another order: give both row for row"
        )


def _told(values: Tensor, *both: Tensor) -> Tensor:
    """The values, NaN where one of both maps says nothing: it is constant or not finite."""
    for maps in both:
        flat = maps.flatten(1)
        values = values.where(flat.isfinite().all(1) & (flat != flat[:, :1]).any(1), torch.nan)
    return values


def _midranks(maps: Tensor) -> Tensor:
    """(B, P) the rank of each pixel in float64, the mean of their ranks for equal ones."""
    flat = maps.flatten(1).contiguous()
    order = flat.sort(1).values
    below, up_to = (torch.searchsorted(order, flat, right=right) for right in (False, True))
    return (below + up_to + 1).double() / 2


def _highest(maps: Tensor, k: int) -> Tensor:
    """(B, P) whether a pixel is one of the k highest."""
    flat = maps.flatten(1)
    first = flat.argsort(dim=1, descending=True, stable=True)[:, :k]
    return torch.zeros_like(flat, dtype=torch.bool).scatter_(1, first, True)
