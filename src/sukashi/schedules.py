"""Schedules: in which order a network is pruned and trained to reach each ratio of a list.

A schedule is a generator over (ratio, network). It is given three functions and knows nothing of files or data:
`prune(network, ratio)` removes until that fraction of the *dense* network's units or weights is gone, `fit(network,
ratio)` trains what is left, `rewind(network)` gives its remaining weights the values they had before training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from sukashi.models import Loaded
from sukashi.registry import Registry

schedules = Registry("schedule", "schedules")

Prune = Callable[[Loaded, float], Loaded]
Fit = Callable[[Loaded, float], Loaded]
Rewind = Callable[[Loaded], Loaded]
Levels = Iterator[tuple[float, Loaded]]


@schedules.register("oneshot", source="Han et al. 2015, one step; Zhang 2026 (IMPACT), sec. 3.1", whole=False)
def oneshot(dense: Loaded, ratios: Sequence[float], *, prune: Prune, fit: Fit, rewind: Rewind) -> Levels:
    """Each ratio from the dense network: prune at once, fine-tune."""
    for ratio in ratios:
        yield ratio, fit(prune(dense, ratio), ratio)


@schedules.register("iterative", source="Han et al. 2015, sec. 3.4", whole=False)
def iterative(dense: Loaded, ratios: Sequence[float], *, prune: Prune, fit: Fit, rewind: Rewind) -> Levels:
    """Each ratio from the one before: prune further, fine-tune."""
    network = dense
    for ratio in ratios:
        network = fit(prune(network, ratio), ratio)
        yield ratio, network


@schedules.register("lottery", source="Frankle & Carbin 2019, sec. 2; Suwal et al. 2025, sec. 3.1", whole=True)
def lottery(dense: Loaded, ratios: Sequence[float], *, prune: Prune, fit: Fit, rewind: Rewind) -> Levels:
    """Each ratio from the one before: prune further, rewind what is left, and train it as the dense one was trained."""
    network = dense
    for ratio in ratios:
        network = fit(rewind(prune(network, ratio)), ratio)
        yield ratio, network
