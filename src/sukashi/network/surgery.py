"""Removal of units, physical or by zeroing, from the members of their sites: needs no trace of the model."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.layer_scale import LayerScale, LayerScale2d
from timm.layers.norm import LayerNorm as TimmLayerNorm
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torchvision.ops.misc import FrozenBatchNorm2d

from sukashi.core.errors import ModelError, UsageError
from sukashi.core.types import Mask, Site
from sukashi.network.canonical import is_compound, performs
from sukashi.network.layers import MAKERS, AttentionCore, PadShortcut

# {layer: {side: positions}}: those that stay on side "in" or "out", those silenced on "zero in" or "zero out".
Table = dict[str, dict[str, list[int]]]


def cut(model: nn.Module, mask: Mask) -> Table:
    """{layer: {"in" or "out": kept positions}} of every layer that was made smaller, in place.

    The table is plain data: `replay(fresh_model, table)` makes the same cut without sites.

    Raises UsageError where a mask would leave a site without units, or takes some of a place that can't be cut.
    """
    _check(mask)
    table: Table = {}
    for (name, side), gone in _gone(mask).items():
        size = sizes(model.get_submodule(name))[side]
        table.setdefault(name, {})[side] = [i for i in range(size) if i not in gone]
    replay(model, table)
    return table


def zero(model: nn.Module, mask: Mask) -> Table:
    """{layer: {"zero in" or "zero out": positions}} of every layer in which units were silenced, in place.

    The network keeps its shape and gives the masked logits: what reads a unit reads nothing of it. In a linear layer or
    convolution its input weights become zero, which no BatchNorm or activation on the way undoes; a PadShortcut places
    zeros instead; AttentionCore has no weights, so the rows of the layer before it that make q, k and v become zero.

    Raises UsageError where a mask would leave a site without units, or takes some of a place that can't be cut.
    """
    _check(mask)
    table: Table = {}
    for site, keep in mask.keep.items():
        lost = torch.nonzero(~keep.bool()).flatten().tolist()
        attended = any(isinstance(model.get_submodule(m.module), AttentionCore) for m in site.consumers)
        for member in (site.producers if attended else site.consumers) if lost else ():
            positions = table.setdefault(member.module, {}).setdefault(f"zero {member.side}", [])
            positions += (p for unit in lost for p in member.index[unit])
    for sides in table.values():
        for side, positions in sides.items():
            sides[side] = sorted(set(positions))
    replay(model, table)
    return table


MODES: dict[str, Callable[[nn.Module, Mask], Table]] = {"cut": cut, "zero": zero}


def replay(model: nn.Module, table: Mapping[str, Mapping[str, Sequence[int]]]) -> None:
    """Remove what `table` says, in place; all of the table is checked before the first layer is touched.

    Raises ModelError where the table does not fit the model.
    """
    layers = dict(model.named_modules())
    for name, sides in table.items():
        if name not in layers:
            raise ModelError(f"the recipe cuts layer {name!r}, which this model lacks: it was made for another model")
        widths = sizes(layers[name])
        for wanted, kept in sides.items():
            side = wanted.removeprefix("zero ")
            if side not in widths or (wanted != side and isinstance(layers[name], AttentionCore)):
                raise ModelError(
                    f"the recipe cuts {name!r} on side {wanted!r}, which a {type(layers[name]).__name__} lacks"
                )
            ascending = all(a < b for a, b in pairwise([-1, *kept, widths[side]]))
            inner = widths[side] // 3
            alike = not isinstance(layers[name], AttentionCore) or list(kept) == [
                part * inner + c for part in range(3) for c in kept if c < inner
            ]
            whole = side == "in" or _whole(kept, widths[side] // blocks(layers[name]))
            if not kept or not ascending or not alike or not whole:
                raise ModelError(
                    f"the recipe keeps positions of {name!r} that do not fit the {widths[side]} it has: "
                    "it was made for another model"
                )
    for name, sides in table.items():
        for side, kept in sides.items():
            remove = _zero if side.startswith("zero ") else _slice
            remove(layers[name], side.removeprefix("zero "), torch.tensor(kept))


def together(tables: Sequence[Table]) -> Table:
    """What several cuts, one after another, come to: positions that stay are those of the first network, positions that
    are silenced those of the last.
    """
    found: Table = {}
    for table in tables:
        for name, sides in table.items():
            known = found.setdefault(name, {})
            for side, positions in sides.items():
                before = known.get(side)
                if side.startswith("zero "):
                    known[side] = sorted({*(before or ()), *positions})
                    continue
                if silent := set(known.get(f"zero {side}", ())):
                    known[f"zero {side}"] = [now for now, old in enumerate(positions) if old in silent]
                known[side] = list(positions) if before is None else [before[position] for position in positions]
    return found


def _whole(kept: Sequence[int], size: int) -> bool:
    """Whether positions are whole blocks of a size."""
    return all(n == size for n in Counter(position // size for position in kept).values())


def renumber(sites: Sequence[Site], mask: Mask) -> tuple[Site, ...]:
    """The sites as they are in the model cut by `mask`: fewer units, positions counted anew."""
    gone = {key: sorted(positions) for key, positions in _gone(mask).items()}
    found = []
    for site in sites:
        keep = mask.keep.get(site)
        kept = list(range(site.n_units)) if keep is None else torch.nonzero(keep).flatten().tolist()
        members = []
        for member in site.members:
            lost = gone.get((member.module, member.side), [])
            index = tuple(tuple(p - bisect_left(lost, p) for p in member.index[unit]) for unit in kept)
            members.append(replace(member, index=index))
        found.append(replace(site, n_units=len(kept), members=tuple(members)))
    return tuple(found)


def _check(mask: Mask) -> None:
    for site, keep in mask.keep.items():
        if not keep.all() and not (site.producers and site.consumers):
            raise UsageError(
                f"site {site.layer!r} is a place to look at or to act on, not one that can be cut: take those of "
                "sites.find"
            )
        if not keep.any():
            raise UsageError(f"the mask removes all {site.n_units} units of site {site.layer!r}: keep at least one")


def _gone(mask: Mask) -> dict[tuple[str, str], set[int]]:
    """The positions that go, for each layer and side; several sites may share one (concatenation)."""
    gone: dict[tuple[str, str], set[int]] = defaultdict(set)
    for site, keep in mask.keep.items():
        lost = torch.nonzero(~keep.bool()).flatten().tolist()
        for member in site.members if lost else ():
            gone[member.module, member.side].update(p for unit in lost for p in member.index[unit])
    return gone


# Layers whose units are known; what is in none of these is looked into.
LAYERS = (
    *(*MAKERS, PadShortcut, AttentionCore, nn.PReLU, nn.MultiheadAttention, nn.RNNBase),
    *(nn.modules.batchnorm._NormBase, FrozenBatchNorm2d, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.LocalResponseNorm),
    *(nn.CrossMapLRN2d, LayerScale, LayerScale2d),
)


def sizes(module: nn.Module) -> dict[str, int]:
    """{side: width} of the sides on which a layer can lose units.

    A layer of side "out" alone passes on the units that it reads: BatchNorm, PReLU, and convolutions and GroupNorm in
    groups, which lose groups whole (see `blocks`).

    Raises ModelError for a layer that cannot lose any.
    """
    if isinstance(module, MAKERS) and "weight" not in module._parameters and not parametrize.is_parametrized(module):
        raise ModelError(
            f"a {type(module).__name__} whose weight a hook computes cannot be cut: call prune.remove, "
            "remove_weight_norm or remove_spectral_norm of torch.nn.utils first"
        )
    match module:
        case nn.Linear():
            return {"in": module.in_features, "out": module.out_features}
        case nn.modules.batchnorm._NormBase():  # an InstanceNorm looks at each channel alone
            return {"out": module.num_features}
        case FrozenBatchNorm2d():
            return {"out": len(module.weight)}
        case nn.PReLU() if module.num_parameters > 1:
            return {"out": module.num_parameters}
        case LayerScale() | LayerScale2d():
            return {"out": len(module.gamma)}
        case nn.GroupNorm() if module.num_groups > 1:
            return {"out": module.num_channels}
        case nn.Conv1d() | nn.Conv2d() | nn.Conv3d() if module.groups == 1:
            return {"in": module.in_channels, "out": module.out_channels}
        case nn.Conv1d() | nn.Conv2d() | nn.Conv3d():
            return {"out": module.out_channels}
        case PadShortcut():
            return {"in": module.in_channels, "out": module.out_channels}
        case AttentionCore():
            return {"in": 3 * sum(module.widths)}
        case nn.MultiheadAttention():
            raise ModelError(
                "MultiheadAttention hides q, k and v: layers.explicit_attention writes out those of torchvision's ViTs"
            )
        case nn.LayerNorm() | nn.RMSNorm() | nn.GroupNorm() | nn.LocalResponseNorm() | nn.CrossMapLRN2d():
            raise ModelError(f"a {type(module).__name__} normalises over units: fewer of them would change the rest")
        case _ if heads(module):
            return {"out": heads(module)}
    raise ModelError(f"a {type(module).__name__} cannot be cut: only convolution, linear, BatchNorm and our own layers")


def heads(module: nn.Module) -> int:
    """How many heads an attention has that is not written out, and loses only whole; 0 of anything else."""
    n = getattr(module, "num_heads", 0)
    return n if isinstance(n, int) and not isinstance(module, nn.MultiheadAttention) else 0


def head_axis(module: nn.Module, tensor: Tensor) -> int | None:
    """The one axis on which a tensor of an attention's own has a place for each head."""
    axes = [axis for axis, n in enumerate(tensor.shape) if n == heads(module)]
    return axes[0] if len(axes) == 1 and tensor.is_floating_point() else None


def axis_of(module: nn.Module) -> int | None:
    """The axis of the features that a layer's class fixes; None where what it is given decides."""
    match module:
        case nn.Linear() | AttentionCore() | LayerScale():
            return -1
        case nn.modules.conv._ConvNd() | nn.modules.batchnorm._NormBase() | nn.GroupNorm() | PadShortcut():
            return 1
        case nn.PReLU() | FrozenBatchNorm2d() | LayerScale2d():
            return 1
        case nn.LayerNorm() if len(module.normalized_shape) == 1:
            # LayerNorm2d of timm and torchvision are LayerNorms too, and have their channels elsewhere.
            return -1 if performs(module, nn.LayerNorm) or performs(module, TimmLayerNorm) else None
    return None


def blocks(module: nn.Module) -> int:
    """Of how many equal blocks of positions the output side of a layer consists: it loses blocks whole."""
    match module:
        case nn.modules.conv._ConvNd() if module.groups > 1:
            return module.groups
        case nn.GroupNorm():
            return module.num_groups
    return sizes(module)["out"]


def unfit(module: nn.Module, name: str) -> str:
    """Why a layer cannot lose units, or ""."""
    try:
        sizes(module)
    except ModelError as error:
        return f"layer {name!r}: {error}"
    return ""


def _drop_heads(module: nn.Module, keep: Tensor) -> None:
    for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        axis = head_axis(module, tensor)
        if axis is not None:
            _put(module, name, tensor.detach().index_select(axis, keep.to(tensor.device)))
    for name in ("attn_dim", "key_attn_dim", "val_attn_dim", "out_dim"):  # those of all heads, in attention of timm
        if hasattr(module, name):
            setattr(module, name, getattr(module, name) * len(keep) // heads(module))
    module.num_heads = len(keep)  # type: ignore[assignment]


def _put(module: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter or buffer."""
    if name in module._parameters:
        value = nn.Parameter(value, cast(Tensor, module._parameters[name]).requires_grad)
    setattr(module, name, value)


def _slice(module: nn.Module, side: str, keep: Tensor) -> None:
    _fix_weight(module, side)
    match module:
        case _ if heads(module):
            _drop_heads(module, keep)
            return
        case PadShortcut() | AttentionCore():
            kept = keep.to(module.source.device) if isinstance(module, PadShortcut) else keep
            module.cut_outputs(kept) if side == "out" else module.cut_inputs(kept)  # type: ignore[operator]
            return
        case nn.Linear():
            setattr(module, f"{side}_features", len(keep))
        case nn.modules.batchnorm._NormBase():
            module.num_features = len(keep)
        case nn.PReLU():
            module.num_parameters = len(keep)
        case nn.GroupNorm():
            module.num_groups = len(keep) * module.num_groups // module.num_channels
            module.num_channels = len(keep)
        case nn.modules.conv._ConvNd():
            if module.groups > 1:
                module.in_channels = module.in_channels * len(keep) // module.out_channels
                module.groups = module.groups * len(keep) // module.out_channels
            setattr(module, f"{side}_channels", len(keep))
    axis = int(side == "in")
    for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        if tensor.dim() <= axis:  # a bias has no input axis, a counter no axis at all
            continue
        _put(module, name, tensor.detach().index_select(axis, keep.to(tensor.device)))


@torch.no_grad()
def _fix_weight(module: nn.Module, side: str) -> None:
    """Make the weight that a layer computes its own, in place, where it would compute another after the cut.

    A parametrised one (weight_norm, spectral_norm) is computed from all of it, a standardised one from all inputs.
    """
    if parametrize.is_parametrized(module):
        # Not by torch's own function, which takes it from the class that all copies of the layer share.
        computed = {name: getattr(module, name) for name in cast(nn.ModuleDict, module.parametrizations)}
        del module.parametrizations
        module.__class__ = type(module).__bases__[0]
        for name, value in computed.items():
            module.register_parameter(name, nn.Parameter(value.detach().clone()))
    if side == "in" and isinstance(module, nn.Conv2d) and not (performs(module, nn.Conv2d) or is_compound(module)):
        with _Weight() as used:
            size = [d * (k - 1) + 1 for d, k in zip(module.dilation, module.kernel_size, strict=True)]
            module(module.weight.new_zeros(1, module.in_channels, *size))
        for name in [name for name in module._parameters if name not in ("weight", "bias")]:
            delattr(module, name)
        module.weight = nn.Parameter(used.weight.clone(), module.weight.requires_grad)
        module.__class__ = Conv2dSame if getattr(module, "same_pad", False) else nn.Conv2d


class _Weight(TorchFunctionMode):
    """Catches the weight that a convolution is given inside."""

    weight: Tensor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.conv2d:
            self.weight = args[1]
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def _zero(module: nn.Module, side: str, gone: Tensor) -> None:
    _fix_weight(module, side)
    if isinstance(module, PadShortcut):
        gone = gone.to(module.source.device)
        lost = torch.isin(module.source if side == "in" else torch.arange(module.out_channels).to(gone), gone)
        module.source = module.source.masked_fill(lost, -1)
        return
    axis = int(side == "in")
    for parameter in module.parameters(recurse=False):
        if parameter.dim() > axis:  # a bias has no input axis
            parameter.index_fill_(axis, gone.to(parameter.device), 0.0)
