"""What a cut is."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from sukashi.core.schema import MAX_SEED, Ratio, option
from sukashi.experiments.reading import Reading


class Prune(Reading):
    """Cut a model for real, or with --scope make it sparse, and save it as a folder that `sukashi.load` rebuilds."""

    kind: ClassVar[str] = "prune"

    criterion: str = option(help="A name, see `sukashi list criteria`, or package.module:function of your own.")
    ratio: Ratio = option(help="Fraction to remove of units, or with a scope of weights; in [0, 1).")
    out: str = option(path=True, decides=False, help="Folder for the cut model; an interrupted prune is resumed.")
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
    exclude: list[str] = option([], help="A layer to leave alone: its weights, or the site that it makes the units of.")
    sequential: bool = option(False, help="With a scope: layer by layer, those before it already pruned.")
    seed: int = option(0, ge=0, le=MAX_SEED, help="Draws calibration images and random scores.")
    sampling: str = option("random", help="Calibration images: random, confidence or clustering.")
    options: dict[str, Any] = option({}, help="Options of the criterion.")
