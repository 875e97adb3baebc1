"""Where a layer and its subspaces are relevant."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sukashi.attributions.lrp import Rules, lrp
from sukashi.core.objective import CLASSIFICATION, Objective
from sukashi.core.types import Site
from sukashi.decompositions.subspaces import Subspaces, virtual


def relevance_maps(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    layer: Site,
    subspaces: Subspaces,
    objective: Objective = CLASSIFICATION,
    *,
    rule: Rules = "alpha1beta0",
) -> Tensor:
    """(B, 1 + K, positions...) the relevance for a target (B,), by LRP, of all that a layer writes at a position, and
    of each of its K subspaces (Chormai et al. 2024, eq. 8).

    `layer` is the place of all of its features (`vectors.features`). Raises as `lrp` and `virtual` do.
    """
    with virtual(model, subspaces) as site:
        found = lrp(model, x, target, [layer, site], objective, rule=rule)
    whole = found[layer].reshape(len(x), 1, layer.n_units, -1)
    parts = found[site].reshape(len(x), site.n_units, subspaces.n_dimensions, -1)
    where = torch.cat([whole.sum(2), parts.sum(2)], 1)
    there: Tensor = where.unflatten(2, found[layer].shape[2:])
    return there
