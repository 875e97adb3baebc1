"""What many tests make: noise, the logits explained, networks that have learned something."""

import numpy as np
import torch
import torch.nn.functional as F

from sukashi.core.types import Curve, Mask, Site

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


def a_curve(correct, fraction=None, *, ratio=None, n_removed=None, target=None, image_ids=None):
    """A curve over rows of answers, dense first; what is not given is a unit a row, ten in all, and one class."""
    correct = np.asarray(correct, dtype=bool)
    n_removed = np.arange(len(correct)) if n_removed is None else np.asarray(n_removed)
    fraction = n_removed / 10 if fraction is None else np.asarray(fraction, dtype=float)
    target = np.zeros(correct.shape[1], dtype=np.int32) if target is None else np.asarray(target, dtype=np.int32)
    return Curve(
        ratio=n_removed / 10 if ratio is None else np.asarray(ratio, dtype=float),
        n_removed=n_removed,
        fraction=fraction,
        flops=np.round(1000 * (1 - fraction)).astype(int),
        answer=np.where(correct, target, target + 1).astype(np.int32),
        correct=correct,
        target=target,
        image_ids=tuple(map(str, range(correct.shape[1]))) if image_ids is None else tuple(image_ids),
    )


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
