"""Criteria: how important each unit is, or in which order units go."""

from sukashi.registry import Registry

criteria = Registry("criterion", "criteria")

from sukashi.criteria import attributed, causal, drift, weights  # noqa: E402, F401
