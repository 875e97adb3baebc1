"""How faithful a saliency map is: one number an image, from maps (B, H, W) that lie beside a batch.

A measure of a map takes it as `maps`, without a default: it is data like the batch, row for row, and no option that a
study file could hold. So one map, computed once, serves every measure, and a map from elsewhere is measured as ours.

Where a map says nothing, being constant or holding NaN or Inf, the value is NaN: count those images and leave them out
of means. Ties go by position, row by row from the top left.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

from sukashi.core.errors import DataError, UsageError
from sukashi.core.precision import without_tf32
from sukashi.core.types import Batch
from sukashi.measures import measures
from sukashi.measures.accuracy import outputs
from sukashi.measures.imputation import impute

Count = Annotated[int, Field(ge=1)]
Noise = Annotated[float, Field(ge=0)]
Order = Literal["morf", "lerf"]
Outcome = Literal["accuracy", "probability"]
Form = Literal["mean", "lottery"]
Baseline = Literal["zeros", "blur"]

# Percent of the pixels removed: those of pytorch-grad-cam, which Rong et al. plot too.
PERCENTAGES = (10, 20, 30, 40, 50, 60, 70, 80, 90)
# What each form of the AOPC is computed over; the first is what the others are compared with.
AOPC_PERCENTAGES = {"mean": (0, *PERCENTAGES), "lottery": (1, 11, 21, 31, 41, 51, 61, 71, 81, 91)}
# Petsiuk et al. blur images of 224 pixels with a kernel of 11 pixels and sigma 5.
KERNEL, SIGMA = 11, 5.0


@dataclass(frozen=True)
class Removal:
    """What a network makes of images from which pixels go: for every image (B, P), a column for each of `percentages`.

    `correct` is 1 where the target has the largest logit, `probability` the target's; NaN where a map ranks nothing.
    """

    percentages: tuple[float, ...]
    correct: Tensor
    probability: Tensor

    def of(self, outcome: Outcome) -> Tensor:
        """(B, P) `correct` for accuracy, or `probability`."""
        return self.correct if outcome == "accuracy" else self.probability


def removal(
    model: nn.Module,
    batch: Batch,
    *,
    maps: Tensor,
    generator: torch.Generator,
    order: Order = "morf",
    percentages: Sequence[float] = PERCENTAGES,
    noise: float = 0.01,
    tolerance: float = 1e-4,
    batch_size: int = 64,
) -> Removal:
    """The curves of ROAD: pixels go in the order of a map, and what is around them fills the hole.

    At p percent exactly int(H W p / 100) pixels go, the greatest first (`morf`) or the least (`lerf`), are imputed
    (`imputation.impute`) and get Gaussian noise of standard deviation `noise`, in the units of `batch.x`. An image's
    noise is drawn once, from its id and the seed of `generator`: it is the same in every batch, at every percentage, in
    both orders and for every model, so that these can be compared pair by pair. `batch_size` bounds the images that
    are imputed, and go through the network, at once.

    Raises UsageError for maps of another shape than the images' and percentages outside [0, 100) or so near 100 that no
    pixel stays, ModelError for an output that is not finite logits (B, K).
    """
    ranks, usable = _ranks(batch, maps, descending=order == "morf")
    height, width = batch.x.shape[2:]
    counts = [int(height * width * p / 100) for p in percentages]
    if not all(0 <= p < 100 for p in percentages):
        raise UsageError(f"percentages removed must be in [0, 100), got {list(percentages)}: something must stay")
    seed = generator.initial_seed()
    correct, probability = [], []
    for start in range(0, len(batch), batch_size):
        rows = slice(start, start + batch_size)
        part = batch[rows]
        grain = noise * torch.stack([_grain(image_id, seed, part.x[0]) for image_id in part.image_id])
        outcomes = []
        for count in counts:
            missing = ranks[rows] < count
            x = impute(part.x, missing, tolerance=tolerance) if count else part.x
            found = outputs(model, replace(part, x=x + missing[:, None] * grain))
            outcomes.append((part.objective.outcome(found, part.target), part.objective.score(found, part.target)))
        correct.append(torch.stack([right for right, _ in outcomes], 1).double())
        probability.append(torch.stack([p for _, p in outcomes], 1))
    silent = ~usable[:, None]
    return Removal(
        tuple(percentages),
        torch.cat(correct).masked_fill(silent, torch.nan),
        torch.cat(probability).masked_fill(silent, torch.nan),
    )


@measures.register("road", source="Rong et al. 2022, joined as in pytorch-grad-cam, not halved", better="higher")
def road(
    model: nn.Module,
    batch: Batch,
    *,
    maps: Tensor,
    generator: torch.Generator,
    reference: nn.Module | None = None,
    outcome: Outcome = "accuracy",
    percentages: Sequence[float] | None = None,
    noise: Noise = 0.01,
    tolerance: float = 1e-4,
    batch_size: Count = 64,
) -> Tensor:
    """How much more stays when the least relevant pixels go than when the most relevant do: (B,) in [-1, 1].

        mean over p of (LeRF_p - MoRF_p)

    of `outcome`: is the image right (accuracy), or its target's probability. A map that says nothing of the model has 0
    on average. `removal` gives the two curves, says what the other options are, and raises; percentages None are 10,
    20, ..., 90.
    """
    both = [
        removal(
            model,
            batch,
            maps=maps,
            generator=generator,
            order=order,
            percentages=PERCENTAGES if percentages is None else percentages,
            noise=noise,
            tolerance=tolerance,
            batch_size=batch_size,
        ).of(outcome)
        for order in ("lerf", "morf")
    ]
    return (both[0] - both[1]).mean(1)


@measures.register("aopc", source="Samek et al. 2017, eq. 12; Suwal et al. 2025 and their code", better="higher")
def aopc(
    model: nn.Module,
    batch: Batch,
    *,
    maps: Tensor,
    generator: torch.Generator,
    reference: nn.Module | None = None,
    form: Form = "mean",
    outcome: Outcome = "accuracy",
    noise: Noise = 0.01,
    tolerance: float = 1e-4,
    batch_size: Count = 64,
) -> Tensor:
    """Area over the MoRF curve of ROAD: how much is lost when the most relevant pixels go, (B,) in [-1, 1].

    `mean` is the mean of a_0 - a_p over p = 10, 20, ..., 90 (Samek et al. count p = 0 too, whose term is 0); `lottery`
    is what the lottery paper's code does, the sum of a_1 - a_p over its ten percentages p = 1, 11, ..., 91 by eleven.
    `area_over` gives both from a curve one has, `removal` says what the other options are, and raises.
    """
    curve = removal(
        model,
        batch,
        maps=maps,
        generator=generator,
        percentages=AOPC_PERCENTAGES[form],
        noise=noise,
        tolerance=tolerance,
        batch_size=batch_size,
    )
    return area_over(curve.of(outcome), form)


def area_over(curve: Tensor, form: Form) -> Tensor:
    """(B,) the area over curves (B, P), whose first column is what the others are compared with (AOPC_PERCENTAGES)."""
    lost = curve[:, :1] - curve
    return lost[:, 1:].mean(1) if form == "mean" else lost.sum(1) / (curve.shape[1] + 1)


@measures.register("insertion", source="Petsiuk et al. 2018, sec. 3.4; Samek et al. 2017", better="higher")
def insertion(
    model: nn.Module,
    batch: Batch,
    *,
    maps: Tensor,
    generator: torch.Generator,
    reference: nn.Module | None = None,
    step: Count | None = None,
    baseline: Baseline = "zeros",
    batch_size: Count = 64,
) -> Tensor:
    """Area under the target's probability while pixels are put into a baseline, most relevant first: (B,) in [0, 1].

    `replacement` gives the curve of n + 1 probabilities, says what the options are, and raises; the area is that of the
    trapezoid rule over n intervals, by n. IMPACT starts from zeros, Petsiuk et al. from the blurred image.
    """
    curve = replacement(model, batch, maps=maps, insert=True, step=step, baseline=baseline, batch_size=batch_size)
    return _area_under(curve)


@measures.register("deletion", source="Petsiuk et al. 2018, sec. 3.4; Samek et al. 2017", better="lower")
def deletion(
    model: nn.Module,
    batch: Batch,
    *,
    maps: Tensor,
    generator: torch.Generator,
    reference: nn.Module | None = None,
    step: Count | None = None,
    baseline: Baseline = "zeros",
    batch_size: Count = 64,
) -> Tensor:
    """Area under the target's probability while a baseline replaces pixels, most relevant first: (B,) in [0, 1].

    As `insertion`, from the image to the baseline. Both papers delete to zeros.
    """
    curve = replacement(model, batch, maps=maps, insert=False, step=step, baseline=baseline, batch_size=batch_size)
    return _area_under(curve)


def replacement(
    model: nn.Module,
    batch: Batch,
    *,
    maps: Tensor,
    insert: bool,
    step: int | None = None,
    baseline: Baseline = "zeros",
    batch_size: int = 64,
) -> Tensor:
    """(B, n + 1) the target's probability while pixels go over from one image to another, most relevant first.

    From the baseline to the image where `insert`, else from the image to the baseline; column 0 is before the first,
    and `step` pixels change a column, n = ceil(H W / step). The step changes the area (finer steps see an early fall
    or rise): report it. None is a row's width, as Petsiuk et al. take 224 of 224 x 224. `baseline`: zeros, which is the
    data's mean colour where images are normalised; or blur, a Gaussian (11 pixels, sigma 5, mirrored at the edges where
    Petsiuk et al. pad zeros). The target is the batch's: put the predicted classes there to follow those. `batch_size`
    bounds the rows (images times columns) in one pass.

    Raises UsageError for maps of another shape than the images', and images too small to be blurred; ModelError for an
    output that is not finite logits (B, K).
    """
    ranks, usable = _ranks(batch, maps, descending=True)
    height, width = batch.x.shape[2:]
    step = width if step is None else step
    other = _baseline(batch.x, baseline)
    before, after = (other, batch.x) if insert else (batch.x, other)
    n_columns = -(-height * width // step) + 1
    found = []
    for rows in torch.arange(len(batch) * n_columns, device=batch.x.device).split(batch_size):
        image, column = rows // n_columns, rows % n_columns
        changed = ranks[image] < (column * step)[:, None, None]
        x = torch.where(changed[:, None], after[image], before[image])
        # Ids are not needed here: the same image stands in many rows.
        target = batch.target[image]
        found.append(batch.objective.score(outputs(model, replace(batch, x=x, target=target, image_id=())), target))
    return torch.cat(found).view(-1, n_columns).masked_fill(~usable[:, None], torch.nan)


def _area_under(curve: Tensor) -> Tensor:
    return torch.trapezoid(curve, dim=1) / (curve.shape[1] - 1)


def _baseline(x: Tensor, baseline: Baseline) -> Tensor:
    if baseline == "zeros":
        return torch.zeros_like(x)
    if min(x.shape[2:]) <= KERNEL // 2:
        raise UsageError(f"images of {tuple(x.shape[2:])} pixels are too small to be blurred: take baseline zeros")
    with without_tf32():
        blurred: Tensor = gaussian_blur(x, [KERNEL, KERNEL], [SIGMA, SIGMA])
    return blurred


def _grain(image_id: str, seed: int, like: Tensor) -> Tensor:
    """Noise that belongs to an image, whatever batch it comes in; from the CPU, so that every device has the same."""
    digest = hashlib.sha256(f"{seed}/{image_id}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randn(like.shape, generator=generator, dtype=torch.float32).to(like)


def _ranks(batch: Batch, maps: Tensor, *, descending: bool) -> tuple[Tensor, Tensor]:
    """(B, H, W) each pixel's place in the order of its map, ties by position; and (B,) whether the map has an order."""
    _check(batch, maps)
    flat = maps.flatten(1)
    order = flat.argsort(dim=1, descending=descending, stable=True)
    places = torch.arange(flat.shape[1], device=flat.device).expand_as(order)
    ranks = torch.empty_like(order).scatter_(1, order, places)
    usable = flat.isfinite().all(1) & (flat.amax(1) > flat.amin(1))
    return ranks.view(maps.shape), usable


def _check(batch: Batch, maps: Tensor) -> None:
    n_images, _, height, width = batch.x.shape
    if not n_images:
        raise DataError("there are no images to measure maps on: give a batch that holds some")
    if maps.shape != (n_images, height, width):
        raise UsageError(
            f"maps have shape {tuple(maps.shape)}, images {tuple(batch.x.shape)}: give one value for each pixel, "
            f"({n_images}, {height}, {width}); attributions.maps.saliency_map joins channels"
        )
