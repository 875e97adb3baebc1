"""What a pruned network looks at once a part of what it looked at is taken out: the ball of basketball.

After figure 1 of Danek and Ramaswamy 2026. EfficientNet-Lite0 with a head of 20 classes of tiny-imagenet; DRSA parts
what a block writes for basketball into four subspaces, of which one lies on the ball. The network is cut to a share of
its parameters, and refitted towards the dense one, and towards the dense one without that subspace. Told, over the test
images of the class: which share of the positive relevance (LRP) for it lies where that subspace is most relevant in the
dense network (a tenth of the pixels), with a 95 % bootstrap interval over images and paired; accuracy on all classes.

    python studies/basketball.py [--number 3] [--figure FILE.png] [--data ...] [--weights ...]

Which of the subspaces it is, a person says by the figure. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import json
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from carton import cut_to
from torch import Tensor, nn

from sukashi import data as datasets
from sukashi import models
from sukashi.attributions import attributions
from sukashi.core import files, stats
from sukashi.core.types import Plan, Preprocess, Scores, rank
from sukashi.criteria import criteria
from sukashi.decompositions.contrast import highest
from sukashi.decompositions.drsa import drsa
from sukashi.decompositions.maps import relevance_maps
from sukashi.decompositions.subspaces import Subspaces, ablated
from sukashi.decompositions.vectors import features, vectors
from sukashi.measures import accuracy
from sukashi.network import hooks, sites
from sukashi.repairs import Teacher, mender
from sukashi.report.gallery import Picture, draw_gallery

CLASS, LAYER, N_SUBSPACES, PLACE = "basketball", "blocks.4", 4, 0.1


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data/tiny-imagenet-20")
    parser.add_argument("--weights", default="../shared/weights/efficientnet_lite0-tin20-head.safetensors")
    parser.add_argument("--number", type=int, default=3)
    parser.add_argument("--left", type=float, default=0.5, help="share of the parameters that the cut leaves")
    parser.add_argument("--calibration", type=int, default=16, help="images a class")
    parser.add_argument("--figure", type=Path)
    return parser.parse_args()


def parted(dense: nn.Module, data: datasets.Data, preprocess: Preprocess, own: int) -> Subspaces:
    """DRSA's subspaces of the class, by 200 training images of it."""
    train, generator = data.train, torch.Generator().manual_seed(0)
    rank_in_class = train.rank_in_class("concepts", 0)
    images = train.subset((train.targets.numpy() == own) & (rank_in_class < 200)).whole(preprocess)
    site = features(dense, LAYER, images.x[:2])
    a, c = vectors(dense, images, site, positions=20, generator=generator, rule="alpha1beta0")
    found = drsa(a, c, N_SUBSPACES, generator=generator)
    everything = train.limit(200).whole(preprocess)
    mean = hooks.means(dense, [site], everything.x.split(64))[site].mean(1)
    return Subspaces(LAYER, site.axis, found.basis, found.basis, N_SUBSPACES, site.n_units // N_SUBSPACES, mean)


def relevance(model: nn.Module, x: Tensor, own: int) -> Tensor:
    """(B, H, W) of the pixels for the class."""
    target = torch.full((len(x),), own)
    found = attributions["lrp"](model, x, target, [sites.input_site(x[:1])], rule="epsilon_plus")
    return next(iter(found.values())).sum(1)


def place_of(dense: nn.Module, subspaces: Subspaces, number: int, x: Tensor, own: int) -> tuple[Tensor, Tensor]:
    """(B, H, W) where a subspace is relevant for the class, and bool, the tenth of the pixels where it is most so."""
    layer = features(dense, subspaces.layer, x[:2])
    where = relevance_maps(dense, x, torch.full((len(x),), own), layer, subspaces)[:, 1 + number]
    large = F.interpolate(where[:, None], x.shape[2:], mode="bilinear", align_corners=False)[:, 0]
    return large, highest(large, PLACE)


def main() -> None:
    chosen = options()
    loaded = models.load("timm:tf_efficientnet_lite0", weights=chosen.weights, size=[128, 128])
    dense, preprocess, data = loaded.model, loaded.preprocess, datasets.load(chosen.data)
    own = data.class_names.index(CLASS)
    subspaces = parted(dense, data, preprocess, own)
    test = data.test.whole(preprocess)
    images = test[(test.target == own).nonzero()[:, 0]]
    ball, there = place_of(dense, subspaces, chosen.number, images.x, own)
    calibration = data.train.calibration(chosen.calibration, 0).whole(preprocess).by_class()
    generator = torch.Generator().manual_seed(0)
    outcome = criteria["taylor"](dense, sites.find(dense, calibration.x[:2]).sites, calibration, generator=generator)
    plan: Plan = rank(outcome) if isinstance(outcome, Scores) else outcome
    cut, table, left = cut_to(dense, plan, chosen.left)
    networks = {"dense": dense}
    teachers: dict[str, Teacher] = {
        "refit": nullcontext,
        "without": partial(ablated, dense, subspaces, [chosen.number]),
    }
    for name, teacher in teachers.items():
        networks[name] = copy.deepcopy(cut)
        mend = mender("refit", dense, calibration, teacher)
        assert mend is not None
        mend(networks[name], table)
    shares, shown, summary = {}, {}, {"parameters": left}
    for name, model in networks.items():
        shown[name] = relevance(model, images.x, own)
        positive = shown[name].clamp(min=0).double()
        shares[name] = ((positive * there).sum((1, 2)) / positive.sum((1, 2)).clamp(min=1e-12)).numpy()
        correct, _ = accuracy.evaluate(model, test)
        told = stats.bootstrap(shares[name], generator=np.random.default_rng(0))
        right = stats.share(int(correct.sum()), len(correct))
        of_class = correct[(test.target == own).numpy()].mean()
        print(
            f"{name:8s} on the place {told.mean:.3f} [{told.low:.3f}, {told.high:.3f}]  right {right.mean:.3f} "
            f"[{right.low:.3f}, {right.high:.3f}], of {CLASS} {of_class:.2f}"
        )
        summary |= {f"{name}, place": told.mean, f"{name}, right": right.mean, f"{name}, class": float(of_class)}
    apart = stats.bootstrap(shares["without"] - shares["refit"], generator=np.random.default_rng(0))
    print(f"without less refit, on the place: {apart.mean:+.3f} [{apart.low:+.3f}, {apart.high:+.3f}]")
    summary |= {"apart": apart.mean, "apart_low": apart.low, "apart_high": apart.high}
    if chosen.figure:
        scale, shift = (torch.tensor(of)[:, None, None] for of in (preprocess.std, preprocess.mean))
        rows = shares["dense"].argsort()[::-1][:5].tolist()  # where the dense network looks there most
        maps = {"dense": shown["dense"], f"subspace {chosen.number}": ball, "refitted": shown["refit"]}
        maps["refitted without"] = shown["without"]
        pictures = [
            Picture(
                (images.x[row] * scale + shift).clamp(0, 1).permute(1, 2, 0).numpy(),
                "",
                {name: found[row].numpy() for name, found in maps.items()},
                (),
                "",
            )
            for row in rows
        ]
        files.write(chosen.figure, draw_gallery(pictures, signed=True).png)
    print(json.dumps({name: round(float(value), 4) for name, value in summary.items()}))


if __name__ == "__main__":
    main()
