"""The layers behind a cut, refitted by least squares."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from sukashi.core.errors import ModelError, UsageError
from sukashi.core.registry import BatchSize
from sukashi.core.types import Batch
from sukashi.network import branches as streams
from sukashi.network import hooks, insert
from sukashi.network.branches import Branch, at_sums
from sukashi.network.layers import MAKERS
from sukashi.network.surgery import Table
from sukashi.repairs import repairs
from sukashi.repairs.order import in_order, parts
from sukashi.repairs.ridge import Sums, refitted
from sukashi.repairs.rows import is_refittable, places, windows, written

MOST_READ = 16_384  # numbers whose products, a matrix of 2 GB, are held several times
LEAST_FACTOR = 1e-4  # of the largest of a layer: an output that counts for less would take very large weights
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
    SparseGPT goes from left to right. So do units that were silenced. Left as they are: layers in groups, transposed
    ones, those that compute or share their weights, have hooks that change what they write, run more than once or hold
    something else than images, and, of those that read nothing of what was cut, those too wide for the memory. A branch
    that something else reads, or scales in a way unknown here, is refitted without its sum.

    `batch_size` bounds the images in one pass, and so does their size (`order.parts`). Sums are float64, so that
    results depend on it in rounding alone. Memory: the numbers that a layer reads, or the places where it is read if
    these are fewer, squared, in float64; `positions` x images x outputs of all layers that are refitted; and what all
    images hold at one place of the network (of more than 256 MB of images, what a batch holds).

    Raises ModelError where nothing behind what was cut can be refitted, and where a layer that reads what was cut reads
    more than `MOST_READ` numbers at more than so many places, UsageError for fewer than five images.
    """
    if len(data) < HELD_OUT:
        raise UsageError(f"refit needs at least {HELD_OUT} images, of which one chooses the damping, got {len(data)}")
    x = data.x.to(next(model.parameters()).device)
    layers = _layers(model, dense, table, x[:2], positions)
    if not layers:
        raise ModelError("nothing behind what was cut has weights to refit: leave `repair` out, or take norm")
    layers = _fitting(model, table, layers, len(x))
    batches = parts(x, batch_size)
    at, goal = _goals(dense, layers, table, batches, positions)
    lines = {name: of.branch.line(model, name) for name, of in layers.items()}
    norms = {name: of.branch.norm(model) for name, of in layers.items()}
    sums = {name: (Sums(), Sums()) for name in layers}
    n_seen = dict.fromkeys(layers, 0)

    def shifts(name: str) -> bool:
        return norms[name] is not None or _bias(model.get_submodule(name)) is not None

    def visit(name: str, x: Tensor, other: Tensor | None) -> None:
        layer, of, first, sides = model.get_submodule(name), layers[name], n_seen[name], table.get(name, {})
        x = of.by_image(x)
        n_seen[name] += len(x)
        reads = _reads(layer, sides)
        weight, bias = _weight(layer).flatten(1), _bias(layer)
        factor, shift = lines[name]
        held_out = torch.arange(first, first + len(x)) % HELD_OUT == HELD_OUT - 1
        for fit, rows in zip(sums[name], (~held_out, held_out), strict=True):
            here = rows.nonzero()[:, 0]
            if not len(here):
                continue
            places_here = at[name][first + here]
            read = windows(layer, x[here.to(x.device)], places_here)
            now = read @ weight.T if bias is None else read @ weight.T + bias
            now = now * factor + shift
            if other is not None:
                now = now + written(layer, of.by_image(other)[here.to(x.device)], places_here)
            missing = goal[name][first + here.to(x.device)].flatten(0, 1) - now
            missing[:, sides.get("zero out", [])] = 0
            read = read[:, reads.to(x.device)]
            fit.add(torch.cat([read, read.new_ones(len(read), 1)], 1) if shifts(name) else read, missing)

    def mend(name: str) -> None:
        layer, sides = model.get_submodule(name), table.get(name, {})
        fit, held_out = sums.pop(name)
        weight = _weight(layer)
        flat, reads = weight.flatten(1), _reads(layer, sides).to(weight.device)
        change = refitted(fit, held_out, int(shifts(name)), _live(weight, reads, sides, int(shifts(name))))
        factor = lines[name][0].double()
        change = change / factor.where(factor.abs() > LEAST_FACTOR * factor.abs().max(), torch.inf)
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

    in_order(model, {name: of.branch for name, of in layers.items()}, batches, visit, mend, what="refit")


@dataclass(frozen=True)
class _Layer:
    """A layer that is refitted: what becomes of what it writes, how many rows it has for each image (as many as windows
    in attention within these), and at how many places of an image it is refitted.
    """

    branch: Branch
    n_rows: int
    n_places: int

    def by_image(self, x: Tensor) -> Tensor:
        """(B, rows x places, features) out of (B x rows, places, features); as it is where an image has one row."""
        return x if self.n_rows == 1 else x.reshape(len(x) // self.n_rows, -1, x.shape[-1])


def _layers(model: nn.Module, dense: nn.Module, table: Table, x: Tensor, positions: int) -> dict[str, _Layer]:
    """What is refitted: from the first layer on that reads what went or lost single weights, all that can be.

    A layer that reads what went and runs twice is refused later; any other is left as it is.
    """
    order = hooks.calls(dense, x)
    touched = {name for name, sides in table.items() if {"in", "zero in", "zero out", "weights"} & sides.keys()}
    behind = {*order[min((order.index(name) for name in touched if name in order), default=len(order)) :], *touched}
    n_owners = Counter(id(p) for _, p in dense.named_parameters(remove_duplicate=False))
    altered = streams.altered(dense, x)
    able = [
        name
        for name, layer in insert.layers(model).items()
        if name in behind
        and is_refittable(layer)
        and is_refittable(dense.get_submodule(name))
        and n_owners[id(dense.get_submodule(name).weight)] == 1
        and name not in altered
    ]
    found = streams.branches(dense, able, x)
    shapes: list[dict[str, torch.Size]] = []

    def leave(name: str, layer: nn.Module, read: Tensor, output: Tensor) -> None:
        if name in able:
            shapes[-1][name] = output.shape

    for some in (x[:1], x):
        shapes.append({})
        with hooks.followed(dense, leave):
            dense(some)
    layers = {}
    for name in able:
        if name not in found and name not in touched:
            continue
        one, two = (of.get(name, torch.Size([0])) for of in shapes)
        features_last = isinstance(model.get_submodule(name), nn.Linear)
        # Rows that are not those of images, one after another, can't be told apart.
        if len(one) < 2 or two[0] != 2 * one[0] or (one[0] > 1 and not features_last):
            continue
        n_places = one[0] * math.prod(one[1:-1] if features_last else one[2:])
        layers[name] = _Layer(found.get(name, Branch()), one[0], min(n_places, positions))
    return layers


def _fitting(model: nn.Module, table: Table, layers: Mapping[str, _Layer], n_images: int) -> dict[str, _Layer]:
    """Those whose products fit the memory; one that does not is refused if it reads what went, and left out if not."""
    fitting = {}
    for name, of in layers.items():
        n, sides = _weight(model.get_submodule(name))[0].numel(), table.get(name, {})
        if n <= MOST_READ or (of.n_places * n_images <= MOST_READ and "weights" not in sides):
            fitting[name] = of
        elif {"in", "zero in", "weights"} & sides.keys():
            what = "of every image" if of.n_places == 1 else f"at {of.n_places} places of every image"
            most = 0 if "weights" in sides else MOST_READ // of.n_places
            fewer = f"at most {most:,} calibration images or " if most >= HELD_OUT else ""
            raise ModelError(
                f"layer {name!r} reads {n:,} numbers {what}, and refit holds the products of at most {MOST_READ:,}: "
                f"give {fewer}another repair, or leave it out"
            )
    return fitting


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
    dense: nn.Module, layers: Mapping[str, _Layer], table: Table, batches: Sequence[Tensor], n: int
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

    branches = {name: of.branch for name, of in layers.items()}
    lines = {name: [part[kept(name)] for part in branch.line(dense, name)] for name, branch in branches.items()}

    def leave(name: str, layer: nn.Module, read: Tensor, output: Tensor) -> None:
        if name in at:
            output = layers[name].by_image(output)
            at[name].append(places(layer, output, n, draw[name]))
            factor, shift = lines[name]
            goal[name].append(at_places(name, output) * factor + shift)

    def meet(name: str, other: Tensor) -> None:
        goal[name][-1] += at_places(name, layers[name].by_image(other))

    with hooks.followed(dense, leave), at_sums(dense, branches, meet):
        for batch in batches:
            dense(batch)
    return {name: torch.cat(of) for name, of in at.items()}, {name: torch.cat(of) for name, of in goal.items()}
