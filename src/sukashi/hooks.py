"""Masks and recordings at a model's sites: the only file that registers hooks, and it always removes them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sukashi.errors import ModelError, UsageError
from sukashi.layers import AttentionCore
from sukashi.types import Mask, Member, Site


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
        # What proj reads comes out of the core alone: gated there too, v would be multiplied by the gate twice.
        cores = [m for m in site.consumers if isinstance(model.get_submodule(m.module), AttentionCore)]
        for member in cores or site.consumers:
            units, positions = _flat(member)
            readers[member.module].append((gate, units, positions))
    with _pre_hooks(model, {name: partial(_multiply, name, parts) for name, parts in readers.items()}):
        yield


@contextmanager
def record(model: nn.Module, sites: Sequence[Site]) -> Iterator[dict[Site, dict[str, Tensor]]]:
    """What the consumers of each site read in the latest forward pass: {site: {consumer's name: activations}}.

    Activations keep the consumer's axes, cut down to the positions the site owns, unit after unit; they stay attached
    to the graph.
    """
    seen: dict[Site, dict[str, Tensor]] = {site: {} for site in sites}
    readers: dict[str, list[tuple[Site, Tensor]]] = defaultdict(list)
    for site in sites:
        for member in site.consumers:
            readers[member.module].append((site, _flat(member)[1]))

    def keep(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0]
        for site, positions in readers[name]:
            seen[site][name] = x.index_select(channel_axis(module), positions.to(x.device))

    with _pre_hooks(model, {name: partial(keep, name) for name in readers}):
        yield seen


@contextmanager
def tapped(model: nn.Module, sites: Sequence[Site]) -> Iterator[dict[Site, list[Tensor]]]:
    """What is read at each site in the latest forward pass: {site: tensors}, each with the units on axis 1.

    One tensor a consumer, in their order: a clone, which the consumer then reads, so that a gradient with respect to it
    leaves the other readers out. An attention core stands for its projection too, as in `masked`. A site without
    consumers is a tap, one tensor a producer: its output. The input site is what the model reads. The tensors stay
    attached to the graph; a backward pass with respect to them all serves every site.
    """
    seen: dict[Site, list[Tensor]] = {site: [torch.empty(0)] * len(_readings(site)) for site in sites}
    reads: dict[str, list[tuple[Site, int]]] = defaultdict(list)
    outputs: dict[str, list[tuple[Site, int]]] = defaultdict(list)
    for site in sites:
        for number, (name, side) in enumerate(_readings(site)):
            (reads if side == "in" else outputs)[name].append((site, number))

    def keep(places: list[tuple[Site, int]], axis: int, x: Tensor) -> Tensor:
        kept: Tensor = x.clone().movedim(axis, 1)
        for site, number in places:
            seen[site][number] = kept
        return kept.movedim(1, axis)

    def read(name: str, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (keep(reads[name], channel_axis(module), args[0]), *args[1:])

    def written(name: str, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        return keep(outputs[name], channel_axis(module), out)

    with (
        _pre_hooks(model, {name: partial(read, name) for name in reads}),
        _forward_hooks(model, {name: partial(written, name) for name in outputs}),
    ):
        yield seen


def gather(site: Site, tensors: Sequence[Tensor]) -> Tensor:
    """Tensors shaped like those `tapped` gives for a site, by unit: (B, U, ...).

    (B, U, H, W), (B, U, T) or (B, U) for a site of one reader in which a unit has one position; otherwise all positions
    of a unit in all readers, side by side: (B, U, P). The input site gives (B, C, H, W).
    """
    if not site.layer:
        return tensors[0]
    members = [m for m in site.members if (m.module, m.side) in _readings(site)]
    parts: list[Tensor] = []
    for member, tensor in zip(members, tensors, strict=True):
        index = torch.tensor(member.index, device=tensor.device)
        parts.append(tensor.index_select(1, index.flatten()).unflatten(1, tuple(index.shape)))
    if len(parts) == 1 and parts[0].shape[2] == 1:
        return parts[0].squeeze(2)
    return torch.cat([part.flatten(2) for part in parts], 2)


def _readings(site: Site) -> list[tuple[str, str]]:
    """Name and side of each layer at which `tapped` takes a site."""
    if not site.layer:
        return [("", "in")]
    # The first consumer of an attention's inner dimensions is its core; what comes after follows from it.
    consumers = site.consumers[:1] if site.kind == "head" else site.consumers
    return [(member.module, member.side) for member in consumers or site.producers]


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
def _pre_hooks(model: nn.Module, hooks: Mapping[str, Any]) -> Iterator[None]:
    with _removed() as handles:
        handles.extend(model.get_submodule(name).register_forward_pre_hook(hook) for name, hook in hooks.items())
        yield


@contextmanager
def _forward_hooks(model: nn.Module, hooks: Mapping[str, Any]) -> Iterator[None]:
    with _removed() as handles:
        handles.extend(model.get_submodule(name).register_forward_hook(hook) for name, hook in hooks.items())
        yield


@contextmanager
def _removed() -> Iterator[list[RemovableHandle]]:
    handles: list[RemovableHandle] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


def _flat(member: Member) -> tuple[Tensor, Tensor]:
    """Owning unit and position, one entry for each position of the member."""
    units = torch.tensor([unit for unit, positions in enumerate(member.index) for _ in positions], dtype=torch.long)
    return units, torch.tensor([p for positions in member.index for p in positions], dtype=torch.long)


def _multiply(
    name: str, parts: list[tuple[Tensor, Tensor, Tensor]], module: nn.Module, args: tuple[Any, ...]
) -> tuple[Any, ...]:
    x = args[0]
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
