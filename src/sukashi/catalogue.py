"""What there is: the rows that `sukashi list` prints."""

from __future__ import annotations

from sukashi import data, models
from sukashi.attributions import attributions
from sukashi.criteria import criteria
from sukashi.errors import UsageError
from sukashi.measures import measures
from sukashi.registry import Registry, nearest


def rows(what: str) -> list[dict[str, str]]:
    """One dictionary a method, model or dataset: its name, and for methods what it gives and its source."""
    registries: dict[str, Registry] = {"criteria": criteria, "attributions": attributions, "measures": measures}
    if what in registries:
        return [{"name": m.name, "summary": m.summary, "source": m.source} for m in registries[what]]
    names = {"models": models.names, "data": data.names}
    if what not in names:
        raise UsageError(f"unknown list {what!r}{nearest(what, [*registries, *names])}")
    return [{"name": name} for name in names[what]()]
