"""What made a result: a hash of the code of a method, and the versions of what it ran on.

The code of a method is its file and all that this file imports, directly or through others, of sukashi, of its own
package, or of the folder that it lies in: their syntax trees without comments, docstrings and layout, so that these may
change. What was installed beside it is told by `versions`. A function that lies in no file, as one of a notebook, is
what it runs, what it reads of its session, and so on.
"""

from __future__ import annotations

import ast
import dis
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import pkgutil
import platform
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path, PurePath
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from sukashi.core.errors import UsageError, brief

PACKAGES = ("sukashi", "torch", "torchvision", "timm", "numpy")
# They speak, count and look up, and decide no number.
_IDLE = {
    *("sukashi", "sukashi.report.words"),
    *(f"sukashi.core.{name}" for name in ("code", "errors", "imported", "progress", "registry")),
}
_LIBRARIES = {Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(...), range, slice, PurePath)


def versions() -> dict[str, str]:
    """Versions of what decides results."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}}


def code_of(function: Callable[..., Any]) -> str:
    """Sixteen digits that are others when a function's code is another.

    Raises UsageError where that can't be told: a function of a notebook reads what has no plain value.
    """
    home = _home(inspect.unwrap(function))
    told = [_told(function, function.__name__, set()), sources(home) if _read(home) else None]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def codes_of(parts: Iterable[Callable[..., Any]]) -> dict[str, str]:
    """{name: sixteen digits} of several functions."""
    return {part.__name__: code_of(part) for part in parts}


def has_file(function: Callable[..., Any]) -> bool:
    """Whether the source of a function is that of a module, and not of a notebook or a script."""
    return _read(_home(inspect.unwrap(function))) is not None


def _home(function: Any) -> str:
    """The module in which a function was written; what wraps it may say another."""
    return str(getattr(function, "__globals__", {}).get("__name__", getattr(function, "__module__", "")))


# Of files.


@dataclass(frozen=True)
class _Source:
    """A module as it was imported: its `spec`, which a reload makes anew, the hash of its tree, and what of its own it
    imports.
    """

    spec: Any
    digest: str
    imports: tuple[str, ...]


_read_before: dict[str, _Source] = {}


def sources(name: str) -> dict[str, str]:
    """{module: hash} of a module and of its own that it imports, directly or through others.

    A module is read when it is first asked for, and again once it was reloaded: what runs is what was read then.
    """
    found: dict[str, str] = {}
    waiting = [name]
    while waiting:
        module = waiting.pop()
        source = None if module in found or module in _IDLE else _read(module)
        if source is not None:
            found[module] = source.digest
            waiting += source.imports
    return found


def _read(name: str) -> _Source | None:
    """None for what has no source of Python, and for the script or session that runs."""
    spec = None if name == "__main__" else _spec(name)
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        return None
    known = _read_before.get(name)
    if known is None or known.spec is not spec:
        try:
            tree = ast.parse(Path(spec.origin).read_bytes())
        except (OSError, SyntaxError, ValueError) as error:
            raise UsageError(f"{spec.origin} can't be read any more ({brief(error)}): import it again") from error
        package, near = name if spec.submodule_search_locations is not None else name.rpartition(".")[0], _near(name)
        imports = tuple(other for other in dict.fromkeys(_imports(tree, package)) if near(other) and _spec(other))
        known = _Source(spec, hashlib.sha256(ast.unparse(_bare(tree)).encode()).hexdigest()[:16], imports)
        # Before it is imported it may have another spec by then.
        if name in sys.modules:
            _read_before[name] = known
    return known


def _spec(name: str) -> Any:
    """Where a module lies, or None; nothing is imported for it, of which nobody knows what it does."""
    if name in sys.modules:
        return getattr(sys.modules[name], "__spec__", None)
    package = name.rpartition(".")[0]
    if not package:
        with suppress(ImportError, ValueError, AttributeError):
            return importlib.util.find_spec(name)
        return None
    places = getattr(sys.modules.get(package), "__path__", None)
    if places is None:
        places = getattr(_spec(package), "submodule_search_locations", None)
    finders = filter(None, map(pkgutil.get_importer, places or ()))
    found = [spec for finder in finders if (spec := finder.find_spec(name)) is not None]
    # A folder without __init__.py is a package where no other place has more.
    return next((spec for spec in found if spec.loader is not None), found[0] if found else None)


def _bare(tree: ast.Module) -> ast.Module:
    """A tree without docstrings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body = node.body[1:] or [ast.Pass()]
    return tree


def _imports(tree: ast.Module, package: str) -> Iterator[str]:
    """Names of what may be modules among what a tree imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                with suppress(ImportError):
                    module = importlib.util.resolve_name("." * node.level + module, package)
            # `from a import b` names a module or something in one.
            yield from (module, *(f"{module}.{alias.name}" for alias in node.names))


def _near(name: str) -> Callable[[str], bool]:
    """Whether a module is sukashi's, of the same package, or lies in the same folder, if that is no library."""
    top = name.partition(".")[0]
    folder = _folder(top)
    apart = _is_library(folder)

    @cache
    def near(of: str) -> bool:
        return of in ("sukashi", top) or (not apart and of != "__main__" and _folder(of) == folder)

    return lambda other: near(other.partition(".")[0])


def _is_library(folder: Path | None) -> bool:
    return folder is None or folder in _LIBRARIES or folder.name in ("site-packages", "dist-packages")


def _folder(top: str) -> Path | None:
    """Where a module or package that is in no other lies."""
    spec = _spec(top)
    if spec is None or not (spec.origin or spec.submodule_search_locations):
        return None
    places = list(spec.submodule_search_locations or ()) or [spec.origin]
    return Path(places[0]).resolve().parent


# Of what lies in no file.


def _told(value: Any, name: str, seen: set[int]) -> Any:
    """What decides what a value does, as JSON; `name` is the function that reads it."""
    if id(value) in seen:
        return "as above"
    wrapped = getattr(value, "__wrapped__", None)
    match value:
        case _ if isinstance(value, _PLAIN) or _is_dtype(value):
            return repr(value)
        case ModuleType():
            return _own_sources(value.__name__)
        case BuiltinFunctionType():
            of = value.__self__
            bound = None if of is None or isinstance(of, ModuleType | type) else _told(of, name, seen)
            return [value.__module__, value.__qualname__, bound]
        case FunctionType() | type():
            found = [value.__qualname__]
            if wrapped is not None:
                found.append(_told(wrapped, name, seen))
            if (home := _home(value)) != "__main__":
                return [*found, _own_sources(home)]
            seen = seen | {id(value)}
            return [*found, _function(value, name, seen) if isinstance(value, FunctionType) else _class(value, seen)]
        case MethodType():
            return [_told(part, name, seen) for part in (value.__func__, value.__self__)]
        case partial():
            return [_told(part, name, seen) for part in (value.func, value.args, value.keywords)]
        case Mapping():
            return [[_told(key, name, seen), _told(of, name, seen)] for key, of in value.items()]
        case set() | frozenset():
            return sorted(json.dumps(_told(of, name, seen)) for of in value)
        case list() | tuple():
            return [_told(of, name, seen) for of in value]
        case _ if hasattr(value, "detach"):
            numbers = value.detach().cpu()
            with suppress(TypeError):  # of a type that NumPy has not, as bfloat16
                numbers = numbers.numpy()
            numbers = numbers if hasattr(numbers, "tobytes") else numbers.float().numpy()
            return [str(value.dtype), list(value.shape), hashlib.sha256(numbers.tobytes()).hexdigest()]
        case _ if hasattr(value, "tobytes") and not value.dtype.hasobject:
            return [str(value.dtype), list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]
        case _ if type(value).__module__ == "dataclasses":  # stands for a default that is made anew
            return type(value).__name__
        case _ if _home(type(value)) == "__main__" and hasattr(value, "__dict__"):
            return [_told(type(value), name, seen), _told(vars(value), name, seen | {id(value)})]
    kind = type(value).__name__
    raise UsageError(
        f"{name} reads a value of type {kind} of its session, of which nobody can tell whether it has changed "
        "since the last call: make it an option, or put the function into a file and give FILE:FUNCTION"
    )


def _own_sources(module: str) -> Any:
    """Those of a module that a notebook reads; of a library's its name."""
    top = module.partition(".")[0]
    followed = top == "sukashi" or not _is_library(_folder(top))
    return sources(module) if followed and _read(module) else module


def _is_dtype(value: Any) -> bool:
    return type(value).__module__ in ("torch", "numpy") and type(value).__name__ in ("dtype", "device", "Size")


def _function(function: FunctionType, name: str, seen: set[int]) -> list[Any]:
    """Its instructions and constants, defaults, what it closes over and what it reads of its session."""
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    given = [function.__defaults__, function.__kwdefaults__, cells]
    read = {of: function.__globals__[of] for of in sorted(_globals(function.__code__)) if of in function.__globals__}
    return [
        _instructions(function.__code__),
        *(_told(part, name, seen) for part in given),
        {of: _told(value, name, seen) for of, value in read.items()},
    ]


def _class(kind: type, seen: set[int]) -> list[Any]:
    """Its bases, and what it holds: methods, values, what of its descriptors is written in it."""
    told = {}
    for of, value in vars(kind).items():
        if isinstance(value, staticmethod | classmethod | cached_property | property):
            value = [getattr(value, part, None) for part in ("__func__", "func", "fget", "fset", "fdel")]
        own = not of.startswith("__") and not hasattr(value, "__get__") and of != "_abc_impl"
        if own or isinstance(value, FunctionType):
            told[of] = _told(value, kind.__name__, seen)
    return [[_told(base, kind.__name__, seen) for base in kind.__bases__], told]


def _instructions(code: CodeType) -> list[Any]:
    """Bytecode, constants but for the docstring, and names."""
    constants = list(code.co_consts)
    if constants and isinstance(constants[0], str) and _has_docstring(code):
        constants = constants[1:]
    told = [_instructions(part) if isinstance(part, CodeType) else repr(part) for part in constants]
    return [code.co_code.hex(), told, code.co_names, code.co_varnames, code.co_freevars]


def _has_docstring(code: CodeType) -> bool:
    """Whether the first constant is one: nothing loads it."""
    return all(step.argval is not code.co_consts[0] for step in dis.get_instructions(code) if "CONST" in step.opname)


def _globals(code: CodeType) -> set[str]:
    found = {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    for part in code.co_consts:
        if isinstance(part, CodeType):
            found |= _globals(part)
    return found
