"""What people see while a command works: progress, one-line errors and warnings, JSON."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from sukashi.core import progress
from sukashi.core.errors import ResourceError, SukashiError
from sukashi.core.experiment import NOTE, finite
from sukashi.experiments.kinds import spelled
from sukashi.report.waiting import bars, lines, log

warned: set[str] = set()  # what this run of the command line has warned of


@contextmanager
def working(spelled: Callable[[str], str] = spelled) -> Iterator[None]:
    """Work inside shows its progress and warnings on stderr, and what stops it becomes one sentence there and an exit
    code. `spelled` says in them what settings are called by this command.
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
        with (
            warnings.catch_warnings(),
            bars() if sys.stderr.isatty() else lines() as listener,
            progress.listening(listener),
        ):
            warnings.showwarning = lambda message, *where, **more: warn(message, spelled)
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
        remedy = "fewer `calibration` images, a smaller `batch_size` or a smaller model"
        stop(spelled(f"out of memory; give {remedy}"), ResourceError.exit_code)


def stop(message: str, exit_code: int) -> NoReturn:
    say(message, style="red")
    raise typer.Exit(exit_code)


def say(message: str, style: str | None = None) -> None:
    """One line on stderr."""
    log.print(f"sukashi: {' '.join(message.split())}", style=style, markup=False, highlight=False, soft_wrap=True)


def warn(message: object, spelled: Callable[[str], str]) -> None:
    """A warning on stderr, the first time."""
    told = " ".join(str(message).split())
    if told not in warned:
        warned.add(told)
        say(f"warning: {spelled(told)}")


def unsaid(text: str) -> str:
    """What a result has to say, without the notes that were warned of already."""
    return "\n".join(line for line in text.splitlines() if re.sub("^(note|warning): ", "", line) not in warned)


def to_stdout(table: Table) -> None:
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def show_text(text: str) -> None:
    """What a command found; on a terminal notes are dim and warnings yellow."""
    styles = {NOTE: "dim", "warning: ": "yellow"} if sys.stdout.isatty() else {}
    console = Console()
    for line in text.splitlines():
        style = next((style for start, style in styles.items() if line.startswith(start)), None)
        if style is None:
            print(line)
        else:
            console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)


def print_json(result: dict[str, Any]) -> None:
    print(json.dumps(finite(result), allow_nan=False))


def command() -> str:
    """This command line as it can be given again: in its folder, and with what Python finds modules by."""
    program = ["python", "-m", "sukashi"] if Path(sys.argv[0]).name == "__main__.py" else ["sukashi"]
    path = os.environ.get("PYTHONPATH")
    where = f"PYTHONPATH={shlex.quote(path)} " if path else ""
    return f"cd {shlex.quote(os.getcwd())} && {where}{shlex.join([*program, *sys.argv[1:]])}"
