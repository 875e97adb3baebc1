"""What a comparison of criteria is."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from sukashi.core.schema import MAX_SEEDS, Ratio, Seeds, Settings, option
from sukashi.experiments.reading import OPTIONS, Reading

RATIOS = [round(0.05 * i, 2) for i in range(20)]


class Contest(Settings):
    """Criteria, and how they are held against each other."""

    criteria: list[str] = option(
        joined=True,
        examples=[["magnitude"]],
        help="Names, see `sukashi list criteria`, or package.module:function of your own.",
    )
    ratios: list[Ratio] = option(RATIOS, help="Fractions of units removed.")
    seeds: Seeds = option(3, ge=1, le=MAX_SEEDS, help="Number of seeds, counted from 0.")
    sampling: list[str] = option(
        ["random"], joined=True, help="Calibration images: random, confidence, clustering or several of them."
    )
    repair: list[str] = option(
        ["none"],
        joined=True,
        help="What mends each cut, without labels: norm, refit, see `sukashi list repairs`; the cut as it is competes "
        "too.",
    )
    exclude: list[str] = option([], help="Layers whose sites are left alone, by name or pattern as 'blocks.*.fc1'.")
    mode: Literal["cut", "zero"] = option(
        "cut", help="cut: layers get smaller. zero: units are silenced, shapes stay, shares are of units."
    )
    margin: float = option(
        0.01,
        gt=0,
        lt=1,
        decides=False,
        help="How much lower accuracy may be where a cut is said to be shown to cost no more: 0.01 for one point.",
    )
    options: dict[str, dict[str, Any]] = option({}, help=OPTIONS)


class Compare(Contest, Reading):
    """Compare criteria: accuracy against the fraction of parameters removed, over seeds, with SAUCE and a report."""

    kind: ClassVar[str] = "compare"
    shared: ClassVar[bool] = True
    grows: ClassVar[frozenset[str]] = frozenset({"criteria", "seeds", "sampling", "repair", "options"})

    out: str = option(path=True, decides=False, help="Folder for results; an interrupted comparison is resumed.")
    skip_refused: bool = option(
        False, decides=False, help="Leave criteria that refuse the model out, and say why; else they stop everything."
    )
