"""Training and fine-tuning from names to a saved folder with a page: what `sukashi train` and `sukashi finetune` do."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, Unpack

from sukashi import models
from sukashi.core import files, progress
from sukashi.core.errors import UsageError, writing
from sukashi.core.schema import checked
from sukashi.data import Data, Split
from sukashi.experiments import pages
from sukashi.experiments.bench import Opening, Source, hardware, versions
from sukashi.measures import accuracy
from sukashi.measures.accuracy import by_class
from sukashi.models import RECIPE, Loaded, saved
from sukashi.training import checkpoint, loop
from sukashi.training.loop import Fitted
from sukashi.training.settings import Finetuning, Training, about, memory_of

_Kind = TypeVar("_Kind", bound=Training)
_BATCH = 128  # test images decoded at once


class Settings(Opening, total=False):
    """The settings of `training.Training` beside those of a `Source`."""

    epochs: int
    batch_size: int
    optimizer: str
    lr: float
    momentum: float
    weight_decay: float
    schedule: str
    warmup: int
    label_smoothing: float
    augment: str
    ema: float
    patience: int
    validation: float
    enforce_mask: bool
    size: int
    seed: int


def train(
    model: str,
    data: str,
    *,
    out: str | Path,
    tensorboard: bool = False,
    memory: float = loop.MEMORY / 2**30,
    command: str | None = None,
    **settings: Unpack[Settings],
) -> dict[str, Any]:
    """A network trained from random weights (drawn by `seed`) or from those given, saved to the folder `out`.

    Settings, with their defaults: epochs=20, batch_size=128 (over all processes), optimizer="sgd" or "adamw", lr (0.05
    for sgd, 0.001 for adamw), momentum=0.9, weight_decay (5e-4, 0.05), schedule="cosine" or "step", warmup=0 (epochs),
    label_smoothing=0, augment="none", "crop_flip", "resized_crop" or "affine", ema=0, patience=0 (both off),
    validation=0.1 (of each class held out, where the data bring no val split), enforce_mask=True, size=None (side of
    the images, instead of the model's own), seed=0. How the model and the data are read: weights=None, width=None,
    n_classes=None, pretrained=False, output=None, skip_bad=False, class_map=None, only=None, max_pixels, test_images,
    device="auto", workers=0; see `sukashi train --help`. `memory` is how many GiB of images a process keeps.

    The test split is measured once, at the end, on `test_images` of it. `sukashi.load(out)` rebuilds the network. An
    interrupted call is resumed by giving it again; given once more it returns what was found. Under torchrun all
    processes call it, and all but the first get an empty dictionary.

    Returns {"out", "report", "accuracy" (test images), "accuracy_before" (None), "n_images", "epochs" (done), "epoch"
    (whose weights these are), "validation": {"loss", "accuracy"}, "images_per_second", "waiting" (share of the time
    spent on getting images ready), "removed" and "zeros" (shares of the weights a mask speaks of that it removes, and
    that are zero in the end; None without a mask), "notes", "resumed" (the step this call went on from), "finished"
    (whether it was so before)}.

    Raises UsageError for settings that contradict each other and a folder of another run, DataError for too few images,
    ModelError where the loss is not finite (the last checkpoint is kept), ResourceError where nothing can be written.
    """
    return _run(model, data, Path(out), Training, tensorboard, memory, command or "sukashi.train(...)", settings)


def finetune(
    model: str,
    data: str,
    *,
    out: str | Path,
    tensorboard: bool = False,
    memory: float = loop.MEMORY / 2**30,
    command: str | None = None,
    **settings: Unpack[Settings],
) -> dict[str, Any]:
    """A network trained on from weights or a saved folder, whose cuts and mask stay, saved to the folder `out`.

    `model` is a folder that `prune`, `train`, `finetune` or `schedule` wrote, or a name with `weights` or `pretrained`.
    Settings and resuming are those of `sukashi.train`, but for `lr`, which is a tenth where it is not given: 0.005 for
    sgd, 1e-4 for adamw.

    Returns what `sukashi.train` does, with "accuracy_before": that of the network as it was given, on the same images.

    Raises UsageError for a model without weights, and what `sukashi.train` raises.
    """
    if Source(model, data, **_opening(settings)).untrained:
        raise UsageError(f"fine-tuning starts from weights and {model} has none: give --weights, or use sukashi train")
    return _run(model, data, Path(out), Finetuning, tensorboard, memory, command or "sukashi.finetune(...)", settings)


def settings_of(
    given: Mapping[str, Any],
    kind: type[_Kind] = Training,  # type: ignore[assignment]
    known: Iterable[str] = (*Opening.__annotations__, "tensorboard", "memory"),
) -> _Kind:
    """Training settings, checked: UsageError for a name that is none, nor `known`, or a value out of range."""
    return checked(kind, given, known=known)


def _opening(settings: Mapping[str, Any]) -> Any:
    return {name: value for name, value in settings.items() if name in Opening.__annotations__}


def _run(
    model: str,
    data: str,
    out: Path,
    kind: type[Training],
    tensorboard: bool,
    memory: float,
    command: str,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    opening = _opening(settings)
    chosen = settings_of({name: value for name, value in settings.items() if name not in opening}, kind)
    n_bytes = memory_of(memory)
    source = Source(model, data, **opening)
    images = source.read()
    loaded = models.resized(source.build(images, chosen.seed), chosen.size)
    images = images.read_in(loaded.preprocess.channels)
    device = next(loaded.model.parameters()).device
    models.probe(loaded, images.train.subset([0, len(images.train) - 1]).whole(loaded.preprocess).x.to(device))
    # The data names the classes: a saved model refuses data that counts them in another order.
    loaded = replace(loaded, class_names=images.class_names)
    described = about(loaded, images, chosen)
    if (out / RECIPE).exists():
        return _finished(out, described) if progress.first() else {}
    fitted = loop.fit(
        loaded,
        images,
        chosen,
        out=out,
        workers=source.workers,
        memory=n_bytes,
        tensorboard=tensorboard,
    )
    if not progress.first():
        return {}
    test = images.test.limit(source.test_images)
    figures = _figures(fitted, loaded if kind is Finetuning else None, images, test, source.workers)
    provenance = {
        "command": command,
        "run": described,
        "weights_sha256": loaded.weights_sha256,
        "test_images": len(test),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "versions": versions(),
        "hardware": hardware(device),
    }
    _save(out, fitted.loaded, provenance, figures)
    return {**_said(out, figures), "resumed": fitted.resumed, "finished": False}


def _figures(fitted: Fitted, before: Loaded | None, images: Data, test: Split, workers: int) -> dict[str, Any]:
    """What was measured, for readers; `before` is the network that was fine-tuned."""
    batches = test.batches(fitted.loaded.preprocess, _BATCH, workers)
    correct, _ = accuracy.evaluate(fitted.loaded.model, batches)
    chosen = fitted.history[fitted.epoch - 1]
    seconds = sum(1 / entry["images_per_second"] for entry in fitted.history)
    return {
        "accuracy": float(correct.mean()),
        "accuracy_before": None if before is None else float(accuracy.evaluate(before.model, batches)[0].mean()),
        "n_images": len(test),
        "epochs": len(fitted.history),
        "epoch": fitted.epoch,
        "validation": {"loss": chosen["val_loss"], "accuracy": chosen["val_accuracy"]},
        "images_per_second": len(fitted.history) / seconds,
        "waiting": sum(entry["waiting"] / entry["images_per_second"] for entry in fitted.history) / seconds,
        "removed": fitted.removed,
        "zeros": fitted.zeros,
        "class_accuracy": by_class(correct, test.objective.classes(test.targets), images.n_classes),
        "class_counts": test.counts.tolist(),
        "history": list(fitted.history),
        "notes": [*images.notes, *fitted.notes],
    }


def _save(out: Path, loaded: Loaded, provenance: Mapping[str, Any], figures: Mapping[str, Any]) -> None:
    """Put a saved model into the folder of its run; it is one from the moment its recipe is there."""
    draft = out / ".saving"
    shutil.rmtree(draft, ignore_errors=True)
    saved.save(draft, loaded, provenance=provenance, figures=figures)
    with writing(out):
        for path in sorted(draft.iterdir(), key=lambda path: path.name == RECIPE):
            path.replace(out / path.name)
        draft.rmdir()
        checkpoint.clear(out)
    pages.write(out)


def _finished(out: Path, described: Mapping[str, Any]) -> dict[str, Any]:
    recipe = models.read_recipe(out / RECIPE)
    run = recipe.provenance.get("run")
    if run is None:
        raise UsageError(f"{out} holds a model that was not trained here: choose another --out")
    files.refuse_other(out, run, described)
    checkpoint.clear(out)
    pages.write(out)
    return {**_said(out, recipe.figures), "resumed": None, "finished": True}


def _said(out: Path, figures: Mapping[str, Any]) -> dict[str, Any]:
    hidden = ("class_accuracy", "class_counts", "history")
    shown = {name: value for name, value in figures.items() if name not in hidden}
    return {"out": str(out), "report": str(out / "report.html"), **shown}
