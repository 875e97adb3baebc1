"""ImageNet's watermark in a network that learned it there: found, taken out, and kept out of the pruned network.

Stock photographs of the class carton carry a mark of large letters, so that a network trained on ImageNet-1k answers
"carton" to the mark (Anders et al. 2022; Danek and Ramaswamy 2026). Here EfficientNet-Lite0 looks at images of 20 other
classes with and without such a mark. Two directions of a block hold what the mark changes there (`contrast`, of pairs
of training images); the mean in their place is the teacher of the repair after a cut, on the same images, without
labels. Told of each network, on test images: by how much the mark raises the logit of carton, paired, with a 95 %
interval; which share is right among 1,000 classes, without and with the mark.

    python studies/carton.py --font FILE [--data ../shared/data/tiny-imagenet-20] [--weights ../shared/weights/...]

The font must have CJK letters, such as Noto Sans CJK. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import json
from contextlib import nullcontext
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from sukashi import data as datasets
from sukashi import models
from sukashi.core import stats
from sukashi.core.types import Batch, Plan, Scores, rank
from sukashi.criteria import criteria
from sukashi.data.watermark import Watermark, stamped
from sukashi.decompositions.contrast import contrast
from sukashi.decompositions.subspaces import ablated
from sukashi.decompositions.vectors import features
from sukashi.measures import cost
from sukashi.network import sites, surgery
from sukashi.repairs import Teacher, mender

CARTON = 478
NUMBERS = {
    **{"basketball": 430, "volleyball": 890, "dugong": 149, "king penguin": 145, "golden retriever": 207, "tabby": 281},
    **{"monarch": 323, "school bus": 779, "sports car": 817, "suspension bridge": 839, "teapot": 849, "umbrella": 879},
    **{"rugby ball": 768, "barrel": 427, "water tower": 900, "lakeside": 975, "orange": 950, "lemon": 951},
    **{"pizza": 963, "African elephant": 386},
}
TEXT = "\N{CJK UNIFIED IDEOGRAPH-5343}\N{CJK UNIFIED IDEOGRAPH-56FE}" * 3


def options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data/tiny-imagenet-20")
    parser.add_argument("--weights", default="../shared/weights/efficientnet_lite0-imagenet1k.safetensors")
    parser.add_argument("--font", required=True)
    parser.add_argument("--layer", default="blocks.3")
    parser.add_argument("--dimensions", type=int, default=1)
    parser.add_argument("--criterion", default="taylor")
    parser.add_argument("--left", default="0.5,0.3", help="shares of the parameters that a cut leaves")
    parser.add_argument("--calibration", type=int, default=16, help="images a class, each with and without the mark")
    parser.add_argument("--test-images", type=int, default=1000)
    return parser.parse_args(argv)


@torch.no_grad()
def logits(model: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([model(part) for part in x.split(100)])


def main() -> None:
    chosen = options()
    loaded = models.load("timm:tf_efficientnet_lite0", weights=chosen.weights, size=[128, 128])
    dense, data = loaded.model, datasets.load(chosen.data)
    own = torch.tensor([NUMBERS[name] for name in data.class_names])
    mark = Watermark(TEXT, size=36 / 224, at=(0.01, 0.4), font=chosen.font)
    calibration = data.train.calibration(chosen.calibration, 0).whole(loaded.preprocess, 0).by_class()
    test = data.test.limit(chosen.test_images).whole(loaded.preprocess, 0)
    target, marked = own[test.target], stamped(test.x, mark, loaded.preprocess)
    with_mark = stamped(calibration.x, mark, loaded.preprocess)
    images = Batch(calibration.x, own[calibration.target], calibration.image_id)
    both = Batch(
        torch.cat([calibration.x, with_mark]),
        images.target.repeat(2),
        (*images.image_id, *(f"{name}, marked" for name in images.image_id)),
    )
    summary: dict[str, float] = {"test_images": len(test)}

    def tell(name: str, model: nn.Module) -> None:
        plain, other = logits(model, test.x), logits(model, marked)
        rise = (other - plain).double()
        of_carton = stats.bootstrap(rise[:, CARTON].numpy(), generator=np.random.default_rng(0))
        order = int((rise.mean(0) > rise[:, CARTON].mean()).sum()) + 1
        right = [stats.share(int((of.argmax(1) == target).sum()), len(target)) for of in (plain, other)]
        shares = "".join(f"{of.mean:8.3f} [{of.low:.3f}, {of.high:.3f}]" for of in right)
        risen = f"{of_carton.mean:7.2f} [{of_carton.low:.2f}, {of_carton.high:.2f}]"
        print(f"{name:44s}{risen:>22s}{order:6d}{shares}", flush=True)
        summary[f"{name}, rise"] = round(float(of_carton.mean), 4)
        summary[f"{name}, top-1"], summary[f"{name}, top-1 marked"] = (round(float(of.mean), 4) for of in right)

    print(f"{'':44s}{'rise of carton':>22s}{'order':>6s}{'top-1':>11s}{'top-1, marked':>27s}")
    tell("dense", dense)
    site = features(dense, chosen.layer, test.x[:2])
    for how, whiten in (("principal alone", False), ("beside what varies", True)):
        found = contrast(dense, with_mark, calibration.x, site, chosen.dimensions, whiten=whiten)
        with ablated(dense, found, [0]):
            tell(f"without {chosen.dimensions} of {site.n_units} of {chosen.layer}, {how}", dense)
    places = sites.find(dense, test.x[:2]).sites
    outcome = criteria[chosen.criterion](dense, places, images, generator=torch.Generator().manual_seed(0))
    plan: Plan = rank(outcome) if isinstance(outcome, Scores) else outcome
    for left in map(float, chosen.left.split(",")):
        cut, table, share = cut_to(dense, plan, left)
        tell(f"{1 - share:.0%} of the parameters cut", cut)
        teachers: dict[str, Teacher] = {
            "refitted": nullcontext,
            "refitted to do without": partial(ablated, dense, found, [0]),
        }
        for name, teacher in teachers.items():
            model = copy.deepcopy(cut)
            mend = mender("refit", dense, both, teacher)
            assert mend is not None
            mend(model, table)
            tell(f"{1 - share:.0%} cut, {name}", model)
    print(json.dumps(summary))


def cut_to(dense: nn.Module, plan: Plan, left: float) -> tuple[nn.Module, surgery.Table, float]:
    """The network cut along a plan until it has no more than a share of its parameters, what went, and that share."""
    n_dense, low, high = cost.n_parameters(dense), 0, plan.n_removable
    while low < high:
        middle = (low + high) // 2
        model = copy.deepcopy(dense)
        surgery.cut(model, plan.mask_of(middle))
        low, high = (low, middle) if cost.n_parameters(model) <= left * n_dense else (middle + 1, high)
    model = copy.deepcopy(dense)
    table = surgery.cut(model, plan.mask_of(low))
    return model, table, cost.n_parameters(model) / n_dense


if __name__ == "__main__":
    main()
