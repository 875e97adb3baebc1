"""Criteria made of attributions: what an explanation says about units, averaged over images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sukashi import hooks
from sukashi.criteria import criteria
from sukashi.types import Batch, Scores, Site


@criteria.register("taylor", source="Molchanov et al. 2017, eq. 8; 2019, gate form")
def taylor(
    model: nn.Module, sites: Sequence[Site], data: Batch, *, generator: torch.Generator, batch_size: int = 64
) -> Scores:
    """First-order change of the loss when a unit goes: s_u = mean_x |dL(x) / dg_u|, g_u = 1 a gate on all its readers.

    L is the cross entropy of the target. dL/dg_u = sum over readers and positions of activation times gradient, so the
    coupled reads of a residual stage count together, with their signs; one backward pass serves all sites.
    """
    device = next(model.parameters()).device
    total = {site: torch.zeros(site.n_units, dtype=torch.float64) for site in sites}
    for batch in data.split(batch_size):
        gates = {site: torch.ones(len(batch), site.n_units, device=device, requires_grad=True) for site in sites}
        with torch.enable_grad(), hooks.masked(model, gates):
            # The sum keeps every image's gradient its own, whatever the batch size.
            loss = F.cross_entropy(model(batch.x.to(device)), batch.target.to(device), reduction="sum")
            gradients: tuple[Tensor, ...] = torch.autograd.grad(loss, list(gates.values()))
        for site, gradient in zip(gates, gradients, strict=True):
            total[site] += gradient.detach().double().abs().sum(0).cpu()
    return Scores({site: value / len(data) for site, value in total.items()}, len(data), "taylor")
