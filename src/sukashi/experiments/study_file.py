"""Study files: one comparison for each model of a TOML file, and one page about all of them.

    out = "../runs/mine"             where results go; a folder for each model in it
    data = "$SUKASHI_DATA/cifar10"   a dataset's name or folder
    criteria = ["magnitude", "lrp"]
    sampling = ["random", "clustering"]    and ratios, seeds, calibration, test_images, mode, margin as in `compare`
    pairs = [["lrp", "magnitude"]]   contenders whose difference the page tells, first minus second

    [models.resnet]                  keywords of `models.load`, and `spec`
    spec = "sukashi:cifar_resnet20"
    weights = "$SUKASHI_WEIGHTS/resnet20-cifar10.safetensors"

    [options.lrp]                    options of a criterion
    [environment]                    what a $VARIABLE is where the environment does not set it
    SUKASHI_DATA = "../../shared/data"

Paths are relative to the file. A criterion that refuses a model (ModelError) is left out for it and the page says why.

A file with a `schedule` prunes and trains one network to several levels instead, see `levels`: its keys are those of a
`levels.Course` (and in its tables [training] and [finetuning] those of a `training.Training`), beside

    out, data, only, calibration, test_images, title
    [model]                          as above, one
    spec = "torchvision:resnet18"
"""

from __future__ import annotations

import itertools
import os
import re
import tomllib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from sukashi.core import files, progress
from sukashi.core.errors import UsageError
from sukashi.core.registry import nearest
from sukashi.core.schema import checked
from sukashi.experiments import pages
from sukashi.experiments.bench import CALIBRATION, TEST_IMAGES, Reading, Source
from sukashi.experiments.compare.run import RATIOS, compare, samplings_of
from sukashi.experiments.compare.store import Store
from sukashi.experiments.schedule import run as levels
from sukashi.experiments.schedule.settings import Course
from sukashi.measures.curves import MARGIN, THRESHOLDS, difference

_OUT, _DATA = Field(examples=["../runs/mine"]), Field(examples=["digits"])
_SPEC = "sukashi:digits_cnn"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class _Model(_Strict):
    spec: str = Field(examples=[_SPEC])
    weights: str | None = None
    width: int | None = None
    n_classes: int | None = None
    pretrained: bool = False
    output: str | None = None


class _Levels(Course):
    out: str = _OUT
    data: str = _DATA
    model: _Model = Field(examples=[{"spec": _SPEC}])
    title: str = ""
    only: list[str] | None = None
    calibration: int = CALIBRATION
    test_images: int = TEST_IMAGES
    environment: dict[str, str] = Field(default_factory=dict)


class _File(_Strict):
    out: str = _OUT
    data: str = _DATA
    criteria: list[str] = Field(examples=[["magnitude"]])
    models: dict[str, _Model] = Field(examples=[{"NAME": {"spec": _SPEC}}])
    title: str = ""
    sampling: list[str] = ["random"]
    ratios: list[float] = list(RATIOS)
    seeds: int = 3
    calibration: int = CALIBRATION
    test_images: int = TEST_IMAGES
    mode: str = "cut"
    margin: float = MARGIN
    pairs: list[Annotated[list[str], Field(min_length=2, max_length=2)]] = []
    options: dict[str, dict[str, Any]] = {}
    environment: dict[str, str] = {}


def run(
    path: str | Path,
    *,
    out: str | Path | None = None,
    data: str | None = None,
    device: str = "auto",
    workers: int = 0,
    command: str | None = None,
) -> dict[str, Any]:
    """What `compare` returns for each model of a study file, and differences of pairs; with one page in `out`.

    `out` and `data` replace the file's. Finished trials are kept: an interrupted study goes on when it is run again.

    Returns {"models": {name: what compare returns}, "pairs": [{"model", "first", "second", "mean", "low", "high"}],
    "out", "report"}; a pair's numbers are of its mean accuracy at curves.THRESHOLDS, first minus second.

    Raises UsageError for a file that breaks a rule, and whatever `compare` raises; a model that cannot be loaded, or
    does not fit the data, is refused before the first one is compared.
    """
    path = Path(path)
    replaced = {name: str(value) for name, value in (("out", out), ("data", data)) if value is not None}
    given = _toml(path) | replaced
    said = command or f"sukashi study {path}"
    if "schedule" in given:
        return _levels(path, _course(path, given), out, data, device, workers, said)
    file = _grid(path, given)
    place = _Places(path, file.environment)
    folder = place.path(file.out) if out is None else Path(out)
    data = place.data(file.data) if data is None else data
    about: Reading = {
        "calibration": file.calibration,
        "test_images": file.test_images,
        "device": device,
        "workers": workers,
    }
    readings: dict[str, Reading] = {name: {**_model(model, place), **about} for name, model in file.models.items()}
    # The first is opened right away; what is wrong with a later one is not to show after hours of work.
    for name in list(readings)[1:]:
        if not (folder / name).exists():
            with warnings.catch_warnings(action="ignore"):  # it is said when the model's turn comes
                Source(file.models[name].spec, data, **readings[name]).open()
    results: dict[str, Any] = {}
    with progress.task("models", len(file.models)) as shown:
        for name, model in file.models.items():
            shown.advance(0, note=name)
            results[name] = compare(
                model.spec,
                data,
                file.criteria,
                out=folder / name,
                ratios=file.ratios,
                seeds=file.seeds,
                sampling=file.sampling,
                mode=file.mode,
                margin=file.margin,
                options=file.options,
                skip_refused=True,
                command=said,
                **readings[name],
            )
            shown.advance()
    pairs = [
        _pair(name, Store(results[name]["out"]), first, second) for name in results for first, second in file.pairs
    ]
    page = pages.write_grid(
        folder,
        title=file.title or path.stem,
        results=results,
        pairs=pairs,
        mode=file.mode,
        command=said,
    )
    result = {"models": results, "pairs": pairs, "out": str(folder), "report": str(page)}
    files.write(folder / "results.json", files.canonical(result, indent=1) + b"\n")
    return result


def _levels(
    path: Path, file: _Levels, out: str | Path | None, data: str | None, device: str, workers: int, command: str
) -> dict[str, Any]:
    place = _Places(path, file.environment)
    own = set(_Levels.model_fields) - set(Course.model_fields)
    about: Reading = {
        "only": file.only,
        "calibration": file.calibration,
        "test_images": file.test_images,
        "device": device,
        "workers": workers,
    }
    reading: Reading = {**_model(file.model, place), **about}
    return levels.run(
        file.model.spec,
        place.data(file.data) if data is None else data,
        # What the file does not say stays unsaid: a course refuses settings that would do nothing.
        Course.model_validate(file.model_dump(exclude=own, exclude_unset=True)),
        out=place.path(file.out) if out is None else out,
        title=file.title,
        command=command,
        **reading,
    )


def _model(model: _Model, place: _Places) -> Reading:
    return {
        "weights": None if model.weights is None else place.path(model.weights),
        "width": model.width,
        "n_classes": model.n_classes,
        "pretrained": model.pretrained,
        "output": model.output,
    }


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"cannot read {path} ({error.strerror}): give a study file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no TOML ({error}): see the studies that come with sukashi") from None


def _course(path: Path, given: Mapping[str, Any]) -> _Levels:
    if "models" in given:
        raise UsageError(f"{path} has a schedule, and so one model: write [model] in place of [models.NAME]")
    return checked(_Levels, given, file=path, options=("out", "data"))


def _grid(path: Path, given: Mapping[str, Any]) -> _File:
    if "model" in given:
        raise UsageError(f"{path} has no schedule, and so compares models: write [models.NAME] in place of [model]")
    file = checked(_File, given, file=path, options=("out", "data"))
    if not file.models:
        raise UsageError(f"{path} has no model: add a table [models.NAME] with its spec")
    for name in file.models:
        if not re.fullmatch(r"[\w-]+", name):
            raise UsageError(
                f"{path}: a model's name becomes a folder, so it must be letters, digits, _ or -: {name!r}"
            )
    compared = {
        name if how == "random" else f"{name}/{how}"
        for name in file.criteria
        for how in samplings_of(name, file.sampling)
    }
    for contender in itertools.chain.from_iterable(file.pairs):
        if contender not in compared:
            raise UsageError(
                f"{path} pairs {contender!r}, which it does not compare{nearest(contender, sorted(compared))}"
            )
    return file


class _Places:
    """Paths of a study file: variables filled in, then relative to the file."""

    def __init__(self, path: Path, defaults: dict[str, str]) -> None:
        self.file = path
        self.defaults = defaults

    def path(self, text: str) -> Path:
        # Absolute: trials are found again wherever the study is run from.
        return (self.file.parent / Path(re.sub(r"\$(\w+)", self._value, text)).expanduser()).resolve()

    def data(self, text: str) -> str:
        """A dataset's folder where there is one, else its name."""
        folder = self.path(text)
        return str(folder) if folder.exists() or "$" in text else text

    def _value(self, variable: re.Match[str]) -> str:
        name = variable[1]
        if name in os.environ:
            return str(Path(os.environ[name]).absolute())
        if name in self.defaults:
            return str((self.file.parent / self.defaults[name]).absolute())
        raise UsageError(f"{self.file} uses ${name}, which is not set: set it, or give it under [environment]")


def _pair(model: str, kept: Store, first: str, second: str) -> dict[str, Any]:
    curves = {
        name: {r.trial.seed: r.curve() for r in kept.finished() if r.trial.contender == name}
        for name in (first, second)
    }
    seeds = sorted(set(curves[first]) & set(curves[second]))
    about = {"model": model, "first": first, "second": second}
    found = difference(
        [curves[first][seed] for seed in seeds],
        [curves[second][seed] for seed in seeds],
        THRESHOLDS,
    )
    if found is None:
        return {**about, "mean": None, "low": None, "high": None}
    return {**about, "mean": found.mean, "low": found.low, "high": found.high}
