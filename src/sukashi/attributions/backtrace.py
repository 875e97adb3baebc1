"""DL-Backtrace: a logit's value traced back along the size of contributions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sukashi.attributions import attributions
from sukashi.attributions.gradient import check, in_parts
from sukashi.attributions.rules import AVERAGES, MOVES, Rule, carried, carry, passed, plain, replaced, ruled, weighted
from sukashi.core.errors import ModelError
from sukashi.core.objective import CLASSIFICATION, Objective
from sukashi.core.registry import BatchSize
from sukashi.core.types import Site
from sukashi.network import hooks
from sukashi.network.canonical import Add, Mul, Scale, canonical


@attributions.register(
    "backtrace", source="Sankarapu et al. 2025 (DL-Backtrace), default and contrastive", refuses=("attention",)
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
    Sums and averages share in proportion to |a|, a max-pool equally among its maxima, a product in halves; activations
    and LayerScale pass relevance on.

    `contrastive`: two streams, what speaks for the target and what for the others. Both are sizes: the first starts
    with the target's logit, the second with the others' divided by their number, so that a thousand classes do not
    outweigh one (our reading: the paper leaves the weight open). At a unit with z_j > 0 the larger stream follows the
    positive contributions, R_i = sum_j R_j (x_i w_ij)^+ / (sum_i (x_i w_ij)^+ + b_j^+), and the smaller the negative
    ones; at any other unit they change places. What has no weights shares each stream as in default mode. The values
    are the first stream less the second.

    A gradient carries relevance itself. `batch_size` bounds the images in the one pass that serves all sites.

    Raises ModelError for a model without canonical form or with an operation that has no rule; attention and LayerNorm
    among them, for which the paper's rules do not determine shares. DataError for a target that is no class number an
    image.
    """
    check(model, x, target, objective)
    form = canonical(model, x, sites)
    contrastive = mode == "contrastive"
    layer = _parted if contrastive else _shared_layer
    rules = {**_RULES, **dict.fromkeys((nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d), layer)}
    ruled(form, rules, "backtrace")

    def seed(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        if not contrastive:
            value = objective.explained(logits, target)
            return value, value.detach()
        objective.check(logits[: len(target)], target)
        answers = objective.answers(logits)
        size = answers.detach()[: len(target)].abs()
        is_target = F.one_hot(objective.place(target), size.shape[1]).bool()
        others = size / max(size.shape[1] - 1, 1)
        return answers, torch.cat([size.where(is_target, 0), others.where(~is_target, 0)])

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


def _sized(x: Tensor) -> Tensor:
    """|x|, and relevance that is multiplied by it on the way back."""
    size = x.abs() if (x < 0).any() else x
    return carry(x, size, size)


def _shared(module: nn.Module, *inputs: Tensor) -> Tensor:
    """Sums with weights that are not negative."""
    total = plain(module, *map(_sized, inputs))
    return carry(total, plain(module, *inputs), _inverse(total))


def _shared_layer(module: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    total = weighted(module, _sized(x), module.weight.abs())
    return carry(total, plain(module, x), _inverse(total + _shift(module, total).abs()))


def _shift(module: nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d, z: Tensor) -> Tensor:
    """The bias of a layer, in the shape of its output."""
    if module.bias is None:
        return torch.zeros_like(z)
    return module.bias if isinstance(module, nn.Linear) else module.bias.view(-1, *[1] * (z.dim() - 2)).expand_as(z)


def _product(module: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    half = (a + b) / 2
    return carry(half, a * b, half.new_ones(()).expand_as(half))


def _max_pool(module: nn.Module, x: Tensor) -> Tensor:
    """Equal shares among the maxima of a window."""
    assert isinstance(module, nn.MaxPool2d)
    if module.ceil_mode:
        raise ModelError("backtrace has no rule for a max-pool with ceil_mode=True: its last windows are cut off")
    y = plain(module, x)
    window = (module.kernel_size, module.dilation, 0, module.stride)
    down, right = module.padding if isinstance(module.padding, tuple) else (module.padding, module.padding)
    border = (right, right, down, down)
    patches = F.unfold(F.pad(x.detach(), border, value=-torch.inf), *window).unflatten(1, (x.shape[1], -1))
    maxima = (patches == y.flatten(2)[:, :, None]).to(x)
    shares = maxima / maxima.sum(2, keepdim=True)
    spread = F.unfold(F.pad(x, border), *window).unflatten(1, (x.shape[1], -1))
    return replaced((spread * shares).sum(2).view_as(y), y)


class _Part(torch.autograd.Function):
    """The contrastive rule: which of both totals, of positive or of negative contributions, each stream goes back to.

    Rows come twice: the first half carries the stream for the target, the second the one for the others.
    """

    @staticmethod
    def forward(ctx: Any, positive: Tensor, negative: Tensor, z: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(positive, negative, z, bias)
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        positive, negative, z, bias = ctx.saved_tensors
        stream, other = gradients[0].chunk(2)
        first = (stream >= other) == (z.chunk(2)[0] > 0)
        up = torch.cat([first, ~first])
        return (
            gradients[0].where(up, 0) * _inverse(positive + bias.clamp(min=0)),
            gradients[0].where(~up, 0) * _inverse(negative - bias.clamp(max=0)),
            None,
            None,
        )


def _parted(module: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    with torch.no_grad():
        z = plain(module, x)
        above, below = x.clamp(min=0), -x.clamp(max=0)
        up, down = module.weight.clamp(min=0), -module.weight.clamp(max=0)
    above, below = carry(x, above, above), carry(x, below, below)
    positive = weighted(module, above, up) + weighted(module, below, down)
    negative = weighted(module, above, down) + weighted(module, below, up)
    return cast(Tensor, _Part.apply(positive, negative, z, _shift(module, z)))


_ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Hardsigmoid, nn.Hardswish),
)
_RULES: Mapping[type[nn.Module], Rule] = {
    **MOVES,
    **dict.fromkeys((Add, *AVERAGES), _shared),
    **dict.fromkeys((*_ACTIVATIONS, Scale), passed),
    Mul: _product,
    nn.MaxPool2d: _max_pool,
}
