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
def read_by(model: nn.Module, layer: str) -> Iterator[list[Tensor]]:
    """What a layer reads: a list that holds its input in the latest call."""
    read: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
        read[:] = [args[0].detach()]

    with _pre_hooks(model, {layer: keep}):
        yield read


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
    handles: list[RemovableHandle] = []
    try:
        for name, hook in hooks.items():
            handles.append(model.get_submodule(name).register_forward_pre_hook(hook))
        yield
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
