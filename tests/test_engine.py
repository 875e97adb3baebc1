"""The engine against the masked network, on every architecture and on models made to mislead it."""

import pytest
import timm
import torch
from torchvision.ops import FrozenBatchNorm2d

from sukashi.core.errors import ModelError
from sukashi.core.types import Batch, Mask, Member, Site
from sukashi.criteria import engine
from sukashi.criteria.engine import Engine
from sukashi.network import hooks
from sukashi.network import sites as finder
from supported import ZOO, build, randomised


@pytest.mark.parametrize("net", ["cnn", "vit"])
@pytest.mark.parametrize("budget", [0, engine.DEFAULT_BUDGET], ids=["recomputed", "cached"])
def test_engine_gives_the_masked_networks_logits(small64, net, budget):
    model, sites, data = small64[net].model, small64[net].sites, small64[net].data
    generator = torch.Generator().manual_seed(3)
    moving = Engine(model, sites, data, budget=budget, chunk=37)
    keep = {site: torch.ones(site.n_units, dtype=torch.bool) for site in sites}

    def masked():
        with torch.inference_mode(), hooks.ablated(model, Mask(keep)):
            return model(data.x)

    torch.testing.assert_close(moving.original, masked(), rtol=1e-10, atol=1e-10)
    for site in reversed(sites):
        with moving.open(site) as suffix:
            for unit in torch.randperm(site.n_units, generator=generator)[:6].tolist():
                keep[site][unit] = False
                logits = suffix.without(unit)
                torch.testing.assert_close(logits, masked(), rtol=1e-10, atol=1e-10)
                if unit % 2:
                    suffix.remove(unit, logits)
                    torch.testing.assert_close(suffix.now, masked(), rtol=1e-10, atol=1e-10)
                else:
                    keep[site][unit] = True
                    torch.testing.assert_close(suffix.now, masked(), rtol=1e-10, atol=1e-10)
    assert moving.mask().n_removed == sum(int((~k).sum()) for k in keep.values()) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    # A small DenseNet is among those of test_drift.
    [name for name in ZOO if not name.endswith(("vgg16", "_16", "_224", "32", "44", "56", "densenet121"))],
)
def test_engine_gives_the_masked_logits_of_every_architecture(name):
    """Whatever is computed in place, folded or cached: units of sites near the input, in the middle and at the end."""
    model, shape = build(name)
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    sites = finder.find(model, x[:2]).sites
    moving = Engine(model, sites, Batch(x, torch.zeros(3, dtype=torch.long), torch.arange(3)), chunk=2)
    keep = {site: torch.ones(site.n_units, dtype=torch.bool) for site in sites}
    scale = float(moving.original.abs().max())
    for site in (sites[-1], sites[len(sites) // 2], sites[0]):
        with moving.open(site) as suffix:
            for unit in (0, site.n_units - 1):
                keep[site][unit] = False
                with torch.no_grad(), hooks.ablated(model, Mask(keep)):
                    expected = model(x)
                logits = suffix.without(unit)
                assert float((logits - expected).abs().max()) <= 1e-5 * scale
                assert torch.equal(suffix.without(unit), logits), "asking changes nothing"
                suffix.remove(unit, logits)
    assert float((moving.logits() - expected).abs().max()) <= 1e-5 * scale


class Branches(torch.nn.Module):
    """Three readers of one source, one of them with reflected borders, and a BatchNorm called twice."""

    def __init__(self, twice=False):
        super().__init__()
        self.twice = twice
        self.stem = torch.nn.Conv2d(1, 6, 3, padding=1)
        self.a = torch.nn.Conv2d(6, 4, 3, padding=1)
        self.b = torch.nn.Conv2d(6, 4, 1)
        self.c = torch.nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect")
        self.norm = torch.nn.BatchNorm2d(4)
        self.fc = torch.nn.Linear(4, 10)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        out = self.norm(self.a(x)) + (self.norm(self.b(x)) if self.twice else self.b(x)) + self.c(x)
        return self.fc(torch.relu(out).mean((2, 3)))


@pytest.mark.parametrize("budget", [0, engine.DEFAULT_BUDGET], ids=["recomputed", "cached"])
@pytest.mark.parametrize("twice", [False, True])
def test_readers_that_share_an_input_all_lose_the_unit(small, budget, twice):
    data = small["cnn"].data
    torch.manual_seed(0)
    model = Branches(twice).eval()
    model.norm.running_mean.uniform_(-1, 1)
    model.norm.running_var.uniform_(0.5, 2)
    site = next(s for s in finder.find(model, data.x[:2]).sites if s.layer == "stem")
    moving = Engine(model, [site], data, budget=budget, chunk=50)
    keep = torch.ones(6, dtype=torch.bool)
    with moving.open(site) as suffix:
        for unit in (4, 0, 2):
            keep[unit] = False
            with torch.no_grad(), hooks.ablated(model, {site: keep}):
                expected = model(data.x)
            suffix.remove(unit)
            torch.testing.assert_close(suffix.now, expected, rtol=1e-4, atol=1e-5)


def test_a_model_that_tracing_changes_is_refused(small, monkeypatch):
    case = small["vit"]

    class Mutating(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Conv2d(1, 10, 8)

        def forward(self, x):
            y = self.layer(x).flatten(1)
            y.add_(1)
            return y

    with pytest.raises(ModelError, match="changed in place and read again"):
        Engine(Mutating().eval(), case.sites, case.data)
    monkeypatch.setattr(engine, "_add_into", lambda spare, other: spare.sub_(other))
    with pytest.raises(ModelError, match="traced model gives other logits"):
        Engine(case.model, case.sites, case.data)


def test_engine_leaves_the_model_alone(small):
    model, sites, data = small["cnn"].model, small["cnn"].sites, small["cnn"].data
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with Engine(model, sites, data).open(sites[0]) as suffix:
        suffix.remove(0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


class ReadAgain(torch.nn.Module):
    """Values that are read again after a ReLU or an addition, directly or through an Identity."""

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(1, 6, 3, padding=1)
        self.a = torch.nn.Conv2d(6, 4, 3, padding=1)
        self.same = torch.nn.Identity()
        self.b = torch.nn.Conv2d(4, 4, 1)
        self.relu = torch.nn.ReLU(inplace=False)
        self.fc = torch.nn.Linear(4, 10)

    def forward(self, x):
        a = self.a(torch.relu(self.stem(x)))
        first = self.relu(a)
        b = self.b(a + first)
        same = self.same(b)
        second = self.relu(same)
        third = b + second
        return self.fc((third + second * third + torch.relu(third)).mean((2, 3)))


def test_values_that_are_read_again_are_not_written_over(small):
    data = small["cnn"].data
    torch.manual_seed(0)
    model = ReadAgain().eval()
    sites = finder.find(model, data.x[:2]).sites
    moving = Engine(model, sites, data)
    for site in sites:
        with moving.open(site) as suffix, torch.no_grad():
            keep = torch.ones(site.n_units, dtype=torch.bool)
            keep[1] = False
            with hooks.ablated(model, {site: keep}):
                torch.testing.assert_close(suffix.without(1), model(data.x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["test_efficientnet", "test_byobnet", "mobilenetv3_small_050"])
def test_norms_of_timm_with_an_activation_are_folded(name):
    torch.manual_seed(0)
    model = randomised(timm.create_model(name, num_classes=5).eval())
    x = torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    sites = finder.find(model, x[:2]).sites
    moving = Engine(model, sites, Batch(x, torch.zeros(3, dtype=torch.long), torch.arange(3)))
    assert not any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in moving.root.modules())
    scale = float(moving.original.abs().max())
    for site in (sites[0], sites[-1]):
        with (
            moving.open(site) as suffix,
            torch.no_grad(),
            hooks.ablated(model, {site: torch.arange(site.n_units) != 1}),
        ):
            torch.testing.assert_close(suffix.without(1), model(x), rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("budget", [0, engine.DEFAULT_BUDGET], ids=["recomputed", "cached"])
def test_groups_that_are_normalised_together_go_whole_and_change_no_other(budget):
    torch.manual_seed(0)
    model = randomised(timm.create_model("test_efficientnet_gn", num_classes=5).eval()).double()
    x = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sites = finder.find(model, x[:2]).sites
    grouped = [site for site in sites if len(site.members[0].index[0]) > 1]
    assert len(grouped) > 5
    moving = Engine(model, sites, Batch(x, torch.zeros(5, dtype=torch.long), torch.arange(5)), budget=budget, chunk=2)
    keep = {site: torch.ones(site.n_units, dtype=torch.bool) for site in sites}
    for site in reversed(grouped):
        with moving.open(site) as suffix:
            for unit in (0, site.n_units - 1):
                keep[site][unit] = False
                with torch.no_grad(), hooks.ablated(model, Mask(keep)):
                    expected = model(x)
                torch.testing.assert_close(suffix.without(unit), expected, rtol=1e-10, atol=1e-10)
                if unit == 0:
                    suffix.remove(unit)
                else:
                    keep[site][unit] = True


def test_a_layer_that_is_taken_apart_in_the_form_is_refused_for_what_it_is():
    model = torch.nn.Sequential(
        *(torch.nn.Conv2d(3, 4, 3), timm.layers.LayerScale2d(4, 0.5), torch.nn.Conv2d(4, 6, 3), torch.nn.ReLU()),
        *(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(6, 5)),
    ).eval()
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    sites = finder.find(model, x).sites
    said = (
        r"^layer '1': a LayerScale2d is taken apart in the canonical form, in which its units cannot be cut: use a "
        r"criterion that needs no such form, such as magnitude, or exclude it \(`exclude=\['0'\]`\)$"
    )
    with pytest.raises(ModelError, match=said):
        Engine(model, sites, Batch(x, torch.zeros(2, dtype=torch.long), torch.arange(2)))


def test_heads_that_have_no_layer_in_the_form_are_refused_before_any_unit_goes():
    model = timm.models.VisionTransformer(
        img_size=8, patch_size=4, embed_dim=8, depth=2, num_heads=2, num_classes=5, qk_norm=True
    ).eval()
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    found = finder.find(model, x)
    data = Batch(x, torch.zeros(2, dtype=torch.long), torch.arange(2))
    remedy = r"not written out cannot be cut: .* magnitude, or exclude both \(`exclude=\['blocks\.\*\.attn\.qkv'\]`\)$"
    with pytest.raises(ModelError, match=remedy):
        Engine(model, found.sites, data)
    left = finder.without(found, ["blocks.*.attn.qkv"]).sites
    assert [site.layer for site in Engine(model, left, data).sites] == ["blocks.0.mlp.fc1", "blocks.1.mlp.fc1"]


class Summed(torch.nn.Module):
    """Branches that are added up from the number 0, as `sum` does."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 4, 3)
        self.head = torch.nn.Linear(4, 5)

    def forward(self, x):
        return self.head(sum([self.second(self.first(x).relu())]).mean((2, 3)))


def test_a_sum_may_start_from_a_number():
    model, x = Summed().eval(), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    site = finder.find(model, x).sites[0]
    engine = Engine(model, [site], Batch(x, torch.zeros(2, dtype=torch.long), torch.arange(2)))
    with engine.open(site) as suffix, torch.no_grad(), hooks.ablated(model, {site: torch.arange(4) != 1}):
        torch.testing.assert_close(suffix.without(1), model(x))


class Frozen(torch.nn.Module):
    """A norm that is frozen, slopes of PReLU, a norm behind a linear layer, a difference."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = torch.nn.Conv2d(1, 6, 3, padding=1), FrozenBatchNorm2d(6)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)
        self.act = torch.nn.PReLU()
        self.a, self.fc = torch.nn.Conv2d(6, 4, 3, padding=1), torch.nn.Linear(4, 8)
        self.features, self.last = torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 10)
        self.features.running_mean.normal_()

    def forward(self, x):
        x = self.act(self.norm(self.stem(x)))
        x = self.features(self.fc(self.a(x).mean((2, 3)) / 2 - 1))
        return self.last(x.clamp(min=0))


def test_frozen_norms_slopes_and_differences_are_in_the_engine(small64):
    data = small64["cnn"].data
    torch.manual_seed(0)
    model = Frozen().double().eval()

    def site(layer, n_units, kind, axis, others, reader):
        units = tuple((unit,) for unit in range(n_units))
        makers = [Member(name, "out", units, axis) for name in (layer, *others)]
        return Site(layer, kind, n_units, axis, (*makers, Member(reader, "in", units, axis)))

    sites = (site("stem", 6, "channel", 1, ["norm"], "a"), site("fc", 8, "hidden", -1, ["features"], "last"))
    moving = Engine(model, sites, data)
    for site in sites:
        keep = torch.ones(site.n_units, dtype=torch.bool)
        with moving.open(site) as suffix, torch.no_grad():
            for unit in (1, 4):
                keep[unit] = False
                gone = {s: k if s != site else keep for s, k in moving.keep.items()}
                with hooks.ablated(model, gone):
                    torch.testing.assert_close(suffix.without(unit), model(data.x), rtol=1e-9, atol=1e-10)
                suffix.remove(unit)
