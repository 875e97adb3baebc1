"""What a person said of the subspaces in a folder: their names, and which of them a network is to do without."""

from __future__ import annotations

import hashlib
import json
import tomllib
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sukashi.core import files
from sukashi.core.bounded import read
from sukashi.core.errors import UsageError, nearest
from sukashi.experiments.workspace import Workspace

FILE = "concepts.toml"
LONGEST = 80  # letters of a name
_HEAD = """\
# Names of the subspaces in this folder, and which of them a cut by `ablate` takes out. Written by the page on which
# they are chosen; it may be edited by hand. The hash says of which subspaces it is.
"""


@dataclass(frozen=True)
class Choice:
    """Names by number, of those that have one, and the numbers of those to take out."""

    names: Mapping[int, str] = field(default_factory=dict)
    out: tuple[int, ...] = ()


def chosen(space: Workspace) -> Choice:
    """What lies in the folder; nothing named or taken out where nobody said anything.

    Raises UsageError for a file that says it of other subspaces, or in other words than it is written in.
    """
    path, (digest, n, _) = space.folder / FILE, _of(space)
    if not path.exists():
        return Choice()
    try:
        said: dict[str, Any] = tomllib.loads(read(path).decode())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} can't be read ({error}): mend it, or remove it and choose again") from error
    if said.pop("sha256", None) != digest:
        raise UsageError(
            f"{path} is of other subspaces than those in its folder: remove it and choose again, by `sukashi serve`"
        )
    subspaces = said.pop("subspaces", {})
    if said or not isinstance(subspaces, dict):
        raise UsageError(f"{path} holds {next(iter(said), 'subspaces')!r}, which is no table [subspaces.NUMBER]")
    names: dict[int, str] = {}
    out = []
    for number, of in subspaces.items():
        if number not in map(str, range(n)) or not isinstance(of, dict):
            raise UsageError(f"{path} speaks of subspace {number[:20]!r}: there are 0 to {n - 1}")
        for key in of:
            if key not in ("name", "take_out"):
                raise UsageError(f"{path} says {key!r} of a subspace{nearest(key, ('name', 'take_out'))}")
        if not isinstance(of.get("take_out", False), bool) or not isinstance(of.get("name", ""), str):
            raise UsageError(f"{path}: take_out of a subspace is true or false, its name a text")
        if name := checked_name(of.get("name", "")):
            names[int(number)] = name
        if of.get("take_out", False):
            out.append(int(number))
    return Choice(names, tuple(sorted(out)))


def version(space: Workspace) -> str:
    """What changes when other subspaces, or another choice, come to lie in the folder."""
    path = space.folder / FILE
    said = path.read_bytes() if path.exists() else b""
    return hashlib.sha256(_of(space)[0].encode() + said).hexdigest()


def choose(space: Workspace, choice: Choice) -> Path:
    """Write it into the folder, whole or not at all. Raises UsageError for numbers that there are not, for all of them
    taken out where they make up the whole layer, and names that are none."""
    digest, n, whole = _of(space)
    if whole and len({*choice.out}) == n:
        raise UsageError("all that the layer writes would go: leave one subspace at least")
    if odd := [number for number in (*choice.names, *choice.out) if not 0 <= number < n]:
        raise UsageError(f"there are subspaces 0 to {n - 1}, got {odd[0]}")
    lines = [_HEAD, f'sha256 = "{digest}"\n']
    for number in range(n):
        name = checked_name(choice.names.get(number, ""))
        if name or number in choice.out:
            lines.append(f"\n[subspaces.{number}]\n")
            lines.append(f"name = {json.dumps(name, ensure_ascii=False)}\n" if name else "")
            lines.append("take_out = true\n" if number in choice.out else "")
    path = space.folder / FILE
    files.write(path, "".join(lines).encode())
    return path


def checked_name(name: str) -> str:
    """Without what surrounds it. Raises UsageError for a name of several lines, control characters, or too long."""
    name = name.strip()
    if len(name) > LONGEST or any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in name):
        raise UsageError(f"a name is one line of at most {LONGEST} letters, got {name[:LONGEST]!r}")
    return name


def _of(space: Workspace) -> tuple[str, int, bool]:
    """The hash of a folder's subspaces, how many there are, and whether they make up all that the layer writes."""
    records = space.records()
    if space.about["kind"] != "concepts" or not records:
        raise UsageError(f"{space.folder} has no subspaces: give the `out` of `sukashi.concepts`")
    kept, size = records[0].kept, len(records[0].arrays("subspaces")["mean"])
    n, d = (kept["result"][name] for name in ("n_subspaces", "n_dimensions"))
    return kept["artefacts"]["subspaces.npz"], n, n * d == size
