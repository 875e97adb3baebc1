"""Plans: masks of them whose widths are round, and arrays and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sukashi.core.bounded import from_json
from sukashi.core.errors import ModelError, UsageError
from sukashi.core.files import canonical
from sukashi.core.types import Mask, Plan, Site

ROUND_TO = 8


def round_mask(plan: Plan, ratio: float, round_to: int = ROUND_TO) -> Mask:
    """The mask of a ratio, each site's kept units rounded up to a multiple of `round_to` (1 = the exact ratio).

    Odd widths are slow on most hardware. Rounding only gives back, the last units removed of a site first, so never
    more is removed than was asked for, and a unit never goes before another that the plan removes earlier. A site
    without enough units for the next multiple stays whole. The ratio that comes out is
    `mask.n_removed / mask.n_units`; small networks lose much of what was asked for.

    Raises UsageError for a ratio outside [0, 1) or a `round_to` below 1.
    """
    if round_to < 1:
        raise UsageError(f"`round_to` must be at least 1, got {round_to}: 1 keeps the exact ratio")
    mask = plan.mask(ratio)
    order = plan.site[: mask.n_removed], plan.unit[: mask.n_removed]
    keep = {}
    for position, site in enumerate(plan.sites):
        n_kept = int(mask.keep[site].sum())
        n_back = min(-n_kept % round_to, site.n_units - n_kept)
        gone = order[1][order[0] == position]
        keep[site] = mask.keep[site].clone()
        keep[site][torch.from_numpy(gone[len(gone) - n_back :].astype(np.int64))] = True
    return Mask(keep)


def plan_arrays(plan: Plan) -> dict[str, Any]:
    """The arrays of a plan, without the members of its sites, which follow from the model."""
    sites = [
        {"layer": s.layer, "kind": s.kind, "n_units": s.n_units, "axis": s.axis, **({"at": s.at} if s.at else {})}
        for s in plan.sites
    ]
    counts = {name: getattr(plan, name) for name in ("n_images", "n_evaluations")}
    about = {"sites": sites, "method": plan.method, "params": dict(plan.params), **counts}
    return {
        "about": np.array(canonical(about).decode()),
        "site": plan.site,
        "unit": plan.unit,
        "category": plan.category,
        "effect": plan.effect,
        "p_values": plan.p_values,
        "passes": np.array(plan.passes, dtype=np.int64),
    }


def plan_of(arrays: Mapping[str, NDArray[Any]], sites: Sequence[Site] | None = None) -> Plan:
    """The plan on `sites` as found in the model now; without them its sites have no members and can't be cut.

    Raises ModelError where the sites are not those the plan was made for.
    """
    about = from_json(str(arrays["about"]))
    kept = tuple(Site(**site) for site in about["sites"])
    if sites is not None:
        _refuse_other_sites(kept, sites)
        now = {site: site for site in sites}
        kept = tuple(now[site] for site in kept)
    return Plan(
        sites=kept,
        **{name: arrays[name] for name in ("site", "unit", "category", "effect", "p_values")},
        method=about["method"],
        params=about["params"],
        passes=tuple(arrays["passes"].tolist()),
        n_images=about["n_images"],
        n_evaluations=about["n_evaluations"],
    )


def _refuse_other_sites(kept: Sequence[Site], sites: Sequence[Site]) -> None:
    if set(kept) == set(sites):
        return
    different = min(set(kept) ^ set(sites), key=lambda site: site.layer)
    whose = "the plan" if different in set(kept) else "the model"
    raise ModelError(
        f"the plan was made for another model: only {whose} has a site at {different.layer!r} with {different.n_units} "
        f"{different.kind} units; use the model it was made with or make a new plan"
    )
