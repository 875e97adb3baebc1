"""The methods that settings ask for: by their names, one's own too, and with a hash of their code."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from sukashi.attributions import attributions
from sukashi.core.bracketed import parted, plain
from sukashi.core.errors import UsageError
from sukashi.core.registry import Registry
from sukashi.core.schema import Settings
from sukashi.criteria import criteria
from sukashi.measures import measures

Kind = TypeVar("Kind", bound=Settings)
# Fields of settings that name methods.
FIELDS: dict[str, Registry] = {
    "criterion": criteria,
    "criteria": criteria,
    "attributions": attributions,
    "measures": measures,
}


def named(settings: Kind) -> Kind:
    """The same settings with every method by the name it has in results: mine:activity is imported, and is activity.

    Options are by these names too: of drift[share=0.2] those of drift, and that share. The one criterion of a cut is
    drift then, and has that option.

    Raises UsageError for what can't be imported, for options of one method under two names, or of a name that has them
    in brackets, and for one method with equal options twice.
    """
    names: dict[str, str] = {}
    changed: dict[str, Any] = {}
    for field, registry in FIELDS.items():
        given = getattr(settings, field, None)
        if given is not None:
            names |= {name: registry.named(name) for name in _listed(given)}
            changed[field] = names[given] if isinstance(given, str) else [names[name] for name in given]
    options = getattr(settings, "options", {})
    for name in () if hasattr(settings, "criterion") else options:
        if plain(name) != name:
            raise UsageError(f"options of {name} stand in its name: write them there, those given for it too")
    if hasattr(settings, "criterion"):
        changed["criterion"], chosen = parted(changed["criterion"])
        changed["options"] = {**options, **chosen}
    else:
        names |= {plain(name): plain(called) for name, called in names.items()}
        called = [names.get(name, name.rpartition(":")[2]) for name in options]
        for name in called:
            if called.count(name) > 1:
                raise UsageError(f"options of {name} were given under two names: give them once")
        changed["options"] = _shared(dict(zip(called, options.values(), strict=True)), changed)
    return settings.model_copy(
        update={name: value for name, value in changed.items() if getattr(settings, name, None) not in (None, value)}
    )


def _shared(options: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Options by contender: those of a method are of each that is this method."""
    named = [name for field in FIELDS for name in _listed(given.get(field))]
    several = [name for name in named if plain(name) != name]
    whole = {name: {**options.get(plain(name), {}), **parted(name)[1]} for name in several}
    kept = {name: of for name, of in options.items() if name in named or name not in map(plain, several)} | whole
    for place, name in enumerate(several):
        for other in (plain(name), *several[:place]):
            same = other in named and plain(other) == plain(name) and kept.get(other, {}) == kept[name]
            if same:
                raise UsageError(f"{other} and {name} have the same options, {kept[name]}: leave one of them out")
    return kept


def codes(settings: Settings) -> dict[str, str]:
    """{method: a hash of its code} of each method that settings name."""
    given = ((registry, getattr(settings, field, None)) for field, registry in FIELDS.items())
    return {plain(name): registry[name].code for registry, of in given for name in _listed(of)}


def check_shared(settings: Settings) -> None:
    """Refuse methods that only this process knows, where others are to do the work."""
    for field, registry in FIELDS.items():
        for name in _listed(getattr(settings, field, None)):
            if not registry.is_found(name):
                home = registry[name].home
                remedy = f"as {registry[name].spec}" if home != "__main__" else f"from a file, as FILE:{name}"
                raise UsageError(
                    f"{registry.noun} {name!r} was registered in this process, and others don't know it: give it "
                    f"{remedy}, or `jobs=1`"
                )


def _listed(given: Any) -> Iterable[str]:
    return [given] if isinstance(given, str) else given or []
