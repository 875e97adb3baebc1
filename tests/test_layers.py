"""Our layers against plain re-implementations, and attention written out against the original."""

import copy
import json

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers.attention import Attention as TimmAttention
from torch import nn
from torchvision.models import VisionTransformer

from cases import half_of
from sukashi.core.errors import ModelError
from sukashi.core.types import Mask
from sukashi.criteria.drift import unit_parameters
from sukashi.network import hooks, sites, surgery
from sukashi.network.layers import Attention, AttentionCore, PadShortcut, explicit_attention
from supported import randomised


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def torchvision_vit() -> VisionTransformer:
    vit = VisionTransformer(16, 8, num_layers=2, num_heads=2, hidden_dim=12, mlp_dim=24, num_classes=5)
    nn.init.normal_(vit.heads.head.weight)  # torchvision starts it at zero: every comparison would hold
    return vit.double().eval()


def timm_vit(**options) -> nn.Module:
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, **options)
    return vit.double().eval()


def test_shortcut_pads_on_both_sides(generator):
    x = torch.randn(2, 16, 8, 8, generator=generator)
    assert torch.equal(PadShortcut(16, 32, 2)(x), F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8)))


def test_cut_shortcut_is_the_slice_of_the_whole_one(generator):
    x = torch.randn(2, 6, 4, 4, generator=generator)
    inputs, outputs = torch.tensor([0, 2, 5]), torch.tensor([1, 3, 4, 8, 11])
    whole = PadShortcut(6, 12, 2)
    zeroed = torch.zeros_like(x).index_copy(1, inputs, x[:, inputs])
    expected = whole(zeroed)[:, outputs]
    small = copy.deepcopy(whole)
    small.cut_outputs(outputs)
    small.cut_inputs(inputs)
    assert (small.in_channels, small.out_channels) == (3, 5)
    assert torch.equal(small(x[:, inputs]), expected)
    assert expected.any()


@pytest.mark.parametrize("widths", [(4, 4, 4), (1, 4, 2), (0, 3, 1), (0, 3, 3)])
def test_attention_core_is_softmax_of_each_head(widths, generator):
    inner, scale = sum(widths), 0.37
    qkv = torch.randn(2, 5, 3 * inner, generator=generator, dtype=torch.float64)
    q, k, v = qkv.split(inner, dim=2)
    heads, start = [], 0
    for width in widths:
        part = slice(start, start + width)
        weights = (scale * q[..., part] @ k[..., part].mT).softmax(-1)
        heads.append(weights @ v[..., part])
        start += width
    torch.testing.assert_close(AttentionCore(widths, scale)(qkv), torch.cat(heads, 2), rtol=1e-12, atol=1e-12)


def test_cut_attention_core_counts_what_each_head_keeps():
    core = AttentionCore([4, 4, 4], 0.5)
    kept = torch.tensor([0, 3, 8, 9, 11])
    core.cut_inputs(torch.cat([kept, kept + 12, kept + 24]))
    assert core.widths == (2, 0, 3)
    core.cut_inputs(torch.tensor([1, 2, 6, 7, 11, 12]))
    assert core.widths == (1, 0, 1)


@pytest.mark.parametrize("make", [torchvision_vit, timm_vit])
def test_written_out_attention_gives_the_same_logits(make, generator):
    model = make()
    size = 16 if make is torchvision_vit else 32
    x = torch.randn(2, 3, size, size, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        before = model(x)
    owned = {id(parameter) for parameter in model.parameters()}
    explicit_attention(model)
    assert sum(isinstance(module, Attention) for module in model.modules()) == 2
    assert not any(isinstance(module, nn.MultiheadAttention | TimmAttention) for module in model.modules())
    assert {id(parameter) for parameter in model.parameters()} == owned
    with torch.no_grad():
        torch.testing.assert_close(model(x), before, rtol=1e-10, atol=1e-10)
    assert before.std() > 1e-3


def test_names_of_written_out_parameters():
    model = timm_vit()
    names = set(model.state_dict())
    explicit_attention(model)
    assert set(model.state_dict()) == names
    model = torchvision_vit()
    explicit_attention(model)
    ours = {name.partition("self_attention.")[2] for name in model.state_dict() if "self_attention" in name}
    assert ours == {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias"}


@pytest.mark.parametrize("option", ["qk_norm", "scale_attn_norm", "attn_drop_rate", "proj_drop_rate"])
def test_variants_of_timm_stay_as_they_are(option):
    model = timm_vit(**{option: 0.1 if option.endswith("rate") else True})
    explicit_attention(model)
    assert not any(isinstance(module, Attention) for module in model.modules())


def test_gated_and_derived_attention_stays_as_it_is():
    class Other(TimmAttention):
        pass

    model = nn.Sequential(TimmAttention(8, 2), TimmAttention(8, 2, gated=True), Other(8, 2))
    explicit_attention(model)
    assert [isinstance(module, Attention) for module in model] == [True, False, False]


def test_variants_of_torch_stay_as_they_are():
    for options in ({"add_zero_attn": True}, {"batch_first": False}, {"dropout": 0.1}, {"kdim": 3}):
        model = torchvision_vit()
        block = model.encoder.layers[1]
        block.self_attention = nn.MultiheadAttention(12, 2, **({"batch_first": True} | options))
        explicit_attention(model)
        assert type(block.self_attention) is nn.MultiheadAttention


def small_swin():
    return timm.create_model("swin_tiny_patch4_window7_224", img_size=28, depths=(1, 1), embed_dim=24, num_classes=3)


def small_levit():
    return timm.create_model("levit_128s", img_size=64, depth=(1, 1, 1), num_classes=3)


WHOLE = {
    "norms of queries and keys": (lambda: timm_vit(qk_norm=True), "blocks.0.attn.qkv"),
    "dropout": (lambda: timm_vit(attn_drop_rate=0.1), "blocks.0.attn.qkv"),
    "windows with a bias": (small_swin, "layers.0.blocks.0.attn.qkv"),
    "unequal values, a bias in a table": (small_levit, "stages.0.blocks.0.attn.qkv.linear"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_attention_that_is_not_written_out_loses_heads_whole(name):
    torch.manual_seed(0)
    make, layer = WHOLE[name]
    model = randomised(make().eval()).double()
    explicit_attention(model)
    size = {"windows with a bias": 28, "unequal values, a bias in a table": 64}.get(name, 32)
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    found = sites.find(model, x).sites
    site = next(site for site in found if site.layer == layer)
    n_heads = model.get_submodule(layer.partition(".qkv")[0]).num_heads
    assert (site.kind, site.n_units) == ("head", n_heads)
    everything = {site: torch.ones(site.n_units, dtype=torch.bool) for site in found}
    less = copy.deepcopy(model)
    surgery.cut(less, Mask({site: torch.arange(n_heads) > 0}))
    before, after = (sum(p.numel() for p in network.parameters()) for network in (model, less))
    assert unit_parameters(model, found, everything)[site] == before - after
    for seed in range(3):
        mask = half_of(found, seed)
        small = copy.deepcopy(model)
        table = surgery.cut(small, mask)
        again = copy.deepcopy(model)
        surgery.replay(again, json.loads(json.dumps(table)))
        with torch.no_grad(), hooks.ablated(model, mask):
            masked = model(x)
        for cut in (small, again):
            torch.testing.assert_close(cut(x), masked, rtol=1e-10, atol=1e-10)


def test_explicit_attention_is_for_unmasked_self_attention():
    x = torch.randn(1, 4, 8)
    wrapped = nn.Sequential(TimmAttention(8, 2))
    explicit_attention(wrapped)
    with pytest.raises(ModelError, match="mask"):
        wrapped[0](x, is_causal=True)
    model = torchvision_vit()
    explicit_attention(model)
    x = torch.randn(1, 4, 12, dtype=torch.float64)
    with pytest.raises(ModelError, match="self-attention"):
        model.encoder.layers[0].self_attention(x, x.clone(), x)
