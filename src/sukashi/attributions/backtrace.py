"""DL-Backtrace: a logit's value traced back along the size of contributions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sukashi.attributions import attributions
from sukashi.attributions.gradient import check, in_parts
from sukashi.attributions.rules import (
    ACTIVATIONS,
    AVERAGES,
    CONVOLUTIONS,
    MOVES,
    Rule,
    carried,
    carry,
    parameters,
    passed,
    plain,
    replaced,
    ruled,
    weighted,
)
from sukashi.core.errors import ModelError
from sukashi.core.objective import CLASSIFICATION, Objective
from sukashi.core.registry import BatchSize
from sukashi.core.types import Site
from sukashi.network import hooks
from sukashi.network.canonical import Affine, canonical
from sukashi.network.functions import Add, Mul, Quotient, Resize, Scale


@attributions.register(
    "backtrace",
    source="Sankarapu et al. 2025 (DL-Backtrace), default; contrastive by the authors' code for linear layers",
    refuses=("attention",),
)
def backtrace(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    sites: Sequence[Site],
    objective: Objective = CLASSIFICATION,
    *,
    mode: Literal["default", "contrastive"] = "default",
    batch_size: BatchSize = 64,
) -> dict[Site, Tensor]:
    """Relevance of each position of a unit, shared out by the size of contributions, whatever their sign.

    `default`: the seed is the value of the target's logit. A layer z_j = sum_i x_i w_ij + b_j hands on
    R_i = sum_j R_j |x_i w_ij| / (sum_i |x_i w_ij| + |b_j|): relevance keeps the seed's sign, the bias's share is lost.
    Sums and averages share in proportion to |a|, constants' shares are lost too, a max-pool shares equally among its
    maxima, a product in halves; activations and factors pass relevance on, what moves values takes it back.

    `contrastive`: two streams, what speaks for the target and what for the others. The first starts with the target's
    logit, the second with all other logits, each with its sign. At a sum z_j of contributions c_ij and a bias, where
    all c_ij have one sign, both streams share in proportion to them. Else one stream shares among the positive ones,
    R_i = R_j c_ij^+ / sum_i c_ij^+, and the other among the negative ones: the larger (of numbers with signs) goes to
    the positive ones where z_j > 0 and the smaller where z_j < 0, of equal ones the second stream does, and where
    z_j = 0 both are lost. The bias decides through z_j alone. So do layers, sums and averages; a max-pool and a product
    share each stream as in default mode. The values are the first stream less the second.

    That is the authors' code for linear layers (`contrast.py` of Lexsi-Labs/DLBacktrace). Where the code differs
    from itself we stay with it: its convolutions lose one stream where all contributions have one sign and both where
    the streams are equal, and its 2d average pool gives the second stream the first one's values.

    A gradient carries relevance itself. `batch_size` bounds the images in the one pass that serves all sites.

    Raises ModelError for a model without canonical form or with an operation that has no rule; attention and LayerNorm
    among them, for which the paper's rules do not determine shares. DataError for a target that is no class number an
    image.
    """
    check(model, x, target, objective)
    form = canonical(model, x, sites)
    contrastive = mode == "contrastive"
    rules = {**_RULES, **(_CONTRASTIVE if contrastive else {})}
    ruled(form, rules, "backtrace")

    def seed(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        if not contrastive:
            value = objective.explained(logits, target)
            return value, value.detach()
        objective.check(logits[: len(target)], target)
        answers = objective.answers(logits)
        values = answers.detach()[: len(target)]
        own = F.one_hot(objective.place(target), values.shape[1]).bool()
        return answers, torch.cat([values.where(own, 0), values.where(~own, 0)])

    def explain(rows: slice) -> dict[Site, Tensor]:
        given = torch.cat([x[rows], x[rows]]) if contrastive else x[rows]
        _, relevance = carried(form, given, sites, lambda logits: seed(logits, target[rows]))
        found = {site: hooks.gather(site, tensors) for site, tensors in relevance.items()}
        if contrastive:
            found = {site: torch.sub(*both.chunk(2)) for site, both in found.items()}
        return found

    return in_parts(explain, len(x), batch_size)


def _inverse(total: Tensor) -> Tensor:
    """1 / total; 0 where nothing contributed."""
    return torch.where(total == 0, 0, 1 / torch.where(total == 0, 1, total))


def _sized(x: Tensor | float) -> Tensor | float:
    """|x|, and relevance that is multiplied by it on the way back."""
    if not isinstance(x, Tensor):
        return abs(x)
    size = x.abs() if (x < 0).any() else x
    return carry(x, size, size)


def _shared(module: nn.Module, *inputs: Tensor | float) -> Tensor:
    """Sums with weights that are not negative."""
    total = plain(module, *map(_sized, inputs))
    return carry(total, plain(module, *inputs), _inverse(total))


def _resized(module: nn.Module, x: Tensor, *size: Any) -> Tensor:
    assert isinstance(module, nn.Upsample | Resize)
    if module.mode == "bicubic":
        raise ModelError("backtrace has no rule for bicubic interpolation, whose weights have both signs: use bilinear")
    total = plain(module, cast(Tensor, _sized(x)), *size)
    return carry(total, plain(module, x, *size), _inverse(total))


def _shared_layer(module: nn.Module, x: Tensor) -> Tensor:
    weight, bias = parameters(module)
    total = weighted(module, cast(Tensor, _sized(x)), weight.abs())
    if bias is None:
        return carry(total, plain(module, x), _inverse(total))
    shift = bias.view(-1, *[1] * (total.dim() - 2)) if isinstance(module, CONVOLUTIONS) else bias
    return carry(total, plain(module, x), _inverse(total + shift.abs()))


def _product(module: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    half = (a + b) / 2
    return carry(half, a * b, half.new_ones(()).expand_as(half))


def _max_pool(module: nn.Module, x: Tensor) -> Tensor:
    """Equal shares among the maxima of a window."""
    assert isinstance(module, nn.MaxPool2d)
    if module.ceil_mode:
        raise ModelError(
            "backtrace has no rule for a max-pool with ceil_mode=True, whose last windows are cut off: use an "
            "attribution made of gradients, such as gradient_x_activation"
        )
    y = plain(module, x)
    window = (module.kernel_size, module.dilation, 0, module.stride)
    down, right = module.padding if isinstance(module.padding, tuple) else (module.padding, module.padding)
    border = (right, right, down, down)
    patches = F.unfold(F.pad(x.detach(), border, value=-torch.inf), *window).unflatten(1, (x.shape[1], -1))
    maxima = (patches == y.flatten(2)[:, :, None]).to(x)
    shares = maxima / maxima.sum(2, keepdim=True)
    spread = F.unfold(F.pad(x, border), *window).unflatten(1, (x.shape[1], -1))
    # What pads may be -Inf, which no share may be taken of.
    return replaced((spread.where(shares > 0, 0) * shares).sum(2).view_as(y), y)


class _Part(torch.autograd.Function):
    """The contrastive rule: which of both totals, of positive or of negative contributions, each stream goes back to.

    Rows come twice: the first half carries the stream for the target, the second the one for the others.
    """

    @staticmethod
    def forward(ctx: Any, positive: Tensor, negative: Tensor, z: Tensor) -> Tensor:
        ctx.save_for_backward(positive, negative, z)
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        positive, negative, z = ctx.saved_tensors
        stream, other = gradients[0].chunk(2)
        half = z.chunk(2)[0]
        first = torch.where(half > 0, stream > other, stream < other)
        up = torch.cat([first, ~first])
        # A fast convolution leaves rounding where there is nothing to add.
        least = torch.finfo(z.dtype).eps
        alike = (negative <= least * positive) | (positive <= least * negative)
        above = (up & (z != 0)) | alike
        below = (~up & (z != 0)) | alike
        return (
            gradients[0].where(above & (positive > least * negative), 0) * _inverse(positive),
            gradients[0].where(below & (negative > least * positive), 0) * _inverse(negative),
            None,
        )


def _signs(x: Tensor | float) -> tuple[Any, Any]:
    """The positive part of x and the size of the negative one; relevance is multiplied by them on the way back."""
    if not isinstance(x, Tensor):
        return max(x, 0), max(-x, 0)
    above, below = x.detach().clamp(min=0), -x.detach().clamp(max=0)
    return carry(x, above, above), carry(x, below, below)


def _parted_layer(module: nn.Module, x: Tensor) -> Tensor:
    weight, _ = parameters(module)
    (above, below), up, down = _signs(x), weight.clamp(min=0), -weight.clamp(max=0)
    positive = weighted(module, above, up) + weighted(module, below, down)
    negative = weighted(module, above, down) + weighted(module, below, up)
    return cast(Tensor, _Part.apply(positive, negative, plain(module, x).detach()))


def _parted(module: nn.Module, *inputs: Tensor | float) -> Tensor:
    """Sums with weights that are not negative."""
    above, below = zip(*map(_signs, inputs), strict=True)
    return cast(Tensor, _Part.apply(plain(module, *above), plain(module, *below), plain(module, *inputs).detach()))


_LAYERS = (nn.Linear, *CONVOLUTIONS, Affine)
_RULES: Mapping[type[nn.Module], Rule] = {
    **MOVES,
    **dict.fromkeys(_LAYERS, _shared_layer),
    **dict.fromkeys((Add, *AVERAGES), _shared),
    **dict.fromkeys((nn.Upsample, Resize), _resized),
    **dict.fromkeys((*ACTIVATIONS, Scale, Quotient), passed),
    Mul: _product,
    nn.MaxPool2d: _max_pool,
}
_CONTRASTIVE: Mapping[type[nn.Module], Rule] = {
    **dict.fromkeys(_LAYERS, _parted_layer),
    **dict.fromkeys((Add, *AVERAGES), _parted),
}
