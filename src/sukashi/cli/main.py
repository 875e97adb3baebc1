"""The command line: reads arguments, calls the functions of the same name, prints what they return. No mathematics."""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

if TYPE_CHECKING:
    from sukashi.core.progress import Listener, Task

app = typer.Typer(
    name="sukashi",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
log = Console(stderr=True)
# Seconds: where progress is not drawn, a line says first after FIRST_LINE and then every LINE how far the work is.
FIRST_LINE, LINE = 10.0, 30.0

DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
WorkersOption = Annotated[int, typer.Option(help="Threads that decode images.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on stdout; logs go to stderr.")]
ModeOption = Annotated[
    str, typer.Option(help="cut: layers get smaller. zero: units are silenced, shapes stay, shares are of units.")
]
MarginOption = Annotated[float, typer.Option(help="Accuracy may be this much lower and count as lossless.")]
TensorboardOption = Annotated[bool, typer.Option("--tensorboard", help="Write a TensorBoard log too.")]
MemoryOption = Annotated[float, typer.Option(help="GiB of images a process may keep; others are decoded each time.")]
OptionsOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="An option of a method: NAME=VALUE, or METHOD.NAME=VALUE. Repeatable."),
]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"sukashi {importlib.metadata.version('sukashi')}")
        raise typer.Exit


@app.callback()
def _global(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    """Prunes vision networks with explanations, and measures what the cut did to them."""


def _reading(
    model: Annotated[
        str,
        typer.Argument(help="sukashi:NAME, timm:NAME, torchvision:NAME, package.module:callable or a pruned folder."),
    ],
    data: Annotated[str, typer.Option("--data", help="digits, shapes, torchvision:NAME, or a folder of images.")],
    weights: Annotated[
        Path | None, typer.Option(help="Weights: .safetensors, or .pt/.pth holding tensors only.")
    ] = None,
    width: Annotated[int | None, typer.Option(help="Base width, for our own models.")] = None,
    n_classes: Annotated[
        int | None, typer.Option("--classes", help="Class count; by default that of the weights or of the data.")
    ] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Download pretrained weights.")] = False,
    output: Annotated[str | None, typer.Option("--output", help="Which of a model's outputs holds the logits.")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave unreadable images out, and say so.")] = False,
    class_map: Annotated[
        Path | None,
        typer.Option(help='JSON file {"class of the data": its number in the model}, where the two differ.'),
    ] = None,
    only: Annotated[
        str | None, typer.Option(help="Leave all classes out but these, joined by commas; numbered in this order.")
    ] = None,
    max_pixels: Annotated[int, typer.Option(help="Pixels an image may have.")] = 64_000_000,
    calibration: Annotated[int, typer.Option(help="Calibration images a class, from the training split.")] = 32,
    test_images: Annotated[int, typer.Option(help="Test images at most, evenly over the classes.")] = 2000,
    device: DeviceOption = "auto",
    workers: WorkersOption = 0,
) -> None:
    """The options that check, compare and prune share, named as the keywords of their functions: a signature only."""


def _training(
    epochs: Annotated[int | None, typer.Option(help="Passes over the training images; default 20.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images a step, over all processes; default 128.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="sgd or adamw; default sgd.")] = None,
    lr: Annotated[
        float | None,
        typer.Option(help="Learning rate; default 0.05 for sgd, 0.001 for adamw, a tenth to fine-tune."),
    ] = None,
    momentum: Annotated[float | None, typer.Option(help="Of sgd; default 0.9.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Default 0.0005 for sgd, 0.05 for adamw.")] = None,
    schedule: Annotated[
        str | None,
        typer.Option(help="Of the rate: cosine, or step (a tenth after 1/2 and 3/4 of the epochs); default cosine."),
    ] = None,
    warmup: Annotated[int | None, typer.Option(help="Epochs in which the rate rises; default 0.")] = None,
    label_smoothing: Annotated[
        float | None, typer.Option(help="Share of each target given to all classes; default 0.")
    ] = None,
    augment: Annotated[
        str | None, typer.Option(help="Random views: none, crop_flip, resized_crop or affine; default none.")
    ] = None,
    ema: Annotated[
        float | None, typer.Option(help="Decay of a moving average of the weights; default 0: no average.")
    ] = None,
    patience: Annotated[
        int | None, typer.Option(help="Stop so many epochs after the best; default 0: run to the end.")
    ] = None,
    validation: Annotated[
        float | None,
        typer.Option(help="Share of each class held out to choose on, where the data bring no val; default 0.1."),
    ] = None,
    enforce_mask: Annotated[
        bool | None,
        typer.Option("--enforce-mask/--no-enforce-mask", help="Keep the zeros of a mask zero; default --enforce-mask."),
    ] = None,
    size: Annotated[int | None, typer.Option(help="Side of the images, instead of the model's own.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of random weights, order of images, views and dropout; default 0.")
    ] = None,
) -> None:
    """The settings that train and finetune share, named as those of `training.Training`; None leaves its default.

    The defaults are told in words, because their home imports torch and help must not wait for it.
    """


def _shares(
    *, without: tuple[str, ...] = (), **groups: Callable[..., None]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command the options of other signatures beside its own; it gets those of each as one dictionary."""

    def wrap(command: Callable[..., None]) -> Callable[..., None]:
        shared = {
            group: [p for p in inspect.signature(source, eval_str=True).parameters.values() if p.name not in without]
            for group, source in groups.items()
        }
        signature = inspect.signature(command, eval_str=True)
        own = [p for name, p in signature.parameters.items() if name not in groups]

        def run(**given: Any) -> None:
            taken = {group: {p.name: given.pop(p.name) for p in found} for group, found in shared.items()}
            with _working():
                reading = taken["reading"]
                reading["class_map"] = _class_map(reading["class_map"])
                reading["only"] = None if reading["only"] is None else _names(reading["only"])
            command(**taken, **given)

        # typer reads what a command takes from its signature and annotations.
        parameters = [p.replace(kind=p.KEYWORD_ONLY) for found in (*shared.values(), own) for p in found]
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return wrap


_reads = _shares(reading=_reading)
_audits = _shares(reading=_reading, without=("model", "calibration", "test_images"))
_trains = _shares(reading=_reading, settings=_training, without=("calibration",))
_schedules = _shares(reading=_reading, settings=_training)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for results.")] = Path("runs/demo"), as_json: JsonOption = False
) -> None:
    """Train a small network on digits, compare all criteria on it, cut it, and write the report."""
    with _working():
        from sukashi.experiments import demo as embedded

        result = embedded.run(out, command=_command())
    _print_comparison(result, as_json)
    if not as_json:
        print(f"\nReport: {result['report']}")
        print("Your own model next:")
        print("  sukashi check timm:resnet18 --data path/to/images")
        print("  sukashi compare MODEL --data path/to/images --criteria magnitude,cswap,drift --out runs/mine")


@app.command("list")
def list_(
    what: Annotated[str, typer.Argument(help="criteria, attributions, schedules, models, data or measures.")],
    name: Annotated[str | None, typer.Argument(help="One of them: what it computes and its options.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List what there is: criteria, attributions, schedules, models, data or measures; or tell all about one method."""
    with _working():
        from sukashi.experiments import catalogue

        rows = catalogue.rows(what)
        method = None if name is None else catalogue.about(what, name)
    if as_json:
        _print_json({what: rows} if method is None else method)
        return
    if method is not None:
        print(f"{method['name']}: {method['documentation']}\n\nSource: {method['source']}")
        for option, default in method["options"].items():
            print(f"--set {option}={default}")
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    _to_stdout(table)


@app.command()
@_reads
def check(
    reading: dict[str, Any],
    limit: Annotated[float, typer.Option(help="Seconds the check may take.")] = 60,
    as_json: JsonOption = False,
) -> None:
    """Preflight: sites, what can't be cut and why, class counts, and the estimated cost of each criterion."""
    with _working():
        from sukashi.experiments import check

        result = check.check(limit=limit, **reading)
    if as_json:
        _print_json(result)
        return
    sites = Table("site", "kind", "units", box=None, pad_edge=False)
    for site in result["sites"]:
        sites.add_row(site["layer"], site["kind"], str(site["units"]))
    _to_stdout(sites)
    print(f"\n{len(result['sites'])} sites, {result['units']} units, {result['parameters']:,} parameters")
    for layer, reason in result["refused"].items():
        print(f"not cut: {layer}: {reason}")
    for split, counts in result["class_counts"].items():
        print(f"{split}: {sum(counts)} images, {min(counts)} to {max(counts)} a class")
    for note in result["notes"]:
        print(f"note: {note}")
    for name, seconds in result["estimated_seconds"].items():
        print(f"{name:12s} about {_duration(seconds)}")
    for name, reason in result["cannot"].items():
        print(f"{name}: {reason}")
    for name in result["unmeasured"]:
        print(f"{name}: not estimated within {limit:g} s; give --limit more")


@app.command()
@_reads
def prune(
    reading: dict[str, Any],
    criterion: Annotated[str, typer.Option(help="See `sukashi list criteria`.")],
    ratio: Annotated[float, typer.Option(help="Fraction to remove of units, or with --scope of weights; in [0, 1).")],
    out: Annotated[Path, typer.Option(help="Folder for the cut model; must not exist.")],
    mode: ModeOption = "cut",
    round_to: Annotated[
        int | None, typer.Option(help="Keep a multiple of this many units a site; 1 = exact ratio; default 8.")
    ] = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="Write model.onnx too, checked in onnxruntime.")] = False,
    scope: Annotated[
        str | None,
        typer.Option(
            help="Set single weights to zero instead, the lowest of: global (all), layer, row (one output's), or N:M "
            "(N of M inputs stay, as 2:4). Nothing gets smaller or faster."
        ),
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="With --scope: a layer to leave alone. Repeatable.")] = None,
    sequential: Annotated[
        bool,
        typer.Option("--sequential", help="With --scope: layer by layer, those before it already pruned."),
    ] = False,
    seed: Annotated[int, typer.Option(help="Draws calibration images and random scores.")] = 0,
    sampling: Annotated[str, typer.Option(help="Calibration images: random, confidence or clustering.")] = "random",
    options: OptionsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Cut a model for real, or with --scope make it sparse, and save it as a folder that `sukashi.load` rebuilds."""
    with _working():
        from sukashi.experiments.prune.run import prune

        result = prune(
            criterion=criterion,
            ratio=ratio,
            out=out,
            mode=mode,
            round_to=round_to,
            onnx=onnx,
            scope=scope,
            exclude=exclude or (),
            sequential=sequential,
            seed=seed,
            sampling=sampling,
            options=_options(options, [criterion]).get(criterion, {}),
            command=_command(),
            **reading,
        )
    if as_json:
        _print_json(result)
        return
    what = "cut" if scope is None else "sparse"
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
    if scope is not None:
        layers = Table("layer", "weights", "removed", "share", box=None, pad_edge=False)
        for layer in result["layers"]:
            share = f"{layer['removed'] / layer['weights']:.1%}"
            layers.add_row(layer["layer"], f"{layer['weights']:,}", f"{layer['removed']:,}", share)
        _to_stdout(layers)
        print()
    _to_stdout(table)
    if scope is not None:
        print(f"\n{result['note']}")
    for warning in result["warnings"]:
        print(f"warning: {warning}")
    print(f"\nSaved: {result['out']}\nReport: {result['report']}")


@app.command()
@_reads
def compare(
    reading: dict[str, Any],
    criteria: Annotated[str, typer.Option(help="Names joined by commas; see `sukashi list criteria`.")],
    out: Annotated[Path, typer.Option(help="Folder for results; an interrupted comparison is resumed.")],
    ratios: Annotated[str, typer.Option(help="Fractions of units removed: START:STOP:STEP or a,b,c.")] = "0:0.95:0.05",
    seeds: Annotated[int, typer.Option(help="Number of seeds, counted from 0.")] = 3,
    sampling: Annotated[
        str, typer.Option(help="Calibration images: random, confidence, clustering; several joined by commas.")
    ] = "random",
    mode: ModeOption = "cut",
    margin: MarginOption = 0.01,
    options: OptionsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare criteria: accuracy against the fraction of parameters removed, over seeds, with SAUCE and a report."""
    with _working():
        from sukashi.experiments.compare.run import compare

        names = _names(criteria)
        result = compare(
            criteria=names,
            out=out,
            ratios=_ratios(ratios),
            seeds=seeds,
            sampling=_names(sampling),
            mode=mode,
            margin=margin,
            options=_options(options, names),
            command=_command(),
            **reading,
        )
    _print_comparison(result, as_json)
    if not as_json:
        print(f"\nReport: {Path(result['out']) / 'report.html'}")


@app.command()
@_trains
def train(
    reading: dict[str, Any],
    settings: dict[str, Any],
    out: Annotated[Path, typer.Option(help="Folder for the network; an interrupted training is resumed.")],
    tensorboard: TensorboardOption = False,
    memory: MemoryOption = 2.0,
    as_json: JsonOption = False,
) -> None:
    """Train a network, from random weights or from --weights, and save it as a folder that `sukashi.load` rebuilds."""
    _tune("train", reading, settings, as_json, out=out, tensorboard=tensorboard, memory=memory)


@app.command()
@_trains
def finetune(
    reading: dict[str, Any],
    settings: dict[str, Any],
    out: Annotated[Path, typer.Option(help="Folder for the network; an interrupted training is resumed.")],
    tensorboard: TensorboardOption = False,
    memory: MemoryOption = 2.0,
    as_json: JsonOption = False,
) -> None:
    """Train on from weights or a saved folder, whose cuts and mask stay, with a tenth of the learning rate."""
    _tune("finetune", reading, settings, as_json, out=out, tensorboard=tensorboard, memory=memory)


@app.command()
@_schedules
def schedule(
    reading: dict[str, Any],
    settings: dict[str, Any],
    how: Annotated[str, typer.Argument(help="oneshot, iterative or lottery; see `sukashi list schedules`.")],
    criteria: Annotated[str, typer.Option(help="Names joined by commas; see `sukashi list criteria`.")],
    ratios: Annotated[
        str,
        typer.Option(
            help="Fractions removed of the dense network's units, or with --scope weights: START:STOP:STEP or a,b,c."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the networks; an interrupted schedule is resumed.")],
    scope: Annotated[
        str | None, typer.Option(help="Remove single weights: global, layer, row or N:M. Without it, units.")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="With --scope: a layer to leave alone. Repeatable.")] = None,
    round_to: Annotated[int, typer.Option(help="Without --scope: keep a multiple of this many units a site.")] = 8,
    seeds: Annotated[int, typer.Option(help="Number of seeds, counted from 0.")] = 1,
    rewind: Annotated[int, typer.Option(help="Epoch to whose weights lottery goes back; 0 is the start.")] = 0,
    memory: MemoryOption = 2.0,
    options: OptionsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Prune and train to each of several ratios, one saved network a ratio, with accuracy over seeds and a report."""
    with _working():
        from sukashi.experiments.schedule import run

        names = _names(criteria)
        result = run.schedule(
            how=how,
            criteria=names,
            ratios=_ratios(ratios),
            out=out,
            scope=scope,
            exclude=exclude or (),
            round_to=round_to,
            seeds=seeds,
            rewind=rewind,
            options=_options(options, names),
            memory=memory,
            command=_command(),
            **reading,
            **{name: value for name, value in settings.items() if value is not None},
        )
    if not result:
        return  # another process speaks
    if as_json:
        _print_json(result)
    else:
        _print_levels(result)


def _print_levels(result: dict[str, Any]) -> None:
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
    _to_stdout(table)
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


def _tune(name: str, reading: dict[str, Any], settings: dict[str, Any], as_json: bool, **given: Any) -> None:
    chosen = {key: value for key, value in settings.items() if value is not None}
    with _working():
        from sukashi.experiments.train import run

        result = getattr(run, name)(command=_command(), **reading, **given, **chosen)
    if not result:
        return  # another process speaks
    if as_json:
        _print_json(result)
        return
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
    _to_stdout(table)
    for note in result["notes"]:
        print(f"note: {note}")
    if result["finished"]:
        print(f"\n{result['out']} was finished already: nothing was done")
    elif result["resumed"]:
        print(f"\nWent on from step {result['resumed']}")
    print(f"\nSaved: {result['out']}\nReport: {result['report']}")


@app.command()
@_audits
def audit(
    reading: dict[str, Any],
    models: Annotated[
        list[str], typer.Argument(help="Specs, which share --weights, or saved folders. The first is the reference.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for results; an interrupted audit is resumed.")],
    levels: Annotated[str, typer.Option(help="What to look at, joined by commas: saliency.")] = "saliency",
    attributions: Annotated[
        str | None,
        typer.Option(help="Default saliency,integrated_gradients; for transformers chefer too."),
    ] = None,
    measures: Annotated[
        str | None,
        typer.Option(
            help="Default gini,road,aopc,rank_correlation,ssim,top_overlap; for transformers insertion,deletion too, "
            "where the data know where the evidence is localisation too."
        ),
    ] = None,
    population: Annotated[
        str,
        typer.Option(help="Images looked at: both (reference and model get them right), reference (it does) or all."),
    ] = "both",
    test_images: Annotated[int, typer.Option(help="Test images at most, evenly over the classes.")] = 500,
    seed: Annotated[int, typer.Option(help="Draws ROAD's noise, the rounding and the bootstrap.")] = 0,
    options: OptionsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare saliency maps: are those of cut networks as sparse and as faithful as the reference's, and the same?"""
    with _working():
        from sukashi.attributions import attributions as explainers
        from sukashi.experiments import functions
        from sukashi.measures import measures as registry

        known = [method.name for method in (*explainers, *registry)]
        result = functions.audit(
            models,
            out=out,
            subjects=_names(levels),
            attributions=None if attributions is None else _names(attributions),
            measures=None if measures is None else _names(measures),
            population=population,
            test_images=test_images,
            seed=seed,
            options=_options(options, known),
            command=_command(),
            **reading,
        )
    assert result is not None
    if as_json:
        _print_json(result.to_json())
    else:
        print(result.text())


@app.command()
def study(
    file: Annotated[Path, typer.Argument(help="A study file (TOML): comparisons of models, or a schedule.")],
    out: Annotated[Path | None, typer.Option(help="Folder for results instead of the file's.")] = None,
    data: Annotated[str | None, typer.Option(help="Data instead of the file's.")] = None,
    device: DeviceOption = "auto",
    workers: WorkersOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Run a study file: a comparison for each of its models, or the levels of a schedule; resumed, with one page."""
    with _working():
        from sukashi.experiments import study_file

        result = study_file.run(file, out=out, data=data, device=device, workers=workers, command=_command())
    if as_json:
        _print_json(result)
        return
    if "levels" in result:
        _print_levels(result)
        return
    for name, found in result["models"].items():
        print(f"{name}\n")
        _print_comparison(found, as_json)
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


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="The --out of a compare, prune, train or finetune.")],
    margin: Annotated[
        float | None, typer.Option(help="Accuracy may be this much lower and count as lossless; default as compared.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write the page of a compare, prune, train or finetune again; schedule, audit and study write theirs when run."""
    with _working():
        from sukashi.experiments import pages

        path = pages.write(folder, margin)
    if as_json:
        _print_json({"report": str(path)})
    else:
        print(f"Report: {path}")


def _print_comparison(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        _print_json(result)
        return
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
    _to_stdout(table)
    print(f"\ndense accuracy {result['dense_accuracy']:.3f}")
    for note in result["notes"]:
        print(f"note: {note}")
    for name, reason in result["refused"].items():
        print(f"refused: {name}: {reason}")


def _names(text: str) -> list[str]:
    """Names joined by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def _ratios(text: str) -> list[float]:
    """START:STOP:STEP, both ends included, or a list."""
    from sukashi.core.errors import UsageError
    from sukashi.core.types import check_ratio

    try:
        parts = [float(part) for part in text.split(":" if ":" in text else ",")]
    except ValueError:
        raise UsageError(f"ratios must be START:STOP:STEP or a,b,c, got {text!r}: for example 0:0.95:0.05") from None
    if ":" in text:
        if len(parts) != 3 or not parts[2] >= 0.001 or not parts[1] >= parts[0]:
            raise UsageError(f"ratios must be START:STOP:STEP with STOP >= START and STEP >= 0.001, got {text!r}")
        start, stop, step = parts
        check_ratio(start)
        check_ratio(stop)
        # A step that does not divide the range ends below STOP, one that does must not miss it by a rounding error.
        parts = [round(start + i * step, 10) for i in range(math.floor((stop - start) / step + 1e-9) + 1)]
    for part in parts:
        check_ratio(part)
    return parts


def _options(settings: list[str] | None, criteria: list[str]) -> dict[str, dict[str, Any]]:
    """--set NAME=VALUE by criterion; values are JSON where they can be, else text."""
    from sukashi.core.errors import UsageError

    found: dict[str, dict[str, Any]] = {name: {} for name in criteria}
    for setting in settings or []:
        name, _, text = setting.partition("=")
        criterion, dot, option = name.rpartition(".")
        if not option or "=" not in setting:
            raise UsageError(f"--set must be NAME=VALUE or CRITERION.NAME=VALUE, got {setting!r}")
        if not dot:
            if len(criteria) != 1:
                raise UsageError(f"--set {setting}: with several criteria give CRITERION.NAME=VALUE")
            criterion = criteria[0]
        if criterion not in found:
            raise UsageError(f"--set {setting} is for {criterion!r}, which is not among {', '.join(criteria)}")
        try:
            found[criterion][option] = json.loads(text)
        except ValueError:
            found[criterion][option] = text
    return {name: chosen for name, chosen in found.items() if chosen}


def _class_map(path: Path | None) -> dict[str, int] | None:
    from pydantic import TypeAdapter, ValidationError

    from sukashi.core.errors import UsageError

    if path is None:
        return None
    try:
        return TypeAdapter(dict[str, int]).validate_json(path.read_bytes(), strict=True)
    except OSError as error:
        raise UsageError(f"cannot read {path} ({error.strerror}): check the path of --class-map") from None
    except ValidationError:
        raise UsageError(f'{path} must be JSON like {{"cat": 0, "dog": 1}}: each class and its number') from None


@contextmanager
def _working() -> Iterator[None]:
    """Work inside shows its progress on stderr, and what stops it becomes one sentence there and an exit code."""
    from sukashi.core import progress
    from sukashi.core.errors import ResourceError, SukashiError

    if not progress.first():
        # The first process of a training says what all of them find, unless another one took that on.
        try:
            yield
        except SukashiError as error:
            if error.alone:
                _stop(str(error), error.exit_code)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        return
    try:
        with _bars() if sys.stderr.isatty() else _lines() as listener, progress.listening(listener):
            yield
    except SukashiError as error:
        _stop(str(error), error.exit_code)
    except KeyboardInterrupt:
        _stop("interrupted; give the same command again, it goes on from where it was", 130)
    except OSError as error:
        _stop(f"{error.filename or 'a file'}: {error.strerror or error}; check its path and rights", 5)
    except (MemoryError, RuntimeError) as error:
        # torch has no class of its own for a computer without memory.
        if (
            not isinstance(error, MemoryError)
            and "out of memory" not in str(error)
            and "can't allocate" not in str(error)
        ):
            raise
        _stop(
            "out of memory; give fewer --calibration images, a smaller --batch-size or a smaller model",
            ResourceError.exit_code,
        )


def _stop(message: str, exit_code: int) -> NoReturn:
    _say(message, style="red")
    raise typer.Exit(exit_code)


def _say(message: str, style: str | None = None) -> None:
    """One line on stderr."""
    log.print(f"sukashi: {' '.join(message.split())}", style=style, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _bars() -> Iterator[Listener]:
    """Tasks as bars on a terminal."""
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=log,
        transient=True,
        speed_estimate_period=600,  # a trial takes minutes
    )

    @contextmanager
    def listener(title: str, total: int) -> Iterator[Task]:
        bar = bars.add_task(title, total=total, note="")
        try:
            yield _Bar(bars, bar)
        finally:
            bars.remove_task(bar)

    with bars:
        yield listener


class _Bar:
    def __init__(self, bars: Progress, bar: TaskID) -> None:
        self.bars, self.bar = bars, bar

    def advance(self, n: int = 1, note: str = "") -> None:
        self.bars.update(self.bar, advance=n, note=note)


@contextmanager
def _lines() -> Iterator[Listener]:
    """Tasks as a plain line now and then, so that a log file shows life."""
    yield _Lines().task


class _Lines:
    def __init__(self) -> None:
        self.open: list[_Line] = []
        self.due = time.monotonic() + FIRST_LINE

    @contextmanager
    def task(self, title: str, total: int) -> Iterator[Task]:
        self.open.append(_Line(self, title, total))
        try:
            yield self.open[-1]
        finally:
            self.open.pop()

    def say(self) -> None:
        if time.monotonic() >= self.due:
            self.due = time.monotonic() + LINE
            _say("; ".join(map(str, self.open)))


class _Line:
    def __init__(self, lines: _Lines, title: str, total: int) -> None:
        self.lines, self.title, self.total = lines, title, total
        self.done, self.note, self.start = 0, "", time.monotonic()

    def advance(self, n: int = 1, note: str = "") -> None:
        self.done += n
        self.note = note
        self.lines.say()

    def __str__(self) -> str:
        said = [f"{self.title} {self.done}/{self.total}"]
        if self.note:
            said.append(self.note)
        if self.done:
            left = (time.monotonic() - self.start) / self.done * (self.total - self.done)
            said.append(f"about {_duration(left)} left")
        return ", ".join(said)


def _to_stdout(table: Table) -> None:
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def _print_json(result: dict[str, Any]) -> None:
    print(json.dumps(_finite(result), allow_nan=False))


def _finite(value: Any) -> Any:
    """The same with null for NaN and Inf, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _figure(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _command() -> str:
    import shlex

    return shlex.join(["sukashi", *sys.argv[1:]])


def main() -> None:
    """Run the command line; what a user can cause becomes one sentence on stderr and an exit code."""
    from sukashi.core import progress

    with warnings.catch_warnings():
        if progress.first():
            warnings.showwarning = lambda message, *where, **more: _say(f"warning: {message}")
        else:
            warnings.simplefilter("ignore")
        try:
            exit_code = app(sys.argv[1:] or ["--help"], prog_name="sukashi", standalone_mode=False)
        except Exception as error:
            # typer brings a click of its own in some versions, so its errors are known by what they can do.
            if not hasattr(error, "format_message"):
                raise
            context = getattr(error, "ctx", None)
            remedy = f"see `{context.command_path if context else 'sukashi'} --help`"
            _say(f"{error.format_message().rstrip('.')} ({remedy})", style="red")
            exit_code = 2
    sys.exit(exit_code)
