"""Criteria that look at the weights alone, or at nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sukashi.core.types import Batch, Scores, Site
from sukashi.criteria import UNITS, criteria
from sukashi.network.sparsity import weight_of


@criteria.register(
    "random",
    source="Cheng et al. 2024, the baseline of Bauvin et al. 2025, sec. 4.1",
    kinds=(*UNITS, "weight"),
    needs_data=False,
)
def random(model: nn.Module, sites: Sequence[Site], data: Batch, *, generator: torch.Generator) -> Scores:
    """Independent uniform scores in [0, 1), drawn on the CPU site by site."""
    shapes = {site: weight_of(model, site).shape if site.kind == "weight" else (site.n_units,) for site in sites}
    values = {site: torch.rand(shape, generator=generator, dtype=torch.float64) for site, shape in shapes.items()}
    return Scores(values, 0, "random")


@criteria.register(
    "magnitude",
    source="Bauvin et al. 2025, OMP of sec. 4.1; Li et al. 2017; of weights Han et al. 2015",
    kinds=(*UNITS, "weight"),
    needs_data=False,
)
def magnitude(model: nn.Module, sites: Sequence[Site], data: Batch, *, generator: torch.Generator) -> Scores:
    """Mean absolute weight of what produces a unit: s_u = mean_m mean_j |W_m[u, j]| over the producers m of its site.

    The plain L1 norm grows with the fan-in, so that a global ranking would empty the layers with few inputs first;
    dividing by the fan-in makes layers comparable (SAUCE 36 against 18 on a CIFAR ResNet-20).

    A single weight's score is |w|, in the weight's own type: nothing is computed that could need another.
    """
    values = {
        site: weight_of(model, site).detach().abs().cpu() if site.kind == "weight" else producer_magnitude(model, site)
        for site in sites
    }
    return Scores(values, 0, "magnitude")


def producer_magnitude(model: nn.Module, site: Site) -> Tensor:
    """Mean |weight| (U,) in float64 of a site's producers, normalisation layers left out."""
    total = torch.zeros(site.n_units, dtype=torch.float64)
    n_members = 0
    for member in site.producers:
        weight = getattr(model.get_submodule(member.module), "weight", None)
        if weight is None or weight.ndim < 2:
            continue
        per_row = weight.detach().double().abs().flatten(1).mean(1).cpu()
        total += per_row[torch.tensor(member.index)].mean(1)
        n_members += 1
    assert n_members, f"{site} has no producer with weights"
    return total / n_members
