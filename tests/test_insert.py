"""Inserted modules: seen by everything that looks, out of the way of what cuts, and gone without a trace."""

import copy

import pytest
import torch
from torch import nn

from sukashi.attributions import attributions
from sukashi.attributions.rules import plain
from sukashi.core.errors import ModelError
from sukashi.core.types import Batch, Mask
from sukashi.criteria.engine import Engine
from sukashi.models.architectures import DigitsViT, cifar_resnet18
from sukashi.network import hooks, sites, surgery
from sukashi.network.canonical import canonical
from sukashi.network.insert import inserted
from supported import randomised

TARGET = torch.tensor([0, 3, 1])


def made(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = randomised(make().eval()).double().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.mul_(3)
    return model


MODELS = {"resnet": made(lambda: cifar_resnet18(5, 8)), "vit": made(lambda: DigitsViT(5, 8, depth=2, n_heads=2))}
# A convolution before its BatchNorm, a norm, an activation, a block, a stage; what attention reads, a block of tokens.
AFTER = {
    "resnet": ["conv1", "bn1", "relu", "layer1.0", "layer2", "layer1.1.conv2", "avgpool"],
    "vit": ["patches", "blocks.0.norm1", "blocks.0.attn.qkv", "blocks.0.attn.core", "blocks.1", "blocks.1.fc1", "norm"],
}
EACH = [(name, layer) for name in AFTER for layer in AFTER[name]]
CUTS = {
    name: sites.find(model, torch.zeros(2, 1, 8, 8) if name == "vit" else torch.zeros(2, 3, 16, 16)).sites
    for name, model in MODELS.items()
}


def images(name, n=3):
    shape = (n, 1, 8, 8) if name == "vit" else (n, 3, 16, 16)
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def channels(name, layer):
    return sites.place(MODELS[name], layer, images(name), axis=1 if name == "resnet" or layer == "patches" else -1)


def projection(name, layer, rank=None, **bias):
    """U'U on the channels of what a layer writes: the identity, or with a rank the part in a subspace."""
    site = channels(name, layer)
    basis = torch.linalg.qr(torch.randn(site.n_units, site.n_units, dtype=torch.float64)).Q[:rank]
    weight = basis.T @ basis
    module = nn.Linear(*weight.shape, bias=False) if site.axis == -1 else nn.Conv2d(*weight.shape, 1, bias=False)
    module = module.double().requires_grad_(False)
    module.weight.copy_(weight.view_as(module.weight))
    return module


def state(model):
    named = {name: (id(module), type(module), module.training) for name, module in model.named_modules()}
    return named, {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}


def same(before, after):
    modules = before[0] == after[0]
    tensors = [
        (a[0] == b[0] and torch.equal(a[1], b[1])) for a, b in zip(before[1].values(), after[1].values(), strict=True)
    ]
    return modules and list(before[1]) == list(after[1]) and all(tensors)


@pytest.mark.parametrize(("name", "layer"), EACH)
def test_what_is_inserted_changes_what_comes_after_and_leaves_no_trace(name, layer):
    model, x = MODELS[name], images(name)
    before, expected = state(model), model(x)
    host = model.get_submodule(layer)

    def literal(change):
        twin = copy.deepcopy(model)
        twin_host = twin.get_submodule(layer)
        forward = twin_host.forward
        twin_host.forward = lambda x: change(forward(x))
        return twin(x)

    with inserted(model, layer, nn.Identity()) as where:
        assert where == f"{layer}.inserted"
        assert isinstance(model.get_submodule(f"{where}.module"), nn.Identity)
        assert model.get_submodule(layer) is host
        assert list(model.state_dict()) == list(before[1])
        assert torch.equal(model(x), expected)
    with inserted(model, layer, projection(name, layer)) as where:
        assert set(model.state_dict()) - set(before[1]) == {f"{where}.module.weight"}
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-9)
    with inserted(model, layer, nn.Tanh()), inserted(model, layer, nn.Softplus()) as where:
        assert where == f"{layer}.inserted.inserted"
        found = model(x)
    assert torch.equal(found, literal(lambda y: nn.functional.softplus(y.tanh())))
    assert (found - expected).abs().max() > 1e-6
    assert same(before, state(model))
    assert torch.equal(model(x), expected)


METHODS = [("lrp", {}), ("lrp", {"rule": "gamma"}), ("deeplift", {"baseline": 0.3})]


@pytest.fixture(scope="module")
def explanations():
    def explain(name, method, options, model=None):
        taken = [*CUTS[name], sites.input_site(images(name))]
        return attributions[method](model or MODELS[name], images(name), TARGET, taken, **options)

    made_ = {}

    def given(name, number):
        if (name, number) not in made_:
            made_[name, number] = explain(name, *METHODS[number])
        return made_[name, number], explain(name, *METHODS[number])

    return given


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layer"), EACH)
def test_an_identity_changes_no_relevance_no_difference_and_no_site(name, layer, explanations):
    model, x = MODELS[name], images(name)
    expected = [explanations(name, number)[0] for number in range(len(METHODS))]
    with inserted(model, layer, nn.Identity()):
        found = [explanations(name, number)[1] for number in range(len(METHODS))]
        there = sites.find(model, x)
        assert there.sites == CUTS[name]
        assert [site.members for site in there.sites] == [site.members for site in CUTS[name]]
    for mine, theirs in zip(found, expected, strict=True):
        for site in theirs:
            torch.testing.assert_close(mine[site], theirs[site], rtol=1e-6, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layer"), EACH)
def test_a_projection_taken_for_a_linear_map_is_seen_and_explained(name, layer):
    """The literal twin puts the same layer into a deep copy by hand, behind the host, for good."""
    model, x = MODELS[name], images(name)
    module = projection(name, layer, rank=3)
    with inserted(model, layer, module, rule=plain) as where:
        form = canonical(model, x)
        torch.testing.assert_close(form(x), model(x), rtol=1e-10, atol=1e-12)
        assert where in [node.target for node in form.graph.nodes]
        pixels, inside = sites.input_site(x), sites.place(model, where, x, axis=channels(name, layer).axis)
        read = sites.place(model, where, x, "in", axis=inside.axis)
        with hooks.recorded(model, [inside, read]) as seen:
            logits = model(x)
        basis = module.weight.flatten(1)
        torch.testing.assert_close(seen[inside][0], torch.einsum("oc,bc...->bo...", basis, seen[read][0]))
        with hooks.ablated(model, {inside: torch.zeros(inside.n_units)}):
            assert (model(x) - logits).abs().max() > 1e-6
        for method, options in METHODS:
            found = attributions[method](model, x, TARGET, [pixels, inside, read], **options)
            # A linear map with the LRP-0 rule: relevance of inputs sums to that of outputs, position by position.
            if method == "lrp":
                torch.testing.assert_close(found[inside].sum(1), found[read].sum(1), rtol=1e-6, atol=1e-9)
            else:
                change = (model(x) - model(torch.full_like(x, 0.3))).gather(1, TARGET[:, None])[:, 0]
                torch.testing.assert_close(found[pixels].flatten(1).sum(1), change, rtol=1e-6, atol=1e-9)


class Sparse(nn.Module):
    """An autoencoder with names of its own."""

    def __init__(self, n, n_latents):
        super().__init__()
        self.encoder, self.relu, self.decoder = nn.Linear(n, n_latents), nn.ReLU(), nn.Linear(n_latents, n)

    def forward(self, x):
        return self.decoder(self.relu(self.encoder(x)))


def test_what_has_no_rule_of_its_own_is_looked_into():
    model, x = MODELS["vit"], images("vit")
    with inserted(model, "blocks.0", Sparse(8, 12).double()) as where:
        latents = sites.place(model, f"{where}.module.relu", x, axis=-1)
        block = sites.place(model, "blocks.0", x, axis=-1)
        for method, options in METHODS:
            found = attributions[method](model, x, TARGET, [latents, block], **options)
            assert found[latents].shape == (3, 12, 16)
            assert all(values.abs().max() > 0 for values in found.values())
        change = (model(x) - model(torch.full_like(x, 0.3))).gather(1, TARGET[:, None])[:, 0]
        torch.testing.assert_close(found[latents].flatten(1).sum(1), change, rtol=1e-6, atol=1e-9)
    with inserted(model, "blocks.0", nn.Softplus()), pytest.raises(ModelError, match="no rule for Softplus"):
        attributions["lrp"](model, x, TARGET, [sites.input_site(x)])


def without(site):
    keep = torch.ones(site.n_units, dtype=torch.bool)
    keep[::3] = False
    return Mask({site: keep})


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layer"), EACH)
def test_sites_that_fit_are_cut_as_ever_and_the_others_refused_by_the_true_reason(name, layer):
    with inserted(MODELS[name], layer, projection(name, layer, rank=3), rule=plain):
        model = copy.deepcopy(MODELS[name])
    x = images(name)
    found = sites.find(model, x)
    left = [site for site in CUTS[name] if site not in found.sites]
    assert {found.refused[site.layer] for site in left} <= {
        f"after a trial cut of its units what is inserted after {layer!r} does not fit"
    }
    touched = {member.module for site in left for member in site.producers}
    meets = {"layer1.0": "layer1.0.conv2", "layer2": "layer2.0.conv2", "blocks.0.attn.core": "blocks.0.attn.qkv"}
    if layer not in ("relu", "blocks.1", "blocks.0.norm1", "norm", "patches", "avgpool"):
        assert meets.get(layer, layer) in touched
    assert not any(
        "inserted" in place for site in found.sites for place in (site.layer, *(m.module for m in site.members))
    )
    assert not any("inserted" in layer for layer in found.refused)
    assert not any("inserted" in site.layer for site in sites.weights(model))
    for site in found.sites:
        small, silent = copy.deepcopy(model), copy.deepcopy(model)
        surgery.cut(small, without(site))
        surgery.zero(silent, without(site))
        with hooks.ablated(model, without(site)):
            masked = model(x)
        torch.testing.assert_close(small(x), masked, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(silent(x), masked, rtol=1e-9, atol=1e-9)
    engine = Engine(model, found.sites, Batch(x, TARGET, ("a", "b", "c")))
    with (
        engine.open(found.sites[-1]) as suffix,
        hooks.ablated(model, {found.sites[-1]: torch.arange(suffix.n_left) != 1}),
    ):
        torch.testing.assert_close(suffix.without(1), model(x), rtol=1e-6, atol=1e-9)


def test_a_cut_inside_stays_when_the_module_is_gone_and_errors_leave_nothing():
    model = copy.deepcopy(MODELS["resnet"])
    x, site = images("resnet"), next(site for site in CUTS["resnet"] if site.layer == "layer3.0.conv1")
    expected = copy.deepcopy(model)
    surgery.cut(expected, without(site))
    with inserted(model, "layer1", projection("resnet", "layer1")):
        surgery.cut(model, without(site))
    assert torch.equal(model(x), expected(x))
    before = state(model)

    def fail():
        with inserted(model, "conv1", nn.ReLU()), inserted(model, "conv1", nn.ReLU()), inserted(model, "fc", nn.ReLU()):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert same(before, state(model))
    for layer, words in [("", "after the whole model"), ("con1", "no layer 'con1'.*did you mean 'conv1'")]:
        with pytest.raises(ModelError, match=words), inserted(model, layer, nn.ReLU()):
            pass
    pair = nn.Sequential(nn.LSTM(4, 4), nn.Flatten())
    with pytest.raises(ModelError, match="a tuple reaches an inserted module"), inserted(pair, "0", nn.ReLU()):
        pair(torch.zeros(2, 3, 4))
