"""DeepLIFT's rescale rule on a sequence of layers: multipliers as a chain of matrices."""

import torch
import torch.nn.functional as F
from torch import nn

from oracles import oracle
from oracles.matrices import dense, of_site, traced, windows


def written_out(model, image, base, target):
    """Contributions at the input of each layer of a sequence, for one image and its baseline."""
    found, both = [], list(zip(traced(model, image), traced(model, base), strict=True))
    multiplier = F.one_hot(target, both[-1][0][2].shape[1]).double()
    for (layer, z, after), (_, z0, after0) in reversed(both):
        change = (z - z0)[0]
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.AvgPool2d):
            multiplier = dense(layer, z.shape[1:])[0] @ multiplier.flatten()
        elif isinstance(layer, nn.MaxPool2d):
            multiplier = of_pool(layer, z[0], z0[0], multiplier)
        elif not isinstance(layer, nn.Flatten):
            quotient = (after - after0)[0] / change
            multiplier = torch.where(change == 0, slope(layer, z)[0], quotient) * multiplier
        multiplier = multiplier.view(change.shape)
        found.append(multiplier * change)
    return found[::-1]


def slope(layer, z):
    """What a nonlinearity's quotient comes to where there is no difference."""
    z = z.clone().requires_grad_()
    return torch.autograd.grad(layer(z).sum(), z)[0]


def of_pool(layer, z, z0, multiplier):
    """The difference of each maximum, at the place of the larger of both."""
    found = torch.zeros_like(z)
    for output, window in windows(layer, z):
        here, there = (max(window, key=lambda place, x=x: x[place]) for x in (z, z0))
        if z[here] == z0[there]:
            continue
        at = here if z[here] > z0[there] else there
        found[at] += multiplier[output] * (z[here] - z0[there]) / (z[at] - z0[at])
    return found


@oracle("attributions", "deeplift")
def deeplift(model, image, target, site, *, baseline=0.0):
    return of_site(written_out(model, image, torch.zeros_like(image) + baseline, target), site)
