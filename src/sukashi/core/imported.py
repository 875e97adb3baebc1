"""What is named as package.module:name: something of one's own that Python can import."""

from __future__ import annotations

import importlib
import os
import re
import sys
from typing import Any

from sukashi.core.errors import SukashiError, UsageError, brief, raised_in

_NAMED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def is_import(spec: str) -> bool:
    """Whether a text has the form package.module:name."""
    return _NAMED.fullmatch(spec) is not None


def imported(spec: str) -> Any:
    """What `name` is in package.module, of the working directory too where nothing else goes by that name.

    Raises UsageError where there is none, and where the module raises anything, which says where it does.
    """
    module, _, name = spec.partition(":")
    # Last, so that nothing in it stands before what is installed.
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module), name)
    except SukashiError:
        raise
    except (Exception, SystemExit) as error:  # whatever somebody's module raises; a script may end the process
        where = raised_in(error)
        missing = isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")
        remedy = (
            "check the name, and that its folder is the working directory or on PYTHONPATH"
            if missing or where is None
            else f"{where} raised it, put that right"
        )
        raise UsageError(f"cannot import {spec} ({brief(error)}): {remedy}") from error
