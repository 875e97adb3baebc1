"""Criteria made of attributions: what an explanation says about units, averaged over images."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sukashi.attributions import attributions
from sukashi.core import progress
from sukashi.core.errors import UsageError
from sukashi.core.precision import without_tf32
from sukashi.core.registry import BatchSize, Method
from sukashi.core.types import Batch, Scores, Site
from sukashi.criteria import criteria
from sukashi.network import hooks


@criteria.register("taylor", source="Molchanov et al. 2017, eq. 8; 2019, gate form")
def taylor(
    model: nn.Module, sites: Sequence[Site], data: Batch, *, generator: torch.Generator, batch_size: BatchSize = 64
) -> Scores:
    """First-order change of the loss when a unit goes: s_u = mean_x |dL(x) / dg_u|, g_u = 1 a gate on all its readers.

    L is the objective's loss, of a classifier the cross entropy of the target. dL/dg_u = sum over readers and positions
    of activation times gradient, so the coupled reads of a residual stage count together, with their signs; one
    backward pass serves all sites.
    """
    device = next(model.parameters()).device
    total = {site: torch.zeros(site.n_units, dtype=torch.float64) for site in sites}
    for batch in data.split(batch_size):
        gates = {site: torch.ones(len(batch), site.n_units, device=device, requires_grad=True) for site in sites}
        with without_tf32(), torch.enable_grad(), hooks.ablated(model, gates):
            loss = data.objective.loss(model(batch.x.to(device)), batch.target.to(device))
            gradients: tuple[Tensor, ...] = torch.autograd.grad(loss, list(gates.values()))
        for site, gradient in zip(gates, gradients, strict=True):
            total[site] += gradient.detach().double().abs().sum(0).cpu()
    return Scores({site: value / len(data) for site, value in total.items()}, len(data), "taylor")


_KINDS = ("channel", "hidden", "head")
_TINY = torch.finfo(torch.float64).tiny
Reduce = Literal["abs_sum", "sum_abs", "sum"]

_AGGREGATION = """

As a criterion: A_u(x, p), the attribution of unit u at position p for image x, becomes the score s_u.

`reduce` over positions, then the mean over images:
    abs_sum  mean_x |sum_p A|   what a unit does to each image, in either direction
    sum_abs  mean_x sum_p |A|   how much it does at all, also where positions cancel
    sum      mean_x sum_p A     signed: a unit that speaks against the target is the least important
(An attribution that is never negative has no such option: all three are the same.)
`classes`: `true` explains the image's own target; `each` explains every class's logit, and s_u is the mean over classes
of the absolute values.
`normalise`: `none` compares units of all layers as they are; `layer` divides a site's scores by their L2 norm
(Molchanov et al. 2017, sec. 2.2).

The papers: Bauvin et al. 2025, table 1, rank by captum's attributions of the target and do not say how they aggregate;
the defaults stand for it. Sankarapu et al. 2025 (the medical study) add relevances into one score a neuron, over ten
images a class, and cut the lowest: `reduce=sum`.

`batch_size` bounds the rows in one pass; results do not depend on it.
"""


def _criterion(attribution: Method) -> Callable[..., Scores]:
    """The criterion of an attribution, with the attribution's options beside its own."""

    def criterion(
        model: nn.Module,
        sites: Sequence[Site],
        data: Batch,
        *,
        generator: torch.Generator,
        reduce: Reduce = "abs_sum",
        classes: Literal["true", "each"] = "true",
        normalise: Literal["none", "layer"] = "none",
        batch_size: BatchSize = 64,
        **options: Any,
    ) -> Scores:
        attribution.check_options(options)
        baseline = options.get("baseline")
        if isinstance(baseline, Tensor) and baseline.dim() == data.x.dim() and len(baseline) > 1:
            raise UsageError(
                f"baseline has {len(baseline)} rows, and a criterion meets images batch by batch: give one for all of "
                f"them, {tuple(data.x.shape[1:])}"
            )
        if "batch_size" in attribution.options:
            options["batch_size"] = batch_size
        device = next(model.parameters()).device
        explained: Sequence[int | None] = [None]
        if classes == "each":
            with torch.no_grad():
                explained = range(data.objective.n_classes(model(data.x[:1].to(device)).shape[1]))
        total = {site: torch.zeros(site.n_units, dtype=torch.float64) for site in sites}
        with progress.task(attribution.name, len(data) * len(explained)) as shown:
            for batch in data.split(batch_size):
                x = batch.x.to(device)
                for k in explained:
                    target = batch.target if k is None else torch.full_like(batch.target, k)
                    found = attribution(model, x, target.to(device), sites, data.objective, **options)
                    for site in sites:
                        scores = _reduced(found.pop(site), reduce)
                        total[site] += (scores if k is None else scores.abs()).sum(0).cpu()
                    shown.advance(len(batch))
        scale = 1 / (len(data) * len(explained))
        values = {site: value * scale for site, value in total.items()}
        if normalise == "layer":
            values = {site: F.normalize(value, dim=0, eps=_TINY) for site, value in values.items()}
        return Scores(values, len(data), attribution.name)

    _present(criterion, attribution)
    return criterion


def _present(criterion: Callable[..., Scores], attribution: Method) -> None:
    """Give a criterion the name and documentation of its attribution, and its options beside its own."""
    own = inspect.signature(criterion, eval_str=True)
    kept = [
        p
        for p in own.parameters.values()
        if p.kind is not p.VAR_KEYWORD and (p.name != "reduce" or attribution.facts.get("signed", True))
    ]
    annotations = attribution.annotations
    passed = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotations[name])
        for name, default in attribution.options.items()
        if name != "batch_size"
    ]
    criterion.__signature__ = own.replace(parameters=[*kept, *passed])  # type: ignore[attr-defined]
    criterion.__annotations__ = {p.name: p.annotation for p in [*kept, *passed]} | {"return": Scores}
    criterion.__name__ = criterion.__qualname__ = attribution.name
    criterion.__doc__ = (inspect.getdoc(attribution.fn) or "") + _AGGREGATION
    criterion.__wrapped__ = attribution.fn  # type: ignore[attr-defined]


def _reduced(values: Tensor, reduce: Reduce) -> Tensor:
    """(B, U) in float64 out of (B, U, positions...)."""
    flat = values.reshape(*values.shape[:2], -1)
    if reduce == "sum_abs":
        flat = flat.abs()
    total = flat.sum(2, dtype=torch.float64)
    return total.abs() if reduce == "abs_sum" else total


def _follow(attribution: Method) -> None:
    """Make a criterion of an attribution that takes units."""
    if set(_KINDS) <= set(attribution.facts.get("kinds", _KINDS)):
        criteria.register(attribution.name, source=attribution.source, **attribution.facts)(_criterion(attribution))


attributions.each(_follow)
