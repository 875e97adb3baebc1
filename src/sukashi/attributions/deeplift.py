"""DeepLIFT: what a unit's difference from a baseline did to a logit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sukashi.attributions import attributions
from sukashi.attributions.gradient import check, in_parts, start_of
from sukashi.attributions.rules import (
    ACTIVATIONS,
    AVERAGES,
    CONVOLUTIONS,
    MOVES,
    STRAIGHT,
    Rule,
    carried,
    carry,
    ones,
    plain,
    replaced,
    ruled,
)
from sukashi.core.objective import CLASSIFICATION, Objective
from sukashi.core.registry import BatchSize
from sukashi.core.types import Site
from sukashi.network import hooks
from sukashi.network.canonical import Affine, canonical
from sukashi.network.functions import Add, MatMul, Mul, Quotient, Resize, Scale
from sukashi.network.layers import AttentionCore, FeatureMap

Baseline = float | Literal["mean", "blur"] | Tensor


@attributions.register("deeplift", source="Shrikumar et al. 2017, eq. 1-3, sec. 3.5.2 (rescale)")
def deeplift(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    sites: Sequence[Site],
    objective: Objective = CLASSIFICATION,
    *,
    baseline: Baseline = 0.0,
    batch_size: BatchSize = 64,
) -> dict[Site, Tensor]:
    """Share of a unit in the logit's difference from the baseline: multiplier times the unit's own difference.

    With dt = t(x) - t(b), a multiplier m(s, t) says dt = sum_s m(s, t) ds, multipliers follow the chain rule (eq. 3),
    and the contribution of s is m(s, logit) ds; the sum over a complete cut of the network is F(x) - F(b), exactly.
    The seed is 1 at the target's logit. Rescale: m = dy / dz at each nonlinearity, its slope where dz vanishes. Where
    the paper has no rule, ours are those that keep the sum: a max-pool gives its difference to the larger of both
    maxima's positions; a product a b gives (b + b') / 2 to da and (a + a') / 2 to db (the Shapley value of two), also
    inside LayerNorm (square, inverse root, product) and attention (two matrix products, and a softmax that is
    exp(z - log sum exp z)). What is linear or moves values needs none. All else is refused.

    `baseline` is a number or a tensor that broadcasts to x, in preprocessed units (0 is the mean colour), `mean` the
    image's own mean colour, or `blur` the image under a Gaussian of an eighth of its side (Sturmfels et al. 2020).
    `batch_size` bounds the images in one pass; one pass, and one without gradients over the baselines, serve all sites.

    Raises ModelError for a model without canonical form or with an operation that has no rule, UsageError for a
    baseline of another shape, DataError for a target that is no class number an image.
    """
    check(model, x, target, objective)
    form = canonical(model, x, sites)
    before: dict[nn.Module, tuple[Tensor, ...]] = {}
    ruled(form, {cls: rule and partial(_twice, before, rule) for cls, rule in _RULES.items()}, "deeplift")
    start = _start(x, baseline)

    def explain(rows: slice) -> dict[Site, Tensor]:
        before.clear()
        ours = start[rows] if len(start) == len(x) else start
        with torch.no_grad(), hooks.recorded(form, sites) as seen:
            form(ours)
            if len(ours) == 1 and any(part.dim() and len(part) > 1 for read in before.values() for part in read):
                # Parts of an image are rows of a batch, as windows are: one baseline does not stand for those of all.
                before.clear()
                form(ours.expand_as(x[rows]))
            base = {site: hooks.gather(site, seen[site]) for site in sites}
        reads, multipliers = carried(
            form, x[rows], sites, lambda logits: ones(objective.explained(logits, target[rows]))
        )
        return {
            site: hooks.gather(site, multipliers.pop(site)) * (hooks.gather(site, reads.pop(site)) - base.pop(site))
            for site in sites
        }

    return in_parts(explain, len(x), batch_size)


def _start(x: Tensor, baseline: Baseline) -> Tensor:
    """The baseline: one row for all images, or a row for each."""
    if baseline == "mean":
        return x.mean((2, 3), keepdim=True).expand_as(x)
    if baseline == "blur":
        return _spread(x.shape[2], x) @ x @ _spread(x.shape[3], x).T
    rows = start_of(x, baseline)
    return rows[:1] if rows.stride(0) == 0 else rows


def _spread(side: int, like: Tensor) -> Tensor:
    """Row i: the weights of a Gaussian around i, cut at the border, that sum to one."""
    place = torch.arange(side, device=like.device, dtype=like.dtype)
    return torch.softmax(-(((place[:, None] - place) / (side / 8)) ** 2) / 2, 1)


# Rules: (module, what it read of the baseline, what it reads) -> output.


def _twice(
    before: dict[nn.Module, tuple[Tensor, ...]], rule: Callable[..., Tensor], module: nn.Module, *inputs: Tensor
) -> Tensor:
    """First asked, a layer reads the baseline and remembers it; then its rule applies."""
    if module not in before:
        before[module] = inputs
        return plain(module, *inputs)
    return rule(module, *before[module], *inputs)


def _activation(module: nn.Module, z0: Tensor, z: Tensor) -> Tensor:
    """Rescale. A difference too small to divide by gets the slope halfway, which for a smooth function is as exact.

    Functions of straight pieces divide by any difference: their values have no rounding to speak of.
    """
    with torch.no_grad():
        y, dz = plain(module, z), z - z0
        least = (
            0.0 if isinstance(module, (*STRAIGHT, nn.Hardtanh, nn.Softshrink)) else torch.finfo(z.dtype).eps ** (1 / 3)
        )
        near = dz.abs() <= least
        slope = (y - plain(module, z0)) / torch.where(near, 1, dz)
    if near.any():
        with torch.enable_grad():
            halfway = ((z + z0) / 2).detach().requires_grad_()
            (inner,) = torch.autograd.grad(plain(module, halfway).sum(), halfway)
        slope = torch.where(near, inner, slope)
    return carry(z, y, slope)


def _max_pool(module: nn.Module, z0: Tensor, z: Tensor) -> Tensor:
    """dy goes to where the larger of y and y' is taken: there |dz| >= |dy|, so that no multiplier exceeds 1."""
    assert isinstance(module, nn.MaxPool2d)
    with torch.no_grad():
        settings = (module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode)
        y, here = F.max_pool2d(z, *settings, return_indices=True)
        y0, there = F.max_pool2d(z0, *settings, return_indices=True)
        taken = torch.where(y >= y0, here, there).flatten(2)
    picked = z.flatten(2).gather(2, taken).view_as(y)
    with torch.no_grad():
        dz = picked - z0.expand_as(z).flatten(2).gather(2, taken).view_as(y)
        slope = torch.where(dz == 0, 1, (y - y0) / torch.where(dz == 0, 1, dz))
    return carry(picked, y, slope)


def _bilinear(product: Callable[[Tensor, Tensor], Tensor], a0: Tensor, b0: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The difference of a product, half of each order of events: da (b + b') / 2 + (a + a') / 2 db."""
    linear = product(a, ((b + b0) / 2).detach()) + product(((a + a0) / 2).detach(), b)
    return replaced(linear, product(a.detach(), b.detach()))


def _product(module: nn.Module, a0: Tensor, b0: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return _bilinear(torch.mul if isinstance(module, Mul) else torch.matmul, a0, b0, a, b)


def _layer_norm(module: nn.Module, z0: Tensor, z: Tensor) -> Tensor:
    assert isinstance(module, nn.LayerNorm)
    axes = tuple(range(-len(module.normalized_shape), 0))
    centred, centred0 = z - z.mean(axes, keepdim=True), z0 - z0.mean(axes, keepdim=True)
    square = carry(centred, centred**2, centred + centred0)
    var, var0 = square.mean(axes, keepdim=True), (centred0**2).mean(axes, keepdim=True)
    root, root0 = (var.detach() + module.eps).sqrt(), (var0 + module.eps).sqrt()
    # 1/r - 1/r' = -(v - v') / (r r' (r + r')): no small difference to divide by.
    inverse = carry(var, 1 / root, -1 / (root * root0 * (root + root0)))
    out = _bilinear(torch.mul, centred0, 1 / root0, centred, inverse)
    out = out if module.weight is None else out * module.weight
    return out if module.bias is None else out + module.bias


def _softmax(z0: Tensor, z: Tensor, axis: int = -1) -> Tensor:
    """exp(z - L) with L = log sum exp z. The slopes of exp, sum and log are taken between both ends, and chained."""
    log, log0 = z.logsumexp(axis, keepdim=True).detach(), z0.logsumexp(axis, keepdim=True)
    with torch.no_grad():
        # Any shift that both ends share will do; this one keeps the larger of both sums at 1 or more.
        shift = torch.maximum(z.amax(axis, keepdim=True), z0.amax(axis, keepdim=True))
        share = _exp_slope(z - shift, z0 - shift) / _exp_slope(log - shift, log0 - shift)
    centred = z - replaced((z * share).sum(axis, keepdim=True), log)
    return carry(centred, z.softmax(axis), _exp_slope(centred.detach(), z0 - log0))


def _exp_slope(u: Tensor, v: Tensor) -> Tensor:
    """(exp u - exp v) / (u - v), exp u where they meet."""
    gap = (u - v).abs()
    part = torch.where(gap == 0, 1, -torch.expm1(-gap) / torch.where(gap == 0, 1, gap))
    return torch.maximum(u, v).exp() * part


def _softmax_layer(module: nn.Module, z0: Tensor, z: Tensor) -> Tensor:
    assert isinstance(module, nn.Softmax)
    assert module.dim is not None
    return _softmax(z0, z, module.dim)


def _attention(module: nn.Module, before: Tensor, qkv: Tensor) -> Tensor:
    assert isinstance(module, AttentionCore)
    (q0, k0, v0), (q, k, v) = module.split(before), module.split(qkv)
    k0, k = k0.transpose(2, 3) * module.scale, k.transpose(2, 3) * module.scale
    weights = _softmax((q0 @ k0), _bilinear(torch.matmul, q0, k0, q, k))
    return module.merge(_bilinear(torch.matmul, (q0 @ k0).softmax(-1), v0, weights, v))


_RULES: Mapping[type[nn.Module], Rule] = {
    **MOVES,
    **dict.fromkeys(
        (nn.Linear, *CONVOLUTIONS, Affine, Add, Scale, Quotient, nn.Upsample, Resize, *AVERAGES, FeatureMap)
    ),
    **dict.fromkeys(ACTIVATIONS, _activation),
    **dict.fromkeys((Mul, MatMul), _product),
    nn.MaxPool2d: _max_pool,
    nn.LayerNorm: _layer_norm,
    nn.Softmax: _softmax_layer,
    AttentionCore: _attention,
}
