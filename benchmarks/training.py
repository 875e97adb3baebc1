"""Our training loop against a plain one written by hand: same network, images and steps, one process, in turns.

The plain loop holds the normalised images in memory, draws a permutation, crops and mirrors each batch with
torchvision, and steps; it runs in both of torch's memory formats, of which `throughput_ratio` takes the better one in
each turn. Ours does what `sukashi train` does, and its time is that of the whole call: images decoded, checkpoints
written. Turns alternate, so that a machine whose speed drifts slows all; figures are medians. On a CPU a second is one
of the processor's, which busy neighbours do not take.

    python benchmarks/training.py --data ../shared/data/cifar10
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import v2

import wanda  # the benchmark beside this one
from sukashi import data as datasets
from sukashi import models
from sukashi.core.types import Mask
from sukashi.models import Loaded
from sukashi.network import sites, sparsity
from sukashi.training import loop

clock = time.perf_counter if torch.cuda.is_available() else time.process_time


def plain(
    model: nn.Module, x: torch.Tensor, target: torch.Tensor, settings: loop.Training, layout: torch.memory_format
) -> float:
    """Images a second of the loop anybody would write."""
    model = copy.deepcopy(model).train().to(memory_format=layout)
    x = x.contiguous(memory_format=layout)
    optimiser = torch.optim.SGD(model.parameters(), settings.lr, settings.momentum, weight_decay=settings.weight_decay)
    n_steps = settings.epochs * -(-len(x) // settings.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, n_steps)
    views = v2.Compose([v2.RandomCrop(x.shape[2:], padding=x.shape[2] // 8), v2.RandomHorizontalFlip()])
    start = clock()
    for _ in range(settings.epochs):
        for rows in torch.randperm(len(x)).split(settings.batch_size):
            batch = x[rows] if settings.augment == "none" else views(x[rows])
            loss = F.cross_entropy(model(batch), target[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            loss.item()
    return settings.epochs * len(x) / (clock() - start)


def ours(loaded: Loaded, data: datasets.Data, settings: loop.Training) -> tuple[float, float]:
    """Images a second, and the share of its time that the loop spends on getting images ready."""
    with tempfile.TemporaryDirectory() as folder:
        start = clock()
        history = loop.fit(loaded, data, settings, out=Path(folder) / "run").history
        rate = settings.epochs * len(data.train) / (clock() - start)
    return rate, statistics.mean(entry["waiting"] for entry in history)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="sukashi:cifar_resnet18")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--augment", default="crop_flip")
    given = parser.parse_args()

    data = datasets.load(given.data)
    data = replace(data, train=data.train.limit(given.images), val=None)
    torch.manual_seed(0)
    loaded = models.load(given.model, width=given.width, n_classes=data.n_classes)
    settings: dict[str, Any] = {"epochs": 1, "batch_size": 128, "augment": given.augment, "validation": 0.0}
    shapes = {site: loaded.model.get_parameter(f"{site.layer}.weight").shape for site in sites.weights(loaded.model)}
    keep = {site: torch.rand(shape) < 0.5 for site, shape in shapes.items()}
    masked = replace(loaded, mask=Mask(keep))
    batch = data.train.whole(loaded.preprocess)
    layouts = {"plain": torch.contiguous_format, "plain channels_last": torch.channels_last}
    rates: dict[str, list[float]] = {name: [] for name in (*layouts, "ours", "masked", "waiting")}
    for turn in range(given.turns + 1):
        found = {
            name: plain(loaded.model, batch.x, batch.target, loop.Training(**settings), layout)
            for name, layout in layouts.items()
        }
        found["ours"], found["waiting"] = ours(loaded, data, loop.Training(**settings))
        found["masked"], _ = ours(masked, data, loop.Training(**settings))
        if turn:  # the first warms up
            for name, value in found.items():
                rates[name].append(value)
            print({name: round(value, 3) for name, value in found.items()}, flush=True)
    middle = {name: statistics.median(values) for name, values in rates.items()}
    print(
        json.dumps(
            {
                "throughput_ratio": round(
                    statistics.median(
                        ours / max(plain)
                        for ours, *plain in zip(rates["ours"], *(rates[name] for name in layouts), strict=True)
                    ),
                    3,
                ),
                "mask_overhead": round(mask_cost(masked, data, settings), 4),
                "data_share": round(middle["waiting"], 4),
                "wanda_speedup": wanda.race(wanda.options([]))["wanda_speedup"],
            }
        )
    )


def mask_cost(masked: Loaded, data: datasets.Data, settings: dict[str, Any]) -> float:
    """Time that putting zeros back takes, over that of a step."""
    assert masked.mask is not None
    weights, keeps = sparsity.weights_of(copy.deepcopy(masked.model), masked.mask)
    spent = []
    for _ in range(50):
        start = clock()
        torch._foreach_mul_(weights, keeps)
        spent.append(clock() - start)
    rate, _ = ours(masked, data, loop.Training(**settings))
    return statistics.median(spent) / (settings["batch_size"] / rate)


if __name__ == "__main__":
    main()
