"""Results as one page that works offline: a verdict in words, then what it rests on. Reads the store only.

Of a trial's result it shows `sauce`, `relative_sauce`, `largest_fraction`, `dense_accuracy`, `chance` and, where there
are any, `class_names` (K), `class_counts` (K), `class_accuracy` (K numbers for each point of the curve), `cost`
({"dense": figures, "cut": figures}) and `notes` (sentences). Of the log it shows the last `run` (`command`, `versions`,
`hardware`) and every `cost` (`trial`, `dense`, `cut`): the figures a clock decided. Of a pruned folder's recipe it
shows `model`, `provenance` (as a `run`, and settings) and `figures`: `dense` and `cut` (or `sparse`, where single
weights were removed), each with any of FIGURES and `class_accuracy`; `layers` (`layer`, `shape`, `weights`, `removed`)
of a sparse one; `class_names`, `class_counts`, `n_images`, `notes` and how it was measured. The figures of a trained
folder have a `history` instead, see `training.Fitted`. A study's `mode`, and that of a provenance, is "cut" (the
default) or "zero".
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from sukashi.core.errors import DataError, UsageError
from sukashi.core.stats import Interval, Paired, holm, interval, paired
from sukashi.core.types import Curve, Plan
from sukashi.experiments.compare.store import Record, Store
from sukashi.measures.curves import MARGIN, THRESHOLDS, at, cautions, lossless
from sukashi.report import figures, words
from sukashi.report.figures import COLOURS, OTHERS
from sukashi.report.networks import MODES, Array, cost_table, draw_categories, has_categories, slower, worst_classes

DASHES = {"random": "-", "confidence": ":", "clustering": "--"}
# What the fraction on the axis is of.
REMOVED = {"cut": "parameters removed", "zero": "units zeroed"}


@dataclass(frozen=True)
class _Group:
    """The finished trials of one contender (a criterion with a sampling), by seed."""

    criterion: str
    colour: str
    dashes: str
    records: list[Record]
    curves: list[Curve]
    plans: list[Plan]

    @property
    def sauce(self) -> Interval:
        return self.over_seeds("sauce")

    def over_seeds(self, name: str) -> Interval:
        return interval([float(record.result[name]) for record in self.records])

    @property
    def reach(self) -> float:
        """The largest fraction that every seed measured."""
        return float(min(curve.fraction.max() for curve in self.curves))

    def at(self, fractions: Array) -> Interval:
        """Accuracy over seeds at these fractions, on straight lines between the measured points."""
        rows = []
        for curve in self.curves:
            order = np.argsort(curve.n_removed, kind="stable")
            rows.append(np.interp(fractions, curve.fraction[order], curve.accuracy[order]))
        return interval(rows)


@dataclass(frozen=True)
class _Pair:
    """Two criteria on the seeds both have, first minus second; `p` is Holm's over all pairs that can be tested."""

    first: str
    second: str
    test: Paired
    p: float | None


def compared(study: Store, margin: float | None) -> tuple[dict[str, Any], dict[str, bytes]]:
    groups = _groups(study.finished())
    if not groups:
        raise UsageError(
            f"{study.folder} holds no finished trial: give the same compare command again to go on with it"
        )
    leader, first = groups[0], groups[0].records[0]
    pairs = _pairs(groups)
    run = (study.logged("run") or [{}])[-1]
    margin = run.get("margin", MARGIN) if margin is None else margin
    mode = study.study.get("mode", "cut")
    costs = _costs(groups, study.logged("cost"))
    with_categories = {group.criterion: group.plans for group in groups if has_categories(group.plans)}
    verdict, rule = _verdict(groups, pairs)
    seeds = sorted({record.trial.seed for group in groups for record in group.records})
    n_images = len(leader.curves[0].image_ids)
    shown = {
        "title": f"{first.trial.model.get('spec', 'model')} on {first.trial.data.get('spec', 'data')}",
        "verdict": verdict,
        "rule": rule,
        "warnings": [*_warnings(study, groups), *cautions(n_images, margin), *slower(costs)],
        "groups": groups,
        "differences": [
            _from(leader.criterion, pair) for pair in pairs if leader.criterion in (pair.first, pair.second)
        ],
        "n_pairs": len(pairs),
        "removed": REMOVED[mode],
        "fractions": THRESHOLDS,
        "accuracy": [at(group.curves, THRESHOLDS) for group in groups],
        "margin": f"{100 * margin:g}",
        "lossless": [_lossless(group, margin) for group in groups],
        "passes": {group.criterion: passes for group in groups if (passes := _passes(group))},
        "categories": list(with_categories),
        "costs": cost_table(costs),
        "worst": _worst_of(leader),
        "what": "cut",
        "layers": [],
        "settings": {
            **dict(words.flat(study.study)),
            "seeds finished": ", ".join(map(str, seeds)),
            "test images": f"{n_images:,}",
            "dense accuracy": words.percent(first.result["dense_accuracy"]),
            "chance": words.percent(first.result["chance"]),
        },
        "mode": MODES[mode],
        "run": run,
    }
    figures = {"curves": _draw_curves(groups, REMOVED[mode])}
    if with_categories:
        figures["categories"] = draw_categories(with_categories)
    return shown, figures


# --- what the trials say


def _groups(records: Sequence[Record]) -> list[_Group]:
    """Best mean SAUCE first."""
    names = sorted({(record.trial.criterion, record.trial.contender) for record in records})
    others = itertools.cycle(OTHERS)
    colours = {name: COLOURS.get(name) or next(others) for name, _ in dict(names).items()}
    groups = []
    for criterion, name in names:
        of_name = sorted((r for r in records if r.trial.contender == name), key=lambda r: r.trial.seed)
        plans = [plan for record in of_name if (plan := record.plan()) is not None]
        dashes = DASHES[of_name[0].trial.data.get("sampling", "random")]
        curves = [record.curve() for record in of_name]
        groups.append(_Group(name, colours[criterion], dashes, of_name, curves, plans))
    if len({curve.image_ids for group in groups for curve in group.curves}) > 1:
        raise DataError("the trials of this study were tested on different images: run it again into another folder")
    return sorted(groups, key=lambda group: -group.sauce.mean)


def _pairs(groups: Sequence[_Group]) -> list[_Pair]:
    """Every pair of criteria that share seeds, the better first."""
    generator = np.random.default_rng(0)
    tests = []
    for first, second in itertools.combinations(groups, 2):
        one, other = ({r.trial.seed: float(r.result["sauce"]) for r in g.records} for g in (first, second))
        seeds = sorted(set(one) & set(other))
        if seeds:
            test = paired([one[seed] for seed in seeds], [other[seed] for seed in seeds], generator=generator)
            tests.append((first.criterion, second.criterion, test))
    corrected = iter(holm([test.p_t for _, _, test in tests if test.p_t is not None]))
    return [_Pair(a, b, test, None if test.p_t is None else float(next(corrected))) for a, b, test in tests]


def _from(leader: str, pair: _Pair) -> dict[str, Any]:
    return {"other": pair.second if pair.first == leader else pair.first, "test": pair.test, "p": pair.p}


def _verdict(groups: Sequence[_Group], pairs: Sequence[_Pair]) -> tuple[str, str]:
    """What the study says, in one sentence, and the rule that decided it."""
    leader, name, best = groups[0], groups[0].criterion, groups[0].sauce
    if len(groups) == 1:
        return (
            f"{name} reaches a SAUCE of {best.mean:.1f} ({words.seeds(best.n)}).",
            "There is no other criterion beside it.",
        )
    against = [pair for pair in pairs if pair.first == name]
    if len(against) < len(groups) - 1:
        lone = next(g.criterion for g in groups[1:] if g.criterion not in [pair.second for pair in against])
        return (
            f"Nothing can be said yet: {name} and {lone} have no seed in common.",
            "Criteria are compared seed by seed; let the study finish.",
        )
    runner = min(against, key=lambda pair: pair.test.t.mean)
    gap, of_t = runner.test.t.mean, runner.test.t
    if of_t.n == 1 or leader.sauce.n == 1:
        return (
            f"{name} has the highest SAUCE, {best.mean:.1f}, {gap:.1f} above {runner.second}; "
            "with one seed nothing says whether another seed would agree.",
            "Rule: a criterion leads when a paired test over seeds separates it from every other one. "
            "Give --seeds 5 for a verdict.",
        )
    rule = (
        "Rule: the criterion with the highest mean SAUCE leads when a paired t test over seeds separates it from every "
        f"other one (p < 0.05 after Holm's correction over all {len(pairs)} pairs)."
    )
    span = f"95% interval {of_t.low:.1f} to {of_t.high:.1f}, paired over {words.seeds(of_t.n)}"
    open_ = [pair for pair in against if pair.p is None or pair.p >= 0.05]
    if not open_:
        worst = max(pair.p for pair in against if pair.p is not None)
        return (
            f"{name} leads: SAUCE {best.mean:.1f}, {gap:.1f} above {runner.second}, the next best ({span}).",
            f"{rule} The largest of its p-values is {words.p_value(worst)}.",
        )
    rivals = words.listed([pair.second for pair in open_])
    return (
        f"No criterion leads: {name} has the highest mean SAUCE, {best.mean:.1f}, but the seeds do not separate it "
        f"from {rivals} ({runner.second}: {gap:.1f} lower, {span}).",
        rule,
    )


def _warnings(study: Store, groups: Sequence[_Group]) -> list[str]:
    found = []
    criteria, seeds = study.study.get("contenders", study.study.get("criteria")), study.study.get("seeds")
    if criteria and seeds:
        n_asked = len(criteria) * (seeds if isinstance(seeds, int) else len(seeds))
        refused = study.refused()
        n_finished = sum(len(group.records) for group in groups)
        n_asked -= len(refused) * (seeds if isinstance(seeds, int) else len(seeds))
        if n_finished < n_asked:
            found.append(
                f"{n_finished} of {n_asked} trials are finished: give the same command again to go on with the others."
            )
        found += [f"{name} is left out, it refused the model: {reason}" for name, reason in refused.items()]
    for group in groups:
        reach = [float(curve.fraction.max()) for curve in group.curves]
        if min(reach) < 0.8:
            found.append(
                f"{group.criterion} was measured up to {words.percent(min(reach))} only; "
                "SAUCE draws a straight line from there to chance."
            )
        found += [note for record in group.records for note in record.result.get("notes", [])]
    return list(dict.fromkeys(found))


def _lossless(group: _Group, margin: float) -> Interval:
    found = lossless(group.curves, margin, generator=np.random.default_rng(0))
    return Interval(found.mean[0], found.low[0], found.high[0], found.n)


def _passes(group: _Group) -> list[dict[str, Any]]:
    """What was gone and what was left after each progressive pass, over the seeds that have that many passes."""
    by_seed = []
    for curve in group.curves:
        rows = np.flatnonzero(np.isnan(curve.ratio))
        rows = rows[np.argsort(curve.n_removed[rows], kind="stable")]
        by_seed.append([(curve.n_removed[row], curve.fraction[row], curve.accuracy[row]) for row in rows])
    found = []
    for number in range(max(map(len, by_seed))):
        points = np.array([points[number] for points in by_seed if len(points) > number], dtype=np.float64)
        units, fraction, accuracy = (interval(points[:, column]) for column in range(3))
        found.append({"number": number + 1, "units": units, "fraction": fraction, "accuracy": accuracy})
    return found


def _costs(groups: Sequence[_Group], timed: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Each criterion's cut network beside the dense one, means over seeds."""
    clocks: dict[str, Any] = {entry["trial"]: entry for entry in timed}
    columns: dict[str, Mapping[str, Any]] = {}
    for group in groups:
        of_seeds = []
        for record in group.records:
            kept, clock = record.result.get("cost"), clocks.get(record.trial.key, {})
            if kept:
                columns.setdefault("dense", {**kept["dense"], **clock.get("dense", {})})
                of_seeds.append({**kept["cut"], **clock.get("cut", {})})
        if of_seeds:
            shared = [name for name in of_seeds[0] if all(name in figures for figures in of_seeds)]
            columns[group.criterion] = {name: float(np.mean([f[name] for f in of_seeds])) for name in shared}
    return columns


def _worst_of(group: _Group) -> dict[str, Any] | None:
    """The classes that lost most where half of the units are gone (the point nearest to it), mean over seeds."""
    results = [record.result for record in group.records]
    if not all("class_accuracy" in result for result in results):
        return None
    dense, cut = [], []
    for curve, result in zip(group.curves, results, strict=True):
        table = np.array(result["class_accuracy"], dtype=np.float64)  # None, a class without images, becomes NaN
        dense.append(table[int(np.argmin(curve.n_removed))])
        cut.append(table[int(np.nanargmin(np.abs(curve.ratio - 0.5)))])
    point = int(np.nanargmin(np.abs(group.curves[0].ratio - 0.5)))
    where = f"{group.criterion} with {words.percent(group.curves[0].ratio[point])} of the units removed"
    return {"where": where, "rows": worst_classes(results[0], np.mean(dense, axis=0), np.mean(cut, axis=0))}


# --- figures


def _draw_curves(groups: Sequence[_Group], removed: str) -> bytes:
    figure = Figure(figsize=(9.2, 5.2), layout="constrained")
    axes = figure.subplots()
    result = groups[0].records[0].result
    figures.level(axes, result["dense_accuracy"], "dense", "--")
    figures.level(axes, result["chance"], "chance", ":")
    for group in reversed(groups):  # the best is drawn last, on top
        fractions = np.linspace(0, group.reach, 101)
        line = group.at(fractions)
        mean = group.sauce.mean
        axes.plot(
            fractions,
            line.mean,
            color=group.colour,
            linestyle=group.dashes,
            linewidth=1.8,
            label=f"{group.criterion}  {mean:.1f}",
        )
        if line.low is not None:
            axes.fill_between(
                fractions,
                np.clip(line.low, 0, 1),
                np.clip(line.high, 0, 1),
                color=group.colour,
                alpha=0.15,
                linewidth=0,
            )
        for curve in group.curves:
            after_pass = np.isnan(curve.ratio)
            axes.plot(
                curve.fraction[after_pass],
                curve.accuracy[after_pass],
                linestyle="",
                marker="o",
                markersize=5.5,
                zorder=5,
                color=group.colour,
                markeredgecolor="white",
                markeredgewidth=0.6,
            )
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel=f"fraction of {removed}", ylabel="accuracy")
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    handles, labels = axes.get_legend_handles_labels()
    # Beside the curves: among them no place is free of one network's curves or another's.
    figure.legend(
        handles[::-1],
        labels[::-1],
        title="criterion, SAUCE",
        frameon=False,
        alignment="left",
        loc="outside right center",
    )
    figures.calm(axes)
    return figures.png(figure)
