"""A planted watermark, a network that relies on it, and what it relies on after it was pruned in different ways.

After Danek and Ramaswamy 2026 (concept-aware network pruning, CNP): two classes of tiny-imagenet, a half transparent
text on 90 % of the training images of the positive one and on 2 % of the others, a small VGG with BatchNorm at 64
pixels that learns from them. Tested on counterfactual twins, each image without and with the mark, so that the four
groups of class (c) and mark (w) are of one size. Half of the filters go, by LRP's ranking on the positive class:

    plain    in five steps, two epochs of cross entropy after each, three at the end
    CNP      the same, ranked without a subspace of DRSA (K = 4, set to zero), which training then goes around; the
             filters of its layer stay
    ours     at once, and each layer refitted in closed form towards the dense network without a contrast subspace, on
             unlabelled images: those of the training, twenty without the mark, and those of the other class with it
             pasted in

No image of the training says whether it has the mark. A person who looks at twenty images of the positive class that
have it names the subspace of DRSA that lies on it, for CNP, and for ours draws a box around it, in which it is imputed:
the contrast subspace is of these twenty pairs. The person is stood in for by the mark's true place. The other ways say
which part does it: where pairs come from (`DRSA's place`, all images of the class, imputed where that subspace is most
relevant; `stamped pairs`, true ones; `no subspace`), its layer, the images of the refit, the recovery.

    PYTHONPATH=studies python studies/watermark.py PAIR [--seeds 5] [--data ../shared/data/tiny-imagenet-20]

PAIR is easy (dugong and barrel) or hard (volleyball and basketball), the positive class first. Told are means over
seeds, each of which draws images, weights and marks, with 95 % t intervals over seeds below them; first of the networks
as they are, then with their bias moved so that half of the training images are called positive, of each way alike.
`shift` is by how much the mark raises the logit of the positive class over the other, in standard deviations of that;
`AUC` tells classes apart within the groups that contradict the training, where accuracy would mix bias and ability.
Choices (share imputed, dimensions, layers, rates of training, boxes) were made on seeds 10 to 12 of the hard pair. What
each way answers to each image is kept in --out, and not computed again. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import networks
import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from sukashi import data as datasets
from sukashi.core import files
from sukashi.core.types import Batch, Plan, Scores, Site, rank
from sukashi.criteria import criteria
from sukashi.data.watermark import Watermark, stamped
from sukashi.decompositions.contrast import contrast, highest
from sukashi.decompositions.drsa import drsa
from sukashi.decompositions.maps import relevance_maps
from sukashi.decompositions.subspaces import Subspaces, ablated
from sukashi.decompositions.vectors import features, vectors
from sukashi.measures import cost
from sukashi.measures.imputation import impute
from sukashi.network import hooks, sites, surgery
from sukashi.repairs import mender

PAIRS = {"easy": ("dugong", "barrel"), "hard": ("volleyball", "basketball")}
MARK = Watermark("sukashi", size=0.14, at=(0.05, 0.8), opacity=0.35)
MARKED = [0.02, 0.9]  # of the negatives, of the positives
N_TEST = 60  # training images of each class that are held out for the test, beside those of the val split
LAYER, DEEPER = "20", "24"  # of networks.vgg: the end of its fourth stage, and in its fifth
FILTERS = {LAYER: "18", DEEPER: "22"}  # the convolutions whose filters they hold
SHARE = 0.5  # of the filters that goes
STEPS, TUNED, LAST = 5, 2, 3  # of cutting and training; epochs after each, and at the end
RATE, GENTLE = 1e-3, 3e-4  # of AdamW
N_SUBSPACES, N_DIMENSIONS = 4, 2
IMPUTED = 0.1  # of the pixels, where DRSA says where
LOOKED_AT = 20  # images, by a person
EPOCHS = 20
N_WAYS = 14
SETTINGS = {
    **{"mark": asdict(MARK), "marked": MARKED, "n_test": N_TEST, "layers": [LAYER, DEEPER], "share": SHARE},
    **{"steps": [STEPS, TUNED, LAST], "rates": [RATE, GENTLE], "subspaces": [N_SUBSPACES, N_DIMENSIONS]},
    **{"imputed": IMPUTED, "looked_at": LOOKED_AT, "epochs": EPOCHS},
}
GROUPS = ("c0w0", "c0w1", "c1w0", "c1w1")


@dataclass(frozen=True)
class Task:
    """Training images as they are found (and, of each, without and with the mark), test images without and with it."""

    train: Batch
    plain: Tensor
    marked: Tensor
    test: Batch
    test_marked: Tensor

    @property
    def positive(self) -> Tensor:
        return self.train.target.bool()


def planted(data: datasets.Data, pair: str, seed: int) -> Task:
    numbers = [data.class_names.index(name) for name in reversed(PAIRS[pair])]
    pool, rest = data.train.only(numbers), data.test.only(numbers)
    preprocess = networks.vgg(2).preprocess
    held_out = pool.rank_in_class("test", seed) < N_TEST
    train, more, rest = (part.whole(preprocess) for part in (pool.subset(~held_out), pool.subset(held_out), rest))
    test = Batch(torch.cat([more.x, rest.x]), torch.cat([more.target, rest.target]), (*more.image_id, *rest.image_id))
    order = torch.from_numpy(pool.subset(~held_out).rank_in_class("mark", seed))
    share = torch.tensor(MARKED)[train.target]
    has = order < share * train.target.bincount()[train.target]
    marked = stamped(train.x, MARK, preprocess)
    found = torch.where(has[:, None, None, None], marked, train.x)
    return Task(replace(train, x=found), train.x, marked, test, stamped(test.x, MARK, preprocess))


def tuned(model: nn.Module, train: Batch, epochs: int, rate: float, seed: int) -> None:
    """Trains in place by cross entropy, on batches of 32 images moved by up to four pixels, half of them mirrored."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    n_steps = epochs * -(-len(train) // 32)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=n_steps)
    model.train().requires_grad_(True)
    for _ in range(epochs):
        for rows in torch.randperm(len(train), generator=generator).split(32):
            down, right = torch.randint(0, 9, (2,), generator=generator).tolist()
            images = F.pad(train.x[rows], (4, 4, 4, 4), mode="replicate")[:, :, down : down + 64, right : right + 64]
            images = images.flip(3) if torch.rand(1, generator=generator) < 0.5 else images
            optimiser.zero_grad()
            F.cross_entropy(model(images), train.target[rows]).backward()
            optimiser.step()
            schedule.step()
    model.eval().requires_grad_(False)


Ablation = Callable[[nn.Module], AbstractContextManager[None]]


def untouched(model: nn.Module) -> AbstractContextManager[None]:
    return nullcontext()


def ranked(model: nn.Module, positives: Batch, during: Ablation, leave: str | None) -> Plan:
    """Filters by their share of a layer's relevance for the positive class, sum |R| (Yeom et al. 2021)."""
    found = [site for site in sites.find(model, positives.x[:2]).sites if site.kind == "channel"]
    found = [site for site in found if site.layer != leave]
    how = {"generator": torch.Generator().manual_seed(0), "rule": "alpha1beta0", "reduce": "sum_abs"}
    with during(model):
        scores: Scores = criteria["lrp"](model, found, positives, **how)
    values = {site: of / of.sum() for site, of in scores.values.items()}
    return rank(replace(scores, values=values))


def without(subspaces: Subspaces, fill: str = "mean", number: int = 0) -> Ablation:
    return lambda model: ablated(model, subspaces, [number], fill=fill)


def stepwise(dense: nn.Module, task: Task, during: Ablation, leave: str | None, rate: float) -> nn.Module:
    """Filters in steps, ranked anew `during` an ablation, with epochs of cross entropy after each."""
    model, positives = copy.deepcopy(dense), task.train[task.positive]
    n_filters = sum(site.n_units for site in sites.find(dense, task.train.x[:2]).sites if site.kind == "channel")
    gone = [round(SHARE * n_filters * number / STEPS) for number in range(STEPS + 1)]
    for number in range(STEPS):
        plan = ranked(model, positives, during, leave)
        surgery.cut(model, plan.mask_of(gone[number + 1] - gone[number]))
        tuned(model, task.train, TUNED + LAST * (number == STEPS - 1), rate, number)
    return model


def at_once(dense: nn.Module, task: Task, images: Tensor, towards: Ablation) -> nn.Module:
    """As many filters at once, refitted towards the dense network inside an ablation."""
    model = copy.deepcopy(dense)
    plan = ranked(model, task.train[task.positive], untouched, None)
    table = surgery.cut(model, plan.mask_of(round(SHARE * plan.n_units)))
    unlabelled = Batch(images, torch.zeros(len(images), dtype=torch.long), tuple(map(str, range(len(images)))))
    mend = mender("refit", dense, unlabelled, partial(towards, dense))
    assert mend is not None
    mend(model, table)
    return model


@torch.no_grad()
def margins(model: nn.Module, x: Tensor) -> Tensor:
    """The logit of the positive class less that of the other."""
    logits = torch.cat([model(part) for part in x.split(256)])
    return logits[:, 1] - logits[:, 0]


def mean_of(dense: nn.Module, site: Site, x: Tensor) -> Tensor:
    return hooks.means(dense, [site], x.split(256))[site].mean(1)


def disentangled(dense: nn.Module, task: Task, seed: int) -> Subspaces:
    """DRSA's subspaces of the positive class."""
    generator = torch.Generator().manual_seed(seed)
    site = features(dense, LAYER, task.train.x[:2])
    a, c = vectors(dense, task.train[task.positive], site, positions=20, generator=generator, rule="alpha1beta0")
    found = drsa(a, c, N_SUBSPACES, generator=generator)
    mean = mean_of(dense, site, task.train.x)
    return Subspaces(LAYER, 1, found.basis, found.basis, N_SUBSPACES, site.n_units // N_SUBSPACES, mean)


def maps(dense: nn.Module, subspaces: Subspaces, x: Tensor) -> Tensor:
    """(B, K, H, W) where each subspace is relevant for the positive class, as large as the images."""
    layer = features(dense, subspaces.layer, x[:2])
    where = relevance_maps(dense, x, torch.ones(len(x), dtype=torch.long), layer, subspaces)[:, 1:]
    return F.interpolate(where, x.shape[2:], mode="bilinear", align_corners=False)


def with_mark(task: Task) -> Tensor:
    """Which images a person looks at, who was shown the mark: the first of the positive class that have it."""
    has = (task.train.x != task.plain).flatten(1).any(1)
    return (has & task.positive).nonzero()[:LOOKED_AT, 0]


def box(shape: Sequence[int]) -> Tensor:
    """(H, W) bool where a person draws a box around the mark, a pixel wider than it on each side."""
    there = MARK.alpha(*shape) > 0
    rows, columns = there.any(1).nonzero()[:, 0], there.any(0).nonzero()[:, 0]
    found = torch.zeros(*shape, dtype=torch.bool)
    found[max(rows[0] - 1, 0) : rows[-1] + 2, max(columns[0] - 1, 0) : columns[-1] + 2] = True
    return found


def looked_at(dense: nn.Module, task: Task, subspaces: Subspaces) -> int:
    """The subspace that lies most on the mark, which a person who looks at twenty images would name."""
    some = with_mark(task)
    relevant = maps(dense, subspaces, task.marked[some]).clamp(min=0)
    on_mark = (relevant * (MARK.alpha(*task.marked.shape[2:]) > 0)).sum((2, 3)) / relevant.sum((2, 3))
    return int(on_mark.mean(0).argmax())


def ways(dense: nn.Module, task: Task, seed: int) -> Iterator[tuple[str, Callable[[], nn.Module], Ablation]]:
    """(name, how the network is made, what it is in when it is tested)."""
    subspaces = disentangled(dense, task, seed)
    number = looked_at(dense, task, subspaces)
    x, others = task.train.x[task.positive], task.train.x[~task.positive]
    there = highest(maps(dense, subspaces, x)[:, number], IMPUTED)
    some, marked = task.train.x[with_mark(task)], box(x.shape[2:])
    pairs = {
        "boxes": (some, impute(some, marked.expand(len(some), -1, -1))),
        "DRSA": (x, impute(x, there)),
        "stamped": (task.marked, task.plain),
    }
    pasted = {
        "boxes": torch.where(marked, some[torch.arange(len(others)) % len(some)], others),
        "DRSA": torch.where(there[:, None], x, others[: len(x)]),
    }
    found = {}
    for layer in (LAYER, DEEPER):
        site = features(dense, layer, x[:2])
        mean = mean_of(dense, site, task.train.x)
        for name, pair in pairs.items():
            found[name, layer] = replace(contrast(dense, *pair, site, N_DIMENSIONS), mean=mean)
    concept = without(subspaces, "zero", number)
    images = {name: torch.cat([task.train.x, pairs[name][1], of]) for name, of in pasted.items()}
    images["as they are"] = task.train.x
    ours = found["boxes", DEEPER]

    def refitted(towards: Ablation, which: str = "boxes") -> Callable[[], nn.Module]:
        return partial(at_once, dense, task, images[which], towards)

    def trained(during: Ablation, leave: str | None, rate: float = RATE) -> Callable[[], nn.Module]:
        return partial(stepwise, dense, task, during, leave, rate)

    yield "dense", lambda: dense, untouched
    yield "dense, DRSA's subspace zero", lambda: dense, concept
    yield "dense, ours out", lambda: dense, without(ours)
    yield "ours", refitted(without(ours)), untouched
    yield "ours, earlier layer", refitted(without(found["boxes", LAYER])), untouched
    yield "ours, DRSA's place", refitted(without(found["DRSA", DEEPER]), "DRSA"), untouched
    yield "ours, stamped pairs", refitted(without(found["stamped", DEEPER])), untouched
    yield "ours, images as they are", refitted(without(ours), "as they are"), untouched
    yield "ours, no subspace", refitted(untouched), untouched
    yield "plain", trained(untouched, None), untouched
    yield "CNP", trained(concept, FILTERS[LAYER]), untouched
    yield "CNP, our subspace", trained(without(ours), FILTERS[DEEPER]), untouched
    yield "plain, gentle", trained(untouched, None, GENTLE), untouched
    yield "CNP, gentle", trained(concept, FILTERS[LAYER], GENTLE), untouched


def answered(pair: str, seed: int, data: datasets.Data, folder: Path) -> dict[str, dict[str, Any]]:
    """{way: what it answers}, from the folder where it is there."""
    place = folder / f"{pair}-{seed}.json"
    settings = json.loads(json.dumps({**SETTINGS, "data": data.sha256}))
    kept = json.loads(place.read_text()) if place.exists() else {"settings": settings, "ways": {}}
    if kept["settings"] != settings:
        raise SystemExit(f"{place} was made with other settings or images: give another --out")
    found: dict[str, dict[str, Any]] = kept["ways"]
    if len(found) == N_WAYS:
        return found
    task = planted(data, pair, seed)
    torch.manual_seed(seed)
    dense = networks.vgg(2)
    tuned(dense, task.train, EPOCHS, RATE, seed)
    n_dense = cost.n_parameters(dense)
    for name, make, tested in ways(dense, task, seed):
        if name in found:
            continue
        model = make()
        with tested(model):
            told = [margins(model, x) for x in (task.test.x, task.test_marked, task.train.x)]
        found[name] = {
            "plain": told[0].tolist(),
            "marked": told[1].tolist(),
            "positive": task.test.target.tolist(),
            "image_id": list(task.test.image_id),
            "middle": float(told[2].median()),
            "parameters": cost.n_parameters(model) / n_dense,
        }
        files.write(place, json.dumps(kept).encode())
        print(pair, seed, name, {key: round(of, 2) for key, of in told_of(found[name]).items()}, flush=True)
    return found


def told_of(found: Mapping[str, Any], moved: bool = False) -> dict[str, float]:
    """Figures of a network, as it is or with the bias `moved`, so that half of the training images are called positive.

    Of the dense network too: half of the training images are positive, so that needs no label of one image.
    """
    bias = found["middle"] if moved else 0.0
    plain, marked = (np.array(found[key]) - bias for key in ("plain", "marked"))
    positive = np.array(found["positive"], dtype=bool)
    right = [(-plain > 0)[~positive], (-marked > 0)[~positive], (plain > 0)[positive], (marked > 0)[positive]]
    told = dict(zip(GROUPS, (float(of.mean()) for of in right), strict=True))
    odd = np.concatenate([marked[~positive], plain[positive]])
    truth = np.repeat([0, 1], [(~positive).sum(), positive.sum()])
    return {
        **told,
        "all": sum(told.values()) / len(told),
        "worst": min(told.values()),
        "shift": float((marked - plain).mean() / plain.std()),
        "AUC": float(roc_auc_score(truth, odd)),
        "parameters": found["parameters"],
    }


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean over seeds and its 95 % t interval; no bounds of one seed."""
    x = np.array(values)
    if len(x) < 2:
        return float(x.mean()), math.nan, math.nan
    half = stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x))
    return float(x.mean()), float(x.mean() - half), float(x.mean() + half)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair", choices=[*PAIRS])
    parser.add_argument("--data", default="../shared/data/tiny-imagenet-20")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--out", type=Path, default=Path("runs/watermark"))
    chosen = parser.parse_args()
    data = datasets.load(chosen.data)
    chosen.out.mkdir(parents=True, exist_ok=True)
    seeds = range(chosen.first, chosen.first + chosen.seeds)
    found = [answered(chosen.pair, seed, data, chosen.out) for seed in seeds]
    print(f"{chosen.pair}: {' and '.join(PAIRS[chosen.pair])}, {len(seeds)} seeds, half of the filters gone")
    summary: dict[str, float] = {"seeds": len(seeds)}
    for moved in (False, True):
        told = {name: [told_of(of[name], moved) for of in found] for name in found[0]}
        keys = [*told["dense"][0]]
        print("with the bias moved" if moved else "as they are")
        print(f"{'':30s}" + "".join(f"{key:>11s}" for key in keys))
        for name, of in told.items():
            means = [interval([figures[key] for figures in of]) for key in keys]
            print(f"{name:30s}" + "".join(f"{mean:11.3f}" for mean, _, _ in means))
            print(f"{'':30s}" + "".join(f"{f'{low:.2f}-{high:.2f}':>11s}" for _, low, high in means))
        for other in told:
            for key in ("worst", "c0w1", "all", "AUC"):
                both = zip(told["ours"], told[other], strict=True)
                mean, low, high = interval([one[key] - two[key] for one, two in both])
                if other != "ours":
                    print(f"ours less {other}, {key}: {mean:+.3f} [{low:+.3f}, {high:+.3f}]")
                    summary[f"{other}, {key}{', moved' if moved else ''}"] = round(mean, 4)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
