"""Nodes of a network, and the weights between them: what a circuit is a part of."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from sukashi.core.errors import ModelError
from sukashi.core.types import Member, Site
from sukashi.network.layers import MAKERS, AttentionCore
from sukashi.network.sites import find, place

ALWAYS = -1  # in place of a node, where there is none that could be off


@dataclass(frozen=True)
class Layer:
    """A layer with weights between nodes: which node, counted over all places, each of its inputs and outputs is."""

    name: str
    reads: tuple[int, ...]
    writes: tuple[int, ...]


@dataclass(frozen=True)
class Nodes:
    """Places whose units are nodes, in the order of the pass, and the layers between them.

    `kinds` say what each place is: norm1, q, k, v, attn_out, norm2, mlp_act, mlp_out, or channel, hidden.
    """

    places: tuple[Site, ...]
    kinds: tuple[str, ...]
    layers: tuple[Layer, ...]

    @property
    def n_nodes(self) -> int:
        return sum(place.n_units for place in self.places)


def nodes_of(model: nn.Module, x: Tensor) -> Nodes:
    """The nodes of a network (Zhang 2026, sec. 3.4 and appendix C.1; Gao et al. 2025).

    Of a transformer eight places a block: what the first norm gives to q, k and v, these head by head, what attention
    and MLP add to the sum, what the second norm gives to the MLP and what its activation does. They are told by what
    can be cut (`sites.find`), not by names. Of a network without attention the units of all sites that can be cut.

    Raises ModelError as `sites.find` does, and for attention or an MLP of whose places one is not found.
    """
    sites = find(model, x).sites
    cores = [name for name, module in model.named_modules() if isinstance(module, AttentionCore)]
    if not cores and not any(site.kind == "head" for site in sites):
        found: list[tuple[str, Site, tuple[Member, ...]]] = [(site.kind, site, site.members) for site in sites]
    else:
        known = {member.module for site in sites for member in site.members}
        if lost := [name for name in cores if name not in known]:
            raise ModelError(f"the heads of {lost[0]!r} can't be taken out one by one: circuits have no nodes there")
        found = [(kind, *of) for site in sites for kind, of in _inside(model, site, x).items()]
    places = tuple(place for _, place, _ in found)
    return Nodes(places, tuple(kind for kind, _, _ in found), _layers(model, places, [ends for _, _, ends in found]))


Inside = dict[str, tuple[Site, tuple[Member, ...]]]
"""Of each kind of place itself, and where its nodes are the inputs or outputs of layers with weights."""


def _inside(model: nn.Module, site: Site, x: Tensor) -> Inside:
    return _attention(model, site, x) if site.kind == "head" else _mlp(model, site, x)


def _attention(model: nn.Module, site: Site, x: Tensor) -> Inside:
    """The places of one attention, whose heads are a site."""
    names = [member.module for member in site.members]
    cores = [name for name in names if isinstance(model.get_submodule(name), AttentionCore)]
    linear = [name for name in names if isinstance(model.get_submodule(name), nn.Linear)]
    if len(cores) != 1 or len(linear) != 2:
        raise ModelError(
            f"the attention at {site.layer!r} is not one layer that makes q, k and v, a core and one that reads it: "
            "circuits have no nodes there"
        )
    core, (qkv, proj) = model.get_submodule(cores[0]), linear
    assert isinstance(core, AttentionCore)
    alive = [head for head, width in enumerate(core.widths) if width]
    if len({core.widths[head] for head in alive}) > 1:
        raise ModelError(
            f"the heads of {cores[0]!r} were cut to several widths, {', '.join(map(str, core.widths))}: they are no "
            "nodes of one kind; cut whole heads, or single weights"
        )
    found = {"norm1": _at(model, qkv, x, "in")}
    for part in ("q", "k", "v"):
        index = [tuple(core.positions(part, head)) for head in alive]
        ends = [Member(qkv, "out", tuple(index), -1)]
        if part == "v":  # what a head writes lies where its v does
            first = 2 * sum(core.widths)
            ends.append(Member(proj, "in", tuple(tuple(at - first for at in own) for own in index), -1))
        found[part] = place(model, cores[0], x, "in", units=index), tuple(ends)
    return found | {"attn_out": _at(model, proj, x, "out")}


def _mlp(model: nn.Module, site: Site, x: Tensor) -> Inside:
    """The places of one MLP, whose hidden units are a site."""
    names = [member.module for member in (*site.producers, *site.consumers)]
    if len(names) != 2 or not all(isinstance(model.get_submodule(name), nn.Linear) for name in names):
        raise ModelError(
            f"what is at {site.layer!r} of this transformer is neither attention nor two linear layers, one after the "
            "other: circuits have no nodes there"
        )
    first, second = names
    act = place(model, second, x, "in", axis=-1)
    made = dict(_owners(site.producers[0]))  # the hidden unit that each output of the first makes
    outputs: dict[int, list[int]] = defaultdict(list)
    for at, unit in made.items():
        outputs[unit].append(at)
    index = tuple(tuple(outputs[unit]) for _, unit in sorted(_owners(site.consumers[0])))
    return {
        "norm2": _at(model, first, x, "in"),
        "mlp_act": (act, (*act.members, Member(first, "out", index, -1))),
        "mlp_out": _at(model, second, x, "out"),
    }


def _owners(member: Member) -> list[tuple[int, int]]:
    """(position, unit) of each position."""
    return [(at, unit) for unit, own in enumerate(member.index) for at in own]


def _at(model: nn.Module, layer: str, x: Tensor, side: Literal["in", "out"]) -> tuple[Site, tuple[Member, ...]]:
    """All that a linear layer reads or writes."""
    found = place(model, layer, x, side, axis=-1)
    return found, found.members


def _layers(model: nn.Module, places: Sequence[Site], ends: Sequence[Sequence[Member]]) -> tuple[Layer, ...]:
    """The layers with weights that read or write a node."""
    held: dict[tuple[str, str], dict[int, int]] = defaultdict(dict)
    start = 0
    for of, own in zip(places, ends, strict=True):
        for member in own:
            held[member.module, member.side] |= {
                at: start + unit for unit, index in enumerate(member.index) for at in index
            }
        start += of.n_units
    found = []
    for name, module in model.named_modules():
        if isinstance(module, MAKERS) and ((name, "in") in held or (name, "out") in held):
            sizes = module.weight.shape[1] * getattr(module, "groups", 1), len(module.weight)
            reads, writes = (
                tuple(held[name, side].get(at, ALWAYS) for at in range(size))
                for side, size in zip(("in", "out"), sizes, strict=True)
            )
            found.append(Layer(name, reads, writes))
    return tuple(found)
