"""Measures of saliency maps against their peers: the same numbers, how many times faster?

One process, one thread; both sides take turns, so that a machine whose speed drifts slows both, and figures are medians
over rounds of the ratio of processor seconds. Images are coarse noise enlarged plus fine noise, standardised; half of
the maps are noise, as slopes are, and half are smooth, as maps of late layers are: the holes of the first are many and
small, those of the second few and large.

`road_*` is the imputation of given holes at nine percentages, of one image at 224 px and of 64 at 32 px, as an audit
has them at once (eight alone are 4.8 to 5.5 times as fast), against the imputer of pytorch-grad-cam, which solves a
sparse system an image; `road_max_error` the largest difference of a pixel, in standard deviations of the image.
`gini` is against a call of Quantus' Sparseness with the maps given, as its users make it, which also checks every
number in Python; `gini_arithmetic` against what that call computes and nothing else: the same sort by NumPy, which is
most of our time. `deletion` is on a CIFAR ResNet-20, against a loop with one image and one step at a time. Peers:
pip install -e '.[peers]'.

    python benchmarks/saliency.py
    python benchmarks/saliency.py --memory
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from sukashi import models
from sukashi.core.types import Batch, Maps
from sukashi.measures.faithfulness import PERCENTAGES
from sukashi.measures.imputation import impute
from sukashi.measures.inputs import measured

ROUNDS = 5
MEMORY = (16, 32, 64)


def images(n_images: int, side: int) -> Tensor:
    coarse = F.interpolate(torch.randn(n_images, 3, side // 8, side // 8), size=(side, side), mode="bicubic")
    x = coarse + 0.1 * torch.randn(n_images, 3, side, side)
    return x / x.std((1, 2, 3), keepdim=True)


def maps(n_images: int, side: int, smooth: bool) -> Tensor:
    found = torch.randn(n_images, 1, side, side)
    for _ in range(3 if smooth else 0):
        half = side // 16
        found = F.avg_pool2d(F.pad(found, [half] * 4, mode="replicate"), 2 * half + 1, 1)
    return found[:, 0]


def of_images(found: Tensor) -> Maps:
    return Maps(found, tuple(map(str, range(len(found)))))


def values(name: str, given: Mapping[str, Any], **options: Any) -> Tensor:
    return measured([name], given, {name: options})[name].values


def holes(ranking: Tensor) -> list[Tensor]:
    """(B, H, W) bool for each percentage: the pixels of greatest value."""
    flat = ranking.flatten(1)
    ranks = flat.argsort(dim=1, descending=True, stable=True).argsort(dim=1).view_as(ranking)
    return [ranks < int(flat.shape[1] * p / 100) for p in PERCENTAGES]


def timed(call: Callable[[], Tensor]) -> tuple[float, Tensor]:
    begun = time.process_time()
    found = call()
    return time.process_time() - begun, found


def race(
    name: str, pairs: list[tuple[Callable[[], Tensor], Callable[[], Tensor]]], rounds: int = ROUNDS
) -> tuple[float, float]:
    """(times as fast, largest difference): all of ours against all of theirs, in turns, median over rounds."""
    ratios, worst = [], 0.0
    for turn in range(rounds + 1):
        mine = theirs = 0.0
        for ours, peer in pairs:
            spent, found = timed(ours)
            mine += spent
            spent, expected = timed(peer)
            theirs += spent
            worst = max(worst, float((found - expected).abs().max()))
        if turn:  # the first warms up
            ratios.append(theirs / mine)
    ratio = statistics.median(ratios)
    low, high = min(ratios), max(ratios)
    print(
        f"{name:32} ours {mine:7.3f} s   peer {theirs:7.3f} s   {ratio:5.1f}x ({low:.1f} to {high:.1f})   "
        f"largest difference {worst:.1e}",
        flush=True,
    )
    return ratio, worst


def road(side: int, n_images: int) -> tuple[float, float]:
    """Imputation at nine percentages, both kinds of maps in one figure; and each by itself, printed."""
    from pytorch_grad_cam.metrics.road import NoisyLinearImputer

    peer = NoisyLinearImputer(noise=0)

    def pairs(smooth: bool) -> list[tuple[Callable[[], Tensor], Callable[[], Tensor]]]:
        x = images(n_images, side)
        return [
            (
                lambda missing=missing: impute(x, missing),
                lambda missing=missing: torch.stack([peer(*one) for one in zip(x, (~missing).float(), strict=True)]),
            )
            for missing in holes(maps(n_images, side, smooth))
        ]

    noise, smooth = pairs(False), pairs(True)
    race(f"imputation, {side} px, noise", noise, 3)
    race(f"imputation, {side} px, smooth", smooth, 3)
    return race(f"imputation, {side} px, both", [*noise, *smooth])


def gini() -> tuple[float, float]:
    """Times as fast as Quantus' Sparseness: as its whole call, and as the arithmetic inside with its normalisation."""
    from quantus import Sparseness
    from quantus.functions.normalise_func import normalise_by_max

    peer = Sparseness(disable_warnings=True)
    found = torch.cat([maps(32, 224, False), maps(32, 224, True)])
    arrays = found.numpy()
    given = {"x_batch": torch.randn(64, 1, 224, 224).numpy(), "y_batch": torch.zeros(64).long().numpy()}

    def ours() -> Tensor:
        return values("gini", {"maps": of_images(found)})

    def arithmetic() -> Tensor:
        scores = peer.evaluate_batch(x_batch=None, a_batch=abs(normalise_by_max(arrays)))
        return torch.as_tensor(scores)

    def call() -> Tensor:
        return torch.as_tensor(peer(model=nn.Flatten(), a_batch=arrays[:, None], **given))

    whole, _ = race("gini, 64 maps of 224 px, call", [(ours, call)], 3)
    inside, _ = race("gini, 64 maps, arithmetic only", [(ours, arithmetic)], 9)
    return whole, inside


def replaced(name: str, model: nn.Module, x: Tensor, ranking: Tensor, step: int) -> tuple[float, float]:
    """`insertion` or `deletion` against a loop over images and steps."""
    target = torch.arange(len(x)) % 10
    batch = Batch(x, target, tuple(map(str, range(len(x)))))

    @torch.no_grad()
    def loop() -> Tensor:
        areas = []
        for image, of_image, wanted in zip(x, ranking, target, strict=True):
            order = of_image.flatten().argsort(descending=True, stable=True)
            start, end = (torch.zeros_like(image), image) if name == "insertion" else (image, torch.zeros_like(image))
            now, end = start.clone().flatten(1), end.flatten(1)
            heights = [model(now.view_as(image)[None]).double().softmax(1)[0, wanted]]
            for pixels in order.split(step):
                now[:, pixels] = end[:, pixels]
                heights.append(model(now.view_as(image)[None]).double().softmax(1)[0, wanted])
            areas.append(torch.trapezoid(torch.stack(heights)) / (len(heights) - 1))
        return torch.stack(areas)

    def ours() -> Tensor:
        return values(name, {"model": model, "batch": batch, "maps": of_images(ranking)}, step=step)

    return race(f"{name}, {x.shape[-1]} px, step {step}", [(ours, loop)], 3)


def speed() -> dict[str, float]:
    """The figures of all races."""
    torch.manual_seed(0)
    resnet20 = models.load("sukashi:cifar_resnet20").model
    resnet18 = torchvision.models.resnet18().eval()
    road_32, error_32 = road(32, 64)
    road_224, error_224 = road(224, 1)
    figures = {"road_224": road_224, "road_32": road_32}
    figures["gini"], figures["gini_arithmetic"] = gini()
    replaced("insertion", resnet20, images(8, 32), maps(8, 32, False), 32)
    figures["deletion"] = replaced("deletion", resnet20, images(8, 32), maps(8, 32, False), 32)[0]
    replaced("deletion", resnet18, images(2, 224), maps(2, 224, False), 3136)
    return {name: round(ratio, 1) for name, ratio in figures.items()} | {"road_max_error": max(error_32, error_224)}


def memory() -> dict[str, dict[str, float]]:
    """Processor seconds and peak memory of the MoRF curve on 224 px with a ResNet-18, a fresh process for each size."""
    found = {}
    for n_images in MEMORY:
        done = subprocess.run(
            [sys.executable, __file__, "--images", str(n_images)], capture_output=True, text=True, check=True
        )
        found[str(n_images)] = json.loads(done.stdout)
        print(f"{n_images} images: {done.stdout.strip()}", flush=True)
    return found


def peak(n_images: int) -> dict[str, float]:
    """One size, in this process: `seconds`, `peak_mb` of the process, and `start_mb` before the first image."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18().eval()
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    x = images(n_images, 224)
    ranking = torch.cat([maps(n_images // 2, 224, smooth) for smooth in (False, True)])
    batch = Batch(x, torch.zeros(n_images).long(), tuple(map(str, range(n_images))))
    given = {"model": model, "batch": batch, "maps": of_images(ranking), "generator": torch.Generator()}
    seconds, _ = timed(lambda: values("aopc", given, batch_size=64))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": round(seconds, 1), "peak_mb": most // 1024, "start_mb": start // 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true", help="peak memory and seconds of ROAD instead of speed")
    parser.add_argument("--images", type=int, help="print those of so many images, and nothing else")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.images:
        print(json.dumps(peak(args.images)))
    else:
        print(json.dumps(memory() if args.memory else speed()))


if __name__ == "__main__":
    main()
