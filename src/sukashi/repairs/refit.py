"""Readers of what was cut, refitted by least squares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from sukashi.core.errors import ModelError, UsageError
from sukashi.core.registry import BatchSize
from sukashi.core.types import Batch
from sukashi.network import hooks
from sukashi.network.layers import MAKERS
from sukashi.network.surgery import Table
from sukashi.repairs import repairs
from sukashi.repairs.branches import Branch, branches, joined
from sukashi.repairs.order import in_order, parts
from sukashi.repairs.ridge import Sums, refitted
from sukashi.repairs.rows import is_refittable, places, windows, written

MOST_READ = 16_384  # numbers whose products, a matrix of 2 GB, are held several times
HELD_OUT = 5  # one image of so many chooses the damping


@repairs.register(
    "refit", source="He et al. 2017, eq. 5; Zhang and Yang 2026 (CORP); of weights Frantar and Alistarh 2023"
)
def refit(
    model: nn.Module,
    dense: nn.Module,
    table: Table,
    data: Batch,
    *,
    positions: Annotated[int, Field(ge=1)] = 64,
    batch_size: BatchSize = 512,
) -> None:
    """Each layer, from the first that reads what was cut or lost weights, refitted to write what it writes in the dense
    network; and where that is added to something else, to make up for what this has lost.

    In the order in which layers run, with X what a layer reads in the network cut and refitted so far, Y what it writes
    in the dense one (without what of that was cut) and W its weights:

        min over W', b' of  sum |s (X W' + b' - Y) + C - D|^2 + lambda |s (W' - W)|^2

    over the images and at most `positions` places of each: windows of a convolution, tokens of a linear layer. s are
    the factors, one an output, of the BatchNorms and layer scales that follow it (1 where none does). Where what comes
    of it is added to something else, as a residual branch to its stream, C is that in the network so far and D in the
    dense one; else both are 0. lambda is a multiple of the mean of X^2, the one that errs least on every fifth image,
    and nothing changes where none does better than that. A layer without a bias hands b' on to the BatchNorm that
    follows it, and has none elsewhere. Layers that read nothing of what was cut are refitted too, for what they read
    has changed.

    Single weights that are zero stay so: each output of such a layer is a system of its own, solved whole, where
    SparseGPT goes from left to right. Layers in groups and transposed ones are left as they are, and so are branches
    that something else reads or scales.

    `batch_size` bounds the images in one pass, and so does their size (`order.parts`). Sums are float64, so that
    results depend on it in rounding alone. Memory: the numbers that a layer reads, or the places where it is read if
    these are fewer, squared, in float64; `positions` x images x outputs of all layers that are refitted; and what all
    images hold at one place of the network.

    Raises ModelError where nothing that reads what was cut has weights to refit, and where such a layer reads more than
    `MOST_READ` numbers at more than so many places, UsageError for fewer than five images.
    """
    readers = _readers(model, table)
    if not readers:
        raise ModelError("nothing that reads what was cut has weights to refit: leave `repair` out, or take norm")
    if len(data) < HELD_OUT:
        raise UsageError(f"refit needs at least {HELD_OUT} images, of which one chooses the damping, got {len(data)}")
    batches = parts(data.x.to(next(model.parameters()).device), batch_size)
    layers = _layers(model, dense, readers, batches[0][:2])
    at, goal = _goals(dense, layers, table, batches, positions)
    for name in [*layers]:
        if not _fits_memory(model, name, at[name], table) and name not in readers:
            del layers[name], at[name], goal[name]
    _check_memory(model, table, at)
    lines = {name: branch.line(model, name) for name, branch in layers.items()}
    norms = {name: branch.norm(model) for name, branch in layers.items()}
    sums = {name: (Sums(), Sums()) for name in layers}
    n_seen = dict.fromkeys(layers, 0)

    def shifts(name: str) -> bool:
        return norms[name] is not None or _bias(model.get_submodule(name)) is not None

    def visit(name: str, x: Tensor, other: Tensor | None) -> None:
        layer, first = model.get_submodule(name), n_seen[name]
        n_seen[name] += len(x)
        reads = _reads(layer, table.get(name, {}))
        weight, bias = _weight(layer).flatten(1), _bias(layer)
        factor, shift = lines[name]
        held_out = torch.arange(first, first + len(x)) % HELD_OUT == HELD_OUT - 1
        for of, rows in zip(sums[name], (~held_out, held_out), strict=True):
            here = rows.nonzero()[:, 0]
            if not len(here):
                continue
            places_here = at[name][first + here]
            read = windows(layer, x[here.to(x.device)], places_here)
            now = read @ weight.T if bias is None else read @ weight.T + bias
            now = now * factor + shift
            if other is not None:
                now = now + written(layer, other[here.to(x.device)], places_here)
            missing = goal[name][first + here.to(x.device)].flatten(0, 1) - now
            read = read[:, reads.to(x.device)]
            of.add(torch.cat([read, read.new_ones(len(read), 1)], 1) if shifts(name) else read, missing)

    def mend(name: str) -> None:
        layer, sides = model.get_submodule(name), table.get(name, {})
        fit, held_out = sums.pop(name)
        weight = _weight(layer)
        flat, reads = weight.flatten(1), _reads(layer, sides).to(weight.device)
        change = refitted(fit, held_out, int(shifts(name)), _live(weight, reads, sides, int(shifts(name))))
        factor = lines[name][0].double()
        change = change / factor.where(factor != 0, torch.inf)
        flat[:, reads] += change[: int(reads.sum())].T.to(flat)
        weight.copy_(flat.view_as(weight))
        bias, norm = _bias(layer), norms[name]
        if bias is not None:
            bias += change[-1].to(bias)
        elif norm is not None:
            mean = model.get_submodule(norm).running_mean
            assert isinstance(mean, Tensor)
            mean -= change[-1].to(mean)
        del at[name], goal[name]

    in_order(model, layers, batches, visit, mend, what="refit")


def _layers(model: nn.Module, dense: nn.Module, readers: Sequence[str], x: Tensor) -> dict[str, Branch]:
    """What is refitted: the readers, and from the first of them on all layers that can be."""
    order = hooks.calls(dense, x)
    after = order[min((order.index(name) for name in readers if name in order), default=len(order)) :]
    able = [
        name for name, layer in model.named_modules() if is_refittable(layer) and (name in after or name in readers)
    ]
    found = branches(dense, able, x)
    # A reader that runs twice is refused later; any other is left as it is.
    return {name: found.get(name, Branch()) for name in able if name in found or name in readers}


def _readers(model: nn.Module, table: Table) -> list[str]:
    """The layers that read what was cut or silenced, or lost weights, and can be refitted."""
    return [
        name
        for name, sides in table.items()
        if {"in", "zero in", "weights"} & set(sides) and is_refittable(model.get_submodule(name))
    ]


def _check_memory(model: nn.Module, table: Table, at: Mapping[str, Tensor]) -> None:
    """Refuse a layer whose products don't fit the memory, before any is refitted."""
    for name, places_read in at.items():
        if _fits_memory(model, name, places_read, table):
            continue
        n = _weight(model.get_submodule(name))[0].numel()
        what = "of every image" if places_read.shape[1] == 1 else f"at {places_read.shape[1]} places of every image"
        most = 0 if "weights" in table[name] else MOST_READ // places_read.shape[1]
        fewer = f"at most {most:,} calibration images or " if most >= HELD_OUT else ""
        raise ModelError(
            f"layer {name!r} reads {n:,} numbers {what}, and refit holds the products of at most {MOST_READ:,}: give "
            f"{fewer}another repair, or leave it out"
        )


def _fits_memory(model: nn.Module, name: str, places_read: Tensor, table: Table) -> bool:
    few = places_read.numel() <= MOST_READ and "weights" not in table.get(name, {})
    return few or _weight(model.get_submodule(name))[0].numel() <= MOST_READ


def _weight(layer: nn.Module) -> Tensor:
    assert isinstance(layer, MAKERS)
    return layer.weight


def _bias(layer: nn.Module) -> Tensor | None:
    assert isinstance(layer, MAKERS)
    return layer.bias


def _reads(layer: nn.Module, sides: Mapping[str, Sequence[int]]) -> Tensor:
    """(N,) which of the numbers of a layer's windows it may read: not those that were silenced."""
    reads = torch.ones(_weight(layer).shape[1:], dtype=torch.bool)
    reads[list(sides.get("zero in", []))] = False
    return reads.flatten()


def _live(weight: Tensor, reads: Tensor, sides: Mapping[str, Sequence[int]], free: int) -> Tensor | None:
    """(N + free, M) which single weights may change; None where all that the layer reads may."""
    if "weights" not in sides:
        return None
    live = torch.ones(weight.numel(), dtype=torch.bool, device=weight.device)
    live[torch.tensor(sides["weights"], dtype=torch.long, device=weight.device)] = False
    live = live.view(len(weight), -1)[:, reads].T
    return torch.cat([live, live.new_ones(free, live.shape[1])])


def _goals(
    dense: nn.Module, layers: Mapping[str, Branch], table: Table, batches: Sequence[Tensor], n: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """{layer: (B, P) places of each image}, drawn anew for each, and {layer: (B, P, outputs) what comes there of what
    it writes in the dense network}, with what that is added to, but for the outputs that were cut.
    """
    draw = {name: np.random.default_rng(number) for number, name in enumerate(sorted(layers))}
    at: dict[str, list[Tensor]] = {name: [] for name in layers}
    goal: dict[str, list[Tensor]] = {name: [] for name in layers}

    def kept(name: str) -> list[int] | slice:
        return [*table[name]["out"]] if "out" in table.get(name, {}) else slice(None)

    def at_places(name: str, output: Tensor) -> Tensor:
        here = at[name][-1]
        found: Tensor = written(dense.get_submodule(name), output, here).unflatten(0, here.shape)
        return found[..., kept(name)]

    lines = {name: [of[kept(name)] for of in branch.line(dense, name)] for name, branch in layers.items()}

    def leave(name: str, layer: nn.Module, read: Tensor, output: Tensor) -> None:
        if name in at:
            at[name].append(places(layer, output, n, draw[name]))
            factor, shift = lines[name]
            goal[name].append(at_places(name, output) * factor + shift)

    def meet(name: str, other: Tensor) -> None:
        goal[name][-1] += at_places(name, other)

    with hooks.followed(dense, lambda name, layer: None, leave), joined(dense, layers, meet):
        for batch in batches:
            dense(batch)
    return {name: torch.cat(of) for name, of in at.items()}, {name: torch.cat(of) for name, of in goal.items()}
