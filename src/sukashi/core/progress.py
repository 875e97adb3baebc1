"""Progress of long work, shown by whoever is listening (the command line), silent otherwise."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Protocol


class Task(Protocol):
    """Something that counts up to a total; `note` is a short state such as "removed 12"."""

    def advance(self, n: int = 1, note: str = "") -> None: ...


class _Silent:
    def advance(self, n: int = 1, note: str = "") -> None:
        pass


Listener = Callable[[str, int], AbstractContextManager[Task]]
_listener: ContextVar[Listener | None] = ContextVar("progress", default=None)


@contextmanager
def task(title: str, total: int) -> Iterator[Task]:
    """Open a counted task; `with task("cswap", 448) as t: t.advance()`."""
    listener = _listener.get()
    if listener is None:
        yield _Silent()
        return
    with listener(title, total) as shown:
        yield shown


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Show every task opened inside through `listener(title, total)`, a context manager that gives a Task."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def is_heard() -> bool:
    """Whether anybody listens."""
    return _listener.get() is not None


def first() -> bool:
    """Whether this process is the one that speaks: the only one, or the first that torchrun has started."""
    return os.environ.get("RANK", "0") == "0"
