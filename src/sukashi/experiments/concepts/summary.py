"""What subspaces respond to and how well they tell images, from their folder alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
from numpy.typing import NDArray

from sukashi.core.errors import UsageError
from sukashi.core.experiment import Columns, Result
from sukashi.decompositions.subspaces import Subspaces
from sukashi.experiments.columns import shared
from sukashi.experiments.concepts.choice import chosen
from sukashi.experiments.workspace import Record, Workspace
from sukashi.measures.precision import average_precision
from sukashi.report import words

LEAST = 10  # images that show something, for a subspace to be said to tell it


class ConceptsResult(Result):
    """Subspaces of a layer and what they respond to.

    subspaces   of each: `subspace` (its number, from 0), the `name` a person gave it, or "unit 17" of a unit, or None,
                `share` of the layer's relevance for the class in test images of it, None where there are none, and
                `tells`: for the class, and for each thing that masks show, the average precision of its relevance, its
                interval, and the share of images that have it, which a score that tells nothing reaches
    accuracy    the share of the test images that the network gets right
    changed     of contrast: the part of what the concept changes in the layer that lies in the subspace
    history     of drsa: the objective at the start and after every ten steps of each trial
    n_images    training images that they were found in; `n_test` test images, `n_own` of them of the class
    """

    kind: ClassVar[str] = "concepts"
    columns: ClassVar[Columns] = {
        **shared("model", "weights_sha256", "data", "seed"),
        "layer": (str, "the layer whose features were taken apart"),
        "of": (str, "the class for whose logit relevance is"),
        "method": (str, "what found it"),
        "subspace": (int, "the number of a subspace, from 0"),
        "share": (float, "its share of the layer's relevance for the class in test images of the class"),
        "tells": (str, "what its relevance is held against: the class, or what masks show"),
        "average_precision": (float, "of its relevance, over test images"),
        "low": (float, "lower end of its 95% interval (Boyd et al. 2013)"),
        "high": (float, "upper end"),
        "by_chance": (float, "the share of test images that have it"),
        "n_images": (int, "test images"),
    }

    model: str
    weights_sha256: str
    data: str
    seed: int
    layer: str
    of: str
    method: str
    n_dimensions: int
    n_images: int
    n_test: int
    n_own: int
    accuracy: float
    changed: float | None
    subspaces: list[dict[str, Any]]
    pictures: list[dict[str, Any]]
    history: list[list[float]]
    verdict: str
    lines: list[str]

    def overview(self) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
        told = list(self.subspaces[0]["tells"])
        header = ["subspace", "relevance", *(f"tells {name}" for name in told)]
        rows = [
            [_named(of), _percent(of["share"]), *(_said(of["tells"][name]) for name in told)] for of in self.subspaces
        ]
        return header, rows

    def text(self) -> str:
        right = f"The network gets {words.percent(self.accuracy)} of {words.several(self.n_test, 'test image')} right."
        said = [words.table(*self.overview()), "", right, *self.remarks(), "", self.verdict, *self.lines]
        return "\n".join([*said, *words.where(self)])

    def table(self) -> list[dict[str, Any]]:
        """A row for each subspace and what it may tell."""
        about = {
            name: getattr(self, name) for name in ("model", "weights_sha256", "data", "seed", "layer", "of", "method")
        }
        rows = []
        for of in self.subspaces:
            for name, found in of["tells"].items():
                known = found or dict.fromkeys(("mean", "low", "high", "by_chance", "n"))
                row = {**about, **of, "tells": name, "average_precision": known["mean"], **known}
                row["n_images"] = self.n_test
                rows.append({column: row[column] for column in self.columns})
        return rows


def _named(of: Mapping[str, Any]) -> str:
    """A subspace's number, and the name that it was given."""
    return f"{of['subspace']} {of['name']}" if of["name"] else str(of["subspace"])


def _percent(share: float | None) -> str:
    return "–" if share is None else words.percent(share)


def _said(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "–"
    low, high = (words.number(found[name], 2) for name in ("low", "high"))
    return f"{words.number(found['mean'], 2)} ({low} to {high})"


def opened(folder: str | Path, model: Mapping[str, Any]) -> Subspaces:
    """The subspaces that an experiment found in a network, `model` as a `Bench` tells it.

    Raises UsageError for a folder that is no finished experiment of this kind, and subspaces of another network, or
    found in images that were read otherwise.
    """
    space = Workspace(folder)
    if space.about["kind"] != "concepts":
        raise UsageError(f"{folder} holds a {space.about['kind']}, not concepts: give the `out` of `sukashi.concepts`")
    record = _record(space)
    found, about, arrays = record.result, record.about, record.arrays("subspaces")
    own, theirs = json.loads(json.dumps(model)), about["model"]
    if theirs["preprocess"] != own["preprocess"]:
        raise UsageError(
            f"the subspaces in {folder} were found in images read otherwise: give the same `size`, `mean`, `std` and "
            "`resize`"
        )
    if theirs["weights_sha256"] != own["weights_sha256"]:
        raise UsageError(
            f"the subspaces in {folder} are of a network with other weights ({theirs['weights_sha256'][:12]}, these "
            f"are {own['weights_sha256'][:12]}): find those of this one by `sukashi.concepts`"
        )
    return Subspaces(
        about["layer"],
        found["axis"],
        torch.from_numpy(arrays["basis"]),
        torch.from_numpy(arrays["dual"]),
        found["n_subspaces"],
        found["n_dimensions"],
        torch.from_numpy(arrays["mean"]),
    )


def _record(space: Workspace) -> Record:
    records = space.records()
    if not records:
        raise UsageError(f"{space.folder} has no subspaces yet: give the same `sukashi.concepts` again")
    return records[0]


def summary(space: Workspace) -> ConceptsResult:
    """Raises UsageError where nothing was found yet."""
    record = _record(space)
    found, about, looked = record.result, record.about, record.arrays("looked")
    names, doubts = {k: f"unit {unit}" for k, unit in enumerate(found.get("units") or ())}, []
    try:
        names |= chosen(space).names
    except UsageError as error:  # a file that people edit by hand
        doubts.append(str(error))
    subspaces = [
        {"name": names.get(k), **_subspace(k, found["n_subspaces"], looked)} for k in range(found["n_subspaces"])
    ]
    verdict, lines = _verdict(subspaces, about, record, space)
    named = {name: found[name] for name in ("n_images", "n_test", "n_own", "accuracy", "changed", "n_dimensions")}
    return ConceptsResult(
        model=about["model"]["spec"],
        weights_sha256=about["model"]["weights_sha256"],
        data=about["data"]["spec"],
        seed=about["seed"],
        layer=about["layer"],
        of=about["of"],
        method=about["method"],
        subspaces=subspaces,
        pictures=found["pictures"],
        history=found["history"],
        verdict=verdict,
        lines=lines,
        warnings=[*doubts, *found["warnings"]],
        notes=found["notes"],
        **named,
    )


def _subspace(k: int, n: int, looked: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    whole, relevance, own = looked["relevance"][:, 0], looked["relevance"][:, 1 + k], looked["own"]
    tells = {"class": own}
    tells |= {name.partition("/")[2]: looked[name] for name in looked if name.startswith("shows/")}
    total = abs(float(whole[own].sum()))
    return {
        "subspace": k,
        "share": float(relevance[own].sum()) / total if total else None,
        "tells": {name: _tells(relevance, has, n * max(1, len(tells) - 1)) for name, has in tells.items()},
    }


def _tells(relevance: NDArray[Any], has: NDArray[Any], n_looked_at: int) -> dict[str, Any] | None:
    found, surely = (average_precision(relevance, has, level=1 - 0.05 / n) for n in (1, n_looked_at))
    if found is None or surely is None:
        return None
    by_chance = float(has.mean())
    return {**asdict(found), "by_chance": by_chance, "shown": bool(has.sum() >= LEAST and surely.low > by_chance)}


def _verdict(
    subspaces: Sequence[Mapping[str, Any]], about: Mapping[str, Any], record: Record, space: Workspace
) -> tuple[str, list[str]]:
    """What was found in a sentence, and what follows of it.

    Of what masks show in ten images at least a subspace is suspected that tells it better than chance, corrected for
    all that were looked at (Bonferroni), and that is further above chance by it than by the class, as estimated.
    """
    first = subspaces[0]
    if about["method"] == "contrast":
        d, changed = record.result["n_dimensions"], words.percent(record.result["changed"])
        part = about.get("where")
        what = f"what subspace {part['number']} of {part['layer']} sees" if part else about["concept"]
        verdict = f"{words.several(d, 'direction')} of {about['layer']} hold {changed} of what changes without {what}"
        verdict += f", and {_percent(first['share'])} of the relevance for {about['of']}."
    elif about["method"] == "units":
        n, share = words.several(len(subspaces), "unit"), _percent(sum(of["share"] or 0 for of in subspaces))
        verdict = f"{n} of {about['layer']} {'has' if len(subspaces) == 1 else 'have'} {share} of the relevance for"
        verdict += f" {about['of']}."
    else:
        whole = f"{words.several(len(subspaces), 'subspace')} of {about['layer']} share the relevance for {about['of']}"
        verdict = f"{whole}, the first has {_percent(first['share'])} of it."
    suspects = []
    for of in subspaces:
        for name, found in of["tells"].items():
            of_class = of["tells"]["class"]
            if name == "class" or found is None or of_class is None or not found["shown"]:
                continue
            gain, class_gain = (_lifted(value) for value in (found, of_class))
            suspects.append((gain - class_gain, of["subspace"], name, found, gain > class_gain))
    if not suspects:
        named = any(name != "class" for name in first["tells"])
        why = "No subspace is shown to tell what the masks show." if named else "Nothing says what they stand for."
        return verdict, [f"{why} Look at the page: which of them answers to what should not decide?"]
    _, number, name, found, beyond = max(suspects)
    chance = words.number(found["by_chance"], 2)
    told = f"Subspace {number} tells {name}: average precision {_said(found)}, {chance} by chance"
    if not beyond:
        return (
            f"{verdict} {told}; it is no further above chance by it than by the class: to take it out may cost both.",
            [],
        )
    remedy = f"To prune without it, `ablate='{space.folder}:{number}'`."
    return f"{verdict} {told}, further above it than by the class.", [remedy]


def _lifted(found: Mapping[str, Any]) -> float:
    """How far above chance, as a share of the way to 1."""
    by_chance = float(found["by_chance"])
    return (float(found["mean"]) - by_chance) / (1 - by_chance) if by_chance < 1 else 0.0
