"""Subspaces that a cut network is to do without, and the network towards which it is mended then."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

from sukashi.core.code import code_of
from sukashi.core.errors import UsageError
from sukashi.decompositions.subspaces import Subspaces, ablated
from sukashi.experiments.bench import Bench
from sukashi.experiments.concepts.choice import chosen
from sukashi.experiments.concepts.summary import opened
from sukashi.experiments.prune.settings import Prune
from sukashi.experiments.workspace import Workspace
from sukashi.repairs import Teacher


def resolved(settings: Prune) -> Prune:
    """With the numbers of the subspaces that are chosen now, whatever is ticked while the cut is on its way.

    Raises UsageError where none is.
    """
    if settings.ablated is None or settings.ablated[1] is not None:
        return settings
    folder = settings.ablated[0]
    numbers = chosen(Workspace(folder)).out
    if not numbers:
        raise UsageError(
            f"no subspace in {folder} is chosen to be taken out: choose on the page of `sukashi serve {folder}`, "
            f"or give numbers, as {folder}:0"
        )
    return settings.model_copy(update={"ablate": f"{folder}:{','.join(map(str, numbers))}"})


def about(setting: Bench, settings: Prune) -> dict[str, Any] | None:
    """What says which subspaces of a network go; None where none was asked for. Tries to take them out, once.

    Raises UsageError for subspaces of another network, or found in images read otherwise, and those that there are not.
    """
    if settings.ablated is None:
        return None
    subspaces, numbers = _found(setting, *settings.ablated)
    with teacher(setting, settings)():
        setting.loaded.model(setting.example)
    return {**subspaces.identity, "numbers": sorted({*numbers}), "code": code_of(ablated)}


def teacher(setting: Bench, settings: Prune) -> Teacher:
    """What the dense network is put into while a cut one is mended towards it: the subspaces gone, if any."""
    if settings.ablated is None:
        return nullcontext
    subspaces, numbers = _found(setting, *settings.ablated)
    return partial(ablated, setting.loaded.model, subspaces, numbers)


def _found(setting: Bench, folder: str, numbers: tuple[int, ...] | None) -> tuple[Subspaces, tuple[int, ...]]:
    assert numbers is not None, "settings are resolved"
    return opened(folder, setting.about_model), numbers
