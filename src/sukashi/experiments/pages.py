"""The page of a folder, again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sukashi.core.errors import DataError, UsageError
from sukashi.experiments.compare.page import REMOVED, compared
from sukashi.experiments.compare.store import Store
from sukashi.experiments.prune.page import pruned
from sukashi.experiments.train.page import trained
from sukashi.measures.curves import THRESHOLDS
from sukashi.report import page
from sukashi.report.networks import MODES


def write(folder: Path | str, margin: float | None = None) -> Path:
    """The path of `report.html`, written with `figures/*.png` into a folder of `compare`, `prune` or `train`.

    `margin` is that of the lossless point, by default the one of the last run.

    Raises: UsageError where the folder holds none of these or nothing is finished, DataError where a file is broken.
    """
    folder = Path(folder)
    if (folder / "study.json").exists():
        kept = Store(folder)
        if "course" in kept.study:
            raise _of_schedule(folder)
        shown, figures = compared(kept, margin)
    elif (folder / "recipe.json").exists():
        recipe = _recipe(folder)
        if "course" in recipe.get("provenance", {}):
            raise _of_schedule(folder)
        if "history" in recipe.get("figures", {}):
            shown, figures = trained(recipe)
            return page.render("experiments/train/page.html.j2", folder, figures, **shown)
        shown, figures = pruned(folder, recipe)
    elif (folder / "audit.json").exists():
        raise UsageError(f"{folder} holds an audit: give the same audit command again, finished cells are kept")
    else:
        raise UsageError(f"{folder} holds no study and no saved model: give the --out of a compare, a prune or a train")
    return page.render("experiments/compare/page.html.j2", folder, figures, **shown)


def _of_schedule(folder: Path) -> UsageError:
    return UsageError(
        f"{folder} is a schedule's, whose levels share a page: give the same schedule or study command again, which "
        "writes that and trains nothing"
    )


def write_grid(
    folder: Path,
    *,
    title: str,
    results: Mapping[str, Mapping[str, Any]],
    pairs: Sequence[Mapping[str, Any]],
    mode: str,
    command: str,
) -> Path:
    """The path of the page of a study file: what `compare` found for each model, with links to their own pages.

    `pairs` are differences of two contenders' mean accuracy for a model: `first`, `second`, `model`, `mean`, `low`,
    `high`, None where not both were measured that far.
    """
    return page.render(
        "experiments/study_file.html.j2",
        folder,
        {},
        title=title,
        results=results,
        best={
            name: sorted(found["sauce"], key=lambda contender: -found["sauce"][contender]["mean"])
            for name, found in results.items()
        },
        fractions=[f"{fraction:g}" for fraction in THRESHOLDS],
        pairs=pairs,
        removed=REMOVED[mode],
        mode=MODES[mode],
        command=command,
    )


def _recipe(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "recipe.json").read_bytes()))
    except ValueError as error:
        raise DataError(f"{folder / 'recipe.json'} can't be read ({error}): make it again in another folder") from error
