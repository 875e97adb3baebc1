"""Files that appear whole or not at all, journals that survive a kill, folders held by one process."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import os
import shutil
import socket
import uuid
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sukashi.core.bounded import from_json, read
from sukashi.core.errors import DataError, ResourceError, UsageError, writing


def check_free(path: Path) -> None:
    """Refuse a path that exists, with UsageError, and one whose folder can't be made or written, with ResourceError."""
    if os.path.lexists(path):
        raise UsageError(f"{path} exists: nothing is overwritten; give another place or remove it")
    check_writable(path)


def check_writable(path: Path) -> None:
    """Refuse a folder that can't be made or written, and a file whose folder can't, with ResourceError."""
    place = path.absolute()
    above = next(folder for folder in (place, *place.parents) if os.path.lexists(folder))
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ResourceError(f"cannot write {path} ({above} is no folder with that right): give another place")


@contextlib.contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A place for a draft on the same disk; what is still there afterwards is removed."""
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield draft
    finally:
        if draft.is_dir():
            shutil.rmtree(draft, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)


def write_new(path: Path, content: bytes) -> None:
    """A file of this content, on the disk when this returns."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Make sure that a file, or a folder's list of names, is on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


FORMAT: Final = 5  # of experiment.json and recipe.json; what another version wrote is refused
_held: set[Path] = set()  # folders this process holds: POSIX locks do not exclude their own process


class Journal(MutableMapping[str, Any]):
    """Decisions already taken: a mapping that survives a kill, each entry from its assignment on.

    It only grows. A last line that was cut off while being written is dropped. Values are JSON (NaN allowed) that every
    run of the trial would give alike.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries: dict[str, Any] = {}
        self._size = 0
        for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
            try:
                key, value = from_json(line) if line.endswith(b"\n") else (None, None)
            except ValueError:
                key = None
            if key is None:
                break
            self._entries[key] = value
            self._size += len(line)
        self._drop_rest()

    def __getitem__(self, key: str) -> Any:
        return self._entries[key]

    def __setitem__(self, key: str, value: Any) -> None:
        """Raises ResourceError where the disk is full; the journal is then as before."""
        line = json.dumps([key, value], separators=(",", ":")).encode() + b"\n"
        try:
            with writing(self._path):
                append(self._path, line)
        except ResourceError:
            self._drop_rest()
            raise
        self._entries[key] = json.loads(line)[1]  # what a resumed run reads: both go on from the same value
        self._size += len(line)

    def __delitem__(self, key: str) -> None:
        raise TypeError("a journal only grows")

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def _drop_rest(self) -> None:
        if self._path.exists() and self._path.stat().st_size > self._size:
            os.truncate(self._path, self._size)


def write(path: Path, content: bytes) -> None:
    """Put a whole file in place, on disk when this returns; the file before stays until then.

    Raises ResourceError where it can't be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            write_new(temporary, content)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync(path.parent)  # else the name may be lost with the power though the bytes are not


def remove_drafts(folder: Path, name: str = "") -> None:
    """Take away what `write` had begun in a folder, of one file or of all, when it was killed; nobody may be at it."""
    for path in folder.glob(f".{name}*.tmp"):
        path.unlink(missing_ok=True)


def refuse_other(folder: Path, kept: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """UsageError, naming the differences, where a folder was made by another configuration than is asked for."""
    different = [_phrase(*of) for of in sorted(differences("", kept, asked), key=lambda of: _is_hash(of[0]))]
    different = list(dict.fromkeys(filter(None, different)))
    if different:
        more = f" and {len(different) - 3} more" if len(different) > 3 else ""
        raise UsageError(
            f"{folder} is an existing output folder of another trial: {'; '.join(different[:3])}{more}; "
            "choose another `out` or remove the folder"
        )


def canonical(value: Any, indent: int | None = None) -> bytes:
    """JSON with sorted keys and no NaN: equal values give equal bytes."""
    separators = (",", ":") if indent is None else (",", ": ")
    return json.dumps(value, sort_keys=True, separators=separators, allow_nan=False, indent=indent).encode()


def packed(**arrays: Any) -> bytes:
    """The content of an npz file, which `Arrays` reads: equal arrays give equal bytes."""
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)  # stamps every member 1980-01-01, so equal arrays give equal bytes
    return content.getvalue()


class Arrays(dict[str, NDArray[Any]]):
    """The arrays of an npz file by name. Raises DataError for a content that is none, and for a name it has not."""

    def __init__(self, path: Path, content: bytes) -> None:
        self.path = path
        try:
            with np.lib.npyio.NpzFile(io.BytesIO(content), allow_pickle=False) as found:
                super().__init__((name, found[name]) for name in found.files)
        except Exception as error:  # a damaged archive has many ways to fail
            raise unreadable(path, "it holds no plain arrays, as an npz file does") from error
        strange = next((name for name, array in self.items() if not isinstance(array, np.ndarray)), None)
        if strange is not None:
            raise unreadable(path, f"{strange!r} is no array")

    def __missing__(self, name: str) -> NDArray[Any]:
        raise unreadable(self.path, f"it has no array {name!r}")


def read_json(path: Path) -> Any:
    try:
        return from_json(read(path))
    except (OSError, ValueError) as error:
        raise unreadable(path, str(error)) from error


def unreadable(path: Path, why: str) -> DataError:
    """What is said of a file of an experiment that is not as it was written."""
    return DataError(f"{path} can't be read ({why}): remove its folder and run the same command again")


def differences(path: str, kept: Any, asked: Any) -> Iterator[tuple[str, Any, Any]]:
    """Each setting in which two configurations differ: its name, and what it was and is."""
    if isinstance(kept, dict) and isinstance(asked, dict):
        for key in sorted({*kept, *asked}):
            yield from differences(f"{path}.{key}" if path else key, kept.get(key), asked.get(key))
    elif kept != asked:
        yield path, kept, asked


def _is_hash(path: str) -> bool:
    return path.startswith("code.") or path.rpartition(".")[2].endswith("sha256")


def _phrase(path: str, kept: Any, asked: Any) -> str:
    """What is another, in a phrase; of code that follows from the names of methods, nothing."""
    if not _is_hash(path):
        return f"{path} was {_short(kept)}, now {_short(asked)}"
    if not path.startswith("code."):
        return f"{path.rpartition('.')[0] or 'what it read'} has other contents"
    return f"the code of {path.removeprefix('code.')} has changed" if kept and asked else ""


def _short(value: Any) -> str:
    if value is None:
        return "not given"
    text = canonical(value).decode()
    return text if len(text) <= 60 else f"{text[:57]}..."


def append(path: Path, line: bytes) -> None:
    with open(path, "ab", buffering=0) as file:
        written = file.write(line)
        if written != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file.fileno())


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold `folder/.lock`, whose content names the owner; the kernel lets go of it when the process dies."""
    home = folder.resolve()
    if home in _held:
        raise ResourceError(f"{folder} is in use by this very process: one run at a time")
    with writing(folder):
        file = open(folder / ".lock", "a+")  # noqa: SIM115
    with file:
        file.seek(0)
        owner = file.read().strip() or "another process"
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ResourceError(
                f"{folder} is in use by {owner}: wait until it ends, or choose another `out`"
            ) from error
        _held.add(home)
        try:
            with writing(folder):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
                file.flush()
            yield
        finally:
            _held.discard(home)
            file.truncate(0)
