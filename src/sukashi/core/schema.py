"""Settings that people write: one class a kind, from which command line, TOML keys, keywords and identity come.

A field made by `option` says what it means, whether it decides results, and how the command line takes it. What is
wrong with settings, an unknown name, a missing one or a wrong value, is one sentence in our words. No torch here: help
and errors of usage come without waiting for it.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import shlex
import textwrap
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar, Self, TypeVar, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from sukashi.core.errors import UsageError, nearest

_Kind = TypeVar("_Kind", bound=BaseModel)
_Function = TypeVar("_Function", bound=Callable[..., Any])
MAX_SEED = 2**32 - 1  # NumPy and scikit-learn take no more
MAX_SEEDS = 1000
MAX_FLOAT = 3.4028234663852886e38  # of float32
_TYPES = {
    "list_type": "a list",
    "string_type": "a string",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "dict_type": "a table",
    "model_type": "a table",
}
_BOUNDS = {"gt": "greater than", "ge": "at least", "lt": "below", "le": "at most"}


class Settings(BaseModel):
    """Settings of a kind, checked when they are made and never changed."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
    kind: ClassVar[str] = ""
    """The command of an experiment, and the function of its name."""
    command: ClassVar[bool] = True
    """Whether these are what the command takes, and not what is made of it or of a file."""
    shared: ClassVar[bool] = False
    """Whether it has several trials, which processes may share."""
    grows: ClassVar[frozenset[str]] = frozenset()
    """Fields of which more may be asked for in a folder that exists."""

    @model_validator(mode="before")
    @classmethod
    def _places(cls, given: Any) -> Any:
        """Paths with ~ filled in. Raises UsageError for an empty one, which would be the working folder."""
        if not isinstance(given, Mapping):
            return given
        fields = {name: option_of(field) for name, field in cls.model_fields.items() if name in given}
        places = {name: given[name] for name, about in fields.items() if about.path or about.named}
        for name, value in places.items():
            if value == "" or (isinstance(value, list) and "" in value):
                raise UsageError(f"`{name}` must not be empty: give a path{' or a name' if fields[name].named else ''}")
        return {**given, **{name: _expanded(value) for name, value in places.items()}}

    @model_validator(mode="after")
    def _numbers_of_networks(self) -> Self:
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, float) and abs(value) > MAX_FLOAT:
                raise UsageError(f"`{name}` must be at most {MAX_FLOAT:.1e}, which networks reckon with, got {value}")
        return self

    def identity(self) -> dict[str, Any]:
        """The settings that decide results, as JSON has them."""
        fields = type(self).model_fields
        return self.model_dump(mode="json", include={name for name in fields if option_of(fields[name]).decides})


@dataclass(frozen=True)
class Option:
    """What is to be known of a field beside its type, its default and its bounds.

    `decides` says whether results depend on it. On the command line it is an `argument`, or a `flag` (its name with
    dashes where none is given); a list of names is `joined` by commas, or else the flag is repeated. `path` is for
    files and folders; those in a study file are relative to it. `named` is for what is a name or a path. `default` is
    how an absent default is told.
    """

    decides: bool = True
    argument: bool = False
    flag: str | None = None
    joined: bool = False
    path: bool = False
    default: str | None = None
    named: bool = False


def option(
    value: Any = ...,
    *,
    help: str,
    decides: bool = True,
    argument: bool = False,
    flag: str | None = None,
    joined: bool = False,
    path: bool = False,
    default: str | None = None,
    named: bool = False,
    **field: Any,
) -> Any:
    """A field of `Settings`; `value` is its default, `field` bounds and examples as `pydantic.Field` takes them."""
    facts = asdict(Option(decides, argument, flag, joined, path, default, named))
    if callable(value):
        return Field(default_factory=value, description=help, json_schema_extra=facts, **field)
    # Copied for every object, so that a list can be a default.
    return Field(value, description=help, json_schema_extra=facts, **field)


def _expanded(value: Any) -> Any:
    """Paths, also those of MODEL=WEIGHTS, with the home folder in place of a leading ~."""
    if isinstance(value, list):
        return [_expanded(part) for part in value]
    return "=".join(map(os.path.expanduser, value.split("="))) if isinstance(value, str) else value


def option_of(field: FieldInfo) -> Option:
    """What `option` said of a field."""
    return Option(**field.json_schema_extra) if isinstance(field.json_schema_extra, dict) else Option()  # type: ignore[arg-type]


def default_of(field: FieldInfo) -> Any:
    """The default of a field; None where it has none, or where it follows from others."""
    if field.default_factory is not None and not field.default_factory_takes_validated_data:
        return field.get_default(call_default_factory=True)
    return None if field.default is PydanticUndefined else field.default


def percentage(value: object) -> str:
    """The end of an error about a fraction, where it was given in percent."""
    return f"; {value:g}% is {value / 100:g}" if isinstance(value, int | float) and 1 <= value <= 100 else ""


def check_ratio(ratio: float) -> float:
    """A ratio in [0, 1). Raises UsageError for another."""
    if not (isinstance(ratio, int | float) and 0 <= ratio < 1):
        raise UsageError(
            f"ratio must be in [0, 1), got {ratio}: it is the fraction REMOVED of units, or with a scope of weights"
            f"{percentage(ratio)}"
        )
    return ratio


def check_scale(mean: Sequence[float]) -> None:
    """Raises UsageError for means that no pixels in [0, 1] have: those of pixels up to 255."""
    if max(mean, default=0.0) > 1:
        said, scaled = (",".join(f"{value:.4g}" for value in values) for values in (mean, [of / 255 for of in mean]))
        raise UsageError(
            f"`mean` is that of pixels in [0, 1], got {said}, as of pixels in [0, 255]: divide `mean` and `std` by 255 "
            f"({scaled} is this mean)"
        )


Ratio = Annotated[float, AfterValidator(check_ratio)]


def _count(seeds: object) -> object:
    """Seeds as a number of them. Raises UsageError for a list."""
    if isinstance(seeds, list | tuple | range):
        raise UsageError(f"`seeds` is how many there are, counted from 0, got {seeds}: give `seeds={len(seeds)}`")
    return seeds


Seeds = Annotated[int, BeforeValidator(_count)]


# As a command.


def command_of(settings: Settings) -> str:
    """The command that has these settings, but for a class map, which it reads from a file."""
    arguments, options = list[str](), list[str]()
    for name in sorted(settings.model_fields_set, key=list(type(settings).model_fields).index):
        field, value = type(settings).model_fields[name], getattr(settings, name)
        if value is None or (not field.is_required() and value == default_of(field)):
            continue
        (arguments if option_of(field).argument else options).extend(_given(name, field, value))
    return shlex.join(["sukashi", settings.kind, *arguments, *options])


def flag_of(name: str, field: FieldInfo) -> str:
    """What a field is called on the command line: its flag, and an argument by its name in capitals."""
    about = option_of(field)
    return name.upper() if about.argument else about.flag or f"--{name.replace('_', '-')}"


def _given(name: str, field: FieldInfo, value: Any) -> list[str]:
    """The words of a command that give a field a value."""
    about, flag = option_of(field), flag_of(name, field)
    if about.argument:
        return [str(part) for part in (value if isinstance(value, list) else [value])]
    if name == "options":
        return [part for said in _set(value) for part in ("--set", said)]
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag.removeprefix('--')}"]
    if isinstance(value, dict):
        return [flag, "FILE"]
    if isinstance(value, list) and not (about.joined or all(isinstance(part, int | float) for part in value)):
        return [word for part in value for word in (flag, str(part))]
    if isinstance(value, list):
        return [flag, ",".join(str(part).replace(",", "\\,") for part in value)]
    return [flag, f"{value:g}" if isinstance(value, float) else str(value)]


# Messages name settings as Python does, between backticks: `skip_bad=True`, `weights=FILE`, `size`, and functions of
# ours with what they take: `sukashi.finetune(FOLDER, new_head=True)`. A name in a value's place stands for any value.
_MARKED = re.compile(r"`(sukashi\.\w+(?:\([^`]*\))?|\w+(?:=[^`]+)?)`")


def spelled(message: str, fields: Mapping[str, FieldInfo], commands: Mapping[str, str]) -> str:
    """What a message says of these settings, and of functions whose `commands` are given by name, in the words of the
    command line: --skip-bad, --weights FILE, --size, `sukashi finetune FOLDER --new-head`.
    """
    return _MARKED.sub(lambda found: _spelled(found[1], fields, commands) or found[0], message)


def _spelled(said: str, fields: Mapping[str, FieldInfo], commands: Mapping[str, str]) -> str | None:
    """One of these on the command line; None for what is none."""
    if said in fields:
        return flag_of(said, fields[said])
    function, _, inside = said.removesuffix(")").partition("(") if said.startswith("sukashi.") else ("", "", said)
    try:
        call = ast.parse(f"settings({inside})", mode="eval").body
        assert isinstance(call, ast.Call)
        words = [str(_value(part)) for part in call.args]
        for part in call.keywords:
            words += _given(str(part.arg), fields[str(part.arg)], _value(part.value))
    except Exception:  # whatever else somebody has put between backticks
        return None
    if not function:
        return None if call.args else shlex.join(words)
    command = commands.get(function.removeprefix("sukashi."))
    return command and f"`{shlex.join(['sukashi', command, *words])}`"


def _value(node: ast.expr) -> Any:
    """A literal, in which a name is text."""

    class Text(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.expr:
            return ast.Constant(node.id)

    return ast.literal_eval(Text().visit(node))


def call_of(kind: type[Settings], given: Mapping[str, Any]) -> str:
    """The call from Python that has these keywords; what was in memory goes by the name of its setting."""
    order = [*(name for name in ("model", "models", "data") if name in given)]
    order += [name for name in given if name not in order]
    said = []
    for name in order:
        value = given[name]
        if value is not None:
            plain = _plain(value, kind.model_fields.get(name))
            held = "memory:" in str(plain)
            said.append(f"{name}={name if held else repr(plain)}")
    return f"sukashi.{kind.kind}({', '.join(said)})"


def _set(options: Mapping[str, Any], method: str = "") -> Iterator[str]:
    """What `--set` is given: options of one method, or by method."""
    for name, value in options.items():
        if isinstance(value, Mapping) and not method:
            yield from _set(value, f"{name}.")
        else:
            yield f"{method}{name}={value if isinstance(value, str) else json.dumps(value)}"


# From Python.


def keyworded(kind: type[Settings]) -> Callable[[_Function], _Function]:
    """Tells `help` of a function with `**settings` what these are: the fields of the kind that it does not name, and
    those that it does and that may be left out.
    """

    def wrap(function: _Function) -> _Function:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        named = {p.name for p in own}
        fields = {name: field for name, field in kind.model_fields.items() if name not in named}
        more = [
            # An elided default follows from other settings.
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=... if field.default_factory_takes_validated_data else default_of(field),
                annotation=_bare(field.annotation),
            )
            for name, field in fields.items()
        ]
        function.__signature__ = signature.replace(parameters=[*own, *more])  # type: ignore[attr-defined]
        lines = "\n".join(
            textwrap.fill(f"{name}: {_told(field)}", 116, initial_indent="    ", subsequent_indent="        ")
            for name, field in kind.model_fields.items()
            if name in fields or not field.is_required()
        )
        function.__doc__ = f"{inspect.getdoc(function)}\n\nSettings:\n{lines}\n"
        return function

    return wrap


def keywords(kind: type[_Kind], given: Mapping[str, Any], known: Iterable[str] = ()) -> _Kind:
    """Settings of a kind from Python's keywords, which may hold paths, NumPy's numbers, and one name for a list of it.

    Raises UsageError as `checked` does.
    """
    return checked(
        kind, {name: _plain(value, kind.model_fields.get(name)) for name, value in given.items()}, known=known
    )


def is_list(field: FieldInfo) -> bool:
    return any(get_origin(part) is list for part in alternatives(field.annotation))


def alternatives(annotation: Any) -> Iterator[Any]:
    """The types of a union but None, or the one there is; without what checks their values."""
    union = get_origin(annotation) in (Union, types.UnionType)
    for part in get_args(annotation) if union else [annotation]:
        if part is not type(None):
            yield get_args(part)[0] if get_origin(part) is Annotated else part


def _plain(value: Any, field: FieldInfo | None) -> Any:
    if field is not None and is_list(field):
        if isinstance(value, str | os.PathLike):
            return [os.fspath(value)]
        if isinstance(value, Iterable) and not isinstance(value, Mapping | AbstractSet):  # a set has no order
            return [_scalar(part) for part in value]
    return _scalar(value)


def _scalar(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {key: _scalar(part) for key, part in value.items()}
    if getattr(value, "shape", None) == () and hasattr(value, "item"):  # a number of NumPy or torch
        import numpy as np

        number = value.item()
        # 0.3 of float32 means 0.3, and not the 0.30000001192092896 that it is.
        return float(str(np.float32(number))) if isinstance(number, float) and value.dtype.itemsize < 8 else number
    return value


def _told(field: FieldInfo) -> str:
    default = option_of(field).default
    return f"{field.description}" if default is None else f"{field.description} Default: {default}."


def _bare(annotation: Any) -> Any:
    """A type without what checks its values."""
    match get_origin(annotation):
        case None:
            return annotation
        case origin if origin is Annotated:
            return _bare(get_args(annotation)[0])
        case origin if origin is list:
            return list[_bare(get_args(annotation)[0])]  # type: ignore[misc]
        case _:
            return annotation


# Faults.


def checked(
    kind: type[_Kind],
    given: Mapping[str, Any],
    *,
    file: object = None,
    options: Iterable[str] = (),
    known: Iterable[str] = (),
) -> _Kind:
    """Settings of a kind from what was given, in a file or as keywords.

    `options` are keys that the command line may give in place of the file, `known` names beside the kind's own that
    would have been understood.

    Raises UsageError for a key that is unknown, missing or of a wrong value, in this order: a name that is misspelt is
    missing too.
    """
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        fault = min(error.errors(), key=lambda fault: fault["type"] != "extra_forbidden")
    start = "" if file is None else f"{file}: "
    if fault["type"] == "value_error":  # of a validator of ours, or of what it calls
        raise UsageError(f"{start}{fault['ctx']['error']}")
    *tables, name = map(str, fault["loc"])
    inner = _table(kind, tables)
    where = ".".join((*tables, name))
    shown = f"{start}{where}" if tables or file is not None else f"`{where}`"
    if fault["type"] == "extra_forbidden":
        said = "unknown setting" if file is None else f"{file} has an unknown key"
        raise UsageError(f"{said} {where!r}{nearest(name, [*inner.model_fields, *known])}")
    if fault["type"] == "missing" and file is None:
        example = _example(inner, name)
        raise UsageError(f"{shown} must be given" + ("" if example is None else f": `{name}={example!r}`"))
    if fault["type"] == "missing":
        among = f" in [{'.'.join(tables)}]" if tables else ""
        remedy = f", or give `{name}`" if name in options else ""
        raise UsageError(f"{file} has no {name!r}{among}: add {_toml(name, _example(inner, name))}{remedy}")
    remedy = percentage(fault["input"]) if fault.get("ctx", {}).get("lt") == 1 else _by_name(fault["input"])
    raise UsageError(f"{shown} {_rule(fault, inner)}, got {_shown(fault['input'])}{remedy}")


def _by_name(value: Any) -> str:
    """Of a function, which goes by its name in files and other processes."""
    if not inspect.isroutine(value):
        return ""
    return f": give {value.__name__!r} where its decorator has registered it, or 'module:{value.__name__}'"


def _shown(value: Any) -> str:
    try:
        return repr(value)
    except ValueError:
        return "a number of thousands of digits"


def _table(kind: type[BaseModel], path: list[str]) -> type[BaseModel]:
    """The kind of the table at a path, or that of the nearest one around it."""
    for name in path:
        annotation = kind.model_fields[name].annotation if name in kind.model_fields else None
        inside = (annotation, *get_args(annotation))
        kind = next((found for found in inside if isinstance(found, type) and issubclass(found, BaseModel)), kind)
    return kind


def _example(kind: type[BaseModel], name: str) -> Any:
    """A value the key may have, or None."""
    field = kind.model_fields.get(name)
    return None if field is None else (field.examples or [None if field.is_required() else default_of(field)])[0]


def _rule(fault: Mapping[str, Any], kind: type[BaseModel]) -> str:
    name = str(fault["loc"][-1])
    if fault["type"] in _TYPES:
        example = _example(kind, name)
        return f"must be {_TYPES[fault['type']]}" + ("" if example is None else f" like {json.dumps(example)}")
    if fault["type"] == "literal_error":
        return f"must be {fault['ctx']['expected']}".replace("'", "")
    broken = {bound: limit for bound, limit in fault.get("ctx", {}).items() if bound in _BOUNDS}
    if broken:
        return f"must be {_bounds(broken, kind.model_fields.get(name))}"
    return (
        str(fault["msg"])
        .replace("Input should", "must")
        .replace("List should", "must")
        .replace(" after validation", "")
    )


def _bounds(broken: Mapping[str, Any], field: FieldInfo | None) -> str:
    """The bound that a value breaks, as {"ge": 1}; of a share the interval it lies in."""
    limits: dict[str, Any] = {}
    for rule in [] if field is None else field.metadata:
        limits |= {name: getattr(rule, name) for name in ("gt", "ge", "lt", "le") if hasattr(rule, name)}
    if limits.get("lt") == 1:
        return f"in {'[' if 'ge' in limits else '('}{limits.get('ge', limits.get('gt')):g}, 1)"
    ((name, limit),) = broken.items()
    return f"{_BOUNDS[name]} {limit:g}" if isinstance(limit, float) else f"{_BOUNDS[name]} {limit}"


def _toml(name: str, value: Any) -> str:
    """How a key and its value are written; `[table] with key = value` where the value is a table."""
    if not isinstance(value, Mapping):
        return f"{name} = {json.dumps(value)}"
    key, inner = next(iter(value.items()))
    return _toml(f"{name}.{key}", inner) if isinstance(inner, Mapping) else f"[{name}] with {_toml(key, inner)}"
