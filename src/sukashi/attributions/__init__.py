"""Attributions: how much each position of each unit had to do with a logit, for all sites of a model in one pass.

`attribution(model, x, target, sites, objective, **options)` gives {site: (B, U, positions...)}, detached, in the axes
of `hooks.gather`, for what the objective says is explained: of a classifier the target's logit. Facts of an
attribution: `signed` (False where values are never negative), `refuses` and `needs` (("attention",) where a method has
no rules for it, or explains nothing without), `kinds` (those of the sites it can take, all where it isn't given: one
that takes pixels alone is no criterion).
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sukashi.core.errors import UsageError
from sukashi.core.registry import Registry, fill


def _explains_every_unit(name: str, found: Any, given: Mapping[str, Any]) -> None:
    """Refuse what is no tensor (B, U, positions...) for each site that an attribution was given."""
    if not isinstance(found, Mapping):
        raise UsageError(
            f"{name} returned a value of type {type(found).__name__}, and an attribution returns {{site: a tensor}}"
        )
    for site in given["sites"]:
        values = found.get(site)
        shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        wanted = (len(given["x"]), site.n_units)
        if shape[:2] != wanted:
            raise UsageError(
                f"what {name} gives at {site.layer or 'the input'!r} is {shape}, and must be a tensor (images, units, "
                f"positions...) with {wanted[0]} images and {wanted[1]} units"
            )


attributions = Registry(
    "attribution", "attributions", takes="model, x, target, sites, objective", gives=_explains_every_unit
)

fill(__name__, __path__)
