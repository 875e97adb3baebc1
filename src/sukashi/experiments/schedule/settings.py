"""Courses: how networks get to levels of sparsity, as a study file or a command says it, checked before any work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from sukashi.core.errors import UsageError
from sukashi.core.types import check_ratio
from sukashi.criteria import UNITS, pruning
from sukashi.criteria import criteria as registry
from sukashi.criteria.pruning import check_options
from sukashi.experiments.schedule.schedules import schedules
from sukashi.network import sparsity
from sukashi.training.settings import Finetuning, Training

LEAKY = "unenforced"
_TRAININGS = ("training", "finetuning")


class Course(BaseModel):
    """How networks get to their levels; a study file's own keys.

    `scope` makes it single weights (see `sparsity.mask_of`), None units, whose widths are rounded up to multiples of
    `round_to`. `training` makes the dense network where none was given, and every level of a schedule that rewinds;
    `finetuning` the levels of the others; what would train nothing is refused. `enforce_mask` may ask for both: what
    training under a mask leaves, and what it leaves where only the start was masked. `rewind` is the epoch to whose
    weights a schedule rewinds, 0 the start.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    schedule: str = Field(examples=["oneshot"])
    criteria: list[str] = Field(examples=[["magnitude"]])
    ratios: list[float] = Field(examples=[[0.3, 0.6, 0.9]])
    scope: str | None = None
    exclude: list[str] = []
    round_to: int = pruning.ROUND_TO
    seeds: int = 1
    enforce_mask: list[bool] = [True]
    rewind: int = 0
    options: dict[str, dict[str, Any]] = {}
    training: Training = Field(default_factory=lambda: Training.model_validate({}))
    finetuning: Finetuning = Field(default_factory=lambda: Finetuning.model_validate({}))

    @property
    def contenders(self) -> dict[str, tuple[str, bool]]:
        """{name: (criterion, whether masks are enforced)}."""
        both = [(name, enforced) for name in self.criteria for enforced in self.enforce_mask]
        return {name if enforced else f"{name}/{LEAKY}": (name, enforced) for name, enforced in both}

    @property
    def size(self) -> int | None:
        """The side of the images at every level, where it is not the architecture's own."""
        return self.training.size or self.finetuning.size

    def used(self, given: bool) -> dict[str, Training]:
        """The settings that train something, by name; `given` says that the dense network needs no training."""
        rewinds = schedules[self.schedule].facts["rewinds"]
        return ({} if given else {"training": self.training}) | ({} if rewinds else {"finetuning": self.finetuning})


def check(course: Course) -> None:
    """Refuse a course that means nothing, before anything is loaded."""
    facts = schedules[course.schedule].facts
    for name in course.criteria:
        check_options(name, course.options.get(name, {}))
        registry[name].check_kinds(UNITS if course.scope is None else ("weight",))
    for what, several in (
        ("criteria", course.criteria),
        ("ratios", course.ratios),
        ("enforce_mask", course.enforce_mask),
    ):
        if not several or len(set(several)) != len(several):
            raise UsageError(f"{what} must be different values, at least one, got {several}")
    for ratio in course.ratios:
        check_ratio(ratio)
        if course.scope is not None:
            sparsity.check_scope(course.scope, ratio)
    if min(course.ratios) == 0 or list(course.ratios) != sorted(course.ratios):
        raise UsageError(f"ratios must ascend from above 0, got {course.ratios}: the dense network is level 0 anyway")
    if course.scope is None and (course.exclude or False in course.enforce_mask):
        what = "exclude" if course.exclude else "enforce_mask = false"
        raise UsageError(f"{what} is for single weights, and there is no scope: give one, or leave it out")
    if course.seeds < 1:
        raise UsageError(f"seeds must be at least 1, got {course.seeds}")
    pruning.check_round_to(course.round_to)
    for name in course.options:
        if name not in course.criteria:
            raise UsageError(f"options were given for {name!r}, which is not used: criteria are {course.criteria}")
    if not (course.training.enforce_mask and course.finetuning.enforce_mask):
        raise UsageError("enforce_mask is a key of the study, a list: take it out of the settings of training")
    sizes = {name: getattr(course, name).size for name in _TRAININGS if name in course.model_fields_set}
    if len(set(sizes.values())) > 1:
        raise UsageError(f"size must be the same at every level, got {sizes}: give it to both")
    last = course.training.epochs
    if not 0 <= course.rewind < last or (course.rewind and not facts["rewinds"]):
        raise UsageError(f"rewind must be an epoch below {last} of a schedule that rewinds, got {course.rewind}")


def check_used(course: Course, given: bool) -> None:
    """Refuse settings of a training that will not take place; `given` as in `Course.used`."""
    for name in _TRAININGS:
        if name in course.model_fields_set and name not in course.used(given):
            why = "the model brings its weights" if name == "training" else f"{course.schedule} trains every level anew"
            raise UsageError(f"{name} would train nothing, {why}: take its settings out")


def grown(kept: Mapping[str, Any], asked: Mapping[str, Any]) -> bool:
    """Whether a study's `study.json` differs from what is asked for only by more, so that every level kept is its own.

    It grows by seeds, criteria (with options of theirs), masks not enforced, and ratios above those it has.
    """
    if "course" not in kept:  # a comparison's
        return False
    old, new = kept["course"], asked["course"]
    growing = ("criteria", "enforce_mask", "seeds", "options", "ratios")
    if {**kept, "course": {k: v for k, v in old.items() if k not in growing}} != {
        **asked,
        "course": {k: v for k, v in new.items() if k not in growing},
    }:
        return False
    return (
        all(set(old[key]) <= set(new[key]) for key in ("criteria", "enforce_mask"))
        and old["seeds"] <= new["seeds"]
        and new["ratios"][: len(old["ratios"])] == old["ratios"]
        and all(old["options"].get(name) == new["options"].get(name) for name in old["criteria"])
    )
