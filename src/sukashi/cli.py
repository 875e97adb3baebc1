"""The command line: reads arguments, calls the functions of the same name, prints what they return. No mathematics."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from sukashi.progress import Task

app = typer.Typer(
    name="sukashi",
    help="Prunes vision networks with explanations, and measures what the cut did to them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
log = Console(stderr=True)

ModelArgument = Annotated[
    str, typer.Argument(help="sukashi:NAME, timm:NAME, torchvision:NAME, package.module:callable or a pruned folder.")
]
DataOption = Annotated[str, typer.Option("--data", help="digits, shapes, torchvision:NAME, or a folder of images.")]
WeightsOption = Annotated[Path | None, typer.Option(help="Weights: .safetensors, or .pt/.pth holding tensors only.")]
WidthOption = Annotated[int | None, typer.Option(help="Base width, for our own models.")]
ClassesOption = Annotated[int | None, typer.Option("--classes", help="Class count; that of the data by default.")]
PretrainedOption = Annotated[bool, typer.Option("--pretrained", help="Download pretrained weights.")]
OutputOption = Annotated[str | None, typer.Option("--output", help="Which of a model's outputs holds the logits.")]
SkipOption = Annotated[bool, typer.Option("--skip-bad", help="Leave unreadable images out, and say so.")]
CalibrationOption = Annotated[int, typer.Option(help="Calibration images a class, from the training split.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
WorkersOption = Annotated[int, typer.Option(help="Threads that decode images.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on stdout; logs go to stderr.")]
OptionsOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="An option of a criterion: NAME=VALUE, or CRITERION.NAME=VALUE. Repeatable."),
]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for results.")] = Path("runs/demo"), as_json: JsonOption = False
) -> None:
    """Train a small network on digits, compare all criteria on it, cut it, and write the report."""
    with _shown(as_json):
        from sukashi import demo as embedded

        result = embedded.run(out, command=_command())
    _print_comparison(result, as_json)
    if not as_json:
        print(f"\nReport: {result['report']}")
        print("Your own model next:")
        print("  sukashi check timm:resnet18 --data path/to/images")
        print("  sukashi compare MODEL --data path/to/images --criteria magnitude,cswap,drift --out runs/mine")


@app.command("list")
def list_(
    what: Annotated[str, typer.Argument(help="criteria, models, data or measures.")], as_json: JsonOption = False
) -> None:
    """List what there is: criteria, models, data or measures."""
    with _shown(as_json):
        from sukashi import catalogue

        rows = catalogue.rows(what)
    if as_json:
        _print_json({what: rows})
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    _to_stdout(table)


@app.command()
def check(
    model: ModelArgument,
    data: DataOption,
    weights: WeightsOption = None,
    width: WidthOption = None,
    classes: ClassesOption = None,
    pretrained: PretrainedOption = False,
    output: OutputOption = None,
    skip_bad: SkipOption = False,
    calibration: CalibrationOption = 32,
    limit: Annotated[float, typer.Option(help="Seconds the check may take.")] = 60,
    device: DeviceOption = "auto",
    workers: WorkersOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Preflight: sites, what can't be cut and why, class counts, and the estimated cost of each criterion."""
    with _shown(as_json):
        from sukashi import study

        result = study.check(
            model,
            data,
            weights=weights,
            width=width,
            n_classes=classes,
            pretrained=pretrained,
            output=output,
            skip_bad=skip_bad,
            calibration=calibration,
            limit=limit,
            device=device,
            workers=workers,
        )
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
    for name in result["unmeasured"]:
        print(f"{name}: not estimated within {limit:g} s; give --limit more")


@app.command()
def prune(
    model: ModelArgument,
    data: DataOption,
    criterion: Annotated[str, typer.Option(help="See `sukashi list criteria`.")],
    ratio: Annotated[float, typer.Option(help="Fraction of units to remove, in [0, 1).")],
    out: Annotated[Path, typer.Option(help="Folder for the cut model; must not exist.")],
    round_to: Annotated[int, typer.Option(help="Keep a multiple of this many units a site; 1 = exact ratio.")] = 8,
    onnx: Annotated[bool, typer.Option("--onnx", help="Write model.onnx too, checked in onnxruntime.")] = False,
    weights: WeightsOption = None,
    width: WidthOption = None,
    classes: ClassesOption = None,
    pretrained: PretrainedOption = False,
    output: OutputOption = None,
    skip_bad: SkipOption = False,
    calibration: CalibrationOption = 32,
    seed: Annotated[int, typer.Option(help="Draws calibration images and random scores.")] = 0,
    options: OptionsOption = None,
    device: DeviceOption = "auto",
    workers: WorkersOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Cut a model for real and save it as a folder that `sukashi.load` rebuilds."""
    with _shown(as_json):
        from sukashi import study

        result = study.prune(
            model,
            data,
            criterion,
            ratio,
            out=out,
            round_to=round_to,
            onnx=onnx,
            weights=weights,
            width=width,
            n_classes=classes,
            pretrained=pretrained,
            output=output,
            skip_bad=skip_bad,
            calibration=calibration,
            seed=seed,
            options=_options(options, [criterion]).get(criterion, {}),
            device=device,
            workers=workers,
            command=_command(),
        )
    if as_json:
        _print_json(result)
        return
    table = Table("", "dense", "cut", box=None, pad_edge=False)
    dense, cut = result["dense"], result["cut"]
    for name in cut:
        table.add_row(name.replace("_", " "), _figure(dense.get(name)), _figure(cut[name]))
    _to_stdout(table)
    for warning in result["warnings"]:
        print(f"warning: {warning}")
    print(f"\nSaved: {result['out']}\nReport: {result['report']}")


@app.command()
def compare(
    model: ModelArgument,
    data: DataOption,
    criteria: Annotated[str, typer.Option(help="Names joined by commas; see `sukashi list criteria`.")],
    out: Annotated[Path, typer.Option(help="Folder for results; an interrupted comparison is resumed.")],
    ratios: Annotated[str, typer.Option(help="Fractions of units removed: START:STOP:STEP or a,b,c.")] = "0:0.95:0.05",
    seeds: Annotated[int, typer.Option(help="Number of seeds, counted from 0.")] = 3,
    weights: WeightsOption = None,
    width: WidthOption = None,
    classes: ClassesOption = None,
    pretrained: PretrainedOption = False,
    output: OutputOption = None,
    skip_bad: SkipOption = False,
    calibration: CalibrationOption = 32,
    test_images: Annotated[int, typer.Option(help="Test images at most, evenly over the classes.")] = 2000,
    options: OptionsOption = None,
    device: DeviceOption = "auto",
    workers: WorkersOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Compare criteria: accuracy against the fraction of parameters removed, over seeds, with SAUCE and a report."""
    with _shown(as_json):
        from sukashi import study

        names = [name.strip() for name in criteria.split(",") if name.strip()]
        result = study.compare(
            model,
            data,
            names,
            out=out,
            ratios=_ratios(ratios),
            seeds=seeds,
            calibration=calibration,
            test_images=test_images,
            options=_options(options, names),
            weights=weights,
            width=width,
            n_classes=classes,
            pretrained=pretrained,
            output=output,
            skip_bad=skip_bad,
            device=device,
            workers=workers,
            command=_command(),
        )
    _print_comparison(result, as_json)
    if not as_json:
        print(f"\nReport: {Path(result['out']) / 'report.html'}")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="The --out of a compare or a prune.")], as_json: JsonOption = False
) -> None:
    """Write the report of a folder again."""
    with _shown(as_json):
        from sukashi import report as reports

        path = reports.write(folder)
    if as_json:
        _print_json({"report": str(path)})
    else:
        print(f"Report: {path}")


def _print_comparison(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        _print_json(result)
        return
    table = Table(
        "criterion", "SAUCE", "95 % interval", "after each pass: removed -> accuracy", box=None, pad_edge=False
    )
    for name, sauce in sorted(result["sauce"].items(), key=lambda item: -item[1]["mean"]):
        interval = "one seed" if sauce["low"] is None else f"{sauce['low']:.1f} to {sauce['high']:.1f}"
        passes = result["passes"][name][0]
        said = ", ".join(f"{p['fraction']:.2f} -> {p['accuracy']:.3f}" for p in passes[:4])
        table.add_row(name, f"{sauce['mean']:.1f}", interval, said + (", ..." if len(passes) > 4 else ""))
    _to_stdout(table)
    print(f"\ndense accuracy {result['dense_accuracy']:.3f}")


def _ratios(text: str) -> list[float]:
    """START:STOP:STEP, both ends included, or a list."""
    from sukashi.errors import UsageError
    from sukashi.types import check_ratio

    try:
        parts = [float(part) for part in text.split(":" if ":" in text else ",")]
    except ValueError:
        raise UsageError(f"ratios must be START:STOP:STEP or a,b,c, got {text!r}: for example 0:0.95:0.05") from None
    if ":" in text:
        if len(parts) != 3 or parts[2] <= 0 or parts[1] < parts[0]:
            raise UsageError(f"ratios must be START:STOP:STEP with STOP >= START and STEP > 0, got {text!r}")
        start, stop, step = parts
        parts = [round(start + i * step, 10) for i in range(round((stop - start) / step) + 1)]
        parts = [part for part in parts if part <= stop + 1e-9]
    for part in parts:
        check_ratio(part)
    return parts


def _options(settings: list[str] | None, criteria: list[str]) -> dict[str, dict[str, Any]]:
    """--set NAME=VALUE by criterion; values are JSON where they can be, else text."""
    from sukashi.errors import UsageError

    found: dict[str, dict[str, Any]] = {}
    for setting in settings or []:
        name, equals, text = setting.partition("=")
        criterion, dot, option = name.partition(".")
        if not dot:
            criterion, option = criteria[0], name
            if len(criteria) > 1:
                raise UsageError(f"--set {setting}: with several criteria give CRITERION.NAME=VALUE")
        if not equals or not option:
            raise UsageError(f"--set must be NAME=VALUE or CRITERION.NAME=VALUE, got {setting!r}")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        found.setdefault(criterion, {})[option] = value
    return found


@contextmanager
def _shown(as_json: bool) -> Iterator[None]:
    """Progress on stderr while inside."""
    from sukashi import progress

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=log,
        transient=True,
        disable=not log.is_terminal,
    )

    class Shown:
        def __init__(self, task_id: Any) -> None:
            self.task_id = task_id

        def advance(self, n: int = 1, note: str = "") -> None:
            bar.update(self.task_id, advance=n, note=note)

    @contextmanager
    def listener(title: str, total: int) -> Iterator[Task]:
        task_id = bar.add_task(title, total=total, note="")
        try:
            yield Shown(task_id)
        finally:
            bar.remove_task(task_id)

    with bar, progress.listening(listener):
        yield


def _to_stdout(table: Table) -> None:
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def _print_json(result: dict[str, Any]) -> None:
    print(json.dumps(result, allow_nan=False))


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
    """Run the command line; errors a user can cause become one sentence and an exit code."""
    from sukashi.errors import SukashiError

    try:
        app(standalone_mode=False)
    except SukashiError as error:
        log.print(f"sukashi: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        log.print("sukashi: interrupted; finished work is kept, give the same command again to go on", markup=False)
        sys.exit(130)
    except Exception as error:
        # typer's own usage errors (its bundled click included) know their exit code and how to show themselves.
        if hasattr(error, "exit_code") and hasattr(error, "show"):
            error.show()
            sys.exit(2)
        if type(error).__name__ == "Abort":
            sys.exit(130)
        raise
