"""What a comparison found, from its folder alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from sukashi.core import stats
from sukashi.core.experiment import Result
from sukashi.core.stats import holm, interval
from sukashi.experiments.compare.contenders import Contender, contenders, refused
from sukashi.experiments.workspace import Workspace
from sukashi.measures import curves
from sukashi.report import networks, words

Bounds = dict[str, Any]  # {"mean", "low", "high", "n"}, low and high None where one value bounds nothing


class CompareResult(Result):
    """Criteria held against each other. A contender is a criterion, followed by "/" and a sampling that isn't random.

    contenders      best mean SAUCE first; the dictionaries are by contender
    seeds           the finished ones of each contender, in the order of `sauces`, `curves` and `passes`
    sauce, relative_sauce   100 times the area under accuracy; intervals are for new seeds and new test images
    evaluations     how often a criterion asked what one image comes to without one unit, mean over seeds; 0 for those
                    that do not ask
    lossless        up to where every cut is shown to lose at most `margin`, a bound: {"margin", "parameters_removed"
                    (None in mode zero), "units_removed"}, each {"mean", "least", "most", "n"} over the seeds, see
                    `measures.curves.lossless`
    accuracy_at     at 0.15, 0.3, 0.5 and 0.7 of what `removes` says; None where no trial went that far
    measured_up_to  the largest fraction that every seed measured
    differences     of SAUCE between pairs, the better first, paired by seed and image: mean, low, high, n, p, p_holm
                    (over all pairs)
    curves, passes  points of each seed; `pass_means` over the seeds that have that many passes
    costs           parameters, FLOPs, bytes of the dense network and with half of the units gone
    latency         what a clock decides, of the network with half of the units gone: the medians dense_ms and cut_ms
                    and the factor between them, low to high, both networks timed in turns
    worst_classes   where the leader's cut of half of the units lost most

    `verdict` says who leads, `rule` what decided that.
    """

    kind: ClassVar[str] = "compare"
    of_call: ClassVar[tuple[str, ...]] = (*Result.of_call, "latency")

    model: str
    data: str
    contenders: list[str]
    seeds: dict[str, list[int]]
    n_images: int
    removes: str
    mode: str
    dense_accuracy: float
    chance: float
    sauce: dict[str, Bounds]
    sauces: dict[str, list[float]]
    relative_sauce: dict[str, Bounds]
    evaluations: dict[str, float]
    lossless: dict[str, dict[str, Any]]
    accuracy_at: dict[str, dict[str, Bounds | None]]
    measured_up_to: dict[str, float]
    differences: list[dict[str, Any]]
    curves: dict[str, list[list[dict[str, Any]]]]
    passes: dict[str, list[list[dict[str, Any]]]]
    pass_means: dict[str, list[dict[str, Any]]]
    costs: dict[str, dict[str, Any]]
    latency: dict[str, dict[str, float]]
    worst_classes: dict[str, Any] | None
    refused: dict[str, str]
    verdict: str
    rule: str
    notes: list[str]

    def text(self) -> str:
        margin = next(iter(self.lossless.values()))["margin"]
        header = ["criterion", "SAUCE", "95 % interval", f"lossless ({100 * margin:g} points) up to at least"]
        found = []
        for name in self.contenders:
            sauce, free = self.sauce[name], self.lossless[name]["removed"]
            passes = self.pass_means.get(name, [])
            said = ", ".join(f"{of['removed']['mean']:.2f} -> {of['accuracy']['mean']:.3f}" for of in passes[:4])
            found.append(
                [
                    *(name, f"{sauce['mean']:.1f}", f"{sauce['low']:.1f} to {sauce['high']:.1f}"),
                    f"{free['mean']:.1%}"
                    + (f" ({free['least']:.1%} to {free['most']:.1%})" if free["least"] < free["most"] else ""),
                    f"{self.evaluations[name]:,.0f}",
                    said + (", ..." if len(passes) > 4 else ""),
                ]
            )
        return "\n".join(
            [
                words.table([*header, "image evaluations", "after each pass: removed -> accuracy"], found),
                "",
                f"dense accuracy {self.dense_accuracy:.3f}",
                *(f"note: {note}" for note in [*self.notes, *networks.slower(self.latency)]),
                *(f"refused: {name}: {reason}" for name, reason in self.refused.items()),
                *words.where(self),
            ]
        )

    def table(self) -> list[dict[str, Any]]:
        """A row for each seed and measured point, or progressive pass, of each contender."""
        return [
            {
                "model": self.model,
                "data": self.data,
                "contender": name,
                "seed": seed,
                "point": kind,
                **{key: value for key, value in point.items() if key != "removed"},
                "n_images": self.n_images,
                "sauce": self.sauces[name][place],
            }
            for kind, points in (("ratio", self.curves), ("pass", self.passes))
            for name in self.contenders
            for place, seed in enumerate(self.seeds[name])
            for point in points[name][place]
        ]


def summary(space: Workspace, margin: float | None = None) -> CompareResult:
    """`margin` is that of the lossless point, by default that of the last run.

    Raises UsageError where no trial is finished, DataError where a file is broken.
    """
    found = contenders(space)
    leader, identity = found[0], space.identity
    margin = space.shown["margin"] if margin is None else margin
    pairs = _pairs(found)
    verdict, rule = _verdict(found, pairs)
    mode, n_images = identity["mode"], len(leader.curves[0].image_ids)
    return CompareResult(
        model=identity["model"]["spec"],
        data=identity["data"]["spec"],
        contenders=[one.name for one in found],
        seeds={one.name: list(one.seeds) for one in found},
        n_images=n_images,
        removes="parameters" if mode == "cut" else "units",
        mode=mode,
        dense_accuracy=leader.results[0]["dense_accuracy"],
        chance=leader.results[0]["chance"],
        sauce={one.name: _bounds(one.sauce) for one in found},
        sauces={one.name: [float(result["sauce"]) for result in one.results] for one in found},
        relative_sauce={one.name: _bounds(stats.crossed(one.areas(relative=True))) for one in found},
        evaluations={one.name: float(np.mean([result["n_evaluations"] for result in one.results])) for one in found},
        lossless={one.name: _lossless(one, margin, mode) for one in found},
        accuracy_at={
            one.name: {
                f"{fraction:g}": None if at is None else _bounds(at)
                for fraction, at in zip(curves.THRESHOLDS, curves.at(one.curves, curves.THRESHOLDS), strict=True)
            }
            for one in found
        },
        measured_up_to={one.name: one.reach for one in found},
        differences=pairs,
        curves={one.name: _points(one, mode, passes=False) for one in found},
        passes={one.name: _points(one, mode, passes=True) for one in found},
        pass_means={one.name: means for one in found if (means := _pass_means(one))},
        costs=_costs(found),
        latency=_latency(space, found),
        worst_classes=_worst(leader),
        refused=refused(space),
        verdict=verdict,
        rule=rule,
        notes=[*_notes(space, found), *curves.cautions(n_images, margin)],
    )


def _bounds(found: stats.Interval) -> Bounds:
    return {"mean": found.mean, "low": found.low, "high": found.high, "n": found.n}


def _pairs(found: Sequence[Contender]) -> list[dict[str, Any]]:
    """Every pair of contenders that share seeds, the better first."""
    areas = {one.name: dict(zip(one.seeds, one.areas(), strict=True)) for one in found}
    pairs = []
    for first, second in itertools.combinations(areas, 2):
        shared = sorted(areas[first].keys() & areas[second].keys())
        if shared:
            between = np.stack([areas[first][seed] - areas[second][seed] for seed in shared])
            about = {"first": first, "second": second}
            pairs.append({**about, **_bounds(stats.crossed(between)), "p": stats.crossed_test(between)})
    corrected = holm([pair["p"] for pair in pairs]).tolist()
    return [{**pair, "p_holm": p} for pair, p in zip(pairs, corrected, strict=True)]


def _verdict(found: Sequence[Contender], pairs: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """What the study says, in one sentence, and the rule that decided it."""
    leader, name, best = found[0], found[0].name, found[0].sauce
    if len(found) == 1:
        return (
            f"{name} reaches a SAUCE of {best.mean:.1f} ({words.seeds(best.n)}).",
            "There is no other criterion beside it.",
        )
    against = [pair for pair in pairs if pair["first"] == name]
    if len(against) < len(found) - 1:
        lone = next(one.name for one in found[1:] if one.name not in [pair["second"] for pair in against])
        return (
            f"Nothing can be said yet: {name} and {lone} have no seed in common.",
            "Criteria are compared seed by seed; let the study finish.",
        )
    runner = min(against, key=lambda pair: float(pair["mean"]))
    gap, second = runner["mean"], runner["second"]
    if runner["n"] == 1 or leader.sauce.n == 1:
        return (
            f"{name} has the highest SAUCE, {best.mean:.1f}, {gap:.1f} above {second}; "
            "with one seed nothing says whether another seed would agree.",
            "Rule: a criterion leads when a test over seeds and images separates it from every other one. "
            "Give --seeds 5 for a verdict.",
        )
    rule = (
        "Rule: the criterion with the highest mean SAUCE leads when a t test paired by seed and image separates it "
        f"from every other one (p < 0.05 after Holm's correction over all {len(pairs)} pairs)."
    )
    span = f"95% interval {runner['low']:.1f} to {runner['high']:.1f}, paired over {words.seeds(runner['n'])}"
    open_ = [pair for pair in against if pair["p_holm"] >= 0.05]
    if not open_:
        worst = max(pair["p_holm"] for pair in against)
        return (
            f"{name} leads: SAUCE {best.mean:.1f}, {gap:.1f} above {second}, the next best ({span}).",
            f"{rule} The largest of its p-values is {words.p_value(worst)}.",
        )
    rivals = words.listed([pair["second"] for pair in open_])
    return (
        f"No criterion leads: {name} has the highest mean SAUCE, {best.mean:.1f}, but seeds and images do not "
        f"separate it from {rivals} ({second}: {gap:.1f} lower, {span}).",
        rule,
    )


def _notes(space: Workspace, found: Sequence[Contender]) -> list[str]:
    told = []
    n_finished = len(space.records())
    if n_finished < space.n_trials:
        told.append(
            f"{n_finished} of {space.n_trials} trials are finished: give the same command again to go on with the "
            "others."
        )
    told += [f"{name} is left out, it refused the model: {reason}" for name, reason in refused(space).items()]
    for one in found:
        if one.reach < 0.8:
            told.append(
                f"{one.name} was measured up to {words.percent(one.reach)} only; SAUCE draws a straight line from "
                "there to chance."
            )
        told += [note for result in one.results for note in result["notes"]]
    return list(dict.fromkeys(told))


def _lossless(one: Contender, margin: float, mode: str) -> dict[str, Any]:
    """What `curves.lossless` finds: of what is removed on the curves' axis, and of units."""
    found = curves.lossless(one.curves, margin) / [1, one.plans[0].n_units]
    removed, units = (
        {"mean": float(of.mean()), "least": float(of.min()), "most": float(of.max()), "n": len(of)} for of in found.T
    )
    parameters = removed if mode == "cut" else None
    return {"margin": margin, "removed": removed, "parameters_removed": parameters, "units_removed": units}


def _points(one: Contender, mode: str, *, passes: bool) -> list[list[dict[str, Any]]]:
    """For each seed the measured points, or those after progressive passes."""
    return [
        [
            {
                "ratio_asked": None if passes else float(curve.ratio[row]),
                "removed": float(curve.fraction[row]),
                "units_removed": int(curve.n_removed[row]) / plan.n_units,
                "parameters_removed": float(curve.fraction[row]) if mode == "cut" else None,
                "accuracy": float(curve.accuracy[row]),
            }
            for row in np.flatnonzero(np.isnan(curve.ratio) == passes)
        ]
        for curve, plan in zip(one.curves, one.plans, strict=True)
    ]


def _pass_means(one: Contender) -> list[dict[str, Any]]:
    """What was gone and what was left after each progressive pass, over the seeds that have that many passes."""
    by_seed = []
    for curve in one.curves:
        passed = np.flatnonzero(np.isnan(curve.ratio))
        passed = passed[np.argsort(curve.n_removed[passed], kind="stable")]
        by_seed.append([(curve.n_removed[row], curve.fraction[row], curve.accuracy[row]) for row in passed])
    found = []
    for number in range(max(map(len, by_seed))):
        points = np.array([points[number] for points in by_seed if len(points) > number], dtype=np.float64)
        units, removed, right = (_bounds(interval(points[:, column])) for column in range(3))
        found.append({"number": number + 1, "n_units_removed": units, "removed": removed, "accuracy": right})
    return found


def _costs(found: Sequence[Contender]) -> dict[str, dict[str, Any]]:
    """The dense network and each contender's cut one, means over seeds: what no clock decides."""
    columns: dict[str, dict[str, Any]] = {}
    for one in found:
        kept = [result["cost"] for result in one.results if "cost" in result]
        if kept:
            columns.setdefault("dense", dict(kept[0]["dense"]))
            columns[one.name] = {
                name: float(np.mean([of_seed["cut"][name] for of_seed in kept])) for name in kept[0]["cut"]
            }
    return columns


def _latency(space: Workspace, found: Sequence[Contender]) -> dict[str, dict[str, float]]:
    """{contender: what its networks' times in the log come to}."""
    clocks = {entry["trial"]: entry for entry in space.logged("latency")}
    turns = {one.name: [clocks[key] for key in one.keys if key in clocks] for one in found}
    return {name: networks.timed(of) for name, of in turns.items() if of}


def _worst(one: Contender) -> dict[str, Any] | None:
    """The classes that lost most where half of the units are gone (the point nearest to it), mean over seeds."""
    dense, cut = [], []
    for curve, result in zip(one.curves, one.results, strict=True):
        table = np.array(result["class_accuracy"], dtype=np.float64)  # None, a class without images, becomes NaN
        dense.append(table[int(np.argmin(curve.n_removed))])
        cut.append(table[int(np.nanargmin(np.abs(curve.ratio - 0.5)))])
    point = int(np.nanargmin(np.abs(one.curves[0].ratio - 0.5)))
    where = f"{one.name} with {words.percent(one.curves[0].ratio[point])} of the units removed"
    lost = networks.worst_classes(one.results[0], np.mean(dense, axis=0), np.mean(cut, axis=0))
    return {"where": where, "what": "cut", "rows": lost}
