"""The command line: reads settings, calls the functions of the same name, prints what they return. No mathematics."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import shlex
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from sukashi.cli import tables
from sukashi.cli.console import command, print_json, say, to_stdout, working
from sukashi.cli.options import is_said, parameters, values
from sukashi.core import progress
from sukashi.core.schema import Settings, keywords
from sukashi.experiments.audit.settings import Audit
from sukashi.experiments.check.settings import Check
from sukashi.experiments.compare.settings import Compare
from sukashi.experiments.prune.settings import Prune
from sukashi.experiments.schedule.settings import Schedule
from sukashi.experiments.train.settings import Finetune, Train

app = typer.Typer(
    name="sukashi",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on stdout; logs go to stderr.")]


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


def _experiment(kind: type[Settings], show: Callable[..., None], *shown: str) -> None:
    """Make a command of a kind of settings: its options, the function of its name, and what is printed of its result.

    `show` is called with the result, and with the settings named in `shown`.
    """

    room = f"{kind.__module__.removesuffix('settings')}run"  # imports torch

    def run(context: typer.Context, as_json: bool, **given: Any) -> None:
        with working():
            # What was not given stays unsaid, as in a call from Python.
            said = {name: value for name, value in given.items() if is_said(context, name)}
            chosen = values(kind, said)
            keywords(kind, chosen)  # what is wrong with them alone is said before torch is imported
            if "out" in chosen:
                chosen["command"] = command()  # what is kept says how it was made
            result = getattr(importlib.import_module(room), kind.kind)(**chosen)
        if not result:
            return  # another process speaks
        if as_json:
            print_json(result)
        else:
            show(result, *(given[name] for name in shown))

    # typer reads what a command takes from its signature and annotations.
    taken = [
        inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context),
        *parameters(kind),
        inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=JsonOption),
    ]
    run.__signature__ = inspect.Signature(taken)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in taken}
    app.command(kind.kind, help=kind.__doc__)(run)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for results.")] = Path("runs/demo"), as_json: JsonOption = False
) -> None:
    """Train a small network on digits, compare all criteria on it, cut it, and write the report."""
    with working():
        from sukashi.experiments import demo as embedded

        result = embedded.run(out, command=command())
    if as_json:
        print_json(result)
    else:
        tables.comparison(result)
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
    with working():
        from sukashi.experiments import catalogue

        rows = catalogue.rows(what)
        method = None if name is None else catalogue.about(what, name)
    if as_json:
        print_json({what: rows} if method is None else method)
        return
    if method is not None:
        print(f"{method['name']}: {method['documentation']}\n\nSource: {method['source']}")
        for option, default in method["options"].items():
            print(f"--set {method['name']}.{option}={shlex.quote(default)}")
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    to_stdout(table)


_experiment(Check, tables.check, "limit")
_experiment(Prune, tables.prune)
_experiment(Compare, tables.compare)
_experiment(Train, tables.train)
_experiment(Finetune, tables.train)
_experiment(Schedule, tables.schedule)
_experiment(Audit, tables.audit)


@app.command()
def study(
    file: Annotated[Path, typer.Argument(help="A study file (TOML): comparisons of models, or a schedule.")],
    out: Annotated[Path | None, typer.Option(help="Folder for results instead of the file's.")] = None,
    data: Annotated[str | None, typer.Option(help="Data instead of the file's.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda, instead of the file's.")] = None,
    workers: Annotated[int | None, typer.Option(help="Threads that decode images, instead of the file's.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Run a study file: a comparison for each of its models, or the levels of a schedule; resumed, with one page."""
    with working():
        from sukashi.experiments import study_file

        result = study_file.run(file, out=out, data=data, device=device, workers=workers, command=command())
    if as_json:
        print_json(result)
    else:
        tables.study(result)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="The --out of a compare, prune, train or finetune.")],
    margin: Annotated[
        float | None, typer.Option(help="Accuracy may be this much lower and count as lossless; default as compared.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write the page of a compare, prune, train or finetune again; schedule, audit and study write theirs when run."""
    with working():
        from sukashi.experiments import pages

        path = pages.write(folder, margin)
    if as_json:
        print_json({"report": str(path)})
    else:
        print(f"Report: {path}")


def main() -> None:
    """Run the command line; what a user can cause becomes one sentence on stderr and an exit code."""
    with warnings.catch_warnings():
        if progress.first():
            warnings.showwarning = lambda message, *where, **more: say(f"warning: {message}")
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
            say(f"{error.format_message().rstrip('.')} ({remedy})", style="red")
            exit_code = 2
    sys.exit(exit_code)
