"""Calling measures: what they ask for by name is given, or made by a provider once for all that ask alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sukashi.core import files
from sukashi.core.errors import UsageError
from sukashi.core.registry import Method
from sukashi.core.types import Batch, Maps, Measurement
from sukashi.measures import measures

# What measures and providers may ask for, and what it is. Images are the same in all of them, row for row.
INPUTS: dict[str, Any] = {
    "model": nn.Module,  # in eval mode
    "batch": Batch,  # on the model's device
    "maps": Maps,  # saliency maps of the batch's images
    "reference_maps": Maps,  # of the same images, by the network that others are held against
    "masks": Mapping[str, Maps],  # where the evidence is, bool, by concept
    "generator": torch.Generator,  # draws
}


class Inputs:
    """What measures are given, and what providers have made of it so far."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._given = dict(given)
        self._made: dict[tuple[str, bytes], Any] = {}

    def get(self, name: str, options: Mapping[str, Any]) -> Any:
        """What goes by a name: as it was given, or made with those of `options` that are its provider's."""
        if name in self._given:
            return self._given[name]
        if name not in measures.providers:
            raise UsageError(f"{name!r} is asked for and neither given nor provided: give it by this name")
        provider = measures.providers[name]
        chosen = {option: options.get(option, default) for option, default in provider.options.items()}
        key = name, files.canonical(chosen)
        if key not in self._made:
            self._made[key] = self.call(provider, options)
        return self._made[key]

    def call(self, method: Method, options: Mapping[str, Any]) -> Any:
        """A measure or provider, with what it asks for by name and those of `options` that are its own."""
        asked = {name: self.get(name, options) for name in method.asks}
        if method.is_own and "generator" in asked:
            # Whatever it draws, those after it draw what they draw without it.
            asked["generator"] = asked["generator"].clone_state()
        return method(**asked, **{name: options[name] for name in method.own_options if name in options})

    def missing(self, method: Method) -> list[str]:
        """What would have to be given to call a method."""
        found: list[str] = []
        for name in method.asks:
            if name not in self._given:
                found += self.missing(measures.providers[name]) if name in measures.providers else [name]
        return list(dict.fromkeys(found))


def measured(
    names: Sequence[str], given: Mapping[str, Any] | Inputs, options: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Measurement]:
    """What measures find, in the order of `names`: {"gini": ..., "road": ..., "road/probability": ...}.

    `given` holds what they ask for by name (`INPUTS`), `options` those of each measure by its name. What a provider
    makes is made once for all measures that want it with the same options.

    Raises UsageError for unknown names and options and for what is asked for and not given, before anything is
    measured.
    """
    inputs, options = given if isinstance(given, Inputs) else Inputs(given), options or {}
    for name in names:
        measures[name].check_options(options.get(name, {}))
        if missing := inputs.missing(measures[name]):
            raise UsageError(f"{name} asks for what is not given: {', '.join(missing)}")
    found: dict[str, Measurement] = {}
    for name in names:
        method = measures[name]
        result = inputs.call(method, options.get(name, {}))
        parts = {"": result} if isinstance(result, Measurement) else result
        found |= {f"{name}/{part}" if part else name: measurement for part, measurement in parts.items()}
    return found
