"""What makes a course impossible: its methods, scope and schedule."""

from __future__ import annotations

from sukashi import repairs
from sukashi.core.errors import UsageError
from sukashi.criteria import UNITS
from sukashi.criteria import criteria as registry
from sukashi.criteria.pruning import check_options
from sukashi.experiments.schedule.schedules import SCHEDULES
from sukashi.experiments.schedule.settings import TRAININGS, Course
from sukashi.network import sparsity
from sukashi.training.settings import Training


def trained(course: Course, given: bool) -> dict[str, Training]:
    """The settings that train something, by name; `given` says that the dense network needs no training."""
    rewinds = SCHEDULES[course.schedule].rewinds
    return ({} if given else {"training": course.training}) | ({} if rewinds else {"finetuning": course.finetuning})


def check(course: Course) -> None:
    """Refuse methods, a scope or an epoch that a course cannot have, before anything is loaded."""
    schedule = SCHEDULES[course.schedule]
    for name in course.criteria:
        check_options(name, course.options.get(name, {}))
        registry[name].check_kinds(UNITS if course.scope is None else ("weight",))
    if course.scope is not None:
        for ratio in course.ratios:
            sparsity.check_scope(course.scope, ratio)
    repairs.check(course.repair)
    if course.repair != repairs.NONE and schedule.rewinds:
        raise UsageError(
            f"{course.schedule} goes back to early weights, so that nothing of a repair would last: leave `repair` out"
        )
    last = course.training.epochs
    if course.rewind >= last or (course.rewind and not schedule.rewinds):
        raise UsageError(f"rewind must be an epoch below {last} of a schedule that rewinds, got {course.rewind}")


def check_trained(course: Course, given: bool) -> None:
    """Refuse settings of a training that will not take place; `given` as in `trained`."""
    for name in TRAININGS:
        if name in course.model_fields_set and name not in trained(course, given):
            why = "the model brings its weights" if name == "training" else f"{course.schedule} trains every level anew"
            raise UsageError(f"{name} would train nothing, {why}: take its settings out")
