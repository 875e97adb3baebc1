"""sukashi prunes vision networks with explanations, and measures what the cut did to them.

bench = sukashi.open(model, data)                           for a notebook: bench.sites, bench.rank("drift").cut(0.5)
sukashi.attribute(model, x, target, "lrp")                  what each pixel, or unit, had to do with a logit
sukashi.check(model, data)                                  what would happen
sukashi.prune(model, data, criterion, ratio, out=folder)    cut for real, and save
sukashi.repair(cut, model, data)                            what the cut took given back, without training
sukashi.compare(model, data, criteria, out=folder)          criteria over ratios and seeds
sukashi.train(model, data, out=folder, epochs=20)           train, from random weights or given ones
sukashi.finetune(folder, data, out=folder, epochs=5)        train on, cuts and masks kept
sukashi.schedule(model, data, how, criteria, ratios, out=folder)   prune and train, level by level
sukashi.export(folder)                                      an ONNX file that runs without sukashi
sukashi.audit([model, ...], data, out=folder)               saliency maps of cuts beside those of the first model
sukashi.study("study.toml")                                 a study file: models x criteria x samplings x seeds
sukashi.load(folder_or_spec).model                          a network, ready to run
sukashi.results(folder)                                     what a folder holds, its page written again

A model is a name, a saved folder or a torch module; data are a name, a folder, tensors, a torch Dataset or DataLoader.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sukashi.core.types import Preprocess
    from sukashi.experiments.functions import (
        attribute,
        audit,
        check,
        compare,
        concepts,
        export,
        finetune,
        load,
        open,
        prune,
        repair,
        results,
        schedule,
        study,
        train,
    )

__all__ = [
    "Preprocess",
    "attribute",
    "audit",
    "check",
    "compare",
    "concepts",
    "export",
    "finetune",
    "load",
    "open",
    "prune",
    "repair",
    "results",
    "schedule",
    "study",
    "train",
]

# torch takes seconds to import and the command line must not wait for it.
_HOMES = dict.fromkeys(__all__, "experiments.functions") | {"Preprocess": "core.types"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES and name not in importlib.import_module("sukashi.experiments.kinds").kinds():
        raise AttributeError(f"module 'sukashi' has no attribute {name!r}")
    home = _HOMES.get(name, "experiments.functions")
    return getattr(importlib.import_module(f"sukashi.{home}"), name)


def __dir__() -> list[str]:
    return sorted({*__all__, *importlib.import_module("sukashi.experiments.kinds").kinds()})
