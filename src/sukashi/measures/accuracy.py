"""Accuracy of a network: what it answers to each image, and whether that is what its objective calls right."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sized
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sukashi.core import progress
from sukashi.core.errors import DataError, ModelError
from sukashi.core.precision import exact
from sukashi.core.types import Batch, Measurement
from sukashi.measures import measures

MOST_CLASSES = 100  # whose probabilities are kept: of 1,000 those of 2,000 images take 16 MB


@measures.register("accuracy", source="share of images whose largest logit is that of their target", better="higher")
def accuracy(model: nn.Module, batch: Batch) -> Measurement:
    """1 for each image whose largest logit is its target's, else 0; (B,) float, in [0, 1].

    It is the outcome of the batch's objective: among equal logits the first counts. Raises as `outputs` does.
    """
    return Measurement(outcome(model, batch).float(), batch.image_id, "accuracy")


class Replies(NamedTuple):
    """What a network answers: of each image (B,) the class it is given, -1 for one that the data does not have, the
    class it has, whether that is right, and its id; where they were asked for, the probabilities (B, K) of the data's
    classes."""

    answer: NDArray[np.int32]
    target: NDArray[np.int32]
    correct: NDArray[np.uint8]
    image_ids: tuple[str, ...]
    probability: NDArray[np.float32] | None = None


def replies(model: nn.Module, images: Batch | Iterable[Batch], *, probabilities: bool = False) -> Replies:
    """What a network answers to images; on the model's device, in passes of `types.pass_size`.

    Raises DataError where there are no images, and as `outputs` does.
    """
    device = next(model.parameters()).device
    parts: list[tuple[Tensor, ...]] = []
    ids: list[str] = []
    batches = list(images.in_passes()) if isinstance(images, Batch) else images
    with progress.task("batches", len(batches) if isinstance(batches, Sized) else 0) as shown:
        for batch in batches:
            for part in batch.in_passes():
                there = part.to(device)
                there = replace(there, x=there.x.to(memory_format=torch.channels_last))
                found = outputs(model, there)
                objective = part.objective
                more = [objective.probabilities(found).float()] if probabilities else []
                parts.append((objective.answer(found), there.target, objective.outcome(found, there.target), *more))
                ids += part.image_id
            shown.advance()
    if not ids:
        raise DataError("there are no images to measure accuracy on: give a split that holds some")
    answer, target, correct, *rest = (torch.cat(of).cpu().numpy() for of in zip(*parts, strict=True))
    return Replies(
        answer.astype(np.int32), target.astype(np.int32), correct, tuple(ids), probability=rest[0] if rest else None
    )


def kept(answers: Mapping[str, Replies], n_classes: int) -> dict[str, NDArray[Any]]:
    """What networks answer to the same images as arrays to be saved, "NAME answer" and so on, as `report.classes` reads
    them; probabilities where they are few enough to keep."""
    first = next(iter(answers.values()))
    found: dict[str, NDArray[Any]] = {"image_ids": np.array(first.image_ids, dtype=np.str_), "target": first.target}
    for name, of in answers.items():
        assert of.probability is not None
        found |= {f"{name} answer": of.answer, f"{name} correct": of.correct}
        found[f"{name} confidence"] = of.probability.max(axis=1)
        if n_classes <= MOST_CLASSES:
            found[f"{name} probability"] = of.probability
    return found


def evaluate(model: nn.Module, images: Batch | Iterable[Batch]) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    """(B,) 1 where an image is right, and the images' ids (B,). Raises as `replies` does."""
    found = replies(model, images)
    return found.correct, found.image_ids


def outputs(model: nn.Module, batch: Batch) -> Tensor:
    """What a network answers (B, K), checked.

    Raises ModelError where it is not finite or not what the objective takes, DataError for a target that is no class.
    """
    with exact():
        found: Tensor = model(batch.x)
    batch.objective.check(found, batch.target)
    if not found.isfinite().all():
        raise ModelError("the network gives NaN or Inf on test images: check its weights and the preprocessing")
    return found


def outcome(model: nn.Module, batch: Batch) -> Tensor:
    """How right a network is on each image (B,), by the batch's objective. Raises as `outputs` does."""
    return batch.objective.outcome(outputs(model, batch), batch.target)
