"""The methods that settings ask for: by their names, one's own too, and with a hash of their code."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from sukashi.attributions import attributions
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

    Raises UsageError for what can't be imported, and for options of one method under two names.
    """
    names: dict[str, str] = {}
    changed: dict[str, Any] = {}
    for field, registry in FIELDS.items():
        given = getattr(settings, field, None)
        if given is not None:
            names |= {name: registry.named(name) for name in _listed(given)}
            changed[field] = names[given] if isinstance(given, str) else [names[name] for name in given]
    options = getattr(settings, "options", {})
    if not hasattr(settings, "criterion"):
        called = [names.get(name, name.rpartition(":")[2]) for name in options]
        for name in called:
            if called.count(name) > 1:
                raise UsageError(f"options of {name} were given under two names: give them once")
        changed["options"] = dict(zip(called, options.values(), strict=True))
    return settings.model_copy(
        update={name: value for name, value in changed.items() if getattr(settings, name, None) not in (None, value)}
    )


def codes(settings: Settings) -> dict[str, str]:
    """{name: a hash of its code} of each method that settings name."""
    given = ((registry, getattr(settings, field, None)) for field, registry in FIELDS.items())
    return {name: registry[name].code for registry, of in given for name in _listed(of)}


def check_shared(settings: Settings) -> None:
    """Refuse methods that only this process knows, where others are to do the work."""
    for field, registry in FIELDS.items():
        for name in _listed(getattr(settings, field, None)):
            if not registry.is_found(name):
                home = registry[name].home
                remedy = f"as {home}:{name}" if home != "__main__" else f"from a file, as FILE:{name}"
                raise UsageError(
                    f"{registry.noun} {name!r} was registered in this process, and others don't know it: give it "
                    f"{remedy}, or jobs=1"
                )


def _listed(given: Any) -> Iterable[str]:
    return [given] if isinstance(given, str) else given or []
