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
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from sukashi import page
from sukashi.errors import DataError, UsageError
from sukashi.measures.accuracy import MARGIN, THRESHOLDS, at, cautions, lossless
from sukashi.page import COLOURS, INK, OTHERS
from sukashi.stats import Interval, Paired, holm, interval, paired, share
from sukashi.store import Record, Store, read_plan
from sukashi.types import Curve, Plan

Array = NDArray[np.float64]

N_WORST = 5
DASHES = {"random": "-", "confidence": ":", "clustering": "--"}
CATEGORY_COLOURS = {"critical": "#0072B2", "neutral": "#C9CDD2", "detrimental": "#D55E00", "": "#EEF0F2"}
# Each figure of a network: what the page calls it, and how it is printed.
FIGURES = {
    "accuracy": ("accuracy", "percent"),
    "ratio": ("units removed", "percent"),
    "fraction": ("parameters removed", "percent"),
    "sparsity": ("zeros in the masked layers", "percent"),
    "zeros": ("zeros in all parameters", "percent"),
    "parameters": ("parameters", "count"),
    "flops": ("FLOPs an image", "count"),
    "latency_ms": ("latency, ms", "number"),
    "peak_bytes": ("peak memory", "bytes"),
    "bytes": ("file size", "bytes"),
}
MODES = {
    "cut": "Units were removed physically: every accuracy is that of a network with smaller layers.",
    "zero": "Units were zeroed, not cut out: nothing reads them any more, while shape, size and speed stay those of "
    "the dense network. Logits are those of a physical cut.",
    "sparse": "Single weights were set to zero. Masked zeros are not compression: the network keeps its shape, a zero "
    "is stored and multiplied like any number, and neither size nor latency falls on this hardware.",
}
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


def write(folder: Path | str, margin: float | None = None) -> Path:
    """The path of `report.html`, written with `figures/*.png` into a folder of `compare`, `prune` or `train`.

    `margin` is that of the lossless point, by default the one of the last run.

    Raises: UsageError where the folder holds none of these or nothing is finished, DataError where a file is broken.
    """
    folder = Path(folder)
    if (folder / "study.json").exists():
        kept = Store(folder)
        if "course" in kept.study:
            raise _of_schedule(folder)
        shown, figures = _compared(kept, margin)
    elif (folder / "recipe.json").exists():
        recipe = _recipe(folder)
        if "course" in recipe.get("provenance", {}):
            raise _of_schedule(folder)
        if "history" in recipe.get("figures", {}):
            shown, figures = _trained(recipe)
            return page.render("training.html.j2", folder, figures, **shown)
        shown, figures = _pruned(folder, recipe)
    elif (folder / "audit.json").exists():
        raise UsageError(f"{folder} holds an audit: give the same audit command again, finished cells are kept")
    else:
        raise UsageError(f"{folder} holds no study and no saved model: give the --out of a compare, a prune or a train")
    return page.render("report.html.j2", folder, figures, **shown)


def _of_schedule(folder: Path) -> UsageError:
    return UsageError(
        f"{folder} is a schedule's, whose levels share a page: give the same schedule or study command again, which "
        "writes that and trains nothing"
    )


def write_grid(
    folder: Path,
    *,
    title: str,
    results: Mapping[str, Mapping[str, Any]],
    pairs: Sequence[Mapping[str, Any]],
    mode: str,
    command: str,
) -> Path:
    """The path of the page of a study file: what `compare` found for each model, with links to their own pages.

    `pairs` are differences of two contenders' mean accuracy for a model: `first`, `second`, `model`, `mean`, `low`,
    `high`, None where not both were measured that far.
    """
    return page.render(
        "grid.html.j2",
        folder,
        {},
        title=title,
        results=results,
        best={
            name: sorted(found["sauce"], key=lambda contender: -found["sauce"][contender]["mean"])
            for name, found in results.items()
        },
        fractions=[f"{fraction:g}" for fraction in THRESHOLDS],
        pairs=pairs,
        removed=REMOVED[mode],
        mode=MODES[mode],
        command=command,
    )


def _compared(study: Store, margin: float | None) -> tuple[dict[str, Any], dict[str, bytes]]:
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
    with_categories = {group.criterion: group.plans for group in groups if _has_categories(group.plans)}
    verdict, rule = _verdict(groups, pairs)
    seeds = sorted({record.trial.seed for group in groups for record in group.records})
    n_images = len(leader.curves[0].image_ids)
    shown = {
        "title": f"{first.trial.model.get('spec', 'model')} on {first.trial.data.get('spec', 'data')}",
        "verdict": verdict,
        "rule": rule,
        "warnings": [*_warnings(study, groups), *cautions(n_images, margin), *_slower(costs)],
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
        "costs": _cost_table(costs),
        "worst": _worst_of(leader),
        "what": "cut",
        "layers": [],
        "settings": {
            **dict(page.flat(study.study)),
            "seeds finished": ", ".join(map(str, seeds)),
            "test images": f"{n_images:,}",
            "dense accuracy": page.percent(first.result["dense_accuracy"]),
            "chance": page.percent(first.result["chance"]),
        },
        "mode": MODES[mode],
        "run": run,
    }
    figures = {"curves": _draw_curves(groups, REMOVED[mode])}
    if with_categories:
        figures["categories"] = _draw_categories(with_categories)
    return shown, figures


def _recipe(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "recipe.json").read_bytes()))
    except ValueError as error:
        raise DataError(f"{folder / 'recipe.json'} can't be read ({error}): make it again in another folder") from error


def _trained(recipe: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, bytes]]:
    about, run = recipe["figures"], recipe["provenance"]
    reached = share(round(about["accuracy"] * about["n_images"]), about["n_images"])
    before = about.get("accuracy_before")
    verdict = f"{page.percent(about['accuracy'])} of {about['n_images']:,} test images are right"
    if before is not None:
        verdict += f", {page.percent(before)} before ({100 * (about['accuracy'] - before):+.1f})"
    epochs = f"{about['epochs']} epoch{'s' if about['epochs'] > 1 else ''}"
    shown_above = ("command", "versions", "history", "notes", "class_accuracy", "class_counts")
    shown = {
        "title": f"{recipe['model']['spec']}, {'trained' if before is None else 'fine-tuned'}",
        "verdict": f"{verdict}.",
        "rule": f"Weights of epoch {about['epoch']} of {epochs}. The 95% interval of the accuracy is "
        f"{page.percent(reached.low)} to {page.percent(reached.high)} (Wilson's); the test images chose nothing.",
        "warnings": about["notes"],
        "history": about["history"],
        "epoch": about["epoch"],
        "classes": list(zip(recipe["class_names"] or (), about["class_counts"], about["class_accuracy"], strict=False)),
        "settings": dict(page.flat({key: value for key, value in {**run, **about}.items() if key not in shown_above})),
        "run": run,
    }
    return shown, {"epochs": _draw_epochs(about["history"], about["epoch"])}


def _pruned(folder: Path, recipe: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, bytes]]:
    about, run = {"class_names": recipe.get("class_names"), **recipe.get("figures", {})}, recipe.get("provenance", {})
    shown_above = ("dense", "cut", "sparse", "layers", "notes", "class_names", "class_counts", "command", "versions")
    what = "sparse" if "sparse" in about else "cut"
    dense, cut = about.get("dense", {}), about.get(what, {})
    mode = "sparse" if what == "sparse" else run.get("mode", "cut")
    costs = {"dense": dense, what: cut}
    plans = [read_plan(folder / "plan.npz")] if (folder / "plan.npz").exists() else []
    with_categories = {plans[0].method: plans} if _has_categories(plans) else {}
    verdict, rule = _verdict_of_cut(dense, cut, about.get("n_images"), what)
    shown = {
        "title": f"{recipe.get('model', {}).get('spec', 'model')}, {'sparse' if what == 'sparse' else 'pruned'}",
        "verdict": verdict,
        "rule": rule,
        "warnings": [*about.get("notes", []), *(_slower(costs) if mode == "cut" else [])],
        "groups": [],
        "passes": {},
        "categories": list(with_categories),
        "costs": _cost_table(costs),
        "worst": _worst_of_cut(about, what),
        "what": what,
        "layers": about.get("layers", []),
        "settings": dict(page.flat({key: value for key, value in {**run, **about}.items() if key not in shown_above})),
        "mode": MODES[mode],
        "run": run,
    }
    return shown, {"categories": _draw_categories(with_categories)} if with_categories else {}


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
            f"{name} reaches a SAUCE of {best.mean:.1f} ({page.seeds(best.n)}).",
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
    span = f"95% interval {of_t.low:.1f} to {of_t.high:.1f}, paired over {page.seeds(of_t.n)}"
    open_ = [pair for pair in against if pair.p is None or pair.p >= 0.05]
    if not open_:
        worst = max(pair.p for pair in against if pair.p is not None)
        return (
            f"{name} leads: SAUCE {best.mean:.1f}, {gap:.1f} above {runner.second}, the next best ({span}).",
            f"{rule} The largest of its p-values is {page.p_value(worst)}.",
        )
    rivals = page.listed([pair.second for pair in open_])
    return (
        f"No criterion leads: {name} has the highest mean SAUCE, {best.mean:.1f}, but the seeds do not separate it "
        f"from {rivals} ({runner.second}: {gap:.1f} lower, {span}).",
        rule,
    )


def _verdict_of_cut(
    dense: Mapping[str, Any], cut: Mapping[str, Any], n_images: int | None, what: str
) -> tuple[str, str]:
    parts = []
    if "accuracy" in dense and "accuracy" in cut:
        change = 100 * (cut["accuracy"] - dense["accuracy"])
        parts.append(
            f"accuracy goes from {page.percent(dense['accuracy'])} to {page.percent(cut['accuracy'])} ({change:+.1f})"
        )
    if what == "sparse":
        masked, everything = page.percent(cut["sparsity"]), page.percent(cut["zeros"])
        parts.append(f"with {masked} of the masked layers' weights ({everything} of all parameters) at zero")
    for name, noun in (("parameters", "parameters"), ("flops", "FLOPs"), ("latency_ms", "latency")):
        if what == "cut" and dense.get(name) and name in cut:
            parts.append(f"{noun} {100 * (cut[name] / dense[name] - 1):+.0f}%")
    if not parts:
        return "The network was cut; no figures were kept.", ""
    said = ", ".join(parts) + ("; it is as large and as slow as before" if what == "sparse" else "")
    rule = ""
    if n_images and "accuracy" in cut:
        cut_share = share(round(cut["accuracy"] * n_images), n_images)
        rule = (
            f"Measured on {n_images:,} test images; the 95% interval of the {what} network's accuracy is "
            f"{page.percent(cut_share.low)} to {page.percent(cut_share.high)} (Wilson's)."
        )
    return f"{said[0].upper()}{said[1:]}.", rule


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
                f"{group.criterion} was measured up to {page.percent(min(reach))} only; "
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


def _has_categories(plans: Sequence[Plan]) -> bool:
    return any((plan.category != "").any() for plan in plans)


def _shares(plans: Sequence[Plan], category: str) -> Array:
    """(sites,) the mean share of a category among the units of each site."""
    positions = range(len(plans[0].sites))
    found = [[(plan.category[plan.site == position] == category).mean() for position in positions] for plan in plans]
    return np.asarray(np.mean(found, axis=0))


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


def _cost_table(columns: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """Rows of (name, printed figures, factors of the dense one), in the order of FIGURES; None where none is known."""
    rows = []
    for name, (noun, form) in FIGURES.items():
        values = [figures.get(name) for figures in columns.values()]
        if any(value is not None for value in values):
            dense = values[0]
            factors = [value / dense if dense and value is not None and form != "percent" else None for value in values]
            rows.append((noun, [page.printed(value, form) for value in values], [None, *factors[1:]]))
    return {"columns": list(columns), "rows": rows} if rows else None


def _slower(columns: Mapping[str, Mapping[str, Any]]) -> list[str]:
    dense = columns.get("dense", {}).get("latency_ms")
    return [
        f"{name}: the cut network takes {figures['latency_ms'] / dense:.2f} times as long as the dense one; odd "
        "channel counts are the usual reason, see --round-to."
        for name, figures in columns.items()
        if dense and figures.get("latency_ms", 0) > dense
    ]


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
    where = f"{group.criterion} with {page.percent(group.curves[0].ratio[point])} of the units removed"
    return {"where": where, "rows": _worst(results[0], np.mean(dense, axis=0), np.mean(cut, axis=0))}


def _worst_of_cut(about: Mapping[str, Any], what: str) -> dict[str, Any] | None:
    dense, cut = (about.get(which, {}).get("class_accuracy") for which in ("dense", what))
    if dense is None or cut is None:
        return None
    return {
        "where": f"The {what} network",
        "rows": _worst(about, *(np.array(x, dtype=np.float64) for x in (dense, cut))),
    }


def _worst(about: Mapping[str, Any], dense: Array, cut: Array) -> list[dict[str, Any]]:
    lost = dense - cut
    order = [int(k) for k in np.argsort(-lost, kind="stable") if np.isfinite(lost[k])][:N_WORST]
    return [
        {"name": about["class_names"][k], "n": about["class_counts"][k], "dense": dense[k], "cut": cut[k]}
        for k in order
    ]


# --- figures


def _draw_curves(groups: Sequence[_Group], removed: str) -> bytes:
    figure = Figure(figsize=(9.2, 5.2), layout="constrained")
    axes = figure.subplots()
    result = groups[0].records[0].result
    page.level(axes, result["dense_accuracy"], "dense", "--")
    page.level(axes, result["chance"], "chance", ":")
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
    page.calm(axes)
    return page.png(figure)


def _draw_epochs(history: Sequence[Mapping[str, Any]], chosen: int) -> bytes:
    """Losses and, beside them, accuracy and learning rate by epoch."""
    figure = Figure(figsize=(9.2, 3.6), layout="constrained")
    losses, right = figure.subplots(1, 2)
    epochs = [entry["epoch"] for entry in history]
    validated = history[0]["val_loss"] is not None
    losses.plot(epochs, [entry["train_loss"] for entry in history], "o-", ms=3, color="#0072B2", label="training")
    if validated:
        losses.plot(epochs, [entry["val_loss"] for entry in history], "o-", ms=3, color="#D55E00", label="validation")
        right.plot(epochs, [entry["val_accuracy"] for entry in history], "o-", ms=3, color="#D55E00", label="accuracy")
        right.yaxis.set_major_formatter(PercentFormatter(1))
    else:
        right.plot(epochs, [entry["lr"] for entry in history], "o-", ms=3, color=INK)
    losses.set(xlabel="epoch", ylabel="cross entropy")
    right.set(xlabel="epoch", ylabel="accuracy on validation images" if validated else "learning rate")
    losses.legend(frameon=False)
    for axes in (losses, right):
        axes.axvline(chosen, color=INK, linewidth=0.9, linestyle=":")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        page.calm(axes)
    return page.png(figure)


def _draw_categories(plans: Mapping[str, Sequence[Plan]]) -> bytes:
    """Stacked shares of a site's units, sites from input to output: the paper's figure 12."""
    figure = Figure(figsize=(8.4, 1.2 + 1.6 * len(plans)), layout="constrained")
    rows = figure.subplots(len(plans), sharex=True, squeeze=False)[:, 0]
    layers = [site.layer for site in next(iter(plans.values()))[0].sites]
    for axes, (criterion, of_criterion) in zip(rows, plans.items(), strict=True):
        bottom = np.zeros(len(layers))
        for category, colour in CATEGORY_COLOURS.items():
            share = _shares(of_criterion, category)
            if share.any():
                axes.bar(np.arange(len(layers)), share, 0.84, bottom, color=colour, label=category or "undecided")
            bottom += share
        axes.set(ylim=(0, 1), xlim=(-0.6, len(layers) - 0.4), yticks=[0, 0.5, 1])
        axes.set_title(criterion, loc="left", fontsize=10, color=INK)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        page.calm(axes)
        axes.grid(False)
    # A $ would start a formula.
    rows[-1].set_xticks(range(len(layers)), [name.replace("$", r"\$") for name in layers], rotation=90, fontsize=7)
    handles = {label: handle for axes in rows for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside upper right", ncols=4, frameon=False, fontsize=9)
    return page.png(figure)
