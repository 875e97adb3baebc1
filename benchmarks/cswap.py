"""C-SWAP, the engine against the plain way: same network, same images, same decisions, how many times faster?

The plain way runs the whole masked network for every unit (the oracle of the tests). Both walk the same sites in turn,
site by site in one process, so that a machine whose speed drifts slows both. Decisions (kept or removed, and the
category) are compared unit by unit.

    python benchmarks/cswap.py --data ../shared/data/cifar10 --weights ../shared/weights/resnet20-cifar10.safetensors
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

import sukashi
from sukashi import data as datasets
from sukashi import hooks, models
from sukashi import sites as finder
from sukashi.criteria.causal import CausalTest, correct_only, true_class_probability
from sukashi.criteria.engine import Engine
from sukashi.criteria.sweep import unit_orders
from sukashi.types import Batch, Mask

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import naive


def race(model: nn.Module, example: torch.Tensor, batch: Batch) -> dict[str, float]:
    """Both sides over all sites: seconds of each, units, and mismatches."""
    sites = finder.find(model, example).sites
    batch = correct_only(model, batch)
    target, classes = batch.target, batch.target.numpy()
    engine = Engine(model, sites, batch)
    test = CausalTest(target, engine.original.shape[1], true_class_probability, "mean", 0.05, "voting")
    before = test.scores(engine.original)
    keep = {site: torch.ones(site.n_units, dtype=torch.bool) for site in sites}
    plain_before = naive.probability(naive.logits_of(model, Mask(keep), batch.x), target)
    orders = unit_orders(model, sites, "magnitude", torch.Generator())
    seconds = {"engine": 0.0, "plain": 0.0}
    mismatches = n_units = 0
    for position in reversed(range(len(sites))):
        site = sites[position]
        start = time.perf_counter()
        fast = {}
        with engine.open(site) as suffix:
            for unit in orders[position]:
                logits = suffix.without(unit)
                verdict = test(before, logits)
                gone = verdict.gone and suffix.n_left > 1
                if gone:
                    suffix.remove(unit, logits)
                fast[unit] = (gone, verdict.category)
        middle = time.perf_counter()
        for unit in orders[position]:
            keep[site][unit] = False
            after = naive.probability(naive.logits_of(model, Mask(keep), batch.x), target)
            significant, xi = naive.verdict(plain_before, after, classes)
            critical = significant and xi <= 0
            gone = not critical and bool(keep[site].any())
            category = "neutral" if not significant else "critical" if critical else "detrimental"
            mismatches += fast[unit] != (gone, category)
            # Both sides go on from the engine's state, so that one mismatch does not hide behind its consequences.
            keep[site][unit] = not fast[unit][0]
            n_units += 1
        end = time.perf_counter()
        seconds["engine"] += middle - start
        seconds["plain"] += end - middle
        print(
            f"  {site.layer:24s} {site.n_units:5d} units  engine {middle - start:7.1f} s  plain {end - middle:7.1f} s  "
            f"x{(end - middle) / (middle - start):5.1f}",
            flush=True,
        )
    return {"ratio": seconds["plain"] / seconds["engine"], "mismatches": mismatches, "units": n_units, **seconds}
