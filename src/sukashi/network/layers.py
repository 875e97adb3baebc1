"""Layers that know how to lose units: the option-A shortcut and explicit attention with heads of unequal width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention as TimmAttention
from torch import Tensor, nn
from torchvision.models.vision_transformer import EncoderBlock

from sukashi.core.errors import ModelError

# Layers that make units, each by a slice of its weight.
MAKERS = (nn.Linear, nn.modules.conv._ConvNd)


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
        q, k, v = self.split(qkv)
        return self.merge(F.scaled_dot_product_attention(q, k, v, scale=self.scale))

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v (B, heads, T, widest head) of the heads that are left."""
        n_images, n_tokens, width = qkv.shape
        alive = [w for w in self.widths if w]
        widest = max(alive)
        if all(w == widest for w in alive):
            q, k, v = qkv.view(n_images, n_tokens, 3, len(alive), widest).permute(2, 0, 3, 1, 4)
        else:
            parts = qkv.view(n_images, n_tokens, 3, width // 3).split(alive, dim=3)
            padded = torch.stack([F.pad(part, (0, widest - part.shape[3])) for part in parts], dim=3)
            q, k, v = padded.permute(2, 0, 3, 1, 4)
        return q, k, v

    def positions(self, part: Literal["q", "k", "v"], head: int) -> range:
        """Where q, k or v of a head lie on the last axis of what is read; none for a head that was cut."""
        start = "qkv".index(part) * sum(self.widths) + sum(self.widths[:head])
        return range(start, start + self.widths[head])

    def merge(self, out: Tensor) -> Tensor:
        """The heads (B, heads, T, widest head) side by side, without padding: (B, T, D)."""
        alive = [w for w in self.widths if w]
        out = out.transpose(1, 2)
        if all(w == max(alive) for w in alive):
            return out.flatten(2)
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

    Keeps timm's parameter names. Input and output (B, T, C). Raises ModelError where it is called with a mask.
    """

    def __init__(self, qkv: nn.Linear, proj: nn.Linear, n_heads: int, scale: float) -> None:
        super().__init__()
        inner = qkv.out_features // 3
        self.qkv = qkv
        self.core = AttentionCore([inner // n_heads] * n_heads, scale)
        self.proj = proj

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if attn_mask is not None or is_causal:
            raise ModelError("explicit attention was called with a mask: only unmasked self-attention is supported")
        return cast(Tensor, self.proj(self.core(self.qkv(x))))


class PairedAttention(Attention):
    """The same behind nn.MultiheadAttention's call, as torchvision's EncoderBlock makes it: gives (output, None)."""

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False
    ) -> tuple[Tensor, None]:
        if not (query is key is value) or need_weights:
            raise ModelError("explicit attention was called with other keys or for weights: only self-attention works")
        return super().forward(query), None


class _Uncached:
    """What timm's attention with a cache of its biases is mixed with: what is kept in eval mode can't be copied."""

    def get_attention_biases(self, device: torch.device) -> Tensor:
        return cast(Tensor, self.attention_biases[:, self.attention_bias_idxs])  # type: ignore[attr-defined]


class FeatureMap(nn.Module):
    """Features times a matrix (D, M), a change of basis; `axis` is where features lie.

    Attributions take it for a linear map of features that belong together: no rule looks at the signs of single
    products, so that relevance is conserved (Chormai et al. 2024, eq. 8).
    """

    matrix: Tensor

    def __init__(self, matrix: Tensor, axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.register_buffer("matrix", matrix)

    def forward(self, x: Tensor) -> Tensor:
        if self.axis == 1 and x.dim() == 4:
            return F.conv2d(x, self.matrix.T[:, :, None, None])
        return (x.movedim(self.axis, -1) @ self.matrix).movedim(-1, self.axis)


def explicit_attention(model: nn.Module) -> None:
    """Write out, in place, timm's Attention and the MultiheadAttention of torchvision's EncoderBlock as Attention.

    Outputs stay equal and parameters are the same objects. timm's names stay; torchvision's `in_proj_weight` becomes
    `qkv.weight` and `out_proj` becomes `proj`. Other attention is left alone, as are variants that the written-out form
    does not compute (norms of q and k, gates, dropout): there heads can be cut whole, or nothing can, and `sites.find`
    says so. That which caches its biases in eval mode computes them anew.
    """
    written = [
        (parent, name, _written_out(child))
        for parent in model.modules()
        for name, child in parent.named_children()
        if _plain_timm(child) or (_plain_torch(child) and isinstance(parent, EncoderBlock))
    ]
    for parent, name, attention in written:
        setattr(parent, name, attention)
    for module in model.modules():
        if hasattr(module, "attention_bias_cache") and not isinstance(module, _Uncached):
            plain = type(module)
            module.__class__ = type(plain.__name__, (_Uncached, plain), {"__module__": plain.__module__})


def fused_names(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights saved from a model with attention written out, by the names its MultiheadAttention has before that."""
    renamed = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            for kind in ("weight", "bias"):
                renamed[f"{name}.qkv.{kind}"] = f"{name}.in_proj_{kind}"
                renamed[f"{name}.proj.{kind}"] = f"{name}.out_proj.{kind}"
    return {renamed.get(name, name): tensor for name, tensor in tensors.items()}


def _plain_timm(old: nn.Module) -> bool:
    """Whether an attention of timm's is what the written-out form computes."""
    plain = type(old) is TimmAttention and getattr(old, "gate", None) is None
    norms = ("q_norm", "k_norm", "norm")
    return (
        plain
        and all(isinstance(getattr(old, norm, None), nn.Identity | None) for norm in norms)
        and not any(cast(nn.Dropout, drop).p for drop in (old.attn_drop, old.proj_drop))
    )


def _written_out(old: nn.Module) -> Attention:
    if isinstance(old, TimmAttention):
        return Attention(old.qkv, old.proj, old.num_heads, old.scale).train(old.training)
    return _from_torch(cast(nn.MultiheadAttention, old))


def _plain_torch(old: nn.Module) -> bool:
    """Whether an attention of torch's is what the written-out form computes."""
    return (
        isinstance(old, nn.MultiheadAttention)
        and old.in_proj_weight is not None
        and old.bias_k is None
        and not old.add_zero_attn
        and old.batch_first
        and old.dropout == 0
    )


def _from_torch(old: nn.MultiheadAttention) -> Attention:
    qkv = nn.Linear(old.embed_dim, 3 * old.embed_dim, bias=old.in_proj_bias is not None, device="meta")
    qkv.weight = old.in_proj_weight
    if old.in_proj_bias is not None:
        qkv.bias = old.in_proj_bias
    return PairedAttention(qkv, old.out_proj, old.num_heads, old.head_dim**-0.5).train(old.training)
