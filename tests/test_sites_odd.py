"""Networks that join, split and move channels in odd ways: what is found, why not the rest, and cut = masked."""

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.layers.layer_scale import LayerScale2d
from timm.layers.std_conv import ScaledStdConv2d, StdConv2d
from torch import nn
from torch.nn.utils import parametrizations
from torchvision.ops.misc import FrozenBatchNorm2d

from cases import half_of, noise
from sukashi.core.errors import ModelError, ResourceError
from sukashi.core.types import Mask
from sukashi.criteria.drift import unit_parameters
from sukashi.network import hooks, sites, surgery, trial_cuts
from supported import randomised


class Net(nn.Module):
    """Layers by name and what is done with them: body(net, x) gives a map, of which `head` reads the mean."""

    def __init__(self, body, n_features, **layers):
        super().__init__()
        self.body = body
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.head = nn.Linear(n_features, 3)

    def forward(self, x):
        return self.head(self.body(self, x).mean((2, 3)))


class Rectified(nn.Conv2d):
    """A convolution of one's own that does more than its kind."""

    def forward(self, x):
        return self._conv_forward(x, self.weight, self.bias).relu()


def conv(n_in, n_out, k=1, **more):
    return nn.Conv2d(n_in, n_out, k, padding=k // 2, **more)


def between(layer, n_units=8, n_read=8):
    """A layer between two convolutions."""
    return Net(lambda n, x: n.b(n.mid(n.a(x))).tanh(), 6, a=conv(3, n_units, 3), mid=layer, b=conv(n_read, 6))


def chunked(net, x):
    parts = list(F.silu(net.one(x)).chunk(2, 1))
    parts.append(F.silu(net.two(parts[-1])))
    parts.append(F.silu(net.three(parts[-1])))
    return F.silu(net.four(torch.cat(parts, 1)))


def shuffled(net, x):
    left, right = F.relu(net.a(x)).chunk(2, 1)
    x = torch.cat([left, net.c(net.b(right).relu())], 1)
    n, c, h, w = x.shape
    return net.d(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)).tanh()


def maxed(net, x):
    x = net.a(x)
    n, c, h, w = x.shape
    return net.b(x.view(n, c // 2, 2, h, w).amax(2)).tanh()


def attentive(net, x):
    x = F.relu(net.a(x))
    gate = net.gate(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)).sigmoid()
    return net.b(x * gate).tanh()


def halved(net, x):
    wide = net.a(x)
    return net.c(torch.cat([net.b(wide[:, :4]), wide[:, 4:]], 1)).tanh()


FOUND = {
    "glu": (lambda: between(nn.GLU(1), 16), {"a": 8, "b": 6}),
    "chained chunk and concat": (
        lambda: Net(chunked, 6, one=conv(3, 8, 3), two=conv(4, 4, 3), three=conv(4, 4, 3), four=conv(16, 6)),
        {"one": 4, "two": 4, "three": 4, "four": 6},
    ),
    "pixel shuffle": (lambda: between(nn.PixelShuffle(2), 16, 4), {"a": 4, "b": 6}),
    "pixel unshuffle": (lambda: between(nn.PixelUnshuffle(2), 4, 16), {"a": 4, "b": 6}),
    "maxout": (lambda: Net(maxed, 6, a=conv(3, 16, 3), b=conv(8, 6)), {"a": 8, "b": 6}),
    "channel shuffle": (
        lambda: Net(shuffled, 6, a=conv(3, 8, 3), b=conv(4, 5), c=conv(5, 4), d=conv(8, 6)),
        {"b": 5, "d": 6},
    ),
    "roll": (lambda: Net(lambda n, x: n.b(n.a(x).roll(1, 1).relu()), 6, a=conv(3, 8), b=conv(8, 6)), {"b": 6}),
    "one-channel gate": (
        lambda: Net(
            lambda n, x: n.b(n.gate(x).sigmoid() * n.a(x).relu()), 6, gate=conv(3, 1), a=conv(3, 16), b=conv(16, 6)
        ),
        {"a": 16, "b": 6},
    ),
    "mean and maximum of channels": (lambda: Net(attentive, 6, a=conv(3, 8), gate=conv(2, 1), b=conv(8, 6)), {"b": 6}),
    "slopes": (lambda: between(nn.PReLU(8)), {"a": 8, "b": 6}),
    "one slope": (lambda: between(nn.PReLU()), {"a": 8, "b": 6}),
    "frozen statistics": (lambda: between(FrozenBatchNorm2d(8)), {"a": 8, "b": 6}),
    "layer scale": (lambda: between(LayerScale2d(8, 0.5)), {"a": 8, "b": 6}),
    "instance norm": (lambda: between(nn.InstanceNorm2d(8, affine=True)), {"a": 8, "b": 6}),
    "group norm": (lambda: between(nn.GroupNorm(4, 8)), {"a": 4, "b": 6}),
    "groups": (lambda: between(conv(8, 8, 3, groups=4)), {"a": 4, "b": 6}),
    "depthwise, two each": (lambda: between(conv(8, 16, 3, groups=8), 8, 16), {"a": 8, "b": 6}),
    "weight norm": (lambda: between(parametrizations.weight_norm(conv(8, 8, 3))), {"a": 8, "mid": 8, "b": 6}),
    "spectral norm": (lambda: between(parametrizations.spectral_norm(conv(8, 8, 3))), {"a": 8, "mid": 8, "b": 6}),
    "standardised": (lambda: between(StdConv2d(8, 8, 3)), {"a": 8, "mid": 8, "b": 6}),
    "scaled and standardised": (lambda: between(ScaledStdConv2d(8, 8, 3)), {"a": 8, "mid": 8, "b": 6}),
    "more than its kind": (lambda: between(Rectified(8, 8, 3)), {"a": 8, "mid": 8, "b": 6}),
    "local response": (lambda: between(nn.LocalResponseNorm(3)), {"b": 6}),
    "transposed": (lambda: between(nn.ConvTranspose2d(8, 8, 2)), {"b": 6}),
    "a fixed slice": (lambda: Net(halved, 6, a=conv(3, 10), b=conv(4, 5), c=conv(11, 6)), {"b": 5, "c": 6}),
}  # fmt: skip


@pytest.fixture(scope="module")
def odd():
    made = {}
    for name, (make, _) in FOUND.items():
        torch.manual_seed(1)
        made[name] = randomised(make().eval())
    return made


@pytest.mark.parametrize("name", FOUND)
def test_sites_of_odd_networks(name, odd):
    found = sites.find(odd[name], noise(2, 3, 8, 8, dtype=torch.float32))
    assert {site.layer: site.n_units for site in found.sites} == FOUND[name][1]
    owned = {member.module for site in found.sites for member in site.producers}
    layers = {n for n, m in odd[name].named_modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)}
    assert layers == (owned & layers) | set(found.refused)


@pytest.mark.parametrize("mode", surgery.MODES)
@pytest.mark.parametrize("name", FOUND)
def test_cut_and_zeroed_give_the_masked_logits_of_odd_networks(name, mode, odd):
    x = noise(3, 3, 8, 8, seed=2)
    model = copy.deepcopy(odd[name]).double()
    found = sites.find(model, x).sites
    for seed in range(3):
        mask = half_of(found, seed)
        small = copy.deepcopy(model)
        surgery.MODES[mode](small, mask)
        with torch.no_grad(), hooks.ablated(model, mask):
            masked = model(x)
        assert (small(x) - masked).abs().max() <= 1e-12 * masked.abs().max()
        assert (model(x) - masked).abs().max() > 1e-3 * masked.abs().max()


PLAIN = [name for name in FOUND if "norm" not in name and "standardised" not in name]


@pytest.mark.parametrize("name", PLAIN)
def test_what_a_unit_of_an_odd_network_is_worth_is_what_its_cut_saves(name, odd):
    found = sites.find(odd[name], noise(2, 3, 8, 8, dtype=torch.float32)).sites
    keep = {site: torch.ones(site.n_units, dtype=torch.bool) for site in found}
    worth = unit_parameters(odd[name], found, keep)
    for site in found:
        small = copy.deepcopy(odd[name])
        surgery.cut(small, Mask({site: torch.arange(site.n_units) > 0}))
        before, after = (sum(p.numel() for p in model.parameters()) for model in (odd[name], small))
        assert worth[site] == before - after


@pytest.mark.parametrize(
    ("name", "layer", "words"),
    [
        ("one-channel gate", "gate", "one unit"),
        ("mean and maximum of channels", "a", "each depends on all"),
        ("local response", "a", "layer 'mid': a LocalResponseNorm normalises over units"),
        ("transposed", "a", "layer 'mid': a ConvTranspose2d cannot be cut"),
        ("a fixed slice", "a", "only some of its units reach layer 'b'"),
        ("glu", "head", "its units are the model's output"),
    ],
)
def test_a_layer_without_a_site_has_the_true_reason(name, layer, words, odd):
    assert words in sites.find(odd[name], noise(2, 3, 8, 8, dtype=torch.float32)).refused[layer]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_a_weight_that_a_hook_computes_is_refused_with_the_remedy(norm):
    found = sites.find(between(norm(conv(8, 8, 3))).eval(), noise(2, 3, 8, 8, dtype=torch.float32))
    assert [site.layer for site in found.sites] == ["b"]
    assert "call prune.remove, remove_weight_norm or remove_spectral_norm" in found.refused["mid"]


def test_results_that_a_network_keeps_are_no_hindrance():
    class Keeping(Net):
        def forward(self, x):
            self.kept = {"scale": self.a.weight * 2}
            return super().forward(x)

    net = Keeping(lambda n, x: n.b(n.a(x).relu()).tanh(), 6, a=conv(3, 8), b=conv(8, 6)).eval()
    net(noise(2, 3, 8, 8, dtype=torch.float32))
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(net)
    assert len(sites.find(net, noise(2, 3, 8, 8, dtype=torch.float32)).sites) == 2


def test_the_first_reason_is_the_one_that_says_most():
    net = Net(lambda n, x: n.mid(n.a(x)), 8, a=conv(3, 8), mid=nn.LocalResponseNorm(3)).eval()
    with pytest.raises(ModelError, match="first, at 'a': layer 'mid': a LocalResponseNorm normalises over units"):
        sites.find(net, noise(2, 3, 8, 8, dtype=torch.float32))


def test_a_search_that_takes_too_long_says_so(monkeypatch):
    monkeypatch.setattr(trial_cuts, "PATIENCE", -1.0)
    with pytest.raises(ResourceError, match="given up after -1 seconds of processor time: give smaller images"):
        sites.find(between(nn.ReLU()).eval(), noise(2, 3, 8, 8, dtype=torch.float32))
