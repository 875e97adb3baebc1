"""What a training from names is: a model, data, how it is trained and where the network goes."""

from __future__ import annotations

from typing import ClassVar

from sukashi.core.schema import Settings, option
from sukashi.experiments.reading import Single
from sukashi.training.settings import Finetuning, Training


class Memory(Settings):
    """For what reads the training images again and again."""

    memory: float = option(
        2.0, ge=0, decides=False, help="GiB of images a process may keep; others are decoded each time."
    )


class Train(Memory, Training, Single):
    """Train a network, from random weights or from `weights`, and save it as a folder that `sukashi.load` rebuilds."""

    kind: ClassVar[str] = "train"

    new_head: bool = option(
        False, help="Put a new classifier, for the classes of the data, on the weights: transfer learning."
    )
    out: str = option(path=True, decides=False, help="Folder for the network; an interrupted training is resumed.")
    tensorboard: bool = option(False, decides=False, help="Write a TensorBoard log too.")

    @property
    def training(self) -> Training:
        return Training(**{name: getattr(self, name) for name in Training.model_fields})


class Finetune(Finetuning, Train):
    """Train on from weights or a saved folder, whose cuts and mask stay, with a tenth of the learning rate."""

    kind: ClassVar[str] = "finetune"
