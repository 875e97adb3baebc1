"""What would happen: a preflight."""

from __future__ import annotations

import time
from typing import Any, ClassVar

import numpy as np
import torch

from sukashi.core import progress
from sukashi.core.errors import SukashiError
from sukashi.core.experiment import Result
from sukashi.core.stats import share
from sukashi.core.types import Batch
from sukashi.criteria import criteria as registry
from sukashi.criteria.engine import Engine
from sukashi.data import Split
from sukashi.experiments.bench import Bench, Source
from sukashi.experiments.check.settings import Check
from sukashi.measures import accuracy
from sukashi.network import sites
from sukashi.report import words

SHOWN = 20  # classes at most
TESTED = 200  # test images, which say of accuracy within 7 points what it is
_BATCH = 16  # test images decoded at once


class CheckResult(Result):
    """A model and data before anything is done with them.

    `estimated_seconds` of each criterion; `cannot` names those that refuse the model, with the reason, `unmeasured`
    those that could not be estimated within `limit` seconds. `refused` are layers that can't be cut and why, `reads`
    what the model is given of an image, `n_right` how many of `n_images` test images it gets right: None for weights
    that are random.
    """

    kind: ClassVar[str] = "check"

    model: str
    parameters: int
    reads: str
    n_right: int | None
    n_images: int
    sites: list[dict[str, Any]]
    units: int
    refused: dict[str, str]
    class_names: list[str]
    class_counts: dict[str, list[int]]
    limit: float
    estimated_seconds: dict[str, float]
    cannot: dict[str, str]
    unmeasured: list[str]

    @property
    def asked(self) -> str:
        """Whether the network is what it should be: how images are read, and how many it gets right."""
        if self.n_right is None:
            return f"read as {self.reads}; the weights are random, so that nothing is known of what it gets right"
        right = share(self.n_right, self.n_images)
        return (
            f"read as {self.reads}; right on {self.n_right} of {self.n_images} test images "
            f"({words.percent(self.n_right / self.n_images)}, 95% interval {words.percent(right.low)} to "
            f"{words.percent(right.high)}): is this what you know of your model? `size`, `mean`, `std` and "
            "`resize` say how images are read"
        )

    def text(self) -> str:
        rows = [[site["layer"], site["kind"], str(site["units"])] for site in self.sites]
        said = [self.asked, "", words.table(["site", "kind", "units"], rows), ""]
        said.append(
            f"{words.several(len(self.sites), 'site')}, {words.several(self.units, 'unit')}, "
            f"{words.several(self.parameters, 'parameter')}"
        )
        said += [f"not cut: {layer}: {reason}" for layer, reason in self.refused.items()]
        few = ", ".join(self.class_names[:SHOWN]) + (", ..." if len(self.class_names) > SHOWN else "")
        said.append(f"{len(self.class_names)} classes: {few}")
        for split, counts in self.class_counts.items():
            said.append(f"{split}: {words.several(sum(counts), 'image')}, {words.between(counts)} a class")
        width = max(map(len, self.estimated_seconds), default=0)
        said += [f"{name:{width}s} about {words.duration(of)}" for name, of in self.estimated_seconds.items()]
        said += [f"{', '.join(names)}: {reason}" for reason, names in words.by_reason(self.cannot).items()]
        said += [f"{name}: not estimated within {self.limit:g} s; give a larger `limit`" for name in self.unmeasured]
        return "\n".join([*said, *self.remarks()])

    def table(self) -> list[dict[str, Any]]:
        """A row for each site."""
        return [{"model": self.model, **site} for site in self.sites]


def _n_right(setting: Bench, test: Split) -> int:
    """How many of the test images the network gets right."""
    n = 0.0
    with progress.task("test images", len(test)) as shown:
        for batch in test.batches(setting.loaded.preprocess, _BATCH, setting.source.workers):
            n += float(accuracy.evaluate(setting.loaded.model, batch)[0].sum())
            shown.advance(len(batch))
    return round(n)


def check(asked: Check) -> CheckResult:
    """See `functions.check`."""
    source = Source.of(asked)
    setting = source.open()
    found, images, limit = setting.found, setting.data, asked.limit
    few_test = images.test.limit(min(asked.test_images, max(TESTED, images.n_classes)))
    n_right = None if source.untrained else _n_right(setting, few_test)
    n_units = sum(site.n_units for site in found.sites)
    seconds, cannot = _estimates(setting, time.perf_counter() + limit)
    return CheckResult(
        model=asked.model,
        parameters=sum(p.numel() for p in setting.loaded.model.parameters()),
        reads=setting.reads,
        n_right=n_right,
        n_images=len(few_test),
        sites=[{"layer": site.layer, "kind": site.kind, "units": site.n_units} for site in found.sites],
        units=n_units,
        refused=dict(found.refused),
        class_names=list(images.class_names),
        class_counts={split.name: split.counts.tolist() for split in (images.train, images.val, images.test) if split},
        warnings=list(images.warnings),
        notes=list(images.notes),
        limit=limit,
        estimated_seconds=seconds,
        cannot=cannot,
        unmeasured=[name for name in registry.names() if name not in seconds and name not in cannot],
    )


def _estimates(setting: Bench, stop: float) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds of each criterion, as far as they can be had until then, and why others refuse the model."""
    seconds = {method.name: 0.0 for method in registry if not method.facts.get("needs_data", True)}
    cannot: dict[str, str] = {}
    if time.perf_counter() >= stop:
        return seconds, cannot
    batch = setting.calibration(0)
    part = batch[slice(0, None, -(-len(batch) // 64))]
    few = part[slice(0, None, -(-len(part) // 8))]
    visiting = {method.name: method.facts["visits"] for method in registry if "visits" in method.facts}
    others = [method for method in registry if method.name not in seconds and method.name not in visiting]
    with progress.task("estimates", 1 + len(others)) as shown:
        shown.advance(0, ", ".join(visiting))
        try:
            a_unit = _of_a_unit(setting, part, stop)
            if a_unit is not None:
                once = a_unit * len(batch) / len(part) * sum(site.n_units for site in setting.found.sites)
                seconds |= {name: once * visits for name, visits in visiting.items()}
        except SukashiError as error:
            cannot |= dict.fromkeys(visiting, str(error))
        for method in others:
            shown.advance(note=method.name)
            if time.perf_counter() > stop:
                break
            begun, model = time.perf_counter(), setting.loaded.model
            try:
                places = setting.found.sites if "channel" in method.facts["kinds"] else sites.weights(model)
                method(model, places, few, generator=torch.Generator())
                seconds[method.name] = (time.perf_counter() - begun) * len(batch) / len(few)
            except SukashiError as error:
                cannot[method.name] = str(error)
    return seconds, cannot


def _of_a_unit(setting: Bench, images: Batch, stop: float) -> float | None:
    """Seconds that one unit takes, a mean over the first, middle and last site; None where there was no time for it."""
    found, taken = setting.found.sites, []
    engine = Engine(setting.loaded.model, found, images)
    for site in (found[0], found[len(found) // 2], found[-1]):
        if time.perf_counter() > stop:
            return None
        with engine.open(site) as suffix:
            begun = time.perf_counter()
            suffix.without(0)
            suffix.without(min(1, site.n_units - 1))
            taken.append((time.perf_counter() - begun) / 2)
    return float(np.mean(taken))
