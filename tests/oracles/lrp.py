"""LRP on a sequence of layers: each rule written out over the dense matrix of its layer, output by output."""

import torch
import torch.nn.functional as F
from torch import nn

from oracles import oracle
from oracles.matrices import dense, of_site, traced

EPSILON, GAMMA = 1e-6, 0.25


def shares(rule, x, weight, bias, bias_counts=True):
    """s_ij with R_i = sum_j s_ij R_j, for z = x @ weight + bias."""
    c = x[:, None] * weight
    z = c.sum(0) + bias
    if rule == "epsilon":
        return c / (z + torch.where(z < 0, -EPSILON, EPSILON))
    if rule == "alpha1beta0":
        c = c.clamp(min=0)
        return c / (c.sum(0) + bias.clamp(min=0) * bias_counts + EPSILON)
    found = torch.zeros_like(c)
    for j in range(len(z)):
        if z[j] == 0:
            continue
        rising = 1 if z[j] > 0 else -1
        favoured = weight[:, j] * torch.where(x >= 0, rising, -rising) > 0
        d = x * torch.where(favoured, weight[:, j] + GAMMA * weight[:, j], weight[:, j])
        b = bias[j] * (1 + GAMMA * bool(bias[j] * rising > 0))
        found[:, j] = d / (d.sum() + b + rising * EPSILON)
    return found


def written_out(rule, model, image, target, **options):
    """Relevance at the input of each layer of a sequence, for one image."""
    steps = traced(model, image)
    logits = steps[-1][2]
    r = F.one_hot(target, logits.shape[1]) * logits[0]
    found = []
    for layer, before, _ in reversed(steps):
        if isinstance(layer, nn.Linear | nn.Conv2d):
            part = {"epsilon_plus": "epsilon" if isinstance(layer, nn.Linear) else "alpha1beta0"}.get(rule, rule)
            r = shares(part, before.flatten(), *dense(layer, before.shape[1:]), **options) @ r.flatten()
        elif isinstance(layer, nn.AvgPool2d):
            weight, _ = dense(layer, before.shape[1:])
            c = before.flatten()[:, None] * weight
            r = (c / c.sum(0)).nan_to_num() @ r.flatten()
        elif isinstance(layer, nn.MaxPool2d):
            _, place = F.max_pool2d(before, layer.kernel_size, layer.stride, layer.padding, return_indices=True)
            spread = torch.zeros(before.shape[1], before[0, 0].numel(), dtype=torch.float64)
            r = spread.scatter_add(1, place[0].flatten(1), r.view(place[0].flatten(1).shape))
        r = r.view(before.shape[1:])
        found.append(r)
    return found[::-1]


@oracle("attributions", "lrp")
def lrp(model, image, target, site, *, rule="epsilon_plus"):
    return of_site(written_out(rule, model, image, target), site)
