"""Readers of what was cut, refitted by least squares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from sukashi.core.errors import ModelError, UsageError
from sukashi.core.registry import BatchSize
from sukashi.core.types import Batch
from sukashi.network import hooks
from sukashi.network.layers import MAKERS
from sukashi.network.surgery import Table
from sukashi.repairs import repairs
from sukashi.repairs.order import in_order, parts
from sukashi.repairs.ridge import Sums, refitted
from sukashi.repairs.rows import is_refittable, places, windows, written

MOST_READ = 16_384  # numbers whose products, a matrix of 2 GB, are held several times
HELD_OUT = 5  # one image of so many chooses the damping
_NORMS = nn.modules.batchnorm._BatchNorm, FrozenBatchNorm2d


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
    """Each layer that reads what was cut, or lost weights, refitted to write what it writes in the dense network.

    In the order in which layers run, with X what a layer reads in the network cut and refitted so far, Y what it writes
    in the dense one (without what of that was cut) and W its weights:

        min over W', b' of  sum |X W' + b' - Y|^2 + lambda |W' - W|^2

    over the images and at most `positions` places of each: windows of a convolution, tokens of a linear layer. lambda
    is a multiple of the mean of X^2, the one that errs least on every fifth image, and nothing changes where none does
    better than that. A layer without a bias hands b' on to the BatchNorm that follows it, and has none elsewhere.

    Single weights that are zero stay so: each output of such a layer is a system of its own, solved whole, where
    SparseGPT goes from left to right. Layers in groups and transposed ones are left as they are.

    `batch_size` bounds the images in one pass, and so does their size (`order.parts`); where there are more, each layer
    takes a pass of its own. Sums are float64, so that results depend on it in rounding alone. Memory: the numbers that
    a layer reads, or the places where it is read if these are fewer, squared, in float64, and `positions` x images x
    outputs of all layers that are refitted.

    Raises ModelError where nothing that reads what was cut has weights to refit, and where a layer reads more than
    `MOST_READ` numbers at more than so many places, UsageError for fewer than five images.
    """
    readers = _readers(model, table)
    if not readers:
        raise ModelError("nothing that reads what was cut has weights to refit: leave `repair` out, or take norm")
    if len(data) < HELD_OUT:
        raise UsageError(f"refit needs at least {HELD_OUT} images, of which one chooses the damping, got {len(data)}")
    batches = parts(data.x.to(next(model.parameters()).device), batch_size)
    norms = _norms_after(dense, readers, batches[0][:1])
    at, y = _written_dense(dense, readers, table, batches, positions)
    _check_memory(model, table, at)
    sums = {name: (Sums(), Sums()) for name in readers}
    n_seen = dict.fromkeys(readers, 0)

    def shifts(name: str) -> bool:
        return name in norms or _bias(model.get_submodule(name)) is not None

    def visit(name: str, x: Tensor) -> None:
        layer, first = model.get_submodule(name), n_seen[name]
        n_seen[name] += len(x)
        reads = _reads(layer, table[name])
        weight, bias = _weight(layer).flatten(1), _bias(layer)
        held_out = torch.arange(first, first + len(x)) % HELD_OUT == HELD_OUT - 1
        for of, rows in zip(sums[name], (~held_out, held_out), strict=True):
            here = rows.nonzero()[:, 0]
            if not len(here):
                continue
            read = windows(layer, x[here.to(x.device)], at[name][first + here])
            missing = y[name][first + here.to(x.device)].flatten(0, 1) - read @ weight.T
            missing = missing if bias is None else missing - bias
            read = read[:, reads.to(x.device)]
            of.add(torch.cat([read, read.new_ones(len(read), 1)], 1) if shifts(name) else read, missing)

    def mend(name: str) -> None:
        layer = model.get_submodule(name)
        fit, held_out = sums.pop(name)
        weight = _weight(layer)
        flat, reads = weight.flatten(1), _reads(layer, table[name]).to(weight.device)
        change = refitted(fit, held_out, int(shifts(name)), _live(weight, reads, table[name], int(shifts(name))))
        flat[:, reads] += change[: int(reads.sum())].T.to(flat)
        weight.copy_(flat.view_as(weight))
        bias = _bias(layer)
        if bias is not None:
            bias += change[-1].to(bias)
        elif name in norms:
            mean = model.get_submodule(norms[name]).running_mean
            assert isinstance(mean, Tensor)
            mean -= change[-1].to(mean)
        del at[name], y[name]

    in_order(model, readers, batches, visit, mend, what="refit")


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
        n, n_places = _weight(model.get_submodule(name))[0].numel(), places_read.numel()
        if n <= MOST_READ or (n_places <= MOST_READ and "weights" not in table[name]):
            continue
        what = "of every image" if places_read.shape[1] == 1 else f"at {places_read.shape[1]} places of every image"
        most = 0 if "weights" in table[name] else MOST_READ // places_read.shape[1]
        fewer = f"at most {most:,} calibration images or " if most >= HELD_OUT else ""
        raise ModelError(
            f"layer {name!r} reads {n:,} numbers {what}, and refit holds the products of at most {MOST_READ:,}: give "
            f"{fewer}another repair, or leave it out"
        )


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


def _norms_after(dense: nn.Module, readers: Sequence[str], x: Tensor) -> dict[str, str]:
    """{reader without a bias: the BatchNorm that reads just what it writes}."""
    found: dict[str, str] = {}
    written_by: dict[int, tuple[str, Tensor]] = {}

    def leave(name: str, layer: nn.Module, read: Tensor, output: Tensor) -> None:
        if name in readers and _bias(layer) is None:
            written_by[id(output)] = name, output  # kept, so that nothing else gets its id
        elif isinstance(layer, _NORMS) and layer.running_mean is not None and id(read) in written_by:
            found[written_by[id(read)][0]] = name

    with hooks.followed(dense, lambda name, layer: None, leave):
        dense(x)
    return found


def _written_dense(
    dense: nn.Module, readers: Sequence[str], table: Table, batches: Sequence[Tensor], n: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """{reader: (B, P) places of each image}, drawn anew for each, and {reader: (B, P, outputs) what it writes there in
    the dense network}, but for the outputs that were cut.
    """
    draw = {name: np.random.default_rng(number) for number, name in enumerate(sorted(readers))}
    at: dict[str, list[Tensor]] = {name: [] for name in readers}
    y: dict[str, list[Tensor]] = {name: [] for name in readers}

    def leave(name: str, layer: nn.Module, read: Tensor, output: Tensor) -> None:
        if name in at:
            here, kept = places(layer, output, n, draw[name]), table[name].get("out")
            found = written(layer, output, here).unflatten(0, here.shape)
            at[name].append(here)
            y[name].append(found if kept is None else found[:, :, kept])

    with hooks.followed(dense, lambda name, layer: None, leave):
        for batch in batches:
            dense(batch)
    return {name: torch.cat(parts) for name, parts in at.items()}, {name: torch.cat(parts) for name, parts in y.items()}
