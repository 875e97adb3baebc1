"""Settings as the arguments and options of a command: a field is one of them, its text becomes the field's value."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from sukashi.core.bounded import MAX_BYTES, from_json, read
from sukashi.core.bracketed import plain
from sukashi.core.errors import UsageError
from sukashi.core.schema import Ratio, Settings, alternatives, check_ratio, default_of, flag_of, option_of
from sukashi.experiments.kinds import spelled

OPTIONS = "An option of a method: NAME=VALUE, or METHOD.NAME=VALUE. Repeatable."
# One of those that commas part, but for commas after a backslash and in brackets, as in drift[share=0.2,steps=3].
_NAME = re.compile(r"(?:\\,|\[(?:[^\[\]]|\[[^\[\]]*\])*\]|[^,])+")


def parameters(kind: type[Settings]) -> list[inspect.Parameter]:
    """What a command takes for settings of a kind, as typer reads it from a signature; what must be given is first."""
    fields = sorted(kind.model_fields.items(), key=lambda item: not item[1].is_required())
    return [_parameter(name, field) for name, field in fields]


def is_said(context: typer.Context, name: str) -> bool:
    """Whether a parameter was given, and is not its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def values(kind: type[Settings], given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a command was given, by field. Raises UsageError for text that is no such value."""
    found: dict[str, Any] = {}
    for name, text in given.items():
        field = kind.model_fields[name]
        match _type(field):
            case "options":
                continue
            case "names":
                found[name] = _names(text)
            case "ratios":
                found[name] = _ratios(text)
            case "numbers":
                found[name] = _numbers(name, field, text)
            case "numbers by name":
                found[name] = _class_map(text)
            case _:
                found[name] = text
    if "options" in given:
        found["options"] = _options(kind, given["options"], found)
    return found


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    about, shape, default = option_of(field), _type(field), default_of(field)
    help, annotation, flags = spelled(field.description or ""), next(alternatives(field.annotation)), []
    match shape:
        case "options":
            annotation, default, flags, help = list[str], None, ["--set"], OPTIONS
        case "names":
            annotation, help = str, f"{help} Joined by commas, a comma in a name is \\,."
            default = None if default is None else ",".join(str(name).replace(",", "\\,") for name in default)
        case "ratios":
            annotation, help = str, f"{help} START:STOP:STEP or a,b,c."
            default = _span(default) if default else None
        case "numbers":
            annotation, help = str, f"{help} Numbers joined by commas."
            default = ",".join(map(str, default)) if default else None
        case "several":
            annotation, default = list[str], None
            help = help if about.argument else f"{help} Repeatable."
        case "numbers by name":
            annotation, help = Path, f"JSON file {help}"
        case "yes or no":
            flag = name.replace("_", "-")
            flags = [f"--{flag}/--no-{flag}" if default else f"--{flag}"]
        case "path":
            annotation = Path
        case "word":
            annotation = str
    if about.flag is not None:
        flags = [about.flag]
    if about.default is not None:
        help = f"{help} Default: {about.default}."
    info = typer.Argument(help=help) if about.argument else typer.Option(*flags, help=help)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if field.is_required() else default,
        annotation=Annotated[annotation if field.is_required() or default is not None else annotation | None, info],
    )


def _type(field: FieldInfo) -> str:
    """How a field's value is written on the command line, in a word."""
    about, annotation = option_of(field), next(alternatives(field.annotation))
    if get_origin(annotation) is dict:
        return "numbers by name" if get_args(annotation) == (str, int) else "options"
    if get_origin(annotation) is list:
        if get_args(annotation) == (Ratio,):
            return "ratios"
        if _number(field) in (int, float):
            return "numbers"
        return "names" if about.joined else "several"
    if annotation is bool:
        return "yes or no"
    if annotation in (int, float):
        return "number"
    return "path" if about.path else "word"


def _number(field: FieldInfo) -> Any:
    """The type of a list's members, without what checks their values."""
    (member,) = get_args(next(alternatives(field.annotation)))
    return get_args(member)[0] if get_origin(member) is Annotated else member


def _names(text: str) -> list[str]:
    names = (name.replace("\\,", ",").strip() for name in _NAME.findall(text))
    return [name for name in names if name]


def _ratios(text: str) -> list[float]:
    """START:STOP:STEP, both ends included, or a list."""
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


def _numbers(name: str, field: FieldInfo, text: str) -> list[Any]:
    number = _number(field)
    try:
        return [number(part) for part in text.split(",")]
    except ValueError:
        kind, example = ("whole numbers", "1,8,32") if number is int else ("numbers", "0.5,1,2")
        raise UsageError(
            f"{flag_of(name, field)} must be {kind} joined by commas, got {text!r}: for example {example}"
        ) from None


def _span(ratios: list[float]) -> str:
    """START:STOP:STEP of three evenly spaced ratios or more, else all of them."""
    plain = [round(ratio, 10) for ratio in ratios]
    if len(plain) >= 3 and plain[1] - plain[0] >= 0.001 and plain[-1] >= plain[0]:
        span = f"{plain[0]:.10g}:{plain[-1]:.10g}:{plain[1] - plain[0]:.10g}"
        if _ratios(span) == plain:
            return span
    return ",".join(f"{ratio:.10g}" for ratio in plain)


def _options(kind: type[Settings], given: list[str], found: Mapping[str, Any]) -> dict[str, Any]:
    """--set NAME=VALUE; values are JSON where they can be, else text. By method, where settings are of several."""
    if "criterion" in kind.model_fields:
        criterion = plain(found["criterion"])
        return _by_method(given, [criterion]).get(criterion, {})
    return _by_method(given, found.get("criteria"))


def _by_method(given: list[str], methods: list[str] | None) -> dict[str, dict[str, Any]]:
    chosen: dict[str, dict[str, Any]] = {}
    # Of all contenders that are this method, and have no such option in their names.
    methods = methods and list(dict.fromkeys(map(plain, methods)))
    # package.module:function goes by the function's name too, which is what tables call it.
    called = {method.rpartition(":")[2]: method for method in methods or ()}
    for setting in given:
        name, _, text = setting.partition("=")
        method, dot, option = name.rpartition(".")
        if not option or "=" not in setting:
            raise UsageError(f"--set must be NAME=VALUE or METHOD.NAME=VALUE, got {setting!r}")
        if not dot:
            if methods is None or len(methods) != 1:
                raise UsageError(f"--set {setting}: with several methods give METHOD.NAME=VALUE")
            method = methods[0]
        method = called.get(method, method)
        if methods is not None and method not in methods:
            raise UsageError(f"--set {setting} is for {method!r}, which is not among {', '.join(methods)}")
        try:
            value = from_json(text)
        except ValueError:
            value = text
        chosen.setdefault(method, {})[option] = value
    return chosen


def _class_map(path: Path) -> dict[str, int]:
    try:
        return TypeAdapter(dict[str, int]).validate_json(read(path.expanduser(), MAX_BYTES), strict=True)
    except OSError as error:
        raise UsageError(f"cannot read {path} ({error.strerror}): check the path of --class-map") from None
    except ValidationError:
        raise UsageError(f'{path} must be JSON like {{"cat": 0, "dog": 1}}: each class and its number') from None
