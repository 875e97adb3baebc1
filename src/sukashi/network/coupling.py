"""Which positions of which layers go together when units are cut, seen through one forward pass.

Labels that a pass ties (see `labels`) are one unit. What is unknown fixes its labels: a unit is never proposed on a
guess, and no proposal is trusted.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from sukashi.network import hooks
from sukashi.network.labels import Pass, Side
from sukashi.network.layers import MAKERS


@dataclass
class Group:
    """Units that start at a layer, and everywhere they lie: {(layer, side): positions of each unit}."""

    root: str
    n_units: int
    places: dict[tuple[str, Side], list[list[int]]]
    reason: str
    """Why they can't be cut, or ""."""


@dataclass
class Trace:
    """What a forward pass shows: groups in the order of their roots, and all calls."""

    groups: list[Group]
    calls: list[str]
    others: dict[str, str]
    """Layers that have no units of their own, and why."""


def traced(model: nn.Module, x: Tensor) -> Trace:
    """The groups of a model in eval mode, seen on images x (B, C, H, W)."""
    pass_ = Pass(model)
    with torch.no_grad(), hooks.followed(model, pass_.leave, pass_.enter), pass_:
        output = model(x)
    pass_.fix(pass_.labels(output), "its units are the model's output")
    return Trace(_groups(pass_), pass_.calls, pass_.others)


def _groups(pass_: Pass) -> list[Group]:
    owner = _units(pass_)
    reason = _reasons(pass_, owner)
    alone = {int(owner[label]): why for label, why in reversed(pass_.together)}
    places = {place: owner[np.maximum(at.long().numpy(), 0)] for place, at in pass_.places.items()}
    first: dict[int, str] = {}
    order = {name: n for n, name in reversed(list(enumerate(pass_.calls)))}
    roots: dict[str, list[int]] = defaultdict(list)
    for (name, side), units in sorted(places.items(), key=lambda item: order.get(item[0][0], -1)):
        if side == "out" and isinstance(pass_.model.get_submodule(name), MAKERS):
            for unit in dict.fromkeys(units.tolist()):
                if unit not in first:
                    first[unit] = name
                    roots[name].append(unit)
    held: dict[int, dict[tuple[str, Side], list[int]]] = defaultdict(lambda: defaultdict(list))
    for place, units in places.items():
        for position, unit in enumerate(units.tolist()):
            if unit in first:
                held[unit][place].append(position)
    return [_group(root, units, held, reason, alone) for root, units in roots.items()]


def _group(
    root: str,
    units: list[int],
    held: dict[int, dict[tuple[str, Side], list[int]]],
    reason: dict[int, tuple[int, str]],
    alone: dict[int, str],
) -> Group:
    count = Counter(place for unit in units for place in held[unit])
    why = min((reason[unit] for unit in units if unit in reason), default=(0, ""))[1]
    part = next((name for (name, _), n in count.items() if n < len(units)), "")
    if not why and part:
        why = f"only some of its units reach layer {part!r}"
    if not why and not any(side == "in" for _, side in count):
        why = "nothing that could lose units reads its units"
    if not why and len(units) == 1:
        why = alone.get(units[0], "its positions can only go all together, and one unit always stays")
    return Group(root, len(units), {place: [held[unit][place] for unit in units] for place in count}, why)


def _units(pass_: Pass) -> np.ndarray:
    """The unit of each label; that of 0 has no positions worth a word."""
    n = pass_.n_labels + 1
    ties = torch.cat([torch.empty(2, 0, dtype=torch.long), *pass_.ties], 1).numpy()
    graph = coo_array((np.ones(ties.shape[1], dtype=np.int8), (ties[0], ties[1])), shape=(n, n))
    return np.asarray(connected_components(graph, directed=False)[1])


def _reasons(pass_: Pass, owner: np.ndarray) -> dict[int, tuple[int, str]]:
    """{unit: (rank, why it is fixed)}, the first word first."""
    found: dict[int, tuple[int, str]] = {}
    for rank, (labels, why) in enumerate(pass_.fixed):
        for unit in owner[labels.numpy()].tolist():
            found.setdefault(unit, (rank, why))
    return found
