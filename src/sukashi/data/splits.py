"""Splits, and samples of them that depend on each image's id alone."""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sukashi.core.errors import DataError, UsageError
from sukashi.core.objective import CLASSIFICATION, Objective
from sukashi.core.types import Batch, Preprocess
from sukashi.data.images import Encoded, Source, TooLarge, Unreadable, bad_images, fitted, resized, sized

_CHANGED = "they passed the check at loading, so they changed since or hide their damage: replace them"


def _by_hash(ids: Sequence[str], purpose: str, seed: int) -> list[int]:
    """Positions in a random order that depends on each id alone, never on the other images."""
    return sorted(range(len(ids)), key=lambda i: hashlib.blake2b(f"{purpose}/{seed}/{ids[i]}".encode()).digest())


@dataclass(frozen=True, eq=False)
class Split:
    """Images of one split, or of a subset of one: same order, same ids, same pixels every time.

    `targets` (N,) int64 class numbers; `image_ids` N strings that a subset keeps; `bad` the (image, reason) pairs that
    were skipped when the split was read, `notes` how many of its images needed each conversion rule. `objective` is
    what a network is for that learns these images, `groups` (N,) what each image belongs to (a patient), where that is
    known: no group is on both sides where some of the images are held out.
    """

    name: str
    class_names: tuple[str, ...]
    image_ids: tuple[str, ...]
    bad: tuple[tuple[str, str], ...]
    notes: Mapping[str, int]
    _source: Source = field(repr=False)
    _rows: np.ndarray = field(repr=False)
    _targets: Tensor | None = field(repr=False)
    objective: Objective = field(default=CLASSIFICATION, repr=False)
    groups: tuple[str, ...] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def has_masks(self) -> bool:
        """Whether a target is a map (H, W) of classes rather than one class."""
        return self._targets is None

    @property
    def targets(self) -> Tensor:
        """Class numbers (N,) int64; UsageError where a target is a map (its batches hold them)."""
        if self._targets is None:
            raise UsageError(f"{self.name} has a map of classes an image, not one class: read targets from its batches")
        return self._targets

    @property
    def counts(self) -> Tensor:
        """Images of each class (K,). One alone has no spread: leave such a class out of per-class statistics."""
        return torch.bincount(self.targets, minlength=len(self.class_names))

    def subset(self, rows: Sequence[int] | Tensor | np.ndarray) -> Split:
        """The images at these positions, in this order; or where a mask (N,) is true."""
        at = np.asarray(rows)
        at = np.flatnonzero(at) if at.dtype == bool else at.astype(np.int64)
        return replace(
            self,
            image_ids=tuple(self.image_ids[i] for i in at),
            _rows=self._rows[at],
            groups=None if self.groups is None else tuple(self.groups[i] for i in at),
            _targets=None if self._targets is None else self._targets[torch.from_numpy(at)],
        )

    def only(self, numbers: Sequence[int]) -> Split:
        """The images of these classes, which are then classes 0, 1, ... in this order."""
        new = torch.full((len(self.class_names),), -1)
        new[torch.tensor(numbers)] = torch.arange(len(numbers))
        kept = self.subset(new[self.targets] >= 0)
        return replace(kept, class_names=tuple(self.class_names[k] for k in numbers), _targets=new[kept.targets])

    def calibration(self, n_per_class: int, seed: int) -> Split:
        """`n_per_class` images of every class, drawn by seed; a smaller sample is part of a larger one.

        Raises UsageError for a split with masks, DataError where a class has too few images.
        """
        self._check_calibration(n_per_class)
        rank = self.rank_in_class("calibration", seed)
        return self.subset(np.flatnonzero(rank < n_per_class))

    def highest(self, values: Tensor, n_per_class: int) -> Split:
        """The `n_per_class` images of every class with the highest of `values` (N,); equal ones by id.

        Raises as `calibration` does.
        """
        self._check_calibration(n_per_class)
        value, target = values.tolist(), self.targets.tolist()
        order = sorted(range(len(self)), key=lambda i: (target[i], -value[i], self.image_ids[i]))
        starts = np.concatenate([[0], self.counts.cumsum(0).numpy()[:-1]])
        return self.subset(sorted(order[start + i] for start in starts for i in range(n_per_class)))

    def central(self, features: Tensor, n_per_class: int, seed: int) -> Split:
        """`n_per_class` images of every class that stand for it: k-means of its `features` (N, D), k = n_per_class.

        Each centre in turn takes the image nearest to it (Euclidean) that no other has taken. The start is drawn by
        seed (k-means++); images are met in an order by the hash of their ids, so theirs in the split plays no part.

        Raises as `calibration` does.
        """
        from sklearn.cluster import KMeans  # a second of import that no other sample needs

        self._check_calibration(n_per_class)
        rank, target = self.rank_in_class("clustering", seed), self.targets.numpy()
        points = features.double().numpy()
        chosen: list[int] = []
        for number in range(len(self.class_names)):
            rows = np.flatnonzero(target == number)
            rows = rows[np.argsort(rank[rows])]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # fewer distinct images than centres: some centres coincide
                centres = KMeans(n_per_class, n_init=1, random_state=seed).fit(points[rows]).cluster_centers_
            for centre in centres:
                distance = np.square(points[rows] - centre).sum(axis=1)
                nearest = int(distance.argmin())
                chosen.append(int(rows[nearest]))
                rows = np.delete(rows, nearest)
        return self.subset(sorted(chosen))

    def _check_calibration(self, n_per_class: int) -> None:
        if n_per_class < 1:
            raise UsageError(f"n_per_class must be at least 1, got {n_per_class}: it is the number of images a class")
        if self._targets is None:
            raise UsageError(f"{self.name} has masks, so no sample can be balanced by class: use limit(n)")
        fewest = int(self.counts.min())
        for number, count in enumerate(self.counts.tolist()):
            if count < n_per_class:
                raise DataError(
                    f"class {self.class_names[number]!r} has {count} image{'s' * (count != 1)} in {self.name}, "
                    f"a calibration set needs {n_per_class} of every class: give `calibration={fewest}` or add images"
                )

    def limit(self, n: int, seed: int = 0) -> Split:
        """At most `n` images, as evenly over the classes as they allow; a smaller one is part of a larger one."""
        fewest = 1 if self._targets is None else len(self.class_names)
        if n < fewest:
            raise UsageError(f"limit must be at least {fewest}, got {n}: every class needs an image")
        if n >= len(self):
            return self
        rank = self.rank_in_class("limit", seed)
        place = {row: i for i, row in enumerate(_by_hash(self.image_ids, "limit", seed))}
        first = sorted(range(len(self)), key=lambda i: (rank[i], place[i]))[:n]
        return self.subset(sorted(first))

    def rank_in_class(self, purpose: str, seed: int) -> np.ndarray:
        """Place (N,) of each image in a random order of its class; with masks, all are one class."""
        rank = np.empty(len(self), dtype=np.int64)
        seen: Counter[int] = Counter()
        target = [0] * len(self) if self._targets is None else self._targets.tolist()
        for row in _by_hash(self.image_ids, purpose, seed):
            rank[row] = seen[target[row]]
            seen[target[row]] += 1
        return rank

    def places(self) -> Iterator[tuple[str, tuple[Source, int]]]:
        """Each image's id, and where it is read: a source and a row of it."""
        for image_id, row in zip(self.image_ids, self._rows.tolist(), strict=True):
            yield image_id, (self._source, row)

    def batches(self, preprocess: Preprocess, batch_size: int, workers: int = 0) -> Batches:
        """Batches in the split's order, to be iterated as often as wanted; `workers` threads decode ahead."""
        return Batches(self, preprocess, batch_size, workers)

    def whole(self, preprocess: Preprocess, workers: int = 0) -> Batch:
        """Every image in one batch."""
        x = torch.empty(len(self), preprocess.channels, preprocess.height, preprocess.width)
        targets = []
        start = 0
        for batch in self.batches(preprocess, 256, workers):
            x[start : start + len(batch)] = batch.x
            targets.append(batch.target)
            start += len(batch)
        return Batch(x, torch.cat(targets), self.image_ids, self.objective)

    def validation(self, fraction: float) -> tuple[Split, Split]:
        """The split without, and of, the `fraction` of each class that is held out to choose on.

        A smaller fraction is part of a larger one: whoever trains again, from what an earlier training left, holds out
        images it has never seen. Raises DataError where whole groups leave no image of a class.
        """
        return self.parted(fraction, "validation", 0)

    def parted(self, fraction: float, purpose: str, seed: int, least: int = 0) -> tuple[Split, Split]:
        """The images without, and of, the `fraction` of each class (`least` at least) that come first by a hash.

        It is the hash of an image's id, or where images have groups that of the group, which goes whole: the first one
        of a class, and those of which half would still be within the fraction. A group of several classes goes where
        one of them takes it. Raises DataError where a class has no other images.
        """
        target = np.zeros(len(self), dtype=np.int64) if self._targets is None else self._targets.numpy()
        counts = torch.bincount(torch.from_numpy(target))
        n_out = (fraction * counts + 0.5).floor().clamp(min=least).numpy()
        if self.groups is None:
            out = self.rank_in_class(purpose, seed) < n_out[target]
            return self.subset(~out), self.subset(out)
        names = sorted(set(self.groups))
        place = {names[i]: at for at, i in enumerate(_by_hash(names, purpose, seed))}
        group = np.array([place[name] for name in self.groups], dtype=np.int64)
        (of_class, which), sizes = np.unique(np.stack([target, group]), axis=1, return_counts=True)
        start = np.cumsum(sizes) - sizes - (np.cumsum(counts.numpy()) - counts.numpy())[of_class]
        taken = (n_out[of_class] > 0) & ((start == 0) | (start + sizes / 2 < n_out[of_class]))
        out = np.isin(group, which[taken])
        for number in np.flatnonzero(np.bincount(target[~out], minlength=len(counts)) == 0):
            n_groups = int((of_class == number).sum())
            raise DataError(
                f"the images of class {self.class_names[number]!r} in {self.name} are of {n_groups} "
                f"group{'s' if n_groups > 1 else ''}, and holding whole groups out leaves none of them: add images of "
                "other groups, or bring a split of your own"
            )
        return self.subset(~out), self.subset(out)

    def pixels(self, preprocess: Preprocess, rows: Sequence[int] | Tensor | np.ndarray) -> Tensor:
        """The images (B, C, H, W) at these positions before normalisation: uint8, or float32 in [0, 1] where any of
        them is deeper than 8 bits.

        Raises DataError for an image that can no longer be read.
        """
        found, bad = [], []
        for row in self._rows[np.asarray(rows)].tolist():
            try:
                found.append(sized(self._source.image(row), preprocess))
            except (Unreadable, TooLarge) as error:
                bad.append((self._source.name(row), str(error)))
        if bad:
            raise bad_images(self.name, bad, _CHANGED)
        if any(image.dtype == np.float32 for image in found):
            found = [image / np.float32(255) if image.dtype == np.uint8 else image for image in found]
        return torch.from_numpy(np.stack(found))

    def shown(self, preprocess: Preprocess, rows: Sequence[int] | Tensor | np.ndarray) -> np.ndarray:
        """The same as people see them, (B, H, W, C) uint8."""
        found = self.pixels(preprocess, rows)
        found = found if found.dtype == torch.uint8 else (found * 255).round().byte()
        return found.permute(0, 2, 3, 1).numpy()

    def _batch(self, preprocess: Preprocess, start: int, stop: int) -> Batch:
        rows = self._rows[start:stop].tolist()
        x = np.empty((len(rows), preprocess.channels, preprocess.height, preprocess.width), dtype=np.float32)
        masks = np.empty((len(rows), preprocess.height, preprocess.width), dtype=np.int64)
        bad = []
        for i, row in enumerate(rows):
            try:
                x[i] = fitted(self._source.image(row), preprocess)
                if self._targets is None:
                    assert isinstance(self._source, Encoded)
                    masks[i] = np.asarray(resized(self._source.mask(row), preprocess, Image.Resampling.NEAREST))
            except (Unreadable, TooLarge) as error:
                bad.append((self._source.name(row), str(error)))
        if bad:
            raise bad_images(self.name, bad, _CHANGED)
        shape = (1, preprocess.channels, 1, 1)
        mean, std = torch.tensor(preprocess.mean).view(shape), torch.tensor(preprocess.std).view(shape)
        target = torch.from_numpy(masks) if self._targets is None else self._targets[start:stop].clone()
        return Batch((torch.from_numpy(x) - mean) / std, target, self.image_ids[start:stop], self.objective)


@dataclass(frozen=True, eq=False)
class Batches:
    """Batches of a split, the same ones each time they are iterated and for any number of workers."""

    split: Split
    preprocess: Preprocess
    batch_size: int
    workers: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UsageError(f"`batch_size` must be at least 1, got {self.batch_size}")
        if self.workers < 0:
            raise UsageError(f"`workers` must be at least 0, got {self.workers}: 0 decodes without threads")
        if self.preprocess.channels not in (1, 3):
            raise UsageError(
                f"images have 1 or 3 channels, the model wants {self.preprocess.channels}: pick another model"
            )

    def __len__(self) -> int:
        return -(-len(self.split) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        spans = [(i, min(i + self.batch_size, len(self.split))) for i in range(0, len(self.split), self.batch_size)]
        if self.workers == 0:
            for start, stop in spans:
                yield self.split._batch(self.preprocess, start, stop)
            return
        # Threads, not processes: Pillow decodes and resizes outside the interpreter lock, and nothing is pickled.
        pool = ThreadPoolExecutor(self.workers)
        ahead: deque[Future[Batch]] = deque()
        try:
            for start, stop in spans:
                ahead.append(pool.submit(self.split._batch, self.preprocess, start, stop))
                if len(ahead) > self.workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
