"""Attributions of all layers in one pass against captum layer by layer: the same numbers, how many times faster?

One process; both sides take turns, so that a machine whose speed drifts slows both. Same images, baseline and points.
Taps are the outputs of ResNet-18's 20 convolutions, and of mlp.fc1 and attn.proj in each block of DeiT-III small; the
weights are random, BatchNorm's statistics and scales too. Differences are relative to the largest value of a layer.

A call of captum's costs a forward pass and the backward pass down to its layer, some 0.65 of what all layers cost at
once: where arithmetic dominates, one pass over n layers can be about 0.65 n times faster, and no more.

captum's conductance takes the slope at the first end of each interval. Walked back, from the image to the baseline, it
takes the other end; the mean of both is the trapezoid, and the same numbers as ours: `conductance_*` counts both calls,
`conductance_*_one_way` the first alone, whose numbers are another quadrature's. captum's
DeepLIFT stops at a ReLU that is used twice or works in place: it gets a copy of the network with a ReLU a call.

    python benchmarks/attributions.py
    python benchmarks/attributions.py --memory
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from types import MethodType
from typing import NamedTuple

import timm
import torch
import torchvision
from captum import attr
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from sukashi.attributions import attributions
from sukashi.core.types import Site
from sukashi.network import sites as finder
from sukashi.network.layers import explicit_attention

IMAGES, SIZE, STEPS, ROUNDS = 2, 64, 16, 5
# DeepLIFT has no steps, but a baseline an image: as many rows in a pass of captum's as the others have.
WITHOUT_STEPS = IMAGES * STEPS // 2


class Raced(NamedTuple):
    """How many times faster: captum's first call a layer alone, and all that the same numbers take; and how equal."""

    first: float
    every: float
    difference: float


def resnet18() -> nn.Module:
    return randomised(torchvision.models.resnet18())


def deit3_small(size: int) -> nn.Module:
    model = timm.create_model("deit3_small_patch16_224", img_size=size)
    explicit_attention(model)
    return randomised(model)


def randomised(model: nn.Module) -> nn.Module:
    """The model in eval mode, its normalisation not at a neutral start value."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.1)
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):
                parameter.uniform_(0.5, 1.5)  # LayerScale starts at 1e-6, where blocks do nothing
    return model.eval()


def _block(self: BasicBlock, x: Tensor) -> Tensor:
    identity = x if self.downsample is None else self.downsample(x)
    return self.relu2(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + identity)


def for_deeplift(model: nn.Module) -> nn.Module:
    """The same ResNet with a ReLU of its own, not in place, for every call."""
    twin = copy.deepcopy(model)
    twin.relu = nn.ReLU()
    for module in twin.modules():
        if isinstance(module, BasicBlock):
            module.relu, module.relu2 = nn.ReLU(), nn.ReLU()
            module.forward = MethodType(_block, module)
    return twin


def race(ours: Callable[[], Mapping[Site, Tensor]], theirs: list[Callable[[str], Tensor]]) -> Raced:
    """Median over rounds of the processor seconds of captum, all layers, by those of one pass of ours.

    `theirs` are the calls a layer needs until the numbers are ours; `first` counts the first of them alone. Ours runs
    several times in each round, between the layers.
    """
    found, worst = ours(), 0.0
    first, every = [], []
    for _ in range(ROUNDS):
        mine: list[float] = []
        spent = [0.0] * len(theirs)
        for number, (site, values) in enumerate(found.items()):
            if number % 5 == 0:
                begun = time.process_time()
                ours()
                mine.append(time.process_time() - begun)
            expected = torch.zeros(())
            for way, call in enumerate(theirs):
                begun = time.process_time()
                expected = expected + call(site.layer).detach() / len(theirs)
                spent[way] += time.process_time() - begun
            expected = expected.movedim(site.axis, 1)
            worst = max(worst, float((values - expected).abs().max() / expected.abs().max()))
        first.append(spent[0] / statistics.mean(mine))
        every.append(sum(spent) / statistics.mean(mine))
        print(f"  ours {statistics.mean(mine):6.2f} s, captum {spent[0]:6.2f} s", *[f"+ {s:.2f} s" for s in spent[1:]])
    return Raced(statistics.median(first), statistics.median(every), worst)


def contest(method: str, model: nn.Module, layers: list[str], n_images: int) -> Raced:
    """One attribution, all layers in one pass, against captum's."""
    x, target = torch.randn(n_images, 3, SIZE, SIZE), torch.arange(n_images)
    sites = [finder.place(model, layer, x) for layer in layers]
    options = {"steps": STEPS} if "steps" in attributions[method].options else {}
    if "batch_size" in attributions[method].options:
        options["batch_size"] = n_images * (STEPS + 1)  # all rows at once, as captum does unless told otherwise
    peer = for_deeplift(model) if method == "deeplift" else model

    def call(kind: type, sign: int = 1, **given: object) -> Callable[[str], Tensor]:
        """captum's attribution at a layer, along the path from zero to the images or (sign -1) back."""
        image, baseline = (x, torch.zeros_like(x))[::sign]
        return lambda layer: (
            sign * kind(peer, peer.get_submodule(layer)).attribute(image, baselines=baseline, target=target, **given)
        )

    steps = {"n_steps": STEPS}
    rule = {"method": "riemann_trapezoid"}  # the points of the trapezoid; the sum is captum's own
    theirs = {
        "conductance": [call(attr.LayerConductance, sign, **steps, **rule) for sign in (1, -1)],
        "internal_influence": [call(attr.InternalInfluence, **steps)],
        "deeplift": [call(attr.LayerDeepLift)],
    }
    return race(lambda: attributions[method](model, x, target, sites, **options), theirs[method])


def speed() -> dict[str, float]:
    """The figures of all races."""
    torch.manual_seed(0)
    resnet, deit = resnet18(), deit3_small(SIZE)
    convs = [name for name, module in resnet.named_modules() if isinstance(module, nn.Conv2d)]
    linears = [name for name, _ in deit.named_modules() if name.endswith(("mlp.fc1", "attn.proj"))]
    figures: dict[str, float] = {}
    differences = []
    for method, name, model, layers in [
        ("conductance", "resnet18", resnet, convs),
        ("internal_influence", "resnet18", resnet, convs),
        ("deeplift", "resnet18", resnet, convs),
        ("conductance", "deit3_small", deit, linears),
    ]:
        if method not in attributions:
            print(f"{method} is not among the attributions here")
            continue
        stepped = "steps" in attributions[method].options
        n_images = IMAGES if stepped else WITHOUT_STEPS
        steps = f", {STEPS} steps" if stepped else ""
        print(f"{method}, {name}, {len(layers)} layers, {n_images} images of {SIZE} pixels{steps}")
        raced = contest(method, model, layers, n_images)
        print(f"  {raced.every:.1f}x, largest difference {raced.difference:.1e}")
        if raced.first != raced.every:
            figures[f"{method}_{name}_one_way"] = round(raced.first, 1)
        figures[f"{method}_{name}"] = round(raced.every, 1)
        if method == "deeplift":  # captum is wrong at ReLU -> MaxPool with windows that overlap
            figures["deeplift_difference"] = raced.difference
        else:
            differences.append(raced.difference)
    return figures | {"max_difference": max(differences)}


MEMORY = ("plain", "saliency", "gradient_x_activation", "internal_influence", "integrated_gradients", "conductance")


def memory() -> dict[str, float]:
    """Peak bytes that each method adds, by those of a plain forward and backward pass, each in a process of its own."""
    added = {}
    for method in MEMORY:
        done = subprocess.run(
            [sys.executable, __file__, "--method", method], capture_output=True, text=True, check=True
        )
        added[method] = int(done.stdout)
        print(f"{method}: {added[method] / 2**30:.2f} GiB, {added[method] / added['plain']:.2f} of a plain pass")
    return {method: round(added[method] / added["plain"], 2) for method in MEMORY[1:]}


def peak(method: str) -> int:
    """Peak bytes that one method adds on ResNet-50, 32 images of 224 pixels, at most 32 rows in a pass."""
    torch.manual_seed(0)
    model = randomised(torchvision.models.resnet50())
    x, target = torch.randn(32, 3, 224, 224), torch.arange(32)
    sites = finder.find(model, x[:1, :, :64, :64]).sites
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if method == "plain":
        nn.functional.cross_entropy(model(x), target).backward()
    else:
        steps = {"steps": 4} if "steps" in attributions[method].options else {}
        attributions[method](model, x, target, sites, batch_size=32, **steps)
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true", help="peak memory on ResNet-50 instead of speed")
    parser.add_argument("--method", choices=MEMORY, help="print the peak bytes that one method adds, and nothing else")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.method:
        print(peak(args.method))
    else:
        print(json.dumps(memory() if args.memory else speed()))


if __name__ == "__main__":
    main()
