"""Copies of a network with other weights: drawn anew from the logits downward, or as other rounding leaves them."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sukashi.network import hooks

STAGES = (0.0, 0.25, 0.5, 0.75, 1.0)  # shares of the layers with weights; one layer at least


def randomised(model: nn.Module, example: Tensor, seed: int) -> Iterator[tuple[int, str, nn.Module]]:
    """How many layers are drawn anew, the last of them by name, and the network in which they are; all at last.

    Cascading randomisation (Adebayo et al. 2018): layers are those with parameters of their own, the last that a pass
    calls first. A layer is drawn as its class does it at the start (`reset_parameters`), or where that does not say
    how, each tensor from a Gaussian of its own mean and deviation. What is drawn depends on the seed and the layer's
    name. One network is changed from step to step.
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


def rounded(model: nn.Module, seed: int) -> nn.Module:
    """The network as other rounding could have left it: every weight w is w (1 + e) or w (1 - e), drawn by `seed`.

    e is the precision of the weights, 2^-23 in float32. By as much numbers move in any layer where sums are taken in
    another order, by another device, batch or kernel. Weights of 0 stay: what was cut stays cut.
    """
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            sign = torch.randn(weight.shape, generator=generator).sign().to(weight)
            weight.mul_(1 + torch.finfo(weight.dtype).eps * sign)
    return model
