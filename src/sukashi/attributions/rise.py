"""RISE: what a logit is where random parts of the image are seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from sukashi.attributions import attributions
from sukashi.attributions.gradient import Baseline, Count, check, check_pixels, in_parts, start_of
from sukashi.core.objective import CLASSIFICATION, Objective
from sukashi.core.registry import BatchSize
from sukashi.core.types import Site
from sukashi.network.canonical import answer

_AT_ONCE = 2**22  # numbers of masks that are made together


@attributions.register("rise", source="Petsiuk et al. 2018, eq. 6, of the logit less its mean", kinds=("pixel",))
def rise(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    sites: Sequence[Site],
    objective: Objective = CLASSIFICATION,
    *,
    n_masks: Count = 2000,
    cells: Count = 7,
    kept: Annotated[float, Field(gt=0, lt=1)] = 0.5,
    baseline: Baseline = 0.0,
    batch_size: BatchSize = 64,
) -> dict[Site, Tensor]:
    """How much of the target's logit comes with a pixel, over random masks M in [0, 1] of the image; input only.

        S = 1 / (N p) sum over masks of (F(M x + (1 - M) baseline) - mean F) M

    A mask is a grid of `cells` + 1 by `cells` + 1 numbers, each 1 with probability p, `kept`, and else 0, enlarged
    bilinearly until `cells` of them are as long as the image, and shifted at random by up to one of them. All images
    meet the same `n_masks` masks, drawn anew by the same seed in each call. Less the mean, which moves all pixels by
    about the same, a map has less noise (the paper takes the probability as it is). `baseline` is a number or a tensor
    that broadcasts to x, in preprocessed units: 0 is the mean colour. Channels have equal parts of a pixel's value.
    `batch_size` bounds the rows (images times masks) in one pass.

    Raises UsageError for another site than the input and a baseline of another shape; DataError and ModelError as
    `saliency` does.
    """
    check_pixels("rise", sites)
    check(model, x, target, objective)
    n_channels, *size = x.shape[1:]
    start = start_of(x, baseline)
    generator = torch.Generator().manual_seed(0)
    grids = (torch.rand(n_masks, cells + 1, cells + 1, generator=generator) < kept).to(x)
    ways = [_enlarged(length, cells, n_masks, generator, x) for length in size]
    at_once = max(1, min(batch_size, _AT_ONCE // (size[0] * size[1])))

    def explain(some: slice) -> dict[Site, Tensor]:
        part, other, explained = x[some].detach(), start[some], target[some]
        seen = torch.zeros(len(part), *size, dtype=torch.float64, device=x.device)
        all_masks, answers = torch.zeros(size, dtype=torch.float64, device=x.device), seen.new_zeros(len(part))
        for rows in torch.arange(n_masks, device=x.device).split(at_once):
            down, across = (
                way[at[rows][:, None] + torch.arange(n).to(at)] for (way, at), n in zip(ways, size, strict=True)
            )
            masks = down @ grids[rows] @ across.transpose(1, 2)
            shown = torch.lerp(other[:, None], part[:, None], masks[:, None]).flatten(0, 1)
            with torch.no_grad():
                logits = objective.explained(answer(model, shown), explained.repeat_interleave(len(rows)))
            logits = logits.view(len(part), -1).double()
            seen += torch.einsum("bn,nhw->bhw", logits, masks.double())
            all_masks += masks.double().sum(0)
            answers += logits.sum(1)
        found = (seen - answers[:, None, None] / n_masks * all_masks) / (n_masks * kept)
        return dict.fromkeys(sites, (found / n_channels).to(x)[:, None].repeat(1, n_channels, 1, 1))

    return in_parts(explain, len(x), batch_size // at_once)


def _enlarged(length: int, cells: int, n_masks: int, generator: torch.Generator, like: Tensor) -> tuple[Tensor, Tensor]:
    """(pixels, cells + 1) how each cell of a row counts for the pixels of an image that is longer by one cell, and
    (n_masks,) at which of them each mask begins.
    """
    pixels = -(-length // cells)
    one_each = torch.eye(cells + 1, dtype=torch.float64)[None]
    way = F.interpolate(one_each, size=(cells + 1) * pixels, mode="linear")[0].T
    return way.to(like), torch.randint(pixels, (n_masks,), generator=generator).to(like.device)
