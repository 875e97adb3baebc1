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
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from sukashi import layers, surgery
from sukashi.errors import ModelError
from sukashi.types import Batch, Mask, Site

DEFAULT_BUDGET = 2 * 2**30
CHUNK = 128

_INPLACE_FUNCTIONS = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}


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
        chunk: int = CHUNK,
    ) -> None:
        device = next(model.parameters()).device
        self.graph, self.root = _trace(model)
        folded = _fold(self.graph, self.root)
        self.root.to(memory_format=torch.channels_last)
        self.sites = tuple(
            replace(site, members=tuple(m for m in site.members if m.module not in folded)) for site in sites
        )
        self.keep = {site: torch.ones(site.n_units, dtype=torch.bool) for site in self.sites}
        self.budget = budget
        layout = torch.channels_last if data.x.ndim == 4 else torch.contiguous_format
        self.chunks = [part.x.to(device, memory_format=layout) for part in data.split(chunk)]
        self.original = self.logits()
        self._compare_with(model)
        if not torch.isfinite(self.original).all():
            raise ModelError(
                "the model's logits hold NaN or Inf on calibration images: check weights and preprocessing"
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
            suffix = Suffix(_Network(self.graph, root), compact, mask.keep[ours], self.chunks, self.budget)
            yield suffix
            self.keep[ours] = suffix.keep.clone()

    def remove(self, site: Site, units: Sequence[int]) -> None:
        """Remove units without asking (a resumed run replays its decisions so)."""
        ours = next(s for s in self.sites if s == site)
        self.keep[ours][torch.tensor(list(units), dtype=torch.long)] = False

    def _compare_with(self, model: nn.Module) -> None:
        """Refuse a model that tracing, folding or plain operations in place of in-place ones have changed."""
        with exact():
            expected = model(self.chunks[0])
        error = (self.original[: len(expected)] - expected).abs().max()
        if not error <= 1e-4 * expected.abs().max():
            raise ModelError(
                f"the traced model gives other logits than the model itself (off by {float(error):.1e}): a layer "
                "called twice, in-place operations or branches on data are the usual reasons; use random, magnitude or "
                "taylor"
            )

    def logits(self) -> Tensor:
        """Logits (N, K) of all images in the present state."""
        with exact():
            root = copy.deepcopy(self.root)
            surgery.cut(root, self.mask())
            network = _Network(self.graph, root)
            return torch.cat([network.logits(x) for x in self.chunks])

    def mask(self) -> Mask:
        """What is still there."""
        return Mask({site: keep.clone() for site, keep in self.keep.items()})


class Suffix:
    """What lies behind a site: gives logits (N, K) with one more unit gone.

    `keep` (U,) says which units of the site are still there; unit numbers are those of the uncut site. `now` (N, K) are
    the logits in the present state.
    """

    def __init__(self, network: _Network, site: Site, keep: Tensor, chunks: Sequence[Tensor], budget: int) -> None:
        self.keep = keep.clone()
        self.layer = site.layer
        self._position = {unit: row for row, unit in enumerate(torch.nonzero(keep).flatten().tolist())}
        self._network = network
        self._plan = plan = network.behind(site)
        self._removed: list[int] = []
        self._chunks: list[_Chunk] = []
        spent = 0
        for x in chunks:
            cache = network.cache(plan, x)
            size = sum(v.numel() * v.element_size() for v in cache.values() if isinstance(v, Tensor))
            cached = spent + size <= budget
            spent += size if cached else 0
            self._chunks.append(_Chunk(x, cache if cached else None))
        self._last: tuple[int, list[Tensor]] | None = None
        self.now = torch.cat([self._run(chunk, None) for chunk in self._chunks])

    @property
    def n_left(self) -> int:
        return int(self.keep.sum())

    def without(self, unit: int) -> Tensor:
        """Logits (N, K) with `unit` gone too; exactly `now` for a unit that is zero on every image."""
        assert self.keep[unit], "the unit is already gone"
        column = self._position[unit]
        if self._dead(column):
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
            start[reader.node] = (
                cache[reader.node] if column is None else self._network.reader_without(reader, cache, column)
            )
        return self._network.finish(self._plan, cache, start)

    def _drop(self, cache: dict[fx.Node, Any], column: int) -> None:
        """Correct every reader's cached output first, then erase the unit: readers may share one input."""
        corrected = [self._network.reader_without(reader, cache, column) for reader in self._plan.static]
        for reader, output in zip(self._plan.static, corrected, strict=True):
            cache[reader.node] = output
        for reader in self._plan.static:
            reader.erase(cache, column)

    def _dead(self, column: int) -> bool:
        if self._plan.dynamic:
            # A unit of a residual stage is also read further on, where its activation depends on the state.
            return False
        for chunk in self._chunks:
            cache = chunk.cache if chunk.cache is not None else self._network.cache(self._plan, chunk.x)
            if any(reader.alive(cache, column) for reader in self._plan.static):
                return False
        return True


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

    def alive(self, cache: Mapping[fx.Node, Any], column: int) -> bool:
        return any(bool(cache[self.source].select(self.axis, i).any()) for i in self.index[column])

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


class _Network:
    """The traced network over one set of modules."""

    def __init__(self, graph: fx.Graph, root: nn.Module) -> None:
        self.graph = graph
        self.root = root
        self.modules = dict(root.named_modules())
        self.nodes = [node for node in graph.nodes if node.op != "output"]
        self.output = next(node.args[0] for node in graph.nodes if node.op == "output")
        self.last_use: dict[fx.Node, fx.Node] = {}
        for node in graph.nodes:
            for used in node.all_input_nodes:
                self.last_use[used] = node

    def logits(self, x: Tensor) -> Tensor:
        values: dict[fx.Node, Any] = {}
        for node in self.nodes:
            values[node] = self._call(node, values, x)
            for used in node.all_input_nodes:
                if self.last_use[used] is node:
                    del values[used]
        return cast(Tensor, values[self.output])

    def behind(self, site: Site) -> _Behind:
        """Which nodes change when units of `site` go."""
        names = {member.module: member for member in site.consumers}
        readers: list[_Reader] = []
        changing: set[fx.Node] = set()
        for node in self.nodes:
            member = names.get(str(node.target)) if node.op == "call_module" else None
            if member is not None:
                source = node.args[0]
                module = self.modules[member.module]
                axis = -1 if isinstance(module, nn.Linear | layers.AttentionCore) else 1
                readers.append(_Reader(node, source, member.module, member.index, axis))
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
        return _Behind(fixed, frozenset(kept), static, dynamic, rest)

    def cache(self, plan: _Behind, x: Tensor) -> dict[fx.Node, Any]:
        """Values the suffix needs, in the present state of the weights."""
        values: dict[fx.Node, Any] = {}
        waiting = {node: sum(1 for user in node.users) for node in plan.fixed}
        for node in plan.fixed:
            values[node] = self._call(node, values, x)
            for used in node.all_input_nodes:
                waiting[used] -= 1
                if not waiting[used] and used not in plan.kept:
                    del values[used]
        cache = {node: value for node, value in values.items() if node in plan.kept}
        for reader in plan.static:
            cache[reader.node] = self._call(reader.node, cache, x)
        return cache

    def finish(self, plan: _Behind, cache: Mapping[fx.Node, Any], start: dict[fx.Node, Any]) -> Tensor:
        """Logits from the readers' outputs on."""
        values = _Layers(start, cache)
        for node in plan.rest:
            values.top[node] = self._call(node, values, None)
            for used in node.all_input_nodes:
                if self.last_use[used] is node:
                    values.top.pop(used, None)
        return cast(Tensor, values[self.output])

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
            return torch.sub(y, share)
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

    def _call(self, node: fx.Node, values: Mapping[fx.Node, Any], x: Tensor | None) -> Any:
        if node.op == "placeholder":
            return x
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self.root)
        args = fx.node.map_arg(node.args, values.__getitem__)
        kwargs = fx.node.map_arg(node.kwargs, values.__getitem__) if node.kwargs else {}
        if node.op == "call_module":
            return self.modules[str(node.target)](*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]


class _Layers(Mapping[fx.Node, Any]):
    """A dictionary laid over another."""

    def __init__(self, top: dict[fx.Node, Any], below: Mapping[fx.Node, Any]) -> None:
        self.top = top
        self.below = below

    def __getitem__(self, node: fx.Node) -> Any:
        return self.top[node] if node in self.top else self.below[node]

    def __iter__(self) -> Iterator[fx.Node]:
        return iter({**self.below, **self.top})

    def __len__(self) -> int:
        return len({**self.below, **self.top})


def _pick(x: Tensor, axis: int, index: Tensor) -> Tensor:
    if len(index) == 1:
        return x.narrow(axis, int(index[0]), 1)
    return x.index_select(axis, index.to(x.device))


# Subclasses too, wherever they are defined: their weights are what a cut edits.
_LEAVES = (
    layers.PadShortcut,
    layers.AttentionCore,
    nn.Linear,
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._BatchNorm,
)


class _Tracer(fx.Tracer):
    """Our own layers stay whole, and the images are the only input: other arguments keep their defaults."""

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        fn, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        for proxy in reversed(args[2:]):
            self.graph.erase_node(proxy.node)
        return fn, args[:2]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _LEAVES) or super().is_leaf_module(m, module_qualified_name)


def _trace(model: nn.Module) -> tuple[fx.Graph, nn.Module]:
    """Graph and a private copy of the modules, with every in-place operation made plain."""
    root = copy.deepcopy(model).eval().requires_grad_(False)
    for module in root.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]
    try:
        graph = _Tracer().trace(root)
    except Exception as error:
        raise ModelError(
            f"torch.fx cannot trace the model ({type(error).__name__}: {str(error).splitlines()[0]}): progressive "
            "criteria need a traceable forward(); use random, magnitude or taylor, or rewrite data-dependent branches"
        ) from error
    for node in graph.nodes:
        if node.op == "call_function":
            node.target = _INPLACE_FUNCTIONS.get(node.target, node.target)
        if node.kwargs.get("inplace"):
            node.kwargs = {**node.kwargs, "inplace": False}
        if node.op == "call_method" and str(node.target).endswith("_") and not str(node.target).endswith("__"):
            node.target = str(node.target)[:-1]
    return graph, root


def _fold(graph: fx.Graph, root: nn.Module) -> set[str]:
    """Fold every BatchNorm that alone follows a convolution into it; returns the names of those folded."""
    modules = dict(root.named_modules())
    n_calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    folded = set()
    for node in graph.nodes:
        if node.op != "call_module" or not isinstance(modules[str(node.target)], nn.BatchNorm2d):
            continue
        before = node.args[0]
        conv = modules.get(str(before.target)) if before.op == "call_module" else None
        name = str(node.target)
        if type(conv) is not nn.Conv2d or len(before.users) != 1 or n_calls[str(before.target)] + n_calls[name] != 2:
            continue
        root.set_submodule(str(before.target), fuse_conv_bn_eval(conv, modules[name]))
        root.set_submodule(name, nn.Identity())
        modules = dict(root.named_modules())
        folded.add(name)
    return folded


@contextmanager
def exact() -> Iterator[None]:
    """No gradients, and float32 that is float32: TF32 changes decisions."""
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn
