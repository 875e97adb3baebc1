"""What a study works on: a model and a dataset as they were named, and the two of them loaded and found to fit."""

from __future__ import annotations

import os
import platform
import sys
import warnings
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn

from sukashi import data as datasets
from sukashi import models
from sukashi.core.errors import DataError, ResourceError, UsageError
from sukashi.core.schema import Settings, call_of, default_of
from sukashi.core.types import Batch, Plan, Scores, Site, rank
from sukashi.criteria import calibration, plans, pruning
from sukashi.criteria import criteria as registry
from sukashi.criteria.calibration import View
from sukashi.criteria.pruning import check_options
from sukashi.data import Data
from sukashi.experiments.reading import Architecture, Masked, Opening, Pixels, Reading
from sukashi.measures import accuracy, classwise
from sukashi.models import Loaded
from sukashi.network import sites
from sukashi.network.sites import Found
from sukashi.repairs import NONE
from sukashi.report import words


class Source(Masked, Reading):
    """A model and a dataset by name, and how they are read; nothing is loaded before `open`.

    `calibration` counts training images a class, `test_images` those of the test split at most. The rest is as in
    `models.load` and `data.load`.
    """

    @classmethod
    def of(cls, settings: Opening, **more: Any) -> Source:
        """That of an experiment's settings; `more` says what these do not. Raises what `check_code` does."""
        check_code(settings)
        return cls(**{name: getattr(settings, name) for name in cls.model_fields if hasattr(settings, name)} | more)

    def read(self) -> Data:
        """The data, checked."""
        pick_device(self.device)  # refused before anything is read
        images = datasets.load(
            self.data,
            skip_bad=self.skip_bad,
            class_map=self.class_map,
            only=self.only,
            label=self.label,
            groups=self.groups,
            max_pixels=self.max_pixels,
            masks=self.masks or (),
        )
        if images.train.has_masks:
            raise DataError(f"{self.data} has a map of classes an image: give data with one class an image")
        if self.test_images < images.n_classes:
            raise UsageError(f"`test_images` must be at least {images.n_classes}, one a class, got {self.test_images}")
        return images

    def early(self, seed: int = 0) -> Loaded | None:
        """The model, before images are read, which takes longer than to refuse it; None where it waits for the number
        of their classes, and where they are in memory, ready and without a size to choose.
        """
        pick_device(self.device)
        datasets.check_there(self.data)
        if datasets.in_memory(self.data):
            return None
        loaded = self._load(self.n_classes, seed)
        return None if self._waits else loaded

    def build(
        self, images: Data, seed: int = 0, *, new_head: bool = False, early: Loaded | None = None
    ) -> tuple[Loaded, Data]:
        """The model for these data, on its device, with a `new_head` for them, and the data as it answers them; what is
        random is drawn by `seed`. What was loaded `early` is taken as it is.
        """
        place = pick_device(self.device)
        if images.preprocess is not None and self.pixels:
            raise UsageError(f"{self.data} is tensors as a network takes them: leave `{next(iter(self.pixels))}` out")
        loaded = early or self._load(images.n_classes if self._waits else self.n_classes, seed)
        if new_head:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                loaded = models.with_new_head(loaded, images.n_classes)
        if images.preprocess is not None:
            read_by = dict.fromkeys(models.READ, models.Origin("the images are tensors"))
            loaded = replace(loaded, preprocess=images.preprocess, read_by=read_by)
        images = images.answered_by(loaded.n_classes, loaded.class_names, self.among)
        loaded.model.to(place)
        images = images.read_in(loaded.preprocess.channels)
        if images.held_out_by is not None and not loaded.has_not_seen(images.splits_sha256):
            images = replace(images, may_be_seen=True)
        if loaded.assumed and not self.untrained:
            told = f"images are read as {loaded.reads}: weights that were trained otherwise lose accuracy by it"
            images = images.noting(f"{told}; `size`, `mean`, `std` and `resize` say how")
        return loaded, images.noting(*loaded.notes)

    def _load(self, n_classes: int | None, seed: int) -> Loaded:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # a model without weights of its own is the same one in every run
            return models.load(
                self.model,
                weights=self.weights,
                weights_key=self.weights_key,
                n_classes=n_classes,
                width=self.width,
                pretrained=self.pretrained,
                output=self.output,
                **self.pixels,
            )

    @property
    def _waits(self) -> bool:
        """Whether the model has as many classes as the data."""
        return self.untrained and self.n_classes is None

    @property
    def pixels(self) -> dict[str, Any]:
        """What was asked of how images are read."""
        given = {name: getattr(self, name) for name in Pixels.model_fields}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def untrained(self) -> bool:
        """Whether the model is known to have random weights."""
        return self.weights is None and not self.pretrained and models.takes_classes(self.model)

    def open(self, *, units: bool = True, exclude: Collection[str] = ()) -> Bench:
        """The model and the data, loaded; whatever does not fit is refused before anything is computed.

        Without `units` nobody looks for what could be cut, and nothing need be found. Sites of layers to `exclude` are
        left out.
        """
        early, images = self.early(), self.read()
        images.train.calibration(self.calibration, 0)
        setting = self.beside(images, early)
        return replace(setting, found=setting.sites_of(setting.loaded.model, exclude)) if units else setting

    def beside(self, images: Data, early: Loaded | None = None) -> Bench:
        """The model, that was loaded `early` or not, with data that are read already, found to run on them; nobody
        looks for what could be cut.
        """
        loaded, images = self.build(images, early=early)
        for note in loaded.notes:
            warnings.warn(note, stacklevel=4)
        if self.untrained:
            random_weights = (
                f"{self.model} has random weights, its figures mean nothing: give `weights=FILE` or `pretrained=True`"
            )
            warnings.warn(random_weights, stacklevel=4)
            images = images.noting(warnings=[random_weights])
        setting = Bench(self, loaded, images, Found((), {}), next(loaded.model.parameters()).device)
        models.probe(loaded, setting.example)
        return setting


@dataclass(frozen=True)
class Bench:
    """A model and a dataset that fit each other, ready to be looked at: what `sukashi.open` gives.

    `loaded.model` is the network, `data` the images, `found` what can be cut and what can't.
    """

    source: Source
    loaded: Loaded
    data: Data
    found: Found
    device: torch.device

    @property
    def sites(self) -> tuple[Site, ...]:
        """What can be cut."""
        return self.found.sites

    def rank(self, criterion: str, *, seed: int = 0, sampling: str = "random", **options: Any) -> Ranking:
        """The order in which units go, by one criterion with its options; `seed` draws the calibration images.

        Raises UsageError for a criterion or option that there is not, and whatever the criterion raises.
        """
        plan = plan_for(self, criterion, seed, sampling=sampling, options=options)
        return Ranking(self, plan, seed, sampling)

    def accuracy(self, network: nn.Module | Loaded | None = None) -> float:
        """The share of the test images that a network gets right, by default the one that was opened."""
        chosen = self.loaded if network is None else network
        model = chosen.model if isinstance(chosen, Loaded) else chosen
        return float(accuracy.evaluate(model, self.test())[0].mean())

    def __repr__(self) -> str:
        rows = [[site.layer, site.kind, str(site.n_units)] for site in self.sites]
        refused = [f"not cut: {layer}: {reason}" for layer, reason in self.found.refused.items()]
        n_units = sum(site.n_units for site in self.sites)
        counts = f"{words.several(len(rows), 'site')}, {words.several(n_units, 'unit')}"
        named = f"{self.source.model} on {self.source.data}: {counts}"
        return "\n".join([named, words.table(["site", "kind", "units"], rows), *refused])

    @property
    def about_model(self) -> dict[str, Any]:
        """What decides the model: how it was named, and of its weights what is in them and not where they lie."""
        given = self.source.identity()
        named = {name: given[name] for name in Architecture.model_fields if name != "weights"}
        # Not as it was asked for: the header of weights, or a recipe, may say the same.
        read = {"preprocess": asdict(self.loaded.preprocess)}
        return {"spec": given["model"], **named, **read, "weights_sha256": self.loaded.weights_sha256}

    @property
    def about_data(self) -> dict[str, Any]:
        """What decides the images: how they were named, and what is in them."""
        given = self.source.identity()
        of_model = {"model", *Architecture.model_fields, *Pixels.model_fields}
        read = {name: value for name, value in given.items() if name not in {"data", *of_model}}
        return {"spec": given["data"], **read, "sha256": self.data.sha256}

    def identity(self, settings: Settings, **found: Any) -> dict[str, Any]:
        """All that decides an experiment on this bench: its settings, but model and data by what they are, and what
        was `found` in place of what the settings leave open or say of more than this bench.
        """
        own = {name: value for name, value in settings.identity().items() if name not in Source.model_fields}
        return {**own, "model": self.about_model, "data": self.about_data, **found}

    @property
    def example(self) -> torch.Tensor:
        """Two images of the training split, on the device."""
        two = self.data.train.subset(range(min(2, len(self.data.train)))).whole(self.loaded.preprocess, 0)
        return two.x.to(self.device)

    def sites_of(self, model: nn.Module, exclude: Collection[str] = ()) -> Found:
        """What can be cut of a network for these images, but the sites of some layers; tried on an image and noise."""
        own = self.loaded.preprocess
        noise = torch.rand(self.example[:1].shape, generator=torch.Generator().manual_seed(0))
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (own.mean, own.std))
        example = torch.cat([self.example[:1].cpu(), (noise - mean) / std])
        return sites.without(sites.find(model, example), exclude)

    @cached_property
    def view(self) -> View:
        """What the dense model makes of the training split."""
        return calibration.view(self.loaded, self.data.train, self.source.workers)

    def calibration(self, seed: int, how: str = "random") -> Batch:
        """Training images, `source.calibration` of each class as one of `sampling.SAMPLINGS` says, sorted by class."""
        train, n_per_class = self.data.train, self.source.calibration
        match how:
            case "confidence":
                chosen = calibration.by_confidence(train, self.view, n_per_class)
            case "clustering":
                chosen = train.central(self.view.features, n_per_class, seed)
            case _:
                calibration.check_sampling(how)
                chosen = train.calibration(n_per_class, seed)
        return chosen.whole(self.loaded.preprocess, self.source.workers).by_class()

    @property
    def reads(self) -> str:
        """What the network is given of an image, and who says so."""
        return self.loaded.reads

    def doubts(self, correct: NDArray[Any], test: Batch) -> list[str]:
        """A sentence where the network is not shown to know the classes of the test images at all; `correct` (B,) are
        those that it gets right."""
        if self.source.untrained or not classwise.guesses(correct, test.target.numpy(), self.data.n_classes):
            return []
        chance = test.objective.chance(test.target)
        return [
            f"before the cut {correct.mean():.1%} of {len(test)} test images are right, which is not shown to be more "
            f"than one answer for all gets right ({chance:.1%}), so that no figure here means much: was the network "
            f"trained on images read as {self.reads}, and were its classes numbered as "
            f"{', '.join(self.data.class_names[:4])}{', ...' if self.data.n_classes > 4 else ''}? `size`, `mean`, "
            "`std` and `resize` say how images are read, `class_map` which number each class has."
        ]

    def test(self) -> Batch:
        """At most `source.test_images` of the test split, the same whatever the seed."""
        return self.data.test.limit(self.source.test_images).whole(self.loaded.preprocess, self.source.workers)


@dataclass(frozen=True)
class Ranking:
    """The order in which the units of a bench's network go."""

    bench: Bench
    plan: Plan
    seed: int
    sampling: str

    def cut(self, ratio: float, *, round_to: int = plans.ROUND_TO, repair: str = NONE) -> Loaded:
        """The network without round(ratio * units) units, less what rounding each site to a multiple of `round_to`
        gives back (1: the exact ratio), and mended by a `repair`, as "refit", on the images that ranked; `.model` is
        the module, `models.save` writes it.

        Raises UsageError for a ratio outside [0, 1) and a repair that there is not, and what the repair raises.
        """
        mask = plans.round_mask(self.plan, ratio, round_to)
        images = self.bench.calibration(self.seed, self.sampling)
        return pruning.repaired(pruning.cut(self.bench.loaded, mask), self.bench.loaded, images, repair)

    def table(self) -> list[dict[str, Any]]:
        """A row for each unit, first to go first: layer, unit, category and effect (the method's own measure)."""
        plan = self.plan
        rows = zip(plan.site.tolist(), plan.unit.tolist(), plan.category.tolist(), plan.effect.tolist(), strict=True)
        return [
            {"layer": plan.sites[site].layer, "unit": unit, "category": category, "effect": effect}
            for site, unit, category, effect in rows
        ]

    def __repr__(self) -> str:
        first = ", ".join(f"{row['layer']}[{row['unit']}]" for row in self.table()[:5])
        return f"{self.plan.method}: {words.several(self.plan.n_units, 'unit')}, first to go {first}, ..."


def check_code(settings: Opening) -> None:
    """Refuse saved folders of code that these settings do not name, with the call that does.

    Raises ModelError.
    """
    fields = type(settings).model_fields
    given = {name: getattr(settings, name) for name in fields if name in settings.model_fields_set}
    given = {name: value for name, value in given.items() if value != default_of(fields[name])}
    one, several = given.get("model"), given.get("models")
    for folder in [one] if isinstance(one, str) else several if isinstance(several, list) else []:
        if settings.kind and (code := models.code_of(folder)) is not None:
            named = {"model": code, "weights": folder}
            if several is not None:
                whole = ((spec, models.code_of(spec)) for spec in several)
                named = {"models": [spec if made is None else f"{made}={spec}" for spec, made in whole]}
            raise models.needs_code(folder, code, f"`{call_of(type(settings), {**given, **named})}`")


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one; of the processes that torchrun has started each takes its own."""
    if name not in ("auto", "cpu", "cuda"):
        raise UsageError(f"device must be auto, cpu or cuda, got {name!r}: auto takes a GPU where there is one")
    if name == "cuda" and not torch.cuda.is_available():
        raise ResourceError("device cuda was asked for and this machine has none: leave `device` out")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    own, n_gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if own >= n_gpus:
        raise ResourceError(f"each process needs a GPU of its own and this machine has {n_gpus}: start as many")
    return torch.device("cuda", own)


def plan_for(
    setting: Bench,
    criterion: str,
    seed: int,
    *,
    sampling: str = "random",
    options: Mapping[str, Any] | None = None,
    journal: Any = None,
) -> Plan:
    """The order in which units go, by one criterion with one seed."""
    method = registry[criterion]
    chosen = dict(options or {})
    check_options(criterion, chosen)
    batch = setting.calibration(seed, sampling)
    if method.keeps_journal:
        chosen["_journal"] = journal
    generator = torch.Generator().manual_seed(seed)
    outcome = method(setting.loaded.model, setting.found.sites, batch, generator=generator, **chosen)
    return rank(outcome) if isinstance(outcome, Scores) else outcome


def hardware(device: torch.device) -> str:
    """The processor or GPU figures were measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {sys.platform}, {words.several(torch.get_num_threads(), 'thread')}"
