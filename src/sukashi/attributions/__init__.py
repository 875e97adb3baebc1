"""Attributions: how much each position of each unit had to do with a logit, for all sites of a model in one pass.

`attribution(model, x, target, sites, **options)` gives {site: (B, U, positions...)}, detached, in the axes of
`hooks.gather`. Facts of an attribution: `signed` (False where values are never negative), `refuses` (("attention",)
where a method has no rules for it).
"""

from sukashi.registry import Registry

attributions = Registry("attribution", "attributions")

from sukashi.attributions import backtrace, deeplift, gradient, lrp  # noqa: E402, F401
