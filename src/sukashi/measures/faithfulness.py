"""How faithful a saliency map is: one number an image, from maps that lie beside a batch, row for row.

A map is data like the batch, and no option that a study file could hold: one map, computed once, serves every measure,
and a map from elsewhere is measured as ours.

Where a map says nothing, being constant or holding NaN or Inf, the value is NaN: count those images and leave them out
of means. Ties go by position, row by row from the top left.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

from sukashi.core.errors import DataError, UsageError
from sukashi.core.precision import without_tf32
from sukashi.core.registry import BatchSize
from sukashi.core.types import Batch, Maps, Measurement
from sukashi.measures import measures
from sukashi.measures.accuracy import outputs
from sukashi.measures.imputation import impute

Count = Annotated[int, Field(ge=1)]
Noise = Annotated[float, Field(ge=0)]
Percentages = Annotated[Sequence[float], Field(min_length=1)]
Order = Literal["morf", "lerf"]
Outcome = Literal["accuracy", "probability"]
Form = Literal["mean", "lottery"]
Baseline = Literal["zeros", "blur"]

ORDERS: tuple[Order, Order] = ("lerf", "morf")

# Percent of the pixels removed: those of pytorch-grad-cam, which Rong et al. plot too.
PERCENTAGES = (10, 20, 30, 40, 50, 60, 70, 80, 90)
# What each form of the AOPC is computed over; the first is what the others are compared with.
AOPC_PERCENTAGES = {"mean": (0, *PERCENTAGES), "lottery": (1, 11, 21, 31, 41, 51, 61, 71, 81, 91)}
# Petsiuk et al. blur images of 224 pixels with a kernel of 11 pixels and sigma 5.
KERNEL, SIGMA = 11, 5.0


@dataclass(frozen=True)
class Removal:
    """What a network makes of images from which pixels go: for every image (B, P), a column for each of `percentages`.

    `correct` is the outcome, 1 where the target has the largest logit, `probability` the score, the target's
    probability, both by the batch's objective; NaN where a map ranks nothing.
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
    maps: Maps,
    generator: torch.Generator,
    *,
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


@dataclass(frozen=True)
class RemovalCurves:
    """The curves of ROAD of a network and its maps, each point computed once: when it is first asked for.

    `remove(order=..., percentages=...)` gives them, `image_id` (B,) says whose they are.
    """

    image_id: tuple[str, ...]
    remove: Callable[..., Removal]
    _points: dict[tuple[Order, float], tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def at(self, order: Order, percentages: Sequence[float]) -> Removal:
        """The curve of one order at these percentages."""
        missing = [p for p in percentages if (order, p) not in self._points]
        if missing:
            found = self.remove(order=order, percentages=missing)
            columns = zip(found.correct.unbind(1), found.probability.unbind(1), strict=True)
            self._points.update({(order, p): column for p, column in zip(missing, columns, strict=True)})
        correct, probability = zip(*(self._points[order, p] for p in percentages), strict=True)
        return Removal(tuple(percentages), torch.stack(correct, 1), torch.stack(probability, 1))


@measures.provide
def removal_curves(
    model: nn.Module,
    batch: Batch,
    maps: Maps,
    generator: torch.Generator,
    *,
    noise: Noise = 0.01,
    tolerance: float = 1e-4,
    batch_size: BatchSize = 64,
) -> RemovalCurves:
    """The curves of ROAD, as `removal` computes them with these options."""
    fixed = partial(removal, model, batch, maps, generator, noise=noise, tolerance=tolerance, batch_size=batch_size)
    return RemovalCurves(batch.image_id, fixed)


@measures.register("road", source="Rong et al. 2022, joined as in pytorch-grad-cam, not halved", better="higher")
def road(removal_curves: RemovalCurves, *, percentages: Percentages | None = None) -> dict[str, Measurement]:
    """How much more stays when the least relevant pixels go than when the most relevant do: (B,) in [-1, 1].

        mean over p of (LeRF_p - MoRF_p)

    of right answers, and as `probability` of the target's. A map that says nothing of the model has 0 on average.
    Percentages None are 10, 20, ..., 90. `noise` is the standard deviation of what is added where pixels went, in those
    of the images, `tolerance` how far the imputation may be from its solution, `batch_size` how many images are imputed
    at once; `removal`, which gives the two curves, says more of them, and raises.
    """
    chosen = PERCENTAGES if percentages is None else percentages
    least, most = (removal_curves.at(order, chosen) for order in ORDERS)
    return _of_outcomes(removal_curves, lambda outcome: (least.of(outcome) - most.of(outcome)).mean(1))


@measures.register("aopc", source="Samek et al. 2017, eq. 12; Suwal et al. 2025 and their code", better="higher")
def aopc(removal_curves: RemovalCurves, *, form: Form = "mean") -> dict[str, Measurement]:
    """Area over the MoRF curve of ROAD: how much is lost when the most relevant pixels go, (B,) in [-1, 1].

    `mean` is the mean of a_0 - a_p over p = 10, 20, ..., 90 (Samek et al. count p = 0 too, whose term is 0); `lottery`
    is what the lottery paper's code does, the sum of a_1 - a_p over its ten percentages p = 1, 11, ..., 91 by eleven.
    Of right answers, and as `probability` of the target's. `area_over` gives both forms from a curve one has. The other
    options are those of `road`.
    """
    curve = removal_curves.at("morf", AOPC_PERCENTAGES[form])
    return _of_outcomes(removal_curves, lambda outcome: area_over(curve.of(outcome), form))


def _of_outcomes(curves: RemovalCurves, value: Callable[[Outcome], Tensor]) -> dict[str, Measurement]:
    outcomes: dict[str, Outcome] = {"": "accuracy", "probability": "probability"}
    return {part: Measurement(value(outcome), curves.image_id, outcome) for part, outcome in outcomes.items()}


def area_over(curve: Tensor, form: Form) -> Tensor:
    """(B,) the area over curves (B, P), whose first column is what the others are compared with (AOPC_PERCENTAGES)."""
    lost = curve[:, :1] - curve
    return lost[:, 1:].mean(1) if form == "mean" else lost.sum(1) / (curve.shape[1] + 1)


@measures.register("insertion", source="Petsiuk et al. 2018, sec. 3.4; Samek et al. 2017", better="higher")
def insertion(
    model: nn.Module,
    batch: Batch,
    maps: Maps,
    *,
    step: Count | None = None,
    baseline: Baseline = "zeros",
    batch_size: BatchSize = 64,
) -> Measurement:
    """Area under the target's probability while pixels are put into a baseline, most relevant first: (B,) in [0, 1].

    `replacement` gives the curve of n + 1 probabilities, says what the options are, and raises; the area is that of the
    trapezoid rule over n intervals, by n. IMPACT starts from zeros, Petsiuk et al. from the blurred image.
    """
    curve = replacement(model, batch, maps, insert=True, step=step, baseline=baseline, batch_size=batch_size)
    return Measurement(_area_under(curve), batch.image_id, "probability")


@measures.register("deletion", source="Petsiuk et al. 2018, sec. 3.4; Samek et al. 2017", better="lower")
def deletion(
    model: nn.Module,
    batch: Batch,
    maps: Maps,
    *,
    step: Count | None = None,
    baseline: Baseline = "zeros",
    batch_size: BatchSize = 64,
) -> Measurement:
    """Area under the target's probability while a baseline replaces pixels, most relevant first: (B,) in [0, 1].

    As `insertion`, from the image to the baseline. Both papers delete to zeros.
    """
    curve = replacement(model, batch, maps, insert=False, step=step, baseline=baseline, batch_size=batch_size)
    return Measurement(_area_under(curve), batch.image_id, "probability")


def replacement(
    model: nn.Module,
    batch: Batch,
    maps: Maps,
    *,
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


def _ranks(batch: Batch, maps: Maps, *, descending: bool) -> tuple[Tensor, Tensor]:
    """(B, H, W) each pixel's place in the order of its map, ties by position; and (B,) whether the map has an order."""
    _check(batch, maps)
    flat = maps.values.flatten(1)
    order = flat.argsort(dim=1, descending=descending, stable=True)
    places = torch.arange(flat.shape[1], device=flat.device).expand_as(order)
    ranks = torch.empty_like(order).scatter_(1, order, places)
    usable = flat.isfinite().all(1) & (flat.amax(1) > flat.amin(1))
    return ranks.view(maps.values.shape), usable


def _check(batch: Batch, maps: Maps) -> None:
    n_images, _, height, width = batch.x.shape
    if not n_images:
        raise DataError("there are no images to measure maps on: give a batch that holds some")
    if maps.values.shape != (n_images, height, width):
        raise UsageError(
            f"maps have shape {tuple(maps.values.shape)}, images {tuple(batch.x.shape)}: give one value for each "
            f"pixel, ({n_images}, {height}, {width}); attributions.maps.saliency_map joins channels"
        )
    if maps.image_id != batch.image_id:
        raise UsageError("maps and batch are of different images, or in another order: give both row for row")
