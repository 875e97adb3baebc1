"""The page of an audit: what changed and whether it matters, then a panel for each subject."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sukashi.experiments.audit.networks import FEW, POPULATIONS
from sukashi.experiments.audit.run import subject
from sukashi.experiments.audit.summary import CLASSES, AuditResult, answers_of
from sukashi.experiments.workspace import Workspace
from sukashi.report.figures import Drawn
from sukashi.report.page import Page
from sukashi.report.words import flat, listed


def page(result: AuditResult, space: Workspace) -> Page:
    figures: dict[str, Drawn] = {}
    panels: dict[str, dict[str, Any]] = {}
    for name, found in result.subjects.items():
        drawn, panels[name] = subject(name, "page").panel(result, found, space)
        figures |= drawn
    answers, _ = answers_of(space)
    settings: dict[str, Any] = {
        **space.identity,
        **{
            name: subject(name, "page").settings(space)
            for name in result.subjects
            if hasattr(subject(name, "page"), "settings")
        },
        # A file's hash is that of every page; that of the tensors says which networks are the same one.
        "models": {
            one.label: {
                **{name: value for name, value in one.identity.items() if name != "weights"},
                "weights_sha256": one.weights_sha256,
                "tensors_sha256": one.identity["weights"],
            }
            for one in answers
        },
    }
    return Page(
        "experiments/audit/page.html.j2",
        figures,
        {
            "result": result,
            "title": f"Audit of {listed(list(panels))} against {result.reference}",
            "warnings": [
                *(_left_out(result) if "saliency" in panels else []),
                *result.warnings,
                *(line for of in panels.values() for line in of["warnings"]),
            ],
            "panels": panels,
            "made": " ".join(filter(None, map(_made, result.models))),
            "classes": len(answers[0].class_names) <= CLASSES,
            "guessing": [model["label"] for model in result.models if model["guesses"]],
            "least": FEW,
            "population": POPULATIONS[space.identity["population"]],
            "settings": dict(flat(settings)),
            "run": (space.logged("run") or [{}])[-1],
        },
    )


def _made(model: Mapping[str, Any]) -> str:
    """What made a model, as in m30r: magnitude at ratio 0.3, mended by refit; empty where nobody says."""
    if model["ratio"] is None:
        return ""
    mended = f", mended by {model['repair']}" if model["repair"] else ""
    return f"{model['label']}: {model['series']} at ratio {model['ratio']:.4g}{mended}."


def _left_out(result: AuditResult) -> list[str]:
    """Of which models no sentence speaks, and why."""
    guessing = [model["label"] for model in result.models if model["guesses"]]
    few = [f"{model['label']} ({model['n_images']})" for model in result.models if model["few"]]
    found = []
    if guessing:
        found.append(
            f"{', '.join(guessing)}: not shown to get more of the {result.n_images} test images right than one "
            "answer for all (95% interval). Their figures stand below and are left out of the sentences above: the "
            "maps of a network that does not know the classes say nothing of its reasons."
        )
    if few:
        found.append(
            f"{', '.join(few)}: too few images to say anything, below {FEW}. Their figures stand below and are left "
            "out of the sentences above: give more `test_images` or another `population`."
        )
    return found
