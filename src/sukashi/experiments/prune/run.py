"""One network cut for real, or made sparse, and saved; its ONNX file is a trial of its own, which needs the first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sukashi import models, repairs
from sukashi.core.bracketed import plain
from sukashi.core.code import code_of
from sukashi.core.errors import ModelError, UsageError
from sukashi.core.experiment import Prepared, Trial
from sukashi.core.types import Batch, Mask
from sukashi.criteria import UNITS, pruning
from sukashi.criteria import criteria as registry
from sukashi.criteria.calibration import check_sampling
from sukashi.criteria.plans import ROUND_TO, plan_arrays, round_mask
from sukashi.criteria.pruning import check_options
from sukashi.data import Split
from sukashi.experiments.bench import Bench, Source, hardware, plan_for
from sukashi.experiments.methods import codes
from sukashi.experiments.prune import ablation
from sukashi.experiments.prune.settings import Prune
from sukashi.experiments.prune.targets import BY_SETTING, Search, unused
from sukashi.experiments.workspace import Desk, Workspace
from sukashi.measures import accuracy, classwise, cost
from sukashi.measures.accuracy import Replies
from sukashi.models import Loaded, onnx
from sukashi.network import hooks, sites, sparsity
from sukashi.network.layers import MAKERS
from sukashi.report import words

MOST_CLASSES = 100  # whose probabilities are kept: of 1,000 those of 2,000 images take 16 MB


def prepare(settings: Prune) -> Prepared:
    """Raises UsageError for settings that contradict each other, and whatever loading and criteria raise."""
    _check(settings)
    settings = ablation.resolved(settings)
    setting = Source.of(settings).open(units=settings.scope is None, exclude=settings.exclude)
    if settings.target is None:
        repairs.check_fits(settings.repair, setting.loaded.model)
    else:
        pruning.check_repair(settings.repair, setting.loaded)
    if settings.scope is not None:
        weights = sites.weights(setting.loaded.model, settings.exclude)
        shapes = {site.layer: sparsity.weight_of(setting.loaded.model, site).shape for site in weights}
        sparsity.check_shapes(settings.scope, shapes)
    about = setting.identity(
        settings,
        round_to=_round_to(settings),
        options=registry[settings.criterion].deciding(settings.options),
        code=code(settings),
    )
    about["ratio_asked"] = about.pop("ratio")  # less may be removed
    gone = ablation.about(setting, settings)
    if gone is not None:
        about["ablated"] = gone
    pruned = Trial(about, partial(_prune, setting, settings), place=".", label=settings.criterion)
    trials = [pruned]
    if settings.onnx:
        trials.append(
            Trial({"onnx": pruned.key}, partial(_export, setting), needs=(pruned.key,), place="onnx", label="ONNX")
        )
    log = {"hardware": hardware(setting.device)}
    before = None if settings.target is None else partial(_check_target, setting, settings)
    return Prepared(about, trials, log=log, before=before, after=partial(_time, setting, settings))


def code(settings: Prune) -> dict[str, str]:
    """{name: a hash of its code} of the criterion, the repair and, where the ratio is searched for, the target."""
    return (
        codes(settings)
        | repairs.code(settings.repair)
        | ({} if settings.target is None else {settings.target[0]: code_of(Search)})
    )


def _round_to(settings: Prune) -> int:
    """The multiple that widths keep; 1 where none changes."""
    usual = ROUND_TO if settings.mode == "cut" and settings.scope is None else 1
    return usual if settings.round_to is None else settings.round_to


def _check(settings: Prune) -> None:
    """Refuse what means nothing, before anything is loaded."""
    scope, target = settings.scope, settings.target
    check_options(settings.criterion, settings.options)
    registry[settings.criterion].check_kinds(UNITS if scope is None else ("weight",))
    check_sampling(settings.sampling)
    repairs.check(settings.repair)
    if settings.ablated is not None and plain(settings.repair) != "refit":
        raise UsageError(
            "`ablate` acts by what the cut network is mended towards, and without that it keeps what it knew: give "
            "`repair='refit'` too"
        )
    if target is not None and scope is not None:
        raise UsageError(
            f"`{target[0]}` is for units, and `scope={scope!r}` removes single weights: give a `ratio` of these"
        )
    if scope is None:
        if target is not None and BY_SETTING[target[0]].of_shape and settings.mode == "zero":
            raise UsageError(
                f"`mode='zero'` keeps the network's shape, so `{target[0]}` never changes: give `ratio` or `max_drop`"
            )
        if settings.sequential:
            raise UsageError(
                f"`sequential` is for single weights: give a `scope` too ({', '.join(sparsity.SCOPES)} or N:M)"
            )
        if settings.mode == "zero" and settings.round_to not in (None, 1):
            raise UsageError(
                f"`round_to` is for widths, and `mode='zero'` changes none, got {settings.round_to}: leave it out"
            )
    else:
        if settings.mode != "cut" or settings.round_to is not None:
            name = f"`mode={settings.mode!r}`" if settings.mode != "cut" else "`round_to`"
            raise UsageError(
                f"{name} is for units, and `scope={scope!r}` removes single weights: leave one of them out"
            )
        assert settings.ratio is not None, "a target has no scope"
        sparsity.check_scope(scope, settings.ratio)
        if settings.sequential:
            pruning.check_sequential(settings.criterion, scope)
    if settings.onnx:
        models.check_onnx_installed()


def _prune(setting: Bench, settings: Prune, desk: Desk) -> None:
    # The data names the classes: a saved model refuses data that counts them in another order.
    dense = replace(setting.loaded, class_names=setting.data.names_of_outputs(setting.loaded.class_names))
    ratio, target = settings.ratio, None
    if settings.scope is None:
        mask, small, ratio, target = _cut(setting, settings, dense, desk)
    else:
        assert ratio is not None
        weights = sites.weights(dense.model, settings.exclude)
        images = setting.calibration(settings.seed, settings.sampling)
        mask = pruning.weight_mask(
            *(dense, weights, images),
            *(settings.criterion, ratio, settings.scope),
            generator=torch.Generator().manual_seed(settings.seed),
            sequential=settings.sequential,
            options=settings.options,
        )
        teacher = ablation.teacher(setting, settings)
        small = pruning.repaired(pruning.sparse(dense, mask), dense, images, settings.repair, teacher)
    test, removed = setting.test(), mask.n_removed / mask.n_units
    units = settings.scope is None
    batch = cost.batch_of(setting.example)
    both = {"dense": dense, "pruned": small}
    answers = {name: accuracy.replies(of.model, test, probabilities=True) for name, of in both.items()}
    figures = {
        name: {"accuracy": float(answers[name].correct.mean()), **cost.size(of.model, batch)}
        for name, of in both.items()
    }
    if not units:
        for name, loaded in both.items():
            zeros = sparsity.zeros(loaded.model, mask)
            figures[name] |= {"zeros_in_masked_layers": zeros["sparsity"], "zeros_in_all": zeros["zeros"]}
    about = desk.trial.about
    layers = _layers(setting, mask, small) if units else _weights(mask)
    found = {"ratio": ratio, "target": target, "layers": layers}
    provenance = {**about, **found, "units_removed" if units else "weights_removed": removed}
    for name, content in models.contents(small, provenance).items():
        desk.save(name, content)
    desk.save("answers", accuracy.kept(answers, setting.data.n_classes))
    desk.finish(
        {
            **figures,
            **found,
            "units_removed": removed if units else None,
            "weights_removed": None if units else removed,
            "n_images": len(test),
            "class_names": list(setting.data.class_names),
            "notes": list(setting.data.notes),
            "warnings": [
                *setting.data.warnings,
                *setting.doubts(answers["dense"].correct, test),
                *_lost(setting, settings, layers, answers, test),
                *_cautions(settings, mask),
                *(BY_SETTING[target["name"]].doubts(target, setting.data.train.name) if target else []),
            ],
        }
    )


def _cut(
    setting: Bench, settings: Prune, dense: Loaded, desk: Desk
) -> tuple[Mask, Loaded, float, dict[str, Any] | None]:
    """What stays, the network that is left, the ratio it was cut at, and what was reached of a target."""
    plan = plan_for(
        *(setting, settings.criterion, settings.seed),
        sampling=settings.sampling,
        options=settings.options,
        journal=desk.journal,
    )
    desk.save("plan", plan_arrays(plan))
    ratio, target = settings.ratio, None
    if ratio is None:
        search = _search(setting, settings)
        ratio, reached = search.ratio(plan, desk.journal)
        target = {"name": search.name, "asked": search.asked, **reached}
    mask = round_mask(plan, ratio, _round_to(settings))
    small = pruning.cut(dense, mask, settings.mode)
    images = setting.calibration(settings.seed, settings.sampling)
    small = pruning.repaired(small, dense, images, settings.repair, ablation.teacher(setting, settings))
    return mask, small, ratio, target


def _search(setting: Bench, settings: Prune) -> Search:
    assert settings.target is not None
    loaded = setting.loaded
    images = setting.calibration(settings.seed, settings.sampling)
    return Search(
        *settings.target,
        model=loaded.model,
        sites=setting.sites,
        batch=cost.batch_of(setting.example, settings.target_batch or cost.BATCH),
        mode=settings.mode,
        round_to=_round_to(settings),
        held_out=partial(_held_out, setting, settings),
        read=lambda split: split.whole(loaded.preprocess, setting.source.workers),
        mend=repairs.mender(settings.repair, loaded.model, images, ablation.teacher(setting, settings)),
    )


def _held_out(setting: Bench, settings: Prune) -> Split:
    """The images that a drop is shown on: the val split, or else training images that do not calibrate."""
    data, at_most = setting.data, setting.source.test_images
    if data.val is not None:
        return data.val.limit(at_most)
    return unused(data.train, setting.calibration(settings.seed, settings.sampling).image_id, at_most)


def _check_target(setting: Bench, settings: Prune, missing: Sequence[Trial]) -> None:
    """Refuse a target that no plan reaches, where the network is not there yet."""
    if any("onnx" not in trial.about for trial in missing):
        _search(setting, settings).check()


def _layers(setting: Bench, mask: Mask, small: Loaded) -> list[dict[str, Any]]:
    """Of each site, from input to output: its units before and after, and the parameters of the layers that make them,
    `layer` and those `with` it, which lose units together (and what they read of others).
    """
    dense, found = setting.loaded.model, []
    order = {name: row for row, name in reversed([*enumerate(hooks.calls(dense, setting.example[:1]))])}
    for site in sorted(mask.keep, key=lambda site: order.get(site.layer, len(order))):
        producers = dict.fromkeys(member.module for member in site.producers)
        makers = [name for name in producers if isinstance(dense.get_submodule(name), MAKERS)]
        names = [site.layer, *(name for name in makers if name != site.layer)]
        before, after = (
            sum(cost.n_parameters(of.get_submodule(name)) for name in names) for of in (dense, small.model)
        )
        keep = mask.keep[site]
        found.append(
            {
                "layer": site.layer,
                "with": names[1:],
                "kind": site.kind,
                "units": site.n_units,
                "kept": int(keep.sum()),
                "removed": int((~keep).sum()),
                "parameters": before,
                "parameters_kept": after,
            }
        )
    return found


def _weights(mask: Mask) -> list[dict[str, Any]]:
    return [
        {"layer": site.layer, "shape": list(keep.shape), "weights": keep.numel(), "removed": int((~keep).sum())}
        for site, keep in mask.keep.items()
    ]


def _cautions(settings: Prune, mask: Mask) -> list[str]:
    """Where other fractions were removed than asked for, and why; layers that are empty."""
    removed, found = mask.n_removed / mask.n_units, []
    if settings.scope is None:
        what, round_to = "units", _round_to(settings)
        why = f"widths are rounded up to multiples of {round_to}" if round_to > 1 else "one unit of each layer stays"
    else:
        what, why = "weights", "whole numbers of each group go"
        empty = [layer for layer, kept in sparsity.density(mask).items() if kept == 0]
        found = [f"layer {layer} has no weight left: what it writes is its bias, whatever the image" for layer in empty]
    if settings.ratio is not None and abs(removed - settings.ratio) > 0.02:
        found.append(f"{removed:.1%} of the {what} were removed, {settings.ratio:.1%} were asked for: {why}")
    return found


def _lost(
    setting: Bench,
    settings: Prune,
    layers: Sequence[Mapping[str, Any]],
    answers: Mapping[str, Replies],
    test: Batch,
) -> list[str]:
    """Where the cut is not shown to leave more than a guess: which layers it leaves no more than must stay, and what
    may keep more.
    """
    target, right = test.target.numpy(), answers["pruned"].correct
    guesses = {name: classwise.guesses(of.correct, target, setting.data.n_classes) for name, of in answers.items()}
    if guesses["dense"] or not guesses["pruned"]:
        return []
    # What single weights a layer keeps has no such floor.
    least = [of["layer"] for of in layers if of["removed"] and of.get("kept", np.inf) <= _round_to(settings)]
    worn = f" {words.listed(least)} keep{'s' * (len(least) == 1)} no more than must stay." if least else ""
    remedies = ["`criterion='drift'`"] if settings.criterion != "drift" and settings.scope is None else []
    remedies += ["`repair='refit'`"] if settings.repair == repairs.NONE else []
    remedies += [f"`exclude={least!r}`"] if least else []
    return [
        f"{right.mean():.1%} of {len(test)} test images are right after the cut, which is not shown to be more than "
        f"one answer for all gets right ({test.objective.chance(test.target):.1%}).{worn} "
        f"{words.listed([*remedies, 'a smaller cut'], 'or')} may keep more"
    ]


def _export(setting: Bench, desk: Desk) -> None:
    """The saved network as one ONNX file, with the script that runs it."""
    home = desk.space.folder
    loaded = models.load(setting.loaded.spec, weights=home)
    try:
        content = models.onnx_file(loaded, {"recipe_sha256": models.recipe_sha256(home / models.RECIPE)})
    except ModelError as error:
        raise ModelError(
            f"{error}; the network in {home} is finished, `sukashi.results({str(home)!r})` tells of it, and the same "
            "command tries the export again"
        ) from error
    desk.save(models.ONNX, content)
    script = models.infer_script(loaded.preprocess)
    if script:
        desk.save(models.INFER, script)
    desk.finish({"opset": "torch's default"})


def _time(setting: Bench, settings: Prune, space: Workspace) -> None:
    """Log the latency of the dense and the pruned network and of the ONNX file in turns, of one image, of many and of
    as many as a target asks for, unless an earlier run did."""
    home = Path(space.folder)
    if not (home / models.RECIPE).exists():
        return
    file = home / "onnx" / models.ONNX
    exported = setting.device.type == "cpu" and file.exists()
    timed = {entry["batch_size"] for entry in space.logged("latency") if "onnx_ms" in entry or not exported}
    missing = sorted({*cost.SPEED_BATCHES, *filter(None, [settings.target_batch])} - timed)
    if not missing:
        return
    small = models.load(setting.loaded.spec, weights=home)
    small.model.to(setting.device)
    networks: dict[str, Callable[[torch.Tensor], object]] = {"dense_ms": setting.loaded.model, "cut_ms": small.model}
    if exported:
        opened = onnx.session(file.read_bytes())
        networks["onnx_ms"] = lambda images: onnx.logits(opened, images.numpy())
    for size in missing:
        times = cost.latency([*networks.values()], cost.batch_of(setting.example, size), seconds=10.0)
        found = dict(zip(networks, times, strict=True))
        space.log("latency", **found, batch_size=size, threads=torch.get_num_threads())
