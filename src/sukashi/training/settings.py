"""How a network is trained."""

from __future__ import annotations

import math
from typing import Any, Literal

from sukashi.core.schema import MAX_SEED, Settings, option

RATES = {"sgd": 0.05, "adamw": 1e-3}
_TENTHS = {name: rate / 10 for name, rate in RATES.items()}
DECAYS = {"sgd": 5e-4, "adamw": 0.05}

_DROPS = (0.5, 0.75)  # shares of the epochs after which the step schedule divides by ten


def _of_optimizer(values: dict[str, float]) -> Any:
    # An optimiser that was refused is not among what was given.
    return lambda given: values[given.get("optimizer", "sgd")]


def _told(values: dict[str, float]) -> str:
    return ", ".join(f"{value:g} for {name}" for name, value in values.items())


class Training(Settings):
    """How a network is trained.

    `lr` and `weight_decay` follow the optimiser where they are not given. The average of `ema` d has the decay
    min(d, (1 + t) / (10 + t)) in step t.
    """

    epochs: int = option(20, ge=1, le=1_000_000, help="Passes over the training images.")
    batch_size: int = option(
        128,
        ge=1,
        help="Images a step, over all processes. An epoch is cut into batches as equal as can be; no image is left "
        "out.",
    )
    optimizer: Literal["sgd", "adamw"] = option("sgd", help="sgd or adamw.")
    lr: float = option(
        _of_optimizer(RATES),
        gt=0,
        examples=[RATES["sgd"]],
        default=_told(RATES),
        help="Learning rate; a tenth of it where a trained network is fine-tuned.",
    )
    momentum: float = option(0.9, ge=0, lt=1, help="Of sgd.")
    weight_decay: float = option(
        _of_optimizer(DECAYS), ge=0, examples=[DECAYS["sgd"]], default=_told(DECAYS), help="Of the weights."
    )
    schedule: Literal["cosine", "step"] = option(
        "cosine", help="Of the rate: cosine falls to 0; step is divided by 10 after 1/2 and 3/4 of the epochs."
    )
    warmup: int = option(0, ge=0, help="Epochs in which the rate rises linearly; fewer than epochs.")
    label_smoothing: float = option(0.0, ge=0, lt=1, help="Share of each target that all classes get alike.")
    augment: Literal["none", "crop_flip", "resized_crop", "affine"] = option(
        "none",
        help="Random views, or none. crop_flip: mirrored or not, moved by up to an eighth of the side. resized_crop: "
        "mirrored or not, 35 to 100 % of the area. affine: turned by up to 10 degrees, moved by 5 %, 10 % larger or "
        "smaller; never mirrored, so for digits and X-rays.",
    )
    ema: float = option(
        0.0,
        ge=0,
        lt=1,
        help="Decay of a moving average of the weights, which is then what is validated and kept; 0 is none, 0.999 is "
        "usual.",
    )
    patience: int = option(
        0,
        ge=0,
        help="Stop after so many epochs without a lower validation loss, and keep the epoch with the lowest. 0 runs to "
        "the end and keeps the last epoch.",
    )
    validation: float = option(
        0.1, ge=0, lt=1, help="Share of each class held out, where the data bring no val split; 0 holds nothing out."
    )
    enforce_mask: bool = option(
        True,
        help="After each step the zeros of a mask are zero again; without it they are zero at the start, as in the "
        "code published with Suwal et al. 2025.",
    )
    seed: int = option(
        0, ge=0, le=MAX_SEED, help="Draws random weights, the order of images, their random views and dropout."
    )

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

    lr: float = option(
        _of_optimizer(_TENTHS),
        gt=0,
        examples=[_TENTHS["sgd"]],
        default=_told(_TENTHS),
        help="Learning rate.",
    )
