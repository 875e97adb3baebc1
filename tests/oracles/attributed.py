"""Criteria made of attributions: the formula of the adapter over the attributions' own oracles, image by image."""

import torch

from oracles import ORACLES, backtrace, covering, deeplift, gradient, lrp, oracle  # noqa: F401 - their oracles are read here
from sukashi.attributions import attributions
from sukashi.core.types import Scores

REDUCED = {
    "abs_sum": lambda values: values.sum().abs(),
    "sum_abs": lambda values: values.abs().sum(),
    "sum": lambda values: values.sum(),
}


def aggregated(attribution, sites, data, n_classes, *, reduce="abs_sum", classes="true", normalise="none"):
    """{site: (U,)} of attribution(image (C, H, W), target, site) -> (U, positions...)."""
    values = {}
    for site in sites:
        total = torch.zeros(site.n_units, dtype=torch.float64)
        for image, true in zip(data.x, data.target, strict=True):
            explained = [true] if classes == "true" else torch.arange(n_classes)
            for target in explained:
                one = torch.stack([REDUCED[reduce](unit) for unit in attribution(image, target, site)])
                total += (one if classes == "true" else one.abs()) / len(explained) / len(data)
        values[site] = total / total.square().sum().sqrt() if normalise == "layer" else total
    return values


def criterion(name, attribution):
    def scored(model, sites, data, *, generator):
        n_classes = model(data.x[:1]).shape[1]
        values = aggregated(lambda *of: attribution(model, *of), sites, data, n_classes)
        return Scores(values, len(data), name)

    return scored


for (_registry, _name), _attribution in list(ORACLES.items()):
    if _registry == "attributions" and "kinds" not in attributions[_name].facts:  # of pixels alone
        oracle("criteria", _name)(criterion(_name, _attribution))
