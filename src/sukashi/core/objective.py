"""What a network is for: the one place that knows what its outputs and the targets of images mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sukashi.core.errors import DataError, ModelError

Among = Literal["data", "model"]


@dataclass(frozen=True)
class Classification:
    """One class an image: outputs are logits (B, K), targets class numbers (B,) int64 in [0, K).

    A network may know more classes than the data has: then `outputs` says which of its logits means each class, and
    `among` which are held against each other, those of the data's classes or all of the model's. A target stays the
    data's number of a class. `explains` says what an attribution is about: the target's logit, or its margin, the lead
    over the largest of the others.
    """

    outputs: tuple[int, ...] | None = None
    among: Among = "data"
    explains: Literal["logit", "margin"] = "logit"

    def answers(self, output: Tensor) -> Tensor:
        """The logits (B, K) that are held against each other."""
        if self.outputs is None or self.among == "model":
            return output
        return output[:, torch.tensor(self.outputs, device=output.device)]

    def place(self, target: Tensor) -> Tensor:
        """Where a target's own is among these (B,)."""
        if self.outputs is None or self.among == "data":
            return target
        return torch.tensor(self.outputs, device=target.device)[target]

    def n_classes(self, n_outputs: int) -> int:
        """How many classes the data of a network with so many outputs has."""
        return n_outputs if self.outputs is None else len(self.outputs)

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
        n_outputs = output.shape[1]
        wrong = target[(target < 0) | (target >= self.n_classes(n_outputs))]
        if len(wrong) or max(self.outputs or (0,)) >= n_outputs:
            number = int(wrong[0]) if len(wrong) else max(self.outputs or (0,))
            raise DataError(f"target {number} is no class of a model with {n_outputs} logits: classes count from 0")

    def loss(self, output: Tensor, target: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
        """The cross entropy, summed over images: so each image's gradient is its own, whatever the batch; ()."""
        answers, place = self.answers(output), self.place(target)
        return F.cross_entropy(answers, place, label_smoothing=label_smoothing, reduction="sum")

    def answer(self, output: Tensor) -> Tensor:
        """The class (B,) int64 whose logit is the largest, the first of equals, as the data numbers it; -1 for a class
        of the model that the data does not have."""
        largest = self.answers(output).argmax(1)
        if self.outputs is None or self.among == "data":
            return largest
        own = torch.full((output.shape[1],), -1, device=output.device)
        own[torch.tensor(self.outputs, device=output.device)] = torch.arange(len(self.outputs), device=output.device)
        return own[largest]

    def outcome(self, output: Tensor, target: Tensor) -> Tensor:
        """How right each image is, in [0, 1]: 1 where the target's logit is the largest, the first of equals; uint8."""
        return (self.answer(output) == target).to(torch.uint8)

    def score(self, output: Tensor, target: Tensor) -> Tensor:
        """How much speaks for each image's target: its probability (B,), in float64 so that a tiny one is not zero."""
        return self.answers(output).double().softmax(1).gather(1, self.place(target)[:, None])[:, 0]

    def probabilities(self, output: Tensor) -> Tensor:
        """The probability of each of the data's classes (B, K), float64: of what is held against each other."""
        found = self.answers(output).double().softmax(1)
        if self.outputs is None or self.among == "data":
            return found
        return found[:, torch.tensor(self.outputs, device=output.device)]

    def explained(self, output: Tensor, target: Tensor) -> Tensor:
        """What an attribution explains of images (B,): the target's logit, or its margin. Raises as `check` does."""
        self.check(output, target)
        answers, place = self.answers(output), self.place(target)[:, None]
        own = answers.gather(1, place)[:, 0]
        return own if self.explains == "logit" else own - answers.scatter(1, place, -torch.inf).amax(1)

    def classes(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """Which classes images have: pairs of a row and a class, (M,) each, by row; here one for each image."""
        return torch.arange(len(target), device=target.device), target

    def counts(self, target: Tensor, n_classes: int) -> Tensor:
        """How many images have each class (K,)."""
        return torch.bincount(self.classes(target)[1], minlength=n_classes)

    def chance(self, target: Tensor) -> float:
        """The mean outcome of guessing on images with these targets: what one answer for all gets right at best, the
        share of the largest class."""
        return int(torch.bincount(target).max()) / len(target)


Objective = Classification  # or another, once there is one: annotations name this
CLASSIFICATION = Classification()
