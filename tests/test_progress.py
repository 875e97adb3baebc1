"""Progress reaches whoever listens, and nobody else."""

import io
import sys
from contextlib import contextmanager

import pytest
from rich.console import Console

import sukashi
from sukashi.core import progress
from sukashi.report import waiting


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


def test_from_python_a_terminal_and_a_notebook_show_work_and_a_log_does_not(monkeypatch):
    for terminal, notebook, wanted in [(False, False, False), (True, False, True), (False, True, True)]:
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal, raising=False)
        monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
        if notebook:
            monkeypatch.setitem(sys.modules, "ipykernel", sys)
        with waiting.shown():
            assert progress.is_heard() == wanted
        assert not progress.is_heard()
    noted = Noted()
    with progress.listening(noted), waiting.shown(), progress.task("work", 1):
        pass
    assert noted.heard == [("open", "work", 1), ("close", "work")], "whoever listens already is left to it"


def test_a_comparison_from_python_is_heard(monkeypatch, tmp_path):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(waiting, "log", Console(file=(shown := io.StringIO()), force_terminal=True))
    with pytest.warns(UserWarning, match="random weights"):
        sukashi.compare(
            *("sukashi:digits_cnn", "digits", ["random"]),
            **{"width": 8, "calibration": 2, "test_images": 20, "ratios": [0.5], "seeds": 1, "out": tmp_path / "out"},
        )
    assert "trials" in shown.getvalue()


def test_what_is_left_is_not_told_by_the_first_thing_done(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(waiting.time, "monotonic", lambda: clock[0])
    line = waiting._Line(waiting._Lines(), "checking train", 50_000)
    clock[0] = 0.9  # it took so long to start
    line.advance()
    assert str(line) == "checking train 1/50000"
    clock[0] = 2.5
    line.advance(4999)
    assert str(line).startswith("checking train 5000/50000, about 2")
