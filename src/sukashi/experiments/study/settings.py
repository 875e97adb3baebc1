"""What a study is, and what the keys of its file are."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field

from sukashi.core.schema import Settings, option
from sukashi.experiments.compare.settings import Contest
from sukashi.experiments.reading import Architecture, Calibrated, Images, Pixels
from sukashi.experiments.schedule.settings import Course

_SPEC = "sukashi:digits_cnn"


class ModelTable(Pixels, Architecture):
    """A table [models.NAME], or [model]."""

    spec: str = option(examples=[_SPEC], help="sukashi:NAME, timm:NAME, torchvision:NAME or package.module:callable.")


class StudyFile(Calibrated, Images):
    """What files of comparisons and of a schedule have."""

    out: str = option(
        examples=["../runs/mine"],
        path=True,
        decides=False,
        help="Where results go: report.html, results.json, folders.",
    )
    title: str = option("", decides=False, default="the file's name", help="Of the page.")
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


class ExperimentsFile(Settings):
    """Any experiments, in order. Keys beside these are settings that all of them share who have them."""

    out: str = option(examples=["../runs/mine"], path=True, decides=False, help="Where results go: a folder for each.")
    title: str = option("", decides=False, default="the file's name", help="Of the page.")
    environment: dict[str, str] = option(
        {}, decides=False, help="What a $VARIABLE in a path is where the environment does not set it."
    )
    experiments: dict[str, dict[str, Any]] = option(
        examples=[{"NAME": {"kind": "compare"}}],
        help="A table [experiments.NAME] for each: its kind, and the settings of its command. $OUT is the study's own "
        "folder, for those that read what others have made.",
    )


class Study(Settings):
    """Run a study file: comparisons of models, a schedule, or any experiments; resumed, with one page."""

    kind: ClassVar[str] = "study"
    command: ClassVar[bool] = False
    grows: ClassVar[frozenset[str]] = frozenset({"experiments"})

    out: str = option(path=True, decides=False, help="Folder for results.")
    title: str = option("", decides=False, help="Of the page.")
    pairs: list[list[str]] = option([], decides=False, help="Contenders to hold against each other.")
    experiments: dict[str, dict[str, Any]] = option(help="Of each its kind and its settings.")
