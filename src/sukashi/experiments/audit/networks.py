"""The networks of an audit, on the same test images: what each gets right, and on which images it is looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sukashi import models
from sukashi.core import progress
from sukashi.core.errors import DataError, UsageError
from sukashi.core.files import canonical
from sukashi.core.objective import Objective
from sukashi.core.types import Batch, Preprocess
from sukashi.experiments.audit.settings import Audit
from sukashi.experiments.bench import Bench, Source
from sukashi.experiments.reading import Architecture
from sukashi.experiments.workspace import Record
from sukashi.measures import accuracy, classwise
from sukashi.models import Loaded
from sukashi.repairs import NONE

POPULATIONS = {
    "both": "the reference and the model get right",
    "reference": "the reference gets right",
    "all": "there are",
}
# Below so many images nothing is said of a model: with 20 pairs a t test at 5 % finds four times in five a mean of .66
# standard deviations of the differences (Cohen 1988), and smaller ones less often.
FEW = 20
TOLD = ("label", "series", "ratio", "trained", "repair", "weights_sha256")  # of a model, beside its answers


@dataclass(frozen=True)
class Answers:
    """What a model of the audit answers.

    `label` is its column's name; `series`, `ratio` and `repair` say what pruned it, how far, and what mended it (or
    None), `trained` says whether it was trained after it was cut, as its recipe tells; `weights_sha256` is that of the
    file of its weights, where it has one. `right` (N,) says which of the test images it gets right, `rows` are those on
    which it is audited; `image_ids` (N,) and `target` (N,) are the same for all models. `identity` is what decides its
    answers, `areas` (N,) for each concept the share of an image's pixels it has, where the data know.
    """

    label: str
    series: str | None
    ratio: float | None
    trained: bool
    repair: str | None
    weights_sha256: str | None
    class_names: tuple[str, ...]
    identity: Mapping[str, Any]
    image_ids: tuple[str, ...]
    target: NDArray[np.int64]
    right: NDArray[np.bool_]
    rows: NDArray[np.int64]
    areas: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)

    @property
    def guesses(self) -> bool:
        """Whether it is not shown to know the classes of the test images, see `classwise.guesses`."""
        return classwise.guesses(self.right, self.target, len(self.class_names))

    @property
    def images_of_class(self) -> dict[str, int]:
        """How many of the images on which it is audited each class has."""
        counts = (self.target[self.rows] == np.arange(len(self.class_names))[:, None]).sum(axis=1)
        return dict(zip(self.class_names, counts.tolist(), strict=True))

    @property
    def tested_of_class(self) -> dict[str, int]:
        """How many of the test images each class has."""
        counts = (self.target == np.arange(len(self.class_names))[:, None]).sum(axis=1)
        return dict(zip(self.class_names, counts.tolist(), strict=True))

    @property
    def spoken_of(self) -> bool:
        """Whether sentences may speak of it: it knows the classes, and has images enough."""
        return not (self.guesses or self.few)

    @property
    def right_of_class(self) -> dict[str, float]:
        """Which share of the test images of each class it gets right."""
        shares = (self.right[self.target == number] for number in range(len(self.class_names)))
        return {name: float(share.mean()) for name, share in zip(self.class_names, shares, strict=True)}

    @property
    def few(self) -> bool:
        """Whether the images it is audited on are too few to say anything of it."""
        return len(self.rows) < FEW


def packed(answers: Sequence[Answers]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Plain facts of each model and arrays, from which `unpacked` makes the answers again."""
    facts = [{name: getattr(one, name) for name in TOLD} for one in answers]
    for fact, one in zip(facts, answers, strict=True):
        fact |= {"identity": dict(one.identity), "class_names": list(one.class_names)}
    arrays: dict[str, Any] = {
        "image_ids": np.array(answers[0].image_ids, dtype=np.str_),
        "target": answers[0].target,
        "right": np.stack([one.right for one in answers]),
        **{f"rows {i}": one.rows for i, one in enumerate(answers)},
        **{f"area {concept}": of_images for concept, of_images in answers[0].areas.items()},
    }
    return facts, arrays


def unpacked(facts: Sequence[Mapping[str, Any]], arrays: Mapping[str, NDArray[Any]]) -> list[Answers]:
    return [
        Answers(
            **{name: fact[name] for name in (*TOLD, "identity")},
            class_names=tuple(fact["class_names"]),
            image_ids=tuple(arrays["image_ids"].tolist()),
            target=arrays["target"],
            right=arrays["right"][i],
            rows=arrays[f"rows {i}"],
            areas={name.removeprefix("area "): of for name, of in arrays.items() if name.startswith("area ")},
        )
        for i, fact in enumerate(facts)
    ]


@dataclass(frozen=True)
class Network:
    """A model of the audit at work: its answers, and the batch of test images as it sees them."""

    answers: Answers
    setting: Bench
    batch: Batch

    @property
    def label(self) -> str:
        return self.answers.label

    @property
    def rows(self) -> NDArray[np.int64]:
        return self.answers.rows

    @property
    def loaded(self) -> Loaded:
        return self.setting.loaded

    @property
    def identity(self) -> Mapping[str, Any]:
        return self.answers.identity

    @property
    def about(self) -> dict[str, Any]:
        """What decides any figure of it on all test images."""
        return {
            "network": self.identity,
            "data": self.setting.data.sha256,
            "images": list(self.batch.image_id),
        }

    @property
    def some(self) -> Tensor:
        """Two images, where the network is."""
        return self.batch.x[:2].to(self.setting.device)

    def training(self, n_per_class: int, seed: int) -> Batch:
        """So many training images of each class, drawn by seed and sorted by class, where the network is."""
        chosen = self.setting.data.train.calibration(n_per_class, seed)
        return chosen.whole(self.loaded.preprocess, self.setting.source.workers).by_class().to(self.setting.device)


def by_label(records: Sequence[Record], artefact: str) -> dict[str, list[Record]]:
    """The trials of each network that have left an artefact; networks that are the same one share theirs."""
    found: dict[bytes, list[Record]] = {}
    for record in records:
        if record.has(artefact):
            found.setdefault(canonical(record.about["network"]), []).append(record)
    return {model["label"]: found[canonical(model["identity"])] for model in records[0].result["models"]}


def per_class(one: Network, wanted: int, least: int = 8) -> int:
    """How many training images each class has, `wanted` at most. DataError for a class of fewer than `least`."""
    counts = one.setting.data.train.counts
    fewest = int(counts.argmin())
    if counts[fewest] < least:
        raise DataError(
            f"{one.answers.class_names[fewest]} has {int(counts[fewest])} training images, this audit needs {least} of "
            "each class: give more data, or the other classes by `only`"
        )
    return min(wanted, int(counts[fewest]))


def opened(asked: Audit) -> list[Network]:
    """The models on the same test images, and on which of them each is audited."""
    specs, population = asked.models, asked.population
    sources = _sources(asked)
    source = sources[0]
    early = [own.early() for own in sources]
    images = source.read()
    batches: dict[tuple[Preprocess, Objective], Batch] = {}
    found: list[Network] = []
    with progress.task("models", len(specs)) as shown:
        for spec, label, own, model in zip(specs, labels(specs), sources, early, strict=True):
            setting = own.beside(images, model)
            preprocess = setting.loaded.preprocess
            size, first = size_of(preprocess), size_of(found[0].loaded.preprocess if found else preprocess)
            if size != first:
                raise UsageError(
                    f"{label} reads images of {size[0]} x {size[1]} pixels and {found[0].label} of {first[0]} x "
                    f"{first[1]}: maps of different sizes can't be compared, audit them apart"
                )
            test = setting.data.test
            if (key := (preprocess, test.objective)) not in batches:
                batches[key] = test.limit(source.test_images).whole(preprocess, source.workers)
            batch = batches[key]
            right = accuracy.evaluate(setting.loaded.model, batch)[0].astype(bool)
            of_reference = found[0].answers.right if found else right
            kept = {"both": of_reference & right, "reference": of_reference, "all": np.ones_like(right)}[population]
            if not kept.any():
                whose = label if found or population != "both" else "any other model"
                raise DataError(
                    f"there is no test image to audit {whose} on, of {len(right)}, that "
                    f"{POPULATIONS[population]}: give more `test_images` or another `population`"
                )
            loaded = setting.loaded
            answers = Answers(
                label=label,
                **_level(spec),
                weights_sha256=loaded.weights_sha256,
                class_names=images.class_names,
                identity={
                    "spec": loaded.spec,
                    "options": dict(loaded.options),
                    "preprocess": asdict(loaded.preprocess),
                    "weights": models.digest(loaded.model),
                },
                image_ids=batch.image_id,
                target=batch.target.numpy(),
                right=right,
                rows=np.flatnonzero(kept),
            )
            found.append(Network(answers, setting, batch))
            shown.advance(note=label)
    return found


def _sources(asked: Audit) -> list[Source]:
    """Each model by its name, with the weights that all share, or with its own."""
    parts = [parted(model) for model in asked.models]
    whole = [Path(own or spec).is_dir() or models.given_loaded(spec) is not None for spec, own in parts]
    given = [name for name in Architecture.model_fields if getattr(asked, name)]
    bring = all(own or is_whole for (_, own), is_whole in zip(parts, whole, strict=True))
    idle = given if all(whole) else [name for name in given if name == "weights" and bring]
    if idle:
        raise UsageError(f"the models bring their own `{idle[0]}`, as saved folders do: leave it out")
    without = asked.model_copy(update=dict(Architecture()))
    return [
        Source.of(without if is_whole else asked, model=spec, **({} if own is None else {"weights": own}))
        for (spec, own), is_whole in zip(parts, whole, strict=True)
    ]


def parted(model: str) -> tuple[str, str | None]:
    """A spec and its own weights, of SPEC=WEIGHTS; of anything else itself and None.

    Raises UsageError where one of them is missing.
    """
    spec, equals, own = model.partition("=")
    if not equals or Path(model).is_dir():
        return model, None
    if not spec or not own:
        raise UsageError(f"a model with weights of its own is SPEC=FOLDER or SPEC=FILE, got {model!r}")
    return spec, own


def size_of(preprocess: Preprocess) -> tuple[int, int]:
    return preprocess.height, preprocess.width


def labels(specs: Sequence[str]) -> list[str]:
    """A short name for each model: of a path what it has and not all have, of a spec what follows its colon.

    A name without a letter, as that of a ratio, gets the folder it lies in.
    """
    places = {spec: parted(spec)[1] or spec for spec in specs}
    paths = {spec: Path(place).resolve().parts for spec, place in places.items() if Path(place).exists()}
    shared = set.intersection(*map(set, paths.values())) if paths else set()
    found: list[str] = []
    for spec in specs:
        parts = [part for part in paths.get(spec, ()) if part not in shared]
        name = "/".join(parts) or (paths[spec][-1] if spec in paths else spec.rpartition(":")[2])
        if spec in paths and not any(map(str.isalpha, name)):
            name = f"{paths[spec][-2]}/{paths[spec][-1]}"
        same = sum(known.partition(" (")[0] == name for known in found)
        found.append(f"{name} ({same + 1})" if same else name)
    return found


def _level(model: str) -> dict[str, Any]:
    """By what a saved model was pruned, how far, and what mended it, where its recipe says so; and whether it was
    trained then."""
    spec, own = parted(model)
    path, found = Path(own or spec) / models.RECIPE, {"series": None, "ratio": None, "repair": None, "trained": False}
    if not path.is_file():
        return found
    told = models.read_recipe(path).provenance
    found["trained"] = bool(told.get("trained"))
    series, ratio = told.get("contender", told.get("criterion")), told.get("ratio", told.get("ratio_asked"))
    if not isinstance(series, str) or not isinstance(ratio, int | float):
        return found
    repair = told.get("repair", NONE)
    return found | {
        "series": f"{series}, seed {told['seed']}" if told.get("seed") else series,
        "ratio": float(ratio),
        "repair": None if repair == NONE else repair,
    }
