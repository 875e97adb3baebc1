"""What the keys of a study file are."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from sukashi.core.schema import option
from sukashi.experiments.compare.settings import Contest
from sukashi.experiments.reading import Architecture, Calibrated, Images
from sukashi.experiments.schedule.settings import Course

_SPEC = "sukashi:digits_cnn"


class ModelTable(Architecture):
    """A table [models.NAME], or [model]."""

    spec: str = option(examples=[_SPEC], help="sukashi:NAME, timm:NAME, torchvision:NAME or package.module:callable.")


class StudyFile(Calibrated, Images):
    """What study files of both kinds have."""

    out: str = option(
        examples=["../runs/mine"],
        path=True,
        decides=False,
        help="Where results go: report.html, results.json, folders.",
    )
    title: str = option("", decides=False, default="the file's name, or schedule and model", help="Of the page.")
    environment: dict[str, str] = option(
        {}, decides=False, help="What a $VARIABLE in a path is where the environment does not set it."
    )


class ComparisonFile(Contest, StudyFile):
    """A comparison for each of several models."""

    models: dict[str, ModelTable] = option(examples=[{"NAME": {"spec": _SPEC}}], help="A table [models.NAME] for each.")
    pairs: list[Annotated[list[str], Field(min_length=2, max_length=2)]] = option(
        [], decides=False, help='Contenders to hold against each other, as ["lrp/clustering", "lrp"].'
    )


class ScheduleFile(Course, StudyFile):
    """One model, pruned and trained to several ratios."""

    model: ModelTable = option(examples=[{"spec": _SPEC}], help="A table [model].")
