"""Drift against its docstring read literally; parameters of a unit against real cuts; sites reopened many times."""

import copy

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from oracles import ORACLES
from oracles.drift import n_parameters
from oracles.whole import all_kept, logits_of, without
from sukashi.core.errors import UsageError
from sukashi.core.types import Batch
from sukashi.criteria import criteria, drift
from sukashi.criteria.engine import DEFAULT_BUDGET, Engine
from sukashi.models.architectures import CifarResNet
from sukashi.network import sites as finder

OPTIONS = [
    {"share": 0.1, "slack": 1.5, "scout": 4},
    {"share": 0.1, "slack": 1.5, "scout": 1},
    {"share": 0.3, "slack": 1.0, "scout": 3},
]


def pairs(plan):
    return list(zip(plan.site.tolist(), plan.unit.tolist(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("net", "options"), [*(("cnn", options) for options in OPTIONS), ("vit", OPTIONS[-1])], ids=str
)
def test_drift_removes_in_the_order_of_its_docstring(small64, net, options):
    model, sites, data = small64[net].model, small64[net].sites, small64[net].data
    plan = criteria["drift"](model, sites, data, generator=torch.Generator(), **options)
    expected = ORACLES["criteria", "drift"](model, sites, data, generator=None, **options)
    assert plan.passes == expected.passes
    assert plan.n_evaluations == expected.n_evaluations
    assert pairs(plan)[: plan.n_removable] == pairs(expected)[: plan.n_removable]
    assert len(plan.passes) > 4, "the case must have rounds"


def test_drift_breaks_ties_by_site_then_unit(small64):
    """Units that nobody hears cost nothing to lose, whatever else is gone: their prices are exactly equal."""
    sites, data = small64["cnn"].sites, small64["cnn"].data
    model = copy.deepcopy(small64["cnn"].model)
    dead = [(1, 6), (1, 2), (2, 9), (2, 4), (2, 13)]
    with torch.no_grad():
        for position, unit in dead:
            for member in sites[position].producers:
                layer = model.get_submodule(member.module)
                for parameter in layer.parameters():
                    parameter[unit] = 0
    options = OPTIONS[0]
    plan = criteria["drift"](model, sites, data, generator=torch.Generator(), **options)
    expected = ORACLES["criteria", "drift"](model, sites, data, generator=None, **options)
    assert pairs(plan)[: plan.n_removable] == pairs(expected)[: plan.n_removable]
    effect = dict(zip(pairs(plan), plan.effect, strict=True))
    assert [effect[pair] for pair in dead] == [0.0] * len(dead)
    # A round goes from the output back; among equals by number.
    among = [pair for pair in pairs(plan) if pair in dead]
    assert among == [(2, 4), (2, 9), (2, 13), (1, 2), (1, 6)]


@pytest.mark.parametrize(
    "options", [{"share": 0.0}, {"share": 1.0}, {"slack": 0.99}, {"scout": 0}], ids=lambda o: str(o)
)
def test_options_without_meaning_are_refused(small64, options):
    model, sites, data = small64["cnn"].model, small64["cnn"].sites, small64["cnn"].data
    ((name, value),) = options.items()
    with pytest.raises(UsageError, match=rf"{name} .*must be .*, got {value}: "):
        criteria["drift"](model, sites, data, generator=torch.Generator(), **options)


# Parameters of a unit.


class Depthwise(nn.Module):
    """Units that pass through a depthwise convolution, and two branches that are read side by side."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3)
        self.expand = nn.Sequential(nn.Conv2d(6, 12, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(12, 12, 3, 1, 1, groups=12), nn.BatchNorm2d(12), nn.ReLU())
        self.project = nn.Conv2d(12, 6, 1)
        self.side = nn.Conv2d(6, 4, 1)
        self.head = nn.Linear(10 * 9, 5)

    def forward(self, x):
        x = self.stem(x).relu()
        x = torch.cat([self.project(self.deep(self.expand(x))), self.side(x)], 1).relu()
        return self.head(nn.functional.adaptive_avg_pool2d(x, 3).flatten(1))


NETWORKS = {
    "cnn": lambda: (None, 0),
    "vit": lambda: (None, 0),
    "resnet20": lambda: (CifarResNet(20, 10), 32),
    "densenet": lambda: (torchvision.models.DenseNet(4, (2, 2), 8, num_classes=5), 32),
    "depthwise": lambda: (Depthwise(), 12),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_parameters_of_a_unit_are_those_a_cut_takes_away(small, name):
    model, size = NETWORKS[name]()
    if model is None:
        model, sites = small[name].model, small[name].sites
    else:
        sites = finder.find(model.eval(), torch.randn(2, 3, size, size)).sites
    generator = torch.Generator().manual_seed(4)
    keep = all_kept(sites)
    for share in (0.0, 0.3, 0.5):  # the masks grow
        for site in sites:
            gone = torch.rand(site.n_units, generator=generator) < share
            gone[int(torch.nonzero(keep[site])[0])] = False
            keep[site] &= ~gone
        found = drift.unit_parameters(model, sites, keep)
        now = n_parameters(model, keep)
        assert set(found) == set(sites)
        for site in sites:
            if keep[site].sum() > 1:
                unit = int(torch.nonzero(keep[site])[-1])
                assert found[site] == now - n_parameters(model, without(keep, site, unit))


# The engine, site after site, round after round.


@pytest.mark.slow
@pytest.mark.parametrize("budget", [0, DEFAULT_BUDGET], ids=["recomputed", "cached"])
@pytest.mark.parametrize("name", ["cnn", "vit", "resnet20"])
def test_reopened_sites_give_the_masked_networks_logits(small64, name, budget):
    if name == "resnet20":
        torch.manual_seed(5)
        model = CifarResNet(20, 10).eval().double()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.bias, std=0.3)
                nn.init.normal_(module.running_mean, std=0.3)
                nn.init.uniform_(module.running_var, 0.5, 2)
        data = Batch(torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.zeros(6), tuple("abcdef"))
        sites = finder.find(model, data.x[:2]).sites
    else:
        model, sites = small64[name].model, small64[name].sites
        data = small64[name].data[torch.arange(0, 80, 4)]
    engine = Engine(model, sites, data, budget=budget, chunk=7)
    keep = all_kept(sites)
    rng = np.random.default_rng(6)
    for _ in range(24):
        site = sites[rng.integers(len(sites))]
        if rng.random() < 0.2:  # as a resumed run does, without asking
            lost = [u for u in torch.nonzero(keep[site]).flatten().tolist()[:-1] if rng.random() < 0.2]
            engine.remove(site, lost)
            keep[site][lost] = False
        else:
            with engine.open(site) as suffix:
                assert_equal(suffix.now, logits_of(model, keep, data.x))
                left = torch.nonzero(keep[site]).flatten().tolist()
                for unit in rng.permutation(left)[:4].tolist():
                    lost = without(keep, site, unit)
                    if not lost[site].any():
                        continue
                    logits = suffix.without(unit)
                    assert_equal(logits, logits_of(model, lost, data.x))
                    if rng.random() < 0.6:
                        suffix.remove(unit, logits)
                        keep = lost
                assert suffix.n_left == int(keep[site].sum())
        assert all(torch.equal(kept, keep[s]) for s, kept in engine.mask().keep.items())
        assert_equal(engine.logits(), logits_of(model, keep, data.x))
    assert engine.mask().n_removed > 12


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))
