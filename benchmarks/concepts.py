"""Concepts: subspaces against the published iteration, parts against scikit-learn, importances against sampled ones.

One process, real activations: ResNet-18 of base width 32 on CIFAR-10.

- DRSA: activations and contexts of `layer3` (128 features), four subspaces. The published iteration,
  U <- polar(U + dJ), takes 3,500 steps; ours starts from the same matrix and stops where it reaches that objective.
- NMF: activations of `layer4` (256 features) at 8,000 positions in 25 parts; scikit-learn's coordinate descent at its
  defaults, ours in turns with it, medians; and how much larger our error is, as a share of its error.
- CRAFT: importances of ten concepts of `layer4` for a class, ours from slopes and by sampling (Jansen over 256 points
  of a Sobol sequence, and the official 32 of Halton's); errors against e^2 / sum e^2 in float64.

    python benchmarks/concepts.py [--data ../shared/data/cifar10] [--weights ../shared/weights/...]

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from sklearn.decomposition import NMF
from torch import Tensor

from sukashi import data as datasets
from sukashi import models
from sukashi.decompositions import craft, drsa, nmf
from sukashi.decompositions.vectors import features, vectors
from sukashi.network.behind import behind

STEPS = 3500


def timed(work: Callable[[], object]) -> tuple[float, object]:
    start = time.perf_counter()
    found = work()
    return time.perf_counter() - start, found


def subspaces(a: Tensor, c: Tensor, k: int, steps: int) -> dict[str, float]:
    """Steps and seconds of the published iteration, and of ours to the objective that it reaches."""
    a, c = (of / of.double().square().sum(1).mean().sqrt() for of in (a, c))

    def published() -> Tensor:
        basis = drsa.orthogonal(a.shape[1], torch.Generator().manual_seed(0))
        for _ in range(steps):
            basis = drsa.polar(basis + drsa.gradient(a, c, basis, k))
        return basis

    theirs, basis = timed(published)
    assert isinstance(basis, Tensor)
    goal = drsa.objective(a, c, basis, k)
    found = drsa.drsa(a, c, k, generator=torch.Generator().manual_seed(0), trials=1, tolerance=0)
    reached = [number * drsa.EVERY for number, value in enumerate(found.history[0]) if value >= goal]
    needed = reached[0] if reached else 0
    ours = float("nan")
    if needed:
        ours, _ = timed(
            lambda: drsa.drsa(a, c, k, generator=torch.Generator().manual_seed(0), trials=1, steps=needed, tolerance=0)
        )
    print(
        f"DRSA, {len(a):,} vectors of {a.shape[1]}: J {goal:.4f} after {steps:,} steps in {theirs:.1f} s; ours after",
        end="",
    )
    print(f" {needed} in {ours:.1f} s; where it stops {found.objective:.4f}", flush=True)
    return {"drsa_steps": steps / needed if needed else 0.0, "drsa_time": theirs / ours}


def parts(x: Tensor, k: int, repeats: int) -> dict[str, float]:
    theirs, ours, more = [], [], 0.0
    for _ in range(repeats):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = NMF(k, max_iter=1000)
            seconds, u = timed(lambda model=model: model.fit_transform(x.numpy()))
        theirs.append(seconds)
        error = float((x - torch.from_numpy(u @ model.components_)).square().sum())
        seconds, found = timed(lambda: nmf.nmf(x, k))
        ours.append(seconds)
        more = float((x - found[0] @ found[1]).square().sum()) / error - 1
    one, other = statistics.median(theirs), statistics.median(ours)
    print(
        f"NMF, {len(x):,} rows of {x.shape[1]} in {k} parts: {one:.2f} s, ours {other:.2f} s, error {more:+.2%}",
        flush=True,
    )
    return {"nmf": one / other, "nmf_error": more}


def importances(model: torch.nn.Module, x: Tensor, bank: craft.Bank, target: int, head: Tensor) -> dict[str, float]:
    rest, maps = behind(model, bank.site, x[:2]), craft.concept_maps(model, x, bank)
    u = maps.flatten(2).mean(2).double()
    effect = u * (bank.w.double() @ head.double())
    truth = effect.square() / effect.square().sum(1, keepdim=True)
    seconds, errors = {}, {}
    for name, asked in (
        ("exact", {"how": "exact"}),
        ("sobol", {"how": "sobol", "n_designs": 256}),
        ("compat", {"how": "compat", "n_designs": 32}),
    ):
        seconds[name], found = timed(lambda asked=asked: craft.importance(rest, maps, bank, target, **asked))
        assert isinstance(found, Tensor)
        errors[name] = float((found - truth).abs().mean())
        print(f"CRAFT, {len(x)} images, {name}: {seconds[name]:.3f} s, mean error {errors[name]:.1e}", flush=True)
    return {
        "craft_exact": seconds["sobol"] / seconds["exact"],
        "craft_exact_halton": seconds["compat"] / seconds["exact"],
        "craft_error": errors["exact"],
        "craft_error_sobol": errors["sobol"],
        "craft_error_halton": errors["compat"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data/cifar10")
    parser.add_argument("--weights", default="../shared/weights/resnet18w32-cifar10.safetensors")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--repeats", type=int, default=5)
    chosen = parser.parse_args()
    loaded = models.load("sukashi:cifar_resnet18", weights=chosen.weights, width=32)
    model, data = loaded.model, datasets.load(chosen.data)
    images = data.train.calibration(50, 0).whole(loaded.preprocess, 0).by_class()
    site = features(model, "layer3", images.x[:2])
    a, c = vectors(model, images, site, positions=10, generator=torch.Generator().manual_seed(0))
    summary = subspaces(a, c, 4, chosen.steps)
    site = features(model, "layer4", images.x[:2])
    many = data.train.calibration(50, 1).whole(loaded.preprocess, 0)
    rows, _ = vectors(model, many, site, positions=16, generator=torch.Generator().manual_seed(0))
    summary |= parts(rows, 25, chosen.repeats)
    of_class = images[images.target == 0]
    bank = craft.bank(model, craft.crops(of_class.x, 16), site, 10)
    summary |= importances(model, of_class.x[:20], bank, 0, model.get_submodule("fc").weight[0].detach())
    print(json.dumps({name: round(value, 6) for name, value in summary.items()}))


if __name__ == "__main__":
    main()
