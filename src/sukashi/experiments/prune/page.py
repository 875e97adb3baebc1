"""The page of a pruned folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sukashi.core.stats import share
from sukashi.criteria.plans import read_plan
from sukashi.report import words
from sukashi.report.networks import MODES, cost_table, draw_categories, has_categories, slower, worst_classes


def pruned(folder: Path, recipe: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, bytes]]:
    about, run = {"class_names": recipe.get("class_names"), **recipe.get("figures", {})}, recipe.get("provenance", {})
    shown_above = ("dense", "cut", "sparse", "layers", "notes", "class_names", "class_counts", "command", "versions")
    what = "sparse" if "sparse" in about else "cut"
    dense, cut = about.get("dense", {}), about.get(what, {})
    mode = "sparse" if what == "sparse" else run.get("mode", "cut")
    costs = {"dense": dense, what: cut}
    plans = [read_plan(folder / "plan.npz")] if (folder / "plan.npz").exists() else []
    with_categories = {plans[0].method: plans} if has_categories(plans) else {}
    verdict, rule = _verdict_of_cut(dense, cut, about.get("n_images"), what)
    shown = {
        "title": f"{recipe.get('model', {}).get('spec', 'model')}, {'sparse' if what == 'sparse' else 'pruned'}",
        "verdict": verdict,
        "rule": rule,
        "warnings": [*about.get("notes", []), *(slower(costs) if mode == "cut" else [])],
        "groups": [],
        "passes": {},
        "categories": list(with_categories),
        "costs": cost_table(costs),
        "worst": _worst_of_cut(about, what),
        "what": what,
        "layers": about.get("layers", []),
        "settings": dict(words.flat({key: value for key, value in {**run, **about}.items() if key not in shown_above})),
        "mode": MODES[mode],
        "run": run,
    }
    return shown, {"categories": draw_categories(with_categories)} if with_categories else {}


def _verdict_of_cut(
    dense: Mapping[str, Any], cut: Mapping[str, Any], n_images: int | None, what: str
) -> tuple[str, str]:
    parts = []
    if "accuracy" in dense and "accuracy" in cut:
        change = 100 * (cut["accuracy"] - dense["accuracy"])
        parts.append(
            f"accuracy goes from {words.percent(dense['accuracy'])} to {words.percent(cut['accuracy'])} ({change:+.1f})"
        )
    if what == "sparse":
        masked, everything = words.percent(cut["sparsity"]), words.percent(cut["zeros"])
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
            f"{words.percent(cut_share.low)} to {words.percent(cut_share.high)} (Wilson's)."
        )
    return f"{said[0].upper()}{said[1:]}.", rule


def _worst_of_cut(about: Mapping[str, Any], what: str) -> dict[str, Any] | None:
    dense, cut = (about.get(which, {}).get("class_accuracy") for which in ("dense", what))
    if dense is None or cut is None:
        return None
    return {
        "where": f"The {what} network",
        "rows": worst_classes(about, *(np.array(x, dtype=np.float64) for x in (dense, cut))),
    }
