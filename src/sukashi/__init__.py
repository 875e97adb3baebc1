"""sukashi prunes vision networks with explanations, and measures what the cut did to them.

sukashi.check(model, data)                                  what would happen
sukashi.prune(model, data, criterion, ratio, out=folder)    cut for real, and save
sukashi.compare(model, data, criteria, out=folder)          criteria over ratios and seeds
sukashi.train(model, data, out=folder, epochs=20)           train, from random weights or given ones
sukashi.finetune(folder, data, out=folder, epochs=5)        train on, cuts and masks kept
sukashi.schedule(model, data, how, criteria, ratios, out=folder)   prune and train, level by level
sukashi.audit([model, ...], data, out=folder)               saliency maps of cuts beside those of the first model
sukashi.grid.run("study.toml")                              a study file: models x criteria x samplings x seeds
sukashi.load(folder_or_spec).model                          a network, ready to run
sukashi.report.write(folder)                                the page of a folder, again
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sukashi import grid, report
    from sukashi.auditing import audit
    from sukashi.levels import schedule
    from sukashi.models import load
    from sukashi.study import check, compare, prune
    from sukashi.tuning import finetune, train

__all__ = ["audit", "check", "compare", "finetune", "grid", "load", "prune", "report", "schedule", "train"]

# torch takes seconds to import and the command line must not wait for it.
_HOMES = {
    "audit": ("sukashi.auditing", "audit"),
    "check": ("sukashi.study", "check"),
    "compare": ("sukashi.study", "compare"),
    "prune": ("sukashi.study", "prune"),
    "schedule": ("sukashi.levels", "schedule"),
    "load": ("sukashi.models", "load"),
    "train": ("sukashi.tuning", "train"),
    "finetune": ("sukashi.tuning", "finetune"),
}


def __getattr__(name: str) -> Any:
    if name in ("grid", "report"):
        return importlib.import_module(f"sukashi.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'sukashi' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return __all__
