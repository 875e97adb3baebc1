"""Measures of maps, pixel by pixel in Python's own numbers, and scipy's ranks."""

import math

import scipy.stats
import torch

from oracles import oracle


@oracle("measures", "gini")
def gini(maps):
    """Equation 1 over sorted absolute values."""
    found = []
    for image_map in maps:
        values = sorted(abs(v) for v in image_map.flatten().tolist())
        d, total = len(values), math.fsum(values)
        found.append(1 - 2 * math.fsum(v / total * (d - k + 0.5) / d for k, v in enumerate(values, start=1)))
    return found


@oracle("measures", "localisation")
def localisation(maps, masks):
    """The share of positive relevance inside the mask."""
    found = []
    for image_map, mask in zip(maps, masks, strict=True):
        inside = total = 0.0
        for value, within in zip(image_map.flatten().tolist(), mask.flatten().tolist(), strict=True):
            total += max(value, 0.0)
            inside += max(value, 0.0) if within else 0.0
        found.append(inside / total)
    return found


@oracle("measures", "rank_accuracy")
def rank_accuracy(maps, masks):
    """Of as many highest pixels as the mask has, the share inside."""
    found = []
    for image_map, mask in zip(maps, masks, strict=True):
        values, inside = image_map.flatten().tolist(), mask.flatten().tolist()
        highest = sorted(range(len(values)), key=lambda p, v=values: (-v[p], p))[: sum(inside)]
        found.append(sum(inside[p] for p in highest) / sum(inside))
    return found


@oracle("measures", "pointing_game")
def pointing_game(maps, masks):
    """Whether the first of the highest pixels is inside."""
    found = []
    for image_map, mask in zip(maps, masks, strict=True):
        values = image_map.flatten().tolist()
        found.append(float(mask.flatten().tolist()[values.index(max(values))]))
    return found


@oracle("measures", "rank_correlation")
def rank_correlation(maps, reference_maps):
    pairs = zip(maps.flatten(1).numpy(), reference_maps.flatten(1).numpy(), strict=True)
    return [float(scipy.stats.spearmanr(*pair).statistic) for pair in pairs]


def written_out_ssim(one, other):
    """Equation 13 at each pixel, under a Gaussian of sigma 1.5 cut at five pixels, the border reflected."""
    height, width = one.shape
    g = torch.exp(-(torch.arange(-5, 6).double() ** 2) / (2 * 1.5**2))
    weights = torch.outer(g, g) / g.sum() ** 2

    def reflected(p, n):
        p = abs(p)
        return p if p < n else 2 * (n - 1) - p

    total = 0.0
    for i in range(height):
        for j in range(width):
            rows = [reflected(i + d, height) for d in range(-5, 6)]
            columns = [reflected(j + d, width) for d in range(-5, 6)]
            a, b = one[rows][:, columns], other[rows][:, columns]
            ma, mb = (weights * a).sum(), (weights * b).sum()
            va, vb = (weights * (a - ma) ** 2).sum(), (weights * (b - mb) ** 2).sum()
            cov = (weights * (a - ma) * (b - mb)).sum()
            total += (2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))
    return float(total) / (height * width)


@oracle("measures", "ssim")
def ssim(maps, reference_maps):
    """Of maps brought to one scale by their largest absolute values, from 0 on where one has negative values."""
    found = []
    for pair in zip(maps, reference_maps, strict=True):
        pair = [one / one.abs().max() for one in pair]
        if min(float(one.min()) for one in pair) < 0:
            pair = [(1 + one) / 2 for one in pair]
        found.append(written_out_ssim(*pair))
    return found


@oracle("measures", "top_overlap")
def top_overlap(maps, reference_maps, *, fraction=0.1):
    """The share of the k highest pixels of one map that are among the other's; of equal pixels the first come first."""
    found = []
    for pair in zip(maps, reference_maps, strict=True):
        values = [one.flatten().tolist() for one in pair]
        k = max(1, int(len(values[0]) * fraction))
        highest = [set(sorted(range(len(v)), key=lambda p, v=v: (-v[p], p))[:k]) for v in values]
        found.append(len(highest[0] & highest[1]) / k)
    return found
