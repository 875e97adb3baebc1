"""OBS: units by what their loss costs once the rest has made up for it, in rounds of cutting and refitting."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, cast

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from sukashi.core import progress
from sukashi.core.errors import ModelError
from sukashi.core.precision import without_tf32
from sukashi.core.registry import BatchSize
from sukashi.core.types import Batch, Mask, Plan, Site
from sukashi.criteria import criteria
from sukashi.criteria.progressive import Row, Verdict, plan_of
from sukashi.network import hooks, surgery
from sukashi.network import sites as finder
from sukashi.network.exclude import remedy
from sukashi.repairs import mender
from sukashi.repairs.elimination import Elimination, gram_of, inputs_of, inverse_of, weight_of
from sukashi.repairs.order import parts
from sukashi.repairs.rows import is_refittable, places, written

Error = Literal["output", "layer"]
MOST_READ = 12_000  # numbers whose products, a matrix of 1.2 GB, are held several times
_DRAWS = 3  # of classes from the answer to each image


@criteria.register("obs", source="ours, after Hassibi and Stork 1993 and van der Ouderaa et al. 2024 (LLM Surgeon)")
def obs(
    model: nn.Module,
    sites: Sequence[Site],
    data: Batch,
    *,
    generator: torch.Generator,
    error: Error = "output",
    rounds: Annotated[int, Field(ge=1)] = 10,
    positions: Annotated[int, Field(ge=1)] = 16,
    batch_size: BatchSize = 128,
) -> Plan:
    """The plan of the optimal brain surgeon, of units and in rounds: what others make up for goes first.

    In each round, and in the network cut and refitted so far, the units of a site are eliminated one after another,
    each time the one whose loss raises the error E of what reads it least once the readers' other weights are refitted
    (`repairs.elimination`). The price of a unit is that rise, or that of a unit eliminated before it where that is
    higher. The cheapest 1 / `rounds` of all units go, what is left is refitted towards the dense network (the repair
    `refit`), and prices are taken anew. A cut by this plan is meant to be repaired by `refit`.

    With `error="output"` a reader's error counts by what it does to the network's answers, in nats an image: with D the
    change of its weights, H = mean x x' over places of what it reads, F = mean g g' over the same places, g the
    gradient there of log p(c) for a class c drawn from the network's own answer p, and P the places of an image,

        E = P / 2 * tr(D H D' F)

    the second order of KL(p || p') by Kronecker factors. With `error="layer"` it is its share of the variance of what
    the reader writes, tr(D H D') / variance, which knows nothing of what follows. Over images and at most `positions`
    places of each. No labels are used.

    Memory: twice the numbers that each reader reads, squared, in float64, of all of them. `batch_size` bounds the
    images in one pass.

    Raises ModelError for a site whose readers are neither linear layers nor convolutions without groups, or read more
    than `MOST_READ` numbers at a place, and for logits that are not finite; UsageError for fewer than five images.
    """
    readers = _readers(model, sites)
    names = sorted({name for of in readers.values() for name in of})
    keep = {site: torch.ones(site.n_units, dtype=torch.bool) for site in sites}
    n_units = sum(site.n_units for site in sites)
    mend = mender("refit", model, data)
    assert mend is not None
    rows: list[Row] = []
    price: dict[tuple[int, int], float] = {}
    with progress.task("obs", n_units) as shown:
        for number in range(1, rounds + 1):
            mask = Mask({site: kept.clone() for site, kept in keep.items()})
            small = copy.deepcopy(model).eval()
            table = surgery.cut(small, mask)
            if rows:
                mend(small, table)
            present = surgery.renumber(sites, mask)
            sums = _sums(small, names, data, positions, batch_size, generator)
            with torch.no_grad():
                priced = {name: _priced(small.get_submodule(name), sums.pop(name), error) for name in names}
            n_gone = n_units * number // rounds - len(rows)
            for position, (site, now) in enumerate(zip(sites, present, strict=True)):
                units = torch.nonzero(keep[site]).flatten().tolist()
                found = _prices(now, priced, small, n_gone)
                price |= {(position, unit): of for unit, of in zip(units, found, strict=True)}
            for pair in _cheapest(price, rows):
                site = sites[pair[0]]
                if n_gone and keep[site].sum() > 1:
                    keep[site][pair[1]] = False
                    rows.append(Row(pair, Verdict(True, "", price[pair])))
                    n_gone -= 1
                    shown.advance()
    rows += [Row(pair, Verdict(False, "", price[pair])) for pair in _cheapest(price, rows)]
    return plan_of(sites, rows, "obs", n_images=len(data), n_evaluations=0)


def _cheapest(price: Mapping[tuple[int, int], float], gone: Sequence[Row]) -> list[tuple[int, int]]:
    """Units that are not gone, cheapest first; ties by site, then unit."""
    left = price.keys() - {row.pair for row in gone}
    return sorted(left, key=lambda pair: (price[pair], pair))


def _readers(model: nn.Module, sites: Sequence[Site]) -> dict[Site, list[str]]:
    """{site: the layers that read its units and can be refitted}."""
    readers = {
        site: [m.module for m in site.consumers if is_refittable(model.get_submodule(m.module))] for site in sites
    }
    wide = {
        site.layer: n
        for site, names in readers.items()
        for n in [cast(Tensor, model.get_submodule(name).weight)[0].numel() for name in names]
        if n > MOST_READ
    }
    if wide:
        layer, n = next(iter(wide.items()))
        others = (site.layer for site in readers if site.layer not in wide)
        raise ModelError(
            f"what reads the units of {layer!r} reads {n:,} numbers at a place, and obs holds the products of at most "
            f"{MOST_READ:,}: {remedy([*wide], others)}"
        )
    if alien := [site.layer for site, names in readers.items() if not names]:
        reads = "is neither a linear layer nor a convolution without groups"
        others = (site.layer for site, names in readers.items() if names)
        raise ModelError(f"what reads the units of {alien[0]!r} {reads}: {remedy(alien, others)}")
    return readers


@dataclass(frozen=True)
class _Sums:
    """Of a reader: `gram` (N + 1, N + 1) sum x x' of what it reads at some places, `slopes` (M, M) sum g g' of the
    gradients there, and how many places an image has.
    """

    gram: Tensor
    slopes: Tensor
    n_places: int

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(self.gram + other.gram, self.slopes + other.slopes, self.n_places)


def _sums(
    model: nn.Module, names: Sequence[str], data: Batch, positions: int, batch_size: int, generator: torch.Generator
) -> dict[str, _Sums]:
    """{reader: its sums} over all images, in one pass forward and `_DRAWS` back."""
    device = next(model.parameters()).device
    draw = {name: np.random.default_rng(number) for number, name in enumerate(names)}
    uniform = torch.rand(len(data), _DRAWS, generator=generator, dtype=torch.float64)
    batches = parts(data.x.to(device), batch_size)
    at: dict[str, Tensor] = {}
    grams: dict[str, Tensor] = {}
    found: dict[str, _Sums] = {}

    def leave(name: str, layer: nn.Module, read: Tensor, output: Tensor) -> None:
        if name in draw:
            at[name] = places(layer, output, positions, draw[name])
            grams[name] = gram_of(layer, read.detach(), at[name])

    first = 0
    with without_tf32(), torch.enable_grad():
        outputs = [finder.place(model, name, batches[0][:2]) for name in names]
        for x in batches:
            with hooks.recorded(model, outputs) as seen, hooks.followed(model, leave):
                log_p = data.objective.answers(model(x)).log_softmax(1)
            if not torch.isfinite(log_p).all():
                raise ModelError(
                    "the model's logits hold NaN or Inf on calibration images: check weights and preprocessing"
                )
            reached = log_p.detach().double().exp().cumsum(1).cpu()
            classes = torch.searchsorted(reached, uniform[first : first + len(x)] * reached[:, -1:]).to(device)
            written_there = [seen[site][0] for site in outputs]
            slopes = {name: torch.zeros((), dtype=torch.float64, device=device) for name in names}
            for number, drawn in enumerate(classes.T):
                likelihood = log_p.gather(1, drawn[:, None]).sum()
                back = torch.autograd.grad(likelihood, written_there, retain_graph=number < _DRAWS - 1)
                for name, slope in zip(names, back, strict=True):
                    layer = model.get_submodule(name)
                    slope = slope.movedim(1, -1) if isinstance(layer, nn.Linear) else slope
                    rows = written(layer, slope, at[name]).double()
                    slopes[name] = slopes[name] + rows.T @ rows / _DRAWS
            for name, values in zip(names, written_there, strict=True):
                of = _Sums(grams[name], slopes[name], values[0, 0].numel())
                found[name] = found[name] + of if name in found else of
            first += len(x)
    return found


def _prices(site: Site, readers: Mapping[str, tuple[Tensor, Tensor]], model: nn.Module, n: int) -> list[float]:
    """The price of each unit of a site; units after the `n` cheapest are not eliminated, for no more will go."""
    going = [
        Elimination(*readers[m.module], inputs_of(model.get_submodule(m.module), m.index))
        for m in site.consumers
        if m.module in readers
    ]
    found, price = torch.zeros(site.n_units, dtype=torch.float64), 0.0
    for number in range(site.n_units):
        rises = torch.stack([of.rises() for of in going]).sum(0).cpu()
        if number == n:
            left = rises.isfinite()
            found[left] = rises[left].clamp(min=price)
            break
        unit = int(rises.argmin())
        found[unit] = price = max(price, float(rises[unit]))
        for of in going:
            of.remove(unit)
    return cast(list[float], found.tolist())


def _priced(layer: nn.Module, sums: _Sums, error: Error) -> tuple[Tensor, Tensor]:
    """H^-1 of a reader and the products S of its weights, by what errors of its outputs count (see `Elimination`)."""
    weight, n = weight_of(layer), sums.gram[-1, -1]
    if error == "output":
        return inverse_of(sums.gram), weight.T @ (sums.n_places / 2 * sums.slopes / n / n @ weight)
    product = weight @ sums.gram
    variance = (product * weight).sum() - product[:, -1].square().sum() / n
    # One that always writes the same loses nothing.
    return inverse_of(sums.gram), weight.T @ weight / variance.clamp(min=torch.finfo(product.dtype).tiny)
