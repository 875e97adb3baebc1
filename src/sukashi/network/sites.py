"""Finds a model's sites: which parameter slices must be cut together, and which layers cannot be cut and why."""

from __future__ import annotations

import copy
import hashlib
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Literal, cast

import torch
from torch import Tensor, nn

from sukashi.core import progress
from sukashi.core.errors import ModelError, ResourceError, UsageError, brief, nearest
from sukashi.core.types import Kind, Mask, Member, Site
from sukashi.network import coupling, hooks, insert, surgery
from sukashi.network.canonical import answer, evaluating, is_compound
from sukashi.network.exclude import matching, remedy
from sukashi.network.layers import MAKERS, AttentionCore

# Of fp32 logits that should be equal; a wrong cut is off by 1e-2 and more.
TOLERANCE = 1e-4
# Seconds of processor time that the search may take.
PATIENCE = 300.0
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
    own = surgery.axis_of(module) if layer else 1
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
    own = surgery.axis_of(module)
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


def weights(model: nn.Module, exclude: Collection[str] = ()) -> tuple[Site, ...]:
    """The sites of single weights: one for each convolution and linear layer, in the model's order, but `exclude`.

    Biases and normalisation layers are left out, as Suwal et al. 2025, sec. 3.1, do.

    Raises ModelError for a name or pattern to exclude (see `exclude.matching`) of no such layer, where none is left,
    and for a layer that shares its weight with another, computes it, or does not put it to its plain use (a transposed
    convolution, one that standardises its weight): there a zero would not be what a mask takes it for.
    """
    layers = {name: module for name, module in insert.layers(model).items() if isinstance(module, MAKERS)}
    gone: set[str] = set()
    for name in exclude:
        named = matching(name, layers)
        if not named:
            raise ModelError(f"no convolution or linear layer {name!r} to exclude{nearest(name, layers)}")
        gone.update(named)
    layers = {name: module for name, module in layers.items() if name not in gone}
    twice = _shared(model)
    if shared := [name for name in layers if name in twice]:
        raise ModelError(f"layer {shared[0]!r} shares its weights with another: {_remedy(shared, layers)}")
    own = [name for name, module in layers.items() if not _is_plain(module)]
    if own:
        raise ModelError(
            f"layer {own[0]!r}, a {type(layers[own[0]]).__name__}, does something of its own with its weight or its "
            f"input, so a weight of zero may not be a connection less: {_remedy(own, layers)}"
        )
    if not layers:
        raise ModelError("no convolution or linear layer is left whose weights could be removed: exclude fewer")
    return tuple(Site(name, "weight", module.weight.numel(), 0) for name, module in layers.items())


def _is_plain(layer: nn.Module) -> bool:
    """Whether each entry of a layer's weight is a connection, and nothing computes it."""
    return (type(layer).forward in _PLAIN or is_compound(layer)) and "weight" in layer._parameters


def _remedy(refused: Sequence[str], layers: Collection[str]) -> str:
    return remedy(refused, (name for name in layers if name not in refused))


@dataclass(frozen=True)
class Found:
    """A model's sites in execution order of their last producer, and {layer: why its units are no site}."""

    sites: tuple[Site, ...]
    refused: Mapping[str, str]


def find(model: nn.Module, example: Tensor) -> Found:
    """The sites of a model whose attention is explicit, seen through one forward pass of `example` (B, C, H, W).

    What is coupled is read off labels that move with values (see `coupling`), which is not trusted: the sites are cut
    at random in a copy whose normalisation is made random, on two images and noise that reaches further, and those
    whose cut does not give the masked logits are refused. What is inserted has no sites, and those it would not fit
    after a cut are refused. Every other convolution and linear layer is refused with its reason. Works on a copy on the
    CPU: the model is left alone.

    Raises ModelError where the model cannot be copied or run, gives no finite tensor, or nothing can be cut;
    ResourceError where the search takes more than PATIENCE seconds of processor time.
    """
    stop = time.process_time() + PATIENCE
    try:
        twin = _twin(model)
        x = example[:2].detach().cpu().float()
        with torch.no_grad():
            dense = twin(x)
            whole = copy.deepcopy(twin) if any(isinstance(m, insert.Inserted) for m in twin.modules()) else twin
            inserted = insert.remove(twin)
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} does not run on an example of shape {tuple(example.shape)} in a copy on the CPU "
            f"({brief(error)}): give the shape it expects"
        ) from error
    if not isinstance(dense, Tensor):
        raise ModelError(f"the model gives a {type(dense).__name__}: it must give one tensor of logits; wrap it")
    if not dense.isfinite().all():
        raise ModelError("the model gives NaN or Inf on the example: check its weights and the preprocessing")
    refused = {
        name: surgery.unfit(module, name)
        for name, module in twin.named_modules()
        if isinstance(module, nn.MultiheadAttention)
    }
    for name, module in twin.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise ModelError(
                f"layer {name!r} keeps no running statistics: the answer for an image depends on the rest of its "
                "batch, so no effect can be measured; use BatchNorm with track_running_stats=True"
            )
    layers, trace = dict(twin.named_modules()), coupling.traced(twin, x)
    candidates = _whole(_sites(twin, trace, refused), layers, refused)
    trial = _Trial(twin, torch.cat([x, _noise(x)]), refused, stop)
    sites = trial.right(candidates)
    if inserted:
        reason = (
            f"after a trial cut of its units what is inserted after {' or '.join(map(repr, inserted))} does not fit"
        )
        sites = replace(trial, twin=whole).right(sites, reason)
    _name_the_rest(twin, sites, trace, refused)
    if not sites:
        layer, reason = _telling(refused)
        raise ModelError(f"nothing in this {type(model).__name__} can be cut safely; first, at {layer!r}: {reason}")
    return Found(tuple(sites), refused)


def without(found: Found, exclude: Collection[str]) -> Found:
    """The same without the sites of some layers, each named by any layer that makes the site's units, or by a pattern.

    Raises UsageError for a name or pattern (see `exclude.matching`) of no layer that makes a site's units, and where no
    site is left.
    """
    makers = {member.module: site for site in found.sites for member in site.producers}
    gone = set()
    for name in exclude:
        named = matching(name, makers)
        if not named and (idle := matching(name, found.refused)):
            raise UsageError(f"nothing of layer {idle[0]!r} would be cut ({found.refused[idle[0]]}): do not exclude it")
        if not named:
            raise UsageError(f"no site has a layer {name!r} to exclude{nearest(name, makers)}")
        gone |= {makers[layer] for layer in named}
    if len(gone) == len(found.sites):
        raise UsageError("no site is left: exclude fewer layers")
    left = {member.module: "it is excluded" for site in gone for member in site.producers}
    return Found(tuple(site for site in found.sites if site not in gone), {**found.refused, **left})


def _name_the_rest(twin: nn.Module, sites: list[Site], trace: coupling.Trace, refused: dict[str, str]) -> None:
    """Leave no convolution or linear layer without a site or a reason."""
    owned = {member.module for site in sites for member in site.producers}
    for name, module in twin.named_modules():
        if isinstance(module, MAKERS) and name not in owned and name not in refused:
            refused[name] = trace.others.get(name, "no pass calls it where hooks can see it")


def _telling(refused: Mapping[str, str]) -> tuple[str, str]:
    """The first layer and reason that say more than that a network has an end."""
    ends = "its units are the model's output"
    told = [pair for pair in refused.items() if pair[1] != ends]
    return next(iter(told or refused.items()), ("", "it has no convolution or linear layer"))


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
    for module in model.modules():
        for tensor in _tensors(vars(module)):
            memo.setdefault(id(tensor), _plain(tensor))
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


def _noise(x: Tensor) -> Tensor:
    """(1, C, H, W) noise of three times what images x reach: dull ones would hide what couples units by a little."""
    drawn = torch.randn(x[:1].shape, generator=torch.Generator().manual_seed(2))
    return 3 * drawn * x.abs().max().clamp(min=1)


def _tensors(kept: object) -> Iterator[Tensor]:
    """The tensors that a module keeps aside, which are often results that can't be copied by themselves."""
    if isinstance(kept, Tensor):
        yield kept
    elif isinstance(kept, Mapping | list | tuple):
        for part in kept.values() if isinstance(kept, Mapping) else kept:
            yield from _tensors(part)


def _plain(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().to("cpu", copy=True)
    return tensor.float() if tensor.is_floating_point() else tensor


def _sites(twin: nn.Module, trace: coupling.Trace, refused: dict[str, str]) -> list[Site]:
    """What the trace takes for sites, by last producer; adds to `refused` what is plainly none."""
    layers = dict(twin.named_modules())
    n_calls, shared = Counter(trace.calls), _shared(twin)
    first = {name: position for position, name in reversed(list(enumerate(trace.calls)))}
    sites: list[tuple[int, Site]] = []
    for group in trace.groups:
        reason = group.reason
        for name, _ in group.places:
            # A table of biases is asked by another name than forward.
            unseen = n_calls[name] == 0 and surgery.heads(layers[name])
            if n_calls[name] != 1 and not unseen:
                reason = reason or f"layer {name!r} is called {n_calls[name]} times in one pass, not once"
            elif name in shared:
                reason = reason or f"layer {name!r} shares its weights with another layer"
        if reason:
            _refuse(group.places, reason, layers, refused)
            continue
        site = _site(group, layers, first)
        sites.append((max(first.get(member.module, -1) for member in site.producers), site))
    return [site for _, site in sorted(sites, key=lambda pair: pair[0])]


def _site(group: coupling.Group, layers: Mapping[str, nn.Module], first: Mapping[str, int]) -> Site:
    members = [
        Member(name, side, tuple(map(tuple, index)), surgery.axis_of(layers[name]) or -1)
        for (name, side), index in group.places.items()
    ]
    # An attention is called before the layers inside that make its heads.
    begin = first[group.root]
    late = {member.module: surgery.heads(layers[member.module]) > 0 for member in members}
    members.sort(key=lambda member: (begin, 1) if late[member.module] else (first[member.module], 0))
    producers = [member.module for member in members if member.side == "out"]
    layer = layers[producers[0]]
    kind: Kind = "channel"
    if isinstance(layer, nn.Linear):
        attended = any(isinstance(layers[m.module], AttentionCore) or surgery.heads(layers[m.module]) for m in members)
        kind = "head" if attended else "hidden"
    return Site(producers[0], kind, group.n_units, cast(int, surgery.axis_of(layer)), tuple(members))


def _refuse(
    places: Iterable[tuple[str, str]], reason: str, layers: Mapping[str, nn.Module], refused: dict[str, str]
) -> None:
    """Give every convolution and linear layer that makes the units the reason."""
    for name, side in places:
        if side == "out" and isinstance(layers[name], MAKERS):
            refused.setdefault(name, reason)


def _at(site: Site, layer: str, layers: Mapping[str, nn.Module]) -> bool:
    """Whether a site has members at a layer, or heads in the same kind of attention."""
    alike = type(layers[layer]) if layer and surgery.heads(layers[layer]) else ()
    return any(member.module == layer or isinstance(layers[member.module], alike) for member in site.members)


def _shared(model: nn.Module) -> set[str]:
    """Names of the layers that hold a parameter another layer holds too."""
    owners: dict[int, set[str]] = defaultdict(set)
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)].add(name)
    return set(chain.from_iterable(who for who in owners.values() if len(who) > 1))


def _whole(sites: list[Site], layers: Mapping[str, nn.Module], refused: dict[str, str]) -> list[Site]:
    """The sites whose layers' outputs are theirs alone, or shared out among them."""
    owned = Counter(
        member.module for site in sites for member in site.producers for _ in chain.from_iterable(member.index)
    )
    partly = {name for name, n in owned.items() if n < surgery.sizes(layers[name])["out"]}
    partly = {name for name in partly if isinstance(layers[name], MAKERS)}
    good = []
    for site in sites:
        part = next((member.module for member in site.producers if member.module in partly), None)
        if part is None:
            good.append(site)
        else:
            reason = f"it has only some of the units of layer {part!r}, whose others cannot be cut"
            _refuse(((m.module, m.side) for m in site.members), reason, layers, refused)
    return good if len(good) == len(sites) else _whole(good, layers, refused)


@dataclass(frozen=True)
class _Trial:
    """Trial cuts in a copy of the model; they stop where the search has taken too long."""

    twin: nn.Module
    x: Tensor
    refused: dict[str, str]
    stop: float

    def right(self, sites: list[Site], reason: str = "") -> list[Site]:
        """The sites whose random cuts give the masked logits, all together; the others are refused.

        Where a cut fails, those at layers like the one that did not fit are tried after the others, or else halves one
        after the other, each together with what has been found right before.
        """
        layers = dict(self.twin.named_modules())
        good: list[Site] = []
        blocks, done = [sites] if sites else [], 0
        with progress.task("finding what can be cut", len(sites)) as shown:
            while blocks:
                shown.advance(len(sites) - sum(map(len, blocks)) - done)
                done = len(sites) - sum(map(len, blocks))
                block = blocks.pop()
                fault, layer = self.fault([*good, *block])
                suspects = [site for site in block if _at(site, layer, layers)]
                if not fault:
                    good += block
                elif 0 < len(suspects) < len(block):
                    blocks += [suspects, [site for site in block if site not in suspects]]
                elif len(block) > 1:
                    middle = len(block) // 2
                    blocks += [block[middle:], block[:middle]]
                else:
                    places = [(member.module, member.side) for member in block[0].members]
                    why = reason or f"its trial cut does not give the logits of the masked model ({fault})"
                    _refuse(places, why, layers, self.refused)
        return [site for site in sites if site in good]

    def fault(self, sites: list[Site]) -> tuple[str, str]:
        """What is wrong with two trial cuts and at which layer, or "": every unit goes in one of them."""
        if time.process_time() > self.stop:
            raise ResourceError(
                f"the search for what can be cut was given up after {PATIENCE:.0f} seconds of processor time: give "
                "smaller images, or a smaller network of the family"
            )
        generator = torch.Generator().manual_seed(1)
        keep = {site: torch.rand(site.n_units, generator=generator) < 0.6 for site in sites}
        for kept in keep.values():
            kept[-1], kept[0] = False, True
        rest = {site: ~kept for site, kept in keep.items()}
        first = self._off(Mask(keep))
        return first if first[0] else self._off(Mask(rest))

    def _off(self, mask: Mask) -> tuple[str, str]:
        """How the cut network differs from the masked one, or "", and the layer at which it broke, or ""."""
        path: list[str] = []
        try:
            small = copy.deepcopy(self.twin)
            with torch.no_grad(), hooks.ablated(self.twin, mask):
                masked = self.twin(self.x)
            surgery.cut(small, mask)
            enter = lambda name, module: path.append(name)  # noqa: E731
            with torch.no_grad(), hooks.followed(small, enter, lambda name, *_: path.remove(name)):
                cut = small(self.x)
        except Exception as error:  # whatever it is, the cut layers no longer fit each other
            return brief(error), path[-1] if path else ""
        if cut.shape != masked.shape:
            return f"logits of shape {tuple(cut.shape)}", ""
        off = (cut - masked).abs().max()
        return "" if off <= TOLERANCE * masked.abs().max() else f"logits are {float(off):.1e} apart", ""
