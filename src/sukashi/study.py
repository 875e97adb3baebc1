"""Studies: criteria over seeds on one model and one dataset, resumable trial by trial."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sukashi import data as datasets
from sukashi import models, report, sites, stats
from sukashi.criteria import criteria as registry
from sukashi.data import Data
from sukashi.errors import ResourceError, UsageError
from sukashi.measures import accuracy, cost
from sukashi.models import Loaded
from sukashi.sites import Found
from sukashi.store import Record, Store, Writer
from sukashi.types import Batch, Curve, Plan, Trial, check_ratio, rank
from sukashi.types import Scores as _Scores

CALIBRATION = 32
TEST_IMAGES = 2000
PACKAGES = ("sukashi", "torch", "torchvision", "timm", "torch-pruning", "numpy")


@dataclass(frozen=True)
class Setting:
    """A model and a dataset that fit each other, ready for criteria."""

    loaded: Loaded
    data: Data
    found: Found
    device: torch.device
    workers: int

    @property
    def example(self) -> torch.Tensor:
        """Two images of the training split, on the device."""
        two = self.data.train.subset(range(2)).whole(self.loaded.preprocess, 0)
        return two.x.to(self.device)

    def calibration(self, n_per_class: int, seed: int) -> Batch:
        """`n_per_class` training images of each class, sorted by class."""
        return self.data.train.calibration(n_per_class, seed).whole(self.loaded.preprocess, self.workers).by_class()

    def test(self, n_images: int) -> Batch:
        """At most `n_images` of the test split, the same whatever the seed."""
        return self.data.test.limit(n_images).whole(self.loaded.preprocess, self.workers)


def prepare(
    model: str,
    data: str,
    *,
    weights: str | Path | None = None,
    width: int | None = None,
    n_classes: int | None = None,
    pretrained: bool = False,
    output: str | None = None,
    skip_bad: bool = False,
    device: str = "auto",
    workers: int = 0,
) -> Setting:
    """Load a model and a dataset, and refuse a pair that does not fit before anything is computed."""
    place = pick_device(device)
    images = datasets.load(data, skip_bad=skip_bad)
    if n_classes is None and weights is None and not pretrained:
        n_classes = images.n_classes
    loaded = models.load(model, weights=weights, n_classes=n_classes, width=width, pretrained=pretrained, output=output)
    datasets.check_classes(loaded.class_names, images.class_names, loaded.n_classes)
    loaded.model.to(place)
    two = images.train.subset(range(2)).whole(loaded.preprocess, 0).x.to(place)
    models.probe(loaded, two)
    return Setting(loaded, images, sites.find(loaded.model, two), place, workers)


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one."""
    if name not in ("auto", "cpu", "cuda"):
        raise UsageError(f"device must be auto, cpu or cuda, got {name!r}: auto takes a GPU where there is one")
    if name == "cuda" and not torch.cuda.is_available():
        raise ResourceError("device cuda was asked for and this machine has none: use --device cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def plan_for(
    setting: Setting,
    criterion: str,
    seed: int,
    *,
    calibration: int = CALIBRATION,
    options: Mapping[str, Any] | None = None,
    journal: Any = None,
) -> Plan:
    """The order in which units go, by one criterion with one seed."""
    method = registry[criterion]
    chosen = dict(options or {})
    method.check_options(chosen)
    batch = setting.calibration(calibration, seed)
    if "_journal" in method.accepts:
        chosen["_journal"] = journal
    generator = torch.Generator().manual_seed(seed)
    outcome = method(setting.loaded.model, setting.found.sites, batch, generator=generator, **chosen)
    return rank(outcome) if isinstance(outcome, _Scores) else outcome


def compare(
    model: str,
    data: str,
    criteria: Sequence[str],
    *,
    out: str | Path,
    ratios: Sequence[float] = tuple(round(0.05 * i, 2) for i in range(20)),
    seeds: int = 3,
    calibration: int = CALIBRATION,
    test_images: int = TEST_IMAGES,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    weights: str | Path | None = None,
    width: int | None = None,
    n_classes: int | None = None,
    pretrained: bool = False,
    output: str | None = None,
    skip_bad: bool = False,
    device: str = "auto",
    workers: int = 0,
    command: str | None = None,
) -> dict[str, Any]:
    """SAUCE with intervals, curves and passes of several criteria over seeds; also written to `out` with a report.

    Each (criterion, seed) is a trial: its plan comes from `calibration` training images a class, its curve from
    physically cut networks (no rounding) on at most `test_images` test images. Finished trials are kept; an interrupted
    call is resumed by giving it again, with the same result to the byte. `options` holds options by criterion.

    Returns {"sauce": {criterion: {"mean", "low", "high"}}, "dense_accuracy", "curves", "passes", "out"}.
    """
    for name in criteria:
        registry[name].check_options(dict((options or {}).get(name, {})))
    for name in options or {}:
        if name not in criteria:
            raise UsageError(f"options were given for {name!r}, which is not compared: criteria are {list(criteria)}")
    if not criteria or len(set(criteria)) != len(criteria):
        raise UsageError(f"criteria must be one or more different names, got {list(criteria)}")
    if seeds < 1:
        raise UsageError(f"seeds must be at least 1, got {seeds}: it is the number of seeds, counted from 0")
    for ratio in ratios:
        check_ratio(ratio)
    source = {"model": model, "width": width, "n_classes": n_classes, "output": output, "pretrained": pretrained}
    setting = prepare(
        model,
        data,
        weights=weights,
        width=width,
        n_classes=n_classes,
        pretrained=pretrained,
        output=output,
        skip_bad=skip_bad,
        device=device,
        workers=workers,
    )
    about_model = {"spec": source.pop("model"), **source, "weights_sha256": setting.loaded.weights_sha256}
    about_data = {"spec": data, "calibration": calibration, "test_images": test_images}
    ratios = sorted({0.0, *map(float, ratios)})
    trials = [
        Trial(about_model, about_data, name, seed, {"ratios": ratios, **dict((options or {}).get(name, {}))})
        for name in criteria
        for seed in range(seeds)
    ]
    study = {
        "model": about_model,
        "data": about_data,
        "criteria": list(criteria),
        "seeds": seeds,
        "ratios": ratios,
        "options": {name: dict(chosen) for name, chosen in (options or {}).items()},
        "mode": "cut",
    }
    store = Store(out)
    with store.writing(study):
        store.log("run", command=command or "sukashi.compare(...)", versions=versions(), hardware=hardware(setting))
        missing = [trial for trial in trials if store.record(trial) is None]
        if missing:
            test = setting.test(test_images)
            for trial in missing:
                with store.run(trial) as writer:
                    _run(setting, trial, writer, test)
        report.write(store.folder)
    return summary(store)


def _run(setting: Setting, trial: Trial, writer: Writer, test: Batch) -> None:
    options = {name: value for name, value in trial.params.items() if name != "ratios"}
    plan = writer.plan(setting.found.sites)
    if plan is None:
        plan = plan_for(
            setting,
            trial.criterion,
            trial.seed,
            calibration=trial.data["calibration"],
            options=options,
            journal=writer.journal,
        )
        writer.save_plan(plan)
    curve = accuracy.curve(setting.loaded.model, setting.found.sites, plan, trial.params["ratios"], test)
    writer.save_curve(curve)
    chance = 1 / setting.loaded.n_classes
    area = accuracy.sauce(curve.fraction, curve.accuracy, chance)
    writer.finish(
        {
            "sauce": area,
            "relative_sauce": accuracy.sauce(curve.fraction, curve.accuracy, chance, relative=True),
            "largest_fraction": float(curve.fraction.max()),
            "dense_accuracy": float(curve.accuracy[int(np.argmin(curve.n_removed))]),
            "chance": chance,
            "class_names": list(setting.data.class_names),
            "class_counts": torch.bincount(test.target, minlength=setting.loaded.n_classes).tolist(),
            "class_accuracy": [_by_class(row, test, setting.loaded.n_classes) for row in curve.correct],
            "cost": _cost(setting, plan),
            "notes": list(setting.data.notes),
        }
    )


def _by_class(correct: np.ndarray, test: Batch, n_classes: int) -> list[float | None]:
    target = test.target.numpy()
    return [float(correct[target == k].mean()) if (target == k).any() else None for k in range(n_classes)]


def _cost(setting: Setting, plan: Plan) -> dict[str, Any]:
    """Parameters and FLOPs, dense and with half of the units gone: what no clock decides."""
    return cost.sizes(setting.loaded.model, setting.example[:1], plan.mask(0.5))


def summary(store: Store) -> dict[str, Any]:
    """The figures of a finished comparison, as `compare --json` prints them."""
    records: dict[str, list[Record]] = {}
    for record in store.finished():
        records.setdefault(record.trial.criterion, []).append(record)
    ordered = {name: records[name] for name in store.study["criteria"] if name in records}
    sauce = {}
    for name, found in ordered.items():
        interval = stats.interval([record.result["sauce"] for record in found])
        sauce[name] = {"mean": interval.mean, "low": interval.low, "high": interval.high}
    first = next(iter(ordered.values()))[0]
    return {
        "sauce": sauce,
        "dense_accuracy": first.result["dense_accuracy"],
        "curves": {name: [_points(record.curve(), False) for record in found] for name, found in ordered.items()},
        "passes": {name: [_points(record.curve(), True) for record in found] for name, found in ordered.items()},
        "out": str(store.folder),
    }


def _points(curve: Curve, passes: bool) -> list[dict[str, float]]:
    rows = np.flatnonzero(np.isnan(curve.ratio) == passes)
    return [{"fraction": float(curve.fraction[r]), "accuracy": float(curve.accuracy[r])} for r in rows]


def versions() -> dict[str, str]:
    """Versions of what decides results."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}}


def hardware(setting: Setting) -> str:
    """The processor or GPU figures were measured on."""
    if setting.device.type == "cuda":
        return torch.cuda.get_device_name(setting.device)
    return f"{platform.machine()} {sys.platform}, {torch.get_num_threads()} threads"
