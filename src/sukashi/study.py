"""Studies: criteria over seeds on one model and one dataset, resumable trial by trial."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch

from sukashi import progress, pruned, report, sites, sparsity, stats, surgery
from sukashi.criteria import UNITS
from sukashi.criteria import criteria as registry
from sukashi.criteria.engine import Engine
from sukashi.errors import ModelError, SukashiError, UsageError
from sukashi.measures import accuracy, cost
from sukashi.models import Loaded
from sukashi.sampling import SAMPLINGS, check_sampling
from sukashi.source import Reading, Setting, Source
from sukashi.stats import Interval
from sukashi.store import Record, Store, Writer, plan_bytes
from sukashi.types import Batch, Curve, Mask, Plan, Scores, Trial, check_ratio, rank

LATENCY_BATCH = 32
RATIOS = tuple(round(0.05 * i, 2) for i in range(20))
MODE = "removal mode"  # among a trial's params beside options of its criterion, none of which has a space in its name
PACKAGES = ("sukashi", "torch", "torchvision", "timm", "torch-pruning", "numpy")


def check_options(criterion: str, options: Mapping[str, Any]) -> None:
    """Refuse an unknown criterion, and options that it does not have or that cannot be written down."""
    registry[criterion].check_options(options)
    try:
        json.dumps(dict(options))
    except TypeError as error:
        raise UsageError(
            f"options of {criterion} are kept with its results, so they must be JSON ({error}): "
            "for anything else call the criterion itself"
        ) from None


def plan_for(
    setting: Setting,
    criterion: str,
    seed: int,
    *,
    sampling: str = "random",
    options: Mapping[str, Any] | None = None,
    journal: Any = None,
) -> Plan:
    """The order in which units go, by one criterion with one seed."""
    method = registry[criterion]
    chosen = dict(options or {})
    check_options(criterion, chosen)
    batch = setting.calibration(seed, sampling)
    if method.keeps_journal:
        chosen["_journal"] = journal
    generator = torch.Generator().manual_seed(seed)
    outcome = method(setting.loaded.model, setting.found.sites, batch, generator=generator, **chosen)
    return rank(outcome) if isinstance(outcome, Scores) else outcome


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
    margin: float = accuracy.MARGIN,
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
    most `margin` lower, see `measures.accuracy.lossless`; `accuracy_at` accuracy at accuracy.THRESHOLDS, by "0.15" and
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
        report.write(store.folder)
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
    curve = accuracy.curve(setting.loaded.model, setting.found.sites, plan, trial.params["ratios"], test, mode=mode)
    writer.save_curve(curve)
    chance = 1 / setting.loaded.n_classes
    area = accuracy.sauce(curve.fraction, curve.accuracy, chance)
    writer.finish(
        {
            "sauce": area,
            "relative_sauce": accuracy.sauce(curve.fraction, curve.accuracy, chance, relative=True),
            "largest_fraction": float(curve.fraction.max()),
            "dense_accuracy": float(curve.accuracy[int(np.argmin(curve.n_removed))]),
            "chance": chance,
            "class_names": list(setting.data.class_names),
            "class_counts": torch.bincount(test.target, minlength=setting.loaded.n_classes).tolist(),
            "class_accuracy": [by_class(row, test.target, setting.loaded.n_classes) for row in curve.correct],
            # A network with silent units costs what the dense one does.
            **({"cost": _cost(setting, plan)} if mode == "cut" else {}),
            "notes": list(setting.data.notes),
        }
    )


def by_class(correct: np.ndarray, target: torch.Tensor, n_classes: int) -> list[float | None]:
    """The share of right answers in each class, None for one without images."""
    found = accuracy.per_class(correct, target, n_classes)
    return [None if np.isnan(value) else float(value) for value in found]


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
            small = pruned.cut(setting.loaded, plan.mask(0.5))
            dense, cut = cost.latency((setting.loaded.model, small.model), batch, warmup=1, seconds=2.0)
            store.log(
                "cost",
                trial=trial.key,
                dense={"latency_ms": statistics.median(dense)},
                cut={"latency_ms": statistics.median(cut)},
            )
            shown.advance(note=trial.contender)


def summary(store: Store, margin: float) -> dict[str, Any]:
    """The figures of a finished comparison, as `compare --json` prints them."""
    records: dict[str, list[Record]] = {}
    for record in store.finished():
        records.setdefault(record.trial.contender, []).append(record)
    names = store.study.get("contenders", store.study["criteria"])
    ordered = {name: records[name] for name in names if name in records}
    curves = {name: [record.curve() for record in found] for name, found in ordered.items()}
    first = next(iter(ordered))
    return {
        "sauce": {
            name: _bounds(stats.interval([record.result["sauce"] for record in found]))
            for name, found in ordered.items()
        },
        "lossless": {name: _lossless(found, curves[name], margin) for name, found in ordered.items()},
        "accuracy_at": {
            name: {
                f"{fraction:g}": found and _bounds(found)
                for fraction, found in zip(
                    accuracy.THRESHOLDS,
                    accuracy.at(of_name, accuracy.THRESHOLDS),
                    strict=True,
                )
            }
            for name, of_name in curves.items()
        },
        "dense_accuracy": ordered[first][0].result["dense_accuracy"],
        "curves": {name: [_points(curve, False) for curve in of_name] for name, of_name in curves.items()},
        "passes": {name: [_points(curve, True) for curve in of_name] for name, of_name in curves.items()},
        "notes": list(accuracy.cautions(len(curves[first][0].image_ids), margin)),
        "refused": store.refused(),
        "out": str(store.folder),
    }


def _lossless(records: Sequence[Record], curves: Sequence[Curve], margin: float) -> dict[str, Any]:
    """What `accuracy.lossless` finds, as a fraction on the curves' axis and as a ratio of units."""
    plan = records[0].plan()
    assert plan is not None, "a finished trial has a plan"
    found = accuracy.lossless(curves, margin, generator=np.random.default_rng(0))
    bounds = {"mean": found.mean, "low": found.low, "high": found.high}
    return {
        "margin": margin,
        "fraction": {name: float(value[0]) for name, value in bounds.items()},
        "ratio": {name: float(value[1]) / plan.n_units for name, value in bounds.items()},
    }


def _bounds(found: Interval) -> dict[str, float | None]:
    return {"mean": found.mean, "low": found.low, "high": found.high}


def _points(curve: Curve, passes: bool) -> list[dict[str, float]]:
    rows = np.flatnonzero(np.isnan(curve.ratio) == passes)
    return [{"fraction": float(curve.fraction[r]), "accuracy": float(curve.accuracy[r])} for r in rows]


def versions() -> dict[str, str]:
    """Versions of what decides results."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}}


def hardware(device: torch.device) -> str:
    """The processor or GPU figures were measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {sys.platform}, {torch.get_num_threads()} threads"


def prune(
    model: str,
    data: str,
    criterion: str,
    ratio: float,
    *,
    out: str | Path,
    mode: str = "cut",
    round_to: int | None = None,
    onnx: bool = False,
    scope: str | None = None,
    exclude: Sequence[str] = (),
    sequential: bool = False,
    seed: int = 0,
    sampling: str = "random",
    options: Mapping[str, Any] | None = None,
    command: str | None = None,
    **reading: Unpack[Reading],
) -> dict[str, Any]:
    """A model cut for real and saved to the new folder `out`, with its figures beside the dense model's.

    Removes round(ratio * units) units in the order of `criterion`, less what rounding each site to a multiple of
    `round_to` (default pruned.ROUND_TO) gives back. With `mode="zero"` the network keeps its shape and the units are
    silent: logits are those of the cut network, size and speed those of the dense one, and nothing is rounded.
    `sukashi.load(out)` rebuilds the model; with `onnx` the folder holds `model.onnx` too, checked in onnxruntime.

    With a `scope` (see `sparsity.mask_of`) single weights are set to zero instead, those of convolutions and linear
    layers but `exclude`; with `sequential` layer by layer (see `pruned.weight_mask`). The mask is saved too, and the
    network is as large and as slow as before.

    Returns {"out", "report", "ratio", "dense", "cut", "warnings", "versions"}; `ratio` is the fraction removed. With a
    scope "sparse" stands for "cut", and "layers" counts the weights removed in each.
    """
    check_ratio(ratio)
    check_options(criterion, options or {})
    registry[criterion].check_kinds(UNITS if scope is None else ("weight",))
    check_sampling(sampling)
    surgery.check_mode(mode)
    if scope is None:
        if exclude or sequential:
            name = "exclude" if exclude else "sequential"
            raise UsageError(f"{name} is for single weights: give a scope too ({', '.join(sparsity.SCOPES)} or N:M)")
        if mode == "zero" and round_to not in (None, 1):
            raise UsageError(f"round_to is for widths, and mode zero changes none, got {round_to}: leave it out")
        round_to = (pruned.ROUND_TO if mode == "cut" else 1) if round_to is None else round_to
        pruned.check_round_to(round_to)
    else:
        if mode != "cut" or round_to is not None:
            name = f"mode {mode}" if mode != "cut" else "round_to"
            raise UsageError(f"{name} is for units, and scope {scope} removes single weights: leave one of them out")
        sparsity.check_scope(scope, ratio)
        if sequential:
            pruned.check_sequential(criterion, scope)
    pruned.check_free(Path(out))
    if onnx:
        pruned.check_onnx_installed()
    setting = Source(model, data, **reading).open(units=scope is None)
    # The data names the classes: a saved model refuses data that counts them in another order.
    dense = replace(setting.loaded, class_names=setting.data.class_names)
    files: dict[str, bytes] = {}
    how: dict[str, Any]
    if scope is None:
        what, how = "cut", {"mode": mode, "round_to": round_to}
        plan = plan_for(setting, criterion, seed, sampling=sampling, options=options)
        mask = pruned.round_mask(plan, ratio, round_to or 1)
        small = pruned.cut(dense, mask, mode)
        files["plan.npz"] = plan_bytes(plan)
    else:
        what, how = "sparse", {"scope": scope, "sequential": sequential}
        how |= {"exclude": list(exclude)} if exclude else {}
        found = sites.weights(dense.model, exclude)
        sparsity.check_shapes(scope, {site.layer: sparsity.weight_of(dense.model, site).shape for site in found})
        mask = pruned.weight_mask(
            *(dense, found, setting.calibration(seed, sampling), criterion, ratio, scope),
            generator=torch.Generator().manual_seed(seed),
            sequential=sequential,
            options=options,
        )
        small = pruned.sparse(dense, mask)
    test = setting.test()
    costs = cost.cost(dense.model, small.model, setting.example)
    figures: dict[str, dict[str, Any]] = {}
    for name, loaded, cost_of in (("dense", dense, costs["dense"]), (what, small, costs["cut"])):
        correct = _correct(setting, loaded, test)
        of_classes = by_class(correct, test.target, dense.n_classes)
        figures[name] = {"accuracy": float(correct.mean()), **cost_of, "class_accuracy": of_classes}
    removed = mask.n_removed / mask.n_units
    layers = {}
    if scope is None:
        figures["cut"]["ratio"] = removed
        figures["cut"]["fraction"] = 1 - costs["cut"]["parameters"] / costs["dense"]["parameters"]
        cautions = _cautions(ratio, figures, round_to or 1, mode)
    else:
        for name, loaded in (("dense", dense), ("sparse", small)):
            figures[name] |= sparsity.zeros(loaded.model, mask)
        layers["layers"] = [
            {"layer": site.layer, "shape": list(keep.shape), "weights": keep.numel(), "removed": int((~keep).sum())}
            for site, keep in mask.keep.items()
        ]
        cautions = _cautions_of_weights(ratio, removed, mask)
    provenance = {
        "command": command or "sukashi.prune(...)",
        "criterion": criterion,
        "options": dict(options or {}),
        "sampling": sampling,
        "ratio_asked": ratio,
        "ratio": removed,
        **how,
        "seed": seed,
        "data": {**setting.about_data, "test_images": len(test)},
        "dense_weights_sha256": dense.weights_sha256,
        "latency": {name: costs[name] for name in ("batch_size", "repeats", "device", "threads")},
        "flop_counter": costs["flop_counter"],
        "versions": versions(),
        "hardware": hardware(setting.device),
    }
    about = {
        **figures,
        "n_images": len(test),
        "class_names": list(setting.data.class_names),
        "class_counts": torch.bincount(test.target, minlength=dense.n_classes).tolist(),
        "notes": [*setting.data.notes, *cautions],
        **layers,
    }
    pruned.save(out, small, provenance=provenance, figures=about, files=files)
    try:
        if onnx:
            pruned.export_onnx(small, Path(out) / "model.onnx")
        page = report.write(out)
    except BaseException:
        # All or nothing: a folder without the export or the page that was asked for is not a result.
        shutil.rmtree(out)
        raise
    short = {name: {key: value for key, value in figures[name].items() if key != "class_accuracy"} for name in figures}
    return {
        "out": str(out),
        "report": str(page),
        "ratio": removed,
        **short,
        **layers,
        **({} if scope is None else {"note": report.MODES["sparse"]}),
        "warnings": cautions,
        "versions": versions(),
    }


def _correct(setting: Setting, loaded: Loaded, test: Batch) -> np.ndarray:
    """(B,) 1 where an image is right."""
    generator = torch.Generator()
    parts = (
        replace(part, x=part.x.to(setting.device), target=part.target.to(setting.device)) for part in test.split(128)
    )
    found = [accuracy.accuracy(loaded.model, part, generator=generator) for part in parts]
    return torch.cat(found).cpu().numpy()


def _cautions(asked: float, figures: Mapping[str, Any], round_to: int, mode: str) -> list[str]:
    found = []
    dense, cut = figures["dense"], figures["cut"]
    if abs(cut["ratio"] - asked) > 0.02:
        why = f"widths are rounded up to multiples of {round_to}" if round_to > 1 else "one unit of each layer stays"
        found.append(f"{cut['ratio']:.1%} of the units were removed, {asked:.1%} were asked for: {why}")
    if mode == "cut" and cut["latency_ms"] > dense["latency_ms"]:
        found.append("the cut model is slower than the dense one here: try another --round-to")
    return found


def _cautions_of_weights(asked: float, removed: float, mask: Mask) -> list[str]:
    empty = [layer for layer, kept in sparsity.density(mask).items() if kept == 0]
    found = [f"layer {layer} has no weight left: what it writes is its bias, whatever the image" for layer in empty]
    if abs(removed - asked) > 0.02:
        found.append(
            f"{removed:.1%} of the weights were removed, {asked:.1%} were asked for: whole numbers of each group go"
        )
    return found


def check(
    model: str,
    data: str,
    *,
    limit: float = 60.0,
    **reading: Unpack[Reading],
) -> dict[str, Any]:
    """What would happen: sites, layers that can't be cut and why, class counts, and seconds each criterion would take.

    Seconds are extrapolated from single units at the first, middle and last site, on `calibration` images a class; what
    cannot be estimated within `limit` seconds is listed as unmeasured, a criterion that refuses the model under
    `cannot` with its reason. Nothing is written.
    """
    start = time.perf_counter()
    setting = Source(model, data, **reading).open()
    found, train = setting.found, setting.data.train
    n_units = sum(site.n_units for site in found.sites)
    seconds = {method.name: 0.0 for method in registry if not method.facts.get("needs_data", True)}
    cannot: dict[str, str] = {}
    if time.perf_counter() - start < limit:
        batch = setting.calibration(0)
        part = batch[slice(0, None, -(-len(batch) // 64))]
        few = part[slice(0, None, -(-len(part) // 8))]
        scale = len(batch) / len(part)
        visiting = {method.name: method.facts["visits"] for method in registry if "visits" in method.facts}
        try:
            engine = Engine(setting.loaded.model, found.sites, part)
            a_unit = []
            for site in (found.sites[0], found.sites[len(found.sites) // 2], found.sites[-1]):
                if time.perf_counter() - start > limit:
                    break
                with engine.open(site) as suffix:
                    begun = time.perf_counter()
                    suffix.without(0)
                    suffix.without(min(1, site.n_units - 1))
                    a_unit.append((time.perf_counter() - begun) / 2)
            if len(a_unit) == 3:
                once = float(np.mean(a_unit)) * scale * n_units
                seconds |= {name: once * visits for name, visits in visiting.items()}
        except SukashiError as error:
            cannot |= dict.fromkeys(visiting, str(error))
        for method in registry:
            if method.name in seconds or "visits" in method.facts or time.perf_counter() - start > limit:
                continue
            begun = time.perf_counter()
            try:
                places = found.sites if "channel" in method.facts["kinds"] else sites.weights(setting.loaded.model)
                method(setting.loaded.model, places, few, generator=torch.Generator())
                seconds[method.name] = (time.perf_counter() - begun) * len(batch) / len(few)
            except SukashiError as error:
                cannot[method.name] = str(error)
    return {
        "model": model,
        "parameters": sum(p.numel() for p in setting.loaded.model.parameters()),
        "sites": [{"layer": site.layer, "kind": site.kind, "units": site.n_units} for site in found.sites],
        "units": n_units,
        "refused": dict(found.refused),
        "class_names": list(setting.data.class_names),
        "class_counts": {split.name: split.counts.tolist() for split in (train, setting.data.test)},
        "notes": list(setting.data.notes),
        "estimated_seconds": seconds,
        "cannot": cannot,
        "unmeasured": [name for name in registry.names() if name not in seconds and name not in cannot],
    }
