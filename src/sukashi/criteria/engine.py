"""The engine of progressive criteria: logits of a network without one unit, then without the next, at little cost.

A criterion that decides while it removes asks, for unit after unit, for the logits of all calibration images with that
unit gone. Running the whole network each time is the plain way (and the oracle in the tests). The engine gives the same
answers faster:

- *prefix cache*: what does not depend on the site is computed once, and kept;
- *delta*: a unit's share W[:, c] * X[:, c] is subtracted from its readers' cached outputs instead of running them anew;
- *compaction*: units removed earlier are sliced out of the network the suffix runs in, not multiplied by zero;
- *folding*: BatchNorm disappears into the convolution before it; maps are laid out channels last;
- *dead units*: a unit that is zero on every image changes nothing, exactly.

Baseline and perturbed logits come from the same code path, so that float noise never becomes a significant effect.
Images go through in chunks; chunks whose cached values do not fit the memory budget are recomputed for each unit.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Any, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, fx, nn

from sukashi.core.errors import ModelError
from sukashi.core.precision import exact
from sukashi.core.registry import FREE
from sukashi.core.types import Batch, Mask, Site
from sukashi.network import layers, surgery
from sukashi.network.canonical import LEAVES, canonical
from sukashi.network.exclude import remedy_of
from sukashi.network.functions import Add

DEFAULT_BUDGET = 2 * 2**30
Budget = Annotated[int, Field(ge=0), FREE]
# Bytes of the largest activation of a chunk: behind a site, where units are asked about one by one, what stays in a
# core's cache (page faults and main memory cost a factor of two there); before it, and on a GPU, what fills the device.
_BEHIND_CPU, _CHUNK = 2 * 2**20, 256 * 2**20


class Engine:
    """Progressive removal of units from a frozen network, over a fixed set of images.

    `data` is used in the order given. `remove()` and `open()` change what is removed; the model given is left alone.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        data: Batch,
        *,
        budget: int = DEFAULT_BUDGET,
        chunk: int | None = None,
    ) -> None:
        device = next(model.parameters()).device
        form = canonical(model, data.x[:2].to(device))
        self.graph, self.root = form.graph, _modules(form)
        folded = set()
        for name, module in self.root.named_modules():
            if isinstance(module, nn.Conv2d):
                module.to(memory_format=torch.channels_last)
            elif isinstance(module, nn.Identity):
                folded.add(name)
        self.sites = tuple(
            replace(site, members=tuple(m for m in site.members if m.module not in folded)) for site in sites
        )
        self._check_fit(model)
        self.keep = {site: torch.ones(site.n_units, dtype=torch.bool) for site in self.sites}
        self.budget = budget
        layout = torch.channels_last if data.x.ndim == 4 else torch.contiguous_format
        self.x = data.x.to(device, memory_format=layout)
        self.chunk = chunk
        with exact():
            self.sizes = _Network(self.graph, self.root).sizes(self.x[:1])
        self.original = self.logits()
        self._compare_with(model)
        if not torch.isfinite(self.original).all():
            raise ModelError(
                "the model's logits hold NaN or Inf on calibration images: check weights and preprocessing"
            )

    def _check_fit(self, model: nn.Module) -> None:
        """Refuse, before any unit goes, a site that can be cut in the model and not in its form."""
        reasons = {
            site: reason
            for site in self.sites
            for member in site.members
            if (reason := self._unfit(member.module, model.get_submodule(member.module)))
        }
        if reasons:
            reason = next(iter(reasons.values()))
            remedy = f"use a criterion that needs no such form, such as magnitude, or {remedy_of(reasons, self.sites)}"
            raise ModelError(f"{reason}: {remedy}")

    def _unfit(self, name: str, layer: nn.Module) -> str:
        """Why a layer of the model cannot lose units in its form, or ""."""
        if type(self.root.get_submodule(name)) is not nn.Module:
            return surgery.unfit(self.root.get_submodule(name), name)
        what = "heads of attention that is not written out" if surgery.heads(layer) else "its units"
        return (
            f"layer {name!r}: a {type(layer).__name__} is taken apart in the canonical form, in which {what} cannot be "
            "cut"
        )

    @contextmanager
    def open(self, site: Site) -> Iterator[Suffix]:
        """Work on one site: `with engine.open(site) as suffix`. What it removes stays removed afterwards."""
        ours = next(s for s in self.sites if s == site)
        with exact():
            mask = Mask({s: keep.clone() for s, keep in self.keep.items()})
            root = copy.deepcopy(self.root)
            surgery.cut(root, mask)
            compact = next(s for s in surgery.renumber(self.sites, mask) if s.layer == ours.layer)
            network = _Network(self.graph, root)
            behind = network.behind(compact)
            chunks = self._chunks([*behind.rest, *(reader.node for reader in behind.static)])
            suffix = Suffix(network, compact, behind, mask.keep[ours], chunks, self.budget)
            yield suffix
            self.keep[ours] = suffix.keep.clone()

    def remove(self, site: Site, units: Sequence[int]) -> None:
        """Remove units without asking (a resumed run replays its decisions so)."""
        ours = next(s for s in self.sites if s == site)
        self.keep[ours][torch.tensor(list(units), dtype=torch.long)] = False

    def _compare_with(self, model: nn.Module) -> None:
        """Refuse a model that the canonical form or our operations in place have changed."""
        with exact():
            expected = model(self._chunks()[0])
        error = (self.original[: len(expected)] - expected).abs().max()
        if not error <= 1e-4 * expected.abs().max():
            raise ModelError(
                f"the traced model gives other logits than the model itself (off by {float(error):.1e}), so no "
                "decision can rest on them: use random, magnitude or taylor"
            )

    def logits(self) -> Tensor:
        """Logits (N, K) of all images in the present state."""
        with exact():
            root = copy.deepcopy(self.root)
            surgery.cut(root, self.mask())
            network = _Network(self.graph, root)
            return torch.cat([network.logits(x) for x in self._chunks()])

    def _chunks(self, behind: Sequence[fx.Node] = ()) -> tuple[Tensor, ...]:
        """The images in chunks whose largest activation, and the largest of the nodes `behind`, stay within bounds."""
        fits = _CHUNK // max(self.sizes.values())
        if behind and self.x.device.type == "cpu":
            fits = min(fits, _BEHIND_CPU // max(1, *(self.sizes[node] for node in behind)))
        return cast(tuple[Tensor, ...], self.x.split(self.chunk or max(1, fits)))

    def mask(self) -> Mask:
        """What is still there."""
        return Mask({site: keep.clone() for site, keep in self.keep.items()})


class Suffix:
    """What lies behind a site: gives logits (N, K) with one more unit gone.

    `keep` (U,) says which units of the site are still there; unit numbers are those of the uncut site. `now` (N, K) are
    the logits in the present state.
    """

    def __init__(
        self, network: _Network, site: Site, behind: _Behind, keep: Tensor, chunks: Sequence[Tensor], budget: int
    ) -> None:
        self.keep = keep.clone()
        self.layer = site.layer
        self._position = {unit: row for row, unit in enumerate(torch.nonzero(keep).flatten().tolist())}
        self._network = network
        self._plan = plan = behind
        self._removed: list[int] = []
        self._chunks: list[_Chunk] = []
        self._alive = torch.zeros(self.n_left, dtype=torch.bool)
        spent = 0
        for x in chunks:
            cache = network.cache(plan, x)
            for reader in plan.static:
                self._alive |= reader.alive(cache)
            size = sum(v.numel() * v.element_size() for v in cache.values() if isinstance(v, Tensor))
            cached = spent + size <= budget
            spent += size if cached else 0
            self._chunks.append(_Chunk(x, cache if cached else None))
        self.now = torch.cat([self._run(chunk, None) for chunk in self._chunks])

    @property
    def n_left(self) -> int:
        return int(self.keep.sum())

    def without(self, unit: int) -> Tensor:
        """Logits (N, K) with `unit` gone too; exactly `now` for a unit that is zero on every image."""
        assert self.keep[unit], "the unit is already gone"
        column = self._position[unit]
        if not self._plan.dynamic and not self._alive[column]:
            # (A unit of a residual stage is also read further on, where its activation depends on the state.)
            return self.now
        with self._network.silenced(self._plan.dynamic, [column]):
            logits = torch.cat([self._run(chunk, column) for chunk in self._chunks])
        if not torch.isfinite(logits).all():
            raise ModelError(
                f"the logits hold NaN or Inf without unit {unit} of {self.layer!r}: no decision can rest on them; "
                "check the weights for extreme values"
            )
        return logits

    def remove(self, unit: int, logits: Tensor | None = None) -> None:
        """Take `unit` out for good; `logits` are what `without(unit)` gave, if it was asked."""
        logits = self.without(unit) if logits is None else logits
        column = self._position[unit]
        for chunk in self._chunks:
            if chunk.cache is not None:
                self._drop(chunk.cache, column)
        self._network.silence(self._plan.dynamic, [column])
        self._removed.append(column)
        self.keep[unit] = False
        self.now = logits

    def _run(self, chunk: _Chunk, column: int | None) -> Tensor:
        cache = chunk.cache
        if cache is None:
            cache = self._network.cache(self._plan, chunk.x)
            for gone in self._removed:
                self._drop(cache, gone)
        start: dict[fx.Node, Any] = {}
        for reader in self._plan.static:
            # The suffix writes into what it starts from.
            start[reader.node] = (
                cache[reader.node].clone() if column is None else self._network.reader_without(reader, cache, column)
            )
        return self._network.finish(self._plan, cache, start)

    def _drop(self, cache: dict[fx.Node, Any], column: int) -> None:
        """Correct every reader's cached output first, then erase the unit: readers may share one input."""
        corrected = [self._network.reader_without(reader, cache, column) for reader in self._plan.static]
        for reader, output in zip(self._plan.static, corrected, strict=True):
            cache[reader.node] = output
        for reader in self._plan.static:
            reader.erase(cache, column)


@dataclass
class _Chunk:
    x: Tensor
    cache: dict[fx.Node, Any] | None


@dataclass(frozen=True)
class _Reader:
    """A node that reads a site's units: its module, the node it reads, and the positions of each unit there."""

    node: fx.Node
    source: fx.Node
    module: str
    index: tuple[tuple[int, ...], ...]
    axis: int

    def alive(self, cache: Mapping[fx.Node, Any]) -> Tensor:
        """Which units are other than zero on some image: (U,)."""
        x = cache[self.source]
        found = x.any(dim=[axis for axis in range(x.ndim) if axis != self.axis % x.ndim]).cpu()
        return torch.stack([found[list(positions)].any() for positions in self.index])

    def erase(self, cache: Mapping[fx.Node, Any], column: int) -> None:
        """Zero the units in the input too, for readers that are run again rather than corrected."""
        for i in self.index[column]:
            cache[self.source].select(self.axis, i).zero_()


@dataclass(frozen=True)
class _Behind:
    """How to run what lies behind a site: cached nodes, readers with a fixed or a changing input, and the rest."""

    fixed: tuple[fx.Node, ...]
    kept: frozenset[fx.Node]
    static: tuple[_Reader, ...]
    dynamic: tuple[_Reader, ...]
    rest: tuple[fx.Node, ...]
    prefix: tuple[_Step, ...]
    suffix: tuple[_Step, ...]


class _Network:
    """The traced network over one set of modules."""

    def __init__(self, graph: fx.Graph, root: nn.Module) -> None:
        self.graph = graph
        self.root = root
        self.modules = dict(root.named_modules())
        self.nodes = [node for node in graph.nodes if node.op != "output"]
        self.output = next(node.args[0] for node in graph.nodes if node.op == "output")
        self.input = next(node for node in graph.nodes if node.op == "placeholder")

    def logits(self, x: Tensor) -> Tensor:
        return cast(Tensor, _run(self._steps(self.nodes, {self.output}), {self.input: x})[self.output])

    def sizes(self, x: Tensor) -> dict[fx.Node, int]:
        """Bytes an image of every node's value."""
        values = _run(self._steps(self.nodes, set(self.nodes)), {self.input: x})
        return {
            node: value.numel() * value.element_size() // len(x) if isinstance(value, Tensor) else 0
            for node, value in values.items()
        }

    def behind(self, site: Site) -> _Behind:
        """Which nodes change when units of `site` go."""
        names = {member.module: member for member in site.consumers}
        readers: list[_Reader] = []
        changing: set[fx.Node] = set()
        for node in self.nodes:
            member = names.get(str(node.target)) if node.op == "call_module" else None
            if member is not None:
                readers.append(_Reader(node, node.args[0], member.module, member.index, member.axis))
                changing.add(node)
            elif any(used in changing for used in node.all_input_nodes):
                changing.add(node)
        assert len(readers) == len(names), "every consumer is in the graph"
        static = tuple(r for r in readers if r.source not in changing)
        dynamic = tuple(r for r in readers if r.source in changing)
        starts = {r.node for r in static}
        rest = tuple(n for n in self.nodes if n in changing and n not in starts)
        fixed = tuple(n for n in self.nodes if n not in changing)
        kept = {used for node in rest for used in node.all_input_nodes if used not in changing}
        kept |= {r.source for r in static} | starts
        prefix, suffix = self._steps(fixed, kept), self._steps(rest, {self.output}, starts)
        return _Behind(fixed, frozenset(kept), static, dynamic, rest, prefix, suffix)

    def cache(self, plan: _Behind, x: Tensor) -> dict[fx.Node, Any]:
        """Values the suffix needs, in the present state of the weights."""
        values = _run(plan.prefix, {self.input: x})
        cache = {node: value for node, value in values.items() if node in plan.kept}
        for reader in plan.static:
            cache[reader.node] = self.modules[reader.module](cache[reader.source])
        return cache

    def finish(self, plan: _Behind, cache: Mapping[fx.Node, Any], start: Mapping[fx.Node, Any]) -> Tensor:
        """Logits from the readers' outputs `start` on, which are used up."""
        return cast(Tensor, _run(plan.suffix, {**cache, **start})[self.output])

    def _steps(
        self, nodes: Sequence[fx.Node], lasting: AbstractSet[fx.Node], starts: AbstractSet[fx.Node] = frozenset()
    ) -> tuple[_Step, ...]:
        """How to compute `nodes` in turn: in place where nobody else looks, and freeing all but the `lasting` ones."""
        ours = {*nodes, *starts} - lasting
        last_use = {used: node for node in nodes for used in node.all_input_nodes if used in ours}
        frees: dict[fx.Node, list[fx.Node]] = {node: [] for node in nodes}
        for used, node in last_use.items():
            frees[node].append(used)
        owned = set(starts)
        steps = []
        for node in nodes:
            if node.op == "placeholder":
                continue
            call, args, kwargs = self._call(node)
            spare = [used for used in node.all_input_nodes if used in owned and len(used.users) == 1]
            if spare:
                call, args, kwargs = _in_place(call, args, kwargs, spare[0])
            steps.append(_Step(node, call, args, kwargs, tuple(frees[node])))
            if node in ours:
                passes_on = isinstance(call, nn.Identity | nn.Dropout)
                if bool(spare) if passes_on else _makes_new(call):
                    owned.add(node)
        return tuple(steps)

    def reader_without(self, reader: _Reader, cache: Mapping[fx.Node, Any], column: int) -> Tensor:
        """A reader's output with one more unit gone: its cached output less the unit's share."""
        module = self.modules[reader.module]
        index = torch.tensor(reader.index[column])
        x, y = cache[reader.source], cache[reader.node]
        if type(module) is nn.Conv2d and module.padding_mode == "zeros":
            share = F.conv2d(
                _pick(x, 1, index),
                module.weight[:, index],
                None,
                module.stride,
                module.padding,
                module.dilation,
            )
            return torch.sub(y, share, out=share)
        if type(module) is nn.Linear:
            return torch.sub(y, F.linear(_pick(x, -1, index), module.weight[:, index]))
        masked = x.clone()
        masked.index_fill_(reader.axis, index.to(x.device), 0)
        return cast(Tensor, module(masked))

    @contextmanager
    def silenced(self, readers: Sequence[_Reader], columns: Sequence[int]) -> Iterator[None]:
        undo = self.silence(readers, columns)
        try:
            yield
        finally:
            for tensor, index, axis, before in undo:
                tensor.index_copy_(axis, index, before)

    def silence(self, readers: Sequence[_Reader], columns: Sequence[int]) -> list[tuple[Tensor, Tensor, int, Tensor]]:
        """Make readers deaf to units by editing their weights; returns what undoes it."""
        undo = []
        for reader in readers:
            module = self.modules[reader.module]
            index = torch.tensor([i for c in columns for i in reader.index[c]])
            if isinstance(module, layers.PadShortcut):
                index = torch.nonzero(torch.isin(module.source.cpu(), index)).flatten()
                tensor, axis, value = module.source, 0, -1
            else:
                tensor, axis, value = module.weight, 1, 0
            index = index.to(tensor.device)
            undo.append((tensor, index, axis, tensor.index_select(axis, index)))
            tensor.index_fill_(axis, index, value)
        return undo

    def _call(self, node: fx.Node) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        if node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(self.root)
            return (lambda: value), (), {}
        if node.op == "call_module":
            return self.modules[str(node.target)], node.args, node.kwargs
        if node.op == "call_method":
            return _Method(str(node.target)), node.args, node.kwargs
        return cast(Callable[..., Any], node.target), node.args, node.kwargs


@dataclass(frozen=True)
class _Step:
    """A node to compute: what to call, on what, and which values nobody needs any more afterwards."""

    node: fx.Node
    call: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    frees: tuple[fx.Node, ...]


def _run(steps: Sequence[_Step], values: dict[fx.Node, Any]) -> dict[fx.Node, Any]:
    """Compute `steps` in turn from the `values` given; returns all values that last."""
    for step in steps:
        args = fx.node.map_arg(step.args, values.__getitem__)
        kwargs = fx.node.map_arg(step.kwargs, values.__getitem__) if step.kwargs else {}
        values[step.node] = step.call(*args, **kwargs)
        for used in step.frees:
            del values[used]
    return values


@dataclass(frozen=True)
class _Method:
    name: str

    def __call__(self, owner: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(owner, self.name)(*args, **kwargs)


_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.Hardswish, nn.Hardsigmoid)


def _makes_new(call: Callable[..., Any]) -> bool:
    """Whether the value of a call shares no memory with its inputs."""
    return isinstance(call, (*LEAVES, *_ACTIVATIONS, Add)) or call is _add_into


def _in_place(
    call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], spare: fx.Node
) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """The same call, writing into the value of `spare`, which nobody needs any more, if it can."""
    if isinstance(call, _ACTIVATIONS):
        twin = copy.copy(call)
        twin.inplace = True
        return twin, args, kwargs
    if isinstance(call, Add):
        other = args[1] if args[0] is spare else args[0]
        return _add_into, (spare, other), {}
    return call, args, kwargs


def _add_into(spare: Tensor, other: Tensor | float) -> Tensor:
    if not isinstance(other, Tensor) or spare.shape != other.shape or spare.dtype != other.dtype:
        return spare + other
    return spare.add_(other)


def _pick(x: Tensor, axis: int, index: Tensor) -> Tensor:
    if len(index) == 1:
        return x.narrow(axis, int(index[0]), 1)
    return x.index_select(axis, index.to(x.device))


def _modules(form: fx.GraphModule) -> nn.Module:
    """The layers of a canonical form in a plain module, which is cheaper to copy; weights are the model's own."""
    root = nn.Module()
    root.__dict__.update({name: value for name, value in vars(form).items() if name in vars(root)})
    return root
