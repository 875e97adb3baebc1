"""How far long work is, for people who wait: bars on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from sukashi.core import progress
from sukashi.core.progress import Listener, Task
from sukashi.report import words

log = Console(stderr=True)  # one for bars and messages, so that neither draws over the other
# Seconds: where progress is not drawn, a line says first after FIRST_LINE and then every LINE how far the work is; what
# is left is not told before ESTIMATE, for the first things done take as long as it takes to start.
FIRST_LINE, LINE, ESTIMATE = 10.0, 30.0, 2.0


@contextmanager
def shown() -> Iterator[None]:
    """Work inside shows how far it is where somebody looks: on a terminal or in a notebook, unless somebody listens
    already. A script whose stderr is a file stays silent."""
    in_notebook = "ipykernel" in sys.modules
    if progress.is_heard() or not progress.first() or not (in_notebook or sys.stderr.isatty()):
        yield
        return
    with lines() if in_notebook else bars() as listener, progress.listening(listener):
        yield


@contextmanager
def bars() -> Iterator[Listener]:
    """Tasks as bars on a terminal."""
    bars = Progress(
        TextColumn("{task.description}", markup=False),  # a name may look like markup
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=log,
        transient=True,
        speed_estimate_period=600,  # a trial takes minutes
    )

    @contextmanager
    def listener(title: str, total: int) -> Iterator[Task]:
        bar = bars.add_task(title, total=total, note="")
        try:
            yield _Bar(bars, bar)
        finally:
            bars.remove_task(bar)

    with bars:
        yield listener


class _Bar:
    def __init__(self, bars: Progress, bar: TaskID) -> None:
        self.bars, self.bar = bars, bar

    def advance(self, n: int = 1, note: str = "") -> None:
        self.bars.update(self.bar, advance=n, note=note)


@contextmanager
def lines() -> Iterator[Listener]:
    """Tasks as a plain line now and then, so that a log file shows life."""
    yield _Lines().task


class _Lines:
    def __init__(self) -> None:
        self.open: list[_Line] = []
        self.due = time.monotonic() + FIRST_LINE

    @contextmanager
    def task(self, title: str, total: int) -> Iterator[Task]:
        self.open.append(_Line(self, title, total))
        try:
            yield self.open[-1]
        finally:
            self.open.pop()

    def say(self) -> None:
        if time.monotonic() >= self.due:
            self.due = time.monotonic() + LINE
            print(f"sukashi: {'; '.join(map(str, self.open))}", file=sys.stderr, flush=True)


class _Line:
    def __init__(self, lines: _Lines, title: str, total: int) -> None:
        self.lines, self.title, self.total = lines, title, total
        self.done, self.note, self.start = 0, "", time.monotonic()

    def advance(self, n: int = 1, note: str = "") -> None:
        self.done += n
        self.note = note
        self.lines.say()

    def __str__(self) -> str:
        said = [f"{self.title} {self.done}" + (f"/{self.total}" if self.total else "")]
        if self.note:
            said.append(self.note)
        taken = time.monotonic() - self.start
        if self.done and self.total and taken >= ESTIMATE:
            left = taken / self.done * (self.total - self.done)
            said.append(f"about {words.duration(left)} left")
        return ", ".join(said)
