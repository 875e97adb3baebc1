"""Masks and taps at a model's sites: the only file that registers hooks, and it always removes them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sukashi.core.errors import ModelError, UsageError
from sukashi.core.types import Mask, Member, Site
from sukashi.network.layers import AttentionCore


@contextmanager
def masked(model: nn.Module, gates: Mask | Mapping[Site, Tensor]) -> Iterator[None]:
    """Inside, each unit is multiplied by its gate wherever it is read; a gate of 0 is what cutting the unit gives.

    A gate is (U,), or (B, U) with one row an image; bool or float, and differentiable. It acts on the consumers'
    inputs, because a zeroed convolution leaves its BatchNorm as beta - gamma * mu / sigma and not zero.

    Raises UsageError where a gate's shape does not fit its site.
    """
    gates = gates.keep if isinstance(gates, Mask) else gates
    readers: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = defaultdict(list)
    for site, gate in gates.items():
        if gate.dim() not in (1, 2) or gate.shape[-1] != site.n_units:
            raise UsageError(
                f"the gate of site {site.layer!r} has shape {tuple(gate.shape)}: give ({site.n_units},) or "
                f"(images, {site.n_units})"
            )
        for member in _readers(site):
            units, positions = _flat(member)
            readers[member.module].append((gate, units, positions))
    with _pre_hooks(model, {name: partial(_multiply, name, parts) for name, parts in readers.items()}):
        yield


@contextmanager
def tapped(model: nn.Module, sites: Sequence[Site]) -> Iterator[dict[Site, list[Tensor]]]:
    """What each site holds in the latest pass, {site: tensors (B, N, positions...)}, attached to the graph.

    A site with consumers is taken at what each of them reads, each read on its own: the gradient there leaves the other
    readers out. Attention is read at its core, not again at proj. A site without consumers (a tap) is taken
    at the output of its layer, and the input site ("") at what the model is given. The axis of the units is moved to
    place 1, with all N positions of the layer; `gather` picks the site's. Works where nothing else requires a gradient.

    Raises UsageError where a site's kind has no activations; in the pass ModelError for a layer that is not called
    exactly once, gives no tensor, has another number of rows than there are images, or reads what is overwritten later.
    """
    for site, times in Counter(sites).items():
        if times > 1:
            raise UsageError(f"site {site.layer!r} is given twice: a layer's tap and its site are taken in two passes")
    seen: dict[Site, list[Tensor]] = {site: [] for site in sites}
    holders: dict[tuple[str, str], list[tuple[Site, int]]] = defaultdict(list)
    for site in sites:
        if site.kind not in ("pixel", "channel", "hidden", "head"):
            raise UsageError(
                f"site {site.layer!r} is of kind {site.kind!r}, which holds no activations: give pixels, channels, "
                "hidden units or attention heads"
            )
        for slot, place in enumerate(_places(site)):
            holders[place.module, place.side].append((site, slot))
    n_calls: Counter[tuple[str, str]] = Counter()
    versions: dict[str, tuple[Tensor, int]] = {}
    n_rows = 0

    def start(module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal n_rows
        n_calls.clear()
        versions.clear()
        n_rows = len(args[0])
        seen.update({site: [torch.empty(0)] * len(_places(site)) for site in sites})

    def keep(place: tuple[str, str], axis: int, x: Tensor) -> Tensor:
        """x with the units' axis at place 1, kept for the place's sites; what goes on must come from it."""
        n_calls[place] += 1
        x = x.movedim(axis, 1)
        if torch.is_grad_enabled() and not x.requires_grad:
            x.requires_grad_()
        for site, slot in holders[place]:
            seen[site][slot] = x
        return x.movedim(1, axis)

    def check(name: str, x: Any) -> None:
        if not isinstance(x, Tensor) or len(x) != n_rows:
            what = f"{len(x)} rows for {n_rows} images" if isinstance(x, Tensor) else f"a {type(x).__name__}"
            raise ModelError(f"layer {name!r} holds {what}: single images cannot be told apart there")

    def read(name: str, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = _read(name, args)
        check(name, x)
        # A view is a node of its own in the graph and takes no memory; `finish` sees whether it was overwritten.
        kept = keep((name, "in"), channel_axis(module), x.view_as(x))
        versions[name] = (kept, kept._version)
        # The images are small, and a first layer that works in place may do so on a copy.
        return kept if name else kept.clone(), *args[1:]

    def write(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor:
        check(name, output)
        # The next layer gets a copy, for it may work in place; so may others on an input that is given on.
        if output.untyped_storage().data_ptr() == _read(name, args).untyped_storage().data_ptr():
            output = output.clone()
        return keep((name, "out"), holders[name, "out"][0][0].axis, output).clone()

    def finish(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for place in holders:
            if n_calls[place] != 1:
                raise ModelError(
                    f"layer {place[0]!r} is called {n_calls[place]} times in one pass where hooks can see it, not "
                    "once: leave its site out"
                )
        for name, (kept, version) in versions.items():
            if kept._version != version:
                raise ModelError(
                    f"what layer {name!r} reads is overwritten in place later in the pass: leave its site out, or take "
                    "a form of the network that does not"
                )
        versions.clear()

    handles = [model.register_forward_pre_hook(start)]
    try:
        for name, side in holders:
            module = _layer(model, name)
            if side == "in":
                handles.append(module.register_forward_pre_hook(partial(read, name)))
            else:
                handles.append(module.register_forward_hook(partial(write, name)))
        handles.append(model.register_forward_hook(finish))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def gather(site: Site, tensors: Sequence[Tensor]) -> Tensor:
    """The units of a site, (B, U, positions...), out of tensors shaped like those of `tapped`.

    Values, gradients and relevances alike. A single tensor in which each unit has one position keeps its other axes:
    (B, U, H, W) of a convolution, (B, U, T) of tokens, (B, U) of vectors. Otherwise everything a unit has, in all
    tensors, is flattened into one axis: (B, U, P).
    """
    parts = []
    for place, tensor in zip(_places(site), tensors, strict=True):
        _, positions = _flat(place)
        if not torch.equal(positions, torch.arange(tensor.shape[1])):
            tensor = tensor.index_select(1, positions.to(tensor.device))
        parts.append(tensor)
    if len(parts) == 1 and parts[0].shape[1] == site.n_units:
        return parts[0]
    return torch.cat([part.reshape(len(part), site.n_units, -1) for part in parts], 2)


@contextmanager
def read_by(model: nn.Module, layer: str) -> Iterator[list[Tensor]]:
    """What a layer reads: a list that holds its input in the latest call."""
    read: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
        read[:] = [args[0].detach()]

    with _pre_hooks(model, {layer: keep}):
        yield read


@contextmanager
def visited(model: nn.Module, visit: Mapping[str, Callable[[Tensor], None]]) -> Iterator[None]:
    """Inside, {layer: visitor}: each visitor is given what its layer reads, call after call.

    In the pass ModelError for a layer that is called by another keyword than `input`, torch's own.
    """

    def show(name: str, module: nn.Module, args: tuple[Any, ...], more: dict[str, Any]) -> None:
        named = (more["input"],) if "input" in more else ()
        visit[name](_read(name, args or named).detach())

    with _pre_hooks(model, {name: partial(show, name) for name in visit}, keywords=True):
        yield


def calls(model: nn.Module, x: Tensor) -> list[str]:
    """The names of all layers in the order a forward pass calls them, as often as it does."""
    order: list[str] = []

    def note(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        order.append(name)

    with _pre_hooks(model, {name: partial(note, name) for name, _ in model.named_modules() if name}):
        model(x)
    return order


def channel_axis(module: nn.Module) -> int:
    """The axis of a consumer's input on which the units lie."""
    return -1 if isinstance(module, nn.Linear | AttentionCore) else 1


@contextmanager
def _pre_hooks(model: nn.Module, hooks: Mapping[str, Any], keywords: bool = False) -> Iterator[None]:
    handles: list[RemovableHandle] = []
    try:
        for name, hook in hooks.items():
            handles.append(model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=keywords))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _read(name: str, args: tuple[Any, ...]) -> Tensor:
    """What a layer reads: its only positional argument."""
    if not args:
        raise ModelError(
            f"layer {name!r} is called by keyword: call it as layer(x), so that what it reads can be masked"
        )
    return cast(Tensor, args[0])


def _layer(model: nn.Module, name: str) -> nn.Module:
    """A layer by name; a canonical form has none of those that the model never calls, or more than once."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ModelError(f"no layer {name!r} is called exactly once in a pass: leave its site out") from None


def _readers(site: Site) -> tuple[Member, ...]:
    """The consumers that see the units first: in attention the core, for what proj reads comes out of it alone."""
    return site.consumers[:1] if site.kind == "head" else site.consumers


def _places(site: Site) -> tuple[Member, ...]:
    """Where a site is taken: its readers, or its layer's output, or the model's input."""
    if site.consumers:
        return _readers(site)
    written = [member for member in site.producers if member.module == site.layer]
    side: Literal["in", "out"] = "out" if site.layer else "in"
    return tuple(written[:1]) or (Member(site.layer, side, tuple((u,) for u in range(site.n_units))),)


def _flat(member: Member) -> tuple[Tensor, Tensor]:
    """Owning unit and position, one entry for each position of the member."""
    units = torch.tensor([unit for unit, positions in enumerate(member.index) for _ in positions], dtype=torch.long)
    return units, torch.tensor([p for positions in member.index for p in positions], dtype=torch.long)


def _multiply(
    name: str, parts: list[tuple[Tensor, Tensor, Tensor]], module: nn.Module, args: tuple[Any, ...]
) -> tuple[Any, ...]:
    x = _read(name, args)
    axis = channel_axis(module) % x.dim()
    n_rows = max(gate.shape[0] if gate.dim() == 2 else 1 for gate, _, _ in parts)
    if n_rows not in (1, len(x)):
        raise ModelError(f"{name!r} reads {len(x)} rows for {n_rows} images: gates for single images do not fit there")
    # Built anew in each pass: a graph shared by two passes could be walked backward only once.
    gate_BC = x.new_ones(n_rows, x.shape[axis])
    for gate, units, positions in parts:
        values = gate.to(x)[..., units.to(x.device)].expand(n_rows, -1)
        gate_BC = gate_BC.index_copy(1, positions.to(x.device), values)
    shape = [n_rows] + [1] * (x.dim() - 1)
    shape[axis] = x.shape[axis]
    return (x * gate_BC.view(shape), *args[1:])
