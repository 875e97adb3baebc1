"""The page of a study: pairs that were asked about, then what each experiment found, with a link to its own page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sukashi.experiments.compare.page import REMOVED, curves_alt, draw_curves
from sukashi.experiments.study.summary import StudyResult, so
from sukashi.experiments.workspace import Workspace
from sukashi.measures.curves import THRESHOLDS
from sukashi.report import words
from sukashi.report.networks import MODES
from sukashi.report.page import Page


def page(result: StudyResult, space: Workspace) -> Page:
    compared = {name: found for name, found in result.experiments.items() if found["kind"] == "compare"}
    drawn = {name: draw_curves(Workspace(space.folder / name), found["mode"]) for name, found in compared.items()}
    told = {name: _told(found) for name, found in result.experiments.items()}
    return Page(
        "experiments/study/page.html.j2",
        drawn,
        {
            "result": result,
            "so": so,
            "points_of": words.points,
            "title": f"Study of {words.several(len(told), 'experiment')}",
            "compared": compared,
            "alts": {name: curves_alt(found) for name, found in compared.items()},
            "told": told,
            "modes": list(dict.fromkeys(MODES[found["mode"]] for found in compared.values())),
            "warnings": [],
            "fractions": [f"{fraction:g}" for fraction in THRESHOLDS],
            "removed": REMOVED,
            "settings": told,
            "run": (space.logged("run") or [{}])[-1],
        },
    )


def _told(found: Mapping[str, Any]) -> str:
    """What kind of experiment it is, of how many seeds and images."""
    seeds = found.get("seeds")
    n_seeds = max(map(len, seeds.values()), default=0) if isinstance(seeds, Mapping) else seeds
    parts = [found["kind"], words.seeds(n_seeds) if isinstance(n_seeds, int) else ""]
    parts.append(words.several(found["n_images"], "test image") if found.get("n_images") else "")
    return ", ".join(filter(None, parts))
