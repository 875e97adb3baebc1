"""How models and data are named and read: the fields that every experiment shares."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from sukashi.core.schema import Settings, check_scale, option

OPTIONS = "Options by method, as {method: {option: value}}."


class Architecture(Settings):
    """What a model's spec leaves open."""

    weights: str | None = option(
        None,
        path=True,
        help="Weights: a file of safetensors or of torch.save, holding tensors only, or a folder with one.",
    )
    weights_key: str | None = option(None, help="Which weights of a file, where several in it fit, as state_dict_ema.")
    width: int | None = option(None, ge=1, le=65_536, help="Base width, for our own models.")
    n_classes: int | None = option(
        None, ge=1, le=1_000_000, flag="--classes", help="Class count; by default that of the weights or of the data."
    )
    pretrained: bool = option(False, help="Download pretrained weights.")
    output: str | None = option(None, help="Which of a model's outputs holds the logits.")


def _listed(value: object) -> object:
    return [value] if isinstance(value, int | float) else value


Numbers = BeforeValidator(_listed)


class Pixels(Settings):
    """How images become what a network reads; what is not given is as its weights say, or as is usual for it."""

    size: Annotated[list[Annotated[int, Field(ge=1, le=16_384)]] | None, Numbers] = option(
        None,
        min_length=1,
        max_length=2,
        default="the model's",
        help="Side of the images that the network reads, or height,width.",
    )
    mean: Annotated[list[float] | None, Numbers] = option(
        None, min_length=1, default="the model's", help="Taken from each channel of pixels in [0, 1], or from all."
    )
    std: Annotated[list[float] | None, Numbers] = option(
        None, min_length=1, default="the model's", help="By which each channel is divided then, or all are."
    )
    resize: str | None = option(
        None,
        default="squash, for pretrained weights as they were published",
        help="squash (the whole image resized, aspect ratio not kept); crop (shorter side to the size, enlarged as the "
        "architecture was published, then the centre); or crop:N, with the shorter side to N pixels.",
    )

    @model_validator(mode="after")
    def _of_pixels_up_to_one(self) -> Self:
        check_scale(self.mean or ())
        return self


class Images(Settings):
    """Data, and how much of them is read."""

    data: str = option(named=True, examples=["digits"], help="digits, shapes, torchvision:NAME, or a folder of images.")
    skip_bad: bool = option(False, help="Leave unreadable images out, and say so.")
    class_map: dict[str, int] | None = option(
        None, help='{"class of the data": its number in the model}, where the two differ.'
    )
    only: list[str] | None = option(None, joined=True, help="Leave all classes out but these; numbered in this order.")
    among: Literal["data", "model"] = option(
        "data",
        help="Where the model has more classes than the data: whether all of its classes count, or the data's.",
    )
    label: str | None = option(None, help="Column of the labels in Parquet or CSV, where it is not called so.")
    groups: str | None = option(
        None,
        help="What images belong to that must stay together where some are held out, as those of a patient: a column "
        "of Parquet or CSV, or a pattern with one group in brackets, looked for in file names, as 'patient(\\d+)_'.",
    )
    max_pixels: int = option(64_000_000, help="Pixels an image may have.")
    test_images: int = option(2000, help="Test images at most, evenly over the classes.")
    device: Literal["auto", "cpu", "cuda"] = option("auto", decides=False, help="auto, cpu or cuda.")
    workers: int = option(0, ge=0, le=1024, decides=False, help="Threads that decode images.")


class Opening(Images, Pixels, Architecture):
    """How models and data are opened."""


class Calibrated(Settings):
    """For what looks at calibration images."""

    calibration: int = option(32, ge=1, help="Calibration images a class, from the training split.")


class Masked(Settings):
    """For what asks where something is in images."""

    masks: list[str] | None = option(
        None,
        path=True,
        decides=False,
        help="Folder of masks that say where something is, as the evidence, under the images' names; not 0 is inside. "
        "Folders called masks beside the images are found without it.",
    )


class Single(Opening):
    """One model and data."""

    model: str = option(
        argument=True,
        named=True,
        help="sukashi:NAME, timm:NAME, torchvision:NAME, package.module:callable or a saved folder.",
    )


class Reading(Calibrated, Single):
    """One model and data, with calibration images."""
