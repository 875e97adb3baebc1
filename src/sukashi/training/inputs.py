"""What a training takes: its images, whether it can be done, and all that decides the weights which come out of it."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from sukashi import models
from sukashi.core import files
from sukashi.core.errors import DataError, ModelError, UsageError, brief
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
            f"out by the hash of the images' ids, {len(validation)} image{'s' if len(validation) != 1 else ''}",
        ),
    )


def trained_on(loaded: Loaded, data: Data, training: Training) -> tuple[models.Trained, ...] | None:
    """All that a network's weights were trained on, with this training too; None where nobody knows."""
    if loaded.trained_on is None:
        return None
    now = models.Trained(data.splits_sha256, training.validation if data.val is None else 0.0)
    return tuple(dict.fromkeys((*loaded.trained_on, now)))


def seen(data: Data, training: Training, loaded: Loaded) -> list[str]:
    """A warning where a network may have been trained on the images that are held out of the training split."""
    if data.val is not None or training.validation == 0:
        return []
    if loaded.has_not_seen(data.splits_sha256, training.validation):
        return []
    return [
        "the weights that training starts from may have been trained on the validation images: losses and accuracy on "
        "these can flatter"
    ]


def check_training(
    training: Training, train: Split, validation: Split | None, loaded: Loaded, tensorboard: bool
) -> tuple[str, ...]:
    """Refuse what cannot be trained, before anything is; and what is to be noted."""
    if training.warmup >= training.epochs:
        raise UsageError(f"warmup must be below epochs, got {training.warmup} of {training.epochs}: give more epochs")
    if training.patience and validation is None:
        raise UsageError("patience needs validation images and validation is 0: hold some out")
    if len(train) < 2:
        raise DataError(f"{train.name} has {len(train)} image to train on: at least 2 are needed")
    n_processes = size()
    if len(train) // n_batches(len(train), training.batch_size) < n_processes:
        raise UsageError(
            f"`batch_size={training.batch_size}` leaves some of {n_processes} processes without images: give more"
        )
    if validation is not None and len(validation) < n_processes:
        raise UsageError(
            f"validation images, {len(validation)} in number, leave some of {n_processes} processes without one: "
            "hold out more"
        )
    if loaded.mask is not None:
        sparsity.check_fits(loaded.model, loaded.mask)
    if tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UsageError("`tensorboard=True` needs tensorboard: pip install 'sukashi[tensorboard]'")
    return _check_step(loaded, train, training)


def _check_step(loaded: Loaded, train: Split, training: Training) -> tuple[str, ...]:
    """Refuse what fails in train mode on the smallest batch there will be, of which two images are enough to try."""
    device = next(loaded.model.parameters()).device
    x = models.noise(loaded.preprocess)[: len(train) // n_batches(len(train), training.batch_size)].to(device)
    wanted = len(x), loaded.n_classes
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
            given = copy.deepcopy(loaded.model).requires_grad_().train()(x)
            output = logits_of(given)
            if isinstance(output, Tensor) and output.shape == wanted:
                target = torch.zeros(len(x), dtype=torch.int64, device=device)
                train.objective.loss(output.float(), target).backward()
    except Exception as error:  # whatever a network raises
        remedy = "larger ones by `size`, or mend it" if len(x) > 1 else "another `batch_size`, which leaves none alone"
        raise ModelError(
            f"{loaded.spec} cannot be trained on {len(x)} image{'s' if len(x) > 1 else ''} of "
            f"{loaded.preprocess.height} x {loaded.preprocess.width} pixels ({brief(error)}): give {remedy}"
        ) from error
    if not isinstance(output, Tensor) or output.shape != wanted:
        found = f"{tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise ModelError(
            f"{loaded.spec} gives {found} in train mode for {len(x)} images, and logits {wanted} in eval mode: it must "
            "give those in both, alone or as 'logits' of a named tuple"
        )
    return () if given is output else (f"{loaded.spec} was trained by its logits alone, not by its auxiliary outputs",)


def logits_of(output: Any) -> Any:
    """The logits of what a network gives in train mode: GoogLeNet and Inception give auxiliary ones beside."""
    return getattr(output, "logits", output)


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
