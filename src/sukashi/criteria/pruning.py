"""From a plan or scores and a ratio to a network that has less: mask, removal."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from sukashi import models
from sukashi.core.errors import UsageError
from sukashi.core.types import Batch, Mask, Scores, Site
from sukashi.criteria import criteria
from sukashi.criteria import criteria as registry
from sukashi.models import Loaded
from sukashi.network import hooks, sparsity, surgery
from sukashi.repairs import NONE, Teacher, check_fits, mender


def cut(loaded: Loaded, mask: Mask, mode: str = "cut") -> Loaded:
    """A copy of the model with a mask's units removed, in one of surgery.MODES; the given one is left alone.

    Raises UsageError where the mask would leave a site without units.
    """
    model = copy.deepcopy(loaded.model)
    table = surgery.MODES[mode](model, mask)
    before, after = (sum(p.numel() for p in network.parameters()) for network in (loaded.model, model))
    said = f"{'removed' if mode == 'cut' else 'silenced'} {mask.n_removed} of {mask.n_units} units"
    return replace(
        loaded,
        model=model,
        cuts=(*loaded.cuts, table),
        last_cut=f"the last cut {said} and left {after:,} of {before:,} parameters",
        weights_sha256=models.digest(model),
        mask=loaded.mask and _cut_along(loaded, loaded.mask, table),
    )


def repaired(small: Loaded, dense: Loaded, data: Batch, repair: str, teacher: Teacher = nullcontext) -> Loaded:
    """A copy of a network that was cut from a dense one, or lost single weights, with what went given back by a repair
    on some images, towards the dense one inside `teacher()`; the given one is left alone, and weights that are zero
    stay so.

    Raises UsageError for a network that was not made from this one and a repair that there is not; ModelError where
    the repair can do nothing for it.
    """
    check_fits(repair, dense.model)
    mend = mender(repair, dense.model, data, teacher)
    if mend is None:
        return small
    n_before = len(dense.cuts)
    n_zeros, n_zeros_before = (0 if of.mask is None else of.mask.n_removed for of in (small, dense))
    cut = len(small.cuts) > n_before or n_zeros > n_zeros_before
    if small.spec != dense.spec or small.cuts[:n_before] != dense.cuts or not cut:
        raise UsageError(
            f"a {small.spec} that was cut {len(small.cuts)} times was not cut from this {dense.spec}, which was cut "
            f"{n_before} times: give the network before the cut, and the cut one"
        )
    table = surgery.together(small.cuts[n_before:])
    for name, sides in surgery.together(small.cuts).items():
        # What cuts before silenced is silent in the dense network too, and not to be read again.
        if silent := {side: positions for side, positions in sides.items() if side.startswith("zero ") and positions}:
            table.setdefault(name, {}).update(silent)
    for site, keep in small.mask.keep.items() if small.mask is not None else ():
        table.setdefault(site.layer, {})["weights"] = torch.nonzero(~keep.flatten()).flatten().tolist()
    model = copy.deepcopy(small.model).to(next(dense.model.parameters()).device)
    mend(model, table)
    said = "; ".join(filter(None, (small.last_cut, f"repaired by {repair}")))
    return replace(small, model=model, last_cut=said, weights_sha256=models.digest(model))


@torch.no_grad()
def _cut_along(loaded: Loaded, mask: Mask, table: surgery.Table) -> Mask:
    """The mask of a sparse model after a cut: what surgery makes of weights of one and zero."""
    twin = copy.deepcopy(loaded.model)
    for site, keep in mask.keep.items():
        sparsity.weight_of(twin, site).copy_(keep)
    surgery.replay(twin, table)
    kept = {site: sparsity.weight_of(twin, site).cpu() != 0 for site in mask.keep}
    return Mask({replace(site, n_units=keep.numel()): keep for site, keep in kept.items()})


def weight_mask(
    loaded: Loaded,
    sites: Sequence[Site],
    data: Batch,
    criterion: str,
    ratio: float,
    scope: str,
    *,
    generator: torch.Generator,
    sequential: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Mask:
    """Which single weights stay, by one criterion: `sparsity.mask_of` of its scores; what is gone already stays gone.

    With `sequential` a layer is scored in the network in which all layers called before it are pruned already, in one
    pass over the images for each layer. Wanda's reference goes block by block, and measures the layers of a block
    before any of them is pruned: what a block is only some networks say. Needs a scope within a layer.

    Raises UsageError for what `check_sequential` and `sparsity.mask_of` refuse.
    """
    method, chosen = criteria[criterion], dict(options or {})
    if not sequential:
        scores: Scores = method(loaded.model, sites, data, generator=generator, **chosen)
        return sparsity.mask_of(scores, ratio, scope, within=loaded.mask)
    check_sequential(criterion, scope)
    model = copy.deepcopy(loaded.model)
    device = next(model.parameters()).device
    with torch.no_grad():
        order = hooks.calls(model, data.x[:1].to(device))
    first = {name: position for position, name in reversed(list(enumerate(order)))}
    keep: dict[Site, torch.Tensor] = {}
    for site in sorted(sites, key=lambda site: first.get(site.layer, len(order))):
        found = sparsity.mask_of(
            method(model, [site], data, generator=generator, **chosen), ratio, scope, within=loaded.mask
        )
        sparsity.enforce(model, found)
        keep |= found.keep
    return Mask({site: keep[site] for site in sites})


def check_sequential(criterion: str, scope: str) -> None:
    """Refuse to recalibrate layer by layer where it has no meaning."""
    if not criteria[criterion].facts.get("needs_data", True):
        raise UsageError(f"{criterion} looks at no image, so there is nothing to recalibrate: leave `sequential` out")
    if scope == "global":
        raise UsageError(
            "`sequential` prunes layer by layer, `scope='global'` compares all layers: give another `scope`, layer or "
            "row"
        )


def check_repair(repair: str, dense: Loaded) -> None:
    """Refuse, before cuts are tried, a repair that there is not, one that a network has no layer for, and a network
    with single weights at zero or silent units: what a trial cut leaves of these is not known.
    """
    check_fits(repair, dense.model)
    silent = any(side.startswith("zero ") for table in dense.cuts for sides in table.values() for side in sides)
    if repair != NONE and (dense.mask is not None or silent):
        what = "units of this network are silent" if dense.mask is None else "single weights of this network are zero"
        raise UsageError(f"{what} and must stay so, and {repair} of trial cuts changes all: leave `repair` out")


def sparse(loaded: Loaded, mask: Mask) -> Loaded:
    """A copy of the model with the weights that a mask removes at zero, and the mask beside it.

    Masked zeros are not compression: the network keeps its shape, and with it its size and its latency. Layers that an
    older mask of the model speaks of and this one doesn't stay as they are.

    Raises ModelError for a mask of another architecture.
    """
    sparsity.check_fits(loaded.model, mask)
    model = copy.deepcopy(loaded.model)
    sparsity.enforce(model, mask)
    both = Mask({**(loaded.mask.keep if loaded.mask else {}), **mask.keep})
    return replace(loaded, model=model, weights_sha256=models.digest(model), mask=both)


def check_options(criterion: str, options: Mapping[str, Any]) -> None:
    """Refuse an unknown criterion, and options that it does not have or that cannot be written down."""
    registry[criterion].check_options(options)
    try:
        json.dumps(dict(options))
    except TypeError as error:
        raise UsageError(
            f"options of {criterion} are kept with its results, so they must be JSON ({error}): "
            "for anything else call the criterion itself"
        ) from None
