"""What a logit loses when patches of the image are covered."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sukashi.attributions import attributions
from sukashi.attributions.gradient import Baseline, Count, check, check_pixels, in_parts, start_of
from sukashi.core.errors import UsageError
from sukashi.core.objective import CLASSIFICATION, Objective
from sukashi.core.registry import BatchSize
from sukashi.core.types import Site
from sukashi.network.canonical import answer


@attributions.register("occlusion", source="Zeiler and Fergus 2014, sec. 4.2, of the logit", kinds=("pixel",))
def occlusion(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    sites: Sequence[Site],
    objective: Objective = CLASSIFICATION,
    *,
    window: Count | None = None,
    stride: Count | None = None,
    baseline: Baseline = 0.0,
    batch_size: BatchSize = 64,
) -> dict[Site, Tensor]:
    """What the target's logit loses with a pixel: the mean of F(x) - F(x covered) over the patches on it; input only.

    A patch of `window` pixels a side, in all channels the `baseline`'s, is moved by `stride`; the last of a row or a
    column ends with the image. None are an eighth of the shorter side, and half of the window. `baseline` is a number
    or a tensor that broadcasts to x, in preprocessed units: 0 is the mean colour. Channels have equal parts of a
    pixel's value, so that a map is their sum. (Zeiler and Fergus plot the probability that is left at each place of the
    patch.) `batch_size` bounds the rows (images times patches) in one pass.

    Raises UsageError for another site than the input, a stride above the window, which leaves pixels uncovered, and a
    baseline of another shape; DataError and ModelError as `saliency` does.
    """
    check_pixels("occlusion", sites)
    check(model, x, target, objective)
    n_channels, height, width = x.shape[1:]
    side = window or max(1, min(height, width) // 8)
    step = stride or max(1, side // 2)
    if step > side:
        raise UsageError(
            f"stride of occlusion must be at most the window of {side}, got {step}: pixels would be left out"
        )
    rows, columns = (_covered(size, side, step, x) for size in (height, width))
    start = start_of(x, baseline)
    n_patches = len(rows) * len(columns)

    def explain(some: slice) -> dict[Site, Tensor]:
        part, other, explained = x[some].detach(), start[some], target[some]
        whole = _logits(model, part, explained, objective)
        found = []
        for pairs in torch.arange(len(part) * n_patches, device=x.device).split(batch_size):
            image, patch = pairs // n_patches, pairs % n_patches
            covers = rows[patch // len(columns)][:, :, None] & columns[patch % len(columns)][:, None]
            covered = torch.where(covers[:, None], other[image], part[image])
            found.append(whole[image] - _logits(model, covered, explained[image], objective))
        lost = torch.cat(found).view(len(part), len(rows), len(columns)).double()
        down, across = rows.double(), columns.double()
        total = torch.einsum("bij,ih,jw->bhw", lost, down, across) / (down.sum(0)[:, None] * across.sum(0))
        values = (total / n_channels).to(x)[:, None].repeat(1, n_channels, 1, 1)
        return dict.fromkeys(sites, values)

    return in_parts(explain, len(x), max(1, batch_size // n_patches))


def _covered(size: int, side: int, step: int, like: Tensor) -> Tensor:
    """(places, size) which pixels of a row or a column a patch covers at each of its places."""
    starts = torch.arange(0, max(1, size - side + step), step, device=like.device)[:, None]
    pixels = torch.arange(size, device=like.device)
    return (pixels >= starts) & (pixels < starts + side)


def _logits(model: nn.Module, x: Tensor, target: Tensor, objective: Objective) -> Tensor:
    """(B,) what is explained; the model may write into what it is given."""
    with torch.no_grad():
        return objective.explained(answer(model, x.clone()), target)
