"""Contrast subspaces: the directions in which a layer tells images with a concept from the same without it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sukashi.core.errors import DataError, UsageError
from sukashi.core.precision import exact
from sukashi.core.types import Site
from sukashi.decompositions.subspaces import Subspaces
from sukashi.network import hooks
from sukashi.network.canonical import evaluating

RIDGE = 1e-3


def contrast(
    model: nn.Module,
    with_concept: Tensor,
    without: Tensor,
    site: Site,
    n_dimensions: int,
    *,
    whiten: bool = True,
    batch_size: int = 64,
) -> Subspaces:
    """The `n_dimensions` directions in which a concept changes most of what a layer writes, beside what varies there
    anyhow; an ablation of them changes as little as possible of all else.

    With d_n = a(x_n) - a(x~_n) the differences at all positions of pairs of an image with the concept and the same
    without it, (B, C, H, W) each, D = mean of d d' and S = L L' the covariance of a(x~), coordinates h = W'a are the
    generalised eigenvectors D w = mu S w, those of the largest mu first, W'S W = 1: W = L'^-1 V and the basis B = L V,
    V the eigenvectors of L^-1 D L'^-1. What is taken out by h is then the least change of a in the metric of S after
    which W_k'a says nothing (as concept erasure has it: Belrose et al. 2023). The mean of d is not taken off: what the
    concept adds to every image is the concept. S has a thousandth of its mean variance added to its diagonal, for
    features that are always zero. Without `whiten` S is the identity, and B the principal directions of d.

    All in float64, streamed. One subspace; `share` in its facts is the part of the sum of mu that it has, and its mean
    is that of the images without the concept, which is what an ablation puts in place of it. `site` is a
    `sites.place(model, layer, x)` of all features of a layer.

    Raises DataError for pairs that do not match or do not differ there, UsageError for more directions than features.
    """
    if with_concept.shape != without.shape or not len(without):
        raise DataError(
            f"pairs must be as many images of one size, got {tuple(with_concept.shape)} with the concept and "
            f"{tuple(without.shape)} without it"
        )
    n = site.n_units
    if not 1 <= n_dimensions <= n:
        raise UsageError(f"n_dimensions must be 1 to the {n} features of {site.layer!r}, got {n_dimensions}")
    changed, square, total, n_rows = (*torch.zeros(2, n, n, dtype=torch.float64), torch.zeros(n).double(), 0)
    like = next(model.parameters())
    with exact(), evaluating(model), hooks.recorded(model, [site]) as seen:
        for first in range(0, len(without), batch_size):
            held = []
            for x in (with_concept, without):
                model(x[first : first + batch_size].to(like))
                a = hooks.gather(site, seen[site])
                held.append(a.reshape(*a.shape[:2], -1).transpose(1, 2).flatten(0, 1).double())
            difference = held[0] - held[1]
            changed = changed + (difference.T @ difference).cpu()
            square = square + (held[1].T @ held[1]).cpu()
            total = total + held[1].sum(0).cpu()
            n_rows += len(difference)
    if not changed.diagonal().sum() > 0:
        raise DataError(f"the pairs do not differ at layer {site.layer!r}: give images with and without the concept")
    mean = total / n_rows
    lower = torch.eye(n, dtype=torch.float64)
    if whiten:
        spread = square / n_rows - mean[:, None] * mean
        if not spread.diagonal().mean() > 0:
            raise DataError(
                f"layer {site.layer!r} says the same of all images without the concept: give an earlier one"
            )
        lower = torch.linalg.cholesky(spread + RIDGE * spread.diagonal().mean() * lower)
    half = torch.linalg.solve_triangular(lower, changed / n_rows, upper=False)
    ratio = torch.linalg.solve_triangular(lower, half.T, upper=False)
    mu, vectors = torch.linalg.eigh((ratio + ratio.T) / 2)
    mu, vectors = mu.flip(0).clamp(min=0), vectors.flip(1)
    dual = torch.linalg.solve_triangular(lower.T, vectors, upper=True)
    found = {"share": float(mu[:n_dimensions].sum() / mu.sum()), "n_pairs": len(without)}
    return Subspaces(site.layer, site.axis, lower @ vectors, dual, 1, n_dimensions, mean, found)


def highest(maps: Tensor, share: float) -> Tensor:
    """(B, H, W) bool: of each map (B, H, W), the `share` of the pixels with the highest values; equal ones by place.

    To impute an image there is to take out what a map says that it shows. Raises UsageError for a share that takes no
    pixel, or leaves none.
    """
    values = maps.flatten(1)
    n_pixels = values.shape[1]
    n_taken = round(share * n_pixels)
    if not 1 <= n_taken < n_pixels:
        raise UsageError(f"share must take at least one of the {n_pixels} pixels and leave one, got {share}")
    order = values.argsort(dim=1, descending=True, stable=True)[:, :n_taken]
    return torch.zeros_like(values, dtype=torch.bool).scatter_(1, order, True).view_as(maps)
