"""The page of a study: pairs that were asked about, then what each experiment found, with a link to its own page."""

from __future__ import annotations

from sukashi.experiments.compare.page import REMOVED
from sukashi.experiments.study.summary import StudyResult
from sukashi.experiments.workspace import Workspace
from sukashi.measures.curves import THRESHOLDS
from sukashi.report.networks import MODES
from sukashi.report.page import Page


def page(result: StudyResult, space: Workspace) -> Page:
    modes = {found["mode"] for found in result.experiments.values() if found["kind"] == "compare"}
    mode = modes.pop() if len(modes) == 1 else "cut"
    return Page(
        "experiments/study/page.html.j2",
        {},
        {
            "result": result,
            "title": ", ".join(result.experiments),
            "warnings": [],
            "fractions": [f"{fraction:g}" for fraction in THRESHOLDS],
            "removed": REMOVED[mode],
            "mode": MODES[mode],
            "settings": {name: found["kind"] for name, found in result.experiments.items()},
            "run": (space.logged("run") or [{}])[-1],
        },
    )
