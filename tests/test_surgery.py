"""Masked logits equal cut logits on every supported architecture; recipes and renumbering."""

import copy
import json

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sukashi.core.errors import ModelError, UsageError
from sukashi.core.types import Mask
from sukashi.models.architectures import CifarResNet, DigitsCNN, DigitsViT, cifar_resnet18
from sukashi.network import hooks, sites, surgery
from supported import ZOO, build, randomised


def random_mask(found: tuple, ratio: float, generator: torch.Generator) -> Mask:
    """Removes `ratio` of all units, of each site and each head another share."""
    keep = {}
    for site in found:
        share = ratio * (0.6 + 0.8 * torch.rand(site.n_units, generator=generator).sort().values)
        keep[site] = torch.rand(site.n_units, generator=generator) >= share
        keep[site][torch.randint(site.n_units, (), generator=generator)] = True
    return Mask(keep)


def compare(model: nn.Module, x: torch.Tensor, mask: Mask) -> tuple[float, float]:
    """max |masked - cut| and max |masked - dense|, both relative to max |masked|."""
    small = copy.deepcopy(model)
    surgery.cut(small, mask)
    with torch.no_grad():
        dense, cut = model(x), small(x)
        with hooks.ablated(model, mask):
            masked = model(x)
    scale = masked.abs().max()
    return float((masked - cut).abs().max() / scale), float((masked - dense).abs().max() / scale)


# The others of a family are slow.
SWIFT = ("torchvision:resnet18", "torchvision:mobilenet_v2", "timm:vit_tiny_patch16_224", "sukashi:cifar_resnet20")


@pytest.mark.parametrize(
    "name",
    [name if name in SWIFT or "digits" in name else pytest.param(name, marks=pytest.mark.slow) for name in ZOO],
)
def test_masked_logits_equal_cut_logits(name):
    model, shape = build(name)
    _, n_units = ZOO[name]
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, *shape, generator=generator)
    found = sites.find(model, x).sites
    assert sum(site.n_units for site in found) == n_units
    for ratio in (0.3, 0.7):
        mask = random_mask(found, ratio, generator)
        assert abs(mask.n_removed / mask.n_units - ratio) < 0.1
        error, change = compare(model, x, mask)
        assert error < 1e-5
        assert change > 1e-2  # the units removed were of some use: equality says something


SMALL = {
    "resnet20": (lambda: CifarResNet(20, 10), (2, 3, 32, 32)),
    "resnet18": (lambda: cifar_resnet18(10, 8), (2, 3, 32, 32)),
    "digits_cnn": (lambda: DigitsCNN(10, 8), (2, 1, 8, 8)),
    "digits_vit": (lambda: DigitsViT(10, 16), (2, 1, 8, 8)),
    "densenet": (lambda: torchvision.models.DenseNet(8, (2, 2), 16, num_classes=5), (2, 3, 32, 32)),
}


@pytest.fixture(scope="module")
def small():
    made = {}
    for name, (make, shape) in SMALL.items():
        torch.manual_seed(1)
        model = randomised(make().eval()).double()
        x = torch.randn(shape, dtype=torch.float64)
        made[name] = model, x, sites.find(model, x).sites
    return made


@pytest.mark.parametrize("name", SMALL)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_any_mask_that_empties_no_site_is_exact_in_float64(name, small, data):
    model, x, found = small[name]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    keep = {}
    for site in data.draw(st.sets(st.sampled_from(found), min_size=1)):
        n_kept = data.draw(st.integers(1, site.n_units))
        keep[site] = torch.zeros(site.n_units, dtype=torch.bool)
        keep[site][torch.randperm(site.n_units, generator=generator)[:n_kept]] = True
    error, _ = compare(model, x, Mask(keep))
    assert error < 1e-11


@pytest.mark.parametrize("name", SMALL)
def test_zeroed_units_are_read_by_nothing_in_a_network_of_the_same_shape(name, small):
    model, x, found = small[name]
    mask = random_mask(found, 0.4, torch.Generator().manual_seed(6))
    silent = copy.deepcopy(model)
    table = surgery.zero(silent, mask)
    replayed = copy.deepcopy(model)
    surgery.replay(replayed, json.loads(json.dumps(table)))
    with torch.no_grad(), hooks.ablated(model, mask):
        masked = model(x)
    with torch.no_grad():
        assert (silent(x) - masked).abs().max() < 1e-11 * masked.abs().max()
        assert torch.equal(replayed(x), silent(x))
    assert [p.shape for p in silent.parameters()] == [p.shape for p in model.parameters()]
    surgery.cut(silent, mask)
    with torch.no_grad():
        assert (silent(x) - masked).abs().max() < 1e-11 * masked.abs().max(), "what is cut afterwards was silent"


@pytest.mark.parametrize("name", SMALL)
def test_a_table_in_json_replays_the_cut_and_renumbered_sites_are_those_found_anew(name, small):
    model, x, found = small[name]
    generator = torch.Generator().manual_seed(5)
    mask = random_mask(found, 0.4, generator)
    cut = copy.deepcopy(model).requires_grad_(False)
    table = surgery.cut(cut, mask)
    replayed = copy.deepcopy(model)
    surgery.replay(replayed, json.loads(json.dumps(table)))
    assert all(
        torch.equal(a, b) for a, b in zip(cut.state_dict().values(), replayed.state_dict().values(), strict=True)
    )
    assert {p.requires_grad for p in cut.parameters()} == {False}
    assert {p.requires_grad for p in replayed.parameters()} == {True}
    with torch.no_grad():
        assert torch.equal(cut(x), replayed(x))

    left = surgery.renumber(found, mask)
    anew = sites.find(cut, x).sites
    assert left == anew
    assert [site.members for site in left] == [site.members for site in anew]
    again = random_mask(left, 0.4, generator)
    both = {}
    for old, new in zip(found, left, strict=True):
        both[old] = mask.keep[old].clone()
        both[old][mask.keep[old]] = again.keep[new]
    once = copy.deepcopy(model)
    surgery.cut(once, Mask(both))
    surgery.cut(cut, again)
    assert all(torch.equal(a, b) for a, b in zip(cut.state_dict().values(), once.state_dict().values(), strict=True))
    with torch.no_grad():
        assert torch.equal(cut(x), once(x))


def test_sites_that_a_mask_leaves_out_move_with_their_neighbours(small):
    _, _, found = small["densenet"]
    first = next(site for site in found if site.layer == "features.conv0")
    keep = torch.ones(first.n_units, dtype=torch.bool)
    keep[3] = False
    before = next(site for site in found if site.layer == "features.denseblock1.denselayer1.conv2")
    after = next(site for site in surgery.renumber(found, Mask({first: keep})) if site == before)
    index = {member.module: member.index for member in after.members}
    assert index["features.transition1.norm"] == tuple((15 + u,) for u in range(8))
    assert index["features.denseblock1.denselayer1.conv2"] == tuple((u,) for u in range(8))


def test_the_table_names_what_became_smaller_and_only_that(small):
    model, _, found = small["resnet20"]
    site = next(site for site in found if site.layer == "layer1.0.conv1")
    keep = torch.ones(16, dtype=torch.bool)
    keep[5] = False
    kept = [0, 1, 2, 3, 4, *range(6, 16)]
    cut = copy.deepcopy(model)
    others = {other: torch.ones(other.n_units, dtype=torch.bool) for other in found if other is not site}
    assert surgery.cut(cut, Mask({site: keep, **others})) == {
        "layer1.0.conv1": {"out": kept},
        "layer1.0.bn1": {"out": kept},
        "layer1.0.conv2": {"in": kept},
    }
    assert cut.layer1[0].conv1.weight.shape == (15, 16, 3, 3)
    assert (cut.layer1[0].conv1.out_channels, cut.layer1[0].bn1.num_features, cut.layer1[0].conv2.in_channels) == (
        15,
        15,
        15,
    )


def test_emptying_a_site_is_refused_and_nothing_is_cut(small):
    model, _, found = small["digits_cnn"]
    cut = copy.deepcopy(model)
    keep = {found[0]: torch.arange(found[0].n_units) > 2, found[1]: torch.zeros(found[1].n_units, dtype=torch.bool)}
    with pytest.raises(UsageError, match=repr(found[1].layer)):
        surgery.cut(cut, Mask(keep))
    with pytest.raises(UsageError, match=repr(found[1].layer)):
        surgery.zero(cut, Mask(keep))
    assert all(torch.equal(a, b) for a, b in zip(cut.parameters(), model.parameters(), strict=True))
    assert [p.shape for p in cut.parameters()] == [p.shape for p in model.parameters()]


@pytest.mark.parametrize(
    ("layer", "sides", "message"),
    [
        ("blocks.9.fc1", {"out": [0]}, "lacks"),
        ("norm", {"out": [0]}, "LayerNorm"),
        ("blocks.0.fc1", {"up": [0]}, "'up'"),
        ("blocks.0.attn.core", {"out": [0]}, "'out'"),
        ("blocks.0.attn.core", {"zero in": [0, 16, 32]}, "'zero in'"),
        ("blocks.0.fc1", {"zero up": [0]}, "'zero up'"),
        ("blocks.0.fc1", {"zero out": [32]}, "do not fit"),
        ("blocks.0.fc1", {"out": []}, "do not fit"),
        ("blocks.0.fc1", {"out": [-1, 2]}, "do not fit"),
        ("blocks.0.fc1", {"out": [0, 32]}, "do not fit"),
        ("blocks.0.fc1", {"out": [3, 3]}, "do not fit"),
        ("blocks.0.attn.core", {"in": [0, 1, 16, 18, 32, 33]}, "do not fit"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused_before_the_first_cut(small, layer, sides, message):
    model = copy.deepcopy(small["digits_vit"][0])
    shapes = [p.shape for p in model.parameters()]
    with pytest.raises(ModelError, match=message):
        surgery.replay(model, {"blocks.1.fc1": {"out": [0, 1]}, layer: sides})
    assert [p.shape for p in model.parameters()] == shapes
