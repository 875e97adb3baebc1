"""What commands print of what their functions return."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from sukashi.cli.console import duration, to_stdout


def check(result: dict[str, Any], limit: float) -> None:
    sites = Table("site", "kind", "units", box=None, pad_edge=False)
    for site in result["sites"]:
        sites.add_row(site["layer"], site["kind"], str(site["units"]))
    to_stdout(sites)
    print(f"\n{len(result['sites'])} sites, {result['units']} units, {result['parameters']:,} parameters")
    for layer, reason in result["refused"].items():
        print(f"not cut: {layer}: {reason}")
    for split, counts in result["class_counts"].items():
        print(f"{split}: {sum(counts)} images, {min(counts)} to {max(counts)} a class")
    for note in result["notes"]:
        print(f"note: {note}")
    for name, seconds in result["estimated_seconds"].items():
        print(f"{name:12s} about {duration(seconds)}")
    for name, reason in result["cannot"].items():
        print(f"{name}: {reason}")
    for name in result["unmeasured"]:
        print(f"{name}: not estimated within {limit:g} s; give --limit more")


def prune(result: dict[str, Any]) -> None:
    what = "sparse" if "sparse" in result else "cut"
    table = Table("", "dense", what, box=None, pad_edge=False)
    dense, cut = result["dense"], result[what]
    renamed = {
        "ratio": "units removed",
        "fraction": "parameters removed",
        "sparsity": "zeros in masked layers",
        "zeros": "zeros in all parameters",
    }
    for name in cut:
        table.add_row(renamed.get(name, name.replace("_", " ")), _figure(dense.get(name)), _figure(cut[name]))
    if "layers" in result:
        layers = Table("layer", "weights", "removed", "share", box=None, pad_edge=False)
        for layer in result["layers"]:
            share = f"{layer['removed'] / layer['weights']:.1%}"
            layers.add_row(layer["layer"], f"{layer['weights']:,}", f"{layer['removed']:,}", share)
        to_stdout(layers)
        print()
    to_stdout(table)
    if "layers" in result:
        print(f"\n{result['note']}")
    for warning in result["warnings"]:
        print(f"warning: {warning}")
    print(f"\nSaved: {result['out']}\nReport: {result['report']}")


def compare(result: dict[str, Any]) -> None:
    comparison(result)
    print(f"\nReport: {Path(result['out']) / 'report.html'}")


def comparison(result: dict[str, Any]) -> None:
    margin = next(iter(result["lossless"].values()))["margin"]
    table = Table(
        *("criterion", "SAUCE", "95 % interval", f"lossless ({100 * margin:g} points)", "95 % interval"),
        "after each pass: removed -> accuracy",
        box=None,
        pad_edge=False,
    )
    for name, sauce in sorted(result["sauce"].items(), key=lambda item: -item[1]["mean"]):
        interval = "one seed" if sauce["low"] is None else f"{sauce['low']:.1f} to {sauce['high']:.1f}"
        free = result["lossless"][name]["fraction"]
        passes = result["passes"][name][0]
        said = ", ".join(f"{p['fraction']:.2f} -> {p['accuracy']:.3f}" for p in passes[:4])
        table.add_row(
            *(
                name,
                f"{sauce['mean']:.1f}",
                interval,
                f"{free['mean']:.1%}",
                f"{free['low']:.1%} to {free['high']:.1%}",
            ),
            said + (", ..." if len(passes) > 4 else ""),
        )
    to_stdout(table)
    print(f"\ndense accuracy {result['dense_accuracy']:.3f}")
    for note in result["notes"]:
        print(f"note: {note}")
    for name, reason in result["refused"].items():
        print(f"refused: {name}: {reason}")


def train(result: dict[str, Any]) -> None:
    table = Table("", "", box=None, pad_edge=False, show_header=False)
    before = result["accuracy_before"]
    table.add_row("test accuracy", f"{result['accuracy']:.4f}" + ("" if before is None else f" (before: {before:.4f})"))
    if result["validation"]["accuracy"] is not None:
        table.add_row("validation accuracy", f"{result['validation']['accuracy']:.4f}")
    table.add_row("epochs", f"{result['epochs']}, weights of epoch {result['epoch']}")
    table.add_row("images a second", f"{result['images_per_second']:.0f}")
    table.add_row("waiting for images", f"{result['waiting']:.1%}")
    if result["zeros"] is not None:
        table.add_row("zeros", f"{result['zeros']:.1%} of the masked layers' weights")
    to_stdout(table)
    for note in result["notes"]:
        print(f"note: {note}")
    if result["finished"]:
        print(f"\n{result['out']} was finished already: nothing was done")
    elif result["resumed"]:
        print(f"\nWent on from step {result['resumed']}")
    print(f"\nSaved: {result['out']}\nReport: {result['report']}")


def schedule(result: dict[str, Any]) -> None:
    of_weights = result["removes"] == "weights"
    table = Table(
        *("contender", f"{result['removes']} removed", "asked for"),
        *("zeros at the end" if of_weights else "parameters removed", "accuracy, %", "95 % interval"),
        *("against dense, points", "95 % interval"),
        box=None,
        pad_edge=False,
    )
    for row in result["levels"]:
        right, change = row["accuracy"], row["difference"]
        less = row["zeros" if of_weights else "parameters"]
        table.add_row(
            *(row["contender"], f"{row['removed']:.1%}", f"{row['ratio']:.1%}", f"{less:.1%}"),
            f"{100 * right['mean']:.1f}",
            f"{100 * right['low']:.1f} to {100 * right['high']:.1f}",
            f"{100 * change['mean']:+.1f}",
            f"{100 * change['low']:+.1f} to {100 * change['high']:+.1f}",
        )
    to_stdout(table)
    dense = result["dense_accuracy"]
    print(f"\ndense accuracy {100 * dense['mean']:.1f} % ({100 * dense['low']:.1f} to {100 * dense['high']:.1f})")
    print(f"\n{result['verdict']}")
    for line in result["lines"]:
        print(line)
    for note in result["notes"]:
        print(f"note: {note}")
    if result["finished"]:
        print(f"\n{result['out']} was finished already: nothing was done")
    print(f"\nReport: {result['report']}")


def audit(result: dict[str, Any]) -> None:
    table = Table("model", "attribution", "measure", result["reference"], "model", "so", box=None, pad_edge=False)
    for row in result["comparisons"]:
        if row["measure"] not in result["measures"]:
            continue  # in probability: on the page, beside what that says
        told = row["said"] + (f", {row['weight']}" if row["changed"] else "")
        table.add_row(
            *(row["model"], row["attribution"], row["measure"], f"{row['reference']:.3f}", f"{row['mean']:.3f}", told)
        )
    to_stdout(table)
    print(f"\n{result['verdict']}")
    for line in result["lines"]:
        print(line)
    for name, reason in result["refused"].items():
        print(f"left out: {name}: {reason}")
    for note in result["notes"]:
        print(f"note: {note}")
    print(f"\nReport: {result['report']}")


def study(result: dict[str, Any]) -> None:
    if "levels" in result:
        schedule(result)
        return
    for name, found in result["models"].items():
        print(f"{name}\n")
        comparison(found)
        print()
    for pair in result["pairs"]:
        said = (
            "not measured that far"
            if pair["mean"] is None
            else (
                f"{100 * pair['mean']:+.1f} points, 95 % interval {100 * pair['low']:.1f} to {100 * pair['high']:.1f}"
            )
        )
        print(f"{pair['model']}: {pair['first']} minus {pair['second']}: {said}")
    print(f"\nReport: {result['report']}")


def _figure(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
