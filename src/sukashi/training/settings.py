"""What a training is: its settings, the images it takes, and all that decides the weights which come out of it."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sukashi import models
from sukashi.core import files
from sukashi.core.errors import DataError, UsageError
from sukashi.data import Data, Split
from sukashi.models import Loaded
from sukashi.network import sparsity

RATES = {"sgd": 0.05, "adamw": 1e-3}
DECAYS = {"sgd": 5e-4, "adamw": 0.05}

_DROPS = (0.5, 0.75)  # shares of the epochs after which the step schedule divides by ten


class Training(BaseModel):
    """How a network is trained. `sukashi train --help` says what each setting means.

    `lr` and `weight_decay` follow the optimiser where they are not given. `warmup` counts epochs in which the rate
    rises linearly from 0; after it, `cosine` falls to 0 and `step` is divided by 10 after half and three quarters of
    the epochs. `ema` is the decay d of a moving average of the weights, min(d, (1 + t) / (10 + t)) in step t, which is
    then what is validated and kept; 0 keeps the last weights. `patience` stops after so many epochs without a lower
    loss on the validation images and keeps the epoch with the lowest; 0 runs to the end and keeps the last.
    `validation` is the fraction of each class held out where the data brings no split for it. `size` replaces the side
    of the images the architecture asks for. Without `enforce_mask` the weights a mask removes are only zero at the
    start, as in the code published with Suwal et al. 2025.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
    rates: ClassVar[Mapping[str, float]] = RATES

    epochs: int = Field(20, ge=1)
    batch_size: int = Field(128, ge=1)
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = Field(0.0, gt=0, validate_default=True)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    schedule: Literal["cosine", "step"] = "cosine"
    warmup: int = Field(0, ge=0)
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    augment: Literal["none", "crop_flip", "resized_crop", "affine"] = "none"
    ema: float = Field(0.0, ge=0, lt=1)
    patience: int = Field(0, ge=0)
    validation: float = Field(0.1, ge=0, lt=1)
    enforce_mask: bool = True
    size: int | None = Field(None, ge=1)
    seed: int = Field(0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _by_optimizer(cls, given: Any) -> Any:
        optimizer = given.get("optimizer", "sgd") if isinstance(given, dict) else ""
        if optimizer not in list(cls.rates):  # a list, for what was given may have no hash
            return given
        return {"lr": cls.rates[optimizer], "weight_decay": DECAYS[optimizer]} | given

    def rate(self, step: int, per_epoch: int) -> float:
        """The learning rate of a step, counted from 0."""
        warm, total = self.warmup * per_epoch, self.epochs * per_epoch
        if step < warm:
            return self.lr * (step + 1) / warm
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / (total - warm)))
        return self.lr * 0.1 ** sum(step >= drop * total for drop in _DROPS)


class Finetuning(Training):
    """The same for a network that is trained already: `lr` is a tenth where it is not given."""

    rates = {name: rate / 10 for name, rate in RATES.items()}


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
    n_processes = int(os.environ.get("WORLD_SIZE", "1"))
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


def memory_of(gib: float) -> int:
    """Bytes of images that a process may keep. Raises UsageError below 0 GiB."""
    if not gib >= 0:
        raise UsageError(f"memory must be at least 0 GiB, got {gib}: 0 decodes every image when it is asked for")
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
