"""Layers that know how to lose units: the option-A shortcut and explicit attention with heads of unequal width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PadShortcut(nn.Module):
    """Option-A shortcut (He et al. 2016, sec. 4.2): subsample, then place the input channels among zero channels.

    Output channel o reads input channel `source[o]`, or zero where `source[o]` is -1. Cutting input or output channels
    is an edit of `source`, which is rebuilt from the recipe and is therefore not part of the weights.
    """

    source: Tensor

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        before = (out_channels - in_channels) // 2
        source = torch.full((out_channels,), -1, dtype=torch.long)
        source[before : before + in_channels] = torch.arange(in_channels)
        self.stride = stride
        self.in_channels = in_channels
        self.register_buffer("source", source, persistent=False)

    @property
    def out_channels(self) -> int:
        return len(self.source)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        zero = torch.zeros_like(x[:, :1])
        return torch.cat([x, zero], 1).index_select(1, torch.where(self.source < 0, x.shape[1], self.source))

    def cut_inputs(self, keep: Tensor) -> None:
        """Drop input channels; an output channel that read one of them reads zero from now on."""
        renumber = torch.full((self.in_channels,), -1, dtype=torch.long, device=self.source.device)
        renumber[keep] = torch.arange(len(keep), device=self.source.device)
        self.source = torch.where(self.source < 0, self.source, renumber[self.source])
        self.in_channels = len(keep)

    def cut_outputs(self, keep: Tensor) -> None:
        self.source = self.source[keep]


class AttentionCore(nn.Module):
    """softmax(scale q k') v for heads of unequal width; input (B, T, 3D) holds q, k, v side by side, output (B, T, D).

    `widths` counts the inner dimensions each head still has; their sum is D. Heads are padded with zeros to the widest
    one, which changes neither q.k nor the kept columns of the output, and keep the original `scale`: the fused kernel
    would otherwise rescale by the new width.
    """

    def __init__(self, widths: Sequence[int], scale: float) -> None:
        super().__init__()
        self.widths = tuple(widths)
        self.scale = scale

    def forward(self, qkv: Tensor) -> Tensor:
        n_images, n_tokens, width = qkv.shape
        alive = [w for w in self.widths if w]
        widest = max(alive)
        if all(w == widest for w in alive):
            q, k, v = qkv.view(n_images, n_tokens, 3, len(alive), widest).permute(2, 0, 3, 1, 4)
        else:
            parts = qkv.view(n_images, n_tokens, 3, width // 3).split(alive, dim=3)
            padded = torch.stack([F.pad(part, (0, widest - part.shape[3])) for part in parts], dim=3)
            q, k, v = padded.permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, scale=self.scale).transpose(1, 2)
        if all(w == widest for w in alive):
            return out.reshape(n_images, n_tokens, width // 3)
        return torch.cat([out[:, :, head, :w] for head, w in enumerate(alive)], dim=2)

    def cut_inputs(self, keep: Tensor) -> None:
        """`keep` are positions on the 3D axis, the same inner dimensions of q, k and v."""
        inner = sum(self.widths)
        kept = keep[keep < inner]
        bounds = torch.tensor((0, *self.widths)).cumsum(0)
        heads = torch.bucketize(kept.cpu(), bounds[1:], right=True)
        self.widths = tuple(torch.bincount(heads, minlength=len(self.widths)).tolist())


class Attention(nn.Module):
    """Multi-head self-attention written out as qkv -> core -> proj, so that inner dimensions can be masked and cut.

    Keeps timm's parameter names. Input and output (B, T, C).
    """

    def __init__(self, qkv: nn.Linear, proj: nn.Linear, n_heads: int, scale: float) -> None:
        super().__init__()
        inner = qkv.out_features // 3
        self.qkv = qkv
        self.core = AttentionCore([inner // n_heads] * n_heads, scale)
        self.proj = proj

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.proj(self.core(self.qkv(x))))
