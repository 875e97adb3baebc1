"""Networks whose layers are drawn anew, from the logits downward (Adebayo et al. 2018, cascading randomisation)."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sukashi.experiments.audit.networks import FEW
from sukashi.experiments.audit.saliency.values import Array
from sukashi.experiments.workspace import Record
from sukashi.network import hooks

# Correlations from which on most, or part, of a map is told to be there whatever a network learned.
MOST, PART = 0.5, 0.1
STAGES = (0.0, 0.25, 0.5, 0.75, 1.0)  # shares of the layers with weights; one layer at least


def randomised(model: nn.Module, example: Tensor, seed: int) -> Iterator[tuple[int, str, nn.Module]]:
    """How many layers are drawn anew, the last of them by name, and the network in which they are; all at last.

    Layers are those with parameters of their own, the last that a pass calls first. A layer is drawn as its class does
    it at the start (`reset_parameters`), or where that does not say how, each tensor from a Gaussian of its own mean
    and deviation. What is drawn depends on the seed and the layer's name.
    """
    layers = dict(model.named_modules())
    with torch.no_grad():
        order = hooks.calls(model, example)
    called = dict.fromkeys(name for name in reversed(order) if list(layers[name].parameters(recurse=False)))
    others = [name for name, layer in layers.items() if name not in called and list(layer.parameters(recurse=False))]
    names = [*called, *others]
    changed = copy.deepcopy(model)
    done = 0
    for share in STAGES:
        n_layers = max(1, math.ceil(share * len(names)))
        if n_layers > done:
            for name in names[done:n_layers]:
                _draw(changed.get_submodule(name), f"{seed}/{name}")
            done = n_layers
            yield n_layers, names[n_layers - 1], changed


def _draw(layer: nn.Module, what: str) -> None:
    """New parameters of a layer, drawn on the CPU by a hash of `what`."""
    tensors = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
    fresh = copy.deepcopy(layer).cpu()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(int.from_bytes(hashlib.sha256(what.encode()).digest()[:8], "big") >> 1)
        if callable(reset := getattr(fresh, "reset_parameters", None)):
            reset()
        else:
            for parameter in fresh.parameters(recurse=False):
                parameter.normal_(float(parameter.mean()), float(parameter.std(correction=0)))
        for old, new in zip(tensors, [*fresh.parameters(recurse=False), *fresh.buffers(recurse=False)], strict=True):
            old.copy_(new)


def values(records: Sequence[Record], names: Sequence[str]) -> tuple[list[dict[str, Any]], list[Array]]:
    """How like the reference's the maps are that it has when layers are drawn anew, image by image, NaN left out.

    Of each row {"attribution", "measure", "layers", "down_to"}: so many layers, the last of them by name. The last row
    of an attribution and measure is of all layers.
    """
    found: list[dict[str, Any]] = []
    rows: list[Array] = []
    by_name = {record.result["attribution"]: record for record in records if "sanity" in record.about}
    for name in names:
        for column, of_images in by_name[name].arrays("sanity").items() if name in by_name else ():
            stage, _, measure = column.partition(" ")
            if np.isfinite(of_images).any():
                rows.append(of_images[np.isfinite(of_images)])
                found.append({"attribution": name, "measure": measure, **by_name[name].result["stages"][int(stage)]})
    return found, rows


def doubts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each attribution: how like its maps are whatever the network learned, by rank correlation, which
    is 0 of maps that have nothing to do with each other."""
    last = {row["attribution"]: row for row in rows if row["measure"] == "rank_correlation" and row["n"] >= FEW}
    return [
        f"{name}: with {_all(row['layers'])} of the reference drawn anew {row['measure']} with its own map is "
        f"{row['mean']:.2f}{_interval(row)}: {_so(row)}."
        for name, row in last.items()
    ]


def _all(n_layers: int) -> str:
    return "the one layer" if n_layers == 1 else f"all {n_layers} layers"


def _interval(row: Mapping[str, Any]) -> str:
    return "" if row["low"] is None else f" [{row['low']:.2f}, {row['high']:.2f}]"


def _so(row: Mapping[str, Any]) -> str:
    if row["low"] >= PART:
        share = "most" if row["low"] >= MOST else "part"
        return f"{share} of such a map does not depend on what the network learned"
    if row["high"] < MOST:
        return "such maps depend on what the network learned, for the most part"
    return "how much of such a map depends on what the network learned can't be told from so few images"
