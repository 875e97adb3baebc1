"""Levels: one seed's networks, each pruned from its parent and trained, and saved with what it gets right."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from sukashi import models
from sukashi.core import progress
from sukashi.core.types import Batch, Mask
from sukashi.criteria import plans, pruning
from sukashi.data import Data
from sukashi.experiments.bench import Bench, Source, plan_for
from sukashi.experiments.schedule.settings import Course
from sukashi.experiments.train.run import history_of, log_speed
from sukashi.experiments.workspace import Desk
from sukashi.measures import accuracy, cost
from sukashi.models import Loaded
from sukashi.network import sites, sparsity, surgery
from sukashi.network.sites import Found
from sukashi.training.loop import fit
from sukashi.training.settings import Training


@dataclass(frozen=True)
class Level:
    """Which network it is: its contender and ratio ("dense" and 0 for the start of all), and how it is trained.

    `training` is None where nothing is trained; `until` stops after so many of its epochs.
    """

    contender: str
    criterion: str | None
    ratio: float
    training: Training | None
    until: int | None = None


class Seed:
    """What all levels of a seed share: the network they start from, the images, and those networks of it that others
    start from.
    """

    def __init__(self, source: Source, images: Data, course: Course, seed: int, memory: int) -> None:
        self.source, self.images, self.course, self.seed, self.memory = source, images, course, seed, memory
        self._latest: dict[str, Loaded] = {}

    @cached_property
    def setting(self) -> Bench:
        loaded, images = self.source.build(self.images, self.seed)
        device = next(loaded.model.parameters()).device
        setting = Bench(self.source, loaded, images, Found((), {}), device)
        models.probe(loaded, setting.example)
        if self.course.scope is None:
            return replace(setting, found=setting.sites_of(loaded.model, self.course.exclude))
        return replace(setting, found=Found(sites.weights(loaded.model, self.course.exclude), {}))

    @property
    def start(self) -> Loaded:
        """The dense network before any training of ours."""
        return self.setting.loaded

    @cached_property
    def n_units(self) -> int:
        return sum(site.n_units for site in self.setting.found.sites)

    @cached_property
    def test(self) -> Batch:
        return self.setting.test()

    def run(self, level: Level, make: Callable[[Desk], Loaded], desk: Desk) -> Mapping[str, Any]:
        """The trial of a level: the network that `make` gives, trained where there are settings for it, and saved."""
        found = make(desk)
        network, figures = found, dict[str, Any]()
        if level.training is not None:
            network, figures = self._fit(found, level, desk)
        self._latest = {key: kept for key, kept in self._latest.items() if key in self._lasting}
        self._latest[desk.trial.key] = network
        if progress.first():
            self._save(network, found.mask, level, figures, desk)
        return {}

    def network(self, key: str, desk: Desk) -> Loaded:
        """The network of a trial that this one needs: as this process has just made it, or as it was saved.

        Of the processes of one training only the first saves; the others must not read what it may still be writing.
        """
        if key not in self._latest:
            loaded = models.load(self.start.spec, weights=desk.needed(key).folder)
            loaded.model.to(self.setting.device)
            self._latest[key] = loaded
        return self._latest[key]

    def keep(self, *keys: str) -> None:
        """Trials whose networks later ones will ask for."""
        self._lasting = frozenset(keys)

    _lasting: frozenset[str] = frozenset()

    def pruned(self, criterion: str, network: Loaded, ratio: float) -> Loaded:
        """The network without that fraction of the dense one's units or weights, mended where that is asked for."""
        course, setting = self.course, replace(self.setting, loaded=network)
        options = course.options.get(criterion, {})
        images = setting.calibration(self.seed)
        if course.scope is not None:
            mask = pruning.weight_mask(
                *(network, setting.found.sites, images, criterion, ratio, course.scope),
                generator=torch.Generator().manual_seed(self.seed),
                options=options,
            )
            return pruning.repaired(pruning.sparse(network, mask), network, images, course.repair)
        now = setting.sites_of(network.model, course.exclude)
        n_now = sum(site.n_units for site in now.sites)
        plan = plan_for(replace(setting, found=now), criterion, self.seed, options=options)
        further = max(0.0, 1 - (1 - ratio) * self.n_units / n_now)
        cut = pruning.cut(network, plans.round_mask(plan, further, course.round_to))
        return pruning.repaired(cut, network, images, course.repair)

    def rewound(self, network: Loaded, early: Loaded) -> Loaded:
        """The network with the weights of an early one, which had all its units."""
        model = copy.deepcopy(early.model)
        for table in network.cuts[len(self.start.cuts) :]:
            surgery.replay(model, table)
        if network.mask is not None:
            sparsity.enforce(model, network.mask)
        return replace(network, model=model, weights_sha256=models.digest(model))

    def _fit(self, network: Loaded, level: Level, desk: Desk) -> tuple[Loaded, dict[str, Any]]:
        assert level.training is not None
        fitted = fit(
            network,
            self.setting.data,
            level.training.model_copy(update={"seed": level.training.seed + self.seed}),
            out=desk.scratch,
            device=self.setting.device,
            workers=self.source.workers,
            memory=self.memory,
            until=level.until,
        )
        if progress.first():
            log_speed(desk, fitted)
        return fitted.loaded, {"history": history_of(fitted), "epoch": fitted.epoch, "notes": list(fitted.notes)}

    def _save(self, network: Loaded, mask: Mask | None, level: Level, figures: dict[str, Any], desk: Desk) -> None:
        """`mask` is the one the level was trained under, enforced or not."""
        correct, _ = accuracy.evaluate(network.model, self.test)
        desk.save("correct", {"correct": np.packbits(correct.astype(bool)), "n": np.array(len(correct))})
        provenance = {
            "contender": level.contender,
            "ratio_asked": level.ratio,
            "seed": self.seed,
            "trained": level.training is not None,
            **{name: value for name, value in desk.trial.about.items() if name not in ("contender", "seed")},
        }
        named = replace(network, class_names=self.setting.data.names_of_outputs(network.class_names))
        for name, content in models.contents(named, provenance).items():
            desk.save(name, content)
        zeros = 0.0 if mask is None else sparsity.zeros(network.model, mask)["sparsity"]
        desk.finish(
            {
                **figures,
                "accuracy": float(correct.mean()),
                "n_images": len(correct),
                "parameters": cost.n_parameters(network.model),
                "removed": self._removed(network, mask),
                "zeros_in_masked_layers": zeros,
            }
        )

    def _removed(self, network: Loaded, mask: Mask | None) -> float:
        """The fraction of the dense network's units, or of the weights in scope, that was removed."""
        if self.course.scope is not None:
            return 0.0 if mask is None else mask.n_removed / mask.n_units
        now = sum(site.n_units for site in self.setting.sites_of(network.model, self.course.exclude).sites)
        return 1 - now / self.n_units
