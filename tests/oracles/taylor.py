"""Taylor by finite differences: each unit made a little louder and softer, in the weights of what reads it."""

import copy

import torch
import torch.nn.functional as F

from oracles import oracle
from sukashi.core.types import Scores
from sukashi.network.layers import AttentionCore

STEP = 1e-6  # small, so that no ReLU changes sides


def losses(model, site, unit, gate, data):
    """Cross entropy (B,) with the unit multiplied by `gate` wherever it is read."""
    model = copy.deepcopy(model)
    readers = {member.module: member for member in site.consumers}
    with torch.no_grad():
        core = any(isinstance(model.get_submodule(name), AttentionCore) for name in readers)
        # The core has no weights: what it reads is what qkv writes, and proj then reads what v became.
        members = site.producers if core else site.consumers
        for member in members:
            layer, index = model.get_submodule(member.module), list(member.index[unit])
            if core:
                layer.weight[index] *= gate
                layer.bias[index] *= gate
            else:
                layer.weight[:, index] *= gate
        return F.cross_entropy(model(data.x), data.target, reduction="none")


@oracle("criteria", "taylor", rtol=1e-5, atol=1e-8)
def taylor(model, sites, data, *, generator):
    """The mean absolute slope of each image's loss."""

    def score(site, unit):
        slope = losses(model, site, unit, 1 + STEP, data) - losses(model, site, unit, 1 - STEP, data)
        return float((slope / (2 * STEP)).abs().mean())

    values = {
        site: torch.tensor([score(site, unit) for unit in range(site.n_units)], dtype=torch.float64) for site in sites
    }
    return Scores(values, len(data), "taylor")
