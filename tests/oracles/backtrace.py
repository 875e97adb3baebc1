"""DL-Backtrace on a sequence of layers, unit by unit."""

import torch
import torch.nn.functional as F
from torch import nn

from oracles import oracle
from oracles.matrices import dense, of_site, traced, windows


def by_size(x, weight, bias, r):
    """R_i = sum_j R_j |x_i w_ij| / (sum_i |x_i w_ij| + |b_j|)."""
    c = (x[:, None] * weight).abs()
    return (c / (c.sum(0) + bias.abs())).nan_to_num() @ r


def contrastive(x, weight, bias, r_p, r_n):
    """Both streams at the inputs of a layer, unit by unit, as the authors' code has it for linear layers."""
    found_p, found_n = torch.zeros_like(x), torch.zeros_like(x)
    for j in range(weight.shape[1]):
        c = x * weight[:, j]
        p, n = c[c > 0].sum(), -c[c < 0].sum()
        up, down = (c > 0) * c / (p if p else 1), (c < 0) * -c / (n if n else 1)
        if not n or not p:
            found_p += r_p[j] * (up + down)
            found_n += r_n[j] * (up + down)
            continue
        z = p + bias[j] - n
        if z > 0:
            first = r_p[j] > r_n[j]
        elif z < 0:
            first = r_p[j] < r_n[j]
        else:
            continue
        found_p += r_p[j] * (up if first else down)
        found_n += r_n[j] * (down if first else up)
    return found_p, found_n


def pooled(before, layer, r):
    """Equal shares among the maxima of each window."""
    found = torch.zeros_like(before)
    for output, window in windows(layer, before):
        top = max(before[place] for place in window)
        best = [place for place in window if before[place] == top]
        for place in best:
            found[place] += r[output] / len(best)
    return found


def written_out(mode, model, image, target):
    """Relevance at the input of each layer of a sequence, for one image."""
    steps = traced(model, image)
    logits = steps[-1][2][0]
    own = F.one_hot(target, len(logits))
    streams = (own * logits,) if mode == "default" else (own * logits, (1 - own) * logits)
    found = []
    for layer, before, _ in reversed(steps):
        shape = before.shape[1:]
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.AvgPool2d):
            share = by_size if mode == "default" else contrastive
            streams = share(before.flatten(), *dense(layer, shape), *(r.flatten() for r in streams))
            streams = (streams,) if mode == "default" else streams
        elif isinstance(layer, nn.MaxPool2d):
            streams = [pooled(before[0], layer, r) for r in streams]
        streams = [r.view(shape) for r in streams]
        found.append(streams[0] if mode == "default" else streams[0] - streams[1])
    return found[::-1]


@oracle("attributions", "backtrace")
def backtrace(model, image, target, site, *, mode="default"):
    return of_site(written_out(mode, model, image, target), site)
