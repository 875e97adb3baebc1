"""What is asked of units, checked, and a trial for each network: its units at each layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sukashi.attributions.patching import patching
from sukashi.core import progress
from sukashi.core.code import code_of
from sukashi.core.errors import ModelError, UsageError
from sukashi.core.experiment import Trial
from sukashi.core.types import Batch, Site
from sukashi.decompositions.vectors import features
from sukashi.experiments.audit.networks import Network
from sukashi.experiments.audit.settings import Audit
from sukashi.experiments.workspace import Desk
from sukashi.measures import neurons
from sukashi.network import hooks
from sukashi.network.blocks import inner
from sukashi.network.layers import AttentionCore
from sukashi.network.sites import place

SETTINGS = ("layers", "top")
TOP = 50  # units of each class, and no more than a quarter of the layer's, where `top` leaves it open
CHOOSING = 32  # training images of each class, by which means and the units that matter most are found
PARTS: tuple[Callable[..., Any], ...] = (
    *(patching, features, inner),
    *(
        neurons.selectivity,
        neurons.higher,
        neurons.class_variance,
        neurons.label_entropy,
        neurons.ablation_impact,
        neurons.responses,
    ),
)


def check(settings: Audit) -> None:
    """Refuse what means nothing, before anything is loaded."""
    if settings.layers is not None and (not settings.layers or len({*settings.layers}) != len(settings.layers)):
        raise UsageError(f"layers must be different names, at least one, got {settings.layers}")


def code(settings: Audit) -> dict[str, str]:
    return {part.__name__: code_of(part) for part in PARTS}


class Subject:
    """Units of some layers of the networks of an audit, those that matter most for each class."""

    def __init__(self, settings: Audit, networks: Sequence[Network]) -> None:
        first = networks[0]
        self.layers = settings.layers or inner(first.loaded.model, _some(first))
        self.networks, self.seed, self.top = networks, settings.seed, settings.top
        self.n_classes = len(first.answers.class_names)
        self.sites = {
            one.label: [units(one.loaded.model, layer, _some(one)) for layer in self.layers] for one in networks
        }
        for label, of in self.sites.items():
            for layer, site in zip(self.layers, of, strict=True):
                if settings.top is not None and settings.top > site.n_units:
                    raise UsageError(
                        f"`top` must be at most the {site.n_units} units of {layer!r} in {label}, got {settings.top}"
                    )
        first.setting.data.train.calibration(CHOOSING, settings.seed)  # refused where a class has too few
        self.code = code(settings)
        self.identity: dict[str, Any] = {"layers": self.layers}
        self.notes: list[str] = []
        self.areas: dict[str, Any] = {}
        self.facts: dict[str, Any] = {"layers": self.layers, "top": self.tops(), "choosing": CHOOSING}

    def tops(self) -> list[int]:
        """How many units of each layer are taken for a class, in all networks alike."""
        fewest = (min(of[i].n_units for of in self.sites.values()) for i in range(len(self.layers)))
        return [self.top or max(1, min(TOP, n // 4)) for n in fewest]

    def trials(self, answers: Trial) -> list[Trial]:
        return [
            Trial(self._about(one), partial(self._run, one), label=f"neurons, {one.label}") for one in self.networks
        ]

    def _about(self, one: Network) -> dict[str, Any]:
        return {
            "neurons": self.facts,
            "seed": self.seed,
            "network": one.identity,
            "data": one.setting.data.sha256,
            "images": list(one.batch.image_id),
            "code": self.code,
        }

    def _run(self, one: Network, desk: Desk) -> None:
        """Keeps of each layer what its units answer to, which matter most for each class, and what hangs on these."""
        model, sites, device = one.loaded.model, self.sites[one.label], one.setting.device
        data = one.setting.data
        chosen = data.train.calibration(CHOOSING, self.seed).whole(one.loaded.preprocess, one.setting.source.workers)
        chosen, batch = chosen.by_class().to(device), one.batch.to(device)
        before = neurons.n_before(model, _some(one))
        kept: dict[str, Any] = {}
        with progress.task("layers", len(sites)) as shown:
            means = hooks.means(model, sites, (part.x for part in chosen.in_passes()))
            for i, (site, n) in enumerate(zip(sites, self.tops(), strict=True)):
                found = looked_at(model, site, means[site], chosen, batch, before, self.n_classes, n)
                kept |= {f"{i} {name}": of.cpu().numpy() for name, of in found.items()}
                shown.advance(note=self.layers[i])
        desk.save("neurons", kept)
        desk.finish({"units": [site.n_units for site in sites], "n_before": before})


def looked_at(
    model: nn.Module,
    site: Site,
    mean: Tensor,
    chosen: Batch,
    batch: Batch,
    before: int | None,
    n_classes: int,
    n: int,
) -> dict[str, Tensor]:
    """What the units of a site answer to in a batch: `selectivity`, `separation` and `variance` (U, K), `entropy`
    (U,); the n that matter most for each class by the `chosen` training images, `top` (K, n), and what hangs on them,
    `impact` (B,). Without a unit means with it at its `mean` (U, R).
    """
    pooled, largest = neurons.responses(model, [site], batch, before)[site]
    of_chosen = neurons.responses(model, [site], chosen, before)[site][0]
    matter = patching(model, chosen.x, chosen.target, [site], {site: mean}, chosen.objective)[site]
    top = most(matter, chosen, n_classes, n)
    without = torch.zeros(n_classes, site.n_units, dtype=torch.bool, device=top.device).scatter_(1, top, True)
    area = neurons.selectivity(pooled, batch.target, n_classes)
    return {
        "selectivity": area,
        "separation": area.where(neurons.higher(of_chosen, chosen.target, n_classes), 1 - area),
        "variance": neurons.class_variance(largest, batch.target, n_classes),
        "entropy": neurons.label_entropy(largest, batch.target, n_classes),
        "impact": neurons.ablation_impact(model, batch, site, without, mean),
        "top": top,
    }


def most(matter: Tensor, data: Batch, n_classes: int, n: int) -> Tensor:
    """(K, n) for each class the units whose loss would take most from the logit, (B, U), on average over its images; of
    equal ones the first."""
    mean = torch.stack([matter[data.target == k].double().mean(0) for k in range(n_classes)])
    order: Tensor = mean.argsort(dim=1, descending=True, stable=True)
    return order[:, :n]


def units(model: nn.Module, layer: str, x: Tensor) -> Site:
    """The features that a layer writes, or the heads of attention."""
    module = hooks.layer(model, layer)
    if not isinstance(module, AttentionCore):
        return features(model, layer, x)
    alive = [head for head, width in enumerate(module.widths) if width]
    if len({module.widths[head] for head in alive}) > 1:
        raise ModelError(f"the heads of {layer!r} are of several widths: they are no units of one kind")
    width = module.widths[alive[0]]
    return place(model, layer, x, units=[range(width * i, width * (i + 1)) for i in range(len(alive))])


def _some(one: Network) -> Tensor:
    """Two images, where the network is."""
    return one.batch.x[:2].to(one.setting.device)
