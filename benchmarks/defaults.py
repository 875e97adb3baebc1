"""Why the defaults are what they are: variants of `cswap` and `drift` over seeds, on training images only.

Calibration images come from the first part of the training split, accuracy from 1,000 other training images, so that no
default was ever chosen on a test image. Prints SAUCE of every variant and seed; the last line is one JSON object.

    python benchmarks/defaults.py --data ../shared/data/cifar10 --weights ../shared/weights/resnet20-cifar10.safetensors
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from itertools import product
from typing import Any

import torch

from sukashi import data as datasets
from sukashi import models
from sukashi.criteria import criteria
from sukashi.measures import curves
from sukashi.network import sites as finder

RATIOS = [round(0.05 * i, 2) for i in range(1, 20)]
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "cswap": [
        {"baseline": baseline, "samples": samples, "effect": effect}
        for baseline, samples, effect in product(("original", "current"), ("correct", "all"), ("mean", "ratio"))
    ]
    + [{"order": "index"}, {"alpha": 0.01}, {"inference": "general"}],
    "drift": [{}, {"share": 0.05}, {"share": 0.2}, {"slack": 1.2}, {"slack": 2.0}, {"scout": 1}],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data/cifar10")
    parser.add_argument("--weights", default="../shared/weights/resnet20-cifar10.safetensors")
    parser.add_argument("--model", default="sukashi:cifar_resnet20")
    parser.add_argument("--width", type=int, default=None, help="base width, for our own models")
    parser.add_argument("--calibration", type=int, default=16, help="images a class")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--criteria", default="cswap,drift")
    chosen = parser.parse_args()

    loaded = models.load(chosen.model, weights=chosen.weights, width=chosen.width)
    train = datasets.load(chosen.data).train
    held = train.rank_in_class("held for defaults", 0) < -(-1000 // loaded.n_classes)
    test = train.subset(held.nonzero()[0]).whole(loaded.preprocess, 0)
    rest = train.subset((~held).nonzero()[0])
    sites = finder.find(loaded.model, test.x[:2]).sites
    found = {}
    print(f"{'variant':60s} {'SAUCE':>6s}  by seed; fraction removed -> accuracy after the first pass; seconds")
    for name in chosen.criteria.split(","):
        for options in VARIANTS[name]:
            areas, passes = [], []
            start = time.perf_counter()
            for seed in range(chosen.seeds):
                batch = rest.calibration(chosen.calibration, seed).whole(loaded.preprocess, 0).by_class()
                generator = torch.Generator().manual_seed(seed)
                plan = criteria[name](loaded.model, sites, batch, generator=generator, **options)
                curve = curves.curve(loaded.model, sites, plan, RATIOS, test)
                areas.append(curves.sauce_of(curve, test.objective.chance(test.target)))
                at = int((curve.n_removed == plan.passes[0]).argmax())
                passes.append(f"{curve.fraction[at]:.2f} -> {curve.accuracy[at]:.2f}")
            said = f"{name} " + " ".join(f"{key}={value}" for key, value in options.items())
            mean = statistics.fmean(areas)
            found[said.strip()] = {"mean": round(mean, 1), "by_seed": [round(area, 1) for area in areas]}
            print(
                f"{said:60s} {mean:6.1f}  {found[said.strip()]['by_seed']}  {passes}  "
                f"{time.perf_counter() - start:.0f} s",
                flush=True,
            )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
