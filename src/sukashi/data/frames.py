"""Images to train on, in any order: decoded once into memory where they fit, else decoded ahead by threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sukashi.core import progress
from sukashi.core.types import Preprocess
from sukashi.data.splits import Split

_CHUNK = 256  # images decoded at once while memory is filled


@dataclass(frozen=True, eq=False)
class Frames:
    """A split's images at a model's size, before normalisation: uint8, or float32 in [0, 1] for deeper ones.

    `kept` (N, C, H, W) holds all of them, or is None where they would take more than the `memory` given to `read`.
    """

    split: Split
    preprocess: Preprocess
    workers: int
    kept: Tensor | None = field(repr=False)

    @classmethod
    def read(cls, split: Split, preprocess: Preprocess, memory: int, workers: int) -> Frames:
        """The frames of a split; `memory` in bytes, `workers` threads decode.

        Raises DataError for an image that can no longer be read.
        """
        streamed = cls(split, preprocess, workers, None)
        first = split.pixels(preprocess, [0])
        if len(split) * first.nbytes > memory:
            return streamed
        kept = torch.empty((len(split), *first.shape[1:]), dtype=first.dtype)
        start = 0
        with progress.task(f"reading {split.name}", len(split)) as task:
            for part in streamed.batches(torch.arange(len(split)).split(_CHUNK)):
                if part.dtype != kept.dtype:  # 8 bits were not enough for all
                    if not kept.is_floating_point() and 5 * kept.nbytes > memory:  # both are there for a moment
                        return streamed
                    kept, part = unit(kept), unit(part)
                kept[start : start + len(part)] = part
                start += len(part)
                task.advance(len(part))
        return cls(split, preprocess, workers, kept)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of an image: (C, H, W)."""
        return self.preprocess.channels, self.preprocess.height, self.preprocess.width

    def batches(self, order: Sequence[Tensor]) -> Generator[Tensor, None, None]:
        """The images at each of these sets of positions in turn."""
        if self.kept is not None:
            for rows in order:
                yield self.kept[rows]
            return
        if self.workers == 0:
            for rows in order:
                yield self.split.pixels(self.preprocess, rows)
            return
        # Threads, not processes: Pillow decodes and resizes outside the interpreter lock, and nothing is pickled.
        pool = ThreadPoolExecutor(self.workers)
        ahead: deque[Future[Tensor]] = deque()
        try:
            for rows in order:
                ahead.append(pool.submit(self.split.pixels, self.preprocess, rows))
                if len(ahead) > 2 * self.workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def unit(pixels: Tensor) -> Tensor:
    """float32 in [0, 1], of uint8 in [0, 255] or of what is there already."""
    return pixels if pixels.is_floating_point() else pixels.float().div_(255)
