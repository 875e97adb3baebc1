"""A model cut for real, or made sparse, and saved with its figures."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch

from sukashi import models
from sukashi.core.errors import UsageError
from sukashi.core.files import check_free
from sukashi.core.types import Batch, Mask, check_ratio
from sukashi.criteria import UNITS, pruning
from sukashi.criteria import criteria as registry
from sukashi.criteria.calibration import check_sampling
from sukashi.criteria.plans import plan_bytes
from sukashi.criteria.pruning import check_options
from sukashi.experiments import pages
from sukashi.experiments.bench import Reading, Setting, Source, hardware, plan_for, versions
from sukashi.measures import accuracy, cost
from sukashi.measures.accuracy import by_class
from sukashi.models import Loaded
from sukashi.network import sites, sparsity, surgery
from sukashi.report import networks


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
        round_to = (pruning.ROUND_TO if mode == "cut" else 1) if round_to is None else round_to
        pruning.check_round_to(round_to)
    else:
        if mode != "cut" or round_to is not None:
            name = f"mode {mode}" if mode != "cut" else "round_to"
            raise UsageError(f"{name} is for units, and scope {scope} removes single weights: leave one of them out")
        sparsity.check_scope(scope, ratio)
        if sequential:
            pruning.check_sequential(criterion, scope)
    check_free(Path(out))
    if onnx:
        models.check_onnx_installed()
    setting = Source(model, data, **reading).open(units=scope is None)
    # The data names the classes: a saved model refuses data that counts them in another order.
    dense = replace(setting.loaded, class_names=setting.data.class_names)
    files: dict[str, bytes] = {}
    how: dict[str, Any]
    if scope is None:
        what, how = "cut", {"mode": mode, "round_to": round_to}
        plan = plan_for(setting, criterion, seed, sampling=sampling, options=options)
        mask = pruning.round_mask(plan, ratio, round_to or 1)
        small = pruning.cut(dense, mask, mode)
        files["plan.npz"] = plan_bytes(plan)
    else:
        what, how = "sparse", {"scope": scope, "sequential": sequential}
        how |= {"exclude": list(exclude)} if exclude else {}
        found = sites.weights(dense.model, exclude)
        sparsity.check_shapes(scope, {site.layer: sparsity.weight_of(dense.model, site).shape for site in found})
        mask = pruning.weight_mask(
            *(dense, found, setting.calibration(seed, sampling), criterion, ratio, scope),
            generator=torch.Generator().manual_seed(seed),
            sequential=sequential,
            options=options,
        )
        small = pruning.sparse(dense, mask)
    test = setting.test()
    costs = cost.cost(dense.model, small.model, setting.example)
    figures: dict[str, dict[str, Any]] = {}
    for name, loaded, cost_of in (("dense", dense, costs["dense"]), (what, small, costs["cut"])):
        correct = _correct(setting, loaded, test)
        of_classes = by_class(correct, test.objective.classes(test.target), dense.n_classes)
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
        "class_counts": test.objective.counts(test.target, dense.n_classes).tolist(),
        "notes": [*setting.data.notes, *cautions],
        **layers,
    }
    models.save(out, small, provenance=provenance, figures=about, files=files)
    try:
        if onnx:
            models.export_onnx(small, Path(out) / "model.onnx")
        page = pages.write(out)
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
        **({} if scope is None else {"note": networks.MODES["sparse"]}),
        "warnings": cautions,
        "versions": versions(),
    }


def _correct(setting: Setting, loaded: Loaded, test: Batch) -> np.ndarray:
    """(B,) 1 where an image is right."""
    found = [accuracy.accuracy(loaded.model, part.to(setting.device)).values for part in test.split(128)]
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
