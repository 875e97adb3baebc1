"""What would happen: a preflight."""

from __future__ import annotations

import time
from typing import Any, ClassVar

import numpy as np
import torch

from sukashi.core.errors import SukashiError
from sukashi.core.experiment import Result
from sukashi.criteria import criteria as registry
from sukashi.criteria.engine import Engine
from sukashi.experiments.bench import Source
from sukashi.experiments.check.settings import Check
from sukashi.network import sites
from sukashi.report import words

SHOWN = 20  # classes at most


class CheckResult(Result):
    """A model and data before anything is done with them.

    `estimated_seconds` of each criterion; `cannot` names those that refuse the model, with the reason, `unmeasured`
    those that could not be estimated within `limit` seconds. `refused` are layers that can't be cut and why, `reads`
    what the model is given of an image.
    """

    kind: ClassVar[str] = "check"

    model: str
    parameters: int
    reads: str
    sites: list[dict[str, Any]]
    units: int
    refused: dict[str, str]
    class_names: list[str]
    class_counts: dict[str, list[int]]
    notes: list[str]
    limit: float
    estimated_seconds: dict[str, float]
    cannot: dict[str, str]
    unmeasured: list[str]

    def text(self) -> str:
        rows = [[site["layer"], site["kind"], str(site["units"])] for site in self.sites]
        said = [words.table(["site", "kind", "units"], rows), ""]
        said.append(f"{len(self.sites)} sites, {self.units} units, {self.parameters:,} parameters")
        said.append(f"reads {self.reads}")
        said += [f"not cut: {layer}: {reason}" for layer, reason in self.refused.items()]
        few = ", ".join(self.class_names[:SHOWN]) + (", ..." if len(self.class_names) > SHOWN else "")
        said.append(f"{len(self.class_names)} classes: {few}")
        for split, counts in self.class_counts.items():
            said.append(f"{split}: {sum(counts)} images, {min(counts)} to {max(counts)} a class")
        said += [f"note: {note}" for note in self.notes]
        width = max(map(len, self.estimated_seconds), default=0)
        said += [f"{name:{width}s} about {words.duration(of)}" for name, of in self.estimated_seconds.items()]
        said += [f"{name}: {reason}" for name, reason in self.cannot.items()]
        said += [f"{name}: not estimated within {self.limit:g} s; give --limit more" for name in self.unmeasured]
        return "\n".join(said)

    def table(self) -> list[dict[str, Any]]:
        """A row for each site."""
        return [{"model": self.model, **site} for site in self.sites]


def check(asked: Check) -> CheckResult:
    """See `functions.check`."""
    start = time.perf_counter()
    limit, setting = asked.limit, Source.of(asked).open()
    found, train = setting.found, setting.data.train
    n_units = sum(site.n_units for site in found.sites)
    seconds = {method.name: 0.0 for method in registry if not method.facts.get("needs_data", True)}
    cannot: dict[str, str] = {}
    if time.perf_counter() - start < limit:
        batch = setting.calibration(0)
        part = batch[slice(0, None, -(-len(batch) // 64))]
        few = part[slice(0, None, -(-len(part) // 8))]
        scale = len(batch) / len(part)
        visiting = {method.name: method.facts["visits"] for method in registry if "visits" in method.facts}
        try:
            engine = Engine(setting.loaded.model, found.sites, part)
            a_unit = []
            for site in (found.sites[0], found.sites[len(found.sites) // 2], found.sites[-1]):
                if time.perf_counter() - start > limit:
                    break
                with engine.open(site) as suffix:
                    begun = time.perf_counter()
                    suffix.without(0)
                    suffix.without(min(1, site.n_units - 1))
                    a_unit.append((time.perf_counter() - begun) / 2)
            if len(a_unit) == 3:
                once = float(np.mean(a_unit)) * scale * n_units
                seconds |= {name: once * visits for name, visits in visiting.items()}
        except SukashiError as error:
            cannot |= dict.fromkeys(visiting, str(error))
        for method in registry:
            if method.name in seconds or "visits" in method.facts or time.perf_counter() - start > limit:
                continue
            begun = time.perf_counter()
            try:
                places = found.sites if "channel" in method.facts["kinds"] else sites.weights(setting.loaded.model)
                method(setting.loaded.model, places, few, generator=torch.Generator())
                seconds[method.name] = (time.perf_counter() - begun) * len(batch) / len(few)
            except SukashiError as error:
                cannot[method.name] = str(error)
    return CheckResult(
        model=asked.model,
        parameters=sum(p.numel() for p in setting.loaded.model.parameters()),
        reads=setting.reads,
        sites=[{"layer": site.layer, "kind": site.kind, "units": site.n_units} for site in found.sites],
        units=n_units,
        refused=dict(found.refused),
        class_names=list(setting.data.class_names),
        class_counts={split.name: split.counts.tolist() for split in (train, setting.data.test)},
        notes=list(setting.data.notes),
        limit=limit,
        estimated_seconds=seconds,
        cannot=cannot,
        unmeasured=[name for name in registry.names() if name not in seconds and name not in cannot],
    )
