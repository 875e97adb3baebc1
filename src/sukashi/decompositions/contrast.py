"""Contrast subspaces: the directions in which a layer tells images with a concept from the same without it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sukashi.core.errors import DataError, UsageError
from sukashi.core.types import Site
from sukashi.decompositions.subspaces import Subspaces, completed
from sukashi.measures.imputation import impute
from sukashi.network import hooks


def contrast(
    model: nn.Module, with_concept: Tensor, without: Tensor, site: Site, n_dimensions: int, *, batch_size: int = 64
) -> Subspaces:
    """The `n_dimensions` directions that hold most of what a concept changes in what a layer writes.

    With d_n = a(x_n) - a(x~_n) the differences at all positions of pairs of an image with the concept and the same
    without it, (B, C, H, W) each, the directions are the leading eigenvectors of sum d_n d_n', float64. The mean of d
    is not taken off: what the concept adds to every image is the concept. One subspace; `share` in its params is the
    part of sum |d_n|^2 that lies in it, and its mean is that of the images without the concept, which is what an
    ablation puts in place of it.

    `site` is a `sites.place(model, layer, x)` of all features of a layer. Raises DataError for pairs that do not match
    or do not differ there, UsageError for more directions than features.
    """
    if with_concept.shape != without.shape or not len(without):
        raise DataError(
            f"pairs must be as many images of one size, got {tuple(with_concept.shape)} with the concept and "
            f"{tuple(without.shape)} without it"
        )
    if not 1 <= n_dimensions <= site.n_units:
        raise UsageError(f"n_dimensions must be 1 to the {site.n_units} features of {site.layer!r}, got {n_dimensions}")
    gram = torch.zeros(site.n_units, site.n_units, dtype=torch.float64)
    total, n = torch.zeros(site.n_units, dtype=torch.float64), 0
    like = next(model.parameters())
    with torch.no_grad(), hooks.recorded(model, [site]) as seen:
        for first in range(0, len(without), batch_size):
            held = []
            for x in (with_concept, without):
                model(x[first : first + batch_size].to(like))
                held.append(hooks.gather(site, seen[site]).flatten(2).transpose(1, 2).flatten(0, 1).double())
            difference = held[0] - held[1]
            gram += (difference.T @ difference).cpu()
            total += held[1].sum(0).cpu()
            n += len(held[1])
    if not gram.diagonal().sum() > 0:
        raise DataError(f"the pairs do not differ at layer {site.layer!r}: give images with and without the concept")
    values, directions = torch.linalg.eigh(gram)
    values, directions = values.flip(0), directions.flip(1)[:, :n_dimensions]
    found = {"share": float(values[:n_dimensions].sum() / values.sum()), "n_pairs": len(without)}
    return Subspaces(site.layer, site.axis, completed(directions), 1, n_dimensions, total / n, "contrast", found)


def imputed(x: Tensor, maps: Tensor, share: float) -> Tensor:
    """Images (B, C, H, W) without the `share` of the pixels that maps (B, H, W) say most of, imputed from the others.

    The pixels follow Rong et al. 2022 (`imputation.impute`); equal values of a map go by place.
    """
    n_pixels = maps[0].numel()
    n_gone = round(share * n_pixels)
    if not 1 <= n_gone < n_pixels:
        raise UsageError(f"share must take at least one of the {n_pixels} pixels and leave one, got {share}")
    order = maps.flatten(1).argsort(dim=1, descending=True, stable=True)[:, :n_gone]
    missing = torch.zeros_like(maps.flatten(1), dtype=torch.bool).scatter_(1, order, True)
    return impute(x, missing.view_as(maps))
