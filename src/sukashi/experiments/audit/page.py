"""The page of an audit: what changed and whether it matters, then a panel for each subject."""

from __future__ import annotations

from typing import Any

from sukashi.experiments.audit.networks import FEW, POPULATIONS
from sukashi.experiments.audit.run import subject
from sukashi.experiments.audit.summary import AuditResult, answers_of
from sukashi.experiments.workspace import Workspace
from sukashi.report.page import Page
from sukashi.report.words import flat


def page(result: AuditResult, space: Workspace) -> Page:
    figures: dict[str, bytes] = {}
    panels: dict[str, dict[str, Any]] = {}
    for name, found in result.subjects.items():
        drawn, panels[name] = subject(name, "page").panel(result, found, space)
        figures |= drawn
    run = (space.logged("run") or [{}])[-1]
    answers, _ = answers_of(space)
    settings: dict[str, Any] = {
        **space.identity,
        **{name: subject(name, "page").settings(space) for name in result.subjects},
        "models": {one.label: dict(one.identity) for one in answers},
    }
    settings |= {name: run[name] for name in ("versions", "hardware") if name in run}
    return Page(
        "experiments/audit/page.html.j2",
        figures,
        {
            "result": result,
            "panels": panels,
            "guessing": [model["label"] for model in result.models if model["guesses"]],
            "few": [f"{model['label']} ({model['n_images']})" for model in result.models if model["few"]],
            "least": FEW,
            "population": POPULATIONS[space.identity["population"]],
            "command": run.get("command", ""),
            "settings": dict(flat(settings)),
        },
    )
