"""What the experiments of a study found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, ClassVar

import numpy as np

from sukashi.core import stats
from sukashi.core.errors import UsageError
from sukashi.core.experiment import Columns, Result
from sukashi.experiments.compare.contenders import contenders
from sukashi.experiments.compare.summary import CompareResult
from sukashi.experiments.executor import summarised
from sukashi.experiments.workspace import Workspace, versions_of
from sukashi.report import words


class StudyResult(Result):
    """Several experiments: what each found, by name, as its results.json has it, with its `kind`.

    verdicts, texts   of each what its page and its command say, times included
    pairs   differences of two contenders' SAUCE, first minus second, in each compared model: mean, low, high, n, `each`
            seed's, p and p_holm, corrected over all of the study's pairs; None where they share no seed
    """

    kind: ClassVar[str] = "study"
    of_call: ClassVar[tuple[str, ...]] = (*Result.of_call, "verdicts", "texts")
    columns: ClassVar[Columns] = {
        "name": (str, "of the experiment, and of its folder, which has a table of its own"),
        "kind": (str, "what it is, by its command"),
        "verdict": (str, "what it found; none where a clock has a part in it"),
    }

    title: str
    experiments: dict[str, dict[str, Any]]
    pairs: list[dict[str, Any]]
    verdicts: dict[str, str]
    texts: dict[str, str]
    verdict: str

    def text(self) -> str:
        parts = [f"{name}\n\n{text}\n" for name, text in self.texts.items()]
        for pair in self.pairs:
            said = "no seed in common"
            if pair["mean"] is not None:
                interval = "each seed" if len(pair["each"]) == 2 else "95% interval"
                said = (
                    f"{pair['mean']:+z.1f} of SAUCE, {interval} {words.spread(pair, sign=True)}, p "
                    f"{words.p_value(pair['p_holm'])} (Holm): {so(pair)}"
                )
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
            f"{space.folder} has {len(records)} of {words.several(space.n_trials, 'experiment')} finished: "
            "give the same command again"
        )
    found = {record.result["name"]: summarised(Workspace(space.folder / record.result["name"])) for record in records}
    made = [trial for record in records for trial in Workspace(space.folder / record.result["name"]).records()]
    pairs = [
        _pair(name, space, first, second)
        for name, result in found.items()
        if isinstance(result, CompareResult)
        for first, second in space.shown["pairs"]
    ]
    tested = [pair for pair in pairs if pair["mean"] is not None]
    for pair, corrected in zip(tested, stats.holm([pair["p"] for pair in tested]).tolist(), strict=True):
        pair["p_holm"] = corrected
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


def so(pair: Mapping[str, Any]) -> str:
    """What a pair's difference says of its first, by the rule of a comparison: p < 0.05 after Holm's correction."""
    if pair["p_holm"] >= 0.05:
        return "not separated"
    return "better" if pair["mean"] > 0 else "worse"


def _pair(model: str, space: Workspace, first: str, second: str) -> dict[str, Any]:
    by_name = {one.name: one for one in contenders(Workspace(space.folder / model))}
    about: dict[str, Any] = {"model": model, "first": first, "second": second}
    areas = [
        dict(zip(by_name[name].seeds, by_name[name].areas(), strict=True)) if name in by_name else {}
        for name in (first, second)
    ]
    seeds = sorted(set(areas[0]) & set(areas[1]))
    if not seeds:
        return about | dict.fromkeys(("mean", "low", "high", "n", "each", "p", "p_holm"))
    between = np.stack([areas[0][seed] - areas[1][seed] for seed in seeds])
    found = asdict(stats.crossed(between)) | {"each": between.mean(axis=1).tolist()}
    return about | found | {"p": stats.crossed_test(between), "p_holm": None}
