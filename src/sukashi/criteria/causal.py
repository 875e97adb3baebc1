"""Causal criteria: C-SWAP, C-BP and AMP (Bauvin et al. 2025).

A unit is removed, the images are run again, and what happened to their scores is the unit's causal effect. C-SWAP and
AMP decide while they remove; C-BP ranks on the intact network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import scipy.stats
import torch
from pydantic import Field
from torch import Tensor, nn

from sukashi.core.errors import DataError
from sukashi.core.precision import exact
from sukashi.core.types import Batch, Plan, Site
from sukashi.criteria import criteria
from sukashi.criteria.engine import DEFAULT_BUDGET, Budget, Engine
from sukashi.criteria.progressive import Divergence, Journal, Row, Verdict, plan_of, sweep, unit_orders

Scoring = Callable[[Tensor, Tensor], Tensor]
Level = Annotated[float, Field(gt=0, lt=1)]


@dataclass(frozen=True)
class ClassSums:
    """All a decision needs of the images, per class: additive, so that images can be shared out over machines.

    With d = sigma* - sigma: `n` images, sums of d, d^2, d/sigma and sigma; each (K,) float64.
    """

    n: np.ndarray
    d: np.ndarray
    d2: np.ndarray
    ratio: np.ndarray
    sigma: np.ndarray

    def __add__(self, other: ClassSums) -> ClassSums:
        return ClassSums(
            self.n + other.n, self.d + other.d, self.d2 + other.d2, self.ratio + other.ratio, self.sigma + other.sigma
        )

    @staticmethod
    def of(before: Tensor, after: Tensor, classes: tuple[Tensor, Tensor], n_classes: int) -> ClassSums:
        """Sums of scores `before` and `after` (B,) by class, `classes` as an objective gives them."""
        rows, of_rows = classes
        d = after - before
        columns = torch.stack([torch.ones_like(d), d, d * d, d / before, before], 1)[rows]
        sums = torch.zeros(n_classes, 5, dtype=torch.float64, device=d.device).index_add_(0, of_rows, columns)
        return ClassSums(*sums.T.cpu().numpy())

    def p_values(self) -> np.ndarray:
        """Two-sided paired t-test of each class (K,): t = mean(d) / sqrt(var(d) / n), n - 1 degrees of freedom.

        No difference at all (0/0) has p = 1, a constant difference other than 0 has p = 0; a class with fewer than two
        images has p = 1.
        """
        return np.asarray(_t_test(self.n, self.d, self.d2))

    def p_value(self) -> float:
        """The same test over all classes at once ("general inference", sec. 4.5)."""
        return float(_t_test(self.n.sum(), self.d.sum(), self.d2.sum()))

    def effect(self, form: str) -> float:
        """xi: `ratio` is definition 1, mean(d / sigma); `mean` is mean(d) / mean(sigma)."""
        if form == "ratio":
            return float(self.ratio.sum() / self.n.sum())
        return float(self.d.sum() / self.sigma.sum())


def _t_test(n: Any, d: Any, d2: Any) -> Any:
    n, d, d2 = np.asarray(n, float), np.asarray(d, float), np.asarray(d2, float)
    enough = n >= 2
    m = np.where(enough, n, 2.0)
    mean = d / m
    variance = np.maximum(d2 - m * mean**2, 0.0) / (m - 1)
    # A variance that is nothing but rounding of the sums is zero.
    variance = np.where(variance <= 1e-14 * d2 / m, 0.0, variance)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = mean / np.sqrt(variance / m)
    p = 2 * scipy.stats.t.sf(np.abs(np.where(np.isnan(t), 0.0, t)), m - 1)
    return np.where(enough, p, 1.0)


@dataclass(frozen=True)
class CausalTest:
    """Definition 2: compares scores before and after a removal, and says what the unit is."""

    target: Tensor
    classes: tuple[Tensor, Tensor]
    n_classes: int
    scoring: Scoring
    form: str
    alpha: float
    inference: str

    def scores(self, logits: Tensor) -> Tensor:
        return self.scoring(logits, self.target)

    def __call__(self, before: Tensor, logits: Tensor) -> Verdict:
        """`before` (B,) are the baseline's scores; the verdict removes what is not critical."""
        sums = ClassSums.of(before, self.scores(logits), self.classes, self.n_classes)
        p_values = sums.p_values()
        xi = sums.effect(self.form)
        significant = (float(p_values.min()) if self.inference == "voting" else sums.p_value()) < self.alpha
        # Algorithm 1, line 8: xi = 0 counts as critical.
        category = "neutral" if not significant else "critical" if xi <= 0 else "detrimental"
        return Verdict(category != "critical", category, xi, p_values)


@criteria.register("cswap", source="Bauvin et al. 2025, algorithm 1", progressive=True, visits=1.0)
def cswap(
    model: nn.Module,
    sites: Sequence[Site],
    data: Batch,
    *,
    generator: torch.Generator,
    baseline: Literal["original", "current"] = "current",
    samples: Literal["correct", "all"] = "correct",
    effect: Literal["ratio", "mean"] = "mean",
    alpha: Level = 0.05,
    inference: Literal["voting", "general"] = "voting",
    order: Literal["index", "magnitude", "random"] = "magnitude",
    scoring: Scoring | None = None,
    budget: Budget = DEFAULT_BUDGET,
    _journal: Journal | None = None,
) -> Plan:
    """The plan of C-SWAP: from the output back, every unit that is not critical goes at once; critical ones follow.

    For each site, output to input, and each unit n of it: G~ = G without n; d = sigma(G~) - sigma(baseline) on each
    image; n stays if a paired t-test of d is significant in a class (`voting`) or over all images (`general`) and
    xi_n <= 0, else it goes (definitions 1 and 2, algorithm 1). Critical units follow by ascending harm, xi from 0 down,
    as measured when each was met.

    Definition 1 compares with the original network; algorithm 1 can be read as comparing with the present one:
    `baseline` says which, and the present one ranks better (benchmarks/defaults.py, training images only: SAUCE 45.7
    against 41.9 on ResNet-20, 62.7 against 62.6 on ResNet-18). Definition 1's xi, the mean of d / sigma
    (`effect="ratio"`), is ruled by the few images on which sigma is near zero; `mean` is mean(d) / mean(sigma), and
    `samples="correct"` leaves misclassified images out. `scoring(logits, target)` gives sigma (B,); None is the
    objective's score, the true class's probability (sec. 3.2). The last unit of a site is never removed.
    """
    data = usable(model, data, samples)
    engine = Engine(model, sites, data, budget=budget)
    test = _causal_test(engine, data, scoring, effect, alpha, inference)
    original = test.scores(engine.original)

    def decide(pair: tuple[int, int], now: Tensor, logits: Tensor) -> Verdict:
        return test(original if baseline == "original" else test.scores(now), logits)

    rows = sweep(engine, unit_orders(model, sites, order, generator), decide, title="cswap", journal=_journal)
    gone = [row for row in rows if row.verdict.gone]
    kept = sorted((row for row in rows if not row.verdict.gone), key=lambda row: (-row.verdict.effect, row.pair))
    return plan_of(
        sites, [*gone, *kept], "cswap", passes=(len(gone),), n_images=len(data), n_evaluations=len(rows) * len(data)
    )


@criteria.register("cbp", source="Bauvin et al. 2025, algorithm 4", visits=1.0)
def cbp(
    model: nn.Module,
    sites: Sequence[Site],
    data: Batch,
    *,
    generator: torch.Generator,
    samples: Literal["correct", "all"] = "correct",
    effect: Literal["ratio", "mean"] = "mean",
    alpha: Level = 0.05,
    inference: Literal["voting", "general"] = "voting",
    scoring: Scoring | None = None,
    budget: Budget = DEFAULT_BUDGET,
    _journal: Journal | None = None,
) -> Plan:
    """The plan of C-BP: every unit is tested alone on the intact network; what helps or does nothing goes first.

    Detrimental units go by descending xi, neutral ones by ascending |xi|, critical ones by ascending harm (xi from 0
    down). Algorithm 4 cuts a unit's connections to critical successors only; physical removal cuts all of them, and so
    do we. Options are those of C-SWAP.
    """
    data = usable(model, data, samples)
    engine = Engine(model, sites, data, budget=budget)
    test = _causal_test(engine, data, scoring, effect, alpha, inference)
    original = test.scores(engine.original)

    def decide(pair: tuple[int, int], now: Tensor, logits: Tensor) -> Verdict:
        verdict = test(original, logits)
        return Verdict(False, verdict.category, verdict.effect, verdict.p_values)

    rows = sweep(engine, unit_orders(model, sites, "index", generator), decide, title="cbp", journal=_journal)
    turn = {"detrimental": 0, "neutral": 1, "critical": 2}

    def rank(row: Row) -> tuple[int, float, tuple[int, int]]:
        xi = row.verdict.effect
        return turn[row.verdict.category], (abs(xi) if row.verdict.category == "neutral" else -xi), row.pair

    return plan_of(sites, sorted(rows, key=rank), "cbp", n_images=len(data), n_evaluations=len(rows) * len(data))


@criteria.register(
    "amp", source="Bauvin et al. 2025, algorithm 3; after Conmy et al. 2023", progressive=True, visits=1.0
)
def amp(
    model: nn.Module,
    sites: Sequence[Site],
    data: Batch,
    *,
    generator: torch.Generator,
    tau: Annotated[float, Field(gt=0)] = 0.0575,
    order: Literal["index", "magnitude", "random"] = "magnitude",
    budget: Budget = DEFAULT_BUDGET,
    _journal: Journal | None = None,
) -> Plan:
    """The plan of AMP: from the output back, a unit goes if it moves the output distribution by less than tau.

    n goes if KL(F || G~) - KL(F || G) < tau, F the original network, G the present one, G~ = G without n, KL the mean
    over images in nats. What stays is removed afterwards by ascending difference, as measured when each unit was met
    (the paper leaves that order open).
    """
    engine = Engine(model, sites, data, budget=budget)
    divergence = Divergence(engine.original, data.objective)

    def decide(pair: tuple[int, int], now: Tensor, logits: Tensor) -> Verdict:
        rise = divergence(logits) - divergence(now)
        return Verdict(rise < tau, "", rise)

    rows = sweep(engine, unit_orders(model, sites, order, generator), decide, title="amp", journal=_journal)
    gone = [row for row in rows if row.verdict.gone]
    kept = sorted((row for row in rows if not row.verdict.gone), key=lambda row: (row.verdict.effect, row.pair))
    return plan_of(
        sites, [*gone, *kept], "amp", passes=(len(gone),), n_images=len(data), n_evaluations=len(rows) * len(data)
    )


def _causal_test(
    engine: Engine, data: Batch, scoring: Scoring | None, form: str, alpha: float, inference: str
) -> CausalTest:
    objective, target = data.objective, data.target.to(engine.original.device)
    classes, n_classes = objective.classes(target), objective.n_classes(engine.original.shape[1])
    return CausalTest(target, classes, n_classes, scoring or objective.score, form, alpha, inference)


def usable(model: nn.Module, data: Batch, samples: str) -> Batch:
    """The images a causal test may use: `all`, or those the model classifies correctly (`correct`).

    Raises DataError where a class keeps fewer than two images: a t-test needs two.
    """
    if samples == "all":
        kept, said = torch.ones(len(data), dtype=torch.bool), "calibration images"
    else:
        device = next(model.parameters()).device
        with exact():
            outcomes = [b.objective.outcome(model(b.x.to(device)).cpu(), b.target) for b in data.split(128)]
        kept = torch.cat(outcomes) > 0.5
        said = "correctly classified calibration images"
    given = data.objective.classes(data.target)[1].unique().tolist()
    counts = data.objective.counts(data.target[kept], max(given) + 1)
    for k in given:
        if counts[k] < 2:
            raise DataError(
                f"class {k} has {int(counts[k])} {said}, a t-test needs 2: give more images a class, by `calibration=N`"
            )
    return data[torch.nonzero(kept).flatten()]
