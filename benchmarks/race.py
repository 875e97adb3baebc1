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
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
import torch_pruning as tp
from safetensors.torch import load_file
from torch import Tensor, nn

from sukashi import data as datasets
from sukashi import models
from sukashi.core import stats
from sukashi.core.errors import SukashiError
from sukashi.core.types import Batch, Plan, Preprocess, Scores, rank
from sukashi.criteria import criteria
from sukashi.measures import accuracy, cost
from sukashi.network import sites as finder
from sukashi.network import surgery
from sukashi.network.surgery import Table
from sukashi.repairs import mender

REPAIRS = ("none", "norm", "refit")
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
class Contest:
    """A dense network, its layers that Torch-Pruning can't cut, and the images that calibrate, train and test it."""

    dense: nn.Module
    beyond: Sequence[str]
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
    parser.add_argument("network", choices=["resnet20", "resnet18", "efficientnet", "vit"])
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
    if chosen.network in ("resnet20", "resnet18"):
        width = {"resnet20": None, "resnet18": 32}[chosen.network]
        file = {"resnet20": "resnet20-cifar10", "resnet18": "resnet18w32-cifar10"}[chosen.network]
        loaded = models.load(
            f"sukashi:cifar_{chosen.network}", width=width, weights=chosen.weights / f"{file}.safetensors"
        )
        model, reads, folder = loaded.model, loaded.preprocess, "cifar10"
    else:
        name, file, size, middle, spread, more = {
            "efficientnet": ("tf_efficientnet_lite0", "efficientnet_lite0-tin20-head", 128, 0.5, 0.5, {}),
            "vit": ("vit_small_patch14_dinov2", "dinov2_vits14-tin20", 112, None, None, {"img_size": 112}),
        }[chosen.network]
        model = timm.create_model(name, num_classes=20, **more)
        model.load_state_dict({k: v.float() for k, v in load_file(chosen.weights / f"{file}.safetensors").items()})
        mean, std = (
            ((middle,) * 3, (spread,) * 3) if middle is not None else ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        )
        reads, folder = Preprocess(size, size, 3, mean, std), "tiny-imagenet-20"
    data = datasets.load(str(chosen.data / folder))
    of = data.train.calibration(chosen.calibration, 0)
    train = data.train.whole(reads, 0) if chosen.epochs else of.whole(reads, 0)
    # Where ResNet-20's stages meet, zeros are put beside the channels that there are: Torch-Pruning's cuts don't run.
    stream = [name for name, _ in model.named_modules() if name.endswith(".conv2") or name == "conv1"]
    beyond = ["fc", "linear", "classifier", "head", *(stream if chosen.network == "resnet20" else [])]
    return Contest(
        model.eval(), beyond, of.whole(reads, 0).by_class(), train, data.test.limit(chosen.test_images).whole(reads, 0)
    )


def ours(asked: Contest, criterion: str, shares: Sequence[float]) -> list[Cut]:
    """A cut of each share of the FLOPs: the fewest units of the criterion's plan that go with so many."""
    start = time.perf_counter()
    sites = finder.find(asked.dense, asked.calibration.x[:2]).sites
    outcome = criteria[criterion](asked.dense, sites, asked.calibration, generator=torch.Generator().manual_seed(0))
    plan: Plan = rank(outcome) if isinstance(outcome, Scores) else outcome
    seconds = time.perf_counter() - start
    dense = cost.flops(asked.dense, asked.calibration.x[:1])

    def at(n: int) -> tuple[nn.Module, Table]:
        model = copy.deepcopy(asked.dense)
        return model, surgery.cut(model, plan.mask(n / plan.n_units))

    found = []
    for share in shares:
        most = (1 - share) * dense
        n = bisect_left(
            range(plan.n_removable), True, key=lambda n: cost.flops(at(n)[0], asked.calibration.x[:1]) <= most
        )
        found.append(Cut(*at(n), seconds))
    return found


def theirs(asked: Contest, importance: str, everywhere: bool, shares: Sequence[float]) -> list[Cut]:
    """The networks of Torch-Pruning's pruner at the first steps that remove so much of the FLOPs."""
    start = time.perf_counter()
    model = copy.deepcopy(asked.dense)
    example, scorer = asked.calibration.x[:1], IMPORTANCES[importance]()
    _gradients(model, asked.calibration, scorer)
    heads = {m.qkv: m.num_heads for m in model.modules() if hasattr(m, "qkv")}
    pruner = tp.pruner.BasePruner(
        model,
        example,
        scorer,
        global_pruning=everywhere,
        pruning_ratio=1.0,
        iterative_steps=STEPS,
        ignored_layers=[layer for name, layer in model.named_modules() if name in asked.beyond],
        num_heads=heads,
        prune_num_heads=bool(heads),
        prune_head_dims=False,
        head_pruning_ratio=1.0 if heads else 0.0,
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
            if hasattr(block, "qkv"):
                block.num_heads = pruner.num_heads[block.qkv]
                block.attn_dim = block.num_heads * block.head_dim
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
    return {
        name: {
            side: of.tolist() for side, of in sides.items() if len(of) < len(_whole(dense.get_submodule(name))[side])
        }
        for name, sides in kept.items()
        if any(len(of) < len(_whole(dense.get_submodule(name))[side]) for side, of in sides.items())
    }


def mended(asked: Contest, cut: Cut, repair: str) -> tuple[nn.Module, float]:
    """The network, and the seconds of mending it."""
    model, mend = copy.deepcopy(cut.model), mender(repair, asked.dense, asked.calibration)
    start = time.perf_counter()
    if mend is not None:
        mend(model, cut.table)
    return model, time.perf_counter() - start


def tuned(model: nn.Module, train: Batch, epochs: int) -> nn.Module:
    """Trained on: SGD with momentum, a cosine from .01, batches of 64, flips and shifts; the same for all."""
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


def main() -> None:
    chosen = options()
    asked, shares = contest(chosen), [float(share) for share in chosen.removed.split(",")]
    dense_right, _ = accuracy.evaluate(asked.dense, asked.test)
    n, n_dense = len(asked.test), cost.n_parameters(asked.dense)
    print(f"{chosen.network}: dense {dense_right.mean():.3f} of {n} test images, {n_dense:,} parameters")
    print(
        f"{'':22s}{'FLOPs':>7s}{'params':>8s}" + "".join(f"{name:>8s}" for name in REPAIRS) + "  time   chosen mended"
    )
    ways: dict[str, Callable[[], list[Cut]]] = {}
    for name in filter(None, chosen.criteria.split(",")):
        ways[name] = lambda name=name: ours(asked, name, shares)
    for name in filter(None, chosen.importances.split(",")):
        for scope in ("global", "uniform"):
            ways[f"tp {name} {scope}"] = lambda name=name, scope=scope: theirs(asked, name, scope == "global", shares)
    right: dict[tuple[float, str, str], Tensor] = {}
    networks: dict[tuple[float, str, str], nn.Module] = {}
    for way, made in ways.items():
        try:
            cuts = made()
        except Exception as error:  # of a peer's pruner that fails on a network, the others run
            print(f"{way:22s} {type(error).__name__}: {str(error)[:90]}", flush=True)
            continue
        for share, cut in zip(shares, cuts, strict=True):
            took = 0.0
            for repair in REPAIRS:
                try:
                    model, took = mended(asked, cut, repair)
                except SukashiError:  # nothing to mend by it
                    model = cut.model
                networks[share, way, repair] = model
                right[share, way, repair] = torch.from_numpy(accuracy.evaluate(model, asked.test)[0])
            flops, params = cost.flops(cut.model, asked.test.x[:1]), cost.n_parameters(cut.model)
            ratio = stats.ratio(
                *cost.latency((asked.dense, cut.model), cost.batch_of(asked.test.x), warmup=1, seconds=2.0)
            )
            found = "".join(f"{right[share, way, repair].double().mean():8.3f}" for repair in REPAIRS)
            gone = 1 - flops / cost.flops(asked.dense, asked.test.x[:1])
            print(
                f"{way:22s}{gone:7.1%}{params / n_dense:8.1%}{found}{ratio.mean:6.2f}{cut.seconds:7.0f}s{took:6.1f}s",
                flush=True,
            )
    summary = {"dense": float(dense_right.mean()), "test_images": n}
    stages = [*REPAIRS, *(["tuned"] if chosen.epochs else [])]
    if len({way.startswith("tp ") for _, way, _ in right}) < 2:
        stages = []  # one side alone has nobody to race against
    for share in shares:
        for repair in stages:
            sides = {"ours": {}, "theirs": {}}
            if repair == "tuned":
                for side in sides:
                    way = best(right, share, "refit", side)
                    right[share, way, "tuned"] = torch.from_numpy(
                        accuracy.evaluate(tuned(networks[share, way, "refit"], asked.train, chosen.epochs), asked.test)[
                            0
                        ]
                    )
            first, second = (best(right, share, repair, side) for side in sides)
            both = [right[share, way, repair].int() for way in (first, second)]
            apart = stats.paired((both[0] - both[1])[None].numpy())
            within = [stats.share(int(of.sum()), n) for of in both]
            print(
                f"{share:.0%} of the FLOPs gone, {repair}: {first} {within[0].mean:.3f} ({within[0].low:.3f} to "
                f"{within[0].high:.3f}), {second} {within[1].mean:.3f} ({within[1].low:.3f} to {within[1].high:.3f}), "
                f"apart {apart.mean:+.3f} ({apart.low:+.3f} to {apart.high:+.3f})",
                flush=True,
            )
            key = f"{repair}_{share:g}"
            summary |= {f"ours_{key}": within[0].mean, f"theirs_{key}": within[1].mean}
            summary |= {f"apart_{key}": apart.mean, f"apart_low_{key}": apart.low, f"apart_high_{key}": apart.high}
    print(json.dumps({name: round(value, 4) for name, value in summary.items()}))


def best(right: Mapping[tuple[float, str, str], Tensor], share: float, repair: str, side: str) -> str:
    """The way of a side that gets most images right."""
    of = {way: r.sum() for (s, way, p), r in right.items() if (s, p) == (share, repair)}
    return max((way for way in of if way.startswith("tp ") == (side == "theirs")), key=of.__getitem__)


if __name__ == "__main__":
    main()
