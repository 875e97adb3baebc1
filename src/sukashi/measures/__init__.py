"""What a cut did: measures give a number for each image or unit; importing this package registers them.

A measure is a function that asks for what it needs by the names of its parameters, the keys of `inputs.INPUTS` and the
providers of this registry, and has options as keywords. It returns a `Measurement`, or several by name, {"": the one
that goes by the measure's name, "part": ...}, never averaged. The fact `better` is the
way that is good, "higher" or "lower", and None where it says nothing.
`inputs.measured` calls measures and makes once what several of them ask for.
"""

from collections.abc import Mapping
from typing import Any

from sukashi.core.errors import UsageError
from sukashi.core.registry import Registry, fill
from sukashi.core.types import Measurement


def _measures(name: str, found: Any, given: Mapping[str, Any]) -> None:
    """Refuse what is no Measurement and no several of them by name."""
    parts = found.values() if isinstance(found, Mapping) else [found]
    for part in parts:
        if not isinstance(part, Measurement):
            raise UsageError(
                f"{name} returned a value of type {type(part).__name__}, and a measure returns "
                "Measurement(a value each image, batch.image_id, unit)"
            )
        of = next((given[images].image_id for images in ("batch", "maps") if images in given), part.ids)
        if part.axis == "image" and part.ids != of:
            raise UsageError(
                f"{name} was given {len(of)} images and returned values of {len(part.ids)}: a measure returns a value "
                "of each, in their order, and never a mean"
            )


measures = Registry("measure", "measures", gives=_measures, better=None)

fill(__name__, __path__)
