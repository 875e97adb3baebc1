"""Runs of the whole network under a mask: what the engine's shortcuts must come to."""

import torch

from sukashi.network import hooks


def all_kept(sites):
    return {site: torch.ones(site.n_units, dtype=torch.bool) for site in sites}


def without(keep, site, unit):
    """The same mask without one more unit."""
    lost = {s: k.clone() for s, k in keep.items()}
    lost[site][unit] = False
    return lost


def logits_of(model, keep, x, chunk=256):
    with torch.inference_mode(), hooks.ablated(model, keep):
        return torch.cat([model(part) for part in x.split(chunk)]).double()
