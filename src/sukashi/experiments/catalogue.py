"""What there is: the rows that `sukashi list` prints. What is not asked about is not imported."""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path
from typing import Any

from sukashi.core.bracketed import plain
from sukashi.core.errors import SukashiError, UsageError, nearest
from sukashi.core.registry import Registry
from sukashi.experiments.workspace import EXPERIMENT, Workspace
from sukashi.report import words

METHODS = ("criteria", "attributions", "measures", "repairs")
LISTS = (*METHODS, "schedules", "models", "data")


def registry_of(what: str) -> Registry:
    """The registry of a kind of methods, in the room of its name."""
    registry: Registry = getattr(importlib.import_module(f"sukashi.{what}"), what)
    return registry


def rows(what: str) -> list[dict[str, str]]:
    """One dictionary a method, model or dataset: its name, and for methods what it gives and its source."""
    if what not in LISTS:
        raise UsageError(f"unknown list {what!r}{nearest(what, LISTS)}")
    if what in METHODS:
        registry = registry_of(what)
        own = [{"name": m.name, "summary": m.summary, "source": m.source} for m in registry]
        # What packages offer is loaded when it is asked for.
        return own + [
            {"name": e.name, "summary": f"Of the package {e.dist.name if e.dist else '?'}.", "source": e.value}
            for e in registry.offered()
            if e.name not in registry
        ]
    if what == "schedules":
        from sukashi.experiments.schedule.schedules import SCHEDULES

        return [{"name": s.name, "summary": s.summary, "source": s.source} for s in SCHEDULES]
    return [{"name": name} for name in importlib.import_module(f"sukashi.{what}").names()]


def experiments(folder: Path) -> list[dict[str, Any]]:
    """A row for each experiment in a folder, and in those inside it: folder, kind, model, data (None where it has
    several), finished, trials, and what it found, in its verdict's words, or how far it is.

    Raises UsageError where there is no such folder, or none in it.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder: give one with experiments in it, as the runs of several commands")
    found = [
        _experiment(path.parent)
        for path in sorted(folder.rglob(EXPERIMENT))
        if "trials" not in path.relative_to(folder).parts
    ]
    if not found:
        raise UsageError(f"{folder} holds no experiment: give one that holds folders of experiments")
    return found


def _experiment(folder: Path) -> dict[str, Any]:
    from sukashi.experiments.executor import summarised

    space = Workspace(folder)
    row: dict[str, Any] = {"folder": str(folder), "kind": None, "model": None, "data": None}
    try:
        identity = space.identity
        row |= {"kind": space.about["kind"], **{name: _spec(identity.get(name)) for name in ("model", "data")}}
        row |= {"finished": len(space.records()), "trials": space.n_trials}
        if row["finished"] < row["trials"]:
            far = f"{row['finished']} of {words.several(row['trials'], 'trial')}"
            return row | {"found": f"{far}: give its command again to go on"}
        return row | {"found": summarised(space).to_json()["verdict"]}
    except SukashiError as error:
        return {"finished": None, "trials": None, **row, "found": str(error)}


def _spec(of: Any) -> str | None:
    return of.get("spec") if isinstance(of, dict) else of if isinstance(of, str) else None


def about(what: str, name: str) -> dict[str, Any]:
    """One method whole: its documentation, its source, and its options with their defaults as `--set` takes them.

    An option that is no JSON, such as a function, can only be given from Python and is left to the documentation.
    """
    if what == "schedules":
        from sukashi.experiments.schedule.schedules import SCHEDULES

        return SCHEDULES.about(name)
    if what not in METHODS:
        raise UsageError(f"{what} have no options to show: give one of {', '.join(METHODS)}, got {what!r}")
    method = registry_of(what)[plain(name)]
    options = {option: _written(value) for option, value in method.options.items() if not callable(value)}
    documentation = inspect.getdoc(method.fn) or ""
    return {"name": method.name, "documentation": documentation, "source": method.source, "options": options}


def _written(value: Any) -> str:
    """JSON, and a word as it is unless it means something in JSON, as true does."""
    bare = isinstance(value, str) and value.isidentifier() and value not in ("true", "false", "null", "NaN", "Infinity")
    return value if bare else json.dumps(value)
