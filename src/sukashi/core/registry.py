"""Registries: registering a function is the only step that makes a method visible everywhere.

A method of one's own is registered by importing its file, or asked for as package.module:function, registered or not;
packages that are installed offer theirs by the entry points `sukashi.criteria`, `sukashi.attributions`, ... which are
loaded when they are asked for.
"""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import inspect
import pkgutil
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import EntryPoint
from typing import Annotated, Any, TypeVar, get_type_hints

import numpy as np
import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from sukashi.core.bracketed import joined, parted
from sukashi.core.code import code_of, has_file
from sukashi.core.errors import SukashiError, UsageError, brief, nearest, raised_in
from sukashi.core.imported import imported, is_import
from sukashi.core.types import Batch, Kind, Maps

Function = TypeVar("Function", bound=Callable[..., Any])
Gives = Callable[[str, Any, Mapping[str, Any]], None]
FREE = "decides nothing"  # in the annotation of an option on which results do not depend
BatchSize = Annotated[int, Field(ge=1), FREE]
_STRICT = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)


@dataclass(frozen=True)
class Method:
    """A registered function. Its name is the registry key, the CLI name and the value in the results.

    `providers` make what it asks for by their names; their options are its options too. `gives(name, what it returned,
    what it was given by name)` refuses what no method of its kind may return; None of those that are there to change
    what they are given. `chosen` are the options that stand in its name, as in drift[share=0.2].

    Called, one of somebody's own is given copies of network, images and maps, draws random numbers that nobody passes
    on by the seed of its `generator` (0 without one), and an error of its own is told with its name and its line. To
    all this those of sukashi are held by the contract tests.
    """

    name: str
    fn: Callable[..., Any]
    source: str
    facts: dict[str, Any]
    providers: tuple[Method, ...] = ()
    gives: Gives | None = None
    chosen: Mapping[str, Any] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return (inspect.getdoc(self.fn) or "").partition("\n")[0]

    @property
    def asks(self) -> tuple[str, ...]:
        """Names of what its function is given: its parameters that are neither options nor have a default."""
        parameters = inspect.signature(self.fn).parameters.values()
        return tuple(p.name for p in parameters if p.kind is not p.KEYWORD_ONLY and p.default is p.empty)

    @property
    def inputs(self) -> frozenset[str]:
        """What must be there to call it: what it asks for, and in place of what is provided what the providers need."""
        provided = {provider.name for provider in self.providers}
        return frozenset(self.asks).difference(provided).union(*(provider.inputs for provider in self.providers))

    @property
    def own_options(self) -> dict[str, Any]:
        """Keyword-only options with their defaults, `generator` and machinery (names starting with _) left out."""
        parameters = inspect.signature(self.fn).parameters.values()
        return {
            p.name: p.default
            for p in parameters
            if p.kind is p.KEYWORD_ONLY and p.default is not p.empty and not p.name.startswith("_")
        }

    @property
    def options(self) -> dict[str, Any]:
        """Its own options with their defaults, then those of its providers."""
        found = dict(self.own_options)
        for provider in self.providers:
            found |= provider.options
        return found | dict(self.chosen)

    @property
    def code(self) -> str:
        """A hash of the code that it and its providers run: another one where they may give another result.

        Raises UsageError as `code_of` does.
        """
        return "-".join([code_of(self.fn), *(provider.code for provider in self.providers)])

    @property
    def home(self) -> str:
        """The module that its function is of."""
        return _home(self.fn)

    @property
    def is_own(self) -> bool:
        """Whether it is somebody's own, and not sukashi's."""
        return self.home.partition(".")[0] != "sukashi"

    @property
    def spec(self) -> str:
        """What another process finds it by: package.module:function."""
        return f"{self.home}:{self.fn.__name__}"

    @property
    def keeps_journal(self) -> bool:
        """Whether the method can go on from a journal of what it has decided so far."""
        return "_journal" in inspect.signature(self.fn).parameters

    def check_options(self, given: Mapping[str, Any]) -> None:
        """Refuse an option the method does not have, naming the nearest, or a value that its annotation excludes."""
        options, annotations = self.options, self.annotations
        for name, value in given.items():
            if name not in options:
                raise UsageError(f"{self.name} has no option {name!r}{nearest(name, options)}")
            try:
                TypeAdapter(annotations[name], config=_STRICT).validate_python(value)
            except ValidationError as error:
                said = error.errors()[0]["msg"].replace(" after validation", "")
                rule = said.replace("Input should", "must").replace("Value should", "must")
                default = getattr(options[name], "__name__", repr(options[name]))
                raise UsageError(f"{name} of {self.name} {rule}, got {value!r}: its default is {default}") from None

    def deciding(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Those of its options that decide results."""
        annotations = self.annotations
        return {
            name: value for name, value in given.items() if FREE not in getattr(annotations[name], "__metadata__", ())
        }

    @property
    def annotations(self) -> dict[str, Any]:
        """Of its parameters and those of its providers; an option without one is of the type of its default."""
        bare = {name: Any if default is None else type(default) for name, default in self.own_options.items()}
        found = bare | get_type_hints(self.fn, include_extras=True)
        for provider in self.providers:
            found |= provider.annotations
        return found

    def check_kinds(self, kinds: Iterable[Kind]) -> None:
        """Refuse sites of a kind that is not among the method's own `kinds`."""
        for kind in kinds:
            if kind not in self.facts["kinds"]:
                remedy = (
                    "without `scope` it removes units"
                    if kind == "weight"
                    else "prune and schedule remove single weights with a scope, such as `scope='row'`"
                )
                raise UsageError(
                    f"{self.name} scores sites of kind {', '.join(self.facts['kinds'])}, not {kind!r}: {remedy}"
                )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kwargs = {**self.chosen, **kwargs}
        signature = inspect.signature(self.fn)
        more = {name: value for name, value in kwargs.items() if name not in signature.parameters}
        self.check_options(more | {name: value for name, value in kwargs.items() if name in self.options})
        bound = signature.bind(*args, **kwargs)
        given = dict(bound.arguments)
        # Of a criterion (model, sites, data); an attribution (model, x, target, sites) refuses in words of its own.
        if "kinds" in self.facts and self.asks[1] == "sites":
            self.check_kinds(site.kind for site in given["sites"])
        if self.is_own and not self.facts.get("needs_data", True):
            bound.arguments["data"] = given["data"][:0]
        found = self._of_its_own(bound) if self.is_own else self.fn(*bound.args, **bound.kwargs)
        if self.gives is not None:
            self.gives(self.name, found, given)
        return found

    def _of_its_own(self, bound: inspect.BoundArguments) -> Any:
        """What somebody's own function gives, which can spoil nothing for those that come after it."""
        for name in self.asks if self.gives is not None else ():
            if name not in self.facts.get("changes", ()):
                bound.arguments[name] = _apart(bound.arguments[name])
        generator = bound.arguments.get("generator")
        seed = generator.initial_seed() if isinstance(generator, torch.Generator) else 0
        try:
            with seeded(seed), torch.set_grad_enabled(torch.is_grad_enabled()):
                return self.fn(*bound.args, **bound.kwargs)
        except (SukashiError, MemoryError, torch.cuda.OutOfMemoryError):
            raise
        except Exception as error:  # whatever somebody's function raises
            raise UsageError(f"{self.name} failed in {raised_in(error)} ({brief(error)}): put that right") from error


def _apart(value: Any) -> Any:
    """A copy of what a method might change: a network, a tensor, images, maps."""
    match value:
        case torch.nn.Module():
            return copy.deepcopy(value)
        case torch.Tensor():
            return value.clone()
        case Batch():
            return replace(value, x=value.x.clone(), target=value.target.clone())
        case Maps():
            return replace(value, values=value.values.clone())
        case Mapping():
            return {name: _apart(part) for name, part in value.items()}
    return value


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, the random numbers that torch, NumPy and Python draw by themselves are those of a seed; afterwards they
    go on where they were.
    """
    kept = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(kept[0])
            np.random.set_state(kept[1])


class Registry:
    """A named collection of methods; `register` is a decorator. `facts` are those of methods that say nothing else.

    `takes` is how the signature of its methods begins, as "model, sites, data, *, generator".
    """

    def __init__(self, noun: str, plural: str, *, takes: str = "", gives: Gives | None = None, **facts: Any) -> None:
        self.noun = noun
        self.plural = plural
        self.takes = takes
        self.gives = gives
        self.facts = facts
        self.providers: dict[str, Method] = {}
        self._methods: dict[str, Method] = {}
        self._followers: list[Callable[[Method], None]] = []

    def register(self, name: str, *, source: str = "", **facts: Any) -> Callable[[Function], Function]:
        """Make a function a method of this registry; `source` cites the paper, `facts` are read by its users.

        Registered again, as when its file is loaded anew or a cell of a notebook runs twice, it takes its own place.
        Raises UsageError for the name of a method of another module, and for a function that can't be one.
        """

        def add(fn: Function) -> Function:
            if name != fn.__name__:
                raise UsageError(
                    f"{self.noun} {name!r} is a function called {fn.__name__!r}: methods go by one name, call both the "
                    "same"
                )
            self._check(fn)
            self._take(self._methods, fn, source, {**self.facts, **facts})
            for follow in self._followers:
                follow(self._methods[name])
            return fn

        return add

    def provide(self, fn: Function) -> Function:
        """Make a function the provider of what it is named after, for methods registered later that ask for it."""
        self._take(self.providers, fn, "", {})
        self.providers[fn.__name__] = replace(self.providers[fn.__name__], gives=None)
        return fn

    def each(self, follow: Callable[[Method], None]) -> None:
        """Call `follow` with every method, those to come too."""
        self._followers.append(follow)
        for method in self:
            follow(method)

    def _take(self, known: dict[str, Method], fn: Callable[..., Any], source: str, facts: dict[str, Any]) -> None:
        """Put a function in its place, which none of another module may have."""
        name, before = fn.__name__, known.get(fn.__name__)
        if before is not None and not _same(before.fn, fn):
            raise UsageError(
                f"{self.noun} {name!r} of {_home(fn)} has the name of that of {_home(before.fn)}: give yours another"
            )
        plain = Method(name, fn, source, facts, gives=self.gives)
        if plain.is_own and not source:
            plain = replace(plain, source=plain.spec)
        known[name] = replace(plain, providers=tuple(self.providers[of] for of in plain.asks if of in self.providers))
        if known[name].is_own and has_file(fn):
            code_of(fn)  # its file is read now, as it is imported: it may be edited while it runs

    def _check(self, fn: Callable[..., Any]) -> None:
        """Refuse a function that is called otherwise than methods are, or whose annotations say nothing."""
        first, _, named = (part.strip(" ,").replace(",", "").split() for part in self.takes.partition("*"))
        parameters = inspect.signature(fn).parameters
        rest = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        if list(parameters)[: len(first)] != first or not (rest or set(named) <= set(parameters)):
            raise UsageError(
                f"{self.noun} {fn.__name__!r} of {_home(fn)} takes ({', '.join(parameters)}), and must begin with "
                f"({self.takes})"
            )
        try:
            get_type_hints(fn)
        except Exception as error:  # whatever an annotation raises
            raise UsageError(
                f"annotations of {self.noun} {fn.__name__!r} of {_home(fn)} mean nothing ({brief(error)}): import what "
                "they name, not only for type checkers"
            ) from error

    def __getitem__(self, name: str) -> Method:
        """The method of a name, or of one's own as package.module:function, with the options that follow in brackets.

        Raises UsageError for an unknown name or option, and for what can't be imported or is no such method.
        """
        if name in self._methods:
            return self._methods[name]
        name, chosen = parted(name)
        if chosen:
            found = self[name]
            found.check_options(chosen)
            return replace(found, name=joined(found.name, chosen), chosen=chosen)
        if is_import(name):
            return self._of(imported(name), name)
        offered = self.offered(name)
        if not offered:
            known = dict.fromkeys([*self._methods, *(entry.name for entry in self.offered())])
            raise UsageError(f"unknown {self.noun} {name!r}{nearest(name, known)}; or package.module:function")
        said = [f"{entry.value} of {entry.dist.name if entry.dist else 'an unknown package'}" for entry in offered]
        if len(said) > 1:
            raise UsageError(f"{self.noun} {name!r} is offered by {' and by '.join(said)}: remove one of the packages")
        try:
            found = offered[0].load()
        except SukashiError:
            raise
        except (Exception, SystemExit) as error:  # whatever somebody's module raises
            raise UsageError(
                f"{self.noun} {name!r} is {said[0]}, which can't be imported ({brief(error)}): put that package right"
            ) from error
        return self._of(found, f"{offered[0].module}:{name}")

    def is_found(self, name: str) -> bool:
        """Whether another process finds a method by its name: it is sukashi's own, installed, or says where it is."""
        name, _ = parted(name)
        return is_import(name) or not self[name].is_own or bool(self.offered(name))

    def offered(self, name: str | None = None) -> list[EntryPoint]:
        """What installed packages offer, by a name or all of it; nothing of it is loaded."""
        found = importlib.metadata.entry_points(group=f"sukashi.{self.plural}")
        return [entry for entry in found if name in (None, entry.name)]

    def named(self, name: str) -> str:
        """What a method is called in results: that of package.module:function has the function's name, options in
        brackets are in order.
        """
        method, chosen = parted(name)
        return joined(self[method].name if is_import(method) else method, chosen)

    def _of(self, found: Any, said: str) -> Method:
        """The method that a function is; one that nobody has registered is registered as it is."""
        if not inspect.isfunction(found):
            raise UsageError(f"{said} is of type {type(found).__name__}, and a {self.noun} is a function")
        for method in self:
            if inspect.unwrap(method.fn) is inspect.unwrap(found):
                return method
        name = said.rpartition(":")[2]
        self.register(name, source=said)(found)
        return self._methods[name]

    def __iter__(self) -> Iterator[Method]:
        return iter(list(self._methods.values()))

    def __contains__(self, name: object) -> bool:
        return name in self._methods

    def names(self) -> list[str]:
        return list(self._methods)


def _home(fn: Callable[..., Any]) -> str:
    """The module that a function is of."""
    return str(inspect.unwrap(fn).__module__)


def _same(one: Callable[..., Any], other: Callable[..., Any]) -> bool:
    """Whether a function takes the place of another: it is that of the same lines, or of the same session."""
    home, names = _home(one), (inspect.unwrap(one).__qualname__, inspect.unwrap(other).__qualname__)
    return home == _home(other) and (home == "__main__" or names[0] == names[1])


def fill(package: str, path: Iterable[str]) -> None:
    """Import every file of a package by the order of their names, so that what they register is there; but those whose
    name starts with _.
    """
    for name in sorted(module.name for module in pkgutil.iter_modules(path)):
        if not name.startswith("_"):
            importlib.import_module(f"{package}.{name}")
