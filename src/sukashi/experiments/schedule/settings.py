"""What a schedule is: how networks get to their levels of sparsity."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import model_validator

from sukashi.core.bracketed import plain
from sukashi.core.errors import UsageError
from sukashi.core.schema import MAX_SEEDS, Ratio, Seeds, Settings, checked, option
from sukashi.experiments.reading import OPTIONS, Reading
from sukashi.experiments.train.settings import Memory
from sukashi.training.settings import Finetuning, Training

LEAKY = "unenforced"
TRAININGS = ("training", "finetuning")


class Levels(Settings):
    """To which levels networks are pruned, and by what."""

    criteria: list[str] = option(
        joined=True,
        examples=[["magnitude"]],
        help="Names, see `sukashi list criteria`, or package.module:function of your own; with a scope those of "
        "single weights (wanda, magnitude, random), "
        "else those of units.",
    )
    ratios: list[Ratio] = option(
        examples=[[0.3, 0.6, 0.9]],
        help="Fractions removed of the dense network's units, or with a scope weights; ascending, above 0.",
    )
    scope: str | None = option(
        None,
        default="units",
        help="Remove single weights, the lowest of all (global), of a layer, of a row, or N of M such as 2:4. Without "
        "it units are cut.",
    )
    exclude: list[str] = option(
        [],
        help="Layers to leave alone, by name or pattern as 'blocks.*.fc1': their weights, or the sites that they make "
        "the units of.",
    )
    round_to: int = option(8, ge=1, help="Without a scope: each site keeps a multiple of this many units.")
    seeds: Seeds = option(
        1, ge=1, le=MAX_SEEDS, help="Number of seeds, counted from 0; each trains a dense network and all levels."
    )
    repair: str = option(
        "none",
        help="Mend each network before it is trained, by the calibration images, without labels: norm, refit, see "
        "`sukashi list repairs`.",
    )
    rewind: int = option(0, ge=0, help="Of lottery: the epoch to whose weights it goes back; 0 is the start.")
    options: dict[str, dict[str, Any]] = option({}, help=OPTIONS)


class Course(Levels):
    """How networks get to their levels.

    `training` makes the dense network where none was given, and every level of a schedule that rewinds; `finetuning`
    the levels of the others; what would train nothing is refused. `enforce_mask` may ask for both: what training under
    a mask leaves, and what it leaves where only the start was masked.
    """

    kind: ClassVar[str] = "schedule"
    command: ClassVar[bool] = False
    grows: ClassVar[frozenset[str]] = frozenset({"criteria", "enforce_mask", "seeds", "options", "ratios"})

    schedule: str = option(examples=["oneshot"], help="oneshot, iterative or lottery, see `sukashi list schedules`.")
    enforce_mask: list[bool] = option(
        [True],
        help="With a scope: [true], [false] or both; those not enforced are called magnitude/unenforced.",
    )
    training: Training = option(
        Training, default="theirs", help="Settings of the dense network and of every level of lottery."
    )
    finetuning: Finetuning = option(
        Finetuning,
        default="theirs",
        help="Settings of the levels of oneshot and iterative; lr is a tenth where it is not given.",
    )

    @model_validator(mode="after")
    def _means_something(self) -> Course:
        for name, several in (
            ("criteria", self.criteria),
            ("ratios", self.ratios),
            ("enforce_mask", self.enforce_mask),
        ):
            if not several or len(set(several)) != len(several):
                raise UsageError(f"{name} must be different values, at least one, got {several}")
        if min(self.ratios) == 0 or list(self.ratios) != sorted(self.ratios):
            raise UsageError(f"ratios must ascend from above 0, got {self.ratios}: the dense network is level 0 anyway")
        if self.scope is None and False in self.enforce_mask:
            raise UsageError(
                "`enforce_mask=False` is for single weights, and there is no scope: give one, or leave it out"
            )
        called = {plain(name).rpartition(":")[2] for name in self.criteria}
        for name in self.options:
            if plain(name).rpartition(":")[2] not in called:
                raise UsageError(f"options were given for {name!r}, which is not used: criteria are {self.criteria}")
        if not (self.training.enforce_mask and self.finetuning.enforce_mask):
            raise UsageError("`enforce_mask` is a key of the study, a list: take it out of the settings of training")
        return self

    @property
    def contenders(self) -> dict[str, tuple[str, bool]]:
        """{name: (criterion, whether masks are enforced)}."""
        both = [(name, enforced) for name in self.criteria for enforced in self.enforce_mask]
        return {name if enforced else f"{name}/{LEAKY}": (name, enforced) for name, enforced in both}


class Scheduled(Memory, Course, Reading):
    """A course with a model and data, as a study file has it."""

    out: str = option(path=True, decides=False, help="Folder for the networks.")

    @property
    def whole(self) -> Course:
        # What was not said stays unsaid: settings that would train nothing are refused.
        return Course(**{name: getattr(self, name) for name in self.model_fields_set if name in Course.model_fields})


class Schedule(Memory, Levels, Training, Reading):
    """Prune and train to each of several ratios, one saved network a ratio, with accuracy over seeds and a report."""

    kind: ClassVar[str] = "schedule"
    shared: ClassVar[bool] = True
    grows: ClassVar[frozenset[str]] = frozenset({"criteria", "seeds", "options", "ratios"})

    how: str = option(argument=True, help="oneshot, iterative or lottery; see `sukashi list schedules`.")
    out: str = option(path=True, decides=False, help="Folder for the networks; an interrupted schedule is resumed.")

    def course(self, *, rewinds: bool, given: bool) -> Course:
        """What these settings come to: those of training hold for each that takes place."""
        chosen = {name: getattr(self, name) for name in self.model_fields_set if name in Training.model_fields}
        chosen.pop("enforce_mask", None)
        trained = {"training": chosen} if rewinds or not given else {}
        tuned = {} if rewinds else {"finetuning": chosen}
        levels = {name: getattr(self, name) for name in Levels.model_fields}
        return checked(
            Course, {"schedule": self.how, "enforce_mask": [self.enforce_mask], **levels, **trained, **tuned}
        )
