"""The page of a pruned network."""

from __future__ import annotations

from typing import Any

from sukashi.criteria.plans import plan_of
from sukashi.experiments.prune.summary import NETWORKS, PruneResult, reached
from sukashi.experiments.workspace import Workspace
from sukashi.report import classes, words
from sukashi.report.networks import (
    MODES,
    categories_alt,
    cost_table,
    draw_categories,
    draw_layers,
    has_categories,
    layer_rows,
)
from sukashi.report.page import Page


def page(result: PruneResult, space: Workspace) -> Page:
    record = space.records()[0]
    plans = [plan_of(record.arrays("plan"))] if record.has("plan.npz") else []
    drawn = {"categories": draw_categories({plans[0].method: plans})} if has_categories(plans) else {}
    sparse = result.scope is not None
    layers: dict[str, Any] = {}
    if result.layers and not sparse:
        drawn["layers"] = draw_layers(result.layers)
        header, rows = layer_rows(result.layers)
        told = "; ".join(f"{of['layer']} {of['kept']} of {of['units']}" for of in result.layers)
        layers = {"header": header, "rows": rows, "alt": f"Units kept: {told}"}
    costs = {"dense": result.dense, "pruned": dict(result.pruned)}
    removed = {
        "units_removed": result.units_removed,
        "weights_removed": result.weights_removed,
        "parameters_removed": None if sparse else result.parameters_removed,
    }
    costs["pruned"] |= {name: value for name, value in removed.items() if value is not None}
    note = (
        "The sparse network beside the dense one: zeros are stored and multiplied like any number."
        if sparse
        else "The network cut for real beside the dense one."
    )
    return Page(
        "experiments/prune/page.html.j2",
        drawn,
        {
            "result": result,
            "title": f"{result.model}, {'sparse' if sparse else 'pruned'}",
            "warnings": [*result.warnings, *result.slower()],
            "costs": cost_table(costs, result.clocks(), result.n_images, note),
            "layers": layers,
            "categories_alt": categories_alt({plans[0].method: plans}) if plans else "",
            "target": reached(result.target, result.ratio, result.layers) if result.target else "",
            "classes": result.classes,
            "networks": NETWORKS,
            "fell": classes.FELL,
            "small": classes.too_small(result.classes["rows"]),
            "overall": classes.overall(result.classes, NETWORKS),
            "settings": dict(words.flat(space.identity)) | {"test images": f"{result.n_images:,}"},
            "mode": MODES["sparse" if sparse else result.mode],
            "run": (space.logged("run") or [{}])[-1],
        },
    )
