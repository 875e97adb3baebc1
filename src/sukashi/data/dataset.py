"""A dataset as it was found good: its splits, what its classes are to a network, and what is to be said of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from sukashi.core.errors import DataError, UsageError, nearest
from sukashi.core.objective import Among, Classification
from sukashi.core.types import Preprocess
from sukashi.data.classes import check_classes, outputs_by_name
from sukashi.data.images import GREY, Masks
from sukashi.data.masks import masks_drawn
from sukashi.data.splits import Split

HELD_OUT = 0.2
"""Fraction of each class that becomes the test split where a dataset brings none."""


@dataclass(frozen=True, eq=False)
class Data:
    """A dataset: `train` to choose and to fit on, `test` to measure on, `val` where there is one beside a test split.

    `bad` are the (image, reason) pairs left out, `sha256` is a hash of all images, ids, targets and splits,
    `splits_sha256` the same before some of its classes were chosen, and `ignore_index` the target of pixels without a
    class, None where targets are one class an image. `held_out_by` is the seed that held the test split out, None where
    the data bring one. `preprocess` is there for images that are tensors as a network takes them, whatever its own
    says. `outputs` is the model's number of each class, None where no class_map gave any. `channels` are those that a
    network reads, and `may_be_seen` says that it may have been trained on what was held out.

    Sentences that a report must show are `notes`, how the images were read, and `warnings`, what may make figures mean
    something else: images left out, the same ones on both sides, classes without spread.
    """

    name: str
    class_names: tuple[str, ...]
    train: Split
    test: Split
    val: Split | None
    bad: tuple[tuple[str, str], ...]
    sha256: str
    splits_sha256: str
    held_out_by: int | None
    ignore_index: int | None
    preprocess: Preprocess | None
    outputs: tuple[int, ...] | None
    _masks: Masks | None = field(repr=False)
    _facts: Callable[[Sequence[str]], list[dict[str, Any]]] | None = field(repr=False)
    _converted: tuple[tuple[str, str, int], ...] = field(repr=False)
    _notes: tuple[str, ...] = field(repr=False)
    _warnings: tuple[str, ...] = field(repr=False)
    channels: int = 3
    may_be_seen: bool = False

    @property
    def notes(self) -> tuple[str, ...]:
        """How the images were read: what was converted, what was held out, which classes there are."""
        converted = [
            f"{n} image(s) of {split}: {rule}"
            for split, rule, n in self._converted
            if rule != GREY or self.channels > 1
        ]
        return (*converted, *([] if self.may_be_seen else self._held_out()), *self._notes)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What may make figures mean something else."""
        seen = [
            f"{said}; the weights come from elsewhere, so that these images may have been trained on: accuracy can "
            "flatter"
            for said in (self._held_out() if self.may_be_seen else [])
        ]
        return (*seen, *self._warnings)

    def _held_out(self) -> list[str]:
        if self.held_out_by is None:
            return []
        groups = self.test.groups
        whole = "" if groups is None else f" in whole groups ({len(set(groups))} of them)"
        return [
            f"{self.name} has no test split: {HELD_OUT:.0%} of each class held out by seed {self.held_out_by}{whole}, "
            f"{len(self.test)} image{'s' if len(self.test) != 1 else ''}"
        ]

    def noting(self, *notes: str, warnings: Sequence[str] = ()) -> Data:
        """The same data with more to be said of them, after what there is."""
        return replace(self, _notes=(*self._notes, *notes), _warnings=(*self._warnings, *warnings))

    @property
    def n_classes(self) -> int:
        return len(self.class_names)

    def only(self, class_names: Sequence[str]) -> Data:
        """The images of these classes, numbered in the order given; notes say which.

        Raises UsageError for a class that there is not, one named twice, fewer than two, or data with masks.
        """
        if self.train.has_masks:
            raise UsageError(f"{self.name} has masks, whose pixels are class numbers: `only` is for one class an image")
        for wanted in class_names:
            if wanted not in self.class_names:
                raise UsageError(f"{self.name} has no class {wanted!r}{nearest(wanted, self.class_names)}")
        if len(set(class_names)) != len(class_names) or len(class_names) < 2:
            raise UsageError(f"`only` must name at least two different classes, got {list(class_names)}")
        old = [self.class_names.index(wanted) for wanted in class_names]
        train, test = self.train.only(old), self.test.only(old)
        listed = ", ".join(class_names)
        return replace(
            self.noting(f"{len(old)} of the {self.n_classes} classes of {self.name}: {listed}"),
            class_names=tuple(class_names),
            train=train,
            test=test,
            val=None if self.val is None else self.val.only(old),
            sha256=hashlib.sha256(f"{self.sha256} only {listed}".encode()).hexdigest(),
        )

    def answered_by(self, n_outputs: int, names: Sequence[str] | None, among: Among = "data") -> Data:
        """The data for a network with that many outputs, called `names` where it knows what they mean.

        Where it has more outputs than there are classes, a class is the output that the class_map gave it, or else the
        one of its name, and `among` says what is held against it: the outputs of the data's classes, or all.

        Raises ModelError for other counts, DataError for numbers and names that do not fit.
        """
        if self.outputs is not None and max(self.outputs) >= n_outputs:
            raise DataError(
                f"the `class_map` gives a class number {max(self.outputs)} and the model has {n_outputs} classes: "
                "numbers count from 0 and lie below that"
            )
        outputs = outputs_by_name(names, self.class_names) if self.outputs is None else self.outputs
        if n_outputs <= self.n_classes or outputs is None:
            check_classes(names if self.outputs is None else None, self.class_names, n_outputs)
            return self
        objective = Classification(outputs, among)
        how = "the `class_map`" if self.outputs is not None else "their names"
        rivals = "these" if among == "data" else f"all {n_outputs}"
        told = (
            f"the data have {self.n_classes} of the model's {n_outputs} classes, found by {how}; an answer is the best"
        )
        return replace(
            self.noting(f"{told} of {rivals}"),
            train=replace(self.train, objective=objective),
            test=replace(self.test, objective=objective),
            val=None if self.val is None else replace(self.val, objective=objective),
            sha256=hashlib.sha256(f"{self.sha256} {objective}".encode()).hexdigest(),
        )

    def names_of_outputs(self, known: Sequence[str] | None) -> tuple[str, ...] | None:
        """What a network's outputs are called: as the classes are, or as `known` where it has others too."""
        if self.train.objective.outputs is None:
            return self.class_names
        return None if known is None else tuple(known)

    def read_in(self, channels: int) -> Data:
        """The same data without notes that say nothing to a model which reads so many channels."""
        return replace(self, channels=channels)

    @property
    def has_ground_truth(self) -> bool:
        """Whether there are masks that say where the evidence is."""
        return self._masks is not None

    def ground_truth(self, image_ids: Sequence[str], preprocess: Preprocess) -> dict[str, Tensor]:
        """Where each concept is: bool masks (B, H, W) of these images by concept, as a model reads them.

        Nowhere in an image without a mask. Raises UsageError where there are no masks at all, DataError for masks that
        can't be used.
        """
        if self._masks is None:
            raise UsageError(
                f"{self.name} has no masks that say where the evidence is: put them into a folder masks beside the "
                "class folders, under the images' names, into a column mask or boxes of Parquet, or give `masks=FOLDER`"
            )
        splits = [split for split in (self.train, self.test, self.val) if split is not None]
        sources = {image_id: place for split in splits for image_id, place in split.places()}
        return masks_drawn(self._masks, image_ids, sources, preprocess)

    def facts(self, image_ids: Sequence[str]) -> list[dict[str, Any]]:
        """What each of these images was drawn from (position, colour, texture, ...); UsageError where nobody knows."""
        if self._facts is None:
            raise UsageError(f"{self.name} has no facts about its images: only generated data (shapes) has")
        return self._facts(image_ids)
