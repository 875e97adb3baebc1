"""What a study works on: a model and a dataset as they were named, and the two of them loaded and found to fit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from sukashi import data as datasets
from sukashi import models
from sukashi.core.errors import DataError, ResourceError, UsageError
from sukashi.core.types import Batch, Plan, Scores, rank
from sukashi.criteria import calibration
from sukashi.criteria import criteria as registry
from sukashi.criteria.calibration import View
from sukashi.criteria.pruning import check_options
from sukashi.data import Data
from sukashi.experiments.reading import Opening, Reading
from sukashi.models import Loaded
from sukashi.network import sites
from sukashi.network.sites import Found


class Source(Reading):
    """A model and a dataset by name, and how they are read; nothing is loaded before `open`.

    `calibration` counts training images a class, `test_images` those of the test split at most. The rest is as in
    `models.load` and `data.load`.
    """

    @classmethod
    def of(cls, settings: Opening, **more: Any) -> Source:
        """That of an experiment's settings; `more` says what these do not."""
        return cls(**{name: getattr(settings, name) for name in cls.model_fields if hasattr(settings, name)} | more)

    def read(self) -> Data:
        """The data, checked."""
        pick_device(self.device)  # refused before anything is read
        images = datasets.load(
            self.data,
            skip_bad=self.skip_bad,
            class_map=self.class_map,
            only=self.only,
            max_pixels=self.max_pixels,
        )
        if images.train.has_masks:
            raise DataError(f"{self.data} has a map of classes an image: give data with one class an image")
        if self.test_images < images.n_classes:
            raise UsageError(f"test_images must be at least {images.n_classes}, one a class, got {self.test_images}")
        return images

    def build(self, images: Data, seed: int = 0) -> Loaded:
        """The model for these data, on its device; random weights are drawn by `seed`."""
        place = pick_device(self.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # a model without weights of its own is the same one in every run
            loaded = models.load(
                self.model,
                weights=self.weights,
                n_classes=images.n_classes if self.n_classes is None and self.untrained else self.n_classes,
                width=self.width,
                pretrained=self.pretrained,
                output=self.output,
            )
        datasets.check_classes(None if self.class_map else loaded.class_names, images.class_names, loaded.n_classes)
        loaded.model.to(place)
        return loaded

    @property
    def untrained(self) -> bool:
        """Whether the model is known to have random weights."""
        return self.weights is None and not self.pretrained and models.takes_classes(self.model)

    def open(self, *, units: bool = True) -> Setting:
        """The model and the data, loaded; whatever does not fit is refused before anything is computed.

        Without `units` nobody looks for what could be cut, and nothing need be found.
        """
        images = self.read()
        images.train.calibration(self.calibration, 0)
        setting = self.beside(images)
        return replace(setting, found=sites.find(setting.loaded.model, setting.example)) if units else setting

    def beside(self, images: Data) -> Setting:
        """The model with data that are read already, found to run on them; nobody looks for what could be cut."""
        loaded = self.build(images)
        images = images.read_in(loaded.preprocess.channels)
        if self.untrained:
            random_weights = (
                f"{self.model} has random weights, its figures mean nothing: give --weights FILE or --pretrained"
            )
            warnings.warn(random_weights, stacklevel=4)
            images = replace(images, notes=(random_weights, *images.notes))
        setting = Setting(self, loaded, images, Found((), {}), next(loaded.model.parameters()).device)
        models.probe(loaded, setting.example)
        return setting


@dataclass(frozen=True)
class Setting:
    """A model and a dataset that fit each other, ready for criteria."""

    source: Source
    loaded: Loaded
    data: Data
    found: Found
    device: torch.device

    @property
    def about_model(self) -> dict[str, Any]:
        """What decides the model: part of a trial's hash."""
        source = self.source
        return {
            "spec": source.model,
            "width": source.width,
            "n_classes": source.n_classes,
            "output": source.output,
            "pretrained": source.pretrained,
            "weights_sha256": self.loaded.weights_sha256,
        }

    @property
    def about_data(self) -> dict[str, Any]:
        """What decides the images: part of a trial's hash."""
        return {
            "spec": self.source.data,
            "sha256": self.data.sha256,
            "calibration": self.source.calibration,
            "test_images": self.source.test_images,
        }

    @property
    def example(self) -> torch.Tensor:
        """Two images of the training split, on the device."""
        two = self.data.train.subset(range(min(2, len(self.data.train)))).whole(self.loaded.preprocess, 0)
        return two.x.to(self.device)

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

    def test(self) -> Batch:
        """At most `source.test_images` of the test split, the same whatever the seed."""
        return self.data.test.limit(self.source.test_images).whole(self.loaded.preprocess, self.source.workers)


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one; of the processes that torchrun has started each takes its own."""
    if name not in ("auto", "cpu", "cuda"):
        raise UsageError(f"device must be auto, cpu or cuda, got {name!r}: auto takes a GPU where there is one")
    if name == "cuda" and not torch.cuda.is_available():
        raise ResourceError("device cuda was asked for and this machine has none: use --device cpu or auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    own, n_gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if own >= n_gpus:
        raise ResourceError(f"each process needs a GPU of its own and this machine has {n_gpus}: start as many")
    return torch.device("cuda", own)


PACKAGES = ("sukashi", "torch", "torchvision", "timm", "torch-pruning", "numpy")


def plan_for(
    setting: Setting,
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


def versions() -> dict[str, str]:
    """Versions of what decides results."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}}


def hardware(device: torch.device) -> str:
    """The processor or GPU figures were measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {sys.platform}, {torch.get_num_threads()} threads"
