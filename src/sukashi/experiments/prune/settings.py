"""What a cut is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, field_validator, model_validator

from sukashi.core.errors import UsageError
from sukashi.core.schema import MAX_SEED, Ratio, option
from sukashi.experiments.concepts.settings import numbered
from sukashi.experiments.reading import Reading

# What says how much goes: `ratio` by itself, the others by a search along the plan.
TARGETS = ("target_flops", "target_params", "target_size", "target_latency", "max_drop")
_UNITS = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}


def n_bytes(size: str) -> int:
    """5MB is 5,000,000. Raises UsageError for what is no size."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kMG]?)B", size)
    if found is None or not float(found[1]):
        raise UsageError(
            f"`target_size` must be a size in B, kB, MB or GB like 5MB (1 MB = 1,000,000 bytes), got {size!r}"
        )
    return int(float(found[1]) * _UNITS[found[2]])


def _size(size: str) -> str:
    n_bytes(size)
    return size


class Prune(Reading):
    """Cut a model for real, or with `scope` make it sparse, and save it as a folder that `sukashi.load` rebuilds."""

    kind: ClassVar[str] = "prune"

    criterion: str = option(help="A name, see `sukashi list criteria`, or package.module:function of your own.")
    out: str = option(path=True, decides=False, help="Folder for the cut model; an interrupted prune is resumed.")
    ratio: Ratio | None = option(
        None, help="Fraction to remove of units, or with a scope of weights; in [0, 1). Or else one of these targets:"
    )
    target_flops: float | None = option(
        None,
        gt=0,
        lt=1,
        help="Remove as little as leaves at most this fraction of the dense network's FLOPs: 0.5, half.",
    )
    target_params: float | None = option(
        None, gt=0, lt=1, help="Remove as little as leaves at most this fraction of its parameters."
    )
    target_size: Annotated[str, AfterValidator(_size)] | None = option(
        None,
        examples=["5MB"],
        help="Remove as little as gives weights in a file of at most this size, as 5MB or 800kB.",
    )
    target_latency: float | None = option(
        None,
        gt=0,
        lt=1,
        help="Remove as little as is shown to take at most this fraction of its time: torch on this machine. A clock "
        "decides.",
    )
    target_batch: int | None = option(
        None, ge=1, default="32", help="Images at once whose time `target_latency` is about: 1 for a device."
    )
    max_drop: float | None = option(
        None,
        gt=0,
        lt=1,
        help="Remove as much as is shown to cost at most this accuracy, 0.01 for one point, on images "
        "of the val split, or else training images that did not calibrate.",
    )
    mode: Literal["cut", "zero"] = option(
        "cut", help="cut: layers get smaller. zero: units are silenced, shapes stay, shares are of units."
    )
    round_to: int | None = option(
        None, ge=1, default="8", help="Keep a multiple of this many units a site; 1 = exact ratio."
    )
    onnx: bool = option(False, decides=False, help="Write model.onnx too, checked in onnxruntime.")
    scope: str | None = option(
        None,
        help="Set single weights to zero instead, the lowest of: global (all), layer, row (one output's), or N:M "
        "(N of M inputs stay, as 2:4). Nothing gets smaller or faster.",
    )
    exclude: list[str] = option(
        [],
        help="Layers to leave alone, by name or pattern as 'blocks.*.fc1': their weights, or the sites that they make "
        "the units of.",
    )
    sequential: bool = option(False, help="With a scope: layer by layer, those before it already pruned.")
    seed: int = option(0, ge=0, le=MAX_SEED, help="Draws calibration images and random scores.")
    sampling: str = option("random", help="Calibration images: random, confidence or clustering.")
    repair: str = option(
        "none",
        help="Then mend the cut network by the calibration images, without labels: norm, refit, see `sukashi list "
        "repairs`.",
    )
    ablate: str | None = option(
        None,
        path=True,
        decides=False,
        help="Subspaces that the network is to do without: FOLDER, the `out` of `sukashi.concepts`, for those chosen "
        "there by `sukashi serve`, or FOLDER:0,2. `repair='refit'` then mends the cut towards the dense network with "
        "the mean in their place.",
    )
    options: dict[str, Any] = option({}, help="Options of the criterion.")

    @field_validator("criterion")
    @classmethod
    def _one(cls, criterion: str) -> str:
        if "," in re.sub(r"\[.*\]", "", criterion):
            raise UsageError(
                f"`criterion` is one, got {criterion!r}: give one of them, or `criteria` to `sukashi.compare`, which "
                "takes several"
            )
        return criterion

    @model_validator(mode="after")
    def _said_in_one_way(self) -> Self:
        given = [name for name in ("ratio", *TARGETS) if getattr(self, name) is not None]
        if len(given) != 1:
            known = ", ".join(f"`{name}`" for name in ("ratio", *TARGETS))
            told = " and ".join(f"`{name}`" for name in given) if given else "nothing that says it"
            raise UsageError(f"how much goes is said by one of {known}, got {told}: give one")
        if self.target_batch is not None and self.target_latency is None:
            raise UsageError("`target_batch` is about the time of `target_latency`: give that too, or leave it out")
        return self

    @property
    def ablated(self) -> tuple[str, tuple[int, ...] | None] | None:
        """The folder of `ablate`, and the numbers of its subspaces, None for those chosen in it."""
        if self.ablate is None:
            return None
        whole = ":" not in self.ablate or Path(self.ablate).is_dir()
        return (self.ablate, None) if whole else numbered("ablate", self.ablate)

    @property
    def target(self) -> tuple[str, float] | None:
        """What is searched for in place of a ratio: its name, and what was asked, a fraction or bytes."""
        name = next((name for name in TARGETS if getattr(self, name) is not None), None)
        if name is None:
            return None
        asked = getattr(self, name)
        return name, n_bytes(asked) if name == "target_size" else asked
