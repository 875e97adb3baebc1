"""Comparing criteria over seeds on one model and one dataset, resumable trial by trial."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from sukashi.core import progress, stats
from sukashi.core.errors import ModelError, UsageError
from sukashi.core.types import Batch, Plan, Trial, check_ratio
from sukashi.criteria import UNITS, pruning
from sukashi.criteria import criteria as registry
from sukashi.criteria.calibration import SAMPLINGS, check_sampling
from sukashi.criteria.pruning import check_options
from sukashi.experiments import pages
from sukashi.experiments.bench import Reading, Setting, Source, hardware, plan_for, versions
from sukashi.experiments.compare.store import Store, Writer
from sukashi.experiments.compare.summary import summary
from sukashi.measures import cost, curves
from sukashi.measures.accuracy import by_class
from sukashi.network import surgery

LATENCY_BATCH = 32
RATIOS = tuple(round(0.05 * i, 2) for i in range(20))
MODE = "removal mode"  # among a trial's params beside options of its criterion, none of which has a space in its name


def compare(
    model: str,
    data: str,
    criteria: Sequence[str],
    *,
    out: str | Path,
    ratios: Sequence[float] = RATIOS,
    seeds: int = 3,
    sampling: str | Sequence[str] = "random",
    mode: str = "cut",
    margin: float = curves.MARGIN,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    skip_refused: bool = False,
    command: str | None = None,
    **reading: Unpack[Reading],
) -> dict[str, Any]:
    """SAUCE with intervals, curves and passes of several criteria over seeds; also written to `out` with a report.

    Each (criterion, sampling, seed) is a trial: its plan comes from `calibration` training images a class, sampled in
    one of `sampling.SAMPLINGS` (or in several), its curve from physically cut networks (no rounding) on at most
    `test_images` test images. With `mode="zero"` units are silenced in a network that keeps its shape, and curves are
    over the share of units, not of parameters. Finished trials are kept; an interrupted call is resumed by giving it
    again, with the same result to the byte. `options` holds options by criterion. A criterion that refuses the model
    (ModelError) stops everything, or with `skip_refused` is left out, with its reason under `refused`.

    Returns {"sauce": {contender: {"mean", "low", "high"}}, "lossless", "accuracy_at", "dense_accuracy", "curves",
    "passes", "notes", "refused", "out"}, where a contender is a criterion, followed by "/" and the sampling where that
    is not random. `lossless` holds the largest "fraction" and "ratio" (of units) at which accuracy is shown to be at
    most `margin` lower, see `measures.curves.lossless`; `accuracy_at` accuracy at curves.THRESHOLDS, by "0.15" and
    so on, None where no trial went that far.
    """
    samplings = [sampling] if isinstance(sampling, str) else list(sampling)
    for name in criteria:
        check_options(name, (options or {}).get(name, {}))
        registry[name].check_kinds(UNITS)
    for name in options or {}:
        if name not in criteria:
            raise UsageError(f"options were given for {name!r}, which is not compared: criteria are {list(criteria)}")
    if not criteria or len(set(criteria)) != len(criteria):
        raise UsageError(f"criteria must be different names out of {', '.join(registry.names())}, got {list(criteria)}")
    for how in samplings:
        check_sampling(how)
    if not samplings or len(set(samplings)) != len(samplings):
        raise UsageError(f"sampling must be different names out of {', '.join(SAMPLINGS)}, got {samplings}")
    surgery.check_mode(mode)
    stats.check_margin(margin)
    if seeds < 1:
        raise UsageError(f"seeds must be at least 1, got {seeds}: it is the number of seeds, counted from 0")
    for ratio in ratios:
        check_ratio(ratio)
    setting = Source(model, data, **reading).open()
    ratios = sorted({0.0, *map(float, ratios)})
    params: dict[str, Any] = {"ratios": ratios} | ({} if mode == "cut" else {MODE: mode})
    trials = [
        Trial(
            setting.about_model,
            # Random sampling goes without saying, in a hash too.
            setting.about_data | ({} if how == "random" else {"sampling": how}),
            name,
            seed,
            {**dict((options or {}).get(name, {})), **params},
        )
        # Seed by seed, so that an interrupted comparison has all criteria side by side.
        for seed in range(seeds)
        for name in criteria
        for how in samplings_of(name, samplings)
    ]
    study: dict[str, Any] = {
        "model": setting.about_model,
        "data": setting.about_data,
        "criteria": list(criteria),
        "seeds": seeds,
        "ratios": ratios,
        "options": {name: dict(chosen) for name, chosen in (options or {}).items()},
        "mode": mode,
    }
    if samplings != ["random"]:  # what an older version kept stays what it was
        study |= {"sampling": samplings, "contenders": [trial.contender for trial in trials if trial.seed == 0]}
    store = Store(out)
    with store.writing(study):
        store.log(
            "run",
            command=command or "sukashi.compare(...)",
            versions=versions(),
            hardware=hardware(setting.device),
            margin=margin,
        )
        missing = [trial for trial in trials if store.record(trial) is None]
        if missing:
            for how in {trial.data.get("sampling", "random") for trial in missing}:
                setting.calibration(0, how)  # what can't be sampled is refused before the first trial
            test = setting.test()
            with progress.task("trials", len(missing)) as shown:
                for trial in missing:
                    shown.advance(0, note=f"{trial.contender}, seed {trial.seed}")
                    try:
                        with store.run(trial) as writer:
                            _run(setting, trial, writer, test)
                    except ModelError as error:
                        if not skip_refused:
                            raise
                        store.log("refused", contender=trial.contender, reason=str(error))
                    shown.advance()
            if not store.finished():
                raise ModelError(
                    f"{model} is refused by every criterion; first: {store.logged('refused')[0]['reason']}"
                )
        if mode == "cut":
            _time(setting, store, [trial for trial in trials if store.record(trial) is not None])
        pages.write(store.folder)
    return summary(store, margin)


def samplings_of(criterion: str, samplings: Sequence[str]) -> list[str]:
    """Those of the samplings with which a criterion competes: one that looks at no image has no use for several."""
    return list(samplings) if registry[criterion].facts.get("needs_data", True) else ["random"]


def _run(setting: Setting, trial: Trial, writer: Writer, test: Batch) -> None:
    options = {name: value for name, value in trial.params.items() if name not in ("ratios", MODE)}
    mode = trial.params.get(MODE, "cut")
    plan = writer.plan(setting.found.sites)
    if plan is None:
        plan = plan_for(
            setting,
            trial.criterion,
            trial.seed,
            sampling=trial.data.get("sampling", "random"),
            options=options,
            journal=writer.journal,
        )
        writer.save_plan(plan)
    curve = curves.curve(setting.loaded.model, setting.found.sites, plan, trial.params["ratios"], test, mode=mode)
    writer.save_curve(curve)
    objective, n_classes = test.objective, setting.loaded.n_classes
    classes, chance = objective.classes(test.target), objective.chance(n_classes)
    area = curves.sauce(curve.fraction, curve.accuracy, chance)
    writer.finish(
        {
            "sauce": area,
            "relative_sauce": curves.sauce(curve.fraction, curve.accuracy, chance, relative=True),
            "largest_fraction": float(curve.fraction.max()),
            "dense_accuracy": float(curve.accuracy[int(np.argmin(curve.n_removed))]),
            "chance": chance,
            "class_names": list(setting.data.class_names),
            "class_counts": objective.counts(test.target, n_classes).tolist(),
            "class_accuracy": [by_class(row, classes, n_classes) for row in curve.correct],
            # A network with silent units costs what the dense one does.
            **({"cost": _cost(setting, plan)} if mode == "cut" else {}),
            "notes": list(setting.data.notes),
        }
    )


def _cost(setting: Setting, plan: Plan) -> dict[str, Any]:
    """Parameters and FLOPs, dense and with half of the units gone: what no clock decides."""
    return cost.sizes(setting.loaded.model, setting.example[:1], plan.mask(0.5))


def _time(setting: Setting, store: Store, trials: Sequence[Trial]) -> None:
    """Log the latency of each trial's network with half of its units gone, unless an earlier run of the study did.

    A clock decides these, so they are kept apart from the results, which every run gives alike.
    """
    timed = {entry["trial"] for entry in store.logged("cost")}
    missing = [trial for trial in trials if trial.key not in timed]
    batch = setting.example.repeat(LATENCY_BATCH, 1, 1, 1)[:LATENCY_BATCH]
    with progress.task("latency", len(missing)) as shown:
        for trial in missing:
            record = store.record(trial)
            plan = record.plan(setting.found.sites) if record else None
            assert plan is not None, "a finished trial has a plan"
            small = pruning.cut(setting.loaded, plan.mask(0.5))
            dense, cut = cost.latency((setting.loaded.model, small.model), batch, warmup=1, seconds=2.0)
            store.log(
                "cost",
                trial=trial.key,
                dense={"latency_ms": statistics.median(dense)},
                cut={"latency_ms": statistics.median(cut)},
            )
            shown.advance(note=trial.contender)
