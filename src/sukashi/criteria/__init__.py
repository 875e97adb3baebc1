"""Criteria: how important each unit is, or in which order units go.

Facts of a criterion: `needs_data` (False where it looks at no image), `progressive` (decides while it removes),
`visits` (how often it asks about a unit, from which its time is estimated: a bound where the network shrinks).
"""

from sukashi.registry import Registry

criteria = Registry("criterion", "criteria")

from sukashi.criteria import attributed, causal, drift, weights  # noqa: E402, F401
