"""Errors a user can cause: one sentence each (value, rule, remedy), and the exit code the command line gives them."""

from __future__ import annotations

import difflib
import errno
import importlib
import re
import sysconfig
import traceback
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

# Characters of a message that are shown: its beginning, and its end, which has the remedy.
_FIRST, _LAST = 1500, 500
_SUKASHI = str(Path(__file__).parents[1])
_LIBRARIES = tuple(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))
_LISTED = 30  # known names that are named one by one


class SukashiError(ValueError):
    """A case that cannot be done right; the message names the value, the rule and the remedy."""

    exit_code = 1
    alone = False  # whether this process of a training says it, and no other

    def __init__(self, message: str) -> None:
        super().__init__(message if len(message) <= _FIRST + _LAST else f"{message[:_FIRST]}...{message[-_LAST:]}")


class UsageError(SukashiError):
    """A wrong argument, option or configuration."""

    exit_code = 2


class DataError(SukashiError):
    """Images, labels or splits that break a rule."""

    exit_code = 3


class ModelError(SukashiError):
    """A model, its weights or its recipe that breaks a rule."""

    exit_code = 4


class ResourceError(SukashiError):
    """No memory, no disk, or a folder another process holds."""

    exit_code = 5


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside, an OSError becomes a ResourceError that says what stands in the way of writing `path`."""
    try:
        yield
    except OSError as error:
        what = "no space left" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)
        raise ResourceError(
            f"cannot write {path}: {what}; put that right or give another place, and run the same command again: "
            "what is finished is kept"
        ) from error


def brief(error: BaseException) -> str:
    """The kind and first line of somebody else's error, without a terminal's colours."""
    said = re.sub(r"\x1b\[[\d;]*m", "", str(error)).splitlines() or [""]
    return f"{type(error).__name__}: {said[0][:200]}"


def raised_in(error: BaseException) -> str | None:
    """Where somebody's code raised an error: "FILE, line N", the last line on its way that is no library's, or else the
    last; None where all are of sukashi and of Python's import.
    """
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}"
    passed = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((_SUKASHI, "<frozen importlib", importlib.__file__))
    ]
    # What a dataclass generates lies in "<string>".
    own = [frame for frame in passed if not frame.filename.startswith((*_LIBRARIES, "<string>"))] or passed
    return f"{own[-1].filename}, line {own[-1].lineno}" if own else None


def nearest(name: str, known: Collection[str]) -> str:
    """A closing phrase for an error about an unknown name: the nearest, and what there is, or how much of it."""
    many = len(known) > _LISTED
    match = difflib.get_close_matches(name, list(known), n=3 if many else 1, cutoff=0.5)
    hint = f": did you mean {' or '.join(map(repr, match))}?" if match else ":"
    if many:
        return f"{hint} There are {len(known)}" + ("" if match else f", such as {', '.join([*known][:3])}")
    return f"{hint} Known: {', '.join(known) or 'none'}"
