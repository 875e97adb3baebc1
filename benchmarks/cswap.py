"""C-SWAP, the engine against the plain way: same network, same images, same decisions, how many times faster?

The plain way runs the whole masked network for every unit (it is the oracle of the tests). Both walk the sites in turn,
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

import torch
from torch import nn

from sukashi import data as datasets
from sukashi import models
from sukashi.core.types import Batch
from sukashi.criteria.causal import CausalTest, usable
from sukashi.criteria.engine import Engine
from sukashi.criteria.progressive import unit_orders
from sukashi.experiments import demo
from sukashi.network import sites as finder

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from oracles.causal import probability, verdict
from oracles.whole import all_kept, logits_of


def race(model: nn.Module, batch: Batch) -> dict[str, float]:
    """Both sides over all sites: their seconds, the units asked about, and mismatches."""
    sites = finder.find(model, batch.x[:2]).sites
    batch = usable(model, batch, "correct")
    start = time.perf_counter()
    engine = Engine(model, sites, batch)
    test = CausalTest(
        batch.target,
        batch.objective.classes(batch.target),
        engine.original.shape[1],
        batch.objective.score,
        "mean",
        0.05,
        "voting",
    )
    before = test.scores(engine.original)
    orders = unit_orders(model, sites, "magnitude", torch.Generator())
    middle = time.perf_counter()
    keep = all_kept(sites)
    plain_before = probability(logits_of(model, keep, batch.x), batch.target)
    seconds = {"engine": middle - start, "plain": time.perf_counter() - middle}
    mismatches = 0
    for position in reversed(range(len(sites))):
        site = sites[position]
        start = time.perf_counter()
        decided = {}
        with engine.open(site) as suffix:
            for unit in orders[position]:
                logits = suffix.without(unit)
                found = test(before, logits)
                gone = found.gone and suffix.n_left > 1
                if gone:
                    suffix.remove(unit, logits)
                decided[unit] = (gone, found.category)
        middle = time.perf_counter()
        for unit in orders[position]:
            keep[site][unit] = False
            after = probability(logits_of(model, keep, batch.x), batch.target)
            significant, xi = verdict(plain_before, after, batch.target.numpy())
            critical = significant and xi <= 0
            gone = not critical and bool(keep[site].any())
            category = "neutral" if not significant else "critical" if critical else "detrimental"
            mismatches += decided[unit] != (gone, category)
            # The plain side goes on from its own decision, so that one mismatch shows its consequences too.
            keep[site][unit] = not gone
        end = time.perf_counter()
        seconds["engine"] += middle - start
        seconds["plain"] += end - middle
        fast, slow = middle - start, end - middle
        print(f"  {site.layer:20s} {site.n_units:5d} units {fast:8.1f} s {slow:8.1f} s {slow / fast:6.1f}x", flush=True)
    n_units = sum(site.n_units for site in sites)
    print(
        f"  {'all':20s} {n_units:5d} units {seconds['engine']:8.1f} s {seconds['plain']:8.1f} s "
        f"{seconds['plain'] / seconds['engine']:6.1f}x  {mismatches} mismatches, {len(batch)} images\n"
    )
    return {"ratio": round(seconds["plain"] / seconds["engine"], 2), "mismatches": mismatches}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data/cifar10")
    parser.add_argument("--weights", default="../shared/weights/resnet20-cifar10.safetensors")
    parser.add_argument("--calibration", type=int, default=128, help="images a class")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    print(f"torch {torch.__version__}, CPU, {chosen.threads} threads, {chosen.calibration} images a class")
    print(f"  {'site':20s} {'':11s} {'engine':>10s} {'plain':>10s} {'ratio':>7s}")

    loaded = models.load("sukashi:cifar_resnet20", weights=chosen.weights)
    images = datasets.load(chosen.data).train.calibration(chosen.calibration, 0)
    print("CIFAR ResNet-20")
    resnet = race(loaded.model, images.whole(loaded.preprocess, 0).by_class())

    digits = datasets.load("digits").train
    plain = models.load("sukashi:digits_vit", width=64)
    vit = demo.train_digits("sukashi:digits_vit", digits.whole(plain.preprocess, 0), width=64)
    images = digits.calibration(min(chosen.calibration, int(digits.counts.min())), 0)
    print("ViT on digits (3 blocks, width 64)")
    transformer = race(vit.model, images.whole(plain.preprocess, 0).by_class())
    print(
        json.dumps(
            {
                "ratio_resnet20": resnet["ratio"],
                "mismatches_resnet20": resnet["mismatches"],
                "ratio_vit": transformer["ratio"],
                "mismatches_vit": transformer["mismatches"],
            }
        )
    )


if __name__ == "__main__":
    main()
