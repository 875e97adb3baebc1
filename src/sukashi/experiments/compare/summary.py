"""What a comparison found, from its folder alone."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from sukashi.core import stats
from sukashi.core.bracketed import plain
from sukashi.core.experiment import Columns, Result
from sukashi.core.stats import holm
from sukashi.experiments.columns import as_json, shared
from sukashi.experiments.compare import verdict
from sukashi.experiments.compare.contenders import Contender, contenders, refused
from sukashi.experiments.workspace import Workspace
from sukashi.measures import curves
from sukashi.report import networks, words

Array = NDArray[np.float64]

_GONE = ("units", "parameters", "FLOPs")

# {"mean", "low", "high", "n"}, low and high None where one value bounds nothing; of seeds `each` of them.
Bounds = dict[str, Any]


class CompareResult(Result):
    """Criteria held against each other. A contender is a criterion, followed by "/" and a sampling that isn't random,
    then by "+" and what repairs its cuts.

    contenders      best mean SAUCE first; the dictionaries are by contender
    methods         of each contender its criterion, sampling, repair and options
    seeds           the finished ones of each contender, in the order of `sauces`, `curves` and `passes`
    chance          what one answer for all images gets right at best: the share of the largest class
    sauce, relative_sauce   100 times the area under accuracy at the ratios asked for, whatever passes a criterion
                    had, and so in `differences`; intervals are for new seeds and new test images
    evaluations     how often a criterion asked what one image comes to without one unit, mean over seeds; None for
                    those that look at images otherwise, whose passes are not counted
    lossless        up to where every seed's cut is shown to lose at most `margin`, a bound, see `curves.lossless`: a
                    point as in `levels`
    advice          the furthest of these, and `command`, which makes that network; None where none is shown
    speed           what a clock decides of that network, {images at once: dense_ms, cut_ms, factor, low, high}
    levels          of each ratio asked for, over seeds: units_removed, parameters_removed (None in mode zero),
                    flops_removed, accuracy {"mean", "low", "high", "n", "each"}, of how many seeds the network gives
                    `one_answer` to every image
    one_answer_from the ratio from which on every seed's network gives one answer to every image; None where none does
    accuracy_at     at 0.15, 0.3, 0.5 and 0.7 of what `removes` says; None where no trial went that far
    measured_up_to  the largest fraction that every seed measured
    differences     of SAUCE between pairs, the better first, paired by seed and image: mean, low, high, n, p, p_holm
                    (over all pairs)
    curves, passes  points of each seed; `pass_means` over the seeds that have that many passes
    costs           parameters, FLOPs, bytes of the dense network and with half of the units gone
    latency         what a clock decides, of the network with half of the units gone: the medians dense_ms and cut_ms
                    and the factor between them, low to high, both networks timed in turns
    classes         of the advised cut, or else the leader's of half of the units: of each class with two test images or
                    more its sensitivity before and after and its change, the largest loss first, and whether it `fell`

    `verdict` says how far one may cut and with what, `lines` what to do with that, how fast it is and who leads, `rule`
    what decided that.
    """

    kind: ClassVar[str] = "compare"
    of_call: ClassVar[tuple[str, ...]] = (*Result.of_call, "latency", "speed")
    columns: ClassVar[Columns] = {
        **shared("model", "weights_sha256", "data"),
        "contender": (str, "what competes: a criterion, with its options and sampling where its name tells them"),
        **shared("criterion", "sampling", "repair", "options", "calibration"),
        "mode": (str, "cut: the network got smaller; zero: units are silent, and only units are counted"),
        **shared("seed"),
        "point": (str, "ratio: a ratio that was asked for; pass: after a pass of a progressive criterion"),
        "pass": (int, "which pass, from 1; none of a ratio"),
        "ratio_asked": (float, "the fraction of UNITS that was asked to go; none after a pass"),
        **shared("n_units_removed", "units_removed", "parameters_removed", "flops_removed", "accuracy", "n_images"),
        "sauce": (
            float,
            "of this seed: 100 times the area under accuracy at the ratios asked for, the same in all its rows",
        ),
    }

    model: str
    weights_sha256: str
    data: str
    calibration: int
    contenders: list[str]
    methods: dict[str, dict[str, Any]]
    seeds: dict[str, list[int]]
    n_images: int
    removes: str
    mode: str
    dense_accuracy: float
    chance: float
    sauce: dict[str, Bounds]
    sauces: dict[str, list[float]]
    relative_sauce: dict[str, Bounds]
    evaluations: dict[str, float | None]
    margin: float
    lossless: dict[str, dict[str, Any]]
    advice: dict[str, Any] | None
    speed: dict[str, dict[str, Any]]
    levels: dict[str, list[dict[str, Any]]]
    one_answer_from: dict[str, float | None]
    accuracy_at: dict[str, dict[str, Bounds | None]]
    measured_up_to: dict[str, float]
    differences: list[dict[str, Any]]
    curves: dict[str, list[list[dict[str, Any]]]]
    passes: dict[str, list[list[dict[str, Any]]]]
    pass_means: dict[str, list[dict[str, Any]]]
    costs: dict[str, dict[str, Any]]
    latency: dict[str, dict[str, float]]
    classes: dict[str, Any]
    refused: dict[str, str]
    verdict: str
    lines: list[str]
    rule: str

    def overview(self) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
        within = "each seed" if {of["n"] for of in self.sauce.values()} == {2} else "95% interval"
        header = ["criterion", "SAUCE", within, f"ratio, at most {words.points(self.margin)} lower", *_GONE]
        found = []
        for name in self.contenders:
            sauce, free = self.sauce[name], self.lossless[name]
            gone = [free[key] for key in ("units_removed", "parameters_removed", "flops_removed")]
            found.append(
                [
                    *(name, f"{sauce['mean']:.1f}", words.spread(sauce)),
                    f"{free['ratio_asked']:g}" if free["ratio_asked"] else "none",
                    *(words.printed(share if free["ratio_asked"] else None, "percent") for share in gone),
                    "not counted" if self.evaluations[name] is None else f"{self.evaluations[name]:,.0f}",
                ]
            )
        return [*header, "image evaluations"], found

    def text(self) -> str:
        return "\n".join(
            [
                words.table(*self.overview()),
                "",
                f"dense accuracy {words.percent(self.dense_accuracy)} on {words.several(self.n_images, 'test image')}",
                *self.remarks(*networks.slower(self.latency)),
                "",
                self.verdict,
                *([f"    {self.advice['command']}"] if self.advice else []),
                *filter(None, [verdict.faster(self.speed), *self.lines, self.rule]),
                *words.where(self),
            ]
        )

    def table(self) -> list[dict[str, Any]]:
        """A row for each seed and measured point, or progressive pass, of each contender."""
        return [
            {
                "model": self.model,
                "weights_sha256": self.weights_sha256,
                "data": self.data,
                "contender": name,
                **self.methods[name],
                "options": as_json(self.methods[name]["options"]),
                "calibration": self.calibration,
                "mode": self.mode,
                "seed": seed,
                "point": kind,
                "pass": number if kind == "pass" else None,
                **{key: value for key, value in point.items() if key != "removed"},
                "n_images": self.n_images,
                "sauce": self.sauces[name][place],
            }
            for kind, points in (("ratio", self.curves), ("pass", self.passes))
            for name in self.contenders
            for place, seed in enumerate(self.seeds[name])
            for number, point in enumerate(points[name][place], 1)
        ]


def summary(space: Workspace, margin: float | None = None) -> CompareResult:
    """`margin` is that of the lossless point, by default that of the last run.

    Raises UsageError where no trial is finished, DataError where a file is broken.
    """
    found = contenders(space)
    leader, identity = found[0], space.identity
    margin = space.shown["margin"] if margin is None else margin
    pairs = _pairs(found)
    mode, n_images = identity["mode"], len(leader.curves[0].image_ids)
    ratios = verdict.furthest(found, margin)
    best = verdict.advised(found, ratios)
    said, todo = verdict.headline(found, best, ratios[best.name] if best else 0.0, margin, mode)
    leads, rule = verdict.who_leads(found, pairs)
    of_each = {one.name: _of_contender(one, identity, ratios[one.name]) for one in found}
    by_contender: dict[str, Any] = {
        field: {name: of[field] for name, of in of_each.items()} for field in of_each[leader.name]
    }
    return CompareResult(
        model=identity["model"]["spec"],
        weights_sha256=identity["model"]["weights_sha256"],
        data=identity["data"]["spec"],
        calibration=identity["data"]["calibration"],
        contenders=[one.name for one in found],
        **by_contender,
        n_images=n_images,
        removes=_removes(mode),
        mode=mode,
        dense_accuracy=leader.results[0]["dense_accuracy"],
        chance=leader.results[0]["chance"],
        margin=margin,
        advice=_advice(space, best, ratios, mode),
        speed=verdict.speed_of(space, best, ratios[best.name]) if best else {},
        differences=pairs,
        pass_means={one.name: means for one in found if (means := _pass_means(one))},
        costs=_costs(found),
        latency=_latency(space, found),
        classes=_classes(best or leader, ratios[best.name] if best else 0.5),
        refused=refused(space),
        verdict=said,
        lines=[*todo, leads, *verdict.one_answers(found, identity["ratios"])],
        rule=rule,
        warnings=_warnings(space, found),
        notes=_told(found, "notes"),
    )


def _of_contender(one: Contender, identity: Mapping[str, Any], lossless: float) -> dict[str, Any]:
    """The fields of a result that are by contender, of one of them; `lossless` is the ratio of its lossless point."""
    mode = identity["mode"]
    at = zip(curves.THRESHOLDS, curves.at(one.curves, curves.THRESHOLDS), strict=True)
    each: list[Any] = [curves.at([curve], curves.THRESHOLDS) for curve in one.curves]
    return {
        "methods": {
            "criterion": plain(one.criterion),
            "sampling": one.sampling,
            "repair": one.repair,
            "options": identity["options"][one.criterion],
        },
        "seeds": list(one.seeds),
        "sauce": _bounds(one.sauce, one.areas().mean(axis=1)),
        "sauces": [float(result["sauce"]) for result in one.results],
        "relative_sauce": _bounds(stats.crossed(one.areas(relative=True))),
        "evaluations": _evaluations(one),
        "lossless": _level(one, lossless, mode),
        "one_answer_from": one.one_answer_from(identity["ratios"]),
        "levels": [_level(one, ratio, mode) for ratio in identity["ratios"]],
        "accuracy_at": {
            f"{fraction:g}": None if found is None else _bounds(found, [of[place].mean for of in each])
            for place, (fraction, found) in enumerate(at)
        },
        "measured_up_to": one.reach,
        "curves": _points(one, mode, passes=False),
        "passes": _points(one, mode, passes=True),
    }


def _evaluations(one: Contender) -> float | None:
    """None where images were looked at and nothing was counted."""
    found = float(np.mean([result["n_evaluations"] for result in one.results]))
    return None if not found and any(plan.n_images for plan in one.plans) else found


def _bounds(found: stats.Interval, each: Sequence[float] | Array = ()) -> Bounds:
    """With what `each` seed has, where these are given."""
    bounds = {"mean": found.mean, "low": found.low, "high": found.high, "n": found.n}
    return bounds | ({"each": [float(of) for of in each]} if len(each) else {})


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


def _removes(mode: str) -> str:
    """Of what curves count the fraction that is gone."""
    return "parameters" if mode == "cut" else "units"


def _warnings(space: Workspace, found: Sequence[Contender]) -> list[str]:
    told = []
    n_finished = len(space.records())
    if n_finished < space.n_trials:
        told.append(
            f"{n_finished} of {space.n_trials} trials are finished: give the same command again to go on with the "
            "others."
        )
    told += [
        f"{words.listed(names)} {'is left out, it' if len(names) == 1 else 'are left out, they'} refused the model: "
        f"{reason}"
        for reason, names in words.by_reason(refused(space)).items()
    ]
    removes = _removes(space.identity["mode"])
    told += [
        f"{one.name} was measured only up to {words.percent(one.reach)} of the {removes} removed; SAUCE draws a "
        "straight line from there to chance."
        for one in found
        if one.reach < 0.8
    ]
    told += [f"{words.listed(names)} are equal on every seed, so that one hides the other" for names in _equal(found)]
    return told + _told(found, "warnings")


def _told(found: Sequence[Contender], name: str) -> list[str]:
    return list(dict.fromkeys(said for one in found for result in one.results for said in result[name]))


def _equal(found: Sequence[Contender]) -> list[list[str]]:
    """Contenders whose networks give equal answers everywhere, together."""
    alike: dict[bytes, list[str]] = {}
    for one in found:
        same = b"".join(curve.answer[~np.isnan(curve.ratio)].tobytes() for curve in one.curves)
        alike.setdefault(same, []).append(one.name)
    return [names for names in alike.values() if len(names) > 1]


def _level(one: Contender, ratio: float, mode: str) -> dict[str, Any]:
    at = one.at(ratio)
    parameters = at["removed"] if mode == "cut" else None
    return at | {"parameters_removed": parameters, "accuracy": _bounds(at["accuracy"], at.pop("each"))}


def _advice(space: Workspace, best: Contender | None, ratios: Mapping[str, float], mode: str) -> dict[str, Any] | None:
    if best is None:
        return None
    ratio = ratios[best.name]
    said = {"contender": best.name, "command": verdict.command(space, best, ratio)}
    return said | _level(best, ratio, mode)


def _points(one: Contender, mode: str, *, passes: bool) -> list[list[dict[str, Any]]]:
    """For each seed the measured points, or those after progressive passes."""
    return [
        [
            {
                "ratio_asked": None if passes else float(curve.ratio[row]),
                "removed": float(curve.fraction[row]),
                "n_units_removed": int(curve.n_removed[row]),
                "units_removed": int(curve.n_removed[row]) / plan.n_units,
                "parameters_removed": float(curve.fraction[row]) if mode == "cut" else None,
                "flops_removed": float(1 - curve.flops[row] / curve.flops[0]) if curve.flops[0] else None,
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
        by_seed.append(passed[np.argsort(curve.n_removed[passed], kind="stable")])
    found = []
    for number in range(max(map(len, by_seed))):
        points = [(curve, rows[number]) for curve, rows in zip(one.curves, by_seed, strict=True) if len(rows) > number]
        units, removed = (
            np.array([getattr(curve, name)[row] for curve, row in points], dtype=np.float64)
            for name in ("n_removed", "fraction")
        )
        right = np.stack([curve.correct[row] for curve, row in points])
        found.append(
            {
                "number": number + 1,
                "n_units_removed": _span(units),
                "units_removed": _span(units / one.plans[0].n_units),
                "removed": _span(removed),
                "accuracy": _bounds(stats.accuracy(right), right.mean(axis=1)),
            }
        )
    return found


def _span(values: NDArray[np.float64]) -> dict[str, Any]:
    return {"mean": float(values.mean()), "least": float(values.min()), "most": float(values.max()), "n": len(values)}


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


def _classes(one: Contender, ratio: float) -> dict[str, Any]:
    """What became of each class at a ratio, over the seeds."""
    at = one.at(ratio)
    names, target = one.results[0]["class_names"], one.curves[0].target
    rows = []
    for of in verdict.changes(one, ratio):
        own = target == of.number
        dense, cut = (
            np.array([curve.correct[row][own].mean() for curve, row in zip(one.curves, places, strict=True)])
            for places in ([0] * len(one.curves), one.rows(ratio))
        )
        rows.append(
            {
                "name": names[of.number],
                "n": of.n_images,
                "dense": _bounds(of.dense, dense),
                "cut": _bounds(of.cut, cut),
                "change": _bounds(of.change),
                "fell": of.fell,
            }
        )
    return {"contender": one.name, "ratio_asked": ratio, "units_removed": at["units_removed"], "rows": rows}
