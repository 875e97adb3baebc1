"""Transformer attribution: attention's relevance times its gradient, rolled out over the layers into a map."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sukashi.attributions import attributions
from sukashi.attributions.gradient import check, check_pixels, in_parts
from sukashi.attributions.rules import (
    AVERAGES,
    MOVES,
    STRAIGHT,
    THROUGH_ZERO,
    Rule,
    carry,
    passed,
    plain,
    ruled,
    stable,
)
from sukashi.core.errors import ModelError
from sukashi.core.objective import CLASSIFICATION, Objective
from sukashi.core.registry import BatchSize
from sukashi.core.types import Site
from sukashi.network.canonical import canonical, share
from sukashi.network.functions import Add, Quotient, Scale
from sukashi.network.layers import AttentionCore
from sukashi.network.tokens import cores_of, tokens_of

# As in the authors' code; the published eq. 14 has an epsilon without a value.
_EPSILON = 1e-9
_SCALE_EPSILON = 1e-6


@attributions.register(
    "chefer",
    source="Chefer, Gur and Wolf 2021 (CVPR), sec. 3; IMPACT, eq. 14 (layer_scale=paper)",
    signed=False,
    kinds=("pixel",),
    needs=("attention",),
)
def chefer(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    sites: Sequence[Site],
    objective: Objective = CLASSIFICATION,
    *,
    layer_scale: Literal["identity", "paper"] = "identity",
    batch_size: BatchSize = 8,
) -> dict[Site, Tensor]:
    """Share of each patch in what the tokens that are read drew from attention, for the target's logit; input only.

    With A_l the attention weights of layer l, dA_l the slope of the target's logit and R_l the relevance at them,

        B_l = mean over heads of (dA_l * R_l)^+,    C = (I + B_L) ... (I + B_1) - I,

    and the map is the row of C of the class token, at the patches' columns. Rows are not normalised, and the identity
    we take off is nothing in those columns. A network that averages tokens has no such row: we take the mean of the
    rows of all tokens that the logit depends on after the last block (of a distilled DeiT two), where without taking it
    off the identity would be a constant on all patches. The mean over heads counts heads that were cut, which have no
    relevance.

    R starts as 1 at the target's logit. Linear layers hand on R_i = sum_j (x_i w_ij)^+ / (sum_i (x_i w_ij)^+) R_j,
    without biases; a sum shares by a / (a + b), and each branch is then scaled to its part |sum R_a| / (|sum R_a| +
    |sum R_b|) of the image's total; a product of matrices shares by each term a_ik b_kj / z_ij, half to each factor;
    means share by what they add; LayerNorm, activations and softmax pass R on. Denominators move from zero by 1e-9.
    So the total stays 1 at every layer, but for what a linear output holds that no input speaks for. That is so for
    LayerScale y = gamma x with `identity`, R_x = R_y; `paper` is IMPACT's R_x = R_y / (gamma + 1e-6), which does not
    conserve relevance and can turn its sign.

    The authors smooth the patches' values between pixels; we spread each evenly over the pixels and channels of its
    patch, so that a map sums to what its patches do. All is computed in float64, whatever the model is in: shares of
    sums that nearly cancel leave float32 maps off by a tenth and more. `batch_size` bounds the images in each pass.

    Raises UsageError for another site than the input, ModelError for a network without attention, or whose tokens are
    not the patches of one convolution row by row behind any class tokens, through attention layer by layer, or with an
    operation that has no rule; DataError for a target that is no class number an image.
    """
    check_pixels("chefer", sites)
    check(model, x, target, objective)
    form = canonical(model, x).double()
    try:
        tokens = tokens_of(form, x[:1].double())
    except ModelError as error:
        raise ModelError(
            f"chefer rolls attention out from layer to layer, to patches: {error}: use lrp or another attribution"
        ) from None
    kept: list[Tensor] = []
    twin = share(form)
    ruled(twin, _rules(kept, layer_scale), "chefer")
    for core in cores_of(form):
        core.forward = partial(_attended, kept, core)  # type: ignore[method-assign]
    last = form.get_submodule(tokens.last)
    last.forward = partial(_kept, kept, last)

    def explain(rows: slice) -> dict[Site, Tensor]:
        part = x[rows].double()
        *slopes, after = _carried(form, part, target[rows], objective, kept)
        relevance = _carried(twin, part, target[rows], objective, kept)
        read = (after != 0).any(2).double()
        row = start = (read / read.sum(1, keepdim=True).clamp(min=1))[:, None]
        for core, slope, share_of in zip(cores_of(form)[::-1], slopes[::-1], relevance[::-1], strict=True):
            row = row + row @ ((slope * share_of).clamp(min=0).sum(1) / len(core.widths))
        found = tokens.spread((row - start)[:, 0, tokens.n_before :].to(x), x.shape)
        return dict.fromkeys(sites, found)

    return in_parts(explain, len(x), batch_size)


def _carried(
    form: fx.GraphModule, x: Tensor, target: Tensor, objective: Objective, kept: list[Tensor]
) -> tuple[Tensor, ...]:
    """What one backward pass from 1 at the target's logit carries to the tensors that the forward pass kept."""
    kept.clear()
    with torch.enable_grad():
        found = torch.autograd.grad(objective.explained(form(x.detach()), target).sum(), kept, materialize_grads=True)
    kept.clear()
    return found


# Passes: the attention weights are kept, and with them a gradient, or relevance where rules are set.


def _kept(kept: list[Tensor], module: nn.Module, *inputs: Tensor) -> Tensor:
    return _keep(kept, plain(module, *inputs))


def _keep(kept: list[Tensor], value: Tensor) -> Tensor:
    # In the first layer nothing requires a gradient yet: a pass need not go further back.
    kept.append(value if value.requires_grad else value.requires_grad_())
    return value


def _attended(kept: list[Tensor], module: AttentionCore, qkv: Tensor) -> Tensor:
    q, k, v = module.split(qkv)
    return module.merge(_keep(kept, (q @ k.mT * module.scale).softmax(-1)) @ v)


def _rules(kept: list[Tensor], layer_scale: str) -> dict[type[nn.Module], Rule]:
    """Rules by which a gradient carries relevance itself."""
    return {
        **MOVES,
        **dict.fromkeys((nn.LayerNorm, Quotient, *STRAIGHT, *THROUGH_ZERO), passed),
        # Relevance is not followed to what makes the patches.
        nn.Conv2d: None,
        nn.Linear: _positive,
        **dict.fromkeys(AVERAGES, _average),
        Add: _sum,
        Scale: passed if layer_scale == "identity" else _scaled,
        AttentionCore: partial(_attention, kept),
    }


def _inverse(z: Tensor) -> Tensor:
    """1 / z; 0 where nothing was added up."""
    return torch.where(z == 0, 0, 1 / stable(z, _EPSILON))


class _Positive(torch.autograd.Function):
    """A linear layer: relevance by the positive contributions, which are counted again on the way back, not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        x, weight = ctx.saved_tensors
        above, up, below, down = x.clamp(min=0), weight.clamp(min=0), x.clamp(max=0), weight.clamp(max=0)
        per_unit = gradients[0] * _inverse(F.linear(above, up) + F.linear(below, down))
        return above * (per_unit @ up) + below * (per_unit @ down), None, None


def _positive(module: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(module, nn.Linear)
    return cast(Tensor, _Positive.apply(x, module.weight, module.bias))


def _average(module: nn.Module, x: Tensor) -> Tensor:
    mean = plain(module, carry(x, x, x))
    return carry(mean, mean, _inverse(mean))


def _scaled(module: nn.Module, x: Tensor, factor: Tensor | float) -> Tensor:
    if not isinstance(factor, Tensor):  # a number that is written down is no LayerScale
        return passed(module, x, factor)
    return carry(x, plain(module, x, factor), (1 / (factor + _SCALE_EPSILON)).expand_as(x))


def _attention(kept: list[Tensor], module: nn.Module, qkv: Tensor) -> Tensor:
    assert isinstance(module, AttentionCore)
    q, k, v = module.split(qkv)
    scores = _product(q, k.mT)
    attention = (scores * module.scale).softmax(-1)
    passing = carry(scores, attention, scores.new_ones(()).expand_as(scores))
    return module.merge(_product(_keep(kept, passing), v))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """A matrix product whose terms share relevance by their size, and whose factors then get half each."""
    z = carry(a, a, a) @ carry(b, b, b)
    return carry(z, z, _inverse(z) / 2)


class _Sum(torch.autograd.Function):
    """a + b: relevance by the share of each entry, then of each branch; the total of an image (a row) is kept."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return a + b

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (relevance,) = gradients
        a, b = ctx.saved_tensors
        per_unit = relevance * _inverse(a + b)
        parts = a * per_unit, b * per_unit
        axes = tuple(range(1, a.dim()))
        sums = [part.sum(axes, keepdim=True) for part in parts]
        size = sums[0].abs() + sums[1].abs()
        # |sum_a| / size of the total, over sum_a, is its sign over size.
        scale = relevance.sum(axes, keepdim=True) * torch.where(size == 0, 0, 1 / size)
        return parts[0] * sums[0].sign() * scale, parts[1] * sums[1].sign() * scale


def _sum(module: nn.Module, a: Tensor, b: Tensor | float) -> Tensor:
    return cast(Tensor, _Sum.apply(*torch.broadcast_tensors(a, torch.as_tensor(b).to(a))))
