"""The panel of autoencoders: how well they give back, what latents answer to, and the images that excite these."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sukashi.experiments.audit.sae.summary import MEASURES, by_model, values_of
from sukashi.experiments.audit.summary import AuditResult, answers_of
from sukashi.experiments.audit.violins import draw_violins, violins_alt
from sukashi.experiments.workspace import Workspace
from sukashi.report import words
from sukashi.report.figures import Drawn
from sukashi.report.gallery import draw_rows


def panel(result: AuditResult, found: Mapping[str, Any], space: Workspace) -> tuple[dict[str, Drawn], dict[str, Any]]:
    """The figures of the panel, and what its template shows."""
    answers, _ = answers_of(space)
    records = by_model(space.records())
    arrays = {label: trials[found["k"][0], 0].arrays("sae") for label, trials in records.items()}
    values = {
        name: {label: own.mean(0) for label, own in of.items()}
        for name, of in values_of(records, found, answers).items()
    }
    # Beside each other, for there is one place.
    of_one = {f"{measure}/{found['layer']}": of for measure, of in values.items()}
    figures = {"latents": draw_violins(of_one, list(MEASURES), [found["layer"]])}
    alts = {}
    for label, of in arrays.items():
        names = [answers[0].class_names[k] for k in of["of_class"]]
        rows = {
            f"{words.of_class(name)}: {n}": shown / 255
            for name, n, shown in zip(names, of["latents"], of["shown"], strict=True)
        }
        figures[f"latents-{label}"] = draw_rows(rows)
        alts[label] = f"The test images that excite latents of {label} most, a row for each of {words.listed([*rows])}"
    return figures, {
        "found": found,
        "measures": list(MEASURES),
        "rows": {(row["model"], row["measure"]): row for row in found["comparisons"]},
        "alt": violins_alt(found["means"]),
        "alts": alts,
        "most": math.log(found["n_classes"]),
        "warnings": [],
    }
