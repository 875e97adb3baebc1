"""A network ready to be looked at, and what rebuilds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from sukashi.core.errors import UsageError
from sukashi.core.types import Mask, Preprocess
from sukashi.network.surgery import Table

# Sources of architectures whose class count is an option; any other source is an import path.
LIBRARIES = ("sukashi", "timm", "torchvision")


READ = ("size", "mean", "std", "resize")


class Origin(NamedTuple):
    """Who says how images are read, and whether it is assumed: of weights that say nothing of it."""

    by: str
    assumed: bool = False


class Trained(NamedTuple):
    """Images that weights were trained on: the training split of data whose splits have this hash
    (`Data.splits_sha256`), but for the fraction of it that was held out for validation.
    """

    splits: str
    validation: float


@dataclass(frozen=True)
class Loaded:
    """A network ready to be looked at, and what rebuilds it.

    `model` is in eval mode, in fp32, with explicit attention, and nobody else's. `spec` and `options` rebuild its
    architecture, `cuts` what was then removed or silenced, cut after cut, `mask` which of the weights that are left are
    zero and stay so (None: nobody said). `class_names` is None where they are not known; `weights_sha256` is the hash
    of the weights file, or of the tensors where there was none.
    """

    model: nn.Module
    spec: str
    options: Mapping[str, Any]
    preprocess: Preprocess
    n_classes: int
    class_names: tuple[str, ...] | None
    weights_sha256: str
    cuts: tuple[Table, ...] = ()
    mask: Mask | None = None
    last_cut: str = field(default="", compare=False)
    """What the last cut removed, in words; a folder does not keep it."""
    notes: tuple[str, ...] = field(default=(), compare=False)
    """What was done to make its weights fit, in words; a folder does not keep them."""
    read_by: Mapping[str, Origin] = field(default_factory=dict, compare=False)
    """Who says of each part of `preprocess` (READ) that images are read so."""
    trained_on: tuple[Trained, ...] | None = field(default=None, compare=False)
    """All that its weights were trained on, () where they are random; None where nobody knows."""
    crop: float = field(default=1.0, compare=False)
    """By how much the shorter side is larger than the centre that is cropped, as the architecture was published."""

    @property
    def reads(self) -> str:
        """How images are read and who says so: 32 x 32, mean 0.5, std 0.5 (the saved folder), squashed (as asked)."""
        own, told = self.preprocess, []
        mean, std = (", ".join(f"{value:.3g}" for value in values) for values in (own.mean, own.std))
        words = (f"{own.height} x {own.width}", f"mean {mean}", f"std {std}", own.resizing)
        by = [self.read_by[name].by if name in self.read_by else "" for name in READ]
        for said, who, after in zip(words, by, [*by[1:], ""], strict=True):
            told.append(f"{said} ({who})" if who and who != after else said)
        return ", ".join(told)

    def has_not_seen(self, splits: str, validation: float = 0.0) -> bool:
        """Whether its weights are known to be trained on none of the test images of data whose splits have this hash,
        nor of those that this fraction of their training split holds out.
        """
        known = self.trained_on
        return known is not None and all(one.splits == splits and one.validation >= validation for one in known)

    @property
    def assumed(self) -> bool:
        """Whether any part of how images are read is nothing but what is usual for the architecture."""
        return any(origin.assumed for origin in self.read_by.values())

    def __repr__(self) -> str:
        parameters = sum(p.numel() for p in self.model.parameters())
        said = f"{self.spec}: {self.n_classes} classes, {parameters:,} parameters"
        return f"{said}; {self.last_cut}" if self.last_cut else said


class Held(NamedTuple):
    """A copy of a network as it was given, and all that was said of it where it was a `Loaded`."""

    model: nn.Module
    preprocess: Preprocess
    loaded: Loaded | None


MEMORY = "memory:"
HELD: dict[str, Held] = {}  # by what follows MEMORY in a spec


def held(spec: str) -> Held:
    """What `hold` was given. Raises UsageError where this process holds nothing under that name."""
    name = spec.removeprefix(MEMORY)
    if name not in HELD:
        raise UsageError(f"{spec} is a network in the memory of another process: give the module again")
    return HELD[name]


def given_loaded(spec: str) -> Loaded | None:
    """The `Loaded` that a spec in memory stands for: it brings its own of everything, as a saved folder does."""
    return held(spec).loaded if spec.startswith(MEMORY) else None


def takes_classes(spec: str) -> bool:
    """Whether the class count of a spec's architecture is an option: not that of a saved folder or an import path."""
    check_name(spec)
    return spec.partition(":")[0] in LIBRARIES


def check_name(spec: object) -> None:
    if not isinstance(spec, str):
        raise UsageError(
            f"model must be a name, got a {type(spec).__name__}: give package.module:callable, a function without "
            "arguments that returns it, so that a saved cut can be built again"
        )
