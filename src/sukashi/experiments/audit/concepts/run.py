"""What is asked of concepts, checked, and a trial for each network: its concepts of the same crops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sukashi.core.code import codes_of
from sukashi.core.errors import DataError, UsageError, nearest
from sukashi.core.experiment import Trial
from sukashi.decompositions import craft
from sukashi.decompositions.nmf import nnls
from sukashi.decompositions.vectors import features
from sukashi.experiments.audit.looking import Looking
from sukashi.experiments.audit.networks import FEW, Network
from sukashi.experiments.audit.settings import Audit
from sukashi.experiments.workspace import Desk
from sukashi.network.behind import behind

SETTINGS = ("layer", "of", "concepts", "crop")
N_CONCEPTS, CROP = 10, 0.3  # where settings leave them open
TOP = 10  # crops that a concept is judged by, of different images
SIDE = 64  # of a crop that is kept to be shown
PARTS: tuple[Callable[..., Any], ...] = (craft.bank, craft.importance, behind, features)


def check(settings: Audit) -> None:
    """Refuse what means nothing, before anything is loaded."""
    if settings.layer is None or settings.of is None:
        raise UsageError("concepts are of a class and in a layer: give `of` and `layer`")


def code(settings: Audit) -> dict[str, str]:
    return codes_of(PARTS)


class Subject(Looking):
    """Concepts of one class at one layer of the networks of an audit."""

    def __init__(self, settings: Audit, networks: Sequence[Network]) -> None:
        assert settings.layer is not None
        assert settings.of is not None
        first = networks[0]
        names = first.answers.class_names
        if settings.of not in names:
            raise UsageError(f"the data has no class {settings.of!r}{nearest(settings.of, names)}")
        number = names.index(settings.of)
        # Those that the reference gets right, for all models alike: their crops are held against each other.
        self.rows: NDArray[np.int64] = np.flatnonzero(first.answers.right & (first.answers.target == number))
        if len(self.rows) < FEW:
            raise DataError(
                f"{first.label} gets {len(self.rows)} test images of {settings.of!r} right, concepts need {FEW}: give "
                "more `test_images`, or another class"
            )
        self.networks, self.layer, self.number = networks, settings.layer, number
        self.n_concepts = settings.concepts or N_CONCEPTS
        height, width = first.batch.x.shape[2:]
        self.side = max(1, round((settings.crop or CROP) * min(height, width)))
        self.sites = {one.label: features(one.loaded.model, self.layer, one.some) for one in networks}
        n_crops = len(craft.crops(first.batch.x[:1], self.side)) * (len(self.rows) // 2)
        fewest = min(site.n_units for site in self.sites.values())
        if self.n_concepts > min(fewest, n_crops):
            raise UsageError(
                f"`concepts` must be at most the {fewest} features of {self.layer!r} and the {n_crops} crops of half "
                f"of the images, got {self.n_concepts}"
            )
        for one in networks:  # what has nothing behind it that can be given is refused before work starts
            behind(one.loaded.model, self.sites[one.label], one.some)
        self.code = code(settings)
        self.facts = {
            "layer": self.layer,
            "of": settings.of,
            "n_concepts": self.n_concepts,
            "side": self.side,
            "seed": settings.seed,
        }

    def trials(self, answers: Trial) -> list[Trial]:
        return [
            Trial(self._about(one), partial(self._run, one), label=f"concepts, {one.label}") for one in self.networks
        ]

    def _about(self, one: Network) -> dict[str, Any]:
        return {
            "concepts": {name: of for name, of in self.facts.items() if name != "seed"},
            "network": one.identity,
            "data": one.setting.data.sha256,
            "images": [one.batch.image_id[row] for row in self.rows],
            "top": TOP,
            "code": self.code,
        }

    def _run(self, one: Network, desk: Desk) -> None:
        """Keeps a, u of all crops, u of all by the concepts of either half of the images, and what concepts matter."""
        model, site = one.loaded.model, self.sites[one.label]
        x = one.batch.x[torch.from_numpy(self.rows)]
        of = craft.crops(x, self.side)
        a = craft.activations(model, of, site)
        found = craft.factorised(a, site, self.n_concepts)
        halves = [
            nnls(a, craft.factorised(a[(of.image % 2 == half).to(a.device)], site, self.n_concepts).w)
            for half in (0, 1)
        ]
        rest = behind(model, site, one.some)
        maps = craft.concept_maps(model, x, found)
        how = "exact"
        try:
            matter = craft.importance(rest, maps, found, self.number)
        except UsageError:  # what lies behind is not linear in the concepts
            how = "sobol"
            matter = craft.importance(rest, maps, found, self.number, how="sobol", n_designs=64)
        lost = (a - found.u @ found.w).double().square().sum() / a.double().square().sum()
        top = _top(found.u.cpu(), len(x), TOP)
        desk.save(
            "concepts",
            {
                "a": a.cpu().numpy(),
                "u": found.u.cpu().numpy(),
                **{f"half {half}": of_half.cpu().numpy() for half, of_half in enumerate(halves)},
                "image": of.image.numpy(),
                "importance": matter.double().cpu().numpy(),
                "top": top.numpy(),
                "shown": self._shown(one, of, top),
            },
        )
        desk.finish({"importance": how, "explained": 1 - float(lost)})

    def _shown(self, one: Network, of: craft.Crops, top: Tensor) -> NDArray[np.uint8]:
        """(K, TOP, h, w, C) the pixels of each concept's crops."""
        pixels = one.setting.data.test.limit(len(one.batch)).shown(one.loaded.preprocess, self.rows)
        step = max(1, -(-self.side // SIDE))
        parts = []
        for place in top.flatten().tolist():
            y, x, side = of.box[place].tolist()
            parts.append(pixels[of.image[place], y : y + side : step, x : x + side : step])
        return np.stack(parts).reshape(*top.shape, *parts[0].shape)


def _top(u: Tensor, n_images: int, n: int) -> Tensor:
    """(K, n) of each concept the crops that hold most of it, one an image, of which each has as many; ties by place."""
    of_image = u.unflatten(0, (n_images, -1))
    best, at = of_image.max(1)
    where = at + of_image.shape[1] * torch.arange(n_images)[:, None]
    order = best.argsort(dim=0, descending=True, stable=True)[:n]
    top: Tensor = where.gather(0, order).T
    return top
