"""How models and data are named and read: the fields that every experiment shares."""

from __future__ import annotations

from typing import Literal

from sukashi.core.schema import Settings, option

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


class Images(Settings):
    """Data, and how much of them is read."""

    data: str = option(examples=["digits"], help="digits, shapes, torchvision:NAME, or a folder of images.")
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
    max_pixels: int = option(64_000_000, help="Pixels an image may have.")
    test_images: int = option(2000, help="Test images at most, evenly over the classes.")
    device: Literal["auto", "cpu", "cuda"] = option("auto", decides=False, help="auto, cpu or cuda.")
    workers: int = option(0, ge=0, le=1024, decides=False, help="Threads that decode images.")


class Opening(Images, Architecture):
    """How models and data are opened."""


class Calibrated(Settings):
    """For what looks at calibration images."""

    calibration: int = option(32, ge=1, help="Calibration images a class, from the training split.")


class Single(Opening):
    """One model and data."""

    model: str = option(
        argument=True,
        help="sukashi:NAME, timm:NAME, torchvision:NAME, package.module:callable or a saved folder.",
    )


class Reading(Calibrated, Single):
    """One model and data, with calibration images."""
