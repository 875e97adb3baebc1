"""Schedules: from which network each level starts, and with which weights it is trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from sukashi.core.errors import UsageError, nearest


@dataclass(frozen=True)
class Schedule:
    """`parent` is what a level prunes further: the dense network, or the level before. One that `rewinds` gives what
    is left the weights it had before training, or early in it, and trains it as the dense network was; the others
    fine-tune.
    """

    name: str
    summary: str
    source: str
    parent: Literal["dense", "previous"]
    rewinds: bool


class Schedules:
    """The schedules there are, by name."""

    def __init__(self, *schedules: Schedule) -> None:
        self._schedules = {schedule.name: schedule for schedule in schedules}

    def __getitem__(self, name: str) -> Schedule:
        if name not in self._schedules:
            raise UsageError(f"unknown schedule {name!r}{nearest(name, self._schedules)}")
        return self._schedules[name]

    def __iter__(self) -> Iterator[Schedule]:
        return iter(self._schedules.values())

    def about(self, name: str) -> dict[str, Any]:
        """A schedule whole; it has no options."""
        schedule = self[name]
        return {"name": name, "documentation": schedule.summary, "source": schedule.source, "options": {}}


SCHEDULES = Schedules(
    Schedule(
        "oneshot",
        "Each ratio from the dense network: prune at once, fine-tune.",
        "Han et al. 2015, one step; Zhang 2026 (IMPACT), sec. 3.1",
        parent="dense",
        rewinds=False,
    ),
    Schedule(
        "iterative",
        "Each ratio from the one before: prune further, fine-tune.",
        "Han et al. 2015, sec. 3.4",
        parent="previous",
        rewinds=False,
    ),
    Schedule(
        "lottery",
        "Each ratio from the one before: prune further, rewind what is left, train it as the dense network was.",
        "Frankle & Carbin 2019, sec. 2; Suwal et al. 2025, sec. 3.1",
        parent="previous",
        rewinds=True,
    ),
)
