"""What is asked of circuits, checked, and a trial for each network, penalty and seed: those of all classes at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sukashi.core.code import codes_of
from sukashi.core.errors import DataError, UsageError
from sukashi.core.experiment import Trial
from sukashi.core.types import Batch
from sukashi.decompositions import circuits
from sukashi.decompositions.nodes import Nodes, nodes_of
from sukashi.experiments.audit.looking import Looking
from sukashi.experiments.audit.networks import Network, per_class
from sukashi.experiments.audit.settings import Audit
from sukashi.experiments.workspace import Desk
from sukashi.network import hooks

SETTINGS = ("penalties", "epochs", "seeds")
PENALTIES, EPOCHS = [0.75, 1.5, 3.0, 6.0], 20
# Training images of each class at most by which circuits are found, and others that choose among penalties.
FOUND_BY, CHOSEN_BY = 64, 32
TESTED = 5  # test images of each class at least
DRAWS = 10  # of random masks beside a circuit
PARTS: tuple[Callable[..., Any], ...] = (
    *(circuits.find_circuits, circuits.accuracy, circuits.edges, circuits.random_masks, nodes_of),
)


def check(settings: Audit) -> None:
    """Refuse what means nothing, before anything is loaded."""
    given = settings.penalties
    if given is not None and (not given or len({*given}) != len(given) or not all(0 <= p < 1e6 for p in given)):
        raise UsageError(f"penalties must be different numbers, 0 or more and at least one, got {given}")


def code(settings: Audit) -> dict[str, str]:
    return codes_of(PARTS)


class Subject(Looking):
    """Circuits of the classes in the networks of an audit."""

    def __init__(self, settings: Audit, networks: Sequence[Network]) -> None:
        first = networks[0]
        self.networks, self.seed = networks, settings.seed
        self.penalties = settings.penalties or PENALTIES
        self.epochs, self.seeds = settings.epochs or EPOCHS, settings.seeds
        self.n_classes = len(first.answers.class_names)
        if self.n_classes < 2:
            raise UsageError("a circuit tells a class from the others: the data have one class alone")
        self.nodes: dict[str, Nodes] = {one.label: nodes_of(one.loaded.model, one.some) for one in networks}
        for one in networks:  # what can't be recorded is refused before work starts
            hooks.means(one.loaded.model, self.nodes[one.label].places, [one.some])
        counts = first.answers.tested_of_class
        fewest = min(counts, key=lambda name: counts[name])
        if counts[fewest] < TESTED:
            raise DataError(
                f"{fewest} has {counts[fewest]} test images, circuits need {TESTED} of each class: give more "
                "`test_images`, or the other classes by `only`"
            )
        n = per_class(first, FOUND_BY + CHOSEN_BY, least=24)
        self.found_by, self.chosen_by = n - n // 3, n // 3
        self.code = code(settings)
        self.identity = {"penalties": self.penalties, "epochs": self.epochs}
        self.facts = {
            "penalties": self.penalties,
            "epochs": self.epochs,
            "seeds": self.seeds,
            "found_by": self.found_by,
            "chosen_by": self.chosen_by,
            "tested": counts[fewest],
            "draws": DRAWS,
        }

    def trials(self, answers: Trial) -> list[Trial]:
        found = []
        for seed in range(self.seeds):
            for penalty in self.penalties:
                first = self._trial(self.networks[0], penalty, seed, None)
                found += [first, *(self._trial(one, penalty, seed, first) for one in self.networks[1:])]
        return found

    def _trial(self, one: Network, penalty: float, seed: int, first: Trial | None) -> Trial:
        """`first` is that of the reference, whose circuits are counted in this network too where nodes are the same."""
        reference = self.nodes[self.networks[0].label]
        same = first is not None and _sizes(self.nodes[one.label]) == _sizes(reference)
        needs = (first.key,) if first is not None and same else ()
        about = {
            "circuits": {
                **{name: of for name, of in self.facts.items() if name not in ("penalties", "seeds")},
                **{"penalty": penalty, "seed": seed, "chosen": self.seed, "beside": bool(needs)},
            },
            **one.about,
            "code": self.code,
        }
        label = f"circuits, {one.label}, penalty {penalty:g}"
        return Trial(about, partial(self._run, one, penalty, seed), needs=needs, label=label)

    def _run(self, one: Network, penalty: float, seed: int, desk: Desk) -> None:
        """Keeps the masks, how many nodes and edges they have, and which images each tells right."""
        model, nodes, device = one.loaded.model, self.nodes[one.label], one.setting.device
        found_by, chosen_by = self._training(one)
        classes = [*range(self.n_classes)]
        means = hooks.means(model, nodes.places, (part.x for part in found_by.in_passes()))
        masks = circuits.find_circuits(
            *(model, nodes, found_by, classes, means),
            penalty=penalty / nodes.n_nodes,
            epochs=self.epochs,
            seed=seed,
        ).cpu()
        batch = one.batch.to(device)

        def right(of: Tensor | None, data: Batch = batch) -> Tensor:
            return circuits.accuracy(model, nodes, data, classes, of, means)

        generator = torch.Generator().manual_seed(seed)
        drawn = [circuits.random_masks(nodes, masks, generator) for _ in range(DRAWS)]
        kept = {
            "masks": masks,
            "validation": right(masks, chosen_by).double().mean(1),
            "right": right(masks),
            "right whole": right(None),
            "right complement": right(~masks),
            "right random": torch.stack([right(of) for of in drawn]).double().mean(0),
            "edges": circuits.edges(model, nodes, masks),
            "edges whole": circuits.edges(model, nodes, torch.ones_like(masks)),
            "edges out": circuits.edges(model, nodes, masks, ends="out"),
            "edges random": torch.stack([circuits.edges(model, nodes, of) for of in drawn]).mean(0),
        }
        if desk.trial.needs:
            theirs = torch.from_numpy(desk.needed(desk.trial.needs[0]).arrays("circuits")["masks"])
            kept["edges reference"] = circuits.edges(model, nodes, theirs)
        desk.save("circuits", {name: of.numpy() for name, of in kept.items()})
        desk.finish(
            {
                **{"penalty": penalty, "seed": seed, "kinds": list(nodes.kinds)},
                "sizes": [place.n_units for place in nodes.places],
                "places": [place.layer for place in nodes.places],
            }
        )

    def _training(self, one: Network) -> tuple[Batch, Batch]:
        """Training images of each class that circuits are found by, and others that choose among them."""
        whole = one.training(self.found_by + self.chosen_by, self.seed)
        # A smaller sample is a part of a larger one.
        some = {*one.setting.data.train.calibration(self.found_by, self.seed).image_ids}
        own = torch.tensor([image in some for image in whole.image_id], device=whole.x.device)
        return whole[own.nonzero()[:, 0]], whole[(~own).nonzero()[:, 0]]


def _sizes(nodes: Nodes) -> list[tuple[str, int]]:
    return [(place.layer, place.n_units) for place in nodes.places]
