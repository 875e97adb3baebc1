"""Finds a model's sites: which parameter slices must be cut together, and which layers cannot be cut and why."""

from __future__ import annotations

import copy
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain

import torch
import torch_pruning as tp
from torch import Tensor, nn

from sukashi import hooks, surgery
from sukashi.errors import ModelError
from sukashi.layers import Attention, AttentionCore, PadShortcut
from sukashi.types import Mask, Member, Site

# Of fp32 logits that should be equal; a wrong cut is off by 1e-2 and more.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Found:
    """A model's sites in execution order of their last producer, and {layer: why its units are no site}."""

    sites: tuple[Site, ...]
    refused: Mapping[str, str]


def find(model: nn.Module, example: Tensor) -> Found:
    """The sites of a model whose attention is explicit, seen through one forward pass of `example` (B, C, H, W).

    Coupled layers are those of DepGraph (Fang et al. 2023), with shortcuts of option A and attention followed by
    ourselves. DepGraph is not trusted: the sites are cut at random in a copy whose normalisation is made random, and
    those whose cut does not give the masked logits are refused. Works on a copy on the CPU: the model is left alone.

    Raises ModelError where the model cannot be traced, gives no finite tensor of logits, or has nothing to cut.
    """
    twin = _twin(model)
    x = example[:2].detach().cpu().float()
    with torch.no_grad():
        dense = twin(x)
    if not isinstance(dense, Tensor):
        raise ModelError(f"the model gives a {type(dense).__name__}: it must give one tensor of logits; wrap it")
    if not dense.isfinite().all():
        raise ModelError("the model gives NaN or Inf on the example: check its weights and the preprocessing")
    order = hooks.calls(twin, x)
    sites, refused = _trace(twin, x, order)
    sites = _distinct(sites, refused)
    sites = _verified(twin, x, sites, refused)
    if not sites:
        layer, reason = next(iter(refused.items()), ("", "it has no convolution or linear layer"))
        raise ModelError(f"nothing in this model can be cut safely; first, {layer!r}: {reason}")
    return Found(tuple(sites), refused)


def _twin(model: nn.Module) -> nn.Module:
    """A copy on the CPU, in fp32 and eval mode, in which no normalisation or scale is at a neutral start value.

    A fresh BatchNorm (0, 1) or a scale of 0 would hide a wrong cut.
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
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        for module in twin.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                module.running_mean += 0.2 * torch.randn(module.running_mean.shape, generator=generator)
                module.running_var *= 0.5 + torch.rand(module.running_mean.shape, generator=generator)
    return twin


def _plain(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().to("cpu", copy=True)
    return tensor.float() if tensor.is_floating_point() else tensor


class _Apart(tp.pruner.BasePruningFunc):  # type: ignore[misc]
    """Tells DepGraph that a layer's input and output units are independent."""

    def prune_out_channels(self, layer: nn.Module, idxs: list[int]) -> nn.Module:
        return layer

    def prune_in_channels(self, layer: nn.Module, idxs: list[int]) -> nn.Module:
        return layer

    def get_out_channels(self, layer: nn.Module) -> int:
        return surgery._sizes(layer)[1]

    def get_in_channels(self, layer: nn.Module) -> int:
        return surgery._sizes(layer)[0]


class _Opaque(torch.autograd.Function):
    """One node of the autograd graph where a layer would leave many, which DepGraph would try to read."""

    @staticmethod
    def forward(ctx: object, x: Tensor, out: Tensor) -> Tensor:
        return out.clone()


def _opaque(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: _Opaque.apply(x, forward(x.detach()))  # type: ignore[no-any-return]


def _trace(twin: nn.Module, x: Tensor, order: list[str]) -> tuple[list[Site], dict[str, str]]:
    names = {module: name for name, module in twin.named_modules()}
    layers = dict(twin.named_modules())
    n_calls = Counter(order)
    first = {name: position for position, name in reversed(list(enumerate(order)))}
    shared = _shared(twin)
    opaque = [module for module in twin.modules() if isinstance(module, PadShortcut | AttentionCore)]
    graph = tp.DependencyGraph()
    try:
        for module in opaque:
            module.forward = _opaque(module.forward)  # type: ignore[method-assign, assignment]
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            graph.build_dependency(
                twin,
                x,
                forward_fn=lambda model, batch: model(batch),
                customized_pruners={PadShortcut: _Apart(), AttentionCore: _Apart()},
                verbose=False,
            )
    except Exception as error:
        raise ModelError(
            f"{type(twin).__name__} cannot be traced ({type(error).__name__}: {error}): nothing in it can be cut safely"
        ) from error
    finally:
        for module in opaque:
            del module.forward

    groups: list[tuple[int, list[Member], str]] = []  # number of units, members, reason to refuse or ""
    done: set[str] = set()
    for name, module in layers.items():
        if isinstance(module, Attention) and n_calls[f"{name}.core"]:
            n_units = sum(module.core.widths)
            unit = range(n_units)
            thrice = tuple((c, n_units + c, 2 * n_units + c) for c in unit)
            members = [
                Member(f"{name}.qkv", "out", thrice),
                Member(f"{name}.core", "in", thrice),
                Member(f"{name}.proj", "in", tuple((c,) for c in unit)),
            ]
            groups.append((n_units, members, ""))
            done.add(f"{name}.qkv")
    for name in order:
        module = layers[name]
        if name in done or module not in graph.module2node:
            continue
        if not isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
            continue
        n_units = surgery._sizes(module)[1]
        try:
            pruner = graph.get_pruner_of_module(module)
            group = graph.get_pruning_group(module, pruner.prune_out_channels, list(range(n_units)))
            members, reason = _members(graph, group, n_units, names)
        except Exception as error:
            members, reason = [], f"its coupled layers cannot be traced ({type(error).__name__}: {error})"
        if not any(member.module == name for member in members):
            members.insert(0, Member(name, "out", tuple((u,) for u in range(n_units))))
        done.update(member.module for member in members if member.side == "out")
        groups.append((n_units, members, reason))

    sites: list[tuple[int, Site]] = []
    refused: dict[str, str] = {}
    for n_units, members, reason in groups:
        members.sort(key=lambda member: first.get(member.module, -1))
        producers = [member.module for member in members if member.side == "out"]
        for member in members:
            if n_calls[member.module] > 1:
                reason = reason or f"layer {member.module!r} is called {n_calls[member.module]} times in one pass"
            if member.module in shared:
                reason = reason or f"layer {member.module!r} shares its weights with another layer"
        if reason:
            refused[producers[0]] = reason
            continue
        layer = layers[producers[0]]
        head = any(isinstance(layers[member.module], AttentionCore) for member in members)
        linear = isinstance(layer, nn.Linear)
        site = Site(
            producers[0],
            "head" if head else "hidden" if linear else "channel",
            n_units,
            -1 if linear else 1,
            tuple(members),
        )
        sites.append((first[producers[-1]], site))
    return [site for _, site in sorted(sites, key=lambda pair: pair[0])], refused


def _members(
    graph: tp.DependencyGraph, group: tp.dependency.Group, n_units: int, names: Mapping[nn.Module, str]
) -> tuple[list[Member], str]:
    """The members of a DepGraph group, and why it is no site ("" where it is one)."""
    members: list[Member] = []
    reason = ""
    for item in group:
        module = item.dep.target.module
        if isinstance(module, nn.Parameter):
            reason = reason or (
                f"its units run into the bare parameter {graph._param_to_name[module]!r} (in a transformer the residual "
                "stream, whose token width is fixed)"
            )
            continue
        if module not in names:
            if isinstance(module, tp.ops._OutputOp):
                reason = "its units are the model's output"
            continue
        side = "out" if graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
        owned: dict[int, list[int]] = defaultdict(list)
        for position, unit in zip(item.idxs, item.root_idxs, strict=True):
            owned[unit].append(position)
        name = names[module]
        reason = reason or _unfit(module, name, side)
        if sorted(owned) != list(range(n_units)):
            reason = reason or f"only some of its units reach layer {name!r}"
        members.append(Member(name, side, tuple(tuple(sorted(owned[u])) for u in range(n_units))))
    if not any(member.side == "in" for member in members):
        reason = reason or "its units are the model's output"
    return members, reason


def _unfit(module: nn.Module, name: str, side: str) -> str:
    """Why a layer cannot lose units, or ""."""
    match module:
        case nn.LayerNorm() | nn.GroupNorm():
            return f"layer {name!r} normalises over its units ({type(module).__name__}): fewer of them change the rest"
        case nn.MultiheadAttention():
            return f"layer {name!r} is a fused MultiheadAttention: write it out with layers.explicit_attention first"
        case nn.modules.conv._ConvTransposeNd():
            return f"layer {name!r} is a transposed convolution, which is not supported"
        case nn.modules.conv._ConvNd() if module.groups > 1:
            if not module.groups == module.in_channels == module.out_channels:
                return f"layer {name!r} is a grouped convolution ({module.groups} groups): its groups must stay equal"
        case nn.modules.conv._ConvNd() | nn.Linear() | nn.modules.batchnorm._BatchNorm() | PadShortcut():
            return ""
        case AttentionCore():
            return f"layer {name!r} reads units of another layer than its own qkv"
        case _:
            return f"layer {name!r} is a {type(module).__name__}, which is not supported"
    return ""


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


def _verified(twin: nn.Module, x: Tensor, sites: list[Site], refused: dict[str, str]) -> list[Site]:
    """The sites whose random cut gives the masked logits: all at once, and one by one only where that fails."""
    if not sites or _agrees(twin, x, sites):
        return sites
    good = []
    for site in sites:
        if _agrees(twin, x, [site]):
            good.append(site)
        else:
            refused[site.layer] = "a trial cut did not give the logits of the masked model"
    if good and not _agrees(twin, x, good):
        raise ModelError(f"cutting {good[0].layer!r} and other sites together does not give the masked logits")
    return good


def _agrees(twin: nn.Module, x: Tensor, sites: list[Site]) -> bool:
    generator = torch.Generator().manual_seed(1)
    keep = {site: torch.rand(site.n_units, generator=generator) < 0.6 for site in sites}
    for kept in keep.values():
        kept[0] = True
    small = copy.deepcopy(twin)
    with torch.no_grad(), hooks.masked(twin, keep):
        masked = twin(x)
    try:
        surgery.cut(small, Mask(keep))
        with torch.no_grad():
            cut = small(x)
    except (RuntimeError, IndexError, ValueError):  # the cut layers no longer fit each other
        return False
    return cut.shape == masked.shape and bool((cut - masked).abs().max() <= TOLERANCE * masked.abs().max())
