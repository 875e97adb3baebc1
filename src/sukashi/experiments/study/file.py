"""Study files: TOML that names several experiments.

A comparison for each of several models; its keys are the fields of `ComparisonFile`:

    out = "../runs/mine"             where results go; a folder for each model in it
    data = "$SUKASHI_DATA/cifar10"   a dataset's name or folder
    criteria = ["magnitude", "lrp"]
    sampling = ["random", "clustering"]
    pairs = [["lrp", "magnitude"]]   contenders whose difference the page tells, first minus second

    [models.resnet]
    spec = "sukashi:cifar_resnet20"
    weights = "$SUKASHI_WEIGHTS/resnet20-cifar10.safetensors"

    [options.lrp]                    options of a criterion
    [environment]                    what a $VARIABLE is where the environment does not set it
    SUKASHI_DATA = "../../shared/data"

A criterion that refuses a model (ModelError) is left out for it and the page says why.

With a key `schedule` one network, in the table [model], pruned and trained to several levels: its keys are the fields
of `ScheduleFile`, with tables [training] and [finetuning]. That is one experiment, and lies in `out` itself.

With tables [experiments.NAME] any experiments, one after the other:

    out = "../runs/mine"
    data = "digits"                  shared by all that have such a setting
    [experiments.dense]
    kind = "train"
    model = "sukashi:digits_cnn"
    [experiments.half]
    kind = "prune"
    model = "$OUT/dense"
    criterion = "drift"
    ratio = 0.5

Paths are relative to the file.
"""

from __future__ import annotations

import itertools
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sukashi.core.bounded import MAX_DEPTH
from sukashi.core.bounded import read as content_of
from sukashi.core.errors import UsageError, nearest
from sukashi.core.schema import Settings, checked, option_of
from sukashi.criteria import criteria as registry
from sukashi.criteria.calibration import SAMPLINGS
from sukashi.experiments.compare.contenders import name_of
from sukashi.experiments.compare.run import samplings_of
from sukashi.experiments.compare.settings import Contest
from sukashi.experiments.kinds import kinds
from sukashi.experiments.reading import Architecture, Calibrated, Images, Pixels
from sukashi.experiments.schedule.settings import Course, Scheduled
from sukashi.experiments.study.settings import (
    ComparisonFile,
    ExperimentsFile,
    ModelTable,
    ScheduleFile,
    Study,
    StudyFile,
)
from sukashi.repairs import NONE, repairs

# What stands in a path for the study's own folder, which need not be there yet.
OUT = re.compile(r"\$OUT\b")
_MAX_BYTES = 2**20


def read(
    path: str | Path,
    *,
    out: str | Path | None = None,
    data: str | None = None,
    device: str | None = None,
    workers: int | None = None,
) -> Study | Scheduled:
    """What a file asks for; `out`, `data`, `device` and `workers` replace the file's.

    Raises UsageError for a file that breaks a rule.
    """
    path = Path(path).expanduser()
    said = {"data": data, "device": device, "workers": workers}
    given = _toml(path) | ({} if out is None else {"out": str(out)})
    replaced = {name: value for name, value in said.items() if value is not None}
    if "experiments" in given:
        return _experiments(path, given, replaced, out is not None)
    given |= replaced
    place = _Places(path, given.get("environment", {}), out is not None)
    if "schedule" in given:
        return _levels(_course(path, given), place, data)
    return _comparisons(path, _grid(path, given), place, data)


def experiments() -> dict[str, type[Settings]]:
    """The kinds that a file may list: those that leave a folder."""
    return {name: kind for name, kind in kinds().items() if "out" in kind.model_fields}


def _comparisons(path: Path, file: ComparisonFile, place: _Places, data: str | None) -> Study:
    shared = {name: getattr(file, name) for name in (*Contest.model_fields, *Calibrated.model_fields)}
    shared |= {"kind": "compare", "skip_refused": True, **_images(file, place, data)}
    return Study(
        out=place.out(file.out),
        title=file.title or path.stem,
        pairs=file.pairs,
        experiments={
            name: {**shared, "model": model.spec, **_architecture(model, place)} for name, model in file.models.items()
        },
    )


def _levels(file: ScheduleFile, place: _Places, data: str | None) -> Scheduled:
    # What the file does not say stays unsaid: a course refuses settings that would do nothing.
    course = file.model_dump(include=set(Course.model_fields), exclude_unset=True)
    more = {"model": file.model.spec, "out": place.out(file.out), "calibration": file.calibration}
    return checked(
        Scheduled, {**course, **more, **_architecture(file.model, place), **_images(file, place, data)}, file=place.file
    )


def _experiments(path: Path, given: Mapping[str, Any], replaced: Mapping[str, Any], said: bool) -> Study:
    own = {name: given[name] for name in given if name in ExperimentsFile.model_fields}
    shared = {name: value for name, value in given.items() if name not in own} | dict(replaced)
    file = checked(ExperimentsFile, own, file=path, options=("out",))
    place = _Places(path, file.environment, said)
    found, used = {}, set()
    for name, table in file.experiments.items():
        _check_name(path, name)
        kind = table.get("kind")
        if kind not in experiments():
            raise UsageError(f"{path}: kind of [experiments.{name}] must be one{nearest(str(kind), experiments())}")
        fields = experiments()[kind].model_fields
        used |= {key for key in shared if key in fields}
        asked = {key: value for key, value in shared.items() if key in fields} | table
        asked = {key: place.value(key, value, fields) for key, value in asked.items() if key != "kind"}
        checked(experiments()[kind], {**asked, "out": "out"}, file=f"{path}, [experiments.{name}]")
        found[name] = {"kind": kind, **asked}
    for key in shared:
        if key not in used:
            known = {
                *ExperimentsFile.model_fields,
                *(key for kind in experiments().values() for key in kind.model_fields),
            }
            raise UsageError(f"{path} has an unknown key {key!r}{nearest(key, sorted(known))}")
    return Study(out=place.out(file.out), title=file.title or path.stem, experiments=found)


def _images(file: StudyFile, place: _Places, data: str | None) -> dict[str, Any]:
    """How the images are read."""
    return {name: getattr(file, name) for name in Images.model_fields} | {
        "data": place.data(file.data) if data is None else data
    }


def _architecture(model: ModelTable, place: _Places) -> dict[str, Any]:
    given = {name: getattr(model, name) for name in (*Architecture.model_fields, *Pixels.model_fields)}
    return given | {"weights": None if model.weights is None else place.path(model.weights)}


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(_flat(content_of(path, _MAX_BYTES).decode()))
    except OSError as error:
        raise UsageError(f"cannot read {path} ({error.strerror}): give a study file") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is no TOML ({error}): see the studies that come with sukashi") from None


def _flat(text: str) -> str:
    """The same text. Raises ValueError for a key of so many parts that reading it would take hours."""
    parts = (part for line in text.splitlines() for part in re.split(r"[=,\[\]{}#]", line))
    if any(part.count(".") > MAX_DEPTH for part in parts):
        raise ValueError(f"a key has more than {MAX_DEPTH} parts")
    return text


def _course(path: Path, given: Mapping[str, Any]) -> ScheduleFile:
    if "models" in given:
        raise UsageError(f"{path} has a schedule, and so one model: write [model] in place of [models.NAME]")
    return checked(ScheduleFile, given, file=path, options=("out", "data"))


def _grid(path: Path, given: Mapping[str, Any]) -> ComparisonFile:
    if "model" in given:
        raise UsageError(f"{path} has no schedule, and so compares models: write [models.NAME] in place of [model]")
    file = checked(ComparisonFile, given, file=path, options=("out", "data"))
    if not file.models:
        raise UsageError(f"{path} has no model: add a table [models.NAME] with its spec")
    for name in file.models:
        _check_name(path, name)
    mended = {name: repairs.named(name) for name in file.repair if name != NONE}
    compared = {
        name_of(registry.named(name), how, repair)
        for name in file.criteria
        for how in samplings_of(name, file.sampling)
        for repair in (NONE, *mended.values())
    }
    pairs = [[_contender(name, mended) for name in pair] for pair in file.pairs]
    for contender in itertools.chain.from_iterable(pairs):
        if contender not in compared:
            raise UsageError(
                f"{path} pairs {contender!r}, which it does not compare{nearest(contender, sorted(compared))}"
            )
    return file.model_copy(update={"pairs": pairs})


def _contender(name: str, mended: Mapping[str, str]) -> str:
    """A contender by the name that its criterion has in results, and its repair, of those that are `mended` with."""
    for repair in {**mended, **{of: of for of in mended.values()}}:
        if name.endswith(f"+{repair}"):
            return f"{_contender(name.removesuffix(f'+{repair}'), {})}+{mended.get(repair, repair)}"
    criterion, slash, sampling = name.rpartition("/")
    if sampling not in SAMPLINGS:  # a slash may stand in the brackets of a criterion's options
        criterion, slash, sampling = name, "", ""
    try:
        return f"{registry.named(criterion)}{slash}{sampling}"
    except UsageError:  # what is no criterion is not compared
        return name


def _check_name(path: Path, name: str) -> None:
    if not re.fullmatch(r"[\w-]+", name):
        raise UsageError(f"{path}: such a name becomes a folder, so it must be letters, digits, _ or -: {name!r}")
    if name in ("trials", "figures", "tables"):
        raise UsageError(f"{path}: {name!r} is a folder of the study's own: choose another name")


class _Places:
    """Paths of a study file: variables filled in, then relative to the file."""

    def __init__(self, path: Path, defaults: dict[str, str], said: bool) -> None:
        """`said` is whether the folder for results was given by the caller, and not by the file."""
        self.file, self.defaults, self.said = path, defaults, said

    def path(self, text: str) -> str:
        # Absolute: trials are found again wherever the study is run from.
        return str((self.file.parent / Path(re.sub(r"\$(\w+)", self._value, text)).expanduser()).resolve())

    def out(self, text: str) -> str:
        return text if self.said else self.path(text)

    def value(self, key: str, value: Any, fields: Mapping[str, Any]) -> Any:
        """A setting with its paths filled in: files and folders, data, and models that are folders."""
        if isinstance(value, list) and key == "models":
            return [self._model(part, fields) for part in value]
        if isinstance(value, list):
            return [self.value(key, part, fields) for part in value]
        if not isinstance(value, str) or OUT.match(value):
            return value
        if key in ("model", "data"):
            return self.data(value)
        return self.path(value) if key in fields and option_of(fields[key]).path else value

    def _model(self, text: str, fields: Mapping[str, Any]) -> str:
        """A model of several: SPEC=WEIGHTS has a path in it."""
        whole = not OUT.search(text) and Path(self.path(text)).exists()
        parts = [text] if whole else text.split("=", 1)
        return "=".join(self.value("model", part, fields) for part in parts)

    def data(self, text: str) -> str:
        """A dataset's folder where there is one, else its name."""
        return self.path(text) if "$" in text or Path(self.path(text)).exists() else text

    def _value(self, variable: re.Match[str]) -> str:
        name = variable[1]
        if name in os.environ:
            return str(Path(os.environ[name]).absolute())
        if name in self.defaults:
            return str((self.file.parent / self.defaults[name]).absolute())
        raise UsageError(f"{self.file} uses ${name}, which is not set: set it, or give it under [environment]")
