"""What kinds of experiments there are: one for each folder here with settings in it. Imports no torch."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache

from pydantic.fields import FieldInfo

from sukashi import experiments
from sukashi.core import schema
from sukashi.core.schema import Settings


@cache
def kinds() -> dict[str, type[Settings]]:
    """The settings of each command, by its name."""
    found: dict[str, type[Settings]] = {}
    for room in pkgutil.iter_modules(experiments.__path__):
        if room.ispkg:
            module = importlib.import_module(f"sukashi.experiments.{room.name}.settings")
            for value in vars(module).values():
                own = isinstance(value, type) and value.__module__ == module.__name__ and issubclass(value, Settings)
                if own and value.kind and value.command and "kind" in vars(value):
                    found[value.kind] = value
    return found


@cache
def fields() -> Mapping[str, FieldInfo]:
    """What messages may name: the settings of all commands, and `jobs`."""
    found = {name: field for kind in kinds().values() for name, field in kind.model_fields.items()}
    return {"jobs": FieldInfo(annotation=int, default=1), **found}


def spelled(message: str) -> str:
    """A message as it is at the command line, where settings are options; see `schema.spelled`."""
    return schema.spelled(message, fields(), {"results": "report", **{name: name for name in kinds()}})
