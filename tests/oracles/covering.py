"""Attributions by noise, by covering and by a layer's maps: image by image, sample by sample, patch by patch."""

import hashlib

import torch

from oracles import oracle
from oracles.gradient import point


@oracle("attributions", "smoothgrad")
def smoothgrad(model, image, target, site, *, n_samples=50, sigma=0.15):
    """The mean slope over images with noise, which is drawn from the bytes of the image."""
    seed = int.from_bytes(hashlib.sha256(image.numpy().tobytes()).digest()[:8], "big") >> 1
    draw = torch.Generator().manual_seed(seed)
    noise = torch.randn(n_samples, *image.shape, generator=draw, dtype=torch.float32).to(image)
    spread = sigma * (image.max() - image.min())
    return sum(point(model, site, image + spread * one, target)[1] for one in noise) / n_samples


@oracle("attributions", "occlusion")
def occlusion(model, image, target, site, *, window=1, stride=1):
    """The mean, over the patches on a pixel, of what the logit loses with them; of eight pixels a patch has one."""
    channels, height, width = image.shape
    total, times = torch.zeros(height, width).double(), torch.zeros(height, width).double()
    with torch.no_grad():
        whole = model(image[None])[0, target]
        top = 0
        while top == 0 or top < height - window + stride:
            left = 0
            while left == 0 or left < width - window + stride:
                covered = image.clone()
                covered[:, top : top + window, left : left + window] = 0
                total[top : top + window, left : left + window] += whole - model(covered[None])[0, target]
                times[top : top + window, left : left + window] += 1
                left += stride
            top += stride
    return (total / times / channels).flatten().repeat(channels, 1)


@oracle("attributions", "rise", n_masks=20, cells=2)
def rise(model, image, target, site, *, n_masks=20, cells=2, kept=0.5):
    """Mask by mask: the logit of what is seen, less the mean of all, times the mask."""
    channels, *size = image.shape
    generator = torch.Generator().manual_seed(0)
    grids = (torch.rand(n_masks, cells + 1, cells + 1, generator=generator) < kept).to(image)
    sides = [-(-length // cells) for length in size]
    shifts = [torch.randint(side, (n_masks,), generator=generator).tolist() for side in sides]
    masks, logits = [], []
    with torch.no_grad():
        for grid, top, left in zip(grids, *shifts, strict=True):
            large = [(cells + 1) * side for side in sides]
            mask = torch.nn.functional.interpolate(grid[None, None], size=large, mode="bilinear")[0, 0]
            masks.append(mask[top : top + size[0], left : left + size[1]])
            logits.append(model((image * masks[-1])[None])[0, target])
    mean = sum(logits) / n_masks
    total = sum((logit - mean) * mask for logit, mask in zip(logits, masks, strict=True))
    return (total / (n_masks * kept) / channels).flatten().repeat(channels, 1)


@oracle("attributions", "gradcam")
def gradcam(model, image, target, site):
    """Channel by channel of what the last layer before vectors gives, each pixel of the image between four of a map."""
    body = list(model).index(next(layer for layer in model if isinstance(layer, torch.nn.Flatten)))
    maps = model[:body](image[None]).detach().requires_grad_()
    (slope,) = torch.autograd.grad(model[body:](maps)[0, target], maps)
    n, h, w = maps.shape[1:]
    small = sum(slope[0, k].mean() * maps[0, k].detach() for k in range(n)).clamp(min=0)
    channels, height, width = image.shape

    def between(place, size, whole):
        """The two places of a map that a pixel's centre lies between, and how near it is to the second."""
        at = min(max((place + 0.5) * size / whole - 0.5, 0), size - 1)
        return int(at), min(int(at) + 1, size - 1), at - int(at)

    large = torch.zeros(height, width).double()
    for i in range(height):
        for j in range(width):
            (a, b, s), (c, d, t) = between(i, h, height), between(j, w, width)
            above, below = ((1 - t) * small[row, c] + t * small[row, d] for row in (a, b))
            large[i, j] = (1 - s) * above + s * below
    return (large / channels).flatten().repeat(channels, 1)
