"""The panel of units: each measure by layer and network, class by class."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sukashi.experiments.audit.neurons.summary import MEASURES, by_model, of_classes
from sukashi.experiments.audit.summary import AuditResult, answers_of
from sukashi.experiments.audit.violins import draw_violins, violins_alt
from sukashi.experiments.workspace import Workspace
from sukashi.report.figures import Drawn


def panel(result: AuditResult, found: Mapping[str, Any], space: Workspace) -> tuple[dict[str, Drawn], dict[str, Any]]:
    """The figures of the panel, and what its template shows."""
    answers, _ = answers_of(space)
    records = by_model(space.records())
    target = answers[0].target
    kept = {one.label: records[one.label].arrays("neurons") for one in answers}
    values = {
        f"{measure}/{layer}": {label: of_classes(of, target, f"{i} ")[measure] for label, of in kept.items()}
        for i, layer in enumerate(found["layers"])
        for measure in MEASURES
    }
    figure = draw_violins(values, list(MEASURES), found["layers"])
    return {"neurons": figure}, {
        "found": found,
        "measures": list(MEASURES),
        "rows": {(row["model"], row["measure"]): row for row in found["comparisons"]},
        "alt": violins_alt(found["means"]),
        "no_value": "; ".join(
            f"{label}: {sum(counts)} of {found['n_classes'] * sum(found['top']):,} pairs of unit and class"
            for label, counts in found["no_value"].items()
            if any(counts)
        ),
        "most": math.log(found["n_classes"]),
        "warnings": [],
    }
