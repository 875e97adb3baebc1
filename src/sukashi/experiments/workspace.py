"""The folder of an experiment, of whatever kind.

    experiment.json        what it is for, and its trials; it may grow, another experiment is refused
    trials/KEY/trial.json  a trial that is finished: what it is about, its result, artefacts and hashes
               *.npz *.safetensors ...   the artefacts
               under_way/  what an unfinished trial goes on from: its journal, its checkpoints
    log.jsonl              when, where and how fast: the one file that differs between a resumed and an undisturbed run
    results.json  report.html  figures/  tables/  *.parquet

A trial may have a place of its own in the folder. Every file but the `.jsonl` appears whole or not at all, and all but
log.jsonl hold the same bytes however often the run was killed on the way. Several processes may work on one folder: a
trial is leased to one of them, and the kernel takes the lease back when that process dies.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

from sukashi.core import files, progress
from sukashi.core.bounded import from_json, read
from sukashi.core.code import versions
from sukashi.core.errors import DataError, UsageError, writing
from sukashi.core.experiment import Trial
from sukashi.core.files import FORMAT, Arrays, Journal, unreadable

EXPERIMENT, TRIAL, LOG = "experiment.json", "trial.json", "log.jsonl"
UNDER_WAY = "under_way"
# What may lie in a folder that a killed run left before it said what it is for.
_OURS = {".lock", ".leases", LOG}


@dataclass(frozen=True)
class Record:
    """A finished trial."""

    folder: Path

    @cached_property
    def kept(self) -> dict[str, Any]:
        """What `Desk.finish` wrote. Raises DataError where it is not that any more."""
        kept = dict(files.read_json(self.folder / TRIAL))
        if kept.pop("sha256", None) != _sha256(kept):
            raise unreadable(self.folder / TRIAL, "it was altered")
        return kept

    @property
    def about(self) -> dict[str, Any]:
        return dict(self.kept["about"])

    @property
    def result(self) -> dict[str, Any]:
        return dict(self.kept["result"])

    @property
    def versions(self) -> dict[str, str]:
        """Of what it was done by."""
        return dict(self.kept["versions"])

    @property
    def key(self) -> str:
        return Trial(self.about, _nothing).key

    def read(self, name: str) -> bytes:
        """An artefact by file name. Raises DataError where it is not what was kept."""
        path, known = self.folder / name, self.kept["artefacts"]
        if name not in known:
            raise DataError(f"{self.folder} has no artefact {name!r}: it has {', '.join(known) or 'none'}")
        try:
            content = read(path)
        except OSError as error:
            raise unreadable(path, error.strerror or str(error)) from error
        if hashlib.sha256(content).hexdigest() != known[name]:
            raise unreadable(path, "it was altered")
        return content

    def has(self, name: str) -> bool:
        return name in self.kept["artefacts"]

    def arrays(self, name: str) -> Arrays:
        """The arrays of the artefact `name`.npz."""
        path = self.folder / f"{name}.npz"
        return Arrays(path, self.read(path.name))


@dataclass
class Desk:
    """A trial being worked on. Of processes that torchrun started all but the first write nothing."""

    folder: Path
    space: Workspace
    trial: Trial

    def __post_init__(self) -> None:
        self._artefacts: dict[str, str] = {}
        self._writes = progress.first()

    @property
    def scratch(self) -> Path:
        """Where an unfinished trial keeps what it goes on from; gone once it is finished."""
        return self.folder / UNDER_WAY

    @cached_property
    def journal(self) -> Journal:
        """Decisions so far, those of an interrupted run included."""
        with writing(self.scratch):
            self.scratch.mkdir(parents=True, exist_ok=True)
        return Journal(self.scratch / "journal.jsonl")

    def arrays(self, name: str) -> Arrays | None:
        """What `save` kept before an interruption, or None."""
        path = self.folder / f"{name}.npz"
        return Arrays(path, read(path)) if path.exists() else None

    def save(self, name: str, content: Mapping[str, Any] | bytes) -> None:
        """Keep an artefact: arrays by name as `name`.npz, or bytes as they are under the file name `name`."""
        if not self._writes:
            return
        if not isinstance(content, bytes):
            name, content = f"{name}.npz", files.packed(**content)
        files.write(self.folder / name, content)
        self.keep(name)

    def keep(self, name: str) -> None:
        """Count a file that lies in the trial's folder already among its artefacts."""
        if self._writes:
            self._artefacts[name] = hashlib.sha256((self.folder / name).read_bytes()).hexdigest()
            self.space.artefacts.append(self.folder / name)

    def needed(self, key: str) -> Record:
        """A trial that this one needs, by key."""
        assert key in self.trial.needs, "a trial reads none but those it needs"
        return self.space.record(key)

    def finish(self, result: Mapping[str, Any]) -> None:
        """The trial is finished from here on. `result` is JSON that every run of it gives alike: no times."""
        if not self._writes:
            return
        kept = {
            "about": json.loads(self.trial.json),
            "needs": list(self.trial.needs),
            "versions": versions(),
            "artefacts": dict(sorted(self._artefacts.items())),
            "result": json.loads(files.canonical(result)),
        }
        files.write(self.folder / TRIAL, files.canonical(kept | {"sha256": _sha256(kept)}, indent=1) + b"\n")


class Workspace:
    """The folder of one experiment: read it as it is, claim it, and lease its trials."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder).expanduser()
        self.artefacts: list[Path] = []  # that this process has written

    @property
    def about(self) -> dict[str, Any]:
        """What the folder is for: {"format", "kind", "identity", "shown", "trials": [[key, place]]}.

        Raises UsageError where it is no experiment's or another version's.
        """
        path = self.folder / EXPERIMENT
        if not path.exists():
            raise UsageError(f"{self.folder} holds no experiment (no {EXPERIMENT}): give the `out` of an experiment")
        found = dict(files.read_json(path))
        if found.get("format") != FORMAT:
            raise UsageError(
                f"{self.folder} has format {found.get('format')}, this version reads {FORMAT}: use the version that "
                "made it, or another `out`"
            )
        return found

    @property
    def identity(self) -> dict[str, Any]:
        return dict(self.about["identity"])

    @property
    def shown(self) -> dict[str, Any]:
        """What the last call asked for that no trial depends on."""
        return dict(self.about["shown"])

    def claim(
        self,
        kind: str,
        identity: Mapping[str, Any],
        trials: Sequence[Trial],
        grows: frozenset[str] = frozenset(),
        shown: Mapping[str, Any] = MappingProxyType({}),
    ) -> bool:
        """Make the folder this experiment's, or find that it is: whether it is new.

        What is in `grows` may be more than before: a larger number, further names, further numbers at the end of a
        list. Raises UsageError where the folder is another's or anything else, ResourceError where it can't be written.
        """
        self.check_place(kind)
        asked = json.loads(files.canonical(identity))
        places = [[trial.key, trial.folder] for trial in trials]
        whole = {"format": FORMAT, "kind": kind, "identity": asked, "shown": dict(shown), "trials": places}
        with self.held():
            new = not (self.folder / EXPERIMENT).exists()
            self.check(kind, asked, grows)
            files.remove_drafts(self.folder, EXPERIMENT)
            if new or self.about != whole:
                files.write(self.folder / EXPERIMENT, files.canonical(whole, indent=1) + b"\n")
        return new

    def check(self, kind: str, identity: Mapping[str, Any], grows: frozenset[str] = frozenset()) -> None:
        """Raises what `claim` does where the folder is there and another's; nothing is written."""
        self.check_place(kind)
        if not (self.folder / EXPERIMENT).exists():
            return
        kept, asked = self.about, json.loads(files.canonical(identity))
        grows = grows | {"code"}  # with the methods
        if not _grown(kept["identity"], asked, grows):
            self._check_code(kept["identity"], asked, grows)
            files.refuse_other(self.folder, kept["identity"], asked)

    def _check_code(self, kept: Mapping[str, Any], asked: Mapping[str, Any], grows: frozenset[str]) -> None:
        """Refuse to make saved networks again by other code, which is in the identity where trials have places."""
        before, now = kept.get("code", {}), asked.get("code", {})
        names = [name for name, code in before.items() if now.get(name, code) != code]
        if names and _grown({**kept, "code": {}}, {**asked, "code": {}}, grows):
            raise UsageError(
                f"{self.folder} has networks that were made while the code of {', '.join(names)} was another, and what "
                "is saved is not replaced: choose another `out` or remove the folder"
            )

    @contextmanager
    def held(self) -> Iterator[None]:
        """The folder, held by this process for as long as its own files take to write; others wait."""
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = open(self.folder / ".lock", "a")  # noqa: SIM115
        with lock:
            with writing(self.folder):
                fcntl.lockf(lock, fcntl.LOCK_EX)
            yield

    @contextmanager
    def lease(self, trial: Trial) -> Iterator[Desk | None]:
        """The desk of a trial for this process alone, or None where another process has it."""
        folder = self.folder / trial.folder
        if not progress.first():
            yield Desk(folder, self, trial)
            return
        with self._lease_file(trial) as lock:
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield None
                return
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
            with self.held():
                files.remove_drafts(folder)
            yield Desk(folder, self, trial)
            if self.finished(trial):
                self.tidy([trial])

    def _lease_file(self, trial: Trial) -> IO[str]:
        leases = self.folder / ".leases"
        with writing(leases):
            while True:
                # Another process that has no lease left may remove the folder at any moment.
                with suppress(FileNotFoundError, FileExistsError):
                    leases.mkdir(exist_ok=True)
                    return open(leases / trial.key, "a")

    def tidy(self, trials: Sequence[Trial]) -> None:
        """Take away what finished trials went on from, which a kill may have left."""
        leases = self.folder / ".leases"
        for trial in trials:
            shutil.rmtree(self.folder / trial.folder / UNDER_WAY, ignore_errors=True)
            (leases / trial.key).unlink(missing_ok=True)
        with suppress(OSError):  # others still have leases
            leases.rmdir()

    def finished(self, trial: Trial) -> bool:
        """Whether the trial is finished. Raises UsageError where its place is another's."""
        path = self.folder / trial.folder / TRIAL
        if not path.exists():
            return False
        files.refuse_other(path.parent, Record(path.parent).about, json.loads(trial.json))
        return True

    def record(self, key: str) -> Record:
        """The finished trial with that key."""
        places = dict(self.about["trials"])
        if key not in places:
            raise UsageError(f"{self.folder} was given other trials by another run meanwhile: give the command again")
        return self._record(key, places[key])

    def records(self) -> list[Record]:
        """Every finished trial, in the order of the experiment."""
        found = [entry for entry in self.about["trials"] if (self.folder / entry[1] / TRIAL).exists()]
        return [self._record(key, place) for key, place in found]

    def _record(self, key: str, place: str) -> Record:
        record = Record(self.folder / place)
        if record.key != key:
            raise unreadable(record.folder / TRIAL, "it is of another trial")
        return record

    def changed(self, trials: Sequence[Trial]) -> dict[str, list[str]]:
        """{key: whose code is not what it was} of those trials that are finished but for the code of their methods."""
        if not (self.folder / EXPERIMENT).exists():
            return {}
        abouts = [record.about for record in self.records()]
        before = {_but_code(about): about["code"] for about in abouts if "code" in about}
        found = {}
        for trial in trials:
            code, old = trial.about.get("code", {}), before.get(_but_code(trial.about), {})
            names = [name for name in code if old.get(name) not in (None, code[name])]
            if names and not (self.folder / trial.folder / TRIAL).exists():
                found[trial.key] = names
        return found

    @property
    def n_trials(self) -> int:
        return len(self.about["trials"])

    def log(self, event: str, **facts: Any) -> None:
        """Add a line about this very run (command, machine, speed): kept apart from the results."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        line = files.canonical({"time": stamp, "event": event, **facts})
        with writing(self.folder):
            files.append(self.folder / LOG, b"\n" + line + b"\n")  # the first ends a line a kill has torn

    def logged(self, event: str) -> list[dict[str, Any]]:
        """The facts of every such line, oldest first."""
        path = self.folder / LOG
        entries = []
        for line in path.read_bytes().splitlines() if path.exists() else []:
            with suppress(ValueError):  # torn by a kill
                entries.append(from_json(line))
        return [entry for entry in entries if entry["event"] == event]

    @property
    def untouched(self) -> bool:
        """Whether no trial is finished, and none has left anything to go on from, here or in a folder of its own."""
        places = [place for _, place in self.about["trials"]]
        known = _OURS | {EXPERIMENT, UNDER_WAY, *(path.name for path in self.artefacts)}
        known |= {Path(place).parts[0] for place in places if place != "."}
        return (
            not self.records()
            and not any(any((self.folder / place / UNDER_WAY).glob("*")) for place in places)
            and all(path.name in known or path.suffix == ".tmp" for path in self.folder.iterdir())
        )

    def discard(self) -> None:
        """Remove what a new experiment that was refused has written."""
        for _, place in self.about["trials"] if (self.folder / EXPERIMENT).exists() else ():
            if place != ".":
                shutil.rmtree(self.folder / place, ignore_errors=True)
                for above in Path(place).parents[:-1]:
                    with suppress(OSError):  # it holds more
                        (self.folder / above).rmdir()
        for path in self.artefacts:
            path.unlink(missing_ok=True)
        for folder in (".leases", UNDER_WAY):
            shutil.rmtree(self.folder / folder, ignore_errors=True)
        for name in (EXPERIMENT, LOG, ".lock"):
            (self.folder / name).unlink(missing_ok=True)
        with suppress(OSError):  # what else lies there is not ours
            self.folder.rmdir()

    def check_place(self, kind: str, parts: Collection[str] = ()) -> None:
        """Refuse a folder that holds anything but this kind of experiment, or these parts, with UsageError, or can't be
        written, with ResourceError: all that can be said before a model or data are read.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise UsageError(f"{self.folder} is a file: `out` needs a folder")
        if self.folder.is_dir() and not (self.folder / EXPERIMENT).exists():
            ours = {*_OURS, *parts}
            foreign = sorted(p.name for p in self.folder.iterdir() if p.name not in ours and p.suffix != ".tmp")
            if foreign:
                raise UsageError(
                    f"{self.folder} is not empty ({foreign[0]}) and holds no experiment: choose another `out`"
                )
        if (self.folder / EXPERIMENT).exists() and (kept := self.about["kind"]) != kind:
            raise UsageError(
                f"{self.folder} is an existing output folder of another experiment ({kept}, now {kind}): "
                "choose another `out` or remove the folder"
            )
        files.check_writable(self.folder)


def versions_of(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Those by which trials were done: {"trials": how many, package: its version}, most trials first."""
    found = Counter(files.canonical(record.versions) for record in records)
    parted = [(n, from_json(of)) for of, n in sorted(found.items(), key=lambda item: (-item[1], item[0]))]
    return [{"trials": n, **{name: of.get(name) for name in versions()}} for n, of in parted]


def _nothing(desk: Desk) -> None:
    raise AssertionError("a trial read from disk is not run")


def _but_code(about: Mapping[str, Any]) -> bytes:
    return files.canonical({name: value for name, value in about.items() if name != "code"})


def _sha256(kept: Mapping[str, Any]) -> str:
    return hashlib.sha256(files.canonical(kept)).hexdigest()


def _grown(kept: Mapping[str, Any], asked: Mapping[str, Any], grows: frozenset[str]) -> bool:
    """Whether two identities differ by nothing but more of what may grow."""
    return kept.keys() == asked.keys() and all(
        kept[name] == asked[name] or (name in grows and _more(kept[name], asked[name])) for name in kept
    )


def _more(kept: Any, asked: Any) -> bool:
    match kept, asked:
        case dict(), dict():
            return all(name in asked and asked[name] == value for name, value in kept.items())
        case list(), list() if all(isinstance(value, str) for value in kept):
            return set(kept) <= set(asked)
        case list(), list():
            # A number in between may be one that another was reached from.
            return bool(asked[: len(kept)] == kept)
        case int(), int():
            return kept <= asked
    return False
