"""Where in a network to look when nobody says: layers early, in the middle and late."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

from sukashi.core.errors import UsageError
from sukashi.network import hooks
from sukashi.network.canonical import evaluating
from sukashi.network.layers import MAKERS, AttentionCore

_AT = (1 / 4, 2 / 3, 1)  # of the depth: blocks 2, 7 and 11 of 12, counted from 0
_IDLE = (nn.Identity, nn.Dropout)


def inner(model: nn.Module, x: Tensor) -> list[str]:
    """Up to three layers, early, in the middle and late: of blocks with attention what the second layer of their MLP
    reads, of other blocks their ends, of a network without blocks its activations.

    Blocks are layers with layers in them, and no blocks, that stand one after another in a Sequential or a ModuleList.
    Raises UsageError where nothing of these is called once in a pass of x (B, C, H, W).
    """
    with torch.no_grad(), evaluating(model):
        order = hooks.calls(model, x[:2].clone())
    once = {name for name, times in Counter(order).items() if times == 1}
    layers = {name: module for name, module in model.named_modules() if name in once}
    listed = {
        name
        for parent, module in model.named_modules()
        if isinstance(module, nn.Sequential | nn.ModuleList)
        for name in (f"{parent}.{child}".strip(".") for child in module._modules)
    }
    blocks = [name for name in order if name in listed and name in layers and _holds_layers(layers[name])]
    blocks = [name for name in blocks if not any(other.startswith(f"{name}.") for other in blocks)]
    if blocks:
        found = [_within(name, order, layers) for name in blocks]
    else:
        activations = [n for n in order if n in once and type(layers[n]).__module__ == nn.ReLU.__module__]
        found = activations or [n for n in order if n in once and isinstance(layers[n], MAKERS)]
    if not found:
        raise UsageError("which layers to look at can't be told of this network: give `layers`")
    n = len(found)
    return list(dict.fromkeys(found[max(0, round(n * depth) - 1)] for depth in _AT))


def _holds_layers(module: nn.Module) -> bool:
    return sum(isinstance(part, MAKERS) for part in module.modules()) > 1


def _within(block: str, order: list[str], layers: dict[str, nn.Module]) -> str:
    """What the last linear layer of a block with attention reads, by the layer that writes it; else the block."""
    inside = [name for name in order if name.startswith(f"{block}.") and name in layers]
    linear = [name for name in inside if isinstance(layers[name], nn.Linear)]
    if len(linear) < 2 or not any(isinstance(layers[name], AttentionCore) for name in inside):
        return block
    before = inside[: inside.index(linear[-1])]
    return next((n for n in reversed(before) if not isinstance(layers[n], _IDLE)), block)
