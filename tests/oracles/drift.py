"""Drift as its docstring reads: no engine, and parameters counted in networks that are really cut."""

import copy
import math

import torch

from oracles import oracle
from oracles.whole import all_kept, logits_of, without
from sukashi.core.types import Mask, Plan
from sukashi.network import surgery


def n_parameters(model, keep):
    small = copy.deepcopy(model)
    surgery.cut(small, Mask(keep))
    return sum(parameter.numel() for parameter in small.parameters())


@oracle("criteria", "drift")
def drift(model, sites, data, *, generator, share=0.1, slack=1.5, scout=4):
    """Every price a run of the whole masked network."""

    def divergence(original, now):
        total = 0.0
        for p_row, q_row in zip(original.log_softmax(1).tolist(), now.log_softmax(1).tolist(), strict=True):
            total += sum(math.exp(p) * (p - q) for p, q in zip(p_row, q_row, strict=True))
        return total / len(original)

    keep = all_kept(sites)
    some = data.x[::scout]
    original = logits_of(model, keep, some)
    rise = {}
    for position, site in enumerate(sites):
        for unit in range(site.n_units):
            rise[position, unit] = divergence(original, logits_of(model, without(keep, site, unit), some))

    original = logits_of(model, keep, data.x)
    order, passes = [], []
    n_asked, part = len(rise) * len(some), share
    while any(k.sum() > 1 for k in keep.values()):
        weight = {}
        for position, site in enumerate(sites):
            if keep[site].sum() > 1:
                unit = int(torch.nonzero(keep[site])[0])
                weight[position] = n_parameters(model, keep) - n_parameters(model, without(keep, site, unit))
        price = {(s, u): d / weight[s] for (s, u), d in rise.items() if s in weight and keep[sites[s]][u]}
        ranked = sorted(price, key=lambda pair: (price[pair], pair))
        limit = price[ranked[int(part * len(ranked))]]
        limit += 1e-3 * abs(limit)
        asked = gone = 0
        for position in reversed(range(len(sites))):
            site = sites[position]
            for pair in ranked:
                if pair[0] != position or price[pair] > limit + (slack - 1) * abs(limit):
                    continue
                asked += 1
                now = divergence(original, logits_of(model, keep, data.x))
                rise[pair] = divergence(original, logits_of(model, without(keep, site, pair[1]), data.x)) - now
                if rise[pair] / weight[position] <= limit and keep[site].sum() > 1:
                    keep[site][pair[1]] = False
                    order.append(pair)
                    gone += 1
        n_asked += asked * len(data)
        part = share if gone >= asked / 10 else max(part, min(2 * part, 0.5))
        passes.append(len(order))
        if divergence(original, logits_of(model, keep, data.x)) > math.log(original.shape[1]):
            break
    for site in sites:
        weight.setdefault(sites.index(site), math.inf)
    left = [pair for pair in rise if pair not in order]
    order += sorted(left, key=lambda pair: (rise[pair] / weight[pair[0]], pair))
    return Plan.build(
        sites, order, method="drift", passes=passes, effect=rise, n_images=len(data), n_evaluations=n_asked
    )
