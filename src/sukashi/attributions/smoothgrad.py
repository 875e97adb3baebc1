"""The slope of a logit, averaged over noise on the image."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from sukashi.attributions import attributions
from sukashi.attributions.gradient import Count, check, in_parts, slopes_at
from sukashi.core.objective import CLASSIFICATION, Objective
from sukashi.core.registry import BatchSize
from sukashi.core.types import Site
from sukashi.network import hooks

Level = Annotated[float, Field(gt=0)]


@attributions.register("smoothgrad", source="Smilkov et al. 2017, sec. 3")
def smoothgrad(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    sites: Sequence[Site],
    objective: Objective = CLASSIFICATION,
    *,
    n_samples: Count = 50,
    sigma: Level = 0.15,
    batch_size: BatchSize = 64,
) -> dict[Site, Tensor]:
    """Mean slope of the target's logit over noise on the image: 1/n sum of dF(x + e) / da, e Gaussian.

    `sigma` is the deviation of e in parts of what lies between the image's lowest and highest value (Smilkov et al.
    find .1 to .2 good, and little beyond 50 `n_samples`). An image's noise is drawn from what is in it: it is the same
    in every batch, and for every network that reads the image in the same way. `batch_size` bounds the rows (images
    times samples) in one pass.

    Raises DataError for no images and for targets that are not one class number an image, ModelError for layers in
    training mode, sites that hooks cannot take and an output that is not logits (B, K).
    """
    check(model, x, target, objective)

    def explain(rows: slice) -> dict[Site, Tensor]:
        images = x[rows].detach()
        flat = images.flatten(1)
        spread = (sigma * (flat.amax(1) - flat.amin(1))).view(-1, *[1] * (x.dim() - 1))
        noise = torch.stack([_noise(image, n_samples) for image in images], 1) * spread  # (n, B, C, H, W)
        total: dict[Site, list[Tensor]] = {}
        for part in noise.split(max(1, batch_size // len(images))):
            noisy = (images + part).flatten(0, 1)
            _, slopes = slopes_at(model, noisy, target[rows].repeat(len(part)), sites, objective)
            for site in sites:
                sums = [t.unflatten(0, (len(part), len(images))).sum(0) for t in slopes.pop(site)]
                total[site] = [a + b for a, b in zip(total[site], sums, strict=True)] if site in total else sums
        return {site: hooks.gather(site, total.pop(site)) / n_samples for site in sites}

    return in_parts(explain, len(x), batch_size // n_samples)


def _noise(image: Tensor, n: int) -> Tensor:
    """(n, C, H, W) Gaussian noise that belongs to an image; from the CPU, so that every device has the same."""
    digest = hashlib.sha256(image.cpu().contiguous().numpy().tobytes()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randn(n, *image.shape, generator=generator, dtype=torch.float32).to(image)
