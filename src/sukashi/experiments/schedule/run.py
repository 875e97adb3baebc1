"""Levels: networks pruned and trained to every ratio of a list, by criteria and seeds, each kept as a saved folder.

    study.json                    what the study is; it may grow (see `courses.grown`), another one is refused
    dense/SEED/                   the dense network of a seed
    CONTENDER/SEED/0.50/          the network that has lost half, a saved folder like any other
    CONTENDER/SEED/0.50.training/ the training under way, until it is finished
    results.json  report.html

A saved folder here has `correct.npz` too: which test images the network gets right.
"""

from __future__ import annotations

import copy
import io
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch

from sukashi import models
from sukashi.core import files, progress
from sukashi.core.errors import UsageError
from sukashi.core.schema import checked
from sukashi.core.types import Batch, Mask
from sukashi.criteria import pruning
from sukashi.experiments.bench import Reading, Setting, Source, hardware, plan_for, versions
from sukashi.experiments.schedule.schedules import schedules
from sukashi.experiments.schedule.settings import Course, check, check_used, grown
from sukashi.experiments.schedule.summary import Level, cautions, draw, summary
from sukashi.experiments.train.run import Settings, settings_of
from sukashi.measures import accuracy, cost
from sukashi.models import Loaded, saved
from sukashi.network import sites, sparsity, surgery
from sukashi.network.sites import Found
from sukashi.report import page, words
from sukashi.training import loop
from sukashi.training.loop import Fitted, fit
from sukashi.training.settings import Finetuning, Training, check_training, memory_of, splits

CORRECT = "correct.npz"


def run(
    model: str,
    data: str,
    course: Course,
    *,
    out: str | Path,
    title: str = "",
    memory: float = loop.MEMORY / 2**30,
    command: str | None = None,
    **reading: Unpack[Reading],
) -> dict[str, Any]:
    """Every level of a course, saved, and what became of its accuracy; with a page in `out`.

    Levels that are there are kept and a training that was interrupted goes on: the same call ends in the same networks.
    Ratios are fractions removed of the dense network's units, or of its weights with a scope. Accuracy is that of at
    most `test_images` test images, which nothing was chosen on. `memory` is as in `train`.

    Returns {"dense_accuracy", "seeds", "n_images", "removes" (units or weights), "levels": [{"contender", "ratio",
    "accuracy", "difference", "removed", "parameters", "zeros"}], "pairs": [{"first", "second", "ratio", "removed",
    "difference", "so"}], "verdict", "lines", "notes", "out", "report", "finished" (whether it was so before)}.
    Accuracy and differences (from the dense network of the same seed; of two contenders at the same ratio) are
    {"mean", "low", "high"}, for new seeds and new images. `ratio` was asked for; `removed` is the mean fraction that
    was removed of what `removes` says, `parameters` that of all parameters, `zeros` that of weights which are zero in
    the end. A pair's `removed` are those of the two; where they are more than a point apart, `so` is "not comparable".

    Raises UsageError for settings that contradict each other, and whatever loading, criteria and training raise.
    """
    check(course)
    n_bytes = memory_of(memory)
    source = Source(model, data, **reading)
    given = not source.untrained
    if given and schedules[course.schedule].facts["rewinds"]:
        raise UsageError(
            f"{course.schedule} goes back to weights before training, and {model} has trained ones: leave them out"
        )
    check_used(course, given)
    images = source.read()
    folder = Path(out)
    finished = all((home / models.RECIPE).exists() for *_, home in _places(folder, course))
    first = progress.first()
    n_levels = course.seeds * (1 + len(course.contenders) * len(course.ratios))
    with progress.task("levels", n_levels) as shown:
        for seed in range(course.seeds):
            loaded = models.resized(source.build(images, seed), course.size)
            read = images.read_in(loaded.preprocess.channels)
            setting = Setting(source, loaded, read, Found((), {}), next(loaded.model.parameters()).device)
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
                unused = {"training", "finetuning"} - set(course.used(given))
                about = {"model": spec, "data": setting.about_data, "course": course.model_dump(exclude=unused)}
                if first:
                    files.claim(folder / "study.json", about, grown)
            walker = _Walker(setting, course, seed, folder, given, command or "sukashi.levels.run(...)", shown)
            walker.memory = n_bytes
            walker.walk()
    if not first:
        return {}
    result = summary(collect(folder, course), course)
    result |= {"notes": [*notes, *cautions(result, course)], "out": str(folder)}
    result["report"] = str(
        page.render(
            "experiments/schedule/page.html.j2",
            folder,
            {"accuracy": draw(result, course)},
            title=title or f"{course.schedule}: {model}",
            result=result,
            course=course,
            command=command or "sukashi.levels.run(...)",
            settings=dict(words.flat(about | {"versions": versions(), "hardware": hardware(setting.device)})),
        )
    )
    files.write(folder / "results.json", files.canonical(result, indent=1) + b"\n")
    return result | {"finished": finished}


class Scheduled(Settings, total=False):
    """Those of `train`, and of `Reading`."""

    calibration: int


# Of `schedule`, beside the settings of a training.
_KEYWORDS = (*Reading.__annotations__, "scope", "exclude", "round_to", "seeds", "rewind", "options", "memory")


def schedule(
    model: str,
    data: str,
    how: str,
    criteria: Sequence[str],
    ratios: Sequence[float],
    *,
    out: str | Path,
    scope: str | None = None,
    exclude: Sequence[str] = (),
    round_to: int = pruning.ROUND_TO,
    seeds: int = 1,
    rewind: int = 0,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    memory: float = loop.MEMORY / 2**30,
    command: str | None = None,
    **settings: Unpack[Scheduled],
) -> dict[str, Any]:
    """Networks pruned and trained to every ratio of a list, by criteria and seeds, saved in `out` with a page.

    `how` is "oneshot" (each ratio from the dense network: prune, fine-tune), "iterative" (each from the one before) or
    "lottery" (each from the one before, rewound to the weights before training, or after `rewind` epochs, and trained
    anew). Ratios ascend, and are fractions removed of the dense network's units or, with a `scope` ("global", "layer",
    "row" or N:M), of its weights without the layers `exclude`. `options` holds options by criterion.

    Settings are those of `sukashi.train`, and `calibration` (images a class for the criteria). They hold for the dense
    network, where none was given, and for every level; where levels are fine-tuned (oneshot, iterative) it is with a
    tenth of the learning rate that is usual, unless `lr` is given. With `enforce_mask=False` the weights a mask removes
    are zero at the start of a level only. Seeds count from 0, and are added to the setting `seed`.

    Levels that are there are kept and a training that was interrupted goes on: the same call ends in the same networks.
    Each is a saved folder, as in `out/magnitude/0/0.50` (criterion, seed, ratio); `sukashi.load` rebuilds it.

    Returns {"dense_accuracy", "levels": [{"contender", "ratio", "accuracy", "difference", "removed", "zeros"}],
    "pairs": [{"first", "second", "ratio", "difference"}], "notes", "out", "report"}. Accuracy and differences (from the
    dense network of the same seed; of two contenders at the same ratio) are {"mean", "low", "high"}, for new seeds and
    new images. `removed` is the mean fraction removed, `zeros` that of weights which are zero in the end. Under
    torchrun all processes but the first get an empty dictionary.

    Raises UsageError for settings that contradict each other and a folder of another study, and whatever loading,
    criteria and training raise.
    """
    given: dict[str, Any] = dict(settings)
    reading: Any = {name: given.pop(name) for name in list(given) if name in Reading.__annotations__}
    enforced = given.pop("enforce_mask", True)
    rewinds = schedules[how].facts["rewinds"]
    trains = {}
    if rewinds or Source(model, data, **reading).untrained:
        trains["training"] = settings_of(given, Training, _KEYWORDS)
    if not rewinds:
        trains["finetuning"] = settings_of(given, Finetuning, _KEYWORDS)
    asked = {
        "schedule": how,
        "criteria": _listed(criteria),
        "ratios": _listed(ratios),
        "scope": scope,
        "exclude": _listed(exclude),
        "round_to": round_to,
        "seeds": seeds,
        "enforce_mask": [enforced],
        "rewind": rewind,
        "options": {name: dict(chosen) for name, chosen in (options or {}).items()},
    }
    course = checked(Course, asked | trains)
    return run(model, data, course, out=out, memory=memory, command=command or "sukashi.schedule(...)", **reading)


def _listed(given: Any) -> Any:
    """What can be made a list; a name is none, though its letters could be one."""
    return list(given) if isinstance(given, Iterable) and not isinstance(given, str) else given


def _fits(setting: Setting, course: Course, given: bool) -> list[str]:
    """Refuse what does not fit the model or the data before hours of training; what is to be known of the data.

    Raises UsageError for layers that a pattern cannot group, and whatever sampling and training refuse.
    """
    model, data = setting.loaded.model, setting.data
    if course.scope is not None:
        shapes = {site.layer: sparsity.weight_of(model, site).shape for site in setting.found.sites}
        sparsity.check_shapes(course.scope, shapes)
    data.train.calibration(setting.source.calibration, 0)
    notes = dict.fromkeys(data.notes)
    for chosen in course.used(given).values():
        train, validation, made = splits(data, chosen)
        check_training(chosen, train, validation, setting.loaded, tensorboard=False)
        notes |= dict.fromkeys(made)
    return list(notes)


class _Walker:
    """One seed on its way through all levels of all contenders; leaves a folder for each."""

    def __init__(
        self, setting: Setting, course: Course, seed: int, out: Path, given: bool, command: str, shown: progress.Task
    ) -> None:
        self.setting, self.course, self.seed, self.out = setting, course, seed, out
        self.given, self.command, self.shown = given, command, shown
        self.memory = loop.MEMORY
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
        under_way = home.with_name(f"{home.name}.training")
        if (home / models.RECIPE).exists():
            network = models.load(self.start.spec, weights=home)
            network.model.to(self.setting.device)
        else:
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
        if progress.first():
            shutil.rmtree(under_way, ignore_errors=True)
        self.shown.advance()
        return network

    def fit(self, network: Loaded, training: Training, out: Path, until: int | None = None) -> Fitted:
        seeded = training.model_copy(update={"seed": training.seed + self.seed})
        source = self.setting.source
        return fit(
            network,
            self.setting.data,
            seeded,
            out=out,
            device=self.setting.device,
            workers=source.workers,
            memory=self.memory,
            until=until,
        )

    def prune(self, criterion: str, network: Loaded, ratio: float) -> Loaded:
        """The network without that fraction of the dense one's units or weights."""
        course, setting = self.course, replace(self.setting, loaded=network)
        options = course.options.get(criterion, {})
        if course.scope is not None:
            mask = pruning.weight_mask(
                *(network, setting.found.sites, setting.calibration(self.seed), criterion, ratio, course.scope),
                generator=torch.Generator().manual_seed(self.seed),
                options=options,
            )
            return pruning.sparse(network, mask)
        now = sites.find(network.model, setting.example)
        n_now = sum(site.n_units for site in now.sites)
        plan = plan_for(replace(setting, found=now), criterion, self.seed, options=options)
        further = max(0.0, 1 - (1 - ratio) * self.n_units / n_now)
        return pruning.cut(network, pruning.round_mask(plan, further, course.round_to))

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
            "parameters": cost.n_parameters(network.model),
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
        saved.save(home, named, provenance=provenance, figures=figures, files={CORRECT: packed.getvalue()})

    def removed(self, network: Loaded, mask: Mask | None) -> float:
        """The fraction of the dense network's units, or of the weights in scope, that was removed."""
        if self.course.scope is not None:
            return 0.0 if mask is None else mask.n_removed / mask.n_units
        now = sum(site.n_units for site in sites.find(network.model, self.setting.example).sites)
        return 1 - now / self.n_units


def _home(out: Path, contender: str, seed: object) -> Path:
    return out / contender.replace("/", "-") / str(seed)


def _named(ratio: float) -> str:
    """The folder of a ratio, with two digits or as many as tell it from every other."""
    return max(f"{ratio:.2f}", repr(ratio), key=len)


def _places(folder: Path, course: Course) -> Iterator[tuple[str, int, float, Path]]:
    """Contender, seed, ratio and folder of every level, dense ones first."""
    for seed in range(course.seeds):
        yield "dense", seed, 0.0, _home(folder, "dense", seed)
    for name in course.contenders:
        for ratio in course.ratios:
            for seed in range(course.seeds):
                yield name, seed, ratio, _home(folder, name, seed) / _named(ratio)


def collect(folder: Path, course: Course) -> list[Level]:
    """Every level in the folder of a study, dense ones first."""
    found = []
    for contender, seed, ratio, home in _places(folder, course):
        with np.load(home / CORRECT, allow_pickle=False) as arrays:
            correct = np.unpackbits(arrays["correct"], count=int(arrays["n"])).astype(bool)
        found.append(Level(contender, seed, ratio, correct, models.read_recipe(home / models.RECIPE).figures))
    return found
