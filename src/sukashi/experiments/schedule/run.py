"""Networks pruned and trained to every ratio of a list, by criteria and seeds: a trial for each.

    dense/SEED/              the dense network of a seed
    dense/SEED-epoch-N/      the same after its first epochs, where a schedule rewinds to them
    CONTENDER/SEED/0.50/     the network that has lost half

Each is a saved folder like any other, with `correct.npz` too: which test images the network gets right.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from sukashi import repairs
from sukashi.core.bracketed import folder_of, plain
from sukashi.core.errors import UsageError
from sukashi.core.experiment import Prepared, Trial
from sukashi.criteria import criteria as registry
from sukashi.experiments.bench import Bench, Source, hardware
from sukashi.experiments.methods import codes
from sukashi.experiments.schedule.checks import check, check_trained, trained
from sukashi.experiments.schedule.levels import Level, Seed
from sukashi.experiments.schedule.schedules import SCHEDULES
from sukashi.experiments.schedule.settings import TRAININGS, Course, Schedule, Scheduled
from sukashi.experiments.workspace import Desk
from sukashi.models import Loaded
from sukashi.network import sparsity
from sukashi.training.inputs import bytes_of, check_training, seen, splits


def prepare(settings: Schedule | Scheduled) -> Prepared:
    """Raises UsageError for settings that contradict each other, and whatever loading raises."""
    source = Source.of(settings)
    given = not source.untrained
    if isinstance(settings, Schedule):
        course = settings.course(rewinds=SCHEDULES[settings.how].rewinds, given=given)
    else:
        course = settings.whole
    check(course)
    schedule = SCHEDULES[course.schedule]
    if given and schedule.rewinds:
        raise UsageError(
            f"{course.schedule} goes back to weights before training, and {source.model} has trained ones: leave them "
            "out"
        )
    check_trained(course, given)
    source.early()
    images = source.read()
    seeds = [Seed(source, images, course, seed, bytes_of(settings.memory)) for seed in range(course.seeds)]
    notes, warned = _fits(seeds[0].setting, course, given)
    setting = seeds[0].setting
    model = {**setting.about_model, "weights_sha256": setting.about_model["weights_sha256"] if given else None}
    used = trained(course, given)
    identity = setting.identity(
        course,
        model=model,
        options={name: registry[name].deciding(course.options.get(name, {})) for name in course.criteria},
        code=codes(course) | repairs.code(course.repair),
        **{name: used[name].identity() if name in used else None for name in TRAININGS},
    )
    shared = {name: identity[name] for name in ("model", "data", "scope", "exclude", "round_to", "repair")}
    trials = [trial for seed in seeds for trial in _trials(seed, course, given, shared)]
    log = {"hardware": hardware(setting.device)}
    return Prepared(identity, trials, {"notes": notes, "warnings": warned}, log)


def _trials(seed: Seed, course: Course, given: bool, shared: dict[str, Any]) -> Iterator[Trial]:
    """Those of one seed, every level after the one it starts from."""
    schedule, at = SCHEDULES[course.schedule], f"seed {seed.seed}"
    start = Level("dense", None, 0.0, None if given else course.training)
    dense = _trial(seed, start, shared, lambda desk: seed.start, f"dense/{seed.seed}", f"dense, {at}")
    yield dense
    early = None
    if schedule.rewinds and course.rewind:
        # The first epochs of the dense training once more: the same settings, so the same weights.
        level = Level("dense", None, 0.0, course.training, until=course.rewind)
        place = f"dense/{seed.seed}-epoch-{course.rewind}"
        early = _trial(seed, level, shared, lambda desk: seed.start, place, f"dense, {at}, early")
        yield early
    seed.keep(dense.key, *([early.key] if early else []))
    chosen = course.training if schedule.rewinds else course.finetuning
    for name, (criterion, enforced) in course.contenders.items():
        parent = dense
        for ratio in course.ratios:
            level = Level(name, criterion, ratio, chosen.model_copy(update={"enforce_mask": enforced}))
            needs = {"parent": parent.key} | ({"early": early.key} if early else {})
            options = registry[criterion].deciding(course.options.get(criterion, {}))
            about = {**shared, "rewinds": schedule.rewinds, "options": options, **needs}
            about["code"] = {plain(criterion): registry[criterion].code} | repairs.code(course.repair)
            make = partial(_next, seed, level, schedule.rewinds, needs)
            place = f"{folder_of(name)}/{seed.seed}/{named(ratio)}"
            trial = _trial(seed, level, about, make, place, f"{name}, {at}, {ratio:.0%}", tuple(needs.values()))
            yield trial
            if schedule.parent == "previous":
                parent = trial


def _next(seed: Seed, level: Level, rewinds: bool, needs: dict[str, str], desk: Desk) -> Loaded:
    """The network that a level trains: its parent pruned further, and rewound where the schedule does that."""
    assert level.criterion is not None
    network = seed.pruned(level.criterion, seed.network(needs["parent"], desk), level.ratio)
    if not rewinds:
        return network
    return seed.rewound(network, seed.network(needs["early"], desk) if "early" in needs else seed.start)


def _trial(
    seed: Seed, level: Level, about: dict[str, Any], make: Any, place: str, label: str, needs: tuple[str, ...] = ()
) -> Trial:
    decided = {
        **about,
        "contender": level.contender,
        "criterion": level.criterion,
        "ratio_asked": level.ratio,
        "seed": seed.seed,
        "training": None if level.training is None else level.training.model_dump(),
        "until": level.until,
    }
    return Trial(decided, partial(seed.run, level, make), needs=needs, place=place, label=label, together=True)


def named(ratio: float) -> str:
    """The folder of a ratio, with two digits or as many as tell it from every other."""
    return max(f"{ratio:.2f}", repr(ratio), key=len)


def _fits(setting: Bench, course: Course, given: bool) -> tuple[list[str], list[str]]:
    """Refuse what does not fit the model or the data before hours of training; notes and warnings on the data.

    Raises UsageError for layers that a pattern cannot group, and whatever sampling and training refuse.
    """
    model, data = setting.loaded.model, setting.data
    repairs.check_fits(course.repair, model)
    if course.scope is not None:
        shapes = {site.layer: sparsity.weight_of(model, site).shape for site in setting.found.sites}
        sparsity.check_shapes(course.scope, shapes)
    data.train.calibration(setting.source.calibration, 0)
    notes, warned = dict.fromkeys(data.notes), dict.fromkeys(data.warnings)
    for chosen in trained(course, given).values():
        train, validation, made = splits(data, chosen)
        check_training(chosen, train, validation, setting.loaded, tensorboard=False)
        notes |= dict.fromkeys(made)
        warned |= dict.fromkeys(seen(data, chosen, setting.loaded))
    return list(notes), list(warned)
