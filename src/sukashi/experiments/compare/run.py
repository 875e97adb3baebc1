"""Comparing criteria over samplings and seeds on one model and one dataset: a trial for each."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from sukashi.core import progress
from sukashi.core.bracketed import plain
from sukashi.core.code import code_of
from sukashi.core.errors import ModelError, UsageError
from sukashi.core.experiment import Prepared, Trial
from sukashi.core.types import Plan
from sukashi.criteria import UNITS, pruning
from sukashi.criteria import criteria as registry
from sukashi.criteria.calibration import SAMPLINGS, check_sampling
from sukashi.criteria.plans import plan_arrays, plan_of
from sukashi.criteria.pruning import check_options
from sukashi.experiments.bench import Bench, Source, hardware, plan_for
from sukashi.experiments.compare import verdict
from sukashi.experiments.compare.contenders import contenders, name_of, named, refused, repair_of, save_curve
from sukashi.experiments.compare.settings import Compare, Contest
from sukashi.experiments.methods import codes
from sukashi.experiments.reading import Reading
from sukashi.experiments.workspace import Desk, Workspace
from sukashi.measures import cost, curves
from sukashi.repairs import NONE, mender, repairs
from sukashi.repairs import check as check_repair

CURVES = "curves"  # by which a change of the code that measures them is told


def prepare(settings: Compare) -> Prepared:
    """Each (criterion, sampling, seed) is a trial: its plan comes from calibration images, its curve from physically
    cut networks (no rounding), or with mode zero from networks that keep their shape. Each repair of these cuts is a
    trial more, with the same plan.

    Raises UsageError for settings that contradict each other, and whatever loading raises.
    """
    _check(settings)
    setting = Source.of(settings).open(exclude=settings.exclude)
    for name in () if settings.skip_refused else settings.repair:
        pruning.check_repair(name, setting.loaded)
    ratios = sorted({0.0, *map(float, settings.ratios)})
    options = {name: registry[name].deciding(settings.options.get(name, {})) for name in settings.criteria}
    hashes = code(settings)
    run, trials = partial(_run, setting, settings), []
    # Seed by seed, so that an interrupted comparison has all criteria side by side.
    for seed, name in itertools.product(range(settings.seeds), settings.criteria):
        for sampling in samplings_of(name, settings.sampling):
            about: dict[str, Any] = {
                "model": setting.about_model,
                # Random sampling goes without saying.
                "data": setting.about_data | ({} if sampling == "random" else {"sampling": sampling}),
                "criterion": name,
                "seed": seed,
                "options": options[name],
                "ratios": ratios,
                "mode": settings.mode,
                "exclude": settings.exclude,
                "code": {part: hashes[part] for part in (plain(name), CURVES)},
            }
            cut = Trial(about, run, label=f"{name_of(name, sampling)}, seed {seed}")
            trials.append(cut)
            for repair in repairs_of(settings):
                mended = about | {"repair": repair, "plan": cut.key}
                mended["code"] = about["code"] | {repair: repairs[repair].code}
                label = f"{name_of(name, sampling, repair)}, seed {seed}"
                trials.append(Trial(mended, run, needs=(cut.key,), label=label))
    return Prepared(
        setting.identity(settings, ratios=ratios, options=options, repair=[NONE, *repairs_of(settings)]),
        trials,
        shown={"margin": settings.margin, "reading": _as_typed(settings)},
        log={"hardware": hardware(setting.device)},
        before=partial(_try_samplings, setting),
        after=partial(_conclude, setting, settings),
    )


def code(settings: Compare) -> dict[str, str]:
    """{name: a hash of its code} of the criteria, and of what measures their curves."""
    return codes(settings) | {CURVES: code_of(curves.curve)}


def _as_typed(settings: Compare) -> dict[str, Any]:
    """How model and data were named, for the commands that a page recommends."""
    return settings.model_dump(mode="json", exclude_unset=True, include=set(Reading.model_fields))


def samplings_of(criterion: str, samplings: Sequence[str]) -> list[str]:
    """Those of the samplings with which a criterion competes: one that looks at no image has no use for several."""
    return list(samplings) if registry[criterion].facts.get("needs_data", True) else ["random"]


def repairs_of(settings: Contest) -> list[str]:
    """The repairs that compete beside the cut as it is, which always does."""
    return [repairs.named(name) for name in settings.repair if name != NONE]


def _check(settings: Compare) -> None:
    criteria, samplings = settings.criteria, settings.sampling
    for name in criteria:
        check_options(name, settings.options.get(name, {}))
        registry[name].check_kinds(UNITS)
    for name in settings.options:
        if name not in criteria:
            raise UsageError(f"options were given for {name!r}, which is not compared: criteria are {criteria}")
    if not criteria or len(set(criteria)) != len(criteria):
        raise UsageError(f"criteria must be different names out of {', '.join(registry.names())}, got {criteria}")
    for how in samplings:
        check_sampling(how)
    if not samplings or len(set(samplings)) != len(samplings):
        raise UsageError(f"sampling must be different names out of {', '.join(SAMPLINGS)}, got {samplings}")
    for name in settings.repair:
        check_repair(name)
    named_so = [*repairs_of(settings), *(name for name in settings.repair if name == NONE)]
    if not named_so or len(set(named_so)) != len(named_so):
        raise UsageError(
            f"`repair` must be different names out of {NONE}, {', '.join(repairs.names())}, got {settings.repair}"
        )


def _try_samplings(setting: Bench, missing: Sequence[Trial]) -> None:
    """Refuse what can't be sampled before the first trial."""
    for how in {trial.about["data"].get("sampling", "random") for trial in missing}:
        setting.calibration(0, how)


def _run(setting: Bench, settings: Compare, desk: Desk) -> None:
    try:
        _measure(setting, settings.options.get(desk.trial.about["criterion"], {}), desk)
    except ModelError as error:
        if not settings.skip_refused:
            raise
        desk.finish({"refused": str(error)})


def _measure(setting: Bench, options: Mapping[str, Any], desk: Desk) -> None:
    about = desk.trial.about
    mode, sites, sampling = about["mode"], setting.found.sites, about["data"].get("sampling", "random")
    mend, kept = None, desk.arrays("plan")
    if "repair" in about:
        cut = desk.needed(about["plan"])
        if "refused" in cut.result:
            desk.finish({"refused": cut.result["refused"]})
            return
        kept = cut.arrays("plan")
        pruning.check_repair(about["repair"], setting.loaded)
        mend = mender(about["repair"], setting.loaded.model, setting.calibration(about["seed"], sampling))
    plan = None if kept is None else plan_of(kept, sites)
    if plan is None:
        plan = plan_for(
            *(setting, about["criterion"], about["seed"]),
            sampling=sampling,
            options=options,
            journal=desk.journal,
        )
    desk.save("plan", plan_arrays(plan))
    test = setting.test()
    curve = curves.curve(setting.loaded.model, sites, plan, about["ratios"], test, mode=mode, repair=mend)
    save_curve(desk, curve)
    dense, chance = curve.correct[0], test.objective.chance(test.target)
    desk.finish(
        {
            "mode": mode,
            "sauce": curves.sauce_of(curve, chance),
            "relative_sauce": curves.sauce_of(curve, chance, relative=True),
            "dense_accuracy": float(dense.mean()),
            "chance": chance,
            "class_names": list(setting.data.class_names),
            # A network with silent units costs what the dense one does, a repaired one what the cut one does.
            **({"cost": _cost(setting, plan)} if mode == "cut" and mend is None else {}),
            "n_evaluations": plan.n_evaluations,
            "warnings": [*setting.data.warnings, *setting.doubts(dense, test)],
            "notes": list(setting.data.notes),
        }
    )


def _cost(setting: Bench, plan: Plan) -> dict[str, dict[str, int]]:
    """Parameters and FLOPs, dense and with half of the units gone: what no clock decides."""
    return cost.sizes(setting.loaded.model, cost.batch_of(setting.example), plan.mask(0.5))


def _conclude(setting: Bench, settings: Compare, space: Workspace) -> None:
    if not settings.skip_refused:
        for name, reason in refused(space).items():  # of an earlier run that left them out
            raise ModelError(
                f"{name} refuses the model: {reason}; give `skip_refused=True` again, or another `out` and leave it out"
            )
    if settings.mode == "cut":
        _time(setting, space)
        _time_advised(setting, settings, space)


def _time(setting: Bench, space: Workspace) -> None:
    """Log the latency of each trial's network with half of its units gone, unless an earlier run did.

    A clock decides these, so they are kept apart from the results, which every run gives alike.
    """
    timed = {entry["trial"] for entry in space.logged("latency")}
    batch = cost.batch_of(setting.example)
    # A repaired network takes as long as the cut one.
    done = [r for r in space.records() if "refused" not in r.result and repair_of(r) == NONE]
    missing = [r for r in done if r.key not in timed]
    with progress.task("latency", len(missing)) as shown:
        for record in missing:
            name, seed = named(record), record.about["seed"]
            small = pruning.cut(setting.loaded, plan_of(record.arrays("plan"), setting.found.sites).mask(0.5))
            dense, cut = cost.latency((setting.loaded.model, small.model), batch, warmup=1, seconds=2.0)
            space.log("latency", trial=record.key, contender=name, seed=seed, dense_ms=dense, cut_ms=cut)
            shown.advance(note=name)


def _time_advised(setting: Bench, settings: Compare, space: Workspace) -> None:
    """Log the latency of the network that the verdict advises, of one image and of many, unless an earlier run did."""
    found = contenders(space)
    ratios = verdict.furthest(found, settings.margin)
    best = verdict.advised(found, ratios)
    if best is None:
        return
    timed = verdict.speed_of(space, best, ratios[best.name])
    missing = [size for size in cost.SPEED_BATCHES if str(size) not in timed]
    if not missing:
        return
    plan = plan_of(plan_arrays(best.plans[0]), setting.found.sites)
    small = pruning.cut(setting.loaded, plan.mask(ratios[best.name]))
    with progress.task("latency of the advised cut", len(missing)) as shown:
        for size in missing:
            batch = cost.batch_of(setting.example, size)
            dense, cut = cost.latency((setting.loaded.model, small.model), batch, warmup=1, seconds=2.0)
            said = {"contender": best.name, "ratio": ratios[best.name], "batch_size": size}
            space.log("speed", **said, dense_ms=dense, cut_ms=cut, hardware=hardware(setting.device))
            shown.advance()
