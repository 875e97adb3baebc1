"""Settings that people write, checked: an unknown key, a missing one or a wrong value is one sentence, in our words."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from sukashi.core.errors import UsageError
from sukashi.core.registry import nearest

_Kind = TypeVar("_Kind", bound=BaseModel)
_TYPES = {
    "list_type": "a list",
    "string_type": "a string",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "dict_type": "a table",
    "model_type": "a table",
}


def checked(
    kind: type[_Kind],
    given: Mapping[str, Any],
    *,
    file: object = None,
    options: Iterable[str] = (),
    known: Iterable[str] = (),
) -> _Kind:
    """Settings of a kind from what was given, in a file or as keywords.

    `options` are keys that the command line may give in place of the file, `known` names beside the kind's own that
    would have been understood.

    Raises UsageError for a key that is unknown, missing or of a wrong value, in this order: a name that is misspelt is
    missing too.
    """
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        fault = min(error.errors(), key=lambda fault: fault["type"] != "extra_forbidden")
    *tables, name = map(str, fault["loc"])
    inner = _table(kind, tables)
    where = ".".join((*tables, name))
    if fault["type"] == "extra_forbidden":
        said = "unknown setting" if file is None else f"{file} has an unknown key"
        raise UsageError(f"{said} {where!r}{nearest(name, [*inner.model_fields, *known])}")
    if fault["type"] == "missing":
        among = f" in [{'.'.join(tables)}]" if tables else ""
        remedy = f", or give --{name}" if name in options else ""
        raise UsageError(f"{file} has no {name!r}{among}: add {_toml(name, _example(inner, name))}{remedy}")
    raise UsageError(f"{'' if file is None else f'{file}: '}{where} {_rule(fault, inner)}, got {fault['input']!r}")


def _table(kind: type[BaseModel], path: list[str]) -> type[BaseModel]:
    """The kind of the table at a path, or that of the nearest one around it."""
    for name in path:
        annotation = kind.model_fields[name].annotation if name in kind.model_fields else None
        inside = (annotation, *get_args(annotation))
        kind = next((found for found in inside if isinstance(found, type) and issubclass(found, BaseModel)), kind)
    return kind


def _example(kind: type[BaseModel], name: str) -> Any:
    """A value the key may have, or None."""
    field = kind.model_fields.get(name)
    return None if field is None else (field.examples or [None if field.is_required() else field.default])[0]


def _rule(fault: Mapping[str, Any], kind: type[BaseModel]) -> str:
    if fault["type"] in _TYPES:
        example = _example(kind, str(fault["loc"][-1]))
        return f"must be {_TYPES[fault['type']]}" + ("" if example is None else f" like {json.dumps(example)}")
    return (
        str(fault["msg"])
        .replace("Input should", "must")
        .replace("List should", "must")
        .replace(" after validation", "")
    )


def _toml(name: str, value: Any) -> str:
    """How a key and its value are written; `[table] with key = value` where the value is a table."""
    if not isinstance(value, Mapping):
        return f"{name} = {json.dumps(value)}"
    key, inner = next(iter(value.items()))
    return _toml(f"{name}.{key}", inner) if isinstance(inner, Mapping) else f"[{name}] with {_toml(key, inner)}"
