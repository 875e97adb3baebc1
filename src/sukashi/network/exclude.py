"""Layers to leave alone: named by shell patterns, and named so by what refuses them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

from sukashi.core.types import Site


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """Those of the names that are the pattern, or that it matches as a shell's does: `blocks.*.attn.qkv`."""
    return [name for name in names if name == pattern or fnmatchcase(name, pattern)]


def remedy(layers: Collection[str], others: Iterable[str] = ()) -> str:
    """What to do about layers that are refused, in the fewest patterns that leave all `others` in."""
    patterns = [*_patterns(layers, [*others])]
    which = {1: "it", 2: "both"}.get(len(layers), f"all {len(layers)} such layers")
    return f"exclude {which} (`exclude={patterns!r}`)"


def remedy_of(refused: Collection[Site], sites: Sequence[Site]) -> str:
    """The same about sites that are refused among all."""
    others = (member.module for site in sites if site not in refused for member in site.producers)
    return remedy([site.layer for site in refused], others)


def _patterns(layers: Collection[str], others: Sequence[str], n_kept: int = 0) -> Iterator[str]:
    """Patterns with a star for each number in a name but the first `n_kept`; for more of these where others match."""
    families: dict[str, list[str]] = {}
    for layer in layers:
        families.setdefault(_starred(layer, n_kept), []).append(layer)
    for pattern, family in families.items():
        if len(family) == 1:
            yield from family
        elif matching(pattern, others):
            yield from _patterns(family, others, n_kept + 1)
        else:
            yield pattern


def _starred(layer: str, n_kept: int) -> str:
    parts = layer.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdecimal()]
    return ".".join("*" if place in numbers[n_kept:] else part for place, part in enumerate(parts))
