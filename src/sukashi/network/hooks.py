"""Masks and recordings at a model's sites: the only file that registers hooks, and it always removes them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sukashi.core.errors import ModelError, UsageError, nearest
from sukashi.core.precision import without_tf32
from sukashi.core.types import Mask, Member, Site
from sukashi.network.exclude import remedy_of


@contextmanager
def ablated(
    model: nn.Module, gates: Mask | Mapping[Site, Tensor], fill: float | Mapping[Site, Tensor] = 0.0
) -> Iterator[None]:
    """Inside, each unit a is replaced by g a + (1 - g) f wherever it is read, g its gate and f its fill.

    A gate of 0 with a fill of 0 is what cutting the unit gives. A gate is (U,), or (B, U) with one row an image; bool
    or float, and differentiable. It acts on the consumers' inputs, because a zeroed convolution leaves its BatchNorm as
    beta - gamma * mu / sigma and not zero; at a site without consumers on what its layer writes, or on the images.

    `fill` is one number for all units or, for each site, (U,), or (U, R) with a value for each of the R positions a
    unit has on the axes of what it is read from (three in attention: q, k and v). `means` gives those of a data set.

    Raises UsageError where the shape of a gate or a fill does not fit its site, and for two gates of one position; in a
    pass ModelError for a layer that is not called, or reads or writes what the mask does not fit: a mask never does
    nothing silently.
    """
    gates = gates.keep if isinstance(gates, Mask) else gates
    places: dict[tuple[str, str, int], list[_Part]] = defaultdict(list)
    for site, gate in gates.items():
        if site.kind == "weight":
            raise UsageError(f"site {site.layer!r} holds single weights, not activations: give it to sparsity.enforce")
        if gate.dim() not in (1, 2) or gate.shape[-1] != site.n_units:
            raise UsageError(
                f"the gate of site {site.layer!r} has shape {tuple(gate.shape)}: give ({site.n_units},) or "
                f"(images, {site.n_units})"
            )
        members = _places(site)
        fills = _fills(site, members, fill)
        for member, values in zip(members, fills, strict=True):
            units, positions = _flat(member)
            places[member.module, member.side, member.axis].append(_Part(gate, values, units, positions))
    for (name, _, axis), parts in places.items():
        if len(parts) > 1:
            positions = torch.cat([part.positions for part in parts])
            if len(positions.unique()) < len(positions):
                raise UsageError(
                    f"two gates act on one position of layer {name!r}, axis {axis}: give one of both sites"
                )
    reached: set[str] = set()
    mixed: dict[str, str] = {}

    def start(module: nn.Module, args: tuple[Any, ...]) -> None:
        reached.clear()
        mixed.clear()

    def gated(place: tuple[str, str, int], x: Any) -> Any:
        name, _, axis = place
        reached.add(name)
        n_rows = max(part.gate.shape[0] if part.gate.dim() == 2 else 1 for part in places[place])
        if isinstance(x, Tensor) and n_rows not in (1, len(x)):
            mixed[name] = f"{len(x)} rows for {n_rows} images"
            return x  # `finish` refuses, once all such layers are known
        return _gated(name, axis, places[place], x)

    def read(name: str, axis: int, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return gated((name, "in", axis), _read(name, args)), *args[1:]

    def write(name: str, axis: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return gated((name, "out", axis), output)

    def finish(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        _refuse_mixed(mixed, [*gates])
        for name, _, _ in places:
            if name not in reached:
                raise ModelError(
                    f"layer {name!r} is not called in this pass where hooks can see it, so a mask reaches nothing "
                    "there: leave its site out"
                )

    with _removed() as handles:
        handles.append(model.register_forward_pre_hook(start))
        for name, side, axis in places:
            module = layer(model, name)
            if side == "in":
                handles.append(module.register_forward_pre_hook(partial(read, name, axis)))
            else:
                handles.append(module.register_forward_hook(partial(write, name, axis)))
        handles.append(model.register_forward_hook(finish))
        yield


def means(model: nn.Module, sites: Sequence[Site], batches: Iterable[Tensor]) -> dict[Site, Tensor]:
    """What each unit is on average, over images and all places of a map or sequence: {site: (U, R)} for `ablated`.

    R counts the positions that a unit has on the axes of what it is read from. Sums are kept in float64.

    Raises UsageError where there is no image, and what `recorded` does.
    """
    total = {site: torch.zeros(()) for site in sites}
    n_images = 0
    with torch.no_grad(), without_tf32(), recorded(model, sites) as seen:
        for x in batches:
            model(x.clone())  # it may write into what it is given
            n_images += len(x)
            for site in sites:
                parts = []
                for member, tensor in zip(_places(site), seen[site], strict=True):
                    _, positions = _flat(member)
                    at = tensor.index_select(1, positions.to(tensor.device)).double()
                    parts.append(at.flatten(2).mean(2) if at.dim() > 2 else at)
                owners = torch.cat([_flat(member)[0] for member in _places(site)])
                order = owners.argsort(stable=True)
                total[site] = total[site] + torch.cat(parts, 1).sum(0).cpu()[order].view(site.n_units, -1)
    if not n_images:
        raise UsageError("there is no image to take means of: give one batch at least")
    return {site: values / n_images for site, values in total.items()}


@contextmanager
def recorded(model: nn.Module, sites: Sequence[Site]) -> Iterator[dict[Site, list[Tensor]]]:
    """What each site holds in the latest pass, {site: tensors (B, N, positions...)}, attached to the graph.

    A site with consumers is taken at what each of them reads, each read on its own: the gradient there leaves the other
    readers out. Attention is read at its core, not again at proj. A site without consumers is taken at the output of
    its layer, and the input site ("") at what the model is given. The axis of the units is moved to place 1, with all N
    positions of the layer; `gather` picks the site's. Works where nothing else requires a gradient.

    Raises UsageError where a site's kind has no activations; in the pass ModelError for a layer that is not called
    exactly once, gives no tensor, has another number of rows than there are images, or reads what is overwritten later.
    """
    for site, times in Counter(sites).items():
        if times > 1:
            raise UsageError(f"site {site.layer!r} is given twice: give each once")
    seen: dict[Site, list[Tensor]] = {site: [] for site in sites}
    holders: dict[tuple[str, str], dict[int, list[tuple[Site, int]]]] = defaultdict(lambda: defaultdict(list))
    for site in sites:
        if site.kind == "weight":
            raise UsageError(
                f"site {site.layer!r} holds single weights, not activations: give pixels, channels, hidden units, "
                "tokens, attention heads or subspaces"
            )
        for slot, place in enumerate(_places(site)):
            holders[place.module, place.side][place.axis].append((site, slot))
    n_calls: Counter[tuple[str, str]] = Counter()
    versions: dict[str, tuple[Tensor, int]] = {}
    mixed: dict[str, str] = {}
    n_rows = 0

    def start(module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal n_rows
        n_calls.clear()
        versions.clear()
        mixed.clear()
        n_rows = len(args[0])
        seen.update({site: [torch.empty(0)] * len(_places(site)) for site in sites})

    def keep(place: tuple[str, str], x: Tensor) -> Tensor:
        """x, kept for the place's sites with their units' axis at place 1; what goes on must come from it."""
        n_calls[place] += 1
        for axis, held in holders[place].items():
            _check_axis(place[0], axis, x)
            x = x.movedim(axis, 1)
            if torch.is_grad_enabled() and not x.requires_grad:
                x.requires_grad_()
            for site, slot in held:
                seen[site][slot] = x
            x = x.movedim(1, axis)
        return x

    def is_apart(name: str, x: Any) -> bool:
        if isinstance(x, Tensor) and len(x) == n_rows:
            return True
        # `finish` refuses, once all such layers are known.
        mixed[name] = f"{len(x)} rows for {n_rows} images" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        return False

    def read(name: str, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = _read(name, args)
        if not is_apart(name, x):
            return args
        # A view is a node of its own in the graph and takes no memory; `finish` sees whether it was overwritten.
        kept = keep((name, "in"), x.view_as(x))
        versions[name] = (kept, kept._version)
        # A layer that works in place may do so on a copy; and so may the first, for images are small.
        return kept.clone() if not name or getattr(module, "inplace", False) else kept, *args[1:]

    def write(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not is_apart(name, output):
            return output
        # The next layer gets a copy, for it may work in place; so may others on an input that is given on.
        if output.untyped_storage().data_ptr() == _read(name, args).untyped_storage().data_ptr():
            output = output.clone()
        return keep((name, "out"), output).clone()

    def finish(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        _refuse_mixed(mixed, sites)
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

    with _removed() as handles:
        handles.append(model.register_forward_pre_hook(start))
        for name, side in holders:
            module = layer(model, name)
            if side == "in":
                handles.append(module.register_forward_pre_hook(partial(read, name)))
            else:
                handles.append(module.register_forward_hook(partial(write, name)))
        handles.append(model.register_forward_hook(finish))
        yield seen


def gather(site: Site, tensors: Sequence[Tensor]) -> Tensor:
    """The units of a site, (B, U, positions...), out of tensors shaped like those of `recorded`.

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


def laid(site: Site, values: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """`values` (U, R) of the positions of each unit, as `means` gives them, where these lie in tensors shaped like
    those of `recorded`: (N,) along axis 1 of each, 0 at positions that are not the site's.
    """
    members = _places(site)
    found = []
    for member, own, tensor in zip(members, _fills(site, members, {site: values}), tensors, strict=True):
        assert own is not None
        _, positions = _flat(member)
        found.append(tensor.new_zeros(tensor.shape[1]).index_copy(0, positions.to(tensor.device), own.to(tensor)))
    return found


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


def layer(model: nn.Module, name: str) -> nn.Module:
    """A layer by name. (A canonical form has none of those that the model never calls, or more than once.)

    Raises ModelError where there is none.
    """
    try:
        return model.get_submodule(name)
    except AttributeError:
        known = [name for name, _ in model.named_modules() if name]
        raise ModelError(
            f"no layer {name!r} to look at or to act on, or none that a pass calls exactly once{nearest(name, known)}"
        ) from None


def calls(model: nn.Module, x: Tensor) -> list[str]:
    """The names of all layers in the order a forward pass calls them, as often as it does."""
    order: list[str] = []

    def note(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        order.append(name)

    with _pre_hooks(model, {name: partial(note, name) for name, _ in model.named_modules() if name}):
        model(x)
    return order


@contextmanager
def followed(
    model: nn.Module,
    leave: Callable[[str, nn.Module, Any, Any], None],
    enter: Callable[[str, nn.Module], None] = lambda name, layer: None,
) -> Iterator[None]:
    """Calls enter(name, layer) before each layer runs and leave(name, layer, what it reads, what it gives) after."""

    def before(name: str, module: nn.Module, args: tuple[Any, ...], more: dict[str, Any]) -> None:
        enter(name, module)

    def after(name: str, module: nn.Module, args: tuple[Any, ...], more: dict[str, Any], output: Any) -> None:
        leave(name, module, args[0] if args else more.get("input"), output)

    with _removed() as handles:
        for name, module in model.named_modules():
            if name:
                handles.append(module.register_forward_pre_hook(partial(before, name), with_kwargs=True))
                handles.append(module.register_forward_hook(partial(after, name), with_kwargs=True))
        yield


@contextmanager
def _removed() -> Iterator[list[RemovableHandle]]:
    """A list of hooks, removed in the end whatever happens."""
    handles: list[RemovableHandle] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _pre_hooks(model: nn.Module, hooks: Mapping[str, Any], keywords: bool = False) -> Iterator[None]:
    with _removed() as handles:
        for name, hook in hooks.items():
            handles.append(model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=keywords))
        yield


def _read(name: str, args: tuple[Any, ...]) -> Tensor:
    """What a layer reads: its only positional argument."""
    if not args:
        raise ModelError(
            f"layer {name!r} is called by keyword: call it as layer(x), so that what it reads can be masked"
        )
    return cast(Tensor, args[0])


def _readers(site: Site) -> tuple[Member, ...]:
    """The consumers that see the units first: in attention the core, for what proj reads comes out of it alone."""
    return site.consumers[:1] if site.kind == "head" else site.consumers


def _places(site: Site) -> tuple[Member, ...]:
    """Where a site is taken: its readers, or its layer's output, or the model's input."""
    if site.consumers:
        return _readers(site)
    written = [member for member in site.producers if member.module == site.layer]
    side: Literal["in", "out"] = "out" if site.layer else "in"
    whole = tuple((u,) for u in range(site.n_units))
    return tuple(written[:1]) or (Member(site.layer, side, whole, site.axis),)


def _flat(member: Member) -> tuple[Tensor, Tensor]:
    """Owning unit and position, one entry for each position of the member."""
    units = torch.tensor([unit for unit, positions in enumerate(member.index) for _ in positions], dtype=torch.long)
    return units, torch.tensor([p for positions in member.index for p in positions], dtype=torch.long)


@dataclass(frozen=True)
class _Part:
    """What a mask says of one place: a gate (U,) or (B, U), and of each of `positions` its unit and its fill."""

    gate: Tensor
    fill: Tensor | None
    units: Tensor
    positions: Tensor


def _fills(site: Site, members: Sequence[Member], fill: float | Mapping[Site, Tensor]) -> Iterator[Tensor | None]:
    """For each place of a site the fill of each of its positions; None where it is zero."""
    counts = [len(member.index[0]) for member in members]
    if isinstance(fill, Mapping):
        if site not in fill:
            raise UsageError(f"site {site.layer!r} has a gate and no fill: give one for each site, or one number")
        values = fill[site]
        if values.shape not in ((site.n_units,), (site.n_units, sum(counts))):
            raise UsageError(
                f"the fill of site {site.layer!r} has shape {tuple(values.shape)}: give ({site.n_units},) or "
                f"({site.n_units}, {sum(counts)}), a value for each position of a unit where it is read"
            )
        values = values.view(site.n_units, -1).expand(-1, sum(counts))
        yield from (part.flatten() for part in values.split(counts, 1))
    elif fill:
        yield from (torch.full((site.n_units * n,), float(fill), dtype=torch.float64) for n in counts)
    else:
        yield from (None for _ in counts)


def _refuse_mixed(mixed: Mapping[str, str], sites: Sequence[Site]) -> None:
    """Refuse layers that hold images in other rows than the network is given, {layer: what it holds}."""
    if mixed:
        layer, what = next(iter(mixed.items()))
        refused = [site for site in sites if any(place.module in mixed for place in _places(site))]
        raise ModelError(
            f"layer {layer!r} holds {what}: single images cannot be told apart there: {remedy_of(refused, sites)}"
        )


def _check_axis(name: str, axis: int, x: Tensor) -> None:
    if not -x.dim() <= axis < x.dim():
        raise ModelError(f"layer {name!r} holds a tensor of shape {tuple(x.shape)}, which has no axis {axis}")


def _gated(name: str, axis: int, parts: Sequence[_Part], x: Any) -> Tensor:
    if not isinstance(x, Tensor):
        raise ModelError(f"layer {name!r} holds a {type(x).__name__}, which no mask fits: leave its site out")
    _check_axis(name, axis, x)
    n_rows = max(part.gate.shape[0] if part.gate.dim() == 2 else 1 for part in parts)
    size = x.shape[axis]
    highest = max(int(part.positions.max()) for part in parts)
    if highest >= size:
        raise ModelError(
            f"layer {name!r} has {size} positions on axis {axis}, and a mask speaks of number {highest}: its site is "
            "of another model"
        )
    shape = [1] * x.dim()
    shape[axis] = size
    # Built anew in each pass: a graph shared by two passes could be walked backward only once.
    gate_BC, fill_C = x.new_ones(n_rows, size), x.new_zeros(size)
    for part in parts:
        positions = part.positions.to(x.device)
        values = part.gate.to(x)[..., part.units.to(x.device)].expand(n_rows, -1)
        gate_BC = gate_BC.index_copy(1, positions, values)
        if part.fill is not None:
            fill_C = fill_C.index_copy(0, positions, part.fill.to(x))
    gate = gate_BC.view(n_rows, *shape[1:])
    if all(part.fill is None for part in parts):
        return x * gate
    return x * gate + fill_C.view(shape) * (1 - gate)


def registered(module: nn.Module) -> list[Any]:
    """The functions that a module's own hooks call, those before its forward first."""
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
