"""The oracle of the causal criteria: the algorithms of Bauvin et al. 2025 line by line.

Every unit is a run of the whole network. Nothing here is shared with the engine: removal is a mask on the whole
network, the t-test is scipy's, scores are plain arrays.
"""

import numpy as np
import scipy.stats
import torch

from sukashi.core.types import Mask
from sukashi.network import hooks


def logits_of(model, mask, x, chunk=256):
    with torch.inference_mode(), hooks.ablated(model, mask):
        return torch.cat([model(part) for part in x.split(chunk)]).double()


def probability(logits, target):
    return torch.softmax(logits, 1)[torch.arange(len(target)), target].numpy()


def mean_magnitude(model, site):
    rows = []
    for member in site.producers:
        weight = getattr(model.get_submodule(member.module), "weight", None)
        if weight is not None and weight.ndim >= 2:
            w = weight.detach().double().abs().flatten(1).mean(1).numpy()
            rows.append([np.mean([w[i] for i in index]) for index in member.index])
    return np.mean(rows, axis=0)


def visit(model, sites):
    for position in reversed(range(len(sites))):
        for unit in np.argsort(mean_magnitude(model, sites[position]), kind="stable"):
            yield position, int(unit)


def correct_only(model, data):
    with torch.inference_mode():
        right = torch.cat([model(part).argmax(1) for part in data.x.split(256)]) == data.target
    return data[torch.nonzero(right).flatten()]


def verdict(before, after, target, *, effect="mean", alpha=0.05, voting=True):
    """Definition 2: (significant, xi)."""
    xi = np.mean((after - before) / before) if effect == "ratio" else np.mean(after - before) / np.mean(before)
    groups = [target == k for k in np.unique(target)] if voting else [np.ones(len(target), bool)]
    significant = False
    for group in groups:
        if np.all(after[group] == before[group]):
            continue
        with np.errstate(all="ignore"):
            p = scipy.stats.ttest_rel(after[group], before[group]).pvalue
        significant |= bool(p < alpha)
    return significant, xi


def cswap(model, sites, data, *, baseline="current", samples="correct", effect="mean", alpha=0.05, voting=True):
    """Algorithm 1: {pair: (gone, category)} in the order met."""
    if samples == "correct":
        data = correct_only(model, data)
    target = data.target.numpy()
    keep = {site: torch.ones(site.n_units, dtype=torch.bool) for site in sites}
    original = probability(logits_of(model, Mask(keep), data.x), data.target)
    before = original
    out = {}
    for position, unit in visit(model, sites):
        site = sites[position]
        keep[site][unit] = False
        after = probability(logits_of(model, Mask(keep), data.x), data.target)
        significant, xi = verdict(before, after, target, effect=effect, alpha=alpha, voting=voting)
        critical = significant and xi <= 0
        gone = not critical and bool(keep[site].any())
        keep[site][unit] = not gone
        if gone and baseline == "current":
            before = after
        category = "neutral" if not significant else "critical" if critical else "detrimental"
        out[position, unit] = (gone, category)
    return out


def amp(model, sites, data, tau=0.0575):
    """Algorithm 3: {pair: gone}."""
    keep = {site: torch.ones(site.n_units, dtype=torch.bool) for site in sites}
    p = torch.softmax(logits_of(model, Mask(keep), data.x), 1)

    def kl(logits):
        return float((p * (p.log() - torch.log_softmax(logits, 1))).sum(1).mean())

    present = 0.0
    out = {}
    for position, unit in visit(model, sites):
        site = sites[position]
        keep[site][unit] = False
        without = kl(logits_of(model, Mask(keep), data.x))
        gone = without - present < tau and bool(keep[site].any())
        keep[site][unit] = not gone
        if gone:
            present = without
        out[position, unit] = gone
    return out


def cbp(model, sites, data, *, effect="mean", alpha=0.05):
    """Algorithm 4, tests only: {pair: (category, xi)}."""
    data = correct_only(model, data)
    target = data.target.numpy()
    keep = {site: torch.ones(site.n_units, dtype=torch.bool) for site in sites}
    before = probability(logits_of(model, Mask(keep), data.x), data.target)
    out = {}
    for position, site in enumerate(sites):
        for unit in range(site.n_units):
            keep[site][unit] = False
            after = probability(logits_of(model, Mask(keep), data.x), data.target)
            keep[site][unit] = True
            significant, xi = verdict(before, after, target, effect=effect, alpha=alpha)
            out[position, unit] = ("neutral" if not significant else "critical" if xi <= 0 else "detrimental", xi)
    return out
