"""Subspaces that a cut network is to do without, and the network towards which it is mended then."""

from __future__ import annotations

import hashlib
import json
from contextlib import nullcontext
from functools import partial
from typing import Any

from sukashi.core.code import code_of
from sukashi.core.errors import UsageError
from sukashi.decompositions.subspaces import Subspaces, ablated
from sukashi.experiments.bench import Bench
from sukashi.experiments.concepts.summary import opened
from sukashi.experiments.prune.settings import Prune
from sukashi.repairs import Teacher


def about(setting: Bench, settings: Prune) -> dict[str, Any] | None:
    """What says which subspaces of a network go; None where none was asked for. Tries to take them out, once.

    Raises UsageError for subspaces of another network, or found in images read otherwise, and those that there are not.
    """
    if settings.ablated is None:
        return None
    subspaces, numbers = _checked(setting, *settings.ablated)
    with teacher(setting, settings)():
        setting.loaded.model(setting.example)
    parts = (subspaces.basis, subspaces.dual, subspaces.mean)
    return {
        "layer": subspaces.layer,
        "axis": subspaces.axis,
        "numbers": sorted({*numbers}),
        "of": [subspaces.n_subspaces, subspaces.n_dimensions],
        "sha256": hashlib.sha256(b"".join(of.numpy().tobytes() for of in parts)).hexdigest(),
        "code": code_of(ablated),
    }


def teacher(setting: Bench, settings: Prune) -> Teacher:
    """What the dense network is put into while a cut one is mended towards it: the subspaces gone, if any."""
    if settings.ablated is None:
        return nullcontext
    subspaces, numbers = _checked(setting, *settings.ablated)
    return partial(ablated, setting.loaded.model, subspaces, numbers)


def _checked(setting: Bench, folder: str, numbers: tuple[int, ...]) -> tuple[Subspaces, tuple[int, ...]]:
    subspaces, model = opened(folder)
    own = json.loads(json.dumps(setting.about_model))
    if model["preprocess"] != own["preprocess"]:
        raise UsageError(
            f"the subspaces in {folder} were found in images read otherwise: give the same `size`, `mean`, `std` and "
            "`resize`"
        )
    if model["weights_sha256"] != own["weights_sha256"]:
        raise UsageError(
            f"the subspaces in {folder} are of a network with other weights ({model['weights_sha256'][:12]}, these are "
            f"{own['weights_sha256'][:12]}): find those of this one by `sukashi.concepts`"
        )
    return subspaces, numbers
