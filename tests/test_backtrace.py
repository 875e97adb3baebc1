"""DL-Backtrace against its rules written out unit by unit."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cases import PIXELS, TARGET, explained, logit, noise
from oracles.backtrace import written_out
from sukashi.attributions.backtrace import backtrace
from sukashi.core.errors import ModelError
from sukashi.core.types import Member, Site
from sukashi.models.architectures import CifarResNet

MODES = ("default", "contrastive")


relevance = partial(explained, backtrace)


def network():
    torch.manual_seed(0)
    body = (nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(4, 4, 3, stride=2, groups=2))
    return nn.Sequential(*body, nn.ReLU6(), nn.AvgPool2d(2, 1), nn.Flatten(), nn.Linear(4, 3)).double().eval()


@pytest.mark.parametrize("mode", MODES)
def test_relevance_is_the_rules_unit_by_unit(mode):
    model, x = network(), noise(3, 3, 10, 10)
    with torch.no_grad():
        model[7].bias[1] = -9.0  # a negative logit too
    x[0, :, :4, :4] = x[0, :, :1, :1]  # equal maxima
    sites = (PIXELS, *(Site(layer, "channel", 4) for layer in ("0", "2", "4")))
    found = backtrace(model, x, TARGET, sites, mode=mode)
    for row in range(3):
        expected = written_out(mode, model, x[row], TARGET[row])
        for site in sites:
            torch.testing.assert_close(found[site][row], expected[int(site.layer or -1) + 1], rtol=1e-10, atol=1e-13)


def test_a_layer_loses_the_share_of_its_bias_and_nothing_else():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 3)).double()
    x = noise(3, 3, 2, 2)
    hidden = Site("1", "hidden", 7, -1, (Member("1", "out", tuple((u,) for u in range(7)), -1),))
    found = backtrace(model, x, TARGET, [PIXELS, hidden])
    z = (x.flatten(1)[:, :, None] * model[1].weight.T).abs().sum(1)
    kept = 1 - model[1].bias.abs() / (z + model[1].bias.abs())
    torch.testing.assert_close(found[PIXELS].flatten(1).sum(1), (found[hidden] * kept).sum(1), rtol=1e-12, atol=1e-14)


def test_without_biases_all_of_the_logit_comes_out_with_its_sign():
    torch.manual_seed(0)
    model = CifarResNet(20, 3).double().eval()
    nn.init.zeros_(model.linear.bias)
    x = noise(3, 3, 32, 32)
    found = relevance(model, x)
    torch.testing.assert_close(found.flatten(1).sum(1), logit(model, x, TARGET), rtol=1e-10, atol=0)
    assert (found * logit(model, x, TARGET)[:, None, None, None] >= 0).all()


class Branches(nn.Module):
    """A sum with a constant, a product and a scale of two branches."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.rand(3, 2, 2))
        self.gamma = nn.Parameter(torch.rand(3, 1, 1))

    def forward(self, x):
        kept = x + self.shift
        return (kept * F.adaptive_avg_pool2d(torch.sigmoid(x), 1) + self.gamma * x).mean((2, 3))


def test_sums_share_by_size_products_by_halves_and_factors_pass():
    torch.manual_seed(0)
    model = Branches().double().eval()
    x = noise(3, 3, 2, 2)
    found = relevance(model, x)
    with torch.no_grad():
        kept, gate, side = x + model.shift, torch.sigmoid(x), model.gamma * x
        product = kept * gate.mean((2, 3), keepdim=True)
        total = product + side
        r = torch.zeros_like(x)
        for row in range(3):
            c = TARGET[row]
            r[row, c] = total[row, c].abs() / total[row, c].abs().sum() * total[row, c].mean()
        r_product = r * product.abs() / (product.abs() + side.abs())
        expected = r - r_product
        expected += r_product / 2 * x.abs() / (x.abs() + model.shift.abs())
        expected += r_product.sum((2, 3), keepdim=True) / 2 * gate / gate.sum((2, 3), keepdim=True)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


class Sums(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("function", [lambda x: x[:, :6] + x[:, 6:], lambda x: x.unflatten(1, (2, 6)).mean(1)])
def test_sums_and_averages_are_linear_layers(function, mode):
    torch.manual_seed(0)
    first, last, between = nn.Linear(12, 12), nn.Linear(6, 3), nn.Linear(12, 6, bias=False)
    between.weight.data = function(torch.eye(12)).T
    models = [nn.Sequential(nn.Flatten(), first, op, nn.ReLU(), last).double() for op in (between, Sums(function))]
    x = noise(3, 3, 2, 2)
    expected, found = (relevance(model, x, mode=mode) for model in models)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)
    assert (expected != 0).any()


@pytest.mark.parametrize("mode", MODES)
def test_one_pass_gives_what_one_pass_a_site_gives_and_batches_do_not_matter(small64, mode):
    case = small64["cnn"]
    x, target = case.data.x[:5], case.data.target[:5]
    together = backtrace(case.model, x, target, case.sites, mode=mode)
    parts = backtrace(case.model, x, target, case.sites, mode=mode, batch_size=2)
    for site in case.sites:
        assert torch.equal(relevance(case.model, x, target, site, mode=mode), together[site])
        assert together[site].shape[:2] == (5, site.n_units)
        torch.testing.assert_close(parts[site], together[site], rtol=1e-10, atol=1e-13)


def test_what_it_cannot_do_is_refused(small64):
    case = small64["vit"]
    with pytest.raises(ModelError, match="backtrace has no rule for LayerNorm"):
        backtrace(case.model, case.data.x[:2], case.data.target[:2], case.sites)
    model = nn.Sequential(nn.MaxPool2d(2, ceil_mode=True), nn.Flatten(), nn.Linear(12, 3)).double()
    with pytest.raises(ModelError, match=r"ceil_mode.*use an attribution made of gradients"):
        relevance(model, noise(3, 3, 3, 3))
