"""From a target to a ratio: how far a plan is followed until the network is small or fast enough, or no further than
its accuracy allows.

Masks of a plan are nested, so FLOPs, parameters and size only fall: a bisection finds the fewest units whose removal
meets the target. Latency is bisected over GRID, and a ratio meets it where the interval's upper bound does. Accuracy
may fall and rise again: GRID is gone along until the first ratio that is not shown to lose little enough
(`stats.shown_up_to`, as for what counts as lossless), on images that neither calibrated nor are reported on.
"""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from sukashi.core import progress, stats
from sukashi.core.errors import UsageError
from sukashi.core.types import Mask, Plan
from sukashi.criteria import pruning
from sukashi.data import Split
from sukashi.experiments.bench import Bench
from sukashi.experiments.prune.settings import Prune
from sukashi.measures import accuracy, cost
from sukashi.network import surgery
from sukashi.report import words

GRID = tuple(round(0.02 * step, 2) for step in range(1, 50))
FIGURES: Mapping[str, tuple[str, Callable[[nn.Module, Tensor], int]]] = {
    "target_flops": ("FLOPs", cost.flops),
    "target_params": ("parameters", lambda model, example: cost.n_parameters(model)),
    "target_size": ("file size", lambda model, example: cost.n_bytes(model)),
}


class Search:
    """What is searched along a plan of a bench's network, for the target of some settings."""

    def __init__(self, setting: Bench, settings: Prune, round_to: int, batch: Tensor) -> None:
        assert settings.target is not None
        self.name, self.asked = settings.target
        self.setting, self.settings, self.round_to, self.batch = setting, settings, round_to, batch

    def check(self) -> None:
        """Refuse, before a criterion works, what no plan can reach. Raises UsageError."""
        if self.name == "max_drop":
            self._held_out()
            return
        sites = self.setting.sites
        some = Plan.build(sites, [(s, u) for s, site in enumerate(sites) for u in range(site.n_units)], method="")
        most = some.n_removable / some.n_units
        if self.name == "target_latency":
            of = self._time(self._cut(some, most))
            if of["high"] > self.asked:
                raise self._unreachable(f"takes {_told(of)} of the dense network's time")
            return
        noun, figure = FIGURES[self.name]
        model = self.setting.loaded.model
        dense, least = figure(model, self.batch), figure(self._cut(some, most), self.batch)
        if dense <= self._limit(dense):
            raise UsageError(
                f"{self._said()} is met by the dense network ({noun}: {_printed(self.name, dense)}): ask for less"
            )
        if least > self._limit(dense):
            raise self._unreachable(f"leaves {_printed(self.name, least, dense)}")

    def ratio(self, plan: Plan, journal: MutableMapping[str, Any]) -> tuple[float, dict[str, Any]]:
        """The ratio at which the target is met, and what was reached there."""
        match self.name:
            case "target_latency":
                return self._by_latency(plan, journal)
            case "max_drop":
                return self._by_accuracy(plan)
            case _:
                return self._by_figure(plan)

    def _by_figure(self, plan: Plan) -> tuple[float, dict[str, Any]]:
        """The fewest units whose removal meets the target; that of all does, `check` says."""
        _, figure = FIGURES[self.name]
        dense = figure(self.setting.loaded.model, self.batch)

        def left(n_removed: int) -> int:
            return figure(self._cut(plan, n_removed / plan.n_units), self.batch)

        found = bisect_left(range(plan.n_removable), True, key=lambda n: left(n) <= self._limit(dense))
        reached = left(found)
        return found / plan.n_units, {"reached": reached if self.name == "target_size" else reached / dense}

    def _by_latency(self, plan: Plan, journal: MutableMapping[str, Any]) -> tuple[float, dict[str, Any]]:
        """The smallest ratio of GRID by bisection that is shown to be fast enough, each timed once.

        The journal keeps what the clock said, so that a search that was killed goes on with the same numbers.
        """
        ratios = [*self._distinct(plan), plan.n_removable / plan.n_units]

        def timed(ratio: float) -> dict[str, float]:
            key = f"{self.name} {ratio}"
            if key not in journal:
                journal[key] = self._time(self._cut(plan, ratio))
            return dict(journal[key])

        at = bisect_left(ratios, True, key=lambda ratio: timed(ratio)["high"] <= self.asked)
        if at == len(ratios):
            raise self._unreachable(f"takes {_told(timed(ratios[-1]))} of the dense network's time")
        of = timed(ratios[at])
        return ratios[at], {
            "reached": of["factor"],
            "low": of["low"],
            "high": of["high"],
            "batch_size": len(self.batch),
        }

    def _by_accuracy(self, plan: Plan) -> tuple[float, dict[str, Any]]:
        """The last ratio of GRID up to which every one is shown to lose at most what was asked."""
        split = self._held_out()
        images = split.whole(self.setting.loaded.preprocess, self.setting.source.workers)
        dense, _ = accuracy.evaluate(self.setting.loaded.model, images)
        ratios, gained, lost = self._distinct(plan), list[int](), list[int]()
        if not ratios:
            raise UsageError(
                f"{self._said()} can't be looked for: with widths rounded up to multiples of {self.round_to} no ratio "
                "removes a unit; give a smaller `round_to`, 1 for exact ratios"
            )
        with progress.task(self.name, len(ratios)) as task:
            for ratio in ratios:
                right, _ = accuracy.evaluate(self._cut(plan, ratio), images)
                change = right.astype(np.int8) - dense.astype(np.int8)
                gained.append(int((change > 0).sum()))
                lost.append(int((change < 0).sum()))
                task.advance(note=f"ratio {ratio:.2f}, accuracy {right.mean():.3f}")
                if stats.shown_up_to(gained, lost, len(images), self.asked) < len(gained):
                    break
        n_shown = stats.shown_up_to(gained, lost, len(images), self.asked)
        if not n_shown:
            raise UsageError(
                f"{self._said()} is not shown at any ratio: without {ratios[0]:.1%} of its units the network gets "
                f"{lost[0]} of {len(images):,} images wrong that it had right and {gained[0]} right that it had wrong; "
                "allow more, or take another criterion"
            )
        at = n_shown - 1
        of = {"images": split.name, "n_images": len(images), "gained": gained[at], "lost": lost[at]}
        return ratios[at], {"reached": (lost[at] - gained[at]) / len(images), **of}

    def _held_out(self) -> Split:
        """The images that a drop is shown on: the val split, or else training images that do not calibrate.

        Of those the first are what a training of ours holds out by `Split.validation`, and never learned from.
        """
        data, at_most = self.setting.data, self.setting.source.test_images
        if data.val is not None:
            found = data.val.limit(at_most)
        else:
            batch = self.setting.calibration(self.settings.seed, self.settings.sampling)
            used = set(batch.image_id)
            train, groups = data.train, data.train.groups
            if groups is not None:  # whoever calibrates is not judged by another image
                taken = {group for name, group in zip(train.image_ids, groups, strict=True) if name in used}
                used |= {name for name, group in zip(train.image_ids, groups, strict=True) if group in taken}
            rest = train.subset([row for row, name in enumerate(train.image_ids) if name not in used])
            found = rest if len(rest) <= at_most else rest.validation(at_most / len(rest))[1]
        least = stats.least_images(self.asked)
        if len(found) < least:
            raise UsageError(
                f"{self._said()} can't be shown on {len(found):,} images, as many as neither calibrate nor test, not "
                f"even by equal answers: {least:,} are needed; allow more, or give more `test_images` (their number is "
                "the bound here too) or fewer `calibration`"
            )
        return found

    def _distinct(self, plan: Plan) -> list[float]:
        """The ratios of GRID, each mask once: rounding gives several the same one."""
        found: dict[int, float] = {}
        for ratio in GRID:
            found.setdefault(self._mask(plan, ratio).n_removed, ratio)
        found.pop(0, None)
        return list(found.values())

    def _mask(self, plan: Plan, ratio: float) -> Mask:
        return pruning.round_mask(plan, ratio, self.round_to)

    def _cut(self, plan: Plan, ratio: float) -> nn.Module:
        model = copy.deepcopy(self.setting.loaded.model)
        surgery.MODES[self.settings.mode](model, self._mask(plan, ratio))
        return model

    def _time(self, model: nn.Module) -> dict[str, float]:
        found = stats.ratio(*cost.latency((self.setting.loaded.model, model), self.batch))
        return {"factor": found.mean, "low": found.low, "high": found.high}

    def _limit(self, dense: int) -> float:
        return self.asked if self.name == "target_size" else self.asked * dense

    def _said(self) -> str:
        asked = repr(words.printed(self.asked, "bytes")) if self.name == "target_size" else f"{self.asked:g}"
        return f"`{self.name}={asked}`"

    def _unreachable(self, extreme: str) -> UsageError:
        why = "one unit of each layer stays" if self.round_to == 1 else f"each layer keeps {self.round_to} units or all"
        remedy = "" if self.round_to == 1 else ", or `round_to=1`"
        return UsageError(
            f"{self._said()} can't be reached: the largest cut ({why}) {extreme}; ask for that or more{remedy}"
        )


def _printed(name: str, value: float, dense: float | None = None) -> str:
    if name == "target_size":
        return words.printed(value, "bytes")
    return words.printed(value, "count") if dense is None else f"{value / dense:.4f} of the dense network's"


def _told(of: Mapping[str, float]) -> str:
    return f"{of['factor']:.2f} ({of['low']:.2f} to {of['high']:.2f})"
