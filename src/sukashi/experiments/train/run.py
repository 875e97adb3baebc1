"""A network trained, or trained on, and saved: one trial, which goes on from its checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from sukashi import models
from sukashi.core import progress
from sukashi.core.errors import UsageError
from sukashi.core.experiment import Prepared, Trial
from sukashi.data import Data
from sukashi.experiments.bench import Bench, Source, hardware
from sukashi.experiments.train.settings import Finetune, Train
from sukashi.experiments.workspace import Desk
from sukashi.measures import accuracy
from sukashi.models import Loaded
from sukashi.network.sites import Found
from sukashi.training import loop
from sukashi.training.inputs import about, bytes_of, check_training, seen, splits
from sukashi.training.loop import Fitted

_BATCH = 128  # test images decoded at once


def prepare(settings: Train) -> Prepared:
    """Raises UsageError for settings that contradict each other, or to fine-tune what has no weights; DataError for too
    few images, and whatever loading raises.
    """
    tuned, source, chosen = isinstance(settings, Finetune), Source.of(settings), settings.training
    if tuned and source.untrained:
        raise UsageError(
            f"fine-tuning starts from weights and {settings.model} has none: give `weights=FILE`, or use "
            "`sukashi.train`"
        )
    if settings.new_head and (source.untrained or settings.n_classes is not None):
        raise UsageError(
            f"{settings.model} has no weights that a new head could be put on: give `weights=FILE`, or leave "
            "`new_head` out"
            if source.untrained
            else "a new head is for the classes of the data: leave `n_classes` out"
        )
    early = source.early(chosen.seed)
    loaded, images = source.build(source.read(), chosen.seed, new_head=settings.new_head, early=early)
    device = next(loaded.model.parameters()).device
    models.probe(loaded, images.train.subset([0, len(images.train) - 1]).whole(loaded.preprocess).x.to(device))
    # The data names the classes: a saved model refuses data that counts them in another order.
    loaded = replace(loaded, class_names=images.names_of_outputs(loaded.class_names))
    train, validation, _ = splits(images, chosen)
    check_training(chosen, train, validation, loaded, settings.tensorboard)
    setting = Bench(source, loaded, images, Found((), {}), device)
    # By the weights that were drawn too, and the mask; a folder's name is none of it.
    model = setting.about_model | about(loaded, images, chosen)["model"]
    described = setting.identity(settings, model=model, fine_tuned=tuned)
    trial = Trial(described, partial(_train, settings, loaded, images), place=".", label=settings.kind, together=True)
    return Prepared(described, [trial], log={"hardware": hardware(device)})


def _train(settings: Train, loaded: Loaded, images: Data, desk: Desk) -> Mapping[str, Any]:
    fitted = loop.fit(
        loaded,
        images,
        settings.training,
        out=desk.scratch,
        workers=settings.workers,
        memory=bytes_of(settings.memory),
        tensorboard=desk.space.folder / "tensorboard" if settings.tensorboard else None,
    )
    if not progress.first():
        return {}
    before = loaded if isinstance(settings, Finetune) else None
    for name, content in models.contents(fitted.loaded, {**desk.trial.about, "trained": True}).items():
        desk.save(name, content)
    log_speed(desk, fitted)
    test = images.test.limit(settings.test_images)
    batches = test.batches(fitted.loaded.preprocess, _BATCH, settings.workers)
    networks = {"before": before, "trained": fitted.loaded}
    answers = {
        name: accuracy.replies(of.model, batches, probabilities=True) for name, of in networks.items() if of is not None
    }
    desk.save("answers", accuracy.kept(answers, images.n_classes))
    right = {name: float(of.correct.mean()) for name, of in answers.items()}
    desk.finish(_figures(fitted, loaded, right, len(test), images, settings))
    return {"resumed": fitted.resumed or None}


def log_speed(desk: Desk, fitted: Fitted) -> None:
    """What a clock says of a training goes into the log, epoch by epoch."""
    told = [{name: entry[name] for name in ("epoch", "images_per_second", "waiting")} for entry in fitted.history]
    desk.space.log("speed", trial=desk.trial.key, epochs=told)


def history_of(fitted: Fitted) -> list[dict[str, Any]]:
    """What each epoch gave, but for what a clock says."""
    clocks = ("images_per_second", "waiting")
    return [{name: value for name, value in entry.items() if name not in clocks} for entry in fitted.history]


def _figures(
    fitted: Fitted, start: Loaded, right: Mapping[str, float], n_images: int, images: Data, settings: Train
) -> dict[str, Any]:
    """What was measured; `start` is what training started from, `right` the accuracy on so many images of what it gave,
    and of the network before it where that was trained already."""
    chosen = fitted.history[fitted.epoch - 1]
    _, validation, _ = splits(images, settings.training)
    return {
        "accuracy": right["trained"],
        "accuracy_before": right.get("before"),
        "n_images": n_images,
        "epochs": len(fitted.history),
        "epoch": fitted.epoch,
        "validation": {"loss": chosen["val_loss"], "accuracy": chosen["val_accuracy"]},
        "n_validation": None if validation is None else len(validation),
        "weights_removed": fitted.removed,
        "zeros_in_masked_layers": fitted.zeros,
        "class_names": list(images.class_names),
        "history": history_of(fitted),
        "warnings": [*images.warnings, *seen(images, settings.training, start)],
        "notes": [*images.notes, *fitted.notes],
    }
