"""Files and JSON that somebody else may have written, read within bounds: nothing here waits for ever or overflows."""

from __future__ import annotations

import errno
import json
import stat
from collections.abc import Collection
from pathlib import Path
from typing import Any

MAX_BYTES = 2**24  # of a file that people write
MAX_DEPTH = 100  # of JSON: what comes after parsing recurses


def read(path: Path, most: int | None = None) -> bytes:
    """The content of a file of at most so many bytes. Raises OSError as `check_file` does; its `strerror` says why."""
    check_file(path, most)
    with path.open("rb") as file:
        content = file.read() if most is None else file.read(most + 1)
    if most is not None and len(content) > most:  # it grows
        raise _too_large(path, len(content), most)
    return content


def check_file(path: Path, most: int | None = None) -> None:
    """Refuse, by OSError, what is no file or never ends (a folder, a device, a pipe), and a file above `most` bytes.

    Such a path is not opened: that alone may wait for ever.
    """
    facts = path.stat()
    if stat.S_ISDIR(facts.st_mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    if not stat.S_ISREG(facts.st_mode):
        raise OSError(errno.EINVAL, "it is a device or a pipe, not a file", str(path))
    if most is not None and facts.st_size > most:
        raise _too_large(path, facts.st_size, most)


def _too_large(path: Path, n_bytes: int, most: int) -> OSError:
    return OSError(errno.EFBIG, f"it has {n_bytes:,} bytes, {most:,} are allowed", str(path))


def from_json(text: str | bytes) -> Any:
    """What a JSON text says. Raises ValueError for what is none, and for one that is nested deeper than MAX_DEPTH."""
    too_deep = ValueError(f"it is nested more than {MAX_DEPTH} deep")
    try:
        found = json.loads(text)
    except RecursionError:
        raise too_deep from None
    level = [found]
    for _ in range(MAX_DEPTH):
        level = [part for whole in level if isinstance(whole, dict | list) for part in _parts(whole)]
    if level:
        raise too_deep
    return found


def _parts(whole: dict[str, Any] | list[Any]) -> Collection[Any]:
    return whole.values() if isinstance(whole, dict) else whole
