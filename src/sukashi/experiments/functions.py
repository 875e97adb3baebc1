"""The functions of the face: keywords become settings, settings are executed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sukashi.core.experiment import Result
from sukashi.experiments.audit.settings import Audit
from sukashi.experiments.executor import execute


def audit(
    models: list[str], data: str, *, out: str | Path, command: str = "sukashi.audit(...)", **settings: Any
) -> Result | None:
    own = {name: settings.pop(name) for name in list(settings) if name in Audit.model_fields}
    reading = {"test_images": 500} | settings
    return execute(Audit(models=models, data=data, reading=reading, **own), out, command=command)
