"""The command line: reads settings, calls the functions of the same name, prints what they return. No mathematics."""

from __future__ import annotations

import importlib.metadata
import inspect
import re
import shlex
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from sukashi.cli.console import command, print_json, say, show_text, to_stdout, unsaid, warned, working
from sukashi.cli.options import is_said, parameters, values
from sukashi.core import progress, schema
from sukashi.core.errors import UsageError
from sukashi.core.experiment import Result
from sukashi.core.schema import Settings, keywords
from sukashi.experiments.kinds import fields, kinds, spelled
from sukashi.report import words

app = typer.Typer(
    name="sukashi",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
JobsOption = Annotated[
    int,
    typer.Option(
        help="Processes that share the trials and the threads. With another number of threads a trained network's "
        "weights differ in their last bits.",
        min=1,
    ),
]
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


def _experiment(kind: type[Settings]) -> None:
    """Make a command of a kind of settings and of the function of its name."""

    def run(context: typer.Context, as_json: bool, **given: Any) -> None:
        n_jobs = {"jobs": given.pop("jobs")} if kind.shared else {}
        with working():
            # What was not given stays unsaid, as in a call from Python.
            said = {name: value for name, value in given.items() if is_said(context, name)}
            chosen = values(kind, said)
            keywords(kind, chosen)  # what is wrong with them alone is said before torch is imported
            from sukashi.experiments import functions

            chosen |= n_jobs
            if "out" in chosen:
                chosen["command"] = command()  # what is kept says how it was made
            result = getattr(functions, kind.kind)(**chosen)
        _show(result, as_json)

    # typer reads what a command takes from its signature and annotations.
    taken = [
        inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context),
        *parameters(kind),
        inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=JsonOption),
    ]
    if kind.shared:
        taken.append(inspect.Parameter("jobs", inspect.Parameter.KEYWORD_ONLY, default=1, annotation=JobsOption))
    run.__signature__ = inspect.Signature(taken)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in taken}
    app.command(kind.kind, help=spelled(kind.__doc__ or ""))(run)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for results.")] = Path("runs/demo"), as_json: JsonOption = False
) -> None:
    """Train a small network on digits, compare all criteria on it, cut it, and write the report."""
    with working():
        from sukashi.experiments import demo as embedded

        result = embedded.run(out, command=command())
    _show(result, as_json)
    if not as_json:
        print("Your own model next:")
        print("  sukashi check timm:resnet18 --data path/to/images")
        print("  sukashi compare MODEL --data path/to/images --criteria magnitude,cswap,drift --out runs/mine")


@app.command("list")
def list_(
    what: Annotated[
        str | None, typer.Argument(help="criteria, attributions, schedules, models, data or measures.")
    ] = None,
    name: Annotated[str | None, typer.Argument(help="One of them: what it computes and its options.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List what there is: criteria, attributions, schedules, models, data or measures; or tell all about one method."""
    with working():
        from sukashi.experiments import catalogue

        if what is None:
            raise UsageError(f"say what to list: {words.listed(catalogue.LISTS, 'or')}, as in `sukashi list criteria`")
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
        table.add_row(*(Text(str(value)) for value in row.values()))  # rich would read [u, j] as markup
    to_stdout(table)


for _kind in kinds().values():
    _experiment(_kind)


@app.command()
def study(
    file: Annotated[Path, typer.Argument(help="A study file (TOML).")],
    out: Annotated[Path | None, typer.Option(help="Folder for results instead of the file's.")] = None,
    data: Annotated[str | None, typer.Option(help="Data instead of the file's.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda, instead of the file's.")] = None,
    workers: Annotated[int | None, typer.Option(help="Threads that decode images, instead of the file's.")] = None,
    jobs: JobsOption = 1,
    as_json: JsonOption = False,
) -> None:
    """Run a study file: comparisons of models, a schedule, or any experiments; resumed, with one page."""
    with working(_of_study):
        from sukashi.experiments import functions

        result = functions.study(file, out=out, data=data, device=device, workers=workers, jobs=jobs, command=command())
    _show(result, as_json, _of_study)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="The --out of any command.")],
    margin: Annotated[
        float | None, typer.Option(help="Of a compare: how much lower accuracy may be, 0.01 for one point.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say again what the experiment in a folder found, and write its page again."""
    with working():
        from sukashi.experiments import functions

        result = functions.results(folder, **({} if margin is None else {"margin": margin}))
    _show(result, as_json)


@app.command()
def ls(
    folder: Annotated[Path, typer.Argument(help="A folder with experiments in it.")] = Path("runs"),
    as_json: JsonOption = False,
) -> None:
    """List the experiments in a folder: what each is, of which model and data, and what it found."""
    with working():
        from sukashi.experiments import catalogue

        rows = catalogue.experiments(folder)
    if as_json:
        print_json({"experiments": rows})
        return
    table = Table("folder", "kind", "model", "data", "found", box=None, pad_edge=False, header_style="")
    for row in rows:
        table.add_row(*(Text(spelled(str(row[name] or ""))) for name in ("folder", "kind", "model", "data", "found")))
    to_stdout(table)


@app.command()
def serve(
    folder: Annotated[Path, typer.Argument(help="A folder with experiments in it.")] = Path("runs"),
    port: Annotated[int, typer.Option(help="Of this machine; 0 for one that is free.", min=0, max=65_535)] = 8421,
    as_json: JsonOption = False,
) -> None:
    """Show the experiments in a folder in the browser, on this machine alone; concepts are named and chosen there."""

    def tell(address: str) -> None:
        if as_json:
            print_json({"address": address})
        else:
            print(f"{address} shows the experiments in {folder}; stop it with Ctrl+C.", flush=True)

    with working():
        from sukashi.app import server

        server.serve(folder, port, tell)


def _of_study(message: str) -> str:
    """A message as `sukashi study` says it: most settings are keys of the file, which are called as in Python."""
    return schema.spelled(message, {name: fields()[name] for name in ("out", "data", "device", "workers", "jobs")}, {})


def _show(result: Result | None, as_json: bool, spelled: Callable[[str], str] = spelled) -> None:
    if result is None:
        return  # another process speaks
    if as_json:
        print_json(result.to_json())
    else:
        show_text(spelled(unsaid(result.text())))


def main() -> None:
    """Run the command line; what a user can cause becomes one sentence on stderr and an exit code."""
    warned.clear()
    with warnings.catch_warnings():
        if not progress.first():
            warnings.simplefilter("ignore")
        try:
            exit_code = app(sys.argv[1:] or ["--help"], prog_name="sukashi", standalone_mode=False)
        except Exception as error:
            # typer brings a click of its own in some versions, so its errors are known by what they can do.
            if not hasattr(error, "format_message"):
                raise
            context = getattr(error, "ctx", None)
            remedy = f"see `{context.command_path if context else 'sukashi'} --help`"
            told = error.format_message().rstrip(".")
            percents = [word.rpartition("=")[2] for word in sys.argv if re.fullmatch(r"(--[\w-]+=)?\d+(\.\d+)?%", word)]
            if "valid number" in told and percents:
                told += f"; {percents[0]} is {float(percents[0][:-1]) / 100:g}"
            say(f"{told} ({remedy})", style="red")
            exit_code = 2
    sys.exit(exit_code)
