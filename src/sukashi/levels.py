"""Levels: networks pruned and trained to every ratio of a list, by criteria and seeds, each kept as a saved folder.

    study.json                    what the study is; another one is refused
    dense/SEED/                   the dense network of a seed
    CONTENDER/SEED/0.50/          the network that has lost half, a saved folder like any other
    CONTENDER/SEED/0.50.training/ the training under way, until it is finished
    results.json  report.html

A saved folder here has `correct.npz` too: which test images the network gets right.
"""

from __future__ import annotations

import copy
import io
import itertools
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from sukashi import models, page, progress, pruned, sites, sparsity, stats, store, surgery
from sukashi.criteria import UNITS
from sukashi.criteria import criteria as registry
from sukashi.errors import UsageError
from sukashi.measures import accuracy
from sukashi.models import Loaded
from sukashi.schedules import schedules
from sukashi.sites import Found
from sukashi.source import Reading, Setting, Source
from sukashi.stats import Interval
from sukashi.study import check_options, hardware, plan_for, versions
from sukashi.training import Fitted, Training, fit, splits
from sukashi.training import check as check_training
from sukashi.types import Batch, Mask, check_ratio

LEAKY = "unenforced"
LOST = 0.02  # Suwal et al. 2025, sec. 3.1, speak of one to two points
CORRECT = "correct.npz"


def _default() -> Training:
    return Training.model_validate({})


class Course(BaseModel):
    """How networks get to their levels; a study file's own keys.

    `scope` makes it single weights (see `sparsity.mask_of`), None units, whose widths are rounded up to multiples of
    `round_to`. `training` makes the dense network where none was given, and every level of a schedule that rewinds;
    `finetuning` the levels of the others. `enforce_mask` may ask for both: what training under a mask leaves, and what
    it leaves where only the start was masked. `rewind` is the epoch to whose weights a schedule rewinds, 0 the start.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    schedule: str
    criteria: list[str]
    ratios: list[float]
    scope: str | None = None
    exclude: list[str] = []
    round_to: int = pruned.ROUND_TO
    seeds: int = 1
    enforce_mask: list[bool] = [True]
    rewind: int = 0
    options: dict[str, dict[str, Any]] = {}
    training: Training = Field(default_factory=_default)
    finetuning: Training = Field(default_factory=_default)

    @property
    def contenders(self) -> dict[str, tuple[str, bool]]:
        """{name: (criterion, whether masks are enforced)}."""
        both = [(name, enforced) for name in self.criteria for enforced in self.enforce_mask]
        return {name if enforced else f"{name}/{LEAKY}": (name, enforced) for name, enforced in both}


@dataclass(frozen=True)
class Level:
    """A network of a study: which it is, which test images it gets right (B,), and what its recipe says of it."""

    contender: str
    seed: int
    ratio: float
    correct: NDArray[np.bool_]
    figures: Mapping[str, Any]


def run(
    model: str,
    data: str,
    course: Course,
    *,
    out: str | Path,
    title: str = "",
    command: str | None = None,
    **reading: Unpack[Reading],
) -> dict[str, Any]:
    """Every level of a course, saved, and what became of its accuracy; with a page in `out`.

    Levels that are there are kept and a training that was interrupted goes on: the same call ends in the same networks.
    Ratios are fractions removed of the dense network's units, or of its weights with a scope. Accuracy is that of at
    most `test_images` test images, which nothing was chosen on.

    Returns {"dense_accuracy", "levels": [{"contender", "ratio", "accuracy", "difference", "removed", "zeros"}],
    "pairs": [{"first", "second", "ratio", "difference"}], "notes", "out", "report"}. Accuracy and differences (from the
    dense network of the same seed; of two contenders at the same ratio) are {"mean", "low", "high"}, for new seeds and
    new images. `removed` is the mean fraction removed, `zeros` that of weights which are zero in the end.

    Raises UsageError for settings that contradict each other, and whatever loading, criteria and training raise.
    """
    check(course)
    source = Source(model, data, **reading)
    given = not source.untrained
    if given and schedules[course.schedule].facts["rewinds"]:
        raise UsageError(
            f"{course.schedule} goes back to weights before training, and {model} has trained ones: leave them out"
        )
    images = source.read()
    folder = Path(out)
    first = progress.first()
    n_levels = course.seeds * (1 + len(course.contenders) * len(course.ratios))
    with progress.task("levels", n_levels) as shown:
        for seed in range(course.seeds):
            loaded = _sized(source.build(images, seed), course.training.size)
            setting = Setting(source, loaded, images, Found((), {}), next(loaded.model.parameters()).device)
            models.probe(loaded, setting.example)
            if course.scope is None:
                found = sites.find(loaded.model, setting.example)
            else:
                found = Found(sites.weights(loaded.model, course.exclude), {})
            setting = replace(setting, found=found)
            if seed == 0:
                notes = _fits(setting, course, given)
                spec = {
                    **setting.about_model,
                    "weights_sha256": setting.about_model["weights_sha256"] if given else None,
                }
                about = {"model": spec, "data": setting.about_data, "course": course.model_dump()}
                if first:
                    store.claim(folder / "study.json", about)
            _Walker(setting, course, seed, folder, given, command or "sukashi.levels.run(...)", shown).walk()
    if not first:
        return {}
    result = summary(collect(folder, course), course) | {"notes": notes, "out": str(folder)}
    result["report"] = str(
        page.render(
            "levels.html.j2",
            folder,
            {"accuracy": draw(result, course)},
            title=title or f"{course.schedule}: {model}",
            result=result,
            course=course,
            removed="weights" if course.scope else "units",
            verdict=verdict(result, course),
            command=command or "sukashi.levels.run(...)",
            settings=dict(page.flat(about | {"versions": versions(), "hardware": hardware(setting.device)})),
        )
    )
    store.write(folder / "results.json", store.canonical(result, indent=1) + b"\n")
    return result


def check(course: Course) -> None:
    """Refuse a course that means nothing, before anything is loaded."""
    facts = schedules[course.schedule].facts
    for name in course.criteria:
        check_options(name, course.options.get(name, {}))
        registry[name].check_kinds(UNITS if course.scope is None else ("weight",))
    for what, several in (
        ("criteria", course.criteria),
        ("ratios", course.ratios),
        ("enforce_mask", course.enforce_mask),
    ):
        if not several or len(set(several)) != len(several):
            raise UsageError(f"{what} must be different values, at least one, got {several}")
    for ratio in course.ratios:
        check_ratio(ratio)
        if course.scope is not None:
            sparsity.check_scope(course.scope, ratio)
    if min(course.ratios) == 0 or list(course.ratios) != sorted(course.ratios):
        raise UsageError(f"ratios must ascend from above 0, got {course.ratios}: the dense network is level 0 anyway")
    if course.scope is None and (course.exclude or False in course.enforce_mask):
        what = "exclude" if course.exclude else "enforce_mask = false"
        raise UsageError(f"{what} is for single weights, and there is no scope: give one, or leave it out")
    if course.seeds < 1:
        raise UsageError(f"seeds must be at least 1, got {course.seeds}")
    pruned.check_round_to(course.round_to)
    for name in course.options:
        if name not in course.criteria:
            raise UsageError(f"options were given for {name!r}, which is not used: criteria are {course.criteria}")
    if not (course.training.enforce_mask and course.finetuning.enforce_mask):
        raise UsageError("enforce_mask is a key of the study, a list: take it out of the settings of training")
    if course.finetuning.size not in (None, course.training.size):
        raise UsageError(
            f"size must be the same at every level, got {course.finetuning.size} for fine-tuning and "
            f"{course.training.size} for training: give both"
        )
    last = course.training.epochs
    if not 0 <= course.rewind < last or (course.rewind and not facts["rewinds"]):
        raise UsageError(f"rewind must be an epoch below {last} of a schedule that rewinds, got {course.rewind}")


def _fits(setting: Setting, course: Course, given: bool) -> list[str]:
    """Refuse what does not fit the model or the data before hours of training; what is to be known of the data.

    Raises UsageError for layers that a pattern cannot group, and whatever sampling and training refuse.
    """
    model, data = setting.loaded.model, setting.data
    if course.scope is not None:
        shapes = {site.layer: sparsity.weight_of(model, site).shape for site in setting.found.sites}
        sparsity.check_shapes(course.scope, shapes)
    data.train.calibration(setting.source.calibration, 0)
    rewinds = schedules[course.schedule].facts["rewinds"]
    used = [*([] if given else [course.training]), *([] if rewinds else [course.finetuning])]
    notes = dict.fromkeys(data.notes)
    for training in used:
        train, validation, made = splits(data, training)
        check_training(training, train, validation, setting.loaded, tensorboard=False)
        notes |= dict.fromkeys(made)
    return list(notes)


class _Walker:
    """One seed on its way through all levels of all contenders; leaves a folder for each."""

    def __init__(
        self, setting: Setting, course: Course, seed: int, out: Path, given: bool, command: str, shown: progress.Task
    ) -> None:
        self.setting, self.course, self.seed, self.out = setting, course, seed, out
        self.given, self.command, self.shown = given, command, shown
        self.test: Batch | None = None
        self.n_units = sum(site.n_units for site in setting.found.sites)
        self.start = setting.loaded
        self.rewound = _home(out, "dense", f"{seed}.rewind")

    def walk(self) -> None:
        course, schedule = self.course, schedules[self.course.schedule]
        home = _home(self.out, "dense", self.seed)
        dense = self.level("dense", home, 0.0, lambda: self.start, None if self.given else course.training)
        chosen = course.training if schedule.facts["rewinds"] else course.finetuning
        for contender, (criterion, enforced) in course.contenders.items():
            training = chosen.model_copy(update={"enforce_mask": enforced})
            home = _home(self.out, contender, self.seed)
            schedule(
                dense,
                course.ratios,
                prune=partial(self.prune, criterion),
                rewind=self.rewind,
                level=lambda ratio, make, name=contender, home=home, training=training: self.level(
                    name, home / _named(ratio), ratio, make, training
                ),
            )
        if progress.first():
            shutil.rmtree(self.rewound, ignore_errors=True)

    def level(
        self, contender: str, home: Path, ratio: float, make: Callable[[], Loaded], training: Training | None
    ) -> Loaded:
        """The network of a level: the one kept in `home`, or a new one, trained where there are settings for it."""
        self.shown.advance(0, note=f"{contender}, seed {self.seed}, {ratio:.0%}")
        if (home / models.RECIPE).exists():
            network = models.load(self.start.spec, weights=home)
            network.model.to(self.setting.device)
        else:
            under_way = home.with_name(f"{home.name}.training")
            found = make()
            if training is None:
                network, figures = found, {}
            else:
                fitted = self.fit(found, training, under_way)
                network = fitted.loaded
                figures = {
                    "history": [dict(entry) for entry in fitted.history],
                    "epoch": fitted.epoch,
                    "notes": list(fitted.notes),
                }
            if progress.first():
                self.save(network, found.mask, home, contender, ratio, figures)
                shutil.rmtree(under_way, ignore_errors=True)
        self.shown.advance()
        return network

    def fit(self, network: Loaded, training: Training, out: Path, until: int | None = None) -> Fitted:
        seeded = training.model_copy(update={"seed": training.seed + self.seed})
        source = self.setting.source
        return fit(
            network, self.setting.data, seeded, out=out, device=self.setting.device, workers=source.workers, until=until
        )

    def prune(self, criterion: str, network: Loaded, ratio: float) -> Loaded:
        """The network without that fraction of the dense one's units or weights."""
        course, setting = self.course, replace(self.setting, loaded=network)
        options = course.options.get(criterion, {})
        if course.scope is not None:
            mask = pruned.weight_mask(
                *(network, setting.found.sites, setting.calibration(self.seed), criterion, ratio, course.scope),
                generator=torch.Generator().manual_seed(self.seed),
                options=options,
            )
            return pruned.sparse(network, mask)
        now = sites.find(network.model, setting.example)
        n_now = sum(site.n_units for site in now.sites)
        plan = plan_for(replace(setting, found=now), criterion, self.seed, options=options)
        further = max(0.0, 1 - (1 - ratio) * self.n_units / n_now)
        return pruned.cut(network, pruned.round_mask(plan, further, course.round_to))

    def rewind(self, network: Loaded) -> Loaded:
        """The network with the weights it had before training, or after `rewind` epochs of it."""
        model = copy.deepcopy(self.early.model)
        for table in network.cuts[len(self.start.cuts) :]:
            surgery.replay(model, table)
        if network.mask is not None:
            sparsity.enforce(model, network.mask)
        return replace(network, model=model, weights_sha256=models.digest(model))

    @cached_property
    def early(self) -> Loaded:
        if not self.course.rewind:
            return self.start
        # The first epochs of the dense training once more: the same settings, so the same weights.
        return self.fit(self.start, self.course.training, self.rewound, until=self.course.rewind).loaded

    def save(
        self, network: Loaded, mask: Mask | None, home: Path, contender: str, ratio: float, figures: dict[str, Any]
    ) -> None:
        """Write the folder of a level; `mask` is the one it was trained under, enforced or not."""
        setting = self.setting
        if self.test is None:
            self.test = setting.test()
        correct, _ = accuracy.evaluate(network.model, self.test)
        figures |= {
            "accuracy": float(correct.mean()),
            "n_images": len(correct),
            "parameters": accuracy.n_parameters(network.model),
            "removed": self.removed(network, mask),
            "zeros": 0.0 if mask is None else sparsity.zeros(network.model, mask)["sparsity"],
        }
        packed = io.BytesIO()
        np.savez_compressed(packed, correct=np.packbits(correct.astype(bool)), n=len(correct))
        provenance = {
            "command": self.command,
            "contender": contender,
            "ratio": ratio,
            "seed": self.seed,
            "course": self.course.model_dump(),
            "data": setting.about_data,
            "versions": versions(),
            "hardware": hardware(setting.device),
        }
        named = replace(network, class_names=setting.data.class_names)
        pruned.save(home, named, provenance=provenance, figures=figures, files={CORRECT: packed.getvalue()})

    def removed(self, network: Loaded, mask: Mask | None) -> float:
        """The fraction of the dense network's units, or of the weights in scope, that was removed."""
        if self.course.scope is not None:
            return 0.0 if mask is None else mask.n_removed / mask.n_units
        now = sum(site.n_units for site in sites.find(network.model, self.setting.example).sites)
        return 1 - now / self.n_units


def _sized(loaded: Loaded, size: int | None) -> Loaded:
    return loaded if size is None else replace(loaded, preprocess=replace(loaded.preprocess, height=size, width=size))


def _home(out: Path, contender: str, seed: object) -> Path:
    return out / contender.replace("/", "-") / str(seed)


def _named(ratio: float) -> str:
    """The folder of a ratio, with two digits or as many as tell it from every other."""
    return max(f"{ratio:.2f}", repr(ratio), key=len)


def collect(folder: Path, course: Course) -> list[Level]:
    """Every level in the folder of a study, dense ones first."""
    places = [("dense", seed, 0.0, _home(folder, "dense", seed)) for seed in range(course.seeds)]
    places += [
        (name, seed, ratio, _home(folder, name, seed) / _named(ratio))
        for name in course.contenders
        for ratio in course.ratios
        for seed in range(course.seeds)
    ]
    found = []
    for contender, seed, ratio, home in places:
        with np.load(home / CORRECT, allow_pickle=False) as arrays:
            correct = np.unpackbits(arrays["correct"], count=int(arrays["n"])).astype(bool)
        found.append(Level(contender, seed, ratio, correct, models.read_recipe(home / models.RECIPE).figures))
    return found


def summary(levels: Sequence[Level], course: Course) -> dict[str, Any]:
    """The figures of a study's levels, over seeds and images."""
    right = {(level.contender, level.ratio, level.seed): level.correct.astype(float) for level in levels}

    def over_seeds(contender: str, ratio: float) -> NDArray[np.float64]:
        return np.array([right[contender, ratio, seed] for seed in range(course.seeds)])

    dense = over_seeds("dense", 0.0)
    rows, pairs = [], []
    for name in course.contenders:
        for ratio in course.ratios:
            of_level = [level for level in levels if (level.contender, level.ratio) == (name, ratio)]
            rows.append(
                {
                    "contender": name,
                    "ratio": ratio,
                    "accuracy": _share(over_seeds(name, ratio)),
                    "difference": _bounds(stats.crossed(over_seeds(name, ratio) - dense)),
                    "removed": float(np.mean([level.figures["removed"] for level in of_level])),
                    "zeros": float(np.mean([level.figures["zeros"] for level in of_level])),
                }
            )
    for one, other in itertools.combinations(course.contenders, 2):
        for ratio in course.ratios:
            difference = _bounds(stats.crossed(over_seeds(one, ratio) - over_seeds(other, ratio)))
            pairs.append({"first": one, "second": other, "ratio": ratio, "difference": difference})
    return {
        "dense_accuracy": _share(dense),
        "seeds": course.seeds,
        "n_images": dense.shape[1],
        "levels": rows,
        "pairs": pairs,
    }


def verdict(result: Mapping[str, Any], course: Course) -> str:
    """One sentence for each contender: how far it goes before accuracy may have fallen by more than LOST."""
    removed = "weights" if course.scope else "units"
    said = []
    for name in course.contenders:
        rows = [row for row in result["levels"] if row["contender"] == name]
        safe = list(itertools.takewhile(lambda row: row["difference"]["low"] > -LOST, rows))
        last = rows[-1]["difference"]
        leak = "" if course.contenders[name][1] else f" (where {rows[-1]['zeros']:.0%} are zero in the end)"
        said.append(
            f"{name}: "
            + (f"up to {safe[-1]['ratio']:.0%} of the {removed}" if safe else "at no level")
            + f" accuracy is shown to be at most {100 * LOST:g} points lower; at {rows[-1]['ratio']:.0%}{leak} it is "
            f"{100 * last['mean']:+.1f} points from the dense network's ({100 * last['low']:+.1f} to "
            f"{100 * last['high']:+.1f})."
        )
    return " ".join(said)


def draw(result: Mapping[str, Any], course: Course) -> bytes:
    """Accuracy by level with intervals, a line for each contender; as a PNG."""
    figure = Figure(figsize=(8.4, 4.6), layout="constrained")
    axes = figure.subplots()
    dense = result["dense_accuracy"]
    axes.axhspan(dense["low"], dense["high"], color=page.FAINT, alpha=0.5, linewidth=0)
    page.level(axes, dense["mean"], "dense", "--")
    for place, name in enumerate(course.contenders):
        rows = [row for row in result["levels"] if row["contender"] == name]
        mean, low, high = (np.array([row["accuracy"][key] for row in rows]) for key in ("mean", "low", "high"))
        colour = page.colour(name.partition("/")[0], place)
        # Side by side, that intervals at one ratio do not hide each other.
        x = np.array([row["ratio"] for row in rows]) + 0.006 * (place - (len(course.contenders) - 1) / 2)
        axes.errorbar(
            x,
            mean,
            (mean - low, high - mean),
            color=colour,
            linestyle=":" if name.endswith(LEAKY) else "-",
            marker="o",
            markersize=4,
            linewidth=1.6,
            elinewidth=1,
            capsize=2.5,
            label=name,
        )
    removed = "weights" if course.scope else "units"
    axes.set(xlabel=f"fraction of {removed} removed", ylabel="accuracy on test images")
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.legend(frameon=False, fontsize=9, loc="best")
    page.calm(axes)
    return page.png(figure)


def _share(right: NDArray[np.float64]) -> dict[str, float | None]:
    found = stats.crossed(right)
    return {"mean": found.mean, "low": max(0.0, found.low), "high": min(1.0, found.high)}


def _bounds(found: Interval) -> dict[str, float | None]:
    return {"mean": found.mean, "low": found.low, "high": found.high}
