"""Layers to leave alone: named by shell patterns, and named so by what refuses them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

from sukashi.core.types import Site


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """Those of the names that are the pattern, or that it matches as a shell's does: `blocks.*.attn.qkv`."""
    return [name for name in names if name == pattern or fnmatchcase(name, pattern)]


def remedy(layers: Collection[str], others: Iterable[str] = ()) -> str:
    """What to do about layers that are refused, in the fewest patterns that leave all `others` in."""
    patterns = " ".join(f"--exclude {shlex.quote(pattern)}" for pattern in _patterns(layers, [*others]))
    which = {1: "it", 2: "both"}.get(len(layers), f"all {len(layers)} such layers")
    return f"exclude {which} ({patterns})"


def remedy_of(refused: Collection[Site], sites: Sequence[Site]) -> str:
    """The same about sites that are refused among all."""
    others = (member.module for site in sites if site not in refused for member in site.producers)
    return remedy([site.layer for site in refused], others)


def _patterns(layers: Collection[str], others: Sequence[str]) -> Iterator[str]:
    families: dict[str, list[str]] = {}
    for layer in layers:
        families.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", layer), []).append(layer)
    for pattern, family in families.items():
        if len(family) == 1 or matching(pattern, others):
            yield from family
        else:
            yield pattern
