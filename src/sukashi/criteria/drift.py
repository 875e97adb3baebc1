"""Drift: a criterion of our own. Units go in rounds, cheapest first, priced by what their loss moves per parameter."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from sukashi.core.types import Batch, Plan, Site
from sukashi.criteria import criteria
from sukashi.criteria.engine import DEFAULT_BUDGET, Budget, Engine
from sukashi.criteria.progressive import Divergence, Journal, Row, Verdict, plan_of, sweep
from sukashi.network import surgery


@criteria.register("drift", source="ours: growing budget of drift, per parameter", progressive=True, visits=4.0)
def drift(
    model: nn.Module,
    sites: Sequence[Site],
    data: Batch,
    *,
    generator: torch.Generator,
    share: Annotated[float, Field(gt=0, lt=1)] = 0.1,
    slack: Annotated[float, Field(ge=1)] = 1.5,
    scout: Annotated[int, Field(ge=1)] = 4,
    budget: Budget = DEFAULT_BUDGET,
    _journal: Journal | None = None,
) -> Plan:
    """The plan of drift: rounds that each remove the units whose loss moves the output least per parameter saved.

    With F the original and G the present network, D(G) = KL(F || G), the mean over images in nats, and w_u the
    parameters that would go with unit u now, the price of u is (D(G without u) - D(G)) / w_u. A round sets its limit at
    the lowest `share` of the prices last seen, asks again about every unit up to `slack` times the limit, from the
    output back, and removes at once those whose price in the present network is within the limit. Prices are thus
    always confirmed in the state in which the unit goes; what is expensive is not asked again until its turn nears.
    Prices rise as units go: after a round that removes fewer than a tenth of the units it asked about, the next takes
    twice the share (half of the units at most). The first prices are scouted on every `scout`-th image. Rounds end when
    G has drifted further than a uniform guess could (D > log K); the rest follows by its last price. No labels are
    used.

    Single effects do not add, which is why a ranking of them fails early; greedy removal would ask about every unit
    before each removal. Rounds ask 2 to 8 times a unit in all, where C-SWAP asks once: what they asked is counted in
    the plan's `n_evaluations`.
    """
    scouted = data[slice(0, None, scout)]
    rise = _scouted(model, sites, scouted, budget, _journal)
    n_evaluations = len(rise) * len(scouted)
    engine = Engine(model, sites, data, budget=budget)
    divergence = Divergence(engine.original, data.objective)
    rows: list[Row] = []
    passes: list[int] = []
    reach = share
    while True:
        worth = unit_parameters(model, sites, engine.keep)
        price = {
            (position, unit): rise[position, unit] / worth[site]
            for position, site in enumerate(sites)
            if engine.keep[site].sum() > 1
            for unit in torch.nonzero(engine.keep[site]).flatten().tolist()
        }
        if not price:
            break
        ranked = sorted(price, key=lambda pair: (price[pair], pair))
        limit = price[ranked[int(reach * len(ranked))]]
        # Asked again, the unit that sets the limit may differ from it by rounding.
        limit += 1e-3 * abs(limit)
        asked = [pair for pair in ranked if price[pair] <= limit + (slack - 1) * abs(limit)]

        def decide(pair: tuple[int, int], now: Tensor, logits: Tensor, limit: float = limit) -> Verdict:
            risen = divergence(logits) - divergence(now)
            return Verdict(risen / worth[sites[pair[0]]] <= limit, "", risen)  # noqa: B023 - used in this round only

        orders = [[unit for position, unit in asked if position == here] for here in range(len(sites))]
        found = sweep(engine, orders, decide, title=f"drift round {len(passes) + 1}", journal=_journal)
        rise.update({row.pair: row.verdict.effect for row in found})
        rows += [row for row in found if row.verdict.gone]
        passes.append(len(rows))
        n_evaluations += len(found) * len(data)
        n_gone = sum(row.verdict.gone for row in found)
        reach = share if 10 * n_gone >= len(asked) else min(2 * reach, max(share, 0.5))
        if divergence(engine.logits()) > math.log(divergence.log_p.shape[1]):
            break
    gone = {row.pair for row in rows}
    left = [pair for pair in rise if pair not in gone]
    left.sort(key=lambda pair: (rise[pair] / worth[sites[pair[0]]], pair))
    rows += [Row(pair, Verdict(False, "", rise[pair])) for pair in left]
    return plan_of(sites, rows, "drift", n_images=len(data), n_evaluations=n_evaluations, passes=passes)


def _scouted(
    model: nn.Module, sites: Sequence[Site], data: Batch, budget: int, journal: Journal | None
) -> dict[tuple[int, int], float]:
    """What each unit's loss alone moves in the intact network."""
    engine = Engine(model, sites, data, budget=budget)
    divergence = Divergence(engine.original, data.objective)

    def decide(pair: tuple[int, int], now: Tensor, logits: Tensor) -> Verdict:
        return Verdict(False, "", divergence(logits) - divergence(now))

    orders = [range(site.n_units) for site in sites]
    rows = sweep(engine, orders, decide, title="drift scouting", journal=journal)
    return {row.pair: row.verdict.effect for row in rows}


def unit_parameters(model: nn.Module, sites: Sequence[Site], keep: Mapping[Site, Tensor]) -> dict[Site, int]:
    """How many parameters go with one more unit of each site, given what is still there."""
    gone: Counter[tuple[str, str]] = Counter()
    for site in sites:
        lost = torch.nonzero(~keep[site]).flatten().tolist()
        for member in site.members:
            gone[member.module, member.side] += sum(len(member.index[unit]) for unit in lost)
    worth = {}
    for site in sites:
        total = 0
        written = {member.module: len(member.index[0]) for member in site.producers}
        for member in site.members:
            module = model.get_submodule(member.module)
            rows = len(member.index[0])
            for name, parameter in module.named_parameters(recurse=False):
                if surgery.heads(module):
                    own = surgery.head_axis(module, parameter) is not None
                    total += rows * own * parameter.numel() // surgery.heads(module)
                    continue
                if name != "weight" or parameter.ndim == 1:
                    # A bias, or BatchNorm's scale: it belongs to what a layer writes.
                    total += rows * (member.side == "out")
                    continue
                axis, other = (0, "in") if member.side == "out" else (1, "out")
                width = parameter.shape[1 - axis] - gone[member.module, other]
                if member.side == "in":  # of a layer that also writes the unit, its row has gone already
                    width -= written.get(member.module, 0)
                total += rows * width * math.prod(parameter.shape[2:])
        worth[site] = total
    return worth
