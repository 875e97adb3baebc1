"""sukashi prunes vision networks with explanations, and measures what the cut did to them.

sukashi.check(model, data)                                  what would happen
sukashi.prune(model, data, criterion, ratio, out=folder)    cut for real, and save
sukashi.compare(model, data, criteria, out=folder)          criteria over ratios and seeds
sukashi.train(model, data, out=folder, epochs=20)           train, from random weights or given ones
sukashi.finetune(folder, data, out=folder, epochs=5)        train on, cuts and masks kept
sukashi.schedule(model, data, how, criteria, ratios, out=folder)   prune and train, level by level
sukashi.audit([model, ...], data, out=folder)               saliency maps of cuts beside those of the first model
sukashi.study("study.toml")                                 a study file: models x criteria x samplings x seeds
sukashi.load(folder_or_spec).model                          a network, ready to run
sukashi.results(folder)                                     what a folder holds, its page written again
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sukashi.experiments.functions import (
        audit,
        check,
        compare,
        finetune,
        prune,
        results,
        schedule,
        study,
        train,
    )
    from sukashi.models import load

__all__ = [
    "audit",
    "check",
    "compare",
    "finetune",
    "load",
    "prune",
    "results",
    "schedule",
    "study",
    "train",
]

# torch takes seconds to import and the command line must not wait for it.
_HOMES = {name: ("experiments.functions", name) for name in __all__} | {
    "load": ("models", "load"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sukashi' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(f"sukashi.{module}"), attribute)


def __dir__() -> list[str]:
    return __all__
