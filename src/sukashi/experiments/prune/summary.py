"""What a cut did to a network, from its folder alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from sukashi.core.errors import UsageError
from sukashi.core.experiment import Result
from sukashi.core.stats import share
from sukashi.experiments.workspace import Workspace
from sukashi.report import networks, words


class PruneResult(Result):
    """A pruned network beside the dense one.

    `dense` and `pruned` hold accuracy, class_accuracy (None for a class without images), parameters, flops (of an
    image), peak_bytes (of a batch) and bytes (of the file); with a scope zeros_in_masked_layers and zeros_in_all too.
    Fractions removed are of all units, of the weights in scope, and of all parameters. `layers` counts the weights
    removed from each, with a scope. `latency` of a batch is what a clock decides, and so is the `verdict`: the medians
    dense_ms and cut_ms, and the factor between them with its 95 % interval, low to high, both networks timed in turns.
    """

    kind: ClassVar[str] = "prune"
    of_call: ClassVar[tuple[str, ...]] = (*Result.of_call, "latency", "verdict")

    model: str
    data: str
    criterion: str
    scope: str | None
    mode: str
    ratio_asked: float
    units_removed: float | None
    weights_removed: float | None
    parameters_removed: float
    dense: dict[str, Any]
    pruned: dict[str, Any]
    latency: dict[str, float]
    n_images: int
    class_names: list[str]
    class_counts: list[int]
    layers: list[dict[str, Any]]
    worst_classes: dict[str, Any] | None
    onnx: str | None
    verdict: str
    rule: str

    def text(self) -> str:
        told = networks.figure_rows({"dense": self.dense, "pruned": self.pruned})
        removed = [("units removed", self.units_removed), ("weights removed", self.weights_removed)]
        rows = [[noun, *values] for noun, values in told]
        if self.latency:
            times = [f"{self.latency[name]:.2f}" for name in ("dense_ms", "cut_ms")]
            rows += [["latency, ms", *times], ["", "", f"× {networks.factor(self.latency)}"]]
        rows += [[noun, "", words.percent(value)] for noun, value in removed if value is not None]
        rows.append(["parameters removed", "", words.percent(self.parameters_removed)])
        layers = [
            [row["layer"], f"{row['weights']:,}", f"{row['removed']:,}", f"{row['removed'] / row['weights']:.1%}"]
            for row in self.layers
        ]
        said = [words.table(["layer", "weights", "removed", "share"], layers), ""] if layers else []
        said.append(words.table(["", "dense", "pruned"], rows))
        if self.scope is not None:
            said += ["", networks.MODES["sparse"]]
        said += self.remarks(*self.slower())
        return "\n".join([*said, "", f"Saved: {self.out}", *words.where(self)])

    def slower(self) -> list[str]:
        """A sentence where cutting made the network slower."""
        return networks.slower({"pruned": self.latency}) if self.latency and self.mode == "cut" else []

    def table(self) -> list[dict[str, Any]]:
        """A row for each of the two networks."""
        about = {"model": self.model, "data": self.data, "criterion": self.criterion, "n_images": self.n_images}
        return [
            {**about, "network": name, **{key: value for key, value in figures.items() if key != "class_accuracy"}}
            for name, figures in (("dense", self.dense), ("pruned", self.pruned))
        ]


def summary(space: Workspace) -> PruneResult:
    """Raises UsageError where the network is not there."""
    records = space.records()
    if not records or "criterion" not in records[0].about:
        raise UsageError(f"{space.folder} holds no finished network: give the same prune command again")
    about, found = records[0].about, records[0].result
    clocked = space.logged("latency")[-1:]
    latency = networks.timed(clocked) if clocked else {}
    dense, pruned, scope = found["dense"], found["pruned"], about["scope"]
    classes = (np.array(of["class_accuracy"], dtype=np.float64) for of in (dense, pruned))
    within = share(round(pruned["accuracy"] * found["n_images"]), found["n_images"])
    return PruneResult(
        model=about["model"]["spec"],
        data=about["data"]["spec"],
        criterion=about["criterion"],
        scope=scope,
        mode="sparse" if scope else about["mode"],
        **{name: about[name] for name in ("ratio_asked",)},
        **{name: found[name] for name in ("units_removed", "weights_removed", "n_images", "class_names")},
        **{name: found[name] for name in ("class_counts", "layers", "dense", "pruned")},
        parameters_removed=1 - pruned["parameters"] / dense["parameters"],
        latency=latency,
        worst_classes={
            "where": "The pruned network",
            "what": "pruned",
            "rows": networks.worst_classes(found, *classes),
        },
        onnx="onnx/model.onnx" if any("onnx" in record.about for record in records) else None,
        verdict=_verdict(dense, pruned, latency, scope),
        rule=f"Measured on {found['n_images']:,} test images; the 95% interval of the pruned network's accuracy is "
        f"{words.percent(within.low)} to {words.percent(within.high)} (Wilson's).",
        warnings=found["warnings"],
        notes=found["notes"],
    )


def _verdict(
    dense: Mapping[str, Any], pruned: Mapping[str, Any], latency: Mapping[str, float], scope: str | None
) -> str:
    change = 100 * (pruned["accuracy"] - dense["accuracy"])
    parts = [
        f"accuracy goes from {words.percent(dense['accuracy'])} to {words.percent(pruned['accuracy'])} ({change:+.1f})"
    ]
    if scope is not None:
        masked = words.percent(pruned["zeros_in_masked_layers"])
        everything = words.percent(pruned["zeros_in_all"])
        parts.append(f"with {masked} of the masked layers' weights ({everything} of all parameters) at zero")
    else:
        for name, noun in (("parameters", "parameters"), ("flops", "FLOPs")):
            if dense[name]:
                parts.append(f"{noun} {100 * (pruned[name] / dense[name] - 1):+.0f}%")
        if latency:
            sure = not latency["low"] <= 1 <= latency["high"]
            parts.append(f"latency {100 * (latency['factor'] - 1):+.0f}%" if sure else "latency not shown to change")
    said = ", ".join(parts) + ("; it is as large and as slow as before" if scope is not None else "")
    return f"{said[0].upper()}{said[1:]}."
