"""The causal criteria: the algorithms of Bauvin et al. 2025 line by line.

Every unit is a run of the whole network. Nothing here is shared with the engine: removal is a mask on the whole
network, the t-test is scipy's, scores are plain arrays.
"""

import numpy as np
import scipy.stats
import torch

from oracles import oracle
from oracles.magnitude import mean_magnitude
from oracles.whole import all_kept, logits_of
from sukashi.core.types import Plan


def probability(logits, target):
    return torch.softmax(logits, 1)[torch.arange(len(target)), target].numpy()


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


@oracle("criteria", "cswap")
def cswap(
    model,
    sites,
    data,
    *,
    generator,
    baseline="current",
    samples="correct",
    effect="mean",
    alpha=0.05,
    inference="voting",
):
    """Algorithm 1; critical units follow, the least harmful first."""
    if samples == "correct":
        data = correct_only(model, data)
    target = data.target.numpy()
    keep = all_kept(sites)
    original = probability(logits_of(model, keep, data.x), data.target)
    before = original
    gone, category, effects = [], {}, {}
    for position, unit in visit(model, sites):
        site, pair = sites[position], (position, unit)
        keep[site][unit] = False
        after = probability(logits_of(model, keep, data.x), data.target)
        significant, effects[pair] = verdict(
            before, after, target, effect=effect, alpha=alpha, voting=inference == "voting"
        )
        critical = significant and effects[pair] <= 0
        category[pair] = "neutral" if not significant else "critical" if critical else "detrimental"
        if critical or not keep[site].any():
            keep[site][unit] = True
            continue
        gone.append(pair)
        if baseline == "current":
            before = after
    left = sorted((pair for pair in effects if pair not in gone), key=lambda pair: (-effects[pair], pair))
    return _plan("cswap", sites, data, [*gone, *left], passes=[len(gone)], category=category, effect=effects)


@oracle("criteria", "amp")
def amp(model, sites, data, *, generator, tau=0.0575):
    """Algorithm 3; what stays follows by what it moved."""
    keep = all_kept(sites)
    p = torch.softmax(logits_of(model, keep, data.x), 1)

    def kl(logits):
        return float((p * (p.log() - torch.log_softmax(logits, 1))).sum(1).mean())

    present = 0.0
    gone, rise = [], {}
    for position, unit in visit(model, sites):
        site, pair = sites[position], (position, unit)
        keep[site][unit] = False
        without = kl(logits_of(model, keep, data.x))
        rise[pair] = without - present
        if rise[pair] >= tau or not keep[site].any():
            keep[site][unit] = True
            continue
        gone.append(pair)
        present = without
    left = sorted((pair for pair in rise if pair not in gone), key=lambda pair: (rise[pair], pair))
    return _plan("amp", sites, data, [*gone, *left], passes=[len(gone)], effect=rise)


@oracle("criteria", "cbp")
def cbp(model, sites, data, *, generator, effect="mean", alpha=0.05):
    """Algorithm 4: what helps goes first, then what does nothing, then what harms."""
    data = correct_only(model, data)
    target = data.target.numpy()
    keep = all_kept(sites)
    before = probability(logits_of(model, keep, data.x), data.target)
    category, effects = {}, {}
    for position, site in enumerate(sites):
        for unit in range(site.n_units):
            keep[site][unit] = False
            after = probability(logits_of(model, keep, data.x), data.target)
            keep[site][unit] = True
            significant, xi = verdict(before, after, target, effect=effect, alpha=alpha)
            effects[position, unit] = xi
            category[position, unit] = "neutral" if not significant else "critical" if xi <= 0 else "detrimental"

    def turn(pair):
        xi, name = effects[pair], category[pair]
        return ["detrimental", "neutral", "critical"].index(name), abs(xi) if name == "neutral" else -xi, pair

    return _plan("cbp", sites, data, sorted(effects, key=turn), category=category, effect=effects)


def _plan(method, sites, data, order, **found):
    return Plan.build(sites, order, method=method, n_images=len(data), **found)
