"""Where the evidence is in the images of an audit, and which measures have anything to do with it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sukashi.core.errors import DataError, UsageError
from sukashi.experiments.audit.networks import Network
from sukashi.experiments.audit.settings import Audit
from sukashi.measures import measures as registry
from sukashi.report import words

BY_DEFAULT = ("localisation", "region_drop")


def reads_masks(name: str) -> bool:
    return "masks" in registry[name].inputs


def is_regional(name: str) -> bool:
    """Whether a measure reads masks and no map: one value for each network, whatever the attribution."""
    return reads_masks(name) and "maps" not in registry[name].inputs


def truth(network: Network, asked: Audit) -> tuple[dict[str, Tensor], str]:
    """Where each concept is in the test images, (B, H, W) bool as the models see them, if any measure reads it; and
    what is to be said of that.

    Raises UsageError and DataError where it was asked for and nobody knows.
    """
    images, ids = network.setting.data, network.batch.image_id
    wanted = [name for name in asked.measures or () if reads_masks(name)]
    if asked.masks and asked.measures is not None and not wanted:
        raise UsageError(
            f"masks are given and none of {words.listed(list(asked.measures))} reads them: add localisation to "
            "`measures`, or leave `masks` out"
        )
    if not wanted and (asked.measures is not None or not images.has_ground_truth):
        return {}, ""
    masks = images.ground_truth(ids, network.loaded.preprocess)
    some = {concept: int(mask.flatten(1).any(1).sum()) for concept, mask in masks.items()}
    if not any(some.values()):
        none = f"no mask of the {len(ids)} test images was found that is not empty"
        if wanted or asked.masks:
            raise DataError(
                f"{none}: that of {ids[0]} must have its name and folders in the folder of masks, with any suffix of "
                "an image"
            )
        return {}, f"{none}: {words.listed(list(BY_DEFAULT))} are left out"
    n_marked = int(torch.stack([mask.flatten(1).any(1) for mask in masks.values()]).any(0).sum())
    if n_marked == len(ids):
        return masks, ""
    each = words.listed([f"{n} of {concept}" for concept, n in some.items()])
    return masks, f"{n_marked} of {len(ids)} test images have a mask ({each}): what reads masks is of these alone"


def digest(masks: Mapping[str, Tensor]) -> dict[str, str]:
    """A hash of the masks of each concept."""
    return {concept: hashlib.sha256(mask.numpy().tobytes()).hexdigest() for concept, mask in masks.items()}


def shares(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """(N,) for each concept the share of an image's pixels it has."""
    return {concept: mask.double().mean((1, 2)) for concept, mask in masks.items()}


def chosen(given: Sequence[str] | None, usual: Sequence[str], masks: Mapping[str, Tensor]) -> list[str]:
    """The measures of an audit: those given, or the usual ones, with those of places where these are known."""
    return list(given) if given is not None else [*usual, *(BY_DEFAULT if masks else ())]


def needs(regions: Sequence[Mapping[str, Any]], reference: str) -> list[str]:
    """A sentence for each model that a region's loss costs more or less accuracy than it does the reference."""
    found = []
    for row in regions:
        measure, _, concept = row["measure"].partition("/")
        if row["changed"]:
            gone = "Without the {} (imputed)" if measure == "region_drop" else "With the {} alone (all else imputed)"
            both = (row["mean"], row["reference"])
            own, other = (f"{'loses' if of >= 0 else 'gains'} {100 * abs(of):.1f}" for of in both)
            found.append(f"{gone.format(concept)} {row['model']} {own} points of accuracy, {reference} {other}.")
    return found
