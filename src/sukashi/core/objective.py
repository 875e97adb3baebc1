"""What a network is for: the one place that knows what its outputs and the targets of images mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sukashi.core.errors import DataError, ModelError


@dataclass(frozen=True)
class Classification:
    """One class an image: outputs are logits (B, K), targets class numbers (B,) int64 in [0, K)."""

    def check_target(self, target: Tensor, n_images: int) -> None:
        """Refuse, by DataError, targets that are not one class number an image."""
        if target.shape != (n_images,):
            raise DataError(
                f"target has shape {tuple(target.shape)} for {n_images} images: a classifier has one class number an "
                "image"
            )
        if target.dtype != torch.int64:
            raise DataError(f"target is of dtype {target.dtype}: give class numbers, torch.int64")

    def check_output(self, output: Any, n_images: int, source: str = "the model") -> None:
        """Refuse, by ModelError, what is not a row of logits for each image; `source` is who gave it."""
        if not isinstance(output, Tensor) or output.dim() != 2 or len(output) != n_images:
            found = f"{tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
            raise ModelError(
                f"{source} gives {found} for {n_images} images: it must be a classifier, which gives (images, classes)"
            )

    def check(self, output: Any, target: Tensor) -> None:
        """Refuse an output that is not logits (ModelError), and a target that is none of its classes (DataError)."""
        self.check_output(output, len(target))
        wrong = target[(target < 0) | (target >= output.shape[1])]
        if len(wrong):
            raise DataError(
                f"target {int(wrong[0])} is no class of a model with {output.shape[1]} logits: classes count from 0"
            )

    def loss(self, output: Tensor, target: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
        """The cross entropy, summed over images: so each image's gradient is its own, whatever the batch; ()."""
        return F.cross_entropy(output, target, label_smoothing=label_smoothing, reduction="sum")

    def outcome(self, output: Tensor, target: Tensor) -> Tensor:
        """How right each image is, in [0, 1]: 1 where the target's logit is the largest, the first of equals; uint8."""
        return (output.argmax(1) == target).to(torch.uint8)

    def score(self, output: Tensor, target: Tensor) -> Tensor:
        """How much speaks for each image's target: its probability (B,), in float64 so that a tiny one is not zero."""
        return output.double().softmax(1).gather(1, target[:, None])[:, 0]

    def explained(self, output: Tensor, target: Tensor) -> Tensor:
        """What an attribution explains of each image: the target's logit (B,). Raises as `check` does."""
        self.check(output, target)
        return output.gather(1, target[:, None])[:, 0]

    def classes(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """Which classes images have: pairs of a row and a class, (M,) each, by row; here one for each image."""
        return torch.arange(len(target), device=target.device), target

    def counts(self, target: Tensor, n_classes: int) -> Tensor:
        """How many images have each class (K,)."""
        return torch.bincount(self.classes(target)[1], minlength=n_classes)

    def chance(self, n_classes: int) -> float:
        """The mean outcome of guessing."""
        return 1 / n_classes


Objective = Classification  # or another, once there is one: annotations name this
CLASSIFICATION = Classification()
