"""What a linear layer or a convolution reads and writes, as rows of numbers: a convolution is linear in its windows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.padding import pad_same
from torch import Tensor, nn

from sukashi.network.canonical import performs

_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv2dSame)


def is_refittable(layer: nn.Module) -> bool:
    """Whether each number a layer writes is linear in a window of all that it reads, by weights that are its own: not
    in groups, nor transposed, nor a layer that computes its weights or does more than its kind.
    """
    plain = any(performs(layer, cls) for cls in _PLAIN) and layer._parameters.get("weight") is not None
    return plain and getattr(layer, "groups", 1) == 1


def places(layer: nn.Module, y: Tensor, at_most: int, generator: np.random.Generator) -> Tensor:
    """(B, P) positions of what a layer writes, y: at most so many of each image, drawn anew for each.

    What is drawn for an image depends on those before it and not on how they come in batches.
    """
    n = math.prod(y.shape[1:-1] if isinstance(layer, nn.Linear) else y.shape[2:])
    if n <= at_most:
        return torch.arange(n).expand(len(y), n)
    drawn = np.argsort(generator.random((len(y), n)), axis=1)[:, :at_most]
    return torch.from_numpy(np.sort(drawn, axis=1))


def written(layer: nn.Module, y: Tensor, at: Tensor) -> Tensor:
    """(B P, out) what a layer writes at positions `at` (B, P) of each image."""
    rows = y.reshape(len(y), -1, y.shape[-1]) if isinstance(layer, nn.Linear) else y.flatten(2).transpose(1, 2)
    return rows.gather(1, at.to(y.device)[:, :, None].expand(-1, -1, rows.shape[2])).flatten(0, 1)


def windows(layer: nn.Module, x: Tensor, at: Tensor) -> Tensor:
    """(B P, N) what a layer reads to write its positions `at` (B, P), in the order of its weight (out, N...)."""
    if isinstance(layer, nn.Linear):
        return written(layer, x, at)
    assert isinstance(layer, nn.modules.conv._ConvNd)
    assert is_refittable(layer)
    n_dims = len(layer.kernel_size)
    if isinstance(layer, Conv2dSame):
        x = pad_same(x, list(layer.kernel_size), list(layer.stride), list(layer.dilation))
    elif any(layer._reversed_padding_repeated_twice):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    sizes = x.shape[2:]
    spans = [d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    n_out = [(size - span) // s + 1 for size, span, s in zip(sizes, spans, layer.stride, strict=True)]
    steps = [math.prod(sizes[i + 1 :]) for i in range(n_dims)]
    start = torch.zeros_like(at)
    for index, s, step in zip(torch.unravel_index(at, n_out), layer.stride, steps, strict=True):
        start = start + index * s * step
    offsets = _offsets(layer.kernel_size, layer.dilation, steps)
    index = (start[:, :, None] + offsets).flatten(1).to(x.device)
    met = x.flatten(2).gather(2, index[:, None].expand(-1, x.shape[1], -1))
    return met.view(len(x), -1, at.shape[1], len(offsets)).transpose(1, 2).reshape(at.numel(), -1)


def _offsets(kernel: Sequence[int], dilation: Sequence[int], steps: Sequence[int]) -> Tensor:
    """(kh kw,) how far from the first number of a window each of its numbers lies."""
    found = torch.zeros((), dtype=torch.long)
    for k, d, step in zip(kernel, dilation, steps, strict=True):
        found = found[..., None] + torch.arange(k) * d * step
    return found.flatten()
