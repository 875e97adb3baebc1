"""Which sites are found, what is refused and why, and that looking changes nothing."""

import pytest
import torch
import torchvision
from torch import nn

from sukashi.core.errors import ModelError, SukashiError, UsageError
from sukashi.core.types import Member, Site
from sukashi.models.architectures import CifarResNet, DigitsCNN, DigitsViT
from sukashi.network import coupling, exclude, sites
from sukashi.network.layers import explicit_attention


def example(channels: int = 3, size: int = 32) -> torch.Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(2))


def each(n: int, start: int = 0) -> tuple[tuple[int], ...]:
    return tuple((start + u,) for u in range(n))


def test_resnet20_has_nine_inner_sites_and_three_stages():
    found = sites.find(CifarResNet(20, 10).eval(), example()).sites
    inner = [f"layer{stage}.{block}.conv1" for stage in (1, 2, 3) for block in (0, 1, 2)]
    # By last producer: a stage comes after the blocks that write into it.
    assert [site.layer for site in found] == [
        *inner[:3], "conv1", *inner[3:6], "layer2.0.conv2", *inner[6:], "layer3.0.conv2"
    ]  # fmt: skip
    assert sum(site.n_units for site in found) == 448
    assert {site.kind for site in found} == {"channel"}
    stage = next(site for site in found if site.layer == "layer2.0.conv2")
    assert set(stage.members) == {
        *(Member(f"layer2.{block}.conv2", "out", each(32), 1) for block in (0, 1, 2)),
        *(Member(f"layer2.{block}.bn2", "out", each(32), 1) for block in (0, 1, 2)),
        *(Member(f"layer2.{block}.conv1", "in", each(32), 1) for block in (1, 2)),
        Member("layer2.0.shortcut", "out", each(32), 1),
        Member("layer3.0.conv1", "in", each(32), 1),
        Member("layer3.0.shortcut", "in", each(32), 1),
    }


def test_flattened_maps_belong_to_their_channel():
    found = sites.find(DigitsCNN(10, 4).eval(), example(1, 8)).sites
    last = next(site for site in found if site.layer == "conv3")
    consumer = next(member for member in last.members if member.module == "fc1")
    assert consumer.index == tuple(tuple(range(16 * u, 16 * u + 16)) for u in range(4))
    assert [(site.layer, site.kind, site.axis) for site in found] == [
        ("conv1", "channel", 1),
        ("conv3", "channel", 1),
        ("fc1", "hidden", -1),
    ]


def test_attention_is_one_site_of_inner_dimensions():
    found = sites.find(DigitsViT(10, 8, depth=1, n_heads=2).eval(), example(1, 8))
    head, hidden = found.sites
    thrice = tuple((c, 8 + c, 16 + c) for c in range(8))
    assert (head.layer, head.kind, head.n_units, head.axis) == ("blocks.0.attn.qkv", "head", 8, -1)
    assert head.members == (
        Member("blocks.0.attn.qkv", "out", thrice, -1),
        Member("blocks.0.attn.core", "in", thrice, -1),
        Member("blocks.0.attn.proj", "in", each(8), -1),
    )
    assert (hidden.layer, hidden.kind, hidden.n_units) == ("blocks.0.fc1", "hidden", 16)
    assert set(found.refused) == {"patches", "blocks.0.attn.proj", "blocks.0.fc2", "head"}
    assert "residual stream" in found.refused["patches"]
    assert "output" in found.refused["head"]


def test_concatenated_units_keep_their_offset():
    model = torchvision.models.DenseNet(8, (2, 2), 16, num_classes=5).eval()
    found = {site.layer: site for site in sites.find(model, example(3, 64)).sites}
    written = found["features.denseblock1.denselayer2.conv2"]
    assert Member("features.transition1.norm", "out", each(8, 24), 1) in written.members
    assert Member("features.transition1.conv", "in", each(8, 24), 1) in written.members


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_alone(training):
    model = CifarResNet(20, 10).train(training)
    model(example()).sum().backward()
    model.bn1.eval()
    model.conv1.weight.requires_grad_(False)
    flags = [module.training for module in model.modules()]
    objects = {name: id(p) for name, p in model.named_parameters()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    rng = torch.get_rng_state()
    x = example()
    sites.find(model, x)
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(x, example())
    assert [module.training for module in model.modules()] == flags
    assert {name: id(p) for name, p in model.named_parameters()} == objects
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(p.grad, grads[name]) for name, p in model.named_parameters())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["conv1.weight"]
    assert not any(m._forward_pre_hooks or m._forward_hooks or "forward" in vars(m) for m in model.modules())


def test_frozen_or_half_precision_models_have_the_same_sites():
    model = CifarResNet(20, 10).eval()
    found = sites.find(model, example()).sites
    with torch.no_grad():
        frozen = sites.find(model.requires_grad_(False), example()).sites
    half = sites.find(model.bfloat16(), example()).sites
    assert [site.members for site in frozen] == [site.members for site in found] == [site.members for site in half]


class Rolled(nn.Module):
    """Channels are rolled: those that are left roll otherwise than they did among all."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.conv = nn.Conv2d(6, 6, 3, padding=1)
        self.back = nn.Conv2d(6, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = self.stem(x).relu()
        x = x + self.norm(self.back(self.conv(x).relu().roll(1, dims=1)))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("gamma", [1.0, 0.0, 1e-9])
def test_a_site_whose_cut_would_be_wrong_is_refused_even_where_the_weights_hide_it(gamma):
    model = Rolled().eval()
    nn.init.constant_(model.norm.weight, gamma)
    found = sites.find(model, example(1, 8))
    assert [site.layer for site in found.sites] == ["stem"]
    assert "trial cut does not give the logits of the masked model (logits are" in found.refused["conv"]


@pytest.mark.parametrize("units", [(0, 5), (1, 5), (2, 5)])
def test_a_site_that_is_wrong_for_some_of_its_units_is_refused(units, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.Conv2d(6, 6, 3), nn.Flatten(), nn.Linear(96, 3)).eval()
    traced = coupling.traced

    def wrong(model, x):
        trace = traced(model, x)
        index = trace.groups[0].places["1", "in"]
        first, second = units
        index[first], index[second] = index[second], index[first]
        return trace

    monkeypatch.setattr(coupling, "traced", wrong)
    found = sites.find(model, example(1, 8))
    assert [site.layer for site in found.sites] == ["1"]
    assert "trial cut" in found.refused["0"]


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.same = nn.Conv2d(6, 6, 3, padding=1)
        self.widen = nn.Conv2d(6, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.same(self.same(self.stem(x)).relu())
        return self.head(self.widen(x).relu().mean((2, 3)))


def test_a_layer_called_twice_is_refused_by_name():
    found = sites.find(Twice().eval(), example(1, 8))
    assert [site.layer for site in found.sites] == ["widen"]
    assert "'same' is called 2 times" in found.refused["stem"]


def test_shared_weights_are_refused_by_name():
    model = nn.Sequential(
        nn.Conv2d(1, 6, 1), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 5, 1), nn.Flatten(), nn.Linear(320, 3)
    )
    model[2].weight = model[1].weight
    found = sites.find(model.eval(), example(1, 8))
    assert [site.layer for site in found.sites] == ["3"]
    assert all("shares its weights" in found.refused[layer] for layer in ("0", "1", "2"))


def test_a_normalisation_over_the_units_is_refused_by_name():
    model = nn.Sequential(nn.Conv2d(1, 6, 1), nn.GroupNorm(1, 6), nn.Conv2d(6, 4, 1), nn.Flatten(), nn.Linear(256, 3))
    found = sites.find(model.eval(), example(1, 8))
    assert [site.layer for site in found.sites] == ["2"]
    assert "'1': a GroupNorm normalises" in found.refused["0"]


def test_unconverted_attention_is_refused_with_the_remedy():
    vit = torchvision.models.VisionTransformer(16, 8, num_layers=1, num_heads=2, hidden_dim=12, mlp_dim=24).eval()
    found = sites.find(vit, example(3, 16))
    assert [site.kind for site in found.sites] == ["hidden"]
    assert "explicit_attention" in found.refused["encoder.layers.encoder_layer_0.self_attention"]
    explicit_attention(vit)
    found = sites.find(vit, example(3, 16))
    assert [site.kind for site in found.sites] == ["head", "hidden"]
    assert not any("explicit_attention" in reason for reason in found.refused.values())


def test_convnext_loses_hidden_units_only():
    model = torchvision.models.convnext_tiny(weights=None).eval()
    found = sites.find(model, example())
    assert {site.kind for site in found.sites} == {"hidden"}
    assert sum(site.n_units for site in found.sites) == 4 * (3 * 96 + 3 * 192 + 9 * 384 + 3 * 768)


def test_an_excluded_layer_takes_its_whole_site_out():
    found = sites.find(CifarResNet(20, 10).eval(), example())
    left = sites.without(found, ["layer2.2.conv2", "conv1"])
    assert [site.layer for site in found.sites if site not in left.sites] == ["conv1", "layer2.0.conv2"]
    assert left.refused["layer2.1.conv2"] == "it is excluded"
    with pytest.raises(
        UsageError, match=r"no site has a layer 'layer2.2.conv3' to exclude: did you mean 'layer2.2.conv"
    ):
        sites.without(found, ["layer2.2.conv3"])
    for idle in ("linear", "lin*"):
        with pytest.raises(UsageError, match="nothing of layer 'linear' would be cut"):
            sites.without(found, [idle])


def test_layers_are_excluded_by_pattern_and_what_is_misspelt_lists_the_nearest():
    net = CifarResNet(56, 10)
    found = sites.find(net.eval(), example())
    first = [site.layer for site in found.sites if site.layer.endswith("conv1") and site.layer != "conv1"]
    left = sites.without(found, ["layer*.conv1"])
    assert len(first) == 27
    assert [site.layer for site in left.sites] == [site.layer for site in found.sites if site.layer not in first]
    named = sites.weights(net, exclude=["layer?.*.conv1", "linear"])
    assert [site.layer for site in named] == [s.layer for s in sites.weights(net) if s.layer not in [*first, "linear"]]
    for call in (lambda: sites.without(found, ["layer9.*"]), lambda: sites.weights(net, exclude=["layer9.*"])):
        with pytest.raises(SukashiError, match=r"'layer9\.\*' to exclude.*There are \d+") as caught:
            call()
        assert len(str(caught.value)) < 200


def test_the_remedy_is_one_pattern_that_leaves_all_others_in():
    refused = ["a.0.qkv", "a.10.qkv", "b.1", "c.0.fc", "c.2.fc"]
    assert exclude.remedy(refused[:1]) == "exclude it (`exclude=['a.0.qkv']`)"
    said = "exclude all 5 such layers (`exclude=['a.*.qkv', 'b.1', 'c.0.fc', 'c.2.fc']`)"
    assert exclude.remedy(refused, ["a.0.proj", "c.1.fc"]) == said
    stages = [f"layers.{stage}.blocks.{block}.qkv" for stage in range(3) for block in range(2)]
    said = "exclude all 4 such layers (`exclude=['layers.0.blocks.*.qkv', 'layers.1.blocks.*.qkv']`)"
    assert exclude.remedy(stages[:4], stages[4:]) == said


def test_groups_of_a_convolution_are_units():
    model = torchvision.models.regnet_y_400mf(weights=None).eval()
    found = {site.layer: site for site in sites.find(model, example()).sites}
    name = "trunk_output.block1.block1-0.f"
    site = found[f"{name}.a.0"]
    groups = tuple(tuple(range(8 * u, 8 * u + 8)) for u in range(6))
    assert (site.kind, site.n_units) == ("channel", 6)
    assert Member(f"{name}.b.0", "out", groups, 1) in site.members
    assert Member(f"{name}.c.0", "in", groups, 1) in site.members


class Pair(nn.Module):
    def forward(self, x):
        return x, x


def nan_model() -> nn.Module:
    model = CifarResNet(20, 10).eval()
    with torch.no_grad():
        model.conv1.weight[0] = torch.nan
    return model


class ByKeyword(nn.Sequential):
    def forward(self, x):
        return self[2](input=self[1](self[0](x).relu().mean((2, 3))))


def one_more(norm: nn.Module) -> nn.Module:
    return ByKeyword(nn.Conv2d(3, 4, 3), norm, nn.Linear(4, 2)).eval()


@pytest.mark.parametrize(
    ("model", "x", "message"),
    [
        (Pair(), example(), "tuple"),
        (one_more(nn.Identity()), example(), "layer '2' is called by keyword"),
        (one_more(nn.BatchNorm1d(4, track_running_stats=False)), example(), "layer '1' keeps no running statistics"),
        (nan_model(), example(), "NaN"),
        (CifarResNet(20, 10).eval(), example(1), r"shape \(2, 1, 32, 32\)"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), example(1, 8), "nothing in this Sequential"),
        (nn.Flatten(), example(1, 8), "no convolution"),
    ],
)
def test_models_without_sites_are_refused_with_the_reason(model, x, message):
    with pytest.raises(ModelError, match=message):
        sites.find(model, x)


def test_the_input_is_a_site_too():
    site = sites.input_site(torch.zeros(2, 3, 8, 8))
    assert site == Site("", "pixel", 3)
    assert site.members == (Member("", "in", each(3), 1),)


def test_single_weights_are_those_of_convolutions_and_linear_layers():
    model = DigitsViT(10, 8, depth=1, n_heads=2)
    found = sites.weights(model, exclude=["head"])
    assert [(site.layer, site.kind) for site in found] == [
        (name, "weight")
        for name in ("patches", "blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.0.fc1", "blocks.0.fc2")
    ]
    assert [site.n_units for site in found] == [model.get_submodule(site.layer).weight.numel() for site in found]
    with pytest.raises(ModelError, match="no convolution or linear layer 'haed' to exclude: did you mean 'head'"):
        sites.weights(model, exclude=["haed"])
    with pytest.raises(ModelError, match="no convolution or linear layer is left"):
        sites.weights(model, exclude=[site.layer for site in sites.weights(model)])


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.ConvTranspose2d(4, 4, 2), "layer '1', a ConvTranspose2d, does something of its own"),
        (Standardised(4, 4, 1), "layer '1', a Standardised, does something of its own"),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)), "layer '1', a ParametrizedConv2d, does something"),
    ],
)
def test_a_layer_in_which_a_zero_weight_may_still_be_a_connection_is_refused(layer, words):
    model = nn.Sequential(nn.Conv2d(1, 4, 1), layer)
    with pytest.raises(ModelError, match=f"{words}.*exclude it"):
        sites.weights(model)
    assert [site.layer for site in sites.weights(model, exclude=["1"])] == ["0"]


def test_all_layers_that_have_no_plain_weights_are_named_at_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(*(nn.ConvTranspose2d(4, 4, 2) for _ in range(3))))
    with pytest.raises(ModelError, match=r"layer '1\.0'.*exclude all 3 such layers \(`exclude=\['\*\.\*'\]`\)$"):
        sites.weights(model)


def test_a_weight_of_two_layers_is_no_site_of_its_own():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    with pytest.raises(ModelError, match="layer '0' shares its weights with another: exclude both"):
        sites.weights(model)
    assert [site.layer for site in sites.weights(model, exclude=["0", "2"])] == ["1"]
