"""What people see while a command works: progress, one-line errors and warnings, JSON."""

from __future__ import annotations

import json
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import typer
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
from rich.table import Table

from sukashi.core import progress
from sukashi.core.errors import ResourceError, SukashiError
from sukashi.core.experiment import finite
from sukashi.report import words

if TYPE_CHECKING:
    from sukashi.core.progress import Listener, Task

log = Console(stderr=True)
# Seconds: where progress is not drawn, a line says first after FIRST_LINE and then every LINE how far the work is.
FIRST_LINE, LINE = 10.0, 30.0
warned: set[str] = set()  # what this run of the command line has warned of


@contextmanager
def working(spelled: Callable[[str], str] = str) -> Iterator[None]:
    """Work inside shows its progress on stderr, and what stops it becomes one sentence there and an exit code.

    `spelled` names settings in it as the options of this command.
    """
    if not progress.first():
        # The first process of a training says what all of them find, unless another one took that on.
        try:
            yield
        except SukashiError as error:
            if error.alone:
                stop(spelled(str(error)), error.exit_code)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        return
    try:
        with _bars() if sys.stderr.isatty() else _lines() as listener, progress.listening(listener):
            yield
    except SukashiError as error:
        stop(spelled(str(error)), error.exit_code)
    except KeyboardInterrupt:
        stop("interrupted; give the same command again, it goes on from where it was", 130)
    except OSError as error:
        stop(f"{error.filename or 'a file'}: {error.strerror or error}; check its path and rights", 5)
    except (MemoryError, RuntimeError) as error:
        # torch has no class of its own for a computer without memory.
        if (
            not isinstance(error, MemoryError)
            and "out of memory" not in str(error)
            and "can't allocate" not in str(error)
        ):
            raise
        stop(
            "out of memory; give fewer --calibration images, a smaller --batch-size or a smaller model",
            ResourceError.exit_code,
        )


def stop(message: str, exit_code: int) -> NoReturn:
    say(message, style="red")
    raise typer.Exit(exit_code)


def say(message: str, style: str | None = None) -> None:
    """One line on stderr."""
    log.print(f"sukashi: {' '.join(message.split())}", style=style, markup=False, highlight=False, soft_wrap=True)


def warn(message: object) -> None:
    """A warning on stderr, the first time."""
    told = " ".join(str(message).split())
    if told not in warned:
        warned.add(told)
        say(f"warning: {told}")


def unsaid(text: str) -> str:
    """What a result has to say, without the notes that were warned of already."""
    return "\n".join(line for line in text.splitlines() if re.sub("^(note|warning): ", "", line) not in warned)


@contextmanager
def _bars() -> Iterator[Listener]:
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
def _lines() -> Iterator[Listener]:
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
            say("; ".join(map(str, self.open)))


class _Line:
    def __init__(self, lines: _Lines, title: str, total: int) -> None:
        self.lines, self.title, self.total = lines, title, total
        self.done, self.note, self.start = 0, "", time.monotonic()

    def advance(self, n: int = 1, note: str = "") -> None:
        self.done += n
        self.note = note
        self.lines.say()

    def __str__(self) -> str:
        said = [f"{self.title} {self.done}/{self.total}"]
        if self.note:
            said.append(self.note)
        if self.done:
            left = (time.monotonic() - self.start) / self.done * (self.total - self.done)
            said.append(f"about {words.duration(left)} left")
        return ", ".join(said)


def to_stdout(table: Table) -> None:
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def print_json(result: dict[str, Any]) -> None:
    print(json.dumps(finite(result), allow_nan=False))


def command() -> str:
    return shlex.join(["sukashi", *sys.argv[1:]])
