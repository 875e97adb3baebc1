"""One progressive pass over all units, from the output back to the input, written down as it goes."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sukashi.core import progress
from sukashi.core.objective import CLASSIFICATION, Objective
from sukashi.core.types import Plan, Site
from sukashi.criteria.engine import Engine
from sukashi.criteria.magnitude import producer_magnitude

# What a pass found at a site, by "title/layer"; whoever keeps it on disk makes a pass resumable.
Journal = MutableMapping[str, Any]


class Divergence:
    """Mean KL(F || G) over images, in nats and float64, from logits (N, K) of the original F and of another G; of those
    that the objective holds against each other.
    """

    def __init__(self, original: Tensor, objective: Objective = CLASSIFICATION) -> None:
        self.answers = objective.answers
        self.log_p = self.answers(original).double().log_softmax(1)
        self.p = self.log_p.exp()

    def __call__(self, logits: Tensor) -> float:
        return float((self.p * (self.log_p - self.answers(logits).double().log_softmax(1))).sum(1).mean())


@dataclass(frozen=True)
class Verdict:
    """What a criterion decided about a unit, and on what grounds."""

    gone: bool
    category: str
    effect: float
    p_values: np.ndarray | None = None


@dataclass(frozen=True)
class Row:
    """A unit, as (position of its site, unit), and its verdict."""

    pair: tuple[int, int]
    verdict: Verdict


Decide = Callable[[tuple[int, int], Tensor, Tensor], Verdict]


def sweep(
    engine: Engine,
    orders: Sequence[Sequence[int]],
    decide: Decide,
    *,
    title: str,
    journal: Journal | None = None,
) -> list[Row]:
    """Ask `decide(pair, logits now, logits without it)` about each unit in turn; units it condemns go at once.

    Sites go from the last to the first, units of site i in the order `orders[i]`. The last unit of a site stays
    whatever the verdict. Rows come in the order in which units were met. A site found in `journal` is taken from there.
    """
    rows: list[Row] = []
    n_gone = 0
    with progress.task(title, sum(len(order) for order in orders)) as shown:
        for position in reversed(range(len(engine.sites))):
            if not orders[position]:
                continue
            site = engine.sites[position]
            key = f"{title}/{site.layer}"
            noted = journal.get(key) if journal is not None else None
            if noted is not None:
                found = [_row(position, *entry) for entry in noted]
                engine.remove(site, [row.pair[1] for row in found if row.verdict.gone])
                shown.advance(len(found))
            else:
                found = []
                with engine.open(site) as suffix:
                    for unit in orders[position]:
                        logits = suffix.without(unit)
                        verdict = decide((position, unit), suffix.now, logits)
                        if verdict.gone and suffix.n_left == 1:
                            verdict = Verdict(False, verdict.category, verdict.effect, verdict.p_values)
                        if verdict.gone:
                            suffix.remove(unit, logits)
                            n_gone += 1
                        found.append(Row((position, unit), verdict))
                        shown.advance(note=f"removed {n_gone}")
                if journal is not None:
                    journal[key] = [_entry(row) for row in found]
            rows += found
    return rows


def _entry(row: Row) -> list[Any]:
    verdict = row.verdict
    p_values = None if verdict.p_values is None else verdict.p_values.tolist()
    return [row.pair[1], verdict.gone, verdict.category, verdict.effect, p_values]


def _row(position: int, unit: int, gone: bool, category: str, effect: float, p_values: list[float] | None) -> Row:
    return Row((position, unit), Verdict(gone, category, effect, None if p_values is None else np.array(p_values)))


def unit_orders(model: nn.Module, sites: Sequence[Site], order: str, generator: torch.Generator) -> list[list[int]]:
    """The order in which the units of each site are met: by index, by ascending magnitude, or at random."""
    if order == "index":
        return [list(range(site.n_units)) for site in sites]
    if order == "random":
        return [torch.randperm(site.n_units, generator=generator).tolist() for site in sites]
    return [producer_magnitude(model, site).argsort(stable=True).tolist() for site in sites]


def plan_of(
    sites: Sequence[Site],
    rows: Sequence[Row],
    method: str,
    *,
    n_images: int,
    n_evaluations: int,
    passes: Sequence[int] = (),
) -> Plan:
    """The plan in which units go in the order of `rows`."""
    return Plan.build(
        sites,
        [row.pair for row in rows],
        method=method,
        category={row.pair: row.verdict.category for row in rows},
        effect={row.pair: row.verdict.effect for row in rows},
        p_values={row.pair: row.verdict.p_values for row in rows if row.verdict.p_values is not None},
        passes=passes,
        n_images=n_images,
        n_evaluations=n_evaluations,
    )
