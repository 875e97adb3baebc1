"""Files that people name, read whole: never a device or a pipe, and never more bytes than such a file has."""

from __future__ import annotations

import errno
import stat
from pathlib import Path
from typing import NoReturn


def read(path: Path, most: int) -> bytes:
    """The bytes of a file. Raises OSError, whose `strerror` says why, as `check_file` does."""
    check_file(path, most)
    with path.open("rb") as file:
        content = file.read(most + 1)
    return content if len(content) <= most else _too_large(path, most)


def check_file(path: Path, most: int) -> None:
    """Refuse, by OSError, what never ends or is no file (a device, a pipe, a folder), and a file above `most` bytes.

    Such a path is not opened: that alone may wait for ever.
    """
    found = path.stat()
    if stat.S_ISDIR(found.st_mode):
        raise OSError(errno.EISDIR, "it is a folder", str(path))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is a device or a pipe, not a file", str(path))
    if found.st_size > most:
        _too_large(path, most)


def _too_large(path: Path, most: int) -> NoReturn:
    raise OSError(errno.EFBIG, f"it has more than {most:,} bytes", str(path))
