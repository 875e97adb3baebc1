"""What a comparison says to one who has to cut a network: how far, with what, what it costs, and who leads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sukashi.core import stats
from sukashi.core.bracketed import folder_of, plain
from sukashi.core.schema import command_of, keywords
from sukashi.criteria import criteria as registry
from sukashi.experiments.compare.contenders import Contender
from sukashi.experiments.prune.settings import Prune
from sukashi.experiments.workspace import Workspace
from sukashi.measures import classwise, curves
from sukashi.repairs import NONE
from sukashi.report import networks, words
from sukashi.report.classes import falls, too_small

ENOUGH_SEEDS = 5
AREA = "SAUCE is 100 times the area under accuracy, from nothing removed to all."


def furthest(found: Sequence[Contender], margin: float) -> dict[str, float]:
    """{contender: the ratio up to which the cut of every seed is shown to lose at most `margin`}, see
    `curves.lossless`; in 2.5 % of test sets at most it is wrong for any of them."""
    level = stats.level_of_each(len(found))
    return {one.name: curves.lossless(one.curves, margin, level=level) for one in found}


def advised(found: Sequence[Contender], ratios: Mapping[str, float]) -> Contender | None:
    """The contender whose cut goes furthest, in parameters (or what the curves count), without losing more than the
    margin; of equals the one with the higher SAUCE. None where none goes anywhere."""
    best, most = None, 0.0
    for one in found:
        gone = one.at(ratios[one.name])["removed"]
        if ratios[one.name] > 0 and gone > most:
            best, most = one, gone
    return best


def changes(one: Contender, ratio: float) -> list[classwise.Change]:
    """What became of each class at a ratio asked for, the largest loss first; see `classwise.changes`."""
    dense = np.stack([curve.correct[0] for curve in one.curves])
    cut = np.stack([curve.correct[row] for curve, row in zip(one.curves, one.rows(ratio), strict=True)])
    return classwise.changes(dense, cut, one.curves[0].target, len(one.results[0]["class_names"]))


def headline(
    found: Sequence[Contender], best: Contender | None, ratio: float, margin: float, mode: str
) -> tuple[str, list[str]]:
    """How far one may cut, in one sentence, and what to do where that says too little."""
    n_images = len(found[0].curves[0].image_ids)
    lower = f"at most {words.points(margin)} lower"
    if best is None:
        return _nowhere(found, n_images, margin, lower)
    at, dense = best.at(ratio), best.results[0]["dense_accuracy"]
    verb = "Cut" if mode == "cut" else "Silence"
    more = [f"{words.percent(at['removed'])} of the parameters"] if mode == "cut" else []
    if mode == "cut" and at["flops_removed"] is not None:
        more.append(f"{words.percent(at['flops_removed'])} of the FLOPs")
    where = f"{words.percent(at['units_removed'])} of the units with {best.name}"
    gone = where + (f" ({', '.join(more)})" if more else "")
    mean = f" (mean of {words.seeds(len(best.seeds))})" if len(best.seeds) > 1 else ""
    right = f"{words.percent(at['accuracy'].mean)}{mean} instead of {words.percent(dense)}"
    right += f" on {words.several(n_images, 'test image')}"
    became, names = changes(best, ratio), best.results[0]["class_names"]
    fallen = [change for change in became if change.fell]
    if not fallen:
        of_each = [{"name": names[change.number], "n": change.n_images} for change in became]
        small = too_small(of_each, margin)
        return f"{verb} {gone}: accuracy {right}, shown to be {lower} over all classes together.", [small] * bool(small)
    told = falls([(names[change.number], change.dense.mean, change.cut.mean) for change in fallen])
    cut = "are cut" if mode == "cut" else "are silenced"
    return (
        f"{told} where {gone} {cut}, though accuracy as a whole, {right}, is shown to be {lower}.",
        ["So the figure of all images hides what happens to a class: look at the classes below before you cut so far."],
    )


def _nowhere(found: Sequence[Contender], n_images: int, margin: float, lower: str) -> tuple[str, list[str]]:
    level = stats.level_of_each(len(found))
    least = stats.least_images(margin, level=level)
    if n_images < least:
        able = math.ceil(1000 * stats.least_margin(n_images, level=level)) / 1000
        return (
            f"How far one may cut can't be said with {n_images:,} test images: {least:,} could show that accuracy is "
            f"{lower}, for {words.several(len(found), 'criterion', 'criteria')}.",
            [f"Give `margin={able:g}`, the least that {n_images:,} images can show, or more test images."],
        )
    smallest = min(float(ratio) for ratio in found[0].curves[0].ratio if ratio > 0)
    best = max(found, key=lambda one: one.at(smallest)["accuracy"].mean)
    at = best.at(smallest)["accuracy"]
    return (
        f"No cut is shown to cost {words.points(margin)} of accuracy or less: of the smallest, "
        f"{words.percent(smallest)} of the units, {best.name} keeps most, {words.percent(at.mean)} instead of "
        f"{words.percent(best.results[0]['dense_accuracy'])} on {words.several(n_images, 'test image')}.",
        [f"`margin={min(0.5, 2 * margin):g}` allows more and needs nothing measured again; smaller `ratios` cut less."],
    )


def command(space: Workspace, best: Contender, ratio: float) -> str:
    """What makes the network that the headline is about, of the first seed, to the unit."""
    given, identity = space.shown["reading"], space.identity
    options, criterion = identity["options"][best.criterion], plain(best.criterion)
    if str(given["model"]).startswith("memory:") or str(given["data"]).startswith("memory:"):
        said = "".join(f", {name}={value!r}" for name, value in options.items())
        sampled = "" if best.sampling == "random" else f', sampling="{best.sampling}"'
        ranked = f'rank("{criterion}", seed={best.seeds[0]}{sampled}{said})'
        mended = "" if best.repair == NONE else f', repair="{best.repair}"'
        return f"sukashi.open(model, data).{ranked}.cut({ratio:g}, round_to=1{mended})"
    settings = keywords(
        Prune,
        {
            **given,
            "criterion": _spec(criterion),
            "ratio": ratio,
            "sampling": best.sampling,
            "repair": best.repair,
            "mode": identity["mode"],
            "exclude": identity["exclude"],
            **({"round_to": 1} if identity["mode"] == "cut" else {}),
            "options": _unusual(criterion, options),
            "seed": best.seeds[0],
            "out": f"runs/{folder_of(best.name)}-{round(100 * ratio)}",
        },
    )
    return command_of(settings)


def _spec(criterion: str) -> str:
    """What another process finds a criterion by: one of somebody's own by its module too."""
    if criterion not in registry or registry[criterion].home.partition(".")[0] in ("sukashi", "__main__"):
        return criterion
    return registry[criterion].spec


def _unusual(criterion: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are not the method's defaults; all, where the method is not known here."""
    usual = registry[criterion].options if criterion in registry else {}
    return {name: value for name, value in options.items() if name not in usual or usual[name] != value}


def speed_of(space: Workspace, best: Contender, ratio: float) -> dict[str, dict[str, Any]]:
    """{images at once: what the times in the log of the advised network come to, and on what}."""
    return {
        str(entry["batch_size"]): {**networks.timed([entry]), "hardware": entry["hardware"]}
        for entry in space.logged("speed")
        if (entry["contender"], entry["ratio"]) == (best.name, ratio)
    }


def faster(speed: Mapping[str, Mapping[str, Any]]) -> str:
    """What part of the dense network's time the advised one takes, on one image and on many, in one sentence; empty
    where none was timed."""
    if not speed:
        return ""
    said = []
    for n_images, of in speed.items():
        so = ", which is not shown to differ" if of["low"] <= 1 <= of["high"] else ""
        said.append(f"× {networks.factor(of)} for {networks.images_at_once(n_images)}{so}")
    hardware = next(iter(speed.values()))["hardware"]
    return f"Time, beside the dense network's: {'; '.join(said)}. 95% intervals, {hardware}."


def one_answers(found: Sequence[Contender], ratios: Sequence[float]) -> list[str]:
    """A sentence on where one answer to every image is all that is left, of each contender that comes to it."""
    by_ratio: dict[float, list[str]] = {}
    for one in found:
        ratio = one.one_answer_from(ratios)
        if ratio is not None:
            by_ratio.setdefault(ratio, []).append(one.name)
    told = [f"from ratio {ratio:g} on by {words.listed(names)}" for ratio, names in sorted(by_ratio.items())]
    return [f"One and the same answer to every image is all that is left {words.listed(told)}."] if told else []


def who_leads(found: Sequence[Contender], pairs: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Which criterion keeps most accuracy over the whole range, in one sentence, and the rule that decided it."""
    leader, name, best = found[0], found[0].name, found[0].sauce
    if len(found) == 1:
        return f"Over the whole range {name} reaches a SAUCE of {best.mean:.1f} ({words.seeds(best.n)}).", AREA
    against = [pair for pair in pairs if pair["first"] == name]
    if len(against) < len(found) - 1:
        lone = next(one.name for one in found[1:] if one.name not in [pair["second"] for pair in against])
        return (
            f"Who leads can't be said yet: {name} and {lone} have no seed in common.",
            "Criteria are compared seed by seed; let the comparison finish.",
        )
    runner = min(against, key=lambda pair: float(pair["mean"]))
    gap, second = runner["mean"], runner["second"]
    if runner["n"] == 1 or leader.sauce.n == 1:
        return (
            f"Over the whole range {name} has the highest SAUCE, {best.mean:.1f}, {gap:.1f} above {second}; "
            "one seed can't tell whether another would agree.",
            f"{AREA} `seeds={ENOUGH_SEEDS}` adds seeds to this folder.",
        )
    rule = (
        f"{AREA} A criterion leads when a t test of SAUCE, paired by seed and image, separates it from every other one "
        f"(p < 0.05 after Holm's correction over {pairs_of(len(pairs))})."
    )
    p = words.p_value(runner["p_holm"])
    span = f"95% interval {runner['low']:.1f} to {runner['high']:.1f}, {words.seeds(runner['n'])}, p {p} corrected"
    open_ = [pair["second"] for pair in against if pair["p_holm"] >= 0.05]
    if not open_:
        return (
            f"Over the whole range {name} leads: SAUCE {best.mean:.1f}, {gap:.1f} above {second}, the next best "
            f"({span}).",
            rule,
        )
    n_seeds = min(len(one.seeds) for one in found)
    more = f" {words.seeds(n_seeds)} can't tell; `seeds={ENOUGH_SEEDS}` adds to this folder." * (n_seeds < ENOUGH_SEEDS)
    behind = [pair["second"] for pair in against if pair["second"] not in open_]
    clear = f" It is shown to be above {words.listed(behind)}." if behind else ""
    return (
        f"Over the whole range no criterion leads: {name} has the highest SAUCE, {best.mean:.1f}, but is not separated "
        f"from {words.listed(open_)} ({second}: {gap:.1f} lower, {span}).{clear}{more}",
        rule,
    )


def pairs_of(n: int) -> str:
    return "the one pair" if n == 1 else f"all {n} pairs"
