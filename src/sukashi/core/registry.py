"""Registries: registering a function is the only step that makes a method visible everywhere."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, TypeVar, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from sukashi.core.errors import UsageError, nearest
from sukashi.core.types import Kind

Function = TypeVar("Function", bound=Callable[..., Any])
FREE = "decides nothing"  # in the annotation of an option on which results do not depend
BatchSize = Annotated[int, Field(ge=1), FREE]
_STRICT = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)


@dataclass(frozen=True)
class Method:
    """A registered function. Its name is the registry key, the CLI name and the value in the results.

    `providers` make what it asks for by their names; their options are its options too.
    """

    name: str
    fn: Callable[..., Any]
    source: str
    facts: dict[str, Any]
    providers: tuple[Method, ...] = ()

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
        return found

    @property
    def keeps_journal(self) -> bool:
        """Whether the method can go on from a journal of what it has decided so far."""
        return "_journal" in inspect.signature(self.fn).parameters

    def check_options(self, given: Mapping[str, Any]) -> None:
        """Refuse an option the method does not have, naming the nearest, or a value that its annotation excludes."""
        options, annotations = self.options, self._annotations
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
        annotations = self._annotations
        return {
            name: value for name, value in given.items() if FREE not in getattr(annotations[name], "__metadata__", ())
        }

    @property
    def _annotations(self) -> dict[str, Any]:
        found = get_type_hints(self.fn, include_extras=True)
        for provider in self.providers:
            found |= provider._annotations
        return found

    def check_kinds(self, kinds: Iterable[Kind]) -> None:
        """Refuse sites of a kind that is not among the method's own `kinds`."""
        for kind in kinds:
            if kind not in self.facts["kinds"]:
                remedy = (
                    "without --scope it removes units"
                    if kind == "weight"
                    else "prune and schedule remove single weights with a scope, such as --scope row"
                )
                raise UsageError(
                    f"{self.name} scores sites of kind {', '.join(self.facts['kinds'])}, not {kind!r}: {remedy}"
                )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.check_options({name: value for name, value in kwargs.items() if name in self.options})
        # Of a criterion (model, sites, data); an attribution (model, x, target, sites) refuses in words of its own.
        if "kinds" in self.facts and list(inspect.signature(self.fn).parameters)[1] == "sites":
            self.check_kinds(site.kind for site in (kwargs["sites"] if "sites" in kwargs else args[1]))
        return self.fn(*args, **kwargs)


class Registry:
    """A named collection of methods; `register` is a decorator. `facts` are those of methods that say nothing else."""

    def __init__(self, noun: str, plural: str, **facts: Any) -> None:
        self.noun = noun
        self.plural = plural
        self.facts = facts
        self.providers: dict[str, Method] = {}
        self._methods: dict[str, Method] = {}

    def register(self, name: str, *, source: str, **facts: Any) -> Callable[[Function], Function]:
        """Make a function a method of this registry; `source` cites the paper, `facts` are read by its users."""

        def add(fn: Function) -> Function:
            assert name == fn.__name__, f"registry key {name!r} and function {fn.__name__!r} differ"
            assert name not in self._methods, f"{self.noun} {name!r} is registered twice"
            self._methods[name] = self._method(fn, source, {**self.facts, **facts})
            return fn

        return add

    def provide(self, fn: Function) -> Function:
        """Make a function the provider of what it is named after, for methods registered later that ask for it."""
        assert fn.__name__ not in self.providers, f"{fn.__name__!r} is provided twice"
        self.providers[fn.__name__] = self._method(fn, "", {})
        return fn

    def _method(self, fn: Callable[..., Any], source: str, facts: dict[str, Any]) -> Method:
        plain = Method(fn.__name__, fn, source, facts)
        return replace(plain, providers=tuple(self.providers[name] for name in plain.asks if name in self.providers))

    def __getitem__(self, name: str) -> Method:
        if name not in self._methods:
            raise UsageError(f"unknown {self.noun} {name!r}{nearest(name, self._methods)}")
        return self._methods[name]

    def __iter__(self) -> Iterator[Method]:
        return iter(self._methods.values())

    def __contains__(self, name: object) -> bool:
        return name in self._methods

    def names(self) -> list[str]:
        return list(self._methods)
