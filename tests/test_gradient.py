"""Attributions made of gradients against their definitions, image by image and point by point, in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import nn
from torchvision.ops import StochasticDepth

from cases import noise
from oracles import ORACLES
from sukashi.attributions import attributions
from sukashi.core.errors import DataError, ModelError, UsageError
from sukashi.core.objective import CLASSIFICATION
from sukashi.core.types import Member, Site
from sukashi.network import hooks, sites

explained = CLASSIFICATION.explained
PATHS = ("internal_influence", "integrated_gradients", "conductance")


def linear(*widths, activation=nn.Identity, seed=0):
    """Fully connected layers in float64 with an activation between them; its last layer gives the logits."""
    torch.manual_seed(seed)
    layers = []
    for n_in, n_out in itertools.pairwise(widths):
        layers += [nn.Linear(n_in, n_out), activation()]
    return nn.Sequential(*layers[:-1]).double().eval()


class Slopes(nn.Module):
    """A logit with known slopes: f(x) of two inputs, and a second logit."""

    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return torch.stack([self.f(x[:, 0], x[:, 1]), x[:, 0] + 2 * x[:, 1]], 1)


@pytest.mark.parametrize("name", ["saliency", "gradient_x_activation", *PATHS])
@pytest.mark.parametrize("net", ["cnn", "vit"])
def test_an_attribution_is_what_its_formula_says_at_every_reader(small64, name, net):
    case = small64[net]
    data = case.data[slice(0, None, 27)]
    baseline = 0.3 * noise(*data.x.shape[1:], seed=1)
    given, size = ({"steps": 3, "baseline": baseline}, 5) if name in PATHS else ({}, 2)
    found = attributions[name](case.model, data.x, data.target, case.sites, **given, batch_size=size)
    assert list(found) == list(case.sites)
    for site, values in found.items():
        for row, x, target in zip(values, data.x, data.target, strict=True):
            expected = ORACLES["attributions", name](case.model, x, target, site, **given)
            assert expected.abs().max() > 1e-4, "the case must say something"
            torch.testing.assert_close(row.reshape(site.n_units, -1), expected, rtol=1e-9, atol=1e-12)


def test_units_summed_over_positions_are_the_slope_of_a_gate(small64):
    for case in (small64["cnn"], small64["vit"]):
        data = case.data[slice(0, None, 27)]
        found = attributions["gradient_x_activation"](case.model, data.x, data.target, case.sites)
        for site in case.sites:
            gates = torch.ones(len(data), site.n_units, dtype=torch.float64, requires_grad=True)
            with hooks.ablated(case.model, {site: gates}):
                total = explained(case.model(data.x), data.target).sum()
            (slope,) = torch.autograd.grad(total, gates)
            torch.testing.assert_close(found[site].reshape(*slope.shape, -1).sum(2), slope, rtol=1e-9, atol=1e-12)


# Closed forms.


@pytest.mark.parametrize("name", ["integrated_gradients", "conductance"])
@pytest.mark.parametrize("steps", [1, 5])
def test_a_linear_network_is_explained_exactly(name, steps):
    model, x, baseline = linear(3, 4, 2), noise(5, 3, seed=1), noise(3, seed=2)
    target = torch.tensor([0, 1, 1, 0, 1])
    hidden = Site("0", "hidden", 4, -1, (Member("2", "in", tuple((u,) for u in range(4)), -1),))
    pixels = sites.input_site(x)
    found = attributions[name](model, x, target, [hidden, pixels], steps=steps, baseline=baseline)
    first, last = model[0].weight, model[2].weight
    torch.testing.assert_close(found[pixels], ((last @ first)[target] * (x - baseline)).detach())
    torch.testing.assert_close(found[hidden], (last[target] * ((x - baseline) @ first.T)).detach())


def test_the_two_factors_of_a_product_share_it_equally():
    x = noise(4, 2, seed=1)
    model, pixels = Slopes(torch.mul), sites.input_site(x)
    for name in ("integrated_gradients", "conductance"):
        found = attributions[name](model, x, torch.zeros(4, dtype=torch.long), [pixels], steps=1)[pixels]
        torch.testing.assert_close(found, (x.prod(1, keepdim=True) / 2).expand(-1, 2))


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_gauss_and_legendre_are_exact_up_to_their_degree_and_no_further(steps):
    x = noise(3, 2, seed=1)
    pixels, target = sites.input_site(x), torch.zeros(3, dtype=torch.long)

    def influence(power):
        found = attributions["internal_influence"]
        return found(Slopes(lambda a, b: a**power), x, target, [pixels], steps=steps)[pixels][:, 0]

    # The slope power * (s x)^(power - 1), averaged over s, is x^(power - 1).
    torch.testing.assert_close(influence(2 * steps), x[:, 0] ** (2 * steps - 1))
    wrong = influence(2 * steps + 1) - x[:, 0] ** (2 * steps)
    assert (wrong / x[:, 0] ** (2 * steps)).abs().min() > 1e-4


def test_the_error_of_the_trapezoid_falls_with_the_square_of_the_steps():
    model, x = linear(6, 8, 5, 3, activation=nn.Tanh), 2 * noise(4, 6, seed=1)
    site = sites.place(model, "2", x)
    target = torch.tensor([0, 1, 2, 0])

    def found(steps):
        return attributions["conductance"](model, x, target, [site], steps=steps, baseline=0.1)[site]

    with torch.no_grad():
        change = explained(model(x), target) - explained(model(torch.full_like(x, 0.1)), target)
    exact = found(2048)
    errors = [float((found(steps) - exact).norm()) for steps in (16, 32, 64)]
    gaps = [float((found(steps).sum(1) - change).norm()) for steps in (16, 32, 64)]
    for coarse, fine in [*itertools.pairwise(errors), *itertools.pairwise(gaps)]:
        assert coarse / fine == pytest.approx(4, rel=0.1)


def test_integrated_gradients_are_complete_at_the_input_and_conductance_at_every_cut(small64):
    case = small64["vit"]
    data = case.data[slice(0, None, 27)]
    cut, pixels = sites.place(case.model, "patches", data.x), sites.input_site(data.x)
    with torch.no_grad():
        change = explained(case.model(data.x), data.target) - explained(case.model(0 * data.x), data.target)
    for name, tolerance in (("integrated_gradients", 1e-4), ("conductance", 1e-2)):
        found = attributions[name](case.model, data.x, data.target, [cut, pixels], steps=64)
        for values in found.values():
            torch.testing.assert_close(values.flatten(1).sum(1), change, rtol=tolerance, atol=tolerance)


# Peers.


@pytest.fixture(scope="module")
def peer():
    return pytest.importorskip("captum.attr")


@pytest.fixture(scope="module", params=["cnn", "vit"])
def compared(request, small64):
    """A network, images, targets, a baseline that is not zero, and taps by the layers that captum is asked about."""
    case = small64[request.param]
    layers = {"cnn": ["conv1", "conv2", "conv3", "fc1"], "vit": ["patches", "blocks.1.fc1", "blocks.2.attn.proj"]}
    data = case.data[slice(0, None, 27)]
    baseline = 0.3 * noise(*data.x.shape[1:], seed=1)[None].expand_as(data.x)
    return (
        case.model,
        data.x,
        data.target,
        baseline,
        [sites.place(case.model, name, data.x) for name in layers[request.param]],
    )


def agree(found, expected, axis=1, tolerance=2e-6):
    """To 2e-6 of the largest: captum's weights along a path are float32."""
    expected = expected.detach().movedim(axis, 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def test_captum_agrees_where_it_is_right(peer, compared):
    model, x, target, baseline, taps = compared
    given = {"steps": 6, "baseline": baseline}
    path = {"baselines": baseline, "target": target, "n_steps": 6}
    pixels, given_x = sites.input_site(x), x.clone().requires_grad_()
    everywhere = [*taps, pixels]
    slopes = attributions["saliency"](model, x, target, everywhere)
    products = attributions["gradient_x_activation"](model, x, target, everywhere)
    influences = attributions["internal_influence"](model, x, target, everywhere, **given)
    changes = attributions["integrated_gradients"](model, x, target, everywhere, **given)
    flows = attributions["conductance"](model, x, target, everywhere, **given)
    agree(slopes[pixels], peer.Saliency(model).attribute(given_x, target=target), tolerance=1e-12)
    agree(products[pixels], peer.InputXGradient(model).attribute(given_x, target=target), tolerance=1e-12)
    agree(changes[pixels], peer.IntegratedGradients(model).attribute(x, **path))
    for site in taps:
        layer = model.get_submodule(site.layer)
        agree(products[site], peer.LayerGradientXActivation(model, layer).attribute(x, target=target), site.axis)
        agree(influences[site], peer.InternalInfluence(model, layer).attribute(x, **path), site.axis)
        # captum takes the slope at the first end of each interval; from the other side it takes the other end.
        rule = {"target": target, "n_steps": 6, "method": "riemann_trapezoid"}
        there = peer.LayerConductance(model, layer).attribute(x, baselines=baseline, **rule)
        back = peer.LayerConductance(model, layer).attribute(baseline, baselines=x, **rule)
        agree(flows[site], (there - back) / 2, site.axis)
    first = taps[0]
    same = peer.LayerIntegratedGradients(model, model.get_submodule(first.layer)).attribute(x, **path)
    agree(changes[first], same, first.axis)  # the first layer moves on a straight line


def test_captums_default_conductance_is_off_where_ours_is_exact(peer):
    model, x = linear(3, 4, 2), noise(5, 3, seed=1)
    target, site = torch.ones(5, dtype=torch.long), sites.place(model, "0", x)
    exact = (model[2].weight[1] * (x @ model[0].weight.T)).detach()
    ours = attributions["conductance"](model, x, target, [site], steps=5)[site]
    theirs = peer.LayerConductance(model, model[0]).attribute(x, target=target, n_steps=5).detach()
    torch.testing.assert_close(ours, exact)
    assert ((theirs - exact) / exact).abs().min() > 0.05


# Refusals.


def test_what_cannot_be_explained_is_refused(small64):
    case = small64["cnn"]
    x, target = case.data.x[:2], case.data.target[:2]

    def refuse(error, words, *, model=case.model, target=target, name="saliency", **options):
        with pytest.raises(error, match=words):
            attributions[name](model, x, target, case.sites, **options)

    refuse(DataError, r"target has shape \(2, 8, 8\) for 2 images", target=torch.zeros(2, 8, 8, dtype=torch.long))
    refuse(DataError, "target 10 is no class of a model with 10 logits", target=torch.tensor([3, 10]))
    refuse(DataError, "target -1 is no class", target=torch.tensor([3, -1]))
    refuse(UsageError, r"baseline has shape \(3,\)", name="conductance", baseline=torch.zeros(3, dtype=torch.float64))
    refuse(UsageError, "steps of conductance must be greater", name="conductance", steps=0)
    with pytest.raises(ModelError, match=r"the model gives \(2, 4, 6, 6\) for 2 images"):
        attributions["saliency"](nn.Conv2d(1, 4, 3).double(), x, target, [sites.input_site(x)])
    with pytest.raises(ModelError, match="'1' is in training mode"):
        attributions["saliency"](nn.Sequential(nn.Flatten(), nn.Dropout()), x, target, [sites.input_site(x)])
    refuse(DataError, "dtype torch.float32", target=torch.zeros(2))
    with pytest.raises(DataError, match="no image to explain"):
        attributions["saliency"](case.model, x[:0], target[:0], case.sites)
    for layer in (StochasticDepth(0.5, "row"), DropPath(0.5)):
        with pytest.raises(ModelError, match="'0' is in training mode"):
            attributions["saliency"](nn.Sequential(layer, nn.Flatten()), x, target, [sites.input_site(x)])
    norm = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64, track_running_stats=False)).double().eval()
    with pytest.raises(ModelError, match="'1' keeps no running statistics"):
        attributions["saliency"](norm, x, target, [sites.input_site(x)])


@pytest.mark.parametrize(
    ("tapped", "name"),
    [
        (tapped, method.name)
        for method in attributions
        for tapped in (["", "2"] if "channel" in method.facts.get("kinds", ("channel",)) else [""])
        if "needs" not in method.facts
    ],
)
def test_a_network_that_works_in_place_on_its_input_is_explained_and_the_images_stay(name, tapped):
    x, target = noise(3, 6, seed=1).view(3, 1, 2, 3), torch.tensor([0, 3, 1])
    kept, found = x.clone(), []
    for inplace in (True, False):
        model = nn.Sequential(nn.ReLU(inplace), nn.Flatten(), *linear(6, 4)).eval()
        site = sites.place(model, tapped, x) if tapped else sites.input_site(x)
        found.append(attributions[name](model, x, target, [site])[site])
        assert torch.equal(x, kept)
    torch.testing.assert_close(*found)


def test_frozen_networks_and_callers_without_gradients_get_the_same(small64):
    case = small64["cnn"]
    x, target = case.data.x[:3], case.data.target[:3]
    model = type(case.model)(10, 8).double().eval()
    model.load_state_dict(case.model.state_dict())
    model.requires_grad_(False)
    expected = attributions["conductance"](case.model, x, target, case.sites)
    with torch.no_grad():
        found = attributions["conductance"](model, x, target, case.sites)
    for site in case.sites:
        torch.testing.assert_close(found[site], expected[site])


def test_a_read_that_the_logit_does_not_depend_on_has_slope_zero():
    class Apart(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            return torch.cat([self.used(x), F.relu(self.unused(x)).detach()], 1)

    model, x = Apart().double().eval(), noise(2, 3, seed=1)
    used, unused = sites.place(model, "used", x), sites.place(model, "unused", x)
    found = attributions["saliency"](model, x, torch.tensor([0, 1]), [used, unused])
    torch.testing.assert_close(found[used], torch.eye(2, dtype=torch.float64))
    assert not found[unused].any()
