"""What many tests make: noise, the logits explained, networks that have learned something."""

import torch
import torch.nn.functional as F

from sukashi.core.types import Mask, Site

PIXELS = Site("", "pixel", 3)
TARGET = torch.tensor([0, 2, 1])


def noise(*shape, seed=0, dtype=torch.float64):
    """Gaussian noise that depends on the seed alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def half_of(sites, seed):
    """A mask that keeps about half of the units, drawn by the seed, and one of each site at least."""
    generator = torch.Generator().manual_seed(seed)
    keep = {site: torch.rand(site.n_units, generator=generator) < 0.5 for site in sites}
    for kept in keep.values():
        kept[seed % len(kept)] = True
    return Mask(keep)


def logit(model, x, target):
    """(B,) the target's logit of each image."""
    with torch.no_grad():
        return model(x).gather(1, target[:, None])[:, 0]


def explained(attribution, model, x, target=TARGET, site=PIXELS, **options):
    """What an attribution says at one site."""
    return attribution(model, x, target, [site], **options)[site]


def fitted(model, images, *, epochs, size, rate):
    """The model in eval mode after AdamW with one cycle of the learning rate up to `rate`, in batches of `size`."""
    model.train()
    optimiser = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=epochs * -(-len(images) // size))
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(size):
            optimiser.zero_grad()
            F.cross_entropy(model(images.x[rows]), images.target[rows]).backward()
            optimiser.step()
            schedule.step()
    model.eval().zero_grad()
    return model
