"""A method with options of its own, as drift[share=0.2,layers=[1,2]]: by this name it is another contender."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from sukashi.core.bounded import from_json
from sukashi.core.errors import UsageError

_WHOLE = re.compile(r"([^\[\]]+)\[(.*)\]", re.DOTALL)
_KEY = re.compile(r"\s*([A-Za-z_]\w*)\s*=\s*")
_WORD = re.compile(r"""[^\s,="\[\]{}]+""")
_END = re.compile(r"\s*(,|$)")
# Names from which taking the signs that need quotes leaves nothing that another name leaves too.
_READABLE = re.compile(r"[\w-]+(\[{0}(,{0})*\])?(/\w+)?".format(r"\w+=-?[\w.]+(e-\d+)?"))
_LONGEST = 60  # signs: a file system takes 255 bytes, with the suffix of a file


def parted(name: str) -> tuple[str, dict[str, Any]]:
    """The method of a name, and the options that the name has in brackets: values are JSON where they can be, else
    words, as after --set.

    Raises UsageError for brackets with anything else in them.
    """
    if "[" not in name:
        return name, {}
    whole, options, at = _WHOLE.fullmatch(name.strip()), dict[str, Any](), 0
    inside = whole[2] if whole else ""
    while whole and (key := _KEY.match(inside, at)):
        value, end = _value(inside, key.end())
        closed = _END.match(inside, end)
        if end == key.end() or closed is None or key[1] in options:
            break
        options[key[1]], at = value, closed.end()
        if not closed[1]:
            return whole[1].strip(), options
    _, bracket, behind = name.strip().rpartition("]")
    if whole is None and bracket and behind:
        raise UsageError(f"{name!r} goes on after its brackets: options end a method's name, leave {behind!r} out")
    example = f"{name.partition('[')[0].strip()}[NAME=VALUE,NAME=VALUE]"
    raise UsageError(f"{name!r} has brackets that hold no options: write {example}, each option once")


def joined(method: str, options: Mapping[str, Any]) -> str:
    """The one name that a method with these options has: options by the order of their names."""
    said = ",".join(f"{name}={_written(value)}" for name, value in sorted(options.items()))
    return f"{method}[{said}]" if said else method


def plain(name: str) -> str:
    """The method of a name, without options."""
    return parted(name)[0]


def folder_of(name: str) -> str:
    """A name as that of a folder or file, which needs no quotes: drift[share=0.2] is drift-share=0.2.

    Two contenders never have the same one: where signs that are left out may tell names apart, a hash follows.
    """
    said = re.sub(r"[^\w.=+-]+", "-", name).strip("-")
    if _READABLE.fullmatch(name) and len(said) <= _LONGEST:
        return said
    return f"{said[:_LONGEST]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _value(text: str, at: int) -> tuple[Any, int]:
    """The value that begins there, and where it ends."""
    word = _WORD.match(text, at)
    try:
        _, end = json.JSONDecoder(parse_constant=_no_number).raw_decode(text, at)
        value = from_json(text[at:end])
    except (ValueError, RecursionError):
        return (word[0], word.end()) if word else (None, at)
    # 2x is a word, and no 2 that is followed by something.
    return (value, end) if word is None or word.end() <= end else (word[0], word.end())


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _written(value: Any) -> str:
    if isinstance(value, str) and _WORD.fullmatch(value) and _value(value, 0) == (value, len(value)):
        return value
    return json.dumps(value, separators=(",", ":"), sort_keys=True, ensure_ascii=False)
