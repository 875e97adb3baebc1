"""What a network loses with a region of the image: measures of images and masks, whatever any map says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from sukashi.core.errors import UsageError
from sukashi.core.registry import BatchSize
from sukashi.core.types import Batch, Maps, Measurement
from sukashi.measures import measures
from sukashi.measures.accuracy import outputs
from sukashi.measures.imputation import impute


@measures.register(
    "region_drop", source="Zeiler and Fergus 2014, sec. 4.2, of a mask; imputed as Rong et al. 2022", better="higher"
)
def region_drop(
    model: nn.Module,
    batch: Batch,
    masks: Mapping[str, Maps],
    *,
    tolerance: float = 1e-4,
    batch_size: BatchSize = 64,
) -> dict[str, Measurement]:
    """How much goes with each concept's pixels, the hole filled with what is around it: (B,) in [-1, 1].

        f(x) - f(x without the mask)

    f is whether the answer is right, and as `CONCEPT/probability` the target's probability, which moves with the
    confidence of a network. The missing pixels are imputed (`imputation.impute`, which has `tolerance`) without noise:
    so the hole's shape is hard to see, though not its size. `batch_size` bounds the images imputed at once. NaN where
    the mask is empty, or leaves nothing.

    Raises UsageError for masks that are not boolean, of another shape or of other images.
    """
    return _dropped(model, batch, masks, True, tolerance, batch_size)


@measures.register("complement_drop", source="as region_drop, of all pixels but the mask's", better="higher")
def complement_drop(
    model: nn.Module,
    batch: Batch,
    masks: Mapping[str, Maps],
    *,
    tolerance: float = 1e-4,
    batch_size: BatchSize = 64,
) -> dict[str, Measurement]:
    """How much goes with all pixels but each concept's, filled with what the concept's border has: (B,) in [-1, 1].

    As `region_drop`, f(x) - f(x within the mask alone): near 0 where the concept is enough by itself.
    """
    return _dropped(model, batch, masks, False, tolerance, batch_size)


def _dropped(
    model: nn.Module, batch: Batch, masks: Mapping[str, Maps], inside: bool, tolerance: float, batch_size: int
) -> dict[str, Measurement]:
    size = (len(batch), *batch.x.shape[2:])
    for mask in masks.values():
        if mask.values.shape != size or mask.values.dtype != torch.bool or mask.image_id != batch.image_id:
            raise UsageError(f"masks must be booleans {size}, row for row of the same images as the batch")
    before = _answers(model, batch, batch.x, batch_size)
    found = {}
    for concept, mask in masks.items():
        missing = mask.values if inside else ~mask.values
        some = missing.flatten(1).any(1) & ~missing.flatten(1).all(1)
        missing = missing & some[:, None, None]
        both = zip(batch.x.split(batch_size), missing.split(batch_size), strict=True)
        parts = [impute(x, holes, tolerance=tolerance) for x, holes in both]
        after = _answers(model, batch, torch.cat(parts), batch_size)
        drops = [(one - other).where(some, torch.nan) for one, other in zip(before, after, strict=True)]
        found[concept] = Measurement(drops[0], batch.image_id, "accuracy")
        found[f"{concept}/probability"] = Measurement(drops[1], batch.image_id, "probability")
    return found


def _answers(model: nn.Module, batch: Batch, x: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """(B,) the outcome and the target's probability of other pixels x of the same images, float64."""
    right, probability = [], []
    for part in replace(batch, x=x).split(batch_size):
        found = outputs(model, part)
        right.append(part.objective.outcome(found, part.target).double())
        probability.append(part.objective.score(found, part.target))
    return torch.cat(right), torch.cat(probability)
