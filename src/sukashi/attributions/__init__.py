"""Attributions: how much each position of each unit had to do with a logit, for all sites of a model in one pass.

`attribution(model, x, target, sites, objective, **options)` gives {site: (B, U, positions...)}, detached, in the axes
of `hooks.gather`, for what the objective says is explained: of a classifier the target's logit. Facts of an
attribution: `signed` (False where values are never negative), `refuses` and `needs` (("attention",) where a method has
no rules for it, or explains nothing without), `kinds` (those of the sites it can take, all where it isn't given: one
that takes pixels alone is no criterion).
"""

from sukashi.core.registry import Registry

attributions = Registry("attribution", "attributions")

from sukashi.attributions import (  # noqa: E402, F401
    backtrace,
    chefer,
    deeplift,
    gradcam,
    gradient,
    lrp,
    occlusion,
    smoothgrad,
)
