"""Networks that people deploy, cut to fewer FLOPs by our criteria and by Torch-Pruning's importances, and mended.

Each way cuts the network to a share of its FLOPs: ours along the plan of a criterion, every width that is left (no
rounding), Torch-Pruning's by its own pruner in many small steps (`global`: over all layers; `uniform`: the same share
of each), on the same calibration images. Then the cut is left as it is, or mended by `norm` or `refit` on those images;
what Torch-Pruning's pruner takes of each layer is noted while it takes it, so that `refit` mends its networks as ours.
With --epochs the best mended network of each side and level is trained on, with the same images in the same order.
Accuracies are on the same test images, with 95 % intervals (Wilson), differences between the best of both sides paired
(Tango). Latency: median factors of the dense network's time, timed in turns. Seconds: of choosing what goes, on one
process, and of mending.

    python benchmarks/race.py NETWORK [--data ../shared/data] [--weights ../shared/weights]

NETWORK is resnet20, resnet18, efficientnet (Lite0, 128 pixels, 20 classes of tiny-imagenet) or vit (DINOv2 S/14). The
last line is one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
import torch_pruning as tp
from numpy.typing import NDArray
from torch import Tensor, nn

from sukashi import data as datasets
from sukashi import models
from sukashi.core import stats
from sukashi.core.errors import ModelError, SukashiError
from sukashi.core.types import Batch, Plan, Scores, rank
from sukashi.criteria import criteria
from sukashi.experiments.prune.targets import Search
from sukashi.measures import accuracy, cost
from sukashi.network import sites as finder
from sukashi.network import surgery
from sukashi.network.layers import Attention
from sukashi.network.surgery import Table
from sukashi.repairs import check_fits, mender

REPAIRS = ("none", "norm", "refit")
PEER = "tp "  # before the names of their ways
Array = NDArray[np.bool_]
STEPS = 400  # of Torch-Pruning's pruner from none to all of the channels
IMPORTANCES: dict[str, Callable[[], tp.importance.Importance]] = {
    "magnitude": tp.importance.GroupMagnitudeImportance,
    "taylor": tp.importance.GroupTaylorImportance,
    "hessian": tp.importance.GroupHessianImportance,
    "lamp": tp.importance.LAMPImportance,
    "fpgm": tp.importance.FPGMImportance,
    "bn_scale": tp.importance.BNScaleImportance,
}


@dataclass(frozen=True)
class Network:
    """What is read, as `models.load` takes it, and which layers Torch-Pruning leaves alone."""

    spec: str
    weights: str
    data: str
    width: int | None = None
    size: int | None = None
    beyond: Callable[[str], bool] = lambda name: name in ("fc", "linear", "classifier", "head")


def _on_the_stream(name: str) -> bool:
    """Where ResNet-20's stages meet zeros are put beside the channels, which Torch-Pruning's cuts don't reckon with."""
    return name in ("conv1", "linear") or name.endswith(".conv2")


NETWORKS = {
    "resnet20": Network("sukashi:cifar_resnet20", "resnet20-cifar10", "cifar10", beyond=_on_the_stream),
    "resnet18": Network("sukashi:cifar_resnet18", "resnet18w32-cifar10", "cifar10", width=32),
    "efficientnet": Network(
        "timm:tf_efficientnet_lite0", "efficientnet_lite0-tin20-head", "tiny-imagenet-20", size=128
    ),
    "vit": Network("timm:vit_small_patch14_dinov2", "dinov2_vits14-tin20", "tiny-imagenet-20", size=112),
}


@dataclass(frozen=True)
class Contest:
    """A dense network, which of its layers Torch-Pruning leaves alone, and what calibrates, trains and tests it."""

    dense: nn.Module
    beyond: Callable[[str], bool]
    calibration: Batch
    train: Batch
    test: Batch


@dataclass(frozen=True)
class Cut:
    """A network that was cut, what was taken of each layer, and the seconds of choosing that."""

    model: nn.Module
    table: Table
    seconds: float


def options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=[*NETWORKS])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--weights", type=Path, default=Path("../shared/weights"))
    parser.add_argument("--criteria", default="magnitude,taylor,obs,random", help="ours, by commas")
    parser.add_argument("--importances", default=",".join(IMPORTANCES), help="theirs, by commas")
    parser.add_argument("--removed", default="0.2,0.3,0.5", help="shares of the FLOPs")
    parser.add_argument("--calibration", type=int, default=32, help="images a class")
    parser.add_argument("--test-images", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=0)
    return parser.parse_args(argv)


def contest(chosen: argparse.Namespace) -> Contest:
    network = NETWORKS[chosen.network]
    how = {"width": network.width, "size": network.size and [network.size] * 2}
    loaded = models.load(network.spec, weights=chosen.weights / f"{network.weights}.safetensors", **how)
    data = datasets.load(str(chosen.data / network.data))
    calibration = data.train.calibration(chosen.calibration, 0).whole(loaded.preprocess, 0).by_class()
    train = data.train.whole(loaded.preprocess, 0) if chosen.epochs else calibration
    test = data.test.limit(chosen.test_images).whole(loaded.preprocess, 0)
    return Contest(loaded.model, network.beyond, calibration, train, test)


def ours(asked: Contest, criterion: str, shares: Sequence[float]) -> list[Cut]:
    """A cut of each share of the FLOPs, as `prune --target-flops --round-to 1` finds it along the criterion's plan."""
    start = time.perf_counter()
    sites = finder.find(asked.dense, asked.calibration.x[:2]).sites
    outcome = criteria[criterion](asked.dense, sites, asked.calibration, generator=torch.Generator().manual_seed(0))
    plan: Plan = rank(outcome) if isinstance(outcome, Scores) else outcome
    seconds, found = time.perf_counter() - start, []
    for share in shares:
        search = Search(
            "target_flops",
            1 - share,
            model=asked.dense,
            sites=sites,
            batch=asked.calibration.x[:1],
            mode="cut",
            round_to=1,
            held_out=no_images,
            read=no_images,
        )
        ratio, _ = search.ratio(plan, {})
        model = copy.deepcopy(asked.dense)
        found.append(Cut(model, surgery.cut(model, search.mask(plan, ratio)), seconds))
    return found


def no_images(*_: object) -> NoReturn:
    raise AssertionError("FLOPs need no images")


def theirs(asked: Contest, importance: str, everywhere: bool, shares: Sequence[float]) -> list[Cut]:
    """The networks of Torch-Pruning's pruner at the first steps that remove so much of the FLOPs."""
    start = time.perf_counter()
    model = copy.deepcopy(asked.dense)
    example, scorer = asked.calibration.x[:1], IMPORTANCES[importance]()
    _gradients(model, asked.calibration, scorer)
    heads = {m.qkv: len(m.core.widths) for m in model.modules() if isinstance(m, Attention)}
    pruner = tp.pruner.BasePruner(
        model,
        example,
        scorer,
        global_pruning=everywhere,
        pruning_ratio=1.0,
        iterative_steps=STEPS,
        ignored_layers=[layer for name, layer in model.named_modules() if asked.beyond(name)],
        num_heads=heads,  # all stay, and get narrower: its global ranking of whole ones fails on a step that takes none
    )
    kept = {name: _whole(layer) for name, layer in model.named_modules() if _whole(layer)}
    names = {layer: name for name, layer in model.named_modules()}
    dense, found = cost.flops(asked.dense, example), []
    for _ in range(STEPS):
        for group in pruner.step(interactive=True):
            for dep, gone in group:
                name = names.get(dep.target.module)
                if name not in kept:
                    continue
                side = "out" if pruner.DG.is_out_channel_pruning_fn(dep.handler) else "in"
                left = torch.ones(len(kept[name][side]), dtype=torch.bool)
                left[list(map(int, gone))] = False
                kept[name][side] = kept[name][side][left]
            group.prune()
        for block in model.modules():
            if isinstance(block, Attention):
                n_heads = heads[block.qkv]
                block.core.widths = (block.qkv.out_features // 3 // n_heads,) * n_heads
        while len(found) < len(shares) and cost.flops(model, example) <= (1 - shares[len(found)]) * dense:
            found.append(Cut(copy.deepcopy(model), _table(kept, asked.dense), time.perf_counter() - start))
        if len(found) == len(shares):
            return found
    raise SukashiError(f"Torch-Pruning's pruner removes no more by {importance}")


def _gradients(model: nn.Module, data: Batch, scorer: tp.importance.Importance) -> None:
    """Those that an importance asks for, of all calibration images, as its documentation has it."""
    if isinstance(scorer, tp.importance.GroupHessianImportance):
        for x, target in zip(data.x, data.target, strict=True):
            model.zero_grad()
            nn.functional.cross_entropy(model(x[None]), target[None]).backward()
            scorer.accumulate_grad(model)
    elif isinstance(scorer, tp.importance.GroupTaylorImportance):
        for rows in torch.arange(len(data)).split(64):
            (
                nn.functional.cross_entropy(model(data.x[rows]), data.target[rows], reduction="sum") / len(data)
            ).backward()


def _whole(layer: nn.Module) -> dict[str, Tensor]:
    """{side: all positions} of a layer that can be cut."""
    if isinstance(layer, nn.Conv2d):
        sizes = {"in": layer.in_channels, "out": layer.out_channels}
    elif isinstance(layer, nn.Linear):
        sizes = {"in": layer.in_features, "out": layer.out_features}
    else:
        return {}
    return {side: torch.arange(n) for side, n in sizes.items()}


def _table(kept: Mapping[str, Mapping[str, Tensor]], dense: nn.Module) -> Table:
    """What of each layer is left, of those that lost something."""
    found = {}
    for name, sides in kept.items():
        whole = _whole(dense.get_submodule(name))
        found[name] = {side: of.tolist() for side, of in sides.items() if len(of) < len(whole[side])}
    return {name: sides for name, sides in found.items() if sides}


def mended(asked: Contest, cut: Cut, repair: str) -> tuple[nn.Module, float]:
    """The network, and the seconds of mending it. Raises ModelError where the repair has nothing to mend."""
    check_fits(repair, asked.dense)
    model, mend = copy.deepcopy(cut.model), mender(repair, asked.dense, asked.calibration)
    start = time.perf_counter()
    if mend is not None:
        mend(model, cut.table)
    return model, time.perf_counter() - start


def tuned(model: nn.Module, train: Batch, epochs: int) -> nn.Module:
    """Trained on: SGD with momentum, a cosine from .01, batches of 64 images, half mirrored; the same for all."""
    model = copy.deepcopy(model).train().requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    n_steps = epochs * -(-len(train) // 64)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, n_steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(train), generator=generator).split(64):
            x = train.x[rows]
            flipped = torch.rand(len(rows), generator=generator) < 0.5
            x = torch.where(flipped[:, None, None, None], x.flip(3), x)
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(x), train.target[rows]).backward()
            optimiser.step()
            schedule.step()
    return model.eval().requires_grad_(False)


def raced(asked: Contest, chosen: argparse.Namespace, shares: Sequence[float]) -> Iterator[tuple[str, list[Cut]]]:
    """Each way and its cuts; a peer's pruner that fails on a network is told, and the others run."""
    for name in filter(None, chosen.criteria.split(",")):
        yield name, ours(asked, name, shares)
    for name in filter(None, chosen.importances.split(",")):
        for scope in ("global", "uniform"):
            way = f"{PEER}{name} {scope}"
            try:
                cuts = theirs(asked, name, scope == "global", shares)
            except Exception as error:  # whatever Torch-Pruning raises
                print(f"{way:22s} {type(error).__name__}: {str(error)[:90]}", flush=True)
            else:
                yield way, cuts


def main() -> None:
    chosen = options()
    asked, shares = contest(chosen), [float(share) for share in chosen.removed.split(",")]
    dense_right, _ = accuracy.evaluate(asked.dense, asked.test)
    n, n_dense, flops = len(asked.test), cost.n_parameters(asked.dense), cost.flops(asked.dense, asked.test.x[:1])
    print(f"{chosen.network}: dense {dense_right.mean():.3f} of {n} test images, {n_dense:,} parameters")
    print(f"{'':22s}{'FLOPs':>7s}{'params':>8s}" + "".join(f"{name:>8s}" for name in REPAIRS) + "  time   chosen refit")
    right: dict[tuple[float, str, str], Array] = {}
    networks: dict[tuple[float, str, str], nn.Module] = {}
    for way, cuts in raced(asked, chosen, shares):
        for share, cut in zip(shares, cuts, strict=True):
            told, took = "", 0.0
            for repair in REPAIRS:
                try:
                    model, took = mended(asked, cut, repair)
                except ModelError:
                    told += f"{'-':>8s}"
                    continue
                networks[share, way, repair] = model
                right[share, way, repair], _ = accuracy.evaluate(model, asked.test)
                told += f"{right[share, way, repair].mean():8.3f}"
            times = cost.latency((asked.dense, cut.model), cost.batch_of(asked.test.x), warmup=1, seconds=2.0)
            gone = 1 - cost.flops(cut.model, asked.test.x[:1]) / flops
            left, ratio = cost.n_parameters(cut.model) / n_dense, stats.ratio(*times).mean
            print(f"{way:22s}{gone:7.1%}{left:8.1%}{told}{ratio:6.2f}{cut.seconds:7.0f}s{took:6.1f}s", flush=True)
    summary = {"dense": float(dense_right.mean()), "test_images": n}
    for share in shares:
        for repair in REPAIRS:
            summary |= held_apart(right, share, repair)
        if chosen.epochs:
            for way in filter(None, best(right, share, "refit")):
                trained = tuned(networks[share, way, "refit"], asked.train, chosen.epochs)
                right[share, way, "tuned"], _ = accuracy.evaluate(trained, asked.test)
            summary |= held_apart(right, share, "tuned")
    print(json.dumps({name: round(value, 4) for name, value in summary.items()}))


def best(right: Mapping[tuple[float, str, str], Array], share: float, repair: str) -> tuple[str | None, str | None]:
    """Our way and theirs that get most images right; None where a side has none."""
    of = {way: found.sum() for (s, way, p), found in right.items() if (s, p) == (share, repair)}
    sides = [[way for way in of if way.startswith(PEER) == theirs] for theirs in (False, True)]
    return tuple(max(ways, key=of.__getitem__, default=None) for ways in sides)


def held_apart(right: Mapping[tuple[float, str, str], Array], share: float, repair: str) -> dict[str, float]:
    """The best of both sides, printed, as figures by name; none where one side has none."""
    first, second = best(right, share, repair)
    if first is None or second is None:
        return {}
    one, other = right[share, first, repair], right[share, second, repair]
    apart = stats.paired((one.astype(int) - other.astype(int))[None])
    told = []
    for way, of in ((first, one), (second, other)):
        within = stats.share(int(of.sum()), len(of))
        told.append(f"{way} {within.mean:.3f} ({within.low:.3f} to {within.high:.3f})")
    between = f"apart {apart.mean:+.3f} ({apart.low:+.3f} to {apart.high:+.3f})"
    print(f"{share:.0%} of the FLOPs gone, {repair}: {', '.join([*told, between])}", flush=True)
    figures = {"ours": one.mean(), "theirs": other.mean(), "apart": apart.mean}
    figures |= {"apart_low": apart.low, "apart_high": apart.high}
    return {f"{name}_{repair}_{share:g}": float(value) for name, value in figures.items()}


if __name__ == "__main__":
    main()
