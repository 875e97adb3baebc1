"""What repairs give back to a vision transformer, beside CORP's compensation; their time against images, and memory.

One process, one set of calibration images and one order of units for all. MLPs lose half of their hidden units, or
attention half of its heads, or both, and the cut network is left as it is, compensated by CORP (its MLPs), or mended by
`refit`. CORP is written out here as its paper has it (Zhang and Yang 2026, arXiv 2602.05243): with h what a hidden
layer gives in the dense network over all tokens, S the units that stay and P those that go,

    B = C_PS (C_SS + lambda I)^-1,   W_S += W_P B,   b += W_P (mean h_P - B mean h_S),   C the covariance of h

all layers from the dense network at once, lambda a thousandth of the mean variance. Accuracies are on test images.
Time: seconds of `refit` on 1, 2, 4 times the images, in turns, medians; peak memory above what was held before.

    python benchmarks/repair.py [--data ../shared/data/tiny-imagenet-20] [--weights ../shared/weights/...]

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sukashi import data as datasets
from sukashi.core.types import Batch, Mask, Plan, Preprocess, Scores, Site, rank
from sukashi.criteria import criteria
from sukashi.measures import accuracy
from sukashi.network import sites as finder
from sukashi.network import surgery
from sukashi.repairs import mender

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data/tiny-imagenet-20")
    parser.add_argument("--weights", default="../shared/weights/dinov2_vits14-tin20.safetensors")
    parser.add_argument("--criterion", default="taylor")
    parser.add_argument("--calibration", type=int, default=16, help="images a class")
    parser.add_argument("--test-images", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args(argv)


def network(weights: str) -> nn.Module:
    """A ViT-S/14 for 112 pixels; its weights are half precision in the file."""
    model = timm.create_model("vit_small_patch14_dinov2", img_size=112, num_classes=20)
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(weights).items()})
    return model.eval()


@torch.no_grad()
def corp(small: nn.Module, dense: nn.Module, keep: Mapping[Site, Tensor], x: Tensor) -> None:
    """CORP's compensation of all MLPs that lost units, in place."""
    hidden: dict[str, list[Tensor]] = {}
    handles = []
    for site in keep:
        (reader,) = [m.module for m in site.consumers]
        hidden[reader] = []
        layer = dense.get_submodule(reader)
        handles.append(
            layer.register_forward_pre_hook(lambda _, args, of=hidden[reader]: of.append(args[0].flatten(0, 1)))
        )
    for part in x.split(64):
        dense(part)
    for handle in handles:
        handle.remove()
    for site, kept in keep.items():
        (reader,) = [m.module for m in site.consumers]
        h = torch.cat(hidden.pop(reader)).double()
        mean = h.mean(0)
        covariance = (h - mean).T @ (h - mean) / len(h)
        ridge = 1e-3 * covariance.diagonal().mean() * torch.eye(int(kept.sum()), dtype=h.dtype)
        b = torch.linalg.solve(covariance[kept][:, kept] + ridge, covariance[kept][:, ~kept]).T
        weight, layer = dense.get_submodule(reader).weight.double(), small.get_submodule(reader)
        layer.weight += (weight[:, ~kept] @ b).to(layer.weight)
        layer.bias += (weight[:, ~kept] @ (mean[~kept] - b @ mean[kept])).to(layer.bias)


def halves(plan: Plan, kind: str) -> Mask:
    """Half of the units of each site of a kind gone, in the order of the plan; all of the others stay."""
    order: dict[Site, list[int]] = {site: [] for site in plan.sites}
    for position, unit in zip(plan.site.tolist(), plan.unit.tolist(), strict=True):
        order[plan.sites[position]].append(unit)
    keep = {site: torch.ones(site.n_units, dtype=torch.bool) for site in plan.sites}
    for site, units in order.items():
        if kind in (site.kind, "both"):
            keep[site][units[: site.n_units // 2]] = False
    return Mask(keep)


def peak(work: Callable[[], object]) -> int:
    """Bytes of memory that the process held at most above what it held before."""

    def held() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    most, done = [held()], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            most.append(held())

    watching = threading.Thread(target=watch)
    watching.start()
    work()
    done.set()
    watching.join()
    return max(most) - most[0]


def main() -> None:
    chosen = options()
    dense = network(chosen.weights)
    preprocess = Preprocess(112, 112, 3, MEAN, STD)
    data = datasets.load(chosen.data)
    test = data.test.limit(chosen.test_images).whole(preprocess, 0)
    images = data.train.calibration(chosen.calibration, 0).whole(preprocess, 0).by_class()
    sites = finder.find(dense, images.x[:2]).sites
    outcome = criteria[chosen.criterion](dense, sites, images, generator=torch.Generator().manual_seed(0))
    plan = rank(outcome) if isinstance(outcome, Scores) else outcome
    n_dense = sum(p.numel() for p in dense.parameters())

    def right(model: nn.Module) -> float:
        return float(accuracy.evaluate(model, test)[0].mean())

    found: dict[str, float] = {"dense": right(dense)}
    print(f"{'':10s}{'parameters':>12s}{'cut':>8s}{'CORP':>8s}{'refit':>8s}   accuracy on {len(test)} test images")
    print(f"{'dense':10s}{'100.0 %':>12s}{found['dense']:8.3f}")
    for kind in ("hidden", "head", "both"):
        mask = halves(plan, kind)
        cut = copy.deepcopy(dense)
        table = surgery.cut(cut, mask)
        networks = {"cut": cut, "refit": copy.deepcopy(cut)}
        mend = mender("refit", dense, images)
        assert mend is not None
        mend(networks["refit"], table)
        gone = {site: keep for site, keep in mask.keep.items() if site.kind == "hidden" and not keep.all()}
        if gone:
            networks["corp"] = copy.deepcopy(cut)
            corp(networks["corp"], dense, gone, images.x)
        for name, model in networks.items():
            found[f"{kind}_{name}"] = right(model)
        left = sum(p.numel() for p in cut.parameters()) / n_dense
        theirs = f"{found[f'{kind}_corp']:8.3f}" if gone else f"{'-':>8s}"
        print(f"{kind:10s}{left:10.1%} {found[f'{kind}_cut']:9.3f}{theirs}{found[f'{kind}_refit']:8.3f}", flush=True)

    mask = halves(plan, "both")
    times: dict[int, list[float]] = {}
    memory: dict[int, int] = {}
    for _ in range(chosen.repeats):
        for part in (4, 2, 1):
            some: Batch = images[slice(0, None, part)]
            model = copy.deepcopy(dense)
            table = surgery.cut(model, mask)
            mend = mender("refit", dense, some)
            assert mend is not None
            start = time.perf_counter()
            memory[len(some)] = peak(lambda model=model, table=table, mend=mend: mend(model, table))
            times.setdefault(len(some), []).append(time.perf_counter() - start)
    print(f"\n{'images':>8s}{'seconds':>10s}{'peak memory':>14s}   both halves, refit")
    for n, seconds in times.items():
        print(f"{n:8d}{statistics.median(seconds):10.1f}{memory[n] / 2**20:10.0f} MiB")
    fewest, most = min(times), max(times)
    found["seconds_ratio"] = statistics.median(times[most]) / statistics.median(times[fewest])
    found["images_ratio"] = most / fewest
    found["peak_mb"] = max(memory.values()) / 1e6
    print(json.dumps({name: round(value, 4) for name, value in found.items()}))


if __name__ == "__main__":
    main()
