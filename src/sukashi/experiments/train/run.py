"""Training and fine-tuning from names to a saved folder with a page: what `sukashi train` and `sukashi finetune` do."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sukashi import models
from sukashi.core import files, progress
from sukashi.core.errors import UsageError, writing
from sukashi.core.schema import keyworded, keywords
from sukashi.data import Data, Split
from sukashi.experiments import pages
from sukashi.experiments.bench import Source, hardware, versions
from sukashi.experiments.train.settings import Finetune, Train
from sukashi.measures import accuracy
from sukashi.measures.accuracy import by_class
from sukashi.models import RECIPE, Loaded, saved
from sukashi.training import checkpoint, loop
from sukashi.training.inputs import about, bytes_of
from sukashi.training.loop import Fitted

_BATCH = 128  # test images decoded at once


@keyworded(Train)
def train(model: str, data: str, *, out: str | Path, command: str | None = None, **settings: Any) -> dict[str, Any]:
    """A network trained from random weights (drawn by `seed`) or from those given, saved to the folder `out`.

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
    asked = keywords(Train, {"model": model, "data": data, "out": out, **settings}, known=("command",))
    return _run(asked, command or "sukashi.train(...)")


@keyworded(Finetune)
def finetune(model: str, data: str, *, out: str | Path, command: str | None = None, **settings: Any) -> dict[str, Any]:
    """A network trained on from weights or a saved folder, whose cuts and mask stay, saved to the folder `out`.

    `model` is a folder that `prune`, `train`, `finetune` or `schedule` wrote, or a name with `weights` or `pretrained`.
    Resuming is as in `sukashi.train`, and so are the settings but for `lr`, which is a tenth where it is not given.

    Returns what `sukashi.train` does, with "accuracy_before": that of the network as it was given, on the same images.

    Raises UsageError for a model without weights, and what `sukashi.train` raises.
    """
    asked = keywords(Finetune, {"model": model, "data": data, "out": out, **settings}, known=("command",))
    if Source.of(asked).untrained:
        raise UsageError(f"fine-tuning starts from weights and {model} has none: give --weights, or use sukashi train")
    return _run(asked, command or "sukashi.finetune(...)")


def _run(asked: Train, command: str) -> dict[str, Any]:
    out, chosen = Path(asked.out), asked.training
    source = Source.of(asked)
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
        memory=bytes_of(asked.memory),
        tensorboard=asked.tensorboard,
    )
    if not progress.first():
        return {}
    test = images.test.limit(source.test_images)
    figures = _figures(fitted, loaded if isinstance(asked, Finetune) else None, images, test, source.workers)
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
        "class_accuracy": by_class(correct, test.targets, images.n_classes),
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
