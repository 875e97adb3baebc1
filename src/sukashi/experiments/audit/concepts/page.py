"""The panel of concepts: how alike and how plain, and the crops that hold most of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sukashi.experiments.audit.concepts.summary import by_model
from sukashi.experiments.audit.summary import AuditResult
from sukashi.experiments.workspace import Workspace
from sukashi.report import words
from sukashi.report.figures import Drawn
from sukashi.report.gallery import draw_rows

SHOWN = 5  # concepts of each network, those that matter most to the reference


def panel(result: AuditResult, found: Mapping[str, Any], space: Workspace) -> tuple[dict[str, Drawn], dict[str, Any]]:
    """The figures of the panel, and what its template shows."""
    records = by_model(space.records())
    first = found["models"][0]
    most = sorted(range(len(first["importance"])), key=lambda k: (-first["importance"][k], k))[:SHOWN]
    figures, alts = {}, {}
    for row in found["models"]:
        own: dict[int, int] = dict(row["pairs"])
        arrays = records[row["model"]].arrays("concepts")
        lines = {
            f"{number}: {words.percent(row['importance'][own[k]])}": arrays["shown"][own[k]] / 255
            for number, k in enumerate(most, start=1)
            if k in own
        }
        figures[f"crops-{row['model']}"] = draw_rows(lines)
        alts[f"crops-{row['model']}"] = (
            f"The crops that hold most of {words.several(len(lines), 'concept')} of {row['model']}, a row each"
        )
    return figures, {"found": found, "alts": alts, "warnings": []}
