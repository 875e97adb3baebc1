"""Progress reaches whoever listens, and nobody else."""

from contextlib import contextmanager

import pytest

from sukashi.core import progress


class Noted:
    """A listener that notes all it hears."""

    def __init__(self):
        self.heard = []

    @contextmanager
    def __call__(self, title, total):
        self.heard.append(("open", title, total))

        class Shown:
            def advance(shown, n=1, note=""):
                self.heard.append((title, n, note))

        try:
            yield Shown()
        finally:
            self.heard.append(("close", title))


def test_a_task_is_silent_without_a_listener():
    with progress.task("work", 3) as shown:
        shown.advance(2, "note")


def test_a_listener_hears_every_task_inside_and_none_afterwards():
    noted = Noted()
    with progress.listening(noted), progress.task("outer", 2) as outer:
        outer.advance()
        with progress.task("inner", 1) as inner:
            inner.advance(3, "removed 3")
    with progress.task("later", 1) as later:
        later.advance()
    assert noted.heard == [
        ("open", "outer", 2),
        ("outer", 1, ""),
        ("open", "inner", 1),
        ("inner", 3, "removed 3"),
        ("close", "inner"),
        ("close", "outer"),
    ]


def test_the_listener_before_comes_back_even_after_an_error():
    first, second = Noted(), Noted()
    with progress.listening(first):
        with pytest.raises(KeyError), progress.listening(second), progress.task("breaks", 1):
            raise KeyError
        with progress.task("goes on", 1):
            pass
    assert second.heard == [("open", "breaks", 1), ("close", "breaks")]
    assert first.heard == [("open", "goes on", 1), ("close", "goes on")]
