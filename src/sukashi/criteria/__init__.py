"""Criteria: how important each unit is, or in which order units go. What one is given and gives: docs/criteria.md.

Facts of a criterion: `kinds` (the kinds of site it scores; where it doesn't say, units that can be cut), `needs_data`
(False where it looks at no image), `progressive` (decides while it removes), `visits` (how often it asks about a
unit, from which its time is estimated: a bound where the network shrinks).
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sukashi.core.errors import UsageError
from sukashi.core.registry import Registry, fill
from sukashi.core.types import Kind, Plan, Scores

UNITS: tuple[Kind, ...] = ("channel", "hidden", "head")


def _speaks_of_every_unit(name: str, found: Any, given: Mapping[str, Any]) -> None:
    """Refuse what is neither Scores of the sites that a criterion was given nor a Plan of them."""
    if not isinstance(found, Scores | Plan):
        raise UsageError(
            f"{name} returned a value of type {type(found).__name__}, and a criterion returns "
            f"Scores({{site: a score each unit}}, number of images, {name!r}) or a Plan"
        )
    sites, told = list(given["sites"]), list(found.values if isinstance(found, Scores) else found.sites)
    if set(told) != set(sites):
        missing = next((site.layer for site in sites if site not in told), None)
        raise UsageError(
            f"{name} says nothing of site {missing!r}: a criterion scores every site that it is given"
            if missing is not None
            else f"{name} speaks of {len(told)} sites and was given {len(sites)}: a criterion scores those alone"
        )
    for site, values in found.values.items() if isinstance(found, Scores) else ():
        shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        wanted = given["model"].get_submodule(site.layer).weight.shape if site.kind == "weight" else (site.n_units,)
        if shape != tuple(wanted):
            raise UsageError(
                f"scores of {name} at {site.layer!r} are {shape}, and must be a tensor {tuple(wanted)}, one a unit"
            )


criteria = Registry(
    "criterion",
    "criteria",
    takes="model, sites, data, *, generator",
    gives=_speaks_of_every_unit,
    kinds=UNITS,
)

fill(__name__, __path__)
