"""Layer-wise relevance propagation, on convolutional networks and vision transformers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.fx import GraphModule

from sukashi.attributions import attributions
from sukashi.attributions.gradient import check, in_parts
from sukashi.attributions.rules import (
    AVERAGES,
    CONVOLUTIONS,
    MOVES,
    STRAIGHT,
    THROUGH_ZERO,
    Rule,
    carried,
    carry,
    ones,
    parameters,
    plain,
    ruled,
    stable,
    weighted,
)
from sukashi.core.errors import ModelError, UsageError
from sukashi.core.objective import CLASSIFICATION, Objective
from sukashi.core.registry import BatchSize
from sukashi.core.types import Site
from sukashi.network import hooks
from sukashi.network.canonical import Affine, canonical
from sukashi.network.functions import Add, Mul, Quotient, Resize, Scale
from sukashi.network.layers import AttentionCore, FeatureMap

Rules = Literal["epsilon_plus", "epsilon", "gamma", "alpha1beta0"]


@attributions.register("lrp", source="Bach et al. 2015, eq. 58 and 60; Achtibat et al. 2024, sec. 3")
def lrp(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    sites: Sequence[Site],
    objective: Objective = CLASSIFICATION,
    *,
    rule: Rules = "epsilon_plus",
    attention: Annotated[str, Field(pattern="^(attn|cp)$")] = "attn",
    epsilon: Annotated[float, Field(gt=0)] = 1e-6,
    gamma: Annotated[float, Field(gt=0)] = 0.25,
    bias: bool = True,
    batch_size: BatchSize = 64,
) -> dict[Site, Tensor]:
    """Relevance of each position of a unit: the target's logit, shared out backward from layer to layer.

    The seed is the logit's own value. A layer z_j = sum_i x_i w_ij + b_j hands on R_i = sum_j c_ij / (sum_i c_ij + ..)
    R_j, by `rule`:

    - `epsilon`: c_ij = x_i w_ij, and z_j + epsilon sign(z_j) below the line (Bach et al. 2015, eq. 58);
    - `gamma`: c_ij = x_i (w_ij + gamma w_ij^+) where z_j > 0 and x_i >= 0, with w_ij^- where one of both is negative
      (Montavon et al. 2019; for inputs of any sign Andeol et al. 2021);
    - `alpha1beta0`: the positive c_ij only (eq. 60 with alpha = 1, beta = 0);
    - `epsilon_plus`: alpha1beta0 in convolutions, epsilon in linear layers (zennit's composite of that name).

    Biases stand below the line (their positive part in alpha1beta0), so their share of relevance is lost; `bias=False`
    leaves them out, which alpha1beta0 alone can bear: the others would divide by what may be zero. `epsilon` also
    keeps the other rules from dividing by zero, as zennit's stabiliser does. Sums, means, average pools and
    interpolation share in proportion to what they add; a constant's share is lost as a bias's is. Factors, LayerScale
    and activations that are 0 at 0 pass relevance on, a max-pool passes it to the maximum, and what moves or copies
    values (pads, shuffles, flips, nearest upsampling) takes it back the way they came. A BatchNorm is part of the layer
    before it; one that follows none is a layer of its own.

    Transformers (Achtibat et al. 2024): the deviation that LayerNorm divides by is a constant; `attention` is `attn`
    (AttnLRP: softmax by its slope, the two factors of a matrix product half each) or `cp` (CP-LRP, Ali et al. 2022:
    attention weights are constants, so q and k get nothing). CP-LRP conserves relevance but for biases; AttnLRP does
    not in sum. The gates of squeeze-and-excitation are attention to channels, and have the rules of `attn`: half for
    each factor of the product, the sigmoid by its slope (where its input is near 0 its output is not, so a sigmoid
    that passed relevance on would divide by nothing). `cp` has none for them.

    In the implementation a gradient carries R / x, so that most of the rules are autograd's own; relevance is read as
    that gradient times the activation. `batch_size` bounds the images in the one pass that serves all sites.

    Raises ModelError for a model without canonical form or with an operation that has no rule, UsageError for
    `bias=False` with another rule than alpha1beta0, DataError for a target that is no class number an image.
    """
    check(model, x, target, objective)
    form = _ruled(model, x, sites, rule, attention, epsilon, gamma, bias)

    def explain(rows: slice) -> dict[Site, Tensor]:
        reads, ratios = carried(form, x[rows], sites, lambda logits: ones(objective.explained(logits, target[rows])))
        return {
            site: hooks.gather(site, [r * m for r, m in zip(reads.pop(site), ratios.pop(site), strict=True)])
            for site in sites
        }

    return in_parts(explain, len(x), batch_size)


def factors(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    site: Site,
    objective: Objective = CLASSIFICATION,
    *,
    rule: Rules = "epsilon_plus",
    at: Tensor | None = None,
    batch_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """The two factors of `lrp` at a site that one layer reads or writes, each (B, U, positions...): the activation a,
    and the context c, what reaches it of relevance for each of its units (Chormai et al. 2024, eq. 6), R = a c.

    c has a value where a is 0 too. `at` (B, P) are the positions of each image to give, all axes after the units'
    flattened, (B, U, P); left out, all. Other options are at their defaults there; errors are those of `lrp`.
    """
    check(model, x, target, objective)
    form = _ruled(model, x, [site], rule)

    def explain(rows: slice) -> dict[str, Tensor]:
        read, ratio = carried(form, x[rows], [site], lambda logits: ones(objective.explained(logits, target[rows])))
        found = {"a": hooks.gather(site, read[site]), "c": hooks.gather(site, ratio[site])}
        if at is None:
            return found
        here = at[rows, None].to(x.device).expand(-1, site.n_units, -1)
        return {name: values.reshape(*here.shape[:2], -1).gather(2, here) for name, values in found.items()}

    found = in_parts(explain, len(x), batch_size)
    return found["a"], found["c"]


def _ruled(
    model: nn.Module,
    x: Tensor,
    sites: Sequence[Site],
    rule: str,
    attention: str = "attn",
    epsilon: float = 1e-6,
    gamma: float = 0.25,
    bias: bool = True,
) -> GraphModule:
    """The canonical form whose gradient carries R / x."""
    if not bias and rule != "alpha1beta0":
        raise UsageError(f"bias=False with rule {rule!r} divides by what may be zero: use rule 'alpha1beta0'")
    form = canonical(model, x, sites)
    layers: dict[str, Rule] = {
        "epsilon": partial(_epsilon, epsilon),
        "gamma": partial(_gamma, gamma, epsilon),
        "alpha1beta0": partial(_alpha1beta0, bias, epsilon),
    }
    linear, convolution = ("epsilon", "alpha1beta0") if rule == "epsilon_plus" else (rule, rule)
    rules: dict[type[nn.Module], Rule] = {
        **MOVES,
        **dict.fromkeys((Add, Scale, Quotient, nn.MaxPool2d, nn.Upsample, Resize, *AVERAGES, *STRAIGHT, FeatureMap)),
        **dict.fromkeys(THROUGH_ZERO, _activation),
        nn.Hardtanh: _clamped,
        **dict.fromkeys(CONVOLUTIONS, layers[convolution]),
        **dict.fromkeys((nn.Linear, Affine), layers[linear]),
        nn.LayerNorm: _layer_norm,
        AttentionCore: partial(_attention, attention == "cp"),
    }
    if attention == "attn":
        rules |= {Mul: _product, **dict.fromkeys((nn.Sigmoid, nn.Hardsigmoid))}
    ruled(form, rules, "lrp")
    return form


def _epsilon(epsilon: float, module: nn.Module, x: Tensor) -> Tensor:
    z = plain(module, x)
    return carry(z, z, z / stable(z, epsilon))


def _alpha1beta0(bias: bool, epsilon: float, module: nn.Module, x: Tensor) -> Tensor:
    weight, shift = parameters(module)
    above = shift.clamp(min=0) if bias and shift is not None else None
    positive = _contributions(module, x, weight.clamp(min=0), weight.clamp(max=0), above)
    with torch.no_grad():
        z = plain(module, x)
    return carry(positive, z, z / stable(positive, epsilon))


def _gamma(gamma: float, epsilon: float, module: nn.Module, x: Tensor) -> Tensor:
    weight, bias = parameters(module)
    up, down = (_raised(weight, gamma), _raised(weight, -gamma))
    rise, fall = (None, None) if bias is None else (_raised(bias, gamma), _raised(bias, -gamma))
    above, below = _contributions(module, x, up, down, rise), _contributions(module, x, down, up, fall)
    with torch.no_grad():
        z = plain(module, x)
    out = carry(above, z, z.clamp(min=0) / stable(above, epsilon))
    return out + carry(below, torch.zeros_like(z), z.clamp(max=0) / stable(below, epsilon))


def _raised(w: Tensor, gamma: float) -> Tensor:
    """w with its positive part raised by gamma, or its negative part for a negative gamma."""
    return w + gamma * w.clamp(min=0) if gamma > 0 else w - gamma * w.clamp(max=0)


def _contributions(module: nn.Module, x: Tensor, positive: Tensor, negative: Tensor, bias: Tensor | None) -> Tensor:
    """Positive inputs through one set of weights, negative ones through the other."""
    if not (x < 0).any():
        return weighted(module, x, positive, bias)
    return weighted(module, x.clamp(min=0), positive, bias) + weighted(module, x.clamp(max=0), negative)


def _activation(module: nn.Module, x: Tensor) -> Tensor:
    y = plain(module, x)
    return carry(x, y, torch.where(x == 0, 0, y / torch.where(x == 0, 1, x)))


def _clamped(module: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(module, nn.Hardtanh)
    if not module.min_val <= 0 <= module.max_val:
        raise ModelError(
            f"lrp has no rule for a clamp to [{module.min_val:g}, {module.max_val:g}], which is not 0 at 0: use an "
            "attribution made of gradients, such as gradient_x_activation"
        )
    return _activation(module, x)


def _layer_norm(module: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(module, nn.LayerNorm)
    axes = tuple(range(-len(module.normalized_shape), 0))
    centred = x - x.mean(axes, keepdim=True)
    out = centred * ((centred**2).mean(axes, keepdim=True) + module.eps).rsqrt().detach()
    out = out if module.weight is None else out * module.weight
    return out if module.bias is None else out + module.bias


def _attention(cp: bool, module: nn.Module, qkv: Tensor) -> Tensor:
    assert isinstance(module, AttentionCore)
    q, k, v = module.split(qkv)
    scores = q @ k.transpose(2, 3) * module.scale
    if cp:
        return module.merge(scores.softmax(-1).detach() @ v)
    return module.merge(_halved(_halved(scores).softmax(-1) @ v))


def _product(module: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    return _halved(plain(module, a, b))


def _halved(product: Tensor) -> Tensor:
    """A product whose two factors get half the relevance each."""
    return (product + product.detach()) / 2
