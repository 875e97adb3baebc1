"""Plans as files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sukashi.core.errors import ModelError
from sukashi.core.files import canonical, packed, unpacked
from sukashi.core.types import Plan, Site


def plan_bytes(plan: Plan) -> bytes:
    """The content of a `plan.npz`: a plan without the members of its sites, which follow from the model."""
    sites = [
        {"layer": s.layer, "kind": s.kind, "n_units": s.n_units, "axis": s.axis, **({"at": s.at} if s.at else {})}
        for s in plan.sites
    ]
    about = {"sites": sites, "method": plan.method, "params": dict(plan.params), "n_images": plan.n_images}
    return packed(
        about=np.array(canonical(about).decode()),
        site=plan.site,
        unit=plan.unit,
        category=plan.category,
        effect=plan.effect,
        p_values=plan.p_values,
        passes=np.array(plan.passes, dtype=np.int64),
    )


def read_plan(path: Path, sites: Sequence[Site] | None = None) -> Plan:
    """A kept plan on `sites` as found in the model now; without them its sites have no members and can't be cut.

    Raises ModelError where the sites are not those the plan was made for.
    """
    with unpacked(path) as arrays:
        about = json.loads(str(arrays["about"]))
        kept = tuple(Site(**site) for site in about["sites"])
        if sites is not None:
            _refuse_other_sites(path, kept, sites)
            now = {site: site for site in sites}
            kept = tuple(now[site] for site in kept)
        return Plan(
            sites=kept,
            site=arrays["site"],
            unit=arrays["unit"],
            category=arrays["category"],
            effect=arrays["effect"],
            p_values=arrays["p_values"],
            method=about["method"],
            params=about["params"],
            passes=tuple(arrays["passes"].tolist()),
            n_images=about["n_images"],
        )


def _refuse_other_sites(path: Path, kept: Sequence[Site], sites: Sequence[Site]) -> None:
    if set(kept) == set(sites):
        return
    different = min(set(kept) ^ set(sites), key=lambda site: site.layer)
    whose = "the plan" if different in set(kept) else "the model"
    raise ModelError(
        f"{path} was made for another model: only {whose} has a site at {different.layer!r} with {different.n_units} "
        f"{different.kind} units; use the model it was made with or make a new plan"
    )
