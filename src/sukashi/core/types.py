"""The types everything else speaks in.

Axes, used as shape suffixes (`act_BCHW`): B images, C channels, H W pixels, U units of a site, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sukashi.core.errors import UsageError
from sukashi.core.objective import CLASSIFICATION, Objective
from sukashi.core.schema import check_ratio

MAX_NUMBERS = 2**24  # of one image; what a network makes of them is some hundred times as much
MAX_SIDE = 16_384
Kind = Literal["pixel", "channel", "hidden", "head", "token", "subspace", "latent", "weight"]


@dataclass(frozen=True)
class Member:
    """One parameter slice that goes with a site's units.

    `module` is the dotted name of the layer and `side` the axis of it: "out" for what produces the units (weight rows,
    bias, BatchNorm features, both axes of a depthwise convolution), "in" for what consumes them (weight columns). Unit
    u owns `index[u]`, one or more positions on that axis (49 of them where 7x7 maps are flattened). `axis` is where
    they lie in the tensor that the layer writes (side out) or reads (side in): 1 in maps (B, C, H, W), -1 in tokens
    (B, T, D).
    """

    module: str
    side: Literal["in", "out"]
    index: tuple[tuple[int, ...], ...]
    axis: int


@dataclass(frozen=True)
class Site:
    """A place in a model whose units can be scored, measured or cut.

    `layer` is the dotted name of the first layer that produces the units ("" = the input), `axis` their axis in that
    layer's output, `members` every parameter slice that is cut together. `n_units` excludes what cannot be cut.
    Equality and hash leave `members` out. The units of a site of kind weight are the entries of its layer's weight,
    which it has no members for. `at` says what of its layer a place is (`sites.place`), as one would index it:
    "in[..., 0:8]"; "" of a site whose units can be cut.
    """

    layer: str
    kind: Kind
    n_units: int
    axis: int = 1
    members: tuple[Member, ...] = field(default=(), compare=False, repr=False)
    at: str = ""

    @property
    def consumers(self) -> tuple[Member, ...]:
        """The members that read the units: where a mask is applied."""
        return tuple(member for member in self.members if member.side == "in")

    @property
    def producers(self) -> tuple[Member, ...]:
        """The members that write the units."""
        return tuple(member for member in self.members if member.side == "out")


@dataclass(frozen=True)
class Preprocess:
    """What a model expects of an image: resized to (height, width), `channels` planes in [0, 1], (x - mean) / std.

    Where `shorter` is None the whole image is resized, and its aspect ratio not kept. Else its shorter side is made so
    many pixels and the centre is taken: it keeps its proportions and loses its rim. (Of a size that is no square, it is
    made as small as covers the size enlarged until its own shorter side has so many pixels.)

    Raises UsageError for an image without pixels or of more than MAX_NUMBERS numbers, for a centre larger than what it
    is taken from, and for means and standard deviations that are not one finite number a channel, the latter above 0.
    """

    height: int
    width: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    shorter: int | None = None

    def __post_init__(self) -> None:
        sides = (self.height, self.width, self.channels)
        if min(sides) < 1 or math.prod(sides) > MAX_NUMBERS:
            raise UsageError(
                f"images must have 1 to {MAX_NUMBERS:,} numbers, got {self.height} x {self.width} pixels in "
                f"{self.channels} channels"
            )
        if self.shorter is not None and not min(self.height, self.width) <= self.shorter <= MAX_SIDE:
            raise UsageError(
                f"the shorter side must be resized to {min(self.height, self.width)} to {MAX_SIDE} pixels, for the "
                f"centre of {self.height} x {self.width} is taken of it, got {self.shorter}"
            )
        for name, numbers in (("mean", self.mean), ("std", self.std)):
            if len(numbers) != self.channels or not all(map(math.isfinite, numbers)):
                raise UsageError(f"{name} must be a finite number for each of {self.channels} channels, got {numbers}")
        if min(self.std) <= 0:
            raise UsageError(f"std must be above 0, got {self.std}")

    @property
    def resizing(self) -> str:
        """How the size is met, in words."""
        if self.shorter is None:
            return "whole images resized, aspect ratio not kept"
        return f"shorter side resized to {self.shorter}, the centre cropped"


@dataclass(frozen=True)
class Batch:
    """Images ready for a model, with their targets and ids that never change.

    `x` (B, C, H, W) preprocessed, `target` (B,) class numbers or (B, H, W), `image_id` (B,) strings. `objective` says
    what the targets mean, and what a network is to make of the images.
    """

    x: Tensor
    target: Tensor
    image_id: tuple[str, ...]
    objective: Objective = CLASSIFICATION

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: Tensor | slice) -> Batch:
        numbers = torch.arange(len(self))[rows].tolist()
        ids = tuple(self.image_id[i] for i in numbers)
        return replace(self, x=self.x[rows], target=self.target[rows], image_id=ids)

    def to(self, device: torch.device) -> Batch:
        """The same images on a device."""
        return replace(self, x=self.x.to(device), target=self.target.to(device))

    def split(self, size: int) -> Iterator[Batch]:
        """Consecutive batches of at most `size` images."""
        for start in range(0, len(self), size):
            yield self[start : start + size]

    def in_passes(self) -> Iterator[Batch]:
        """Consecutive batches of `pass_size` images."""
        return self.split(pass_size(self.x))

    def by_class(self) -> Batch:
        """The same images, sorted by class and, within a class, by id: the order every criterion works in."""
        classes: list[list[int]] = [[] for _ in self.image_id]
        for row, k in zip(*(part.tolist() for part in self.objective.classes(self.target)), strict=True):
            classes[row].append(k)
        order = sorted(range(len(self)), key=lambda i: (classes[i], self.image_id[i]))
        return self[torch.tensor(order, dtype=torch.long)]


def pass_size(x: Tensor) -> int:
    """How many images like those of x (B, ...) go through a network at once, at most 250.

    More small ones are no faster; of large ones 16 MiB, for activations take some hundred times the image.
    """
    return min(250, max(1, 2**24 // max(1, x[:1].numel() * x.element_size())))


@dataclass(frozen=True)
class Scores:
    """Importance of each unit: **higher = more important, always**.

    `values[site]` has shape (U,), or that of the layer's weight for a site of kind weight.
    """

    values: Mapping[Site, Tensor]
    n_images: int
    method: str
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Mask:
    """What stays: `keep[site]` is a boolean tensor (U,), or shaped like the weights of a site of kind weight."""

    keep: Mapping[Site, Tensor]

    @property
    def n_removed(self) -> int:
        return sum(int((~keep).sum()) for keep in self.keep.values())

    @property
    def n_units(self) -> int:
        return sum(keep.numel() for keep in self.keep.values())


@dataclass(frozen=True)
class Plan:
    """The order in which all units go, first to last, and what was found out about each.

    Row i of every array speaks of the i-th unit to go: `site` (n,) is a position in `sites`, `unit` (n,) a unit of it.
    `category` (n,) is detrimental, neutral or critical, `effect` (n,) the method's signed measure of what removing the
    unit does, `p_values` (n, K) one p-value a class; NaN or "" where the method has none. `passes` are the numbers of
    units gone after each progressive pass: what the method itself decided, before critical units follow. The last
    unit of each site goes at the very end and a mask never takes it, so that no layer is ever emptied. `n_evaluations`
    says how often the method asked what one image comes to without one unit: 0 for those that do not ask.
    """

    sites: tuple[Site, ...]
    site: np.ndarray
    unit: np.ndarray
    category: np.ndarray
    effect: np.ndarray
    p_values: np.ndarray
    method: str
    params: Mapping[str, Any] = field(default_factory=dict)
    passes: tuple[int, ...] = ()
    n_images: int = 0
    n_evaluations: int = 0

    @property
    def n_units(self) -> int:
        return len(self.unit)

    @property
    def n_removable(self) -> int:
        """Units a mask may take: all but one of each site."""
        return self.n_units - len(self.sites)

    def mask(self, ratio: float) -> Mask:
        """Keep all but the first round(ratio * n_units) units, at most `n_removable`."""
        check_ratio(ratio)
        return self.mask_of(min(math.floor(ratio * self.n_units + 0.5), self.n_removable))

    def mask_of(self, n_removed: int) -> Mask:
        """Keep all but the first `n_removed` units."""
        if not 0 <= n_removed <= self.n_removable:
            raise UsageError(
                f"n_removed must be in [0, {self.n_removable}], got {n_removed}: one unit of each site always stays"
            )
        keep = {site: torch.ones(site.n_units, dtype=torch.bool) for site in self.sites}
        for position, site in enumerate(self.sites):
            gone = self.unit[:n_removed][self.site[:n_removed] == position]
            keep[site][torch.from_numpy(gone.astype(np.int64))] = False
        return Mask(keep)

    @staticmethod
    def build(
        sites: Sequence[Site],
        order: Sequence[tuple[int, int]],
        *,
        method: str,
        params: Mapping[str, Any] | None = None,
        category: Mapping[tuple[int, int], str] | None = None,
        effect: Mapping[tuple[int, int], float] | None = None,
        p_values: Mapping[tuple[int, int], np.ndarray] | None = None,
        passes: Sequence[int] = (),
        n_images: int = 0,
        n_evaluations: int = 0,
    ) -> Plan:
        """A plan from (site position, unit) pairs in the order they go; moves each site's last unit to the end."""
        last: dict[int, int] = {}
        for row, (position, _) in enumerate(order):
            last[position] = row
        kept_last = set(last.values())
        rows = [r for r in range(len(order)) if r not in kept_last] + sorted(kept_last)
        pairs = [order[r] for r in rows]
        n_total = sum(site.n_units for site in sites)
        assert len(set(pairs)) == len(pairs) == n_total, "a plan holds every unit exactly once"
        n_classes = max((len(p) for p in p_values.values()), default=0) if p_values else 0
        nothing = np.full(n_classes, np.nan)
        moved = [sum(1 for r in kept_last if r < n) for n in passes]
        return Plan(
            sites=tuple(sites),
            site=np.array([s for s, _ in pairs], dtype=np.int32),
            unit=np.array([u for _, u in pairs], dtype=np.int32),
            category=np.array([(category or {}).get(p, "") for p in pairs], dtype="<U11"),
            effect=np.array([(effect or {}).get(p, math.nan) for p in pairs], dtype=np.float64),
            p_values=np.array([(p_values or {}).get(p, nothing) for p in pairs], dtype=np.float64).reshape(
                len(pairs), n_classes
            ),
            method=method,
            params=dict(params or {}),
            passes=tuple(n - m for n, m in zip(passes, moved, strict=True)),
            n_images=n_images,
            n_evaluations=n_evaluations,
        )


def rank(scores: Scores) -> Plan:
    """The plan of a ranking: units go by ascending score; ties by site, then unit. `effect` holds the score."""
    sites = list(scores.values)
    rows = [
        (float(value), position, unit)
        for position, site in enumerate(sites)
        for unit, value in enumerate(scores.values[site].double().tolist())
    ]
    if not all(math.isfinite(value) for value, _, _ in rows):
        bad = next(sites[position].layer for value, position, _ in rows if not math.isfinite(value))
        raise UsageError(f"scores of {scores.method} at {bad!r} hold NaN or Inf: such a ranking means nothing")
    rows.sort()
    return Plan.build(
        sites,
        [(position, unit) for _, position, unit in rows],
        method=scores.method,
        params=scores.params,
        effect={(position, unit): value for value, position, unit in rows},
        n_images=scores.n_images,
    )


@dataclass(frozen=True)
class Curve:
    """Which images a network still gets right as units go: one row (point) for each cut, dense first.

    `ratio` (P,) is the ratio asked for (NaN for a point after a progressive pass), `n_removed` (P,) the units gone,
    `fraction` (P,) the measured fraction of parameters gone, `flops` (P,) those of one image, `answer` (P, B) the class
    each image is given, -1 for one that the data does not have, `correct` (P, B) whether that is right, `target` (B,)
    the class it has, `image_ids` (B,) whose columns those are.
    """

    ratio: np.ndarray
    n_removed: np.ndarray
    fraction: np.ndarray
    flops: np.ndarray
    answer: np.ndarray
    correct: np.ndarray
    target: np.ndarray
    image_ids: tuple[str, ...]

    @property
    def accuracy(self) -> np.ndarray:
        """(P,) the share of images that are right."""
        return np.asarray(self.correct.mean(axis=1))


@dataclass(frozen=True)
class Maps:
    """A value at each pixel of images: `values` (B, H, W), those of saliency maps or bool, `image_id` (B,) whose."""

    values: Tensor
    image_id: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.values.dim() != 3 or len(self.values) != len(self.image_id):
            raise UsageError(
                f"maps of shape {tuple(self.values.shape)} of {len(self.image_id)} images must be (images, height, "
                "width); attributions.maps.saliency_map joins channels"
            )

    def __len__(self) -> int:
        return len(self.image_id)


@dataclass(frozen=True)
class Measurement:
    """What a measure found: `values` (N,) along an axis, one for each of `ids`, never pre-averaged.

    NaN stands for what has no value, and is for the caller to count and leave out. `unit` says what one is of.
    """

    values: Tensor
    ids: tuple[str, ...]
    unit: str
    axis: Literal["image", "unit"] = "image"

    def __post_init__(self) -> None:
        assert self.values.shape == (len(self.ids),), (
            f"a Measurement has a value for each of its {len(self.ids)} {self.axis}s, and never a mean of them: got "
            f"values of shape {tuple(self.values.shape)}"
        )
