"""What a cut did to a network, from its folder alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from sukashi.core.errors import UsageError
from sukashi.core.experiment import Columns, Result
from sukashi.core.imported import is_import
from sukashi.core.schema import call_of, default_of
from sukashi.core.stats import share
from sukashi.experiments.columns import as_json, shared
from sukashi.experiments.prune.targets import BY_SETTING
from sukashi.experiments.reading import Images
from sukashi.experiments.train.settings import Finetune
from sukashi.experiments.workspace import Workspace
from sukashi.models import onnx
from sukashi.models.loaded import LIBRARIES, MEMORY
from sukashi.repairs import NONE
from sukashi.report import classes, networks, words

NETWORKS = "dense", "pruned"


class PruneResult(Result):
    """A pruned network beside the dense one.

    `dense` and `pruned` hold accuracy, parameters, flops (of an image), peak_bytes (of a pass over batch_size images)
    and bytes (of the file); with a scope zeros_in_masked_layers and zeros_in_all too. `classes` is what both make of
    each class: sensitivity, specificity, AUC, balanced accuracy, calibration, confusion, see `report.classes.by_class`.
    Fractions removed are of all units, of the weights in scope, and of all parameters. `ratio` is where the plan was
    cut: as asked, or found for a `target`, which holds its name, what was asked and what was reached. `layers` counts
    the units before and after, from input to output, with a scope the weights. `latency` and the `verdict` a clock
    decides: {images at once: the medians dense_ms and cut_ms, and the factor between them with its 95 % interval, low
    to high, both networks timed in turns}; `onnx_latency` is that of the ONNX file on a CPU, beside the dense network
    in torch. `ablated` says which subspaces of which layer it was mended to do without. `onnx` is the ONNX file in the
    folder, of `onnx_bytes` bytes, `infer` the script that asks it about images. `tuning` is the call that trains the
    network on, empty where that lies in memory.
    """

    kind: ClassVar[str] = "prune"
    of_call: ClassVar[tuple[str, ...]] = (*Result.of_call, "latency", "onnx_latency", "verdict", "tuning")
    columns: ClassVar[Columns] = {
        **shared(
            "model", "weights_sha256", "data", "criterion", "sampling", "repair", "options", "calibration", "seed"
        ),
        "mode": (str, "cut: the network got smaller; zero: units are silent; sparse: single weights are zero"),
        **shared("scope", "ratio_asked"),
        "ratio": (float, "where the order of the criterion was cut: as asked, or found for a target"),
        "network": (str, "dense: as it was given; pruned: what is left of it"),
        **shared("units_removed", "weights_removed", "parameters_removed", "flops_removed", "accuracy", "n_images"),
        "parameters": (int, "its parameters"),
        "flops": (int, "its FLOPs on one image"),
        "peak_bytes": (int, "memory at its peak in a pass over `batch_size` images, in bytes"),
        "batch_size": (int, "images of that pass"),
        "bytes": (int, "of its file of weights"),
        "zeros_in_masked_layers": (float, "with a scope: the share of the masked layers' weights that is zero"),
        "zeros_in_all": (float, "with a scope: the share of all parameters that is zero"),
    }

    model: str
    weights_sha256: str
    data: str
    criterion: str
    sampling: str
    options: dict[str, Any]
    calibration: int
    seed: int
    scope: str | None
    repair: str
    ablated: dict[str, Any] | None
    mode: str
    ratio_asked: float | None
    ratio: float
    target: dict[str, Any] | None
    units_removed: float | None
    weights_removed: float | None
    parameters_removed: float
    dense: dict[str, Any]
    pruned: dict[str, Any]
    latency: dict[str, dict[str, float]]
    onnx_latency: dict[str, dict[str, float]]
    n_images: int
    class_names: list[str]
    classes: dict[str, Any]
    layers: list[dict[str, Any]]
    onnx: str | None
    onnx_bytes: int | None
    infer: str | None
    tuning: str
    verdict: str
    rule: str

    def overview(self) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
        told = networks.figure_rows({"dense": self.dense, "pruned": self.pruned}, self.n_images)
        rows = [[noun, *values] for noun, values in told]
        for noun, of in self.clocks().items():
            rows += [[noun, *(words.printed(of["pruned"][name], "ms") for name in ("dense_ms", "cut_ms"))]]
            rows += [["  × dense, median of pairs of passes", "", networks.factor(of["pruned"])]]
        what, gone = ("weights", self.weights_removed) if self.scope else ("units", self.units_removed)
        assert gone is not None
        n, n_all = _counts(self.layers)
        rows.append([f"{what} removed", "", f"{words.percent(gone)} ({n:,} of {n_all:,})"])
        rows.append(["parameters removed", "", words.percent(self.parameters_removed)])
        rows += [[noun, *values] for noun, values in classes.overall(self.classes, NETWORKS)]
        return ["", "dense", "pruned"], rows

    def text(self) -> str:
        said = [words.table(*networks.layer_rows(self.layers)), ""] if self.layers else []
        said += [words.table(*self.overview()), "", classes.text(self.classes, NETWORKS)]
        if self.target is not None:
            said += ["", reached(self.target, self.ratio, self.layers)]
        if self.scope is not None:
            said += ["", networks.MODES["sparse"]]
        said += ["", *self.remarks(*self.slower()), "", self.verdict, self.rule, *self.mended]
        said += ["", f"Saved: {self.out}", *self.shipped(f"{self.out}/")]
        said += [f"Fine-tune what is left: `{self.tuning}`"] if self.tuning else []
        return "\n".join([*said, *words.where(self)])

    @property
    def mended(self) -> list[str]:
        """What a repair did, in a sentence."""
        if self.repair == NONE:
            return []
        gone = "those units silent" if self.scope is None else "those weights at zero"
        towards = ""
        if self.ablated is not None:
            numbers = words.listed([str(number) for number in self.ablated["numbers"]])
            plural = "s" * (len(self.ablated["numbers"]) > 1)
            towards = f" towards the dense network without subspace{plural} {numbers} of {self.ablated['layer']}"
        return [
            f"Mended by {self.repair} on the images that calibrate, without their classes{towards}: its weights are no "
            f"longer the dense network's, so that it is not the dense network with {gone}."
        ]

    def shipped(self, folder: str = "") -> list[str]:
        """The ONNX file, its size and what asks it about images, seen from the folder or from where that lies."""
        if self.onnx is None or self.onnx_bytes is None:
            return []
        file, size = f"{folder}{self.onnx}", words.printed(self.onnx_bytes, "bytes")
        line = [f"  {onnx.run_line(f'{folder}{self.infer}', file)}"] if self.infer else []
        return [f"ONNX: {file}, {size}", *line]

    def clocks(self) -> dict[str, dict[str, dict[str, float]]]:
        """Rows of latency: {what is timed: {network: its latency beside the dense one's}}."""
        timed = ((networks.LATENCY, self.latency), (f"{networks.LATENCY}, the ONNX file", self.onnx_latency))
        return {networks.at_once(noun, int(n)): {"pruned": found} for noun, of in timed for n, found in of.items()}

    def slower(self) -> list[str]:
        """A sentence where cutting made the network slower."""
        if self.mode != "cut":
            return []
        return networks.slower({f"pruned, {networks.images_at_once(n)}": of for n, of in self.latency.items()})

    def table(self) -> list[dict[str, Any]]:
        """A row for each of the two networks."""
        dense, of_weights = self.dense, self.weights_removed is not None
        rows = []
        for name, figures in (("dense", dense), ("pruned", self.pruned)):
            gone = {
                "network": name,
                "options": as_json(self.options),
                "units_removed": None if of_weights else self.units_removed if name == "pruned" else 0.0,
                "weights_removed": None if not of_weights else self.weights_removed if name == "pruned" else 0.0,
                "parameters_removed": 1 - figures["parameters"] / dense["parameters"],
                "flops_removed": 1 - figures["flops"] / dense["flops"] if dense["flops"] else None,
            }
            found = {**dict(self), **gone, **figures}
            rows.append({column: found.get(column) for column in self.columns})
        return rows


def summary(space: Workspace) -> PruneResult:
    """Raises UsageError where the network is not there."""
    records = space.records()
    if not records or "criterion" not in records[0].about:
        raise UsageError(f"{space.folder} holds no finished network: give the same `sukashi.prune` again")
    about, found = records[0].about, records[0].result
    exported = [record for record in records if "onnx" in record.about]
    clocked = sorted(space.logged("latency"), key=lambda entry: entry["batch_size"])
    latency = {str(entry["batch_size"]): networks.timed([entry]) for entry in clocked}
    onnx_latency = {
        str(entry["batch_size"]): networks.timed([{"dense_ms": entry["dense_ms"], "cut_ms": entry["onnx_ms"]}])
        for entry in clocked
        if "onnx_ms" in entry
    }
    dense, pruned, scope = found["dense"], found["pruned"], about["scope"]
    by_class = classes.by_class(records[0].arrays("answers"), found["class_names"], NETWORKS)
    return PruneResult(
        model=about["model"]["spec"],
        weights_sha256=about["model"]["weights_sha256"],
        data=about["data"]["spec"],
        calibration=about["data"]["calibration"],
        **{name: about[name] for name in ("criterion", "sampling", "repair", "options", "seed")},
        ablated=about.get("ablated"),
        scope=scope,
        mode="sparse" if scope else about["mode"],
        ratio_asked=about["ratio_asked"],
        ratio=found.get("ratio", about["ratio_asked"]),
        target=found.get("target"),
        **{name: found[name] for name in ("units_removed", "weights_removed", "n_images", "class_names")},
        **{name: found[name] for name in ("layers", "dense", "pruned")},
        parameters_removed=1 - pruned["parameters"] / dense["parameters"],
        latency=latency,
        onnx_latency=onnx_latency,
        classes=by_class,
        onnx=f"onnx/{onnx.ONNX}" if exported else None,
        onnx_bytes=len(exported[0].read(onnx.ONNX)) if exported else None,
        infer=f"onnx/{onnx.INFER}" if exported and exported[0].has(onnx.INFER) else None,
        verdict=_verdict(dense, pruned, found["n_images"], latency, scope, by_class),
        tuning=_tuning(space),
        rule=_rule(found["n_images"], pruned["accuracy"], by_class["accuracy_change"]),
        warnings=found["warnings"],
        notes=found["notes"],
    )


def _counts(layers: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """How many units, or with a scope weights, were removed, and of how many."""
    return sum(of["removed"] for of in layers), sum(of["weights" if "weights" in of else "units"] for of in layers)


def reached(target: Mapping[str, Any], ratio: float, layers: Sequence[Mapping[str, Any]]) -> str:
    """What was reached of a target, and what was asked, in a sentence."""
    n, n_all = _counts(layers)
    rounded = "" if n == round(ratio * n_all) else f", {n:,} once widths are rounded"
    told = BY_SETTING[target["name"]].told(target)
    return f"{told}; at ratio {ratio:.4f} of the plan, {round(ratio * n_all):,} of {n_all:,} units{rounded}."


def _tuning(space: Workspace) -> str:
    """The call that trains the network on with the same data; empty where these, or its code, are in memory alone."""
    spec, data, folder = space.identity["model"]["spec"], space.identity["data"], str(space.folder)
    if spec.startswith(MEMORY) or data["spec"].startswith(MEMORY):
        return ""
    # What was made of somebody's code is rebuilt by that alone, see `models.saved.open_folder`.
    code = is_import(spec) and spec.partition(":")[0] not in LIBRARIES
    named = {"model": spec, "weights": folder} if code else {"model": folder}
    fields = {name: field for name, field in Images.model_fields.items() if name in data}
    read = {name: data[name] for name, field in fields.items() if data[name] != default_of(field)}
    return call_of(Finetune, {**named, "data": data["spec"], **read, "out": f"{folder}-tuned"})


def _rule(n_images: int, accuracy: float, change: Mapping[str, float]) -> str:
    """What more images could make of the accuracy and of its change."""
    within = share(round(accuracy * n_images), n_images)
    return (
        f"95% intervals for new images: the pruned network's accuracy {words.percent(within.low)} to "
        f"{words.percent(within.high)}, its change {100 * change['low']:+z.1f} to {100 * change['high']:+z.1f} points."
    )


def _verdict(
    dense: Mapping[str, Any],
    pruned: Mapping[str, Any],
    n_images: int,
    latency: Mapping[str, Mapping[str, float]],
    scope: str | None,
    by_class: Mapping[str, Any],
) -> str:
    change = 100 * (pruned["accuracy"] - dense["accuracy"])
    fallen, one_answer = classes.fallen(by_class["rows"], NETWORKS), by_class["one_answer"]["pruned"]
    if one_answer is not None:
        fallen = f"the pruned network takes every image for {words.of_class(one_answer)}"
    parts = [fallen] if fallen else []
    parts += [
        f"accuracy on {words.several(n_images, 'test image')} goes from {words.percent(dense['accuracy'])} to "
        f"{words.percent(pruned['accuracy'])} ({change:+z.1f})"
    ]
    if scope is not None:
        masked = words.percent(pruned["zeros_in_masked_layers"])
        everything = words.percent(pruned["zeros_in_all"])
        parts.append(f"with {masked} of the masked layers' weights ({everything} of all parameters) at zero")
    else:
        for name, noun in (("parameters", "parameters"), ("flops", "FLOPs")):
            if dense[name]:
                parts.append(f"{noun} {100 * (pruned[name] / dense[name] - 1):+z.0f}%")
        if latency:
            parts.append(f"latency {_slower_or_faster(latency)}")
    said = ", ".join(parts) + ("; it is as large and as slow as before" if scope is not None else "")
    return f"{said[0].upper()}{said[1:]}."


def _slower_or_faster(latency: Mapping[str, Mapping[str, float]]) -> str:
    """What the cut did to the time of many images, and of one: -40% for 32 images at once, -20% for one image."""
    sure = {n: of for n, of in latency.items() if not of["low"] <= 1 <= of["high"]}
    told = [f"{100 * (of['factor'] - 1):+z.0f}% for {networks.images_at_once(n)}" for n, of in sure.items()]
    if len(sure) < len(latency):
        unsure = words.listed([networks.images_at_once(n) for n in latency if n not in sure])
        told.append("not shown to change" + (f" for {unsure}" if sure else ""))
    return ", ".join(told)
