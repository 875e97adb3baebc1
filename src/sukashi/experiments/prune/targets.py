"""From a target to a ratio: how far a plan is followed until the network is small or fast enough, or no further than
its accuracy allows. A target is one value in BY_SETTING: how it is measured, compared and told.

Masks of a plan are nested, so FLOPs, parameters and size only fall: a bisection finds the fewest units whose removal
meets the target. Latency is bisected over GRID, and a ratio meets it where the interval's upper bound does. Accuracy
may fall and rise again: GRID is gone along until the first ratio that is not shown to lose little enough
(`stats.shown_up_to`, as for what counts as lossless), on images that neither calibrated nor are reported on.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from sukashi.core import progress, stats
from sukashi.core.errors import UsageError
from sukashi.core.types import Batch, Mask, Plan, Site
from sukashi.criteria.plans import round_mask
from sukashi.data.splits import Split  # and not of all that reads data: this file's code is in keys
from sukashi.measures import accuracy, cost
from sukashi.network import surgery
from sukashi.repairs import Mend
from sukashi.report import words

GRID = tuple(round(0.02 * step, 2) for step in range(1, 50))


@dataclass(frozen=True)
class Search:
    """What a target is looked for among: a network, and how it is cut along a plan of its `sites`.

    `batch` (B, C, H, W) is what figures and time are measured on. `held_out` gives the images that a drop is shown on,
    `read` those of a split as the network sees them; `mend` repairs what is cut.
    """

    name: str
    asked: float
    model: nn.Module
    sites: Sequence[Site]
    batch: Tensor
    mode: str
    round_to: int
    held_out: Callable[[], Split]
    read: Callable[[Split], Batch]
    mend: Mend | None = None

    def check(self) -> None:
        """Refuse, before a criterion works, what no plan can reach. Raises UsageError."""
        BY_SETTING[self.name].check(self)

    def ratio(self, plan: Plan, journal: MutableMapping[str, Any]) -> tuple[float, dict[str, Any]]:
        """The ratio at which the target is met, and what was reached there.

        The journal keeps what a clock said, so that a search that was killed goes on with the same numbers. Raises
        UsageError where no ratio meets it.
        """
        return BY_SETTING[self.name].ratio(self, plan, journal)

    @property
    def said(self) -> str:
        """The target as it was asked for."""
        return f"`{self.name}={BY_SETTING[self.name].printed(self.asked)}`"

    def mask(self, plan: Plan, ratio: float) -> Mask:
        return round_mask(plan, ratio, self.round_to)

    def cut(self, plan: Plan, ratio: float, *, mended: bool = False) -> nn.Module:
        """The network at a ratio; `mended` where its weights matter too."""
        model = copy.deepcopy(self.model)
        table = surgery.MODES[self.mode](model, self.mask(plan, ratio))
        if mended and self.mend is not None:
            self.mend(model, table)
        return model

    def largest(self) -> nn.Module:
        """The network without all that any plan can remove."""
        units = [(s, u) for s, site in enumerate(self.sites) for u in range(site.n_units)]
        some = Plan.build(self.sites, units, method="")
        return self.cut(some, some.n_removable / some.n_units)

    def distinct(self, plan: Plan) -> list[float]:
        """The ratios of GRID, each mask once: rounding gives several the same one."""
        found: dict[int, float] = {}
        for ratio in GRID:
            found.setdefault(self.mask(plan, ratio).n_removed, ratio)
        found.pop(0, None)
        return list(found.values())

    def timed(self, model: nn.Module) -> dict[str, float]:
        """How long a network takes, as a fraction of the dense one's time, and its 95 % interval."""
        found = stats.ratio(*cost.latency((self.model, model), self.batch))
        return {"factor": found.mean, "low": found.low, "high": found.high}

    def unreachable(self, extreme: str) -> UsageError:
        why = "one unit of each layer stays" if self.round_to == 1 else f"each layer keeps {self.round_to} units or all"
        remedy = "" if self.round_to == 1 else ", or `round_to=1`"
        return UsageError(
            f"{self.said} can't be reached: the largest cut ({why}) {extreme}; ask for that or more{remedy}"
        )


class Target(ABC):
    """What a ratio is found for. `of_shape` says whether only what changes a network's shape changes it."""

    of_shape = True

    @abstractmethod
    def check(self, search: Search) -> None:
        """Refuse what no plan can reach."""

    @abstractmethod
    def ratio(self, search: Search, plan: Plan, journal: MutableMapping[str, Any]) -> tuple[float, dict[str, Any]]:
        """The ratio at which it is met, and what was `reached` there."""

    @abstractmethod
    def told(self, found: Mapping[str, Any]) -> str:
        """What was reached, and what was asked, in a sentence without its end."""

    def printed(self, asked: float) -> str:
        """What was asked, as options say it."""
        return f"{asked:g}"

    def doubts(self, found: Mapping[str, Any], training: str) -> list[str]:
        """What was reached and does not show on new images, where the split `training` is what may be learned from."""
        return []


@dataclass(frozen=True)
class Share(Target):
    """A figure of a network, asked for as a fraction of the dense one's."""

    noun: str
    figure: Callable[[nn.Module, Tensor], int]

    def limit(self, asked: float, dense: int) -> float:
        """The most that meets the target."""
        return asked * dense

    def reached(self, value: int, dense: int) -> float:
        return value / dense

    def shown(self, value: int) -> str:
        """A figure for people."""
        return words.printed(value, "count")

    def beside(self, value: int, dense: int) -> str:
        """What is left, beside the dense network."""
        return f"{value / dense:.4f} of the dense network's"

    def check(self, search: Search) -> None:
        dense, least = self.figure(search.model, search.batch), self.figure(search.largest(), search.batch)
        if dense <= self.limit(search.asked, dense):
            raise UsageError(
                f"{search.said} is met by the dense network ({self.noun}: {self.shown(dense)}): ask for less"
            )
        if least > self.limit(search.asked, dense):
            raise search.unreachable(f"leaves {self.beside(least, dense)}")

    def ratio(self, search: Search, plan: Plan, journal: MutableMapping[str, Any]) -> tuple[float, dict[str, Any]]:
        """The fewest units whose removal meets the target; that of all does, `check` says."""
        dense = self.figure(search.model, search.batch)

        def left(n_removed: int) -> int:
            return self.figure(search.cut(plan, n_removed / plan.n_units), search.batch)

        limit = self.limit(search.asked, dense)
        found = bisect_left(range(plan.n_removable), True, key=lambda n: left(n) <= limit)
        return found / plan.n_units, {"reached": self.reached(left(found), dense)}

    def told(self, found: Mapping[str, Any]) -> str:
        reached, asked = words.percent(found["reached"]), words.percent(found["asked"])
        return f"{_capital(self.noun)}: {reached} of the dense network's (asked: at most {asked})"


class Size(Share):
    """A figure in bytes, asked for as such."""

    def limit(self, asked: float, dense: int) -> float:
        return asked

    def reached(self, value: int, dense: int) -> float:
        return value

    def shown(self, value: float) -> str:
        return words.printed(value, "bytes")

    def beside(self, value: int, dense: int) -> str:
        return self.shown(value)

    def printed(self, asked: float) -> str:
        return repr(self.shown(asked))

    def told(self, found: Mapping[str, Any]) -> str:
        return f"{_capital(self.noun)}: {self.shown(found['reached'])} (asked: at most {self.shown(found['asked'])})"


class Latency(Target):
    """A fraction of the dense network's time, shown by the upper bound of its interval."""

    def check(self, search: Search) -> None:
        of = search.timed(search.largest())
        if of["high"] > search.asked:
            raise self._unreachable(search, of)

    def ratio(self, search: Search, plan: Plan, journal: MutableMapping[str, Any]) -> tuple[float, dict[str, Any]]:
        """The smallest ratio of GRID by bisection that is shown to be fast enough, each timed once."""
        ratios = [*search.distinct(plan), plan.n_removable / plan.n_units]

        def timed(ratio: float) -> dict[str, float]:
            key = f"{search.name} {ratio}"
            if key not in journal:
                journal[key] = search.timed(search.cut(plan, ratio))
            return dict(journal[key])

        at = bisect_left(ratios, True, key=lambda ratio: timed(ratio)["high"] <= search.asked)
        if at == len(ratios):
            raise self._unreachable(search, timed(ratios[-1]))
        of = timed(ratios[at])
        found = {"reached": of["factor"], "low": of["low"], "high": of["high"], "batch_size": len(search.batch)}
        return ratios[at], found

    def told(self, found: Mapping[str, Any]) -> str:
        reached, low, high, asked = (words.percent(found[name]) for name in ("reached", "low", "high", "asked"))
        return (
            f"Latency: {reached} ({low} to {high}) of the dense network's in the search, {found['batch_size']} images "
            f"at once (asked: at most {asked})"
        )

    def doubts(self, found: Mapping[str, Any], training: str) -> list[str]:
        if found["reached"] > 0.9 * found["asked"]:
            return []
        reached, asked = words.percent(found["reached"]), words.percent(found["asked"])
        return [
            f"the cut takes {reached} of the dense network's time where {asked} would do: no smaller one was shown to "
            "be fast enough, by times that vary on a machine that does other work; a `ratio` says how much goes itself"
        ]

    def _unreachable(self, search: Search, of: Mapping[str, float]) -> UsageError:
        took = f"{of['factor']:.2f} ({of['low']:.2f} to {of['high']:.2f})"
        return search.unreachable(f"takes {took} of the dense network's time")


class Drop(Target):
    """The accuracy that a cut may cost at most, which is shown on images that neither calibrate nor test."""

    of_shape = False

    def check(self, search: Search) -> None:
        self._held_out(search)

    def ratio(self, search: Search, plan: Plan, journal: MutableMapping[str, Any]) -> tuple[float, dict[str, Any]]:
        """The last ratio of GRID up to which every one is shown to lose at most what was asked."""
        split = self._held_out(search)
        images = search.read(split)
        dense, _ = accuracy.evaluate(search.model, images)
        ratios, gained, lost = search.distinct(plan), list[int](), list[int]()
        if not ratios:
            raise UsageError(
                f"{search.said} can't be looked for: with widths rounded up to multiples of {search.round_to} no ratio "
                "removes a unit; give a smaller `round_to`, 1 for exact ratios"
            )
        with progress.task(search.name, len(ratios)) as task:
            for ratio in ratios:
                right, _ = accuracy.evaluate(search.cut(plan, ratio, mended=True), images)
                change = right.astype(np.int8) - dense.astype(np.int8)
                gained.append(int((change > 0).sum()))
                lost.append(int((change < 0).sum()))
                task.advance(note=f"ratio {ratio:.2f}, accuracy {right.mean():.3f}")
                if stats.shown_up_to(gained, lost, len(images), search.asked) < len(gained):
                    break
        n_shown = stats.shown_up_to(gained, lost, len(images), search.asked)
        if not n_shown:
            raise UsageError(
                f"{search.said} is not shown at any ratio: without {ratios[0]:.1%} of its units the network gets "
                f"{lost[0]} of {len(images):,} images wrong that it had right and {gained[0]} right that it had wrong; "
                "allow more, or take another criterion"
            )
        at = n_shown - 1
        of = {"images": split.name, "n_images": len(images), "gained": gained[at], "lost": lost[at]}
        return ratios[at], {"reached": (lost[at] - gained[at]) / len(images), **of}

    def told(self, found: Mapping[str, Any]) -> str:
        return (
            f"Accuracy: shown to be at most {words.points(found['asked'])} lower on {found['n_images']:,} "
            f"{found['images']} images that neither calibrated nor are reported on ({found['lost']} lost, "
            f"{found['gained']} gained; Tango's test, one-sided 97.5%), and at every smaller ratio in steps of 0.02"
        )

    def doubts(self, found: Mapping[str, Any], training: str) -> list[str]:
        if found["images"] != training:
            return []
        return [
            f"the images that `{found['name']}` was shown on are of the training split: a network that has learned "
            "them may lose more on new ones, so its accuracy on the test images counts"
        ]

    def _held_out(self, search: Search) -> Split:
        found, least = search.held_out(), stats.least_images(search.asked)
        if len(found) < least:
            raise UsageError(
                f"{search.said} can't be shown on {len(found):,} images, as many as neither calibrate nor test, not "
                f"even by equal answers: {least:,} are needed; allow more, or give more `test_images` (their number is "
                "the bound here too) or fewer `calibration`"
            )
        return found


BY_SETTING: Mapping[str, Target] = {
    "target_flops": Share("FLOPs", cost.flops),
    "target_params": Share("parameters", lambda model, example: cost.n_parameters(model)),
    "target_size": Size("file size", lambda model, example: cost.n_bytes(model)),
    "target_latency": Latency(),
    "max_drop": Drop(),
}


def unused(train: Split, used: Collection[str], at_most: int) -> Split:
    """Training images that are not among the ids `used`, and of whose groups none is.

    Those that a training of ours holds out by `Split.validation`, and never learns from, are the first of them.
    """
    taken = set(used)
    if train.groups is not None:  # whoever calibrates is not judged by another image
        groups = {group for name, group in zip(train.image_ids, train.groups, strict=True) if name in taken}
        taken |= {name for name, group in zip(train.image_ids, train.groups, strict=True) if group in groups}
    rest = train.subset([row for row, name in enumerate(train.image_ids) if name not in taken])
    return rest if len(rest) <= at_most else rest.validation(at_most / len(rest))[1]


def _capital(noun: str) -> str:
    return noun[0].upper() + noun[1:]
