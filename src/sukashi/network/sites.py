"""Finds a model's sites: which parameter slices must be cut together, and which layers cannot be cut and why."""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal, cast

import torch
import torch_pruning as tp
from timm.layers.norm import LayerNorm as TimmLayerNorm
from torch import Tensor, nn

from sukashi.core.errors import ModelError, UsageError, nearest
from sukashi.core.types import Kind, Mask, Member, Site
from sukashi.network import hooks, insert, surgery
from sukashi.network.canonical import answer, evaluating, is_compound, performs
from sukashi.network.layers import Attention, AttentionCore, PadShortcut

# Of fp32 logits that should be equal; a wrong cut is off by 1e-2 and more.
TOLERANCE = 1e-4
_PLAIN = (nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)


def input_site(x: Tensor) -> Site:
    """The pixels of images x (B, C, H, W) as a site, whose units are the C channels: where a saliency map is taken."""
    whole = tuple((c,) for c in range(x.shape[1]))
    return Site("", "pixel", x.shape[1], members=(Member("", "in", whole, 1),))


def place(
    model: nn.Module,
    layer: str,
    example: Tensor,
    side: Literal["out", "in"] = "out",
    *,
    axis: int | None = None,
    units: Sequence[int | Sequence[int]] | None = None,
) -> Site:
    """A place to look at or to act on: units of what any layer writes (side "out") or reads ("in").

    It can be recorded, attributed and ablated, not cut. `axis` is where the units lie, batch first: left out, it is
    that of the layer's features where its class fixes one (1 of convolutions and BatchNorm, -1 of linear layers,
    LayerNorm and AttentionCore). An activation or a block has none of its own; axis 1 of tokens (B, T, D) makes each
    token a unit. `units` are the positions of each unit, a number or several; left out, every position is a unit:

        place(model, "blocks.0.norm1", x)                                    features of all tokens
        place(model, "blocks.0", x, axis=1, units=[0])                       the class token
        place(model, "layer1.0", x, axis=1, units=range(16, 32))             a block of channels
        core = model.get_submodule("blocks.0.attn.core")
        place(model, "blocks.0.attn.core", x, "in", units=core.positions("q", head=2))

    The model is run once on two images of the example (B, C, H, W), in eval mode and left as found.

    Raises ModelError for a layer that there is not, that is not called exactly once or holds no tensor with a row an
    image; UsageError where the axis is not known or the units are not on it.
    """
    module = hooks.layer(model, layer)
    shape = _shape(model, layer, example, side)
    own = axis_of(module) if layer else 1
    if axis is None and own is None:
        raise UsageError(
            f"layer {layer!r} is a {type(module).__name__}, whose class does not say where its units lie in what it "
            f"holds, {shape}: give axis=1 for channels of maps or for tokens, axis=-1 for features of tokens"
        )
    axis = cast(int, own if axis is None else axis)
    if not -len(shape) < axis < len(shape) or axis == 0:
        raise UsageError(f"axis {axis} of layer {layer!r}, which holds {shape}, has no units: axis 0 are the images")
    size = shape[axis]
    index = tuple((u,) if isinstance(u, int) else tuple(u) for u in (range(size) if units is None else units))
    positions = [p for unit in index for p in unit]
    if not index or not all(index) or not all(0 <= p < size for p in positions):
        raise UsageError(f"units of layer {layer!r} must be one or more of the {size} positions on axis {axis}")
    if len(set(positions)) < len(positions):
        raise UsageError(f"units of layer {layer!r} share a position: give each to one unit")
    return Site(
        layer,
        _kind(module if layer else None, side, axis % len(shape), len(shape)),
        len(index),
        axis,
        (Member(layer, side, index, axis),),
        f"{side}[{_indexed(axis, index, size)}]",
    )


def _shape(model: nn.Module, layer: str, example: Tensor, side: Literal["out", "in"]) -> tuple[int, ...]:
    """The shape of what a layer holds for two images."""
    probe = Site(layer, "channel", 0, 1, (Member(layer, side, (), 1),))
    like = next(model.parameters(), example)
    with torch.no_grad(), evaluating(model), hooks.recorded(model, [probe]) as seen:
        answer(model, example[:2].to(like.device, copy=True))  # it may write into what it is given
    return tuple(seen[probe][0].shape)


def _kind(module: nn.Module | None, side: str, axis: int, n_axes: int) -> Kind:
    """What the units on an axis are called; None is the model as a whole."""
    if module is None:
        return "pixel" if side == "in" else "hidden"
    if isinstance(module, AttentionCore) and side == "in" and axis == 2:
        return "head"
    own = axis_of(module)
    if n_axes == 3 and axis == 1 and (own is None or own % n_axes != 1):
        return "token"
    return "channel" if axis == 1 and n_axes > 2 else "hidden"


def _indexed(axis: int, index: Sequence[tuple[int, ...]], size: int) -> str:
    """Units as one would index them: "..., 0:8"; those that are no range by number and a digest."""
    if all(len(unit) == 1 for unit in index):
        first, n = index[0][0], len(index)
        if index == tuple((first + u,) for u in range(n)):
            what = ":" if n == size else f"{first}" if n == 1 else f"{first}:{first + n}"
            return f"{':, ' * axis}{what}" if axis > 0 else f"..., {what}{', :' * (-1 - axis)}"
    digest = hashlib.sha256(repr(index).encode()).hexdigest()[:8]
    return f"{len(index)} units on axis {axis}, {digest}"


def axis_of(module: nn.Module) -> int | None:
    """The axis of the features that a layer's class fixes; None where what it is given decides."""
    match module:
        case nn.Linear() | AttentionCore():
            return -1
        case nn.modules.conv._ConvNd() | nn.modules.batchnorm._BatchNorm() | nn.GroupNorm() | PadShortcut():
            return 1
        case nn.LayerNorm() if len(module.normalized_shape) == 1:
            # LayerNorm2d of timm and torchvision are LayerNorms too, and have their channels elsewhere.
            return -1 if performs(module, nn.LayerNorm) or performs(module, TimmLayerNorm) else None
    return None


def weights(model: nn.Module, exclude: Collection[str] = ()) -> tuple[Site, ...]:
    """The sites of single weights: one for each convolution and linear layer, in the model's order, but `exclude`.

    Biases and normalisation layers are left out, as Suwal et al. 2025, sec. 3.1, do.

    Raises ModelError for a layer to exclude that there is not, where none is left, and for a layer that shares its
    weight with another, computes it, or does not put it to its plain use (a transposed convolution, one that
    standardises its weight): there a zero would not be what a mask takes it for.
    """
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    layers = {name: module for name, module in insert.layers(model).items() if isinstance(module, kinds)}
    for name in exclude:
        if name not in layers:
            raise ModelError(f"no convolution or linear layer {name!r} to exclude{nearest(name, layers)}")
    shared = _shared(model)
    for name in [name for name in layers if name in exclude]:
        del layers[name]
    for name, module in layers.items():
        if name in shared:
            raise ModelError(f"layer {name!r} shares its weights with another: exclude both")
        plain = type(module).forward in _PLAIN or is_compound(module)
        if not plain or "weight" not in module._parameters:
            raise ModelError(
                f"layer {name!r}, a {type(module).__name__}, does something of its own with its weight or its input, "
                "so a weight of zero may not be a connection less: exclude it"
            )
    if not layers:
        raise ModelError("no convolution or linear layer is left whose weights could be removed: exclude fewer")
    return tuple(Site(name, "weight", module.weight.numel(), 0) for name, module in layers.items())


@dataclass(frozen=True)
class Found:
    """A model's sites in execution order of their last producer, and {layer: why its units are no site}."""

    sites: tuple[Site, ...]
    refused: Mapping[str, str]


def find(model: nn.Module, example: Tensor) -> Found:
    """The sites of a model whose attention is explicit, seen through one forward pass of `example` (B, C, H, W).

    Coupled layers are those of DepGraph (Fang et al. 2023), with option-A shortcuts and attention followed by
    ourselves. DepGraph is not trusted: the sites are cut at random in a copy whose normalisation is made random, and
    those whose cut does not give the masked logits are refused. What is inserted has no sites, and those it would not
    fit after a cut are refused. Works on a copy on the CPU: the model is left alone.

    Raises ModelError where the model cannot be copied, run or traced, gives no finite tensor, or nothing can be cut.
    """
    try:
        twin = _twin(model)
        x = example[:2].detach().cpu().float()
        with torch.no_grad():
            dense = twin(x)
            whole = copy.deepcopy(twin) if any(isinstance(m, insert.Inserted) for m in twin.modules()) else twin
            inserted = insert.remove(twin)
            order = hooks.calls(twin, x)
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} does not run on an example of shape {tuple(example.shape)} in a copy on the CPU "
            f"({_brief(error)}): give the shape it expects"
        ) from error
    if not isinstance(dense, Tensor):
        raise ModelError(f"the model gives a {type(dense).__name__}: it must give one tensor of logits; wrap it")
    if not dense.isfinite().all():
        raise ModelError("the model gives NaN or Inf on the example: check its weights and the preprocessing")
    refused = {
        name: _unfit(module, name, "out")
        for name, module in twin.named_modules()
        if isinstance(module, nn.MultiheadAttention)
    }
    for name, module in twin.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise ModelError(
                f"layer {name!r} keeps no running statistics: the answer for an image depends on the rest of its "
                "batch, so no effect can be measured; use BatchNorm with track_running_stats=True"
            )
    graph = _graph(twin, x)
    candidates = _distinct(_sites(twin, graph, order, refused), refused)
    sites = _verified(twin, x, candidates, refused, "a trial cut did not give the logits of the masked model")
    if inserted:
        reason = (
            f"after a trial cut of its units what is inserted after {' or '.join(map(repr, inserted))} does not fit"
        )
        sites = _verified(whole, x, sites, refused, reason)
    if not sites:
        layer, reason = next(iter(refused.items()), ("", "it has no convolution or linear layer"))
        raise ModelError(f"nothing in this {type(model).__name__} can be cut safely; first, at {layer!r}: {reason}")
    return Found(tuple(sites), refused)


def _twin(model: nn.Module) -> nn.Module:
    """A copy on the CPU, in fp32 and eval mode, in which no normalisation or scale is at a neutral start value.

    A fresh BatchNorm (0, 1), a layer of zeros or a scale near zero would hide a wrong cut.
    """
    generator = torch.Generator().manual_seed(0)
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(_plain(parameter), requires_grad=True)
    for buffer in model.buffers():
        memo[id(buffer)] = _plain(buffer)
    twin = copy.deepcopy(model, memo).eval()
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.numel() == max(parameter.shape, default=1) or not parameter.any():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
        for module in twin.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                mean, var = module.running_mean, module.running_var
                if mean is not None and var is not None:
                    mean.add_(torch.randn(mean.shape, generator=generator), alpha=0.2)
                    var.mul_(0.5 + torch.rand(var.shape, generator=generator))
    return twin


def _plain(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().to("cpu", copy=True)
    return tensor.float() if tensor.is_floating_point() else tensor


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


class _Apart(tp.pruner.BasePruningFunc):  # type: ignore[misc]
    """Tells DepGraph that a layer's input and output units are independent."""

    def prune_out_channels(self, layer: nn.Module, idxs: list[int]) -> nn.Module:
        return layer

    def prune_in_channels(self, layer: nn.Module, idxs: list[int]) -> nn.Module:
        return layer

    def get_out_channels(self, layer: PadShortcut | AttentionCore) -> int:
        return sum(layer.widths) if isinstance(layer, AttentionCore) else layer.out_channels

    def get_in_channels(self, layer: PadShortcut | AttentionCore) -> int:
        return surgery.sizes(layer)["in"]


class _Opaque(torch.autograd.Function):
    """One node of the autograd graph where a layer would leave many, which DepGraph would try to read."""

    @staticmethod
    def forward(ctx: object, x: Tensor, out: Tensor) -> Tensor:
        return out.clone()


def _opaque(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: cast(Tensor, _Opaque.apply(x, forward(x.detach())))


def _graph(twin: nn.Module, x: Tensor) -> tp.DependencyGraph:
    graph = tp.DependencyGraph()
    opaque = [module for module in twin.modules() if isinstance(module, PadShortcut | AttentionCore)]
    try:
        for module in opaque:
            module.forward = _opaque(module.forward)  # type: ignore[method-assign, assignment]
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            return graph.build_dependency(
                twin,
                x,
                # Without it DepGraph first tries model(*x), and what ran before that failed counts as called twice.
                forward_fn=lambda model, batch: model(batch),
                customized_pruners={PadShortcut: _Apart(), AttentionCore: _Apart()},
                verbose=False,
            )
    except Exception as error:
        raise ModelError(
            f"{type(twin).__name__} cannot be traced ({_brief(error)}), so nothing in it can be cut safely: "
            "use another architecture"
        ) from error
    finally:
        for module in opaque:
            del module.forward


def _sites(twin: nn.Module, graph: tp.DependencyGraph, order: list[str], refused: dict[str, str]) -> list[Site]:
    """What DepGraph and we take for sites, by last producer; adds to `refused` what is plainly none."""
    layers = dict(twin.named_modules())
    names = {module: name for name, module in layers.items()}
    n_calls = Counter(order)
    shared = _shared(twin)
    first: dict[str, int] = {}
    for position, name in enumerate(order):
        first.setdefault(name, position)

    groups: list[tuple[list[Member], str]] = []
    done: set[str] = set()
    for name, module in layers.items():
        if isinstance(module, Attention) and f"{name}.core" in first:
            groups.append((_attention(name, module), ""))
            done.add(f"{name}.qkv")
    for name in first:
        module = layers[name]
        if not isinstance(module, nn.modules.conv._ConvNd | nn.Linear) or name in done:
            continue
        members, reason = _group(graph, names, name, module)
        done.update(member.module for member in members if member.side == "out")
        groups.append((members, reason))

    sites: list[tuple[int, Site]] = []
    for members, reason in groups:
        for name in (member.module for member in members):
            if n_calls[name] != 1:
                reason = reason or f"layer {name!r} is called {n_calls[name]} times in one pass, not once"
            elif name in shared:
                reason = reason or f"layer {name!r} shares its weights with another layer"
        if reason:
            refused[members[0].module] = reason
            continue
        members.sort(key=lambda member: first[member.module])
        producers = [member.module for member in members if member.side == "out"]
        layer = layers[producers[0]]
        kind: Kind = "channel"
        if isinstance(layer, nn.Linear):
            kind = "head" if any(isinstance(layers[m.module], AttentionCore) for m in members) else "hidden"
        site = Site(producers[0], kind, len(members[0].index), cast(int, axis_of(layer)), tuple(members))
        sites.append((first[producers[-1]], site))
    return [site for _, site in sorted(sites, key=lambda pair: pair[0])]


def _attention(name: str, module: Attention) -> list[Member]:
    """Inner dimension c of q, k and v together: rows c, D + c and 2D + c of qkv, column c of proj."""
    inner = sum(module.core.widths)
    thrice = tuple((c, inner + c, 2 * inner + c) for c in range(inner))
    once = tuple((c,) for c in range(inner))
    return [
        Member(f"{name}.qkv", "out", thrice, -1),
        Member(f"{name}.core", "in", thrice, -1),
        Member(f"{name}.proj", "in", once, -1),
    ]


def _group(
    graph: tp.DependencyGraph, names: Mapping[nn.Module, str], root: str, module: nn.Module
) -> tuple[list[Member], str]:
    """The members of the DepGraph group of a layer's outputs, and why it is no site ("" where it may be one)."""
    n_units = module.out_features if isinstance(module, nn.Linear) else cast(int, module.out_channels)
    alone = Member(root, "out", tuple((u,) for u in range(n_units)), cast(int, axis_of(module)))
    try:
        pruner = graph.get_pruner_of_module(module)
        group = graph.get_pruning_group(module, pruner.prune_out_channels, list(range(n_units)))
    except Exception as error:
        return [alone], f"the layers coupled to it cannot be traced ({_brief(error)})"
    members: list[Member] = []
    reason = ""
    for item in group:
        target = item.dep.target.module
        if isinstance(target, nn.Parameter):
            reason = reason or (
                f"its units meet the bare parameter {graph._param_to_name[target]!r} (in a transformer: the residual "
                "stream, whose token width is fixed)"
            )
        elif isinstance(target, tp.ops._OutputOp):
            reason = reason or "its units are the model's output"
        elif target in names:
            name = names[target]
            side: Literal["in", "out"] = "out" if graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
            owned: dict[int, list[int]] = defaultdict(list)
            for position, unit in zip(item.idxs, item.root_idxs, strict=True):
                owned[unit].append(position)
            reason = reason or _unfit(target, name, side)
            if sorted(owned) != list(range(n_units)):
                reason = reason or f"only some of its units reach layer {name!r}"
            axis = axis_of(target)
            if axis is not None:  # those without one are unfit
                members.append(Member(name, side, tuple(tuple(sorted(owned[u])) for u in range(n_units)), axis))
    if not any(member.side == "in" for member in members):
        reason = reason or "its units are the model's output"
    return members, reason


def _unfit(module: nn.Module, name: str, side: str) -> str:
    """Why a layer cannot lose units on a side, or ""."""
    try:
        if side in surgery.sizes(module):
            return ""
    except ModelError as error:
        return f"layer {name!r}: {error}"
    return f"layer {name!r} cannot lose units on side {side!r}"


def _shared(model: nn.Module) -> set[str]:
    """Names of the layers that hold a parameter another layer holds too."""
    owners: dict[int, set[str]] = defaultdict(set)
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)].add(name)
    return set(chain.from_iterable(who for who in owners.values() if len(who) > 1))


def _distinct(sites: list[Site], refused: dict[str, str]) -> list[Site]:
    """The sites that share no position of any layer with another."""
    owner: dict[tuple[str, str, int], Site] = {}
    clash: dict[Site, str] = {}
    for site in sites:
        for member in site.members:
            for position in chain.from_iterable(member.index):
                other = owner.setdefault((member.module, member.side, position), site)
                if other is not site:
                    clash[site] = clash[other] = member.module
    for site, module in clash.items():
        refused[site.layer] = f"another site owns the same positions of layer {module!r}"
    return [site for site in sites if site not in clash]


def _verified(twin: nn.Module, x: Tensor, sites: list[Site], refused: dict[str, str], reason: str) -> list[Site]:
    """The sites whose random cut gives the masked logits: all at once, and one by one only where that fails."""
    if not sites or _agrees(twin, x, sites):
        return sites
    good = []
    for site in sites:
        if _agrees(twin, x, [site]):
            good.append(site)
        else:
            refused[site.layer] = reason
    if good and not _agrees(twin, x, good):
        raise ModelError(f"cutting {good[0].layer!r} and other sites together does not give the masked logits")
    return good


def _agrees(twin: nn.Module, x: Tensor, sites: list[Site]) -> bool:
    """Whether two trial cuts give the masked logits; every unit goes in one of them, where a wrong member shows."""
    generator = torch.Generator().manual_seed(1)
    keep = {site: torch.rand(site.n_units, generator=generator) < 0.6 for site in sites}
    for kept in keep.values():
        kept[-1], kept[0] = False, True
    rest = {site: ~kept if site.n_units > 1 else kept for site, kept in keep.items()}
    return _cut_equals_masked(twin, x, Mask(keep)) and _cut_equals_masked(twin, x, Mask(rest))


def _cut_equals_masked(twin: nn.Module, x: Tensor, mask: Mask) -> bool:
    small = copy.deepcopy(twin)
    with torch.no_grad(), hooks.ablated(twin, mask):
        masked = twin(x)
    try:
        surgery.cut(small, mask)
        with torch.no_grad():
            cut = small(x)
    except Exception:  # whatever it is, the cut layers no longer fit each other
        return False
    return cut.shape == masked.shape and bool((cut - masked).abs().max() <= TOLERANCE * masked.abs().max())
