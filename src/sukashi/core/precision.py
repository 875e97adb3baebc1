"""Float32 that is float32: what is decided on a GPU is what a CPU decides, but for the order of sums."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def without_tf32() -> Iterator[None]:
    """Inside, CUDA multiplies float32 in full: TF32, which torch allows in convolutions, keeps 10 bits of a number."""
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn


@contextmanager
def exact() -> Iterator[None]:
    """The same without gradients: TF32 changes decisions."""
    with without_tf32(), torch.no_grad():
        yield
