"""Attribution patching: what the logit would lose, to first order, if a unit were its mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from sukashi.attributions.gradient import check, in_parts, slopes_at
from sukashi.core.objective import CLASSIFICATION, Objective
from sukashi.core.types import Site
from sukashi.network import hooks


def patching(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    sites: Sequence[Site],
    means: Mapping[Site, Tensor],
    objective: Objective = CLASSIFICATION,
    *,
    batch_size: int = 64,
) -> dict[Site, Tensor]:
    """(B, U) of each unit (a - m) dF / da, summed over its positions: the share of the target's logit that goes, to
    first order, when the unit becomes its mean m, as `hooks.ablated` makes it (Nanda 2023, attribution patching).

    `means` (U, R) are those of `hooks.means`. What is left out falls with the square of a step towards the mean.

    Raises as `gradient_x_activation` does.
    """
    check(model, x, target, objective)

    def explain(rows: slice) -> dict[Site, Tensor]:
        held, slopes = slopes_at(model, x[rows], target[rows], sites, objective)
        found = {}
        for site in sites:
            a, g = held.pop(site), slopes.pop(site)
            m = hooks.laid(site, means[site], a)
            lost = [((a - m[:, None]) * g).sum(2) for a, g, m in zip(map(_flat, a), map(_flat, g), m, strict=True)]
            of = hooks.gather(site, lost)
            found[site] = of if of.dim() == 2 else of.sum(2)
        return found

    return in_parts(explain, len(x), batch_size)


def _flat(tensor: Tensor) -> Tensor:
    """(B, N, P) of (B, N, positions...)."""
    return tensor.flatten(2) if tensor.dim() > 2 else tensor[:, :, None]
