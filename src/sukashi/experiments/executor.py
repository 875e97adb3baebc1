"""Runs experiments: claims the folder, does the trials whose needs are met, then writes summary, tables and page."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pyarrow as pa

from sukashi.core import errors, files, progress
from sukashi.core.errors import DataError, ModelError, SukashiError, UsageError
from sukashi.core.experiment import Prepared, Result, Trial
from sukashi.experiments.columns import parquet, schema
from sukashi.experiments.kinds import spelled
from sukashi.experiments.methods import check_shared, named
from sukashi.experiments.workspace import Desk, Workspace, versions_of
from sukashi.report import page, words
from sukashi.report.page import Page
from sukashi.training.distributed import from_first, size

_LOOK = 0.2  # seconds from one look at what other processes have finished to the next


def part(room: str, name: str) -> Any:
    """The file `name` of a kind of experiment, by its folder: run, summary or page."""
    return importlib.import_module(f"sukashi.experiments.{room}.{name}")


def room_of(settings: Any) -> str:
    """The folder of a kind of experiment; two commands may share one, as train and finetune do."""
    return type(settings).__module__.split(".")[-2]


def prepare_of(settings: Any) -> Prepared:
    """An experiment with its methods found, its model and data loaded, and all of it checked."""
    prepared: Prepared = part(room_of(settings), "run").prepare(named(settings))
    return prepared


def summarised(space: Workspace, **options: Any) -> Result:
    """The summary of a folder, whatever kind of experiment is in it."""
    found: Result = part(space.about["kind"], "summary").summary(space, **options)
    made = found.versions or versions_of(space.records())
    report = str(space.folder / page.REPORT)
    return found.model_copy(update={"out": str(space.folder), "report": report, "versions": made})


def execute(settings: Any, *, command: str, jobs: int = 1) -> Result | None:
    """What an experiment found, after doing those of its trials that are not finished, in the folder `settings.out`.

    The same call goes on where an earlier one was interrupted. With `jobs` above 1 so many processes share the trials.
    A new experiment that is refused before anything is done leaves nothing behind. Under torchrun all processes train
    together, the first one does all else and writes, and the others get None.
    """
    if jobs < 1:
        raise UsageError(f"jobs must be at least 1, got {jobs}: it is the number of processes that share the trials")
    if jobs > 1 and "memory:" in settings.model_dump_json():
        raise UsageError("what lies in memory cannot be shared by processes: give names or folders, or `jobs=1`")
    if jobs > 1:
        check_shared(settings)
    if jobs > 1 and size() > 1:
        raise UsageError(f"the {size()} processes of torchrun train together: leave `jobs` out")
    space, first, told = Workspace(settings.out), progress.first(), dict[str, Any]()
    room = room_of(settings)
    space.check_place(room)
    prepared = prepare_of(settings)
    if first and (changed := space.changed(prepared.trials)):
        n = len(changed)
        names = words.listed(sorted(set().union(*changed.values())))
        warnings.warn(
            f"the code of {names} is not what it was: {n} finished trial{'s' if n > 1 else ''} of {space.folder} "
            f"{'are' if n > 1 else 'is'} done again",
            stacklevel=2,
        )
    new = first and space.claim(room, prepared.identity, prepared.trials, settings.grows, prepared.shown)
    missing = [trial for trial in prepared.trials if not space.finished(trial)]
    try:
        if first:
            space.log("run", command=command, **prepared.log)
        if first and missing and prepared.before:
            prepared.before(missing)
        if jobs > 1 and len(missing) > 1:
            _share(space, settings, missing, jobs)
        else:
            told = work(space, prepared.trials)
        if first and prepared.after:
            prepared.after(space)
    except (UsageError, DataError, ModelError):
        if new and space.untouched:
            space.discard()
        raise
    if not first:
        return None
    return conclude(space).model_copy(update={"finished": not missing, **told})


def conclude(space: Workspace, **options: Any) -> Result:
    """The summary of the trials that are finished; results.json, tables and page are written anew from it.

    `options` are those of the kind's summary that no trial depends on.
    """
    kind, found = space.about["kind"], summarised(space, **options)
    tables = getattr(part(kind, "summary"), "tables", None)
    with space.held():
        for folder in (space.folder, *(space.folder / name for name in page.FOLDERS)):
            files.remove_drafts(folder)
        more = tables(space) if tables else {}
        rows = parquet(pa.Table.from_pylist(found.table(), schema(found.columns)))
        for name, content in {"results.parquet": rows, **more}.items():
            files.write(space.folder / name, content)
        page.write(space.folder, _dated(part(kind, "page").page(found, space), found), spelled)
        kept = {name: value for name, value in found.to_json().items() if name not in found.of_call}
        files.write(space.folder / "results.json", files.canonical(kept, indent=1) + b"\n")
    return found


def _dated(made: Page, found: Result) -> Page:
    """A page that says by which versions its trials were done, and takes note where these differ."""
    noted = [*made.shown["warnings"], *words.mixed(found.versions)]
    return replace(made, shown={**made.shown, "warnings": noted, "versions": found.versions})


def work(space: Workspace, trials: Sequence[Trial]) -> dict[str, Any]:
    """Do the trials whose needs are met until all are finished, here or by another process; what their runs told.

    Processes that torchrun has started go through the same trials in the same order: the first one chooses, and says so
    when all that came before is on the disk. The others join in what is done together, and else wait.
    """
    told: dict[str, Any] = {}
    missing = from_first([trial.key for trial in trials if not space.finished(trial)])
    waiting = [trial for trial in trials if trial.key in missing]
    with progress.task("trials", len(waiting)) as shown:
        while waiting:
            with (_chosen if progress.first() else _said)(space, waiting) as (trial, desk):
                if desk is not None:
                    shown.advance(0, trial.label)
                    told |= trial.run(desk) or {}
            waiting.remove(trial)
            shown.advance(note=trial.label)
    if progress.first():
        space.tidy(trials)
    return told


@contextmanager
def _chosen(space: Workspace, waiting: Sequence[Trial]) -> Iterator[tuple[Trial, Desk | None]]:
    """The first trial that can be done, and its desk; None with one that another run has finished."""
    unfinished = {trial.key for trial in waiting}
    ready = [trial for trial in waiting if not unfinished & set(trial.needs)]
    while True:
        for trial in ready:
            if space.finished(trial):
                from_first([trial.key, False])
                yield trial, None
                return
            with space.lease(trial) as desk:
                if desk is None:
                    continue
                todo = not space.finished(trial)
                from_first([trial.key, todo])
                yield trial, desk if todo else None
                return
        time.sleep(_LOOK)  # others are at work on all of those


@contextmanager
def _said(space: Workspace, waiting: Sequence[Trial]) -> Iterator[tuple[Trial, Desk | None]]:
    """The trial that the first process has chosen, and a desk where it is to be done together."""
    key, todo = from_first(None)
    trial = next(trial for trial in waiting if trial.key == key)
    if not (todo and trial.together):
        yield trial, None
        return
    with space.lease(trial) as desk:
        yield trial, desk


def _share(space: Workspace, settings: Any, missing: Sequence[Trial], jobs: int) -> None:
    """Start processes that share the trials, and show how many are finished; the first that fails ends all."""
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    given = settings.model_dump(mode="json", exclude_unset=True)  # what was left unsaid stays so
    said = json.dumps([room_of(settings), type(settings).__name__, given])
    started: list[tuple[subprocess.Popen[str], Any]] = []
    try:
        for _ in range(min(jobs, len(missing))):
            stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115
            child = subprocess.Popen(
                [sys.executable, "-m", "sukashi.experiments.executor", str(space.folder)],
                stdin=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": threads},
            )
            started.append((child, stderr))
            assert child.stdin is not None
            child.stdin.write(said)
            child.stdin.close()
        with progress.task("trials", len(missing)) as shown:
            done = 0
            while any(child.poll() is None for child, _ in started):
                now = sum(space.finished(trial) for trial in missing)
                shown.advance(now - done)
                done = now
                for child, stderr in started:
                    if child.poll():
                        raise _failed(child.returncode, stderr)
                time.sleep(_LOOK)
        for child, stderr in started:
            if child.returncode:
                raise _failed(child.returncode, stderr)
    finally:
        for child, _ in started:
            child.kill()
            child.wait()


def _failed(code: int, stderr: Any) -> SukashiError:
    """The error that a process ended with, by its exit code and last words."""
    stderr.seek(0)
    said = stderr.read().strip().splitlines() or [f"a process of this run ended with {code}"]
    kinds = (errors.UsageError, errors.DataError, errors.ModelError)
    return next((kind for kind in kinds if kind.exit_code == code), errors.ResourceError)(said[-1])


def _child(folder: str) -> int:
    room, kind, given = json.loads(sys.stdin.read())
    try:
        settings = getattr(part(room, "settings"), kind).model_validate_json(json.dumps(given))
        space, trials = Workspace(folder), prepare_of(settings).trials
        if {trial.key for trial in trials} - {key for key, _ in space.about["trials"]}:
            raise UsageError("the code has changed since this run began: give the same command again")
        work(space, trials)
    except SukashiError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(_child(sys.argv[1]))
