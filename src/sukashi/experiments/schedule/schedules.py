"""Schedules: in which order a network is pruned and trained to reach each ratio of a list.

A schedule knows nothing of files or data. It is given three functions: `prune(network, ratio)` removes until that
fraction of the *dense* network's units or weights is gone, `rewind(network)` gives what remains the values it had
before training (or early in it), and `level(ratio, make)` is the trained network of a ratio, from what `make()` gives;
where that level is kept already nothing is made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from sukashi.core.registry import Registry
from sukashi.models import Loaded

schedules = Registry("schedule", "schedules")

Prune = Callable[[Loaded, float], Loaded]
Rewind = Callable[[Loaded], Loaded]
Level = Callable[[float, Callable[[], Loaded]], Loaded]


@schedules.register("oneshot", source="Han et al. 2015, one step; Zhang 2026 (IMPACT), sec. 3.1", rewinds=False)
def oneshot(dense: Loaded, ratios: Sequence[float], *, prune: Prune, rewind: Rewind, level: Level) -> None:
    """Each ratio from the dense network: prune at once, fine-tune."""
    for ratio in ratios:
        level(ratio, partial(prune, dense, ratio))


@schedules.register("iterative", source="Han et al. 2015, sec. 3.4", rewinds=False)
def iterative(dense: Loaded, ratios: Sequence[float], *, prune: Prune, rewind: Rewind, level: Level) -> None:
    """Each ratio from the one before: prune further, fine-tune."""
    network = dense
    for ratio in ratios:
        network = level(ratio, partial(prune, network, ratio))


@schedules.register("lottery", source="Frankle & Carbin 2019, sec. 2; Suwal et al. 2025, sec. 3.1", rewinds=True)
def lottery(dense: Loaded, ratios: Sequence[float], *, prune: Prune, rewind: Rewind, level: Level) -> None:
    """Each ratio from the one before: prune further, rewind what is left, train it as the dense network was."""
    network = dense
    for ratio in ratios:
        network = level(ratio, partial(_rewound, prune, rewind, network, ratio))


def _rewound(prune: Prune, rewind: Rewind, network: Loaded, ratio: float) -> Loaded:
    return rewind(prune(network, ratio))
