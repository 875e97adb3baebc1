"""What a training takes: its images, whether it can be done, and all that decides the weights which come out of it."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from dataclasses import asdict
from typing import Any

from sukashi import models
from sukashi.core import files
from sukashi.core.errors import DataError, UsageError
from sukashi.data import Data, Split
from sukashi.models import Loaded
from sukashi.network import sparsity
from sukashi.training.distributed import size
from sukashi.training.settings import Training


def splits(data: Data, training: Training) -> tuple[Split, Split | None, tuple[str, ...]]:
    """The images to train on, those to choose on (or None), and how the latter were made."""
    if data.val is not None:
        return data.train, data.val, ()
    if training.validation == 0:
        return data.train, None, (f"{data.name} has no validation split and none was held out",)
    train, validation = data.train.validation(training.validation)
    if len(validation) == 0:
        raise DataError(
            f"{data.name} has no validation split, and {training.validation:g} of each class is no image: hold out more"
        )
    return (
        train,
        validation,
        (
            f"{data.name} has no validation split: {training.validation:.0%} of each class of the training split held "
            f"out by the hash of the images' ids, {len(validation)} images",
        ),
    )


def check_training(
    training: Training, train: Split, validation: Split | None, loaded: Loaded, tensorboard: bool
) -> None:
    """Refuse what cannot be trained, before anything is."""
    if training.warmup >= training.epochs:
        raise UsageError(f"warmup must be below epochs, got {training.warmup} of {training.epochs}: give more epochs")
    if training.patience and validation is None:
        raise UsageError("patience needs validation images and validation is 0: hold some out")
    if len(train) < 2:
        raise DataError(f"{train.name} has {len(train)} image to train on: at least 2 are needed")
    n_processes = size()
    if len(train) // n_batches(len(train), training.batch_size) < n_processes:
        raise UsageError(
            f"batch_size {training.batch_size} leaves some of {n_processes} processes without images: give more"
        )
    if validation is not None and len(validation) < n_processes:
        raise UsageError(
            f"{len(validation)} validation images leave some of {n_processes} processes without one: hold out more"
        )
    if loaded.mask is not None:
        sparsity.check_fits(loaded.model, loaded.mask)
    if tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UsageError("--tensorboard needs tensorboard: pip install 'sukashi[tensorboard]'")


def bytes_of(gib: float) -> int:
    """So many GiB in bytes."""
    return int(gib * 2**30)


def about(loaded: Loaded, data: Data, training: Training) -> dict[str, Any]:
    """What decides the weights that come out: a run goes on only where it is equal."""
    kept = None
    if loaded.mask is not None:
        whole = hashlib.sha256()
        for site, keep in loaded.mask.keep.items():
            whole.update(f"{site.layer} {tuple(keep.shape)} ".encode() + keep.cpu().numpy().tobytes())
        kept = whole.hexdigest()
    facts = {
        "model": {
            "spec": loaded.spec,
            **loaded.options,
            "preprocess": asdict(loaded.preprocess),
            "weights": models.digest(loaded.model),
            "mask": kept,
        },
        "data": {"name": data.name, "sha256": data.sha256},
        "training": training.model_dump(),
    }
    return dict(json.loads(files.canonical(facts)))


def n_batches(n_images: int, batch_size: int) -> int:
    return -(-n_images // batch_size)
