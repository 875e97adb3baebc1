"""Masks of single weights: made from scores in a scope, put on a model, kept in few bytes."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from sukashi.core.errors import ModelError, ResourceError, UsageError
from sukashi.core.schema import check_ratio
from sukashi.core.types import Mask, Scores, Site
from sukashi.network.exclude import remedy

SCOPES = ("global", "layer", "row")


def weight_of(model: nn.Module, site: Site) -> nn.Parameter:
    """The parameter whose entries a site of kind weight speaks of."""
    assert site.kind == "weight"
    weight = model.get_submodule(site.layer).weight
    assert isinstance(weight, nn.Parameter)
    return weight


def check_scope(scope: str, ratio: float) -> None:
    """Refuse a scope that there is not, and a ratio that is none or not that of the pattern."""
    check_ratio(ratio)
    if scope in SCOPES:
        return
    n, m = _pattern(scope)
    if not math.isclose(ratio, 1 - n / m, abs_tol=1e-6):  # as exact as the ratio we tell
        raise UsageError(f"`scope={scope!r}` keeps {n} of every {m} weights: give `ratio={1 - n / m:g}`, got {ratio:g}")


def check_shapes(scope: str, shapes: Mapping[str, Sequence[int]]) -> None:
    """Refuse a pattern N:M for {layer: shape of its weight} where the inputs of one don't fall into groups of M."""
    if scope in SCOPES:
        return
    _, m = _pattern(scope)
    n_inputs = {layer: math.prod(shape[1:]) for layer, shape in shapes.items()}
    if odd := [layer for layer, n in n_inputs.items() if n % m]:
        raise UsageError(
            f"layer {odd[0]!r} reads {n_inputs[odd[0]]} inputs, which scope {scope} cannot group by {m}: "
            f"{remedy(odd, (layer for layer in shapes if layer not in odd))}"
        )


def mask_of(scores: Scores, ratio: float, scope: str = "global", *, within: Mask | None = None) -> Mask:
    """The mask without the k = int(n ratio) weights of lowest score in each group of n weights.

    Groups are all weights of all sites (`global`), those of a layer (`layer`), those of one output (`row`, as Wanda
    does), or M inputs of an output that stand side by side (`N:M`, of which N stay: `2:4`). The inputs of a convolution
    are counted by channel, row and column of the kernel, as its weight holds them. Of equal scores those earlier in the
    model go first: sites in their order, weights by position. The weights that `within` removes are gone already; they
    are among the k.

    One group's scores are copied once and nothing is sorted.

    Raises UsageError for a ratio, scope or pattern that does not fit, for scores that hold NaN or Inf, and where
    `within` removes more of a group than k.
    """
    check_scope(scope, ratio)
    check_shapes(scope, {site.layer: values.shape for site, values in scores.values.items()})
    values = {site: np.asarray(found.detach().cpu()) for site, found in scores.values.items()}
    for site, found in values.items():
        assert site.kind == "weight"
        if not np.isfinite(found).all():
            raise UsageError(
                f"scores of {scores.method} at {site.layer!r} hold NaN or Inf: such a ranking means nothing"
            )
    gone_before = {site: ~within.keep[site].numpy() for site in values if within and site in within.keep}
    for site, gone in gone_before.items():
        values[site] = np.where(gone, -np.inf, values[site])
    if scope == "global":
        everything = np.concatenate([found.ravel() for found in values.values()])[None]
        ends = np.cumsum([found.size for found in values.values()])
        removed = np.split(_lowest(everything, int(ends[-1] * ratio))[0], ends[:-1])
    else:
        removed = []
        for found in values.values():
            n_kept, size = (
                _pattern(scope) if ":" in scope else (None, found.size if scope == "layer" else found[0].size)
            )
            k = int(size * ratio) if n_kept is None else size - n_kept
            removed.append(_lowest(found.reshape(-1, size), k))
    masks = {site: gone.reshape(values[site].shape) for site, gone in zip(values, removed, strict=True)}
    for site, before in gone_before.items():
        if (before & ~masks[site]).any():
            raise UsageError(
                f"layer {site.layer!r} has lost more weights already, {before.mean():.1%}, than ratio {ratio:g} in "
                f"scope {scope} takes from some group of them: give a higher ratio"
            )
    return Mask({site: torch.from_numpy(~gone) for site, gone in masks.items()})


def _pattern(scope: str) -> tuple[int, int]:
    """N and M of a scope N:M."""
    found = re.fullmatch(r"(\d{1,4}):(\d{1,4})", scope)
    if not found or not 0 < int(found[1]) < int(found[2]):
        raise UsageError(
            f"scope must be {', '.join(SCOPES)} or N:M with N of every M weights kept (0 < N < M), got {scope!r}"
        )
    return int(found[1]), int(found[2])


def _lowest(scores_GN: np.ndarray, k: int) -> np.ndarray:
    """(G, N) True at the k lowest of each row; of equal ones at those that come first."""
    if k == 0:
        return np.zeros(scores_GN.shape, dtype=bool)
    limit = np.partition(scores_GN, k - 1, axis=1)[:, k - 1 : k]
    lowest: np.ndarray = scores_GN < limit
    equal = scores_GN == limit
    n_open = k - lowest.sum(1)
    crowded = np.flatnonzero(equal.sum(1) > n_open)
    equal[crowded] &= equal[crowded].cumsum(1) <= n_open[crowded, None]
    lowest |= equal
    return lowest


@torch.no_grad()
def enforce(model: nn.Module, mask: Mask) -> None:
    """Set the weights that a mask of weight sites removes to zero, in place."""
    for site, keep in mask.keep.items():
        weight = weight_of(model, site)
        weight.mul_(keep.to(weight.device))


def weights_of(model: nn.Module, mask: Mask) -> tuple[list[Tensor], list[Tensor]]:
    """The weights that a mask speaks of, and for each of them 1 where it stays, else 0, of its type and on its device.

    A product of the two lists enforces the mask in one call; for a mask that is enforced once there is `enforce`.
    """
    weights = [weight_of(model, site).data for site in mask.keep]
    return weights, [keep.to(weight) for weight, keep in zip(weights, mask.keep.values(), strict=True)]


def check_fits(model: nn.Module, mask: Mask) -> None:
    """Refuse, with ModelError, a mask that was made for another architecture."""
    layers = dict(model.named_modules())
    for site, keep in mask.keep.items():
        weight = getattr(layers.get(site.layer), "weight", None)
        if not isinstance(weight, nn.Parameter):
            raise ModelError(
                f"the mask is for another architecture: it has a layer {site.layer!r} of shape {tuple(keep.shape)}, "
                f"the {type(model).__name__} has no weight of that name"
            )
        if weight.shape != keep.shape:
            raise ModelError(
                f"the mask is for another architecture: layer {site.layer!r} has shape {tuple(keep.shape)} in it and "
                f"{tuple(weight.shape)} in the {type(model).__name__}"
            )


def density(mask: Mask) -> dict[str, float]:
    """{layer: the share of its weights that stay}."""
    return {site.layer: float(keep.double().mean()) for site, keep in mask.keep.items()}


def zeros(model: nn.Module, mask: Mask) -> dict[str, float]:
    """Shares of numbers that are zero in a model as it is, whatever its mask says: {"sparsity", "zeros"}.

    `sparsity` is that of the weights of the masked layers, `zeros` that of all parameters.
    """
    masked = [weight_of(model, site) for site in mask.keep]
    return {"sparsity": _share_of_zeros(masked), "zeros": _share_of_zeros(list(model.parameters()))}


def _share_of_zeros(tensors: Sequence[Tensor]) -> float:
    return sum(int((tensor == 0).sum()) for tensor in tensors) / sum(tensor.numel() for tensor in tensors)


def pack(mask: Mask) -> dict[str, Tensor]:
    """{layer: bits of what stays, eight to a byte}: a 32nd of the weights' own size in fp32."""
    return {site.layer: torch.from_numpy(np.packbits(keep.numpy().ravel())) for site, keep in mask.keep.items()}


def unpack(packed: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> Mask:
    """The mask of weights of these shapes, by layer, out of what `pack` gave.

    Raises ModelError where layers or sizes differ.
    """
    keep = {}
    for layer in sorted({*packed, *shapes}):
        if layer not in packed or layer not in shapes:
            where = "bits" if layer in packed else "a shape"
            raise ModelError(f"the mask of layer {layer!r} has {where} only: restore the folder")
    for layer, shape in shapes.items():
        n_weights, bits = math.prod(shape), packed[layer]
        if bits.dtype != torch.uint8 or bits.shape != (-(-n_weights // 8),):
            raise ModelError(
                f"the mask of layer {layer!r} has {tuple(bits.shape)} numbers of {bits.dtype} for {n_weights} weights, "
                "eight to a byte: restore the folder"
            )
        kept = np.unpackbits(bits.numpy(), count=n_weights).astype(bool)
        keep[Site(layer, "weight", n_weights, 0)] = torch.from_numpy(kept).view(*shape)
    return Mask(keep)


def semi_structured(model: nn.Module, mask: Mask) -> nn.Module:
    """A copy whose linear layers under a 2:4 mask are in torch's semi-structured form, which skips the zeros.

    Needs an NVIDIA GPU of compute capability 8.0 or newer and a model in half precision (`model.half()`). Torch has
    no such convolutions: those keep their zeros. Logits are those of the masked model within half precision.

    Raises ResourceError on any other device, UsageError for another type or a mask that is not 2:4, ModelError for a
    mask of another architecture and for layers of sizes that torch does not take.
    """
    check_fits(model, mask)
    layers = {site: model.get_submodule(site.layer) for site in mask.keep}
    linear = [site for site, layer in layers.items() if isinstance(layer, nn.Linear)]
    for site, keep in mask.keep.items():
        groups = keep.reshape(-1, 4) if keep[0].numel() % 4 == 0 else None
        if groups is None or bool((groups.sum(1) > 2).any()):
            raise UsageError(f"the mask of layer {site.layer!r} is not 2:4: prune with `scope='2:4'`")
    if not linear:
        raise UsageError("the mask has no linear layer, and torch has no other semi-structured ones: leave it as it is")
    weight = weight_of(model, linear[0])
    if not weight.is_cuda or torch.cuda.get_device_capability(weight.device) < (8, 0):
        raise ResourceError(
            f"semi-structured layers need an NVIDIA GPU of compute capability 8.0 or newer, the model is on "
            f"{weight.device}: move it to one, or use the masked model as it is"
        )
    if weight.dtype not in (torch.float16, torch.bfloat16):
        raise UsageError(
            f"semi-structured layers compute in half precision, the model is in {weight.dtype}: model.half()"
        )
    model = copy.deepcopy(model)
    enforce(model, mask)
    for site in linear:
        weight = weight_of(model, site)
        try:
            sparse = torch.sparse.to_sparse_semi_structured(weight.detach())
        except (RuntimeError, ValueError) as error:  # each of torch's backends has sizes it does not take
            raise ModelError(
                f"torch has no semi-structured form of layer {site.layer!r}, {tuple(weight.shape)} ({error}): prune "
                "without it"
            ) from error
        model.get_submodule(site.layer).weight = nn.Parameter(sparse, requires_grad=False)
    return model
