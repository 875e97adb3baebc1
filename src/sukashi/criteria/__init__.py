"""Criteria: how important each unit is, or in which order units go.

Facts of a criterion: `kinds` (the kinds of site it scores; where it doesn't say, units that can be cut), `needs_data`
(False where it looks at no image), `progressive` (decides while it removes), `visits` (how often it asks about a
unit, from which its time is estimated: a bound where the network shrinks).
"""

from sukashi.core.registry import Registry
from sukashi.core.types import Kind

UNITS: tuple[Kind, ...] = ("channel", "hidden", "head")

criteria = Registry("criterion", "criteria", kinds=UNITS)

from sukashi.criteria import attributed, causal, drift, magnitude, wanda  # noqa: E402, F401
