"""What the experiments of a study found."""

from __future__ import annotations

from typing import Any, ClassVar

from sukashi.core.errors import UsageError
from sukashi.core.experiment import Result
from sukashi.experiments.compare.contenders import contenders
from sukashi.experiments.compare.summary import CompareResult
from sukashi.experiments.executor import summarised
from sukashi.experiments.workspace import Workspace, versions_of
from sukashi.measures import curves
from sukashi.report import words


class StudyResult(Result):
    """Several experiments: what each found, by name, as its results.json has it, with its `kind`.

    verdicts, texts   of each what its page and its command say, times included
    pairs   differences of two contenders' mean accuracy over the fractions of `accuracy_at`, first minus second: of
            each compared model mean, low and high, None where not both were measured that far
    """

    kind: ClassVar[str] = "study"
    of_call: ClassVar[tuple[str, ...]] = (*Result.of_call, "verdicts", "texts")

    title: str
    experiments: dict[str, dict[str, Any]]
    pairs: list[dict[str, Any]]
    verdicts: dict[str, str]
    texts: dict[str, str]
    verdict: str

    def text(self) -> str:
        parts = [f"{name}\n\n{text}\n" for name, text in self.texts.items()]
        for pair in self.pairs:
            said = "not measured that far"
            if pair["mean"] is not None:
                low, high = 100 * pair["low"], 100 * pair["high"]
                said = f"{100 * pair['mean']:+.1f} points, 95 % interval {low:.1f} to {high:.1f}"
            parts.append(f"{pair['model']}: {pair['first']} minus {pair['second']}: {said}")
        return "\n".join([*parts, *words.where(self)])

    def table(self) -> list[dict[str, Any]]:
        """A row for each experiment; its verdict where no clock has a part in it."""
        return [
            {"name": name, "kind": found["kind"], "verdict": found.get("verdict")}
            for name, found in self.experiments.items()
        ]


def summary(space: Workspace) -> StudyResult:
    """Raises UsageError where experiments are not finished."""
    records = space.records()
    if len(records) < space.n_trials:
        raise UsageError(
            f"{space.folder} has {len(records)} of {space.n_trials} experiments finished: give the same command again"
        )
    found = {record.result["name"]: summarised(Workspace(space.folder / record.result["name"])) for record in records}
    made = [trial for record in records for trial in Workspace(space.folder / record.result["name"]).records()]
    pairs = [
        _pair(name, space, first, second)
        for name, result in found.items()
        if isinstance(result, CompareResult)
        for first, second in space.shown["pairs"]
    ]
    return StudyResult(
        versions=versions_of(made),
        title=space.shown["title"],
        experiments={name: {"kind": result.kind, **_kept(result)} for name, result in found.items()},
        pairs=pairs,
        verdicts={name: result.to_json()["verdict"] for name, result in found.items()},
        texts={name: result.text() for name, result in found.items()},
        verdict=space.shown["title"] or ", ".join(found),
    )


def _kept(result: Result) -> dict[str, Any]:
    return {name: value for name, value in result.to_json().items() if name not in result.of_call}


def _pair(model: str, space: Workspace, first: str, second: str) -> dict[str, Any]:
    by_name = {one.name: one for one in contenders(Workspace(space.folder / model))}
    about: dict[str, Any] = {"model": model, "first": first, "second": second}
    by_seed = [
        dict(zip(by_name[name].seeds, by_name[name].curves, strict=True)) if name in by_name else {}
        for name in (first, second)
    ]
    seeds = sorted(set(by_seed[0]) & set(by_seed[1]))
    one, other = ([of[seed] for seed in seeds] for of in by_seed)
    found = curves.difference(one, other, curves.THRESHOLDS)
    if found is None:
        return {**about, "mean": None, "low": None, "high": None}
    return {**about, "mean": found.mean, "low": found.low, "high": found.high}
