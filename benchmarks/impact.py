"""Units, sparse autoencoders and circuits: seconds beside scikit-learn, dense autograd, overcomplete and one by one.

One process, both sides in turns, medians; random activations (what they are does not change the work).

- selectivity: areas under the ROC curve of 768 units for 100 classes on 5,000 images, ours in one sort, scikit-learn's
  `roc_auc_score` in a loop over units and classes (of which a part is timed, and the rest taken to cost the same); the
  largest difference.
- autoencoder: a training step with Adam at 768 features x 32 = 24,576 latents, k = 128, batches of 512 rows; ours, the
  same loss by dense autograd, and overcomplete 0.3's BatchTopK with its own criterion for the same number of active
  latents.
- circuits: ten classes of the digits ViT in one batch, against one class after another, in a step each of 8 images a
  class; peak memory of both beside.

    python benchmarks/impact.py [--repeats 5]

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import statistics
import time
from collections.abc import Callable, Mapping

import matplotlib
import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from sukashi import data as datasets
from sukashi import models
from sukashi.decompositions.circuits import find_circuits
from sukashi.decompositions.nodes import nodes_of
from sukashi.decompositions.sae import SparseAutoencoder
from sukashi.measures.neurons import selectivity
from sukashi.network import hooks

# overcomplete 0.3 asks for it on import; matplotlib has it no more.
matplotlib.cm.get_cmap = matplotlib.colormaps.__getitem__  # type: ignore[attr-defined]


def in_turns(sides: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each side, after a turn that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, work in sides.items():
            start = time.perf_counter()
            work()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(of) for name, of in seconds.items()}


def areas(n: int, n_units: int, n_classes: int, repeats: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(n, n_units, generator=generator).mul(100).round()  # with ties
    target = torch.randint(0, n_classes, (n,), generator=generator)
    some = [(unit, k) for unit in range(0, n_units, n_units // 8) for k in range(0, n_classes, n_classes // 5)]
    of, has = a.numpy(), target.numpy()

    def theirs() -> list[float]:
        return [roc_auc_score(has == k, of[:, unit]) for unit, k in some]

    found = in_turns({"ours": lambda: selectivity(a, target, n_classes), "scikit-learn": theirs}, repeats)
    found["scikit-learn"] *= n_units * n_classes / len(some)
    own = selectivity(a, target, n_classes)
    error = max(abs(float(own[unit, k]) - area) for (unit, k), area in zip(some, theirs(), strict=True))
    return {**found, "error": error}


def steps(n_features: int, expansion: int, k: int, size: int, repeats: int) -> dict[str, float]:
    from overcomplete.sae import BatchTopKSAE

    n_latents = expansion * n_features
    x = torch.randn(size, n_features, generator=torch.Generator().manual_seed(0))
    ours = SparseAutoencoder(n_features, n_latents, k, generator=torch.Generator().manual_seed(0))
    ours.standardise(x)
    dense = copy.deepcopy(ours)
    theirs = BatchTopKSAE(n_features, n_latents, top_k=k * size)
    theirs.train()
    optimisers = {
        "ours": torch.optim.Adam(ours.parameters(), lr=1e-4, fused=True),
        "dense": torch.optim.Adam(dense.parameters(), lr=1e-4, fused=True),
        "overcomplete": torch.optim.Adam(theirs.parameters(), lr=1e-4, fused=True),
    }

    def sparse() -> None:
        ours.step(x)
        optimisers["ours"].step()
        ours.settle()

    def by_autograd() -> Tensor:
        z = (x - dense.mean) / dense.scale
        pre = (z @ dense.encoder.T + dense.encoder_bias).relu()
        least = pre.detach().flatten().topk(k * size).values[-1]
        left = pre * (pre.detach() >= least) @ dense.decoder + dense.decoder_bias - z
        loss = left.square().mean()
        optimisers["dense"].zero_grad()
        loss.backward()
        optimisers["dense"].step()
        dense.settle()
        return loss

    def others() -> None:
        optimisers["overcomplete"].zero_grad()
        _, _, back = theirs(x)
        (back - x).square().mean().backward()
        optimisers["overcomplete"].step()

    first = float(copy.deepcopy(ours).step(x)), float(by_autograd().detach())
    dense.load_state_dict(ours.state_dict())
    found = in_turns({"ours": sparse, "dense": by_autograd, "overcomplete": others}, repeats)
    return {**found, "error": abs(first[0] - first[1]) / first[1]}


def classes(repeats: int) -> dict[str, float]:
    images = datasets.load("digits")
    loaded = models.load("sukashi:digits_vit")
    model = loaded.model.eval().requires_grad_(False)
    data = images.train.calibration(32, 0).whole(loaded.preprocess)
    nodes = nodes_of(model, data.x[:2])
    means = hooks.means(model, nodes.places, [data.x])
    given = {"penalty": 1e-4, "epochs": 1, "batch_size": 8}
    found: dict[str, Tensor] = {}

    def together() -> None:
        found["together"] = find_circuits(model, nodes, data, [*range(10)], means, **given)

    def one_by_one() -> None:
        found["one by one"] = torch.cat([find_circuits(model, nodes, data, [k], means, **given) for k in range(10)])

    seconds = in_turns({"together": together, "one by one": one_by_one}, repeats)
    return {**seconds, "differ": float((found["together"] != found["one by one"]).double().mean())}


def peak() -> float:
    """GiB, of the process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    chosen = parser.parse_args()
    np.random.seed(0)
    told = {}
    for name, of in (
        ("selectivity", lambda: areas(5000, 768, 100, chosen.repeats)),
        ("autoencoder", lambda: steps(768, 32, 128, 512, chosen.repeats)),
        ("circuits", lambda: classes(chosen.repeats)),
    ):
        told[name] = of()
        said = ", ".join(f"{side} {value:.3g}" for side, value in told[name].items())
        print(f"{name}: {said}; peak so far {peak():.1f} GiB", flush=True)
    area, sae, circuit = told["selectivity"], told["autoencoder"], told["circuits"]
    print(
        json.dumps(
            {
                "auroc": round(area["scikit-learn"] / area["ours"], 1),
                "sae_step_dense": round(sae["dense"] / sae["ours"], 2),
                "sae_step_overcomplete": round(sae["overcomplete"] / sae["ours"], 2),
                "circuits_batch": round(circuit["one by one"] / circuit["together"], 2),
                "auroc_error": area["error"],
            }
        )
    )


if __name__ == "__main__":
    main()
