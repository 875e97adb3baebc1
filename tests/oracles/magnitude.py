"""Criteria of the weights alone, unit by unit."""

import numpy as np
import torch

from oracles import oracle
from sukashi.core.types import Scores


def mean_magnitude(model, site):
    """The mean |weight| of what produces each unit, over its producers with weights of two axes or more."""
    rows = []
    for member in site.producers:
        weight = getattr(model.get_submodule(member.module), "weight", None)
        if weight is not None and weight.ndim >= 2:
            w = weight.detach().double().abs().flatten(1).mean(1).numpy()
            rows.append([np.mean([w[i] for i in index]) for index in member.index])
    return np.mean(rows, axis=0)


@oracle("criteria", "magnitude")
def magnitude(model, sites, data, *, generator):
    def of(site):
        if site.kind != "weight":
            return torch.from_numpy(mean_magnitude(model, site))
        weight = model.get_submodule(site.layer).weight
        return torch.tensor([abs(w) for w in weight.flatten().tolist()], dtype=weight.dtype).view(weight.shape)

    return Scores({site: of(site) for site in sites}, 0, "magnitude")


@oracle("criteria", "random", rtol=0, atol=0)
def random(model, sites, data, *, generator):
    """One number a unit, drawn one at a time."""

    def of(site):
        shape = model.get_submodule(site.layer).weight.shape if site.kind == "weight" else (site.n_units,)
        drawn = [torch.rand((), generator=generator, dtype=torch.float64) for _ in range(site.n_units)]
        return torch.stack(drawn).view(shape)

    return Scores({site: of(site) for site in sites}, 0, "random")
