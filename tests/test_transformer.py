"""Chefer's attribution against its rules written out with loops and dense matrices, its totals, what it refuses."""

import copy

import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torchvision.models import VisionTransformer as TorchvisionViT

from cases import noise
from oracles.chefer import side_of, written_out
from sukashi.attributions import chefer as chefer_file
from sukashi.attributions.chefer import chefer
from sukashi.attributions.lrp import lrp
from sukashi.core.errors import DataError, ModelError, UsageError
from sukashi.core.types import Mask, Site
from sukashi.models.architectures import DigitsViT
from sukashi.network import sites as finder
from sukashi.network import surgery
from sukashi.network.canonical import canonical
from sukashi.network.functions import Add
from sukashi.network.layers import explicit_attention

TARGET = torch.tensor([0, 2])


def timm_vit(**options):
    settings = {"img_size": (8, 12), "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 3}
    return VisionTransformer(**{**settings, **options})


NETS = {
    "timm": timm_vit,
    "timm, LayerScale": lambda: timm_vit(init_values=0.3, no_embed_class=True),
    "timm, registers": lambda: timm_vit(reg_tokens=2),
    "timm, patches averaged": lambda: timm_vit(global_pool="avg"),
    "timm, no class token": lambda: timm_vit(global_pool="avg", class_token=False, fc_norm=False),
    "torchvision": lambda: TorchvisionViT(8, 4, 3, 2, 24, 20, num_classes=3),
    "sukashi": lambda: DigitsViT(3, 24, depth=3, n_heads=2),
}


def net(name, randomised):
    """A small network in float64 and two images for it, so wide that inputs speak for each linear output."""
    torch.manual_seed(0)
    model = NETS[name]()
    explicit_attention(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    model = randomised(model).double().eval()
    shape = {"sukashi": (1, 8, 8), "torchvision": (3, 8, 8)}.get(name, (3, 8, 12))
    return model, noise(2, *shape)


def mapped(model, x, target=TARGET, **options):
    site = finder.input_site(x)
    return chefer(model, x, target, [site], **options)[site]


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("layer_scale", ["identity", "paper"])
def test_a_map_is_the_method_written_out_patch_by_patch(name, layer_scale, randomised):
    model, x = net(name, randomised)
    p = side_of(model)
    found = mapped(model, x, layer_scale=layer_scale)
    assert found.shape == x.shape
    for row in range(2):
        expected = written_out(model, x[row : row + 1], TARGET[row], p, layer_scale == "paper")
        assert expected.max() > 0
        cells = found[row].unflatten(2, (-1, p)).unflatten(1, (-1, p)).transpose(2, 3).sum((0, 3, 4))
        torch.testing.assert_close(cells.flatten(), expected, rtol=1e-5, atol=1e-8 * float(expected.max()))
        # Evenly over pixels and channels of a patch.
        even = cells[None, :, None, :, None].expand(len(x[row]), -1, p, -1, p).reshape(x[row].shape)
        torch.testing.assert_close(found[row] * p * p * len(x[row]), even)


def totals(model, x, layer_scale):
    """Relevance in sum over all tokens at each sum of the network, as `chefer` carries it; (sums, B)."""
    form = canonical(model, x)
    kept, attentions = [], []
    chefer_file.ruled(form, chefer_file._rules(attentions, layer_scale), "chefer")
    adds = [m for m in form.modules() if isinstance(m, Add)]
    for add in adds:
        add.register_forward_hook(lambda module, inputs, output: kept.append(output))
    with torch.enable_grad():
        logits = form(x).gather(1, TARGET[:, None])
        found = torch.autograd.grad(logits.sum(), [out for out in kept if out.requires_grad])
    return torch.stack([r.flatten(1).sum(1) for r in found])


@pytest.mark.parametrize("name", NETS)
def test_the_total_of_relevance_stays_one_but_by_the_papers_layer_scale(name, randomised):
    model, x = net(name, randomised)
    found = totals(model, x, "identity")
    assert len(found) >= 6
    torch.testing.assert_close(found, torch.ones_like(found), rtol=1e-6, atol=0)
    off = (totals(model, x, "paper") - 1).abs().max()
    assert (off > 0.1) == (name == "timm, LayerScale")


@pytest.mark.parametrize("name", NETS)
def test_a_map_explains_its_own_class_and_float32_is_as_good(name, randomised):
    model, x = net(name, randomised)
    found = mapped(model, x)
    assert (mapped(model, x, torch.tensor([1, 0])) - found).abs().max() > 1e-3 * found.max()
    low = mapped(model.float(), x.float())
    found = mapped(model.double(), x.float().double())
    assert low.dtype == torch.float32
    assert (low - found).abs().max() < 1e-6 * found.max()


@pytest.mark.parametrize("name", ["timm", "sukashi"])
def test_a_cut_network_has_the_map_of_the_silenced_one(name, randomised):
    model, x = net(name, randomised)
    found = finder.find(model.float(), x.float()).sites
    keep = {site: torch.ones(site.n_units, dtype=torch.bool) for site in found}
    for site in found:  # a whole head too
        keep[site][: site.n_units // 2] = False
    maps = []
    for mode in ("cut", "zero"):
        small = copy.deepcopy(model).double()
        surgery.MODES[mode](small, Mask(keep))
        maps.append(mapped(small, x))
    assert maps[0].max() > 0
    torch.testing.assert_close(maps[0], maps[1], rtol=1e-6, atol=1e-9 * float(maps[0].max()))


def test_what_it_cannot_explain_is_refused_by_name(randomised):
    model, x = net("timm", randomised)
    hidden = finder.find(model.float(), x.float()).sites[0]
    with pytest.raises(UsageError, match="chefer explains the pixels alone, not site 'blocks"):
        chefer(model.double(), x, TARGET, [hidden])
    with pytest.raises(UsageError, match="chefer explains the pixels alone, not site 'head'"):
        chefer(model, x, TARGET, [Site("head", "pixel", 3)])
    with pytest.raises(DataError, match="target 3 is no class"):
        mapped(model, x, torch.tensor([0, 3]))
    cnn = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).double()
    with pytest.raises(ModelError, match="this Sequential has no attention that could be written out"):
        mapped(cnn.eval(), x)


class Odd(nn.Module):
    """A ViT that differs from others in one thing."""

    def __init__(self, what):
        super().__init__()
        torch.manual_seed(0)
        self.what, self.net = what, DigitsViT(3, 8, depth=2, n_heads=2)
        self.stem = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x):
        net = self.net
        x = self.stem(x) if self.what == "stem" else x
        tokens = net.patches(x)
        tokens = (tokens.transpose(2, 3) if self.what == "columns" else tokens).flatten(2).transpose(1, 2)
        if self.what == "last":
            tokens = torch.cat([tokens, net.position[:, :1].expand(x.shape[0], -1, -1)], 1)
        if self.what == "beside":
            one, two = net.blocks
            tokens = tokens + one.attn(one.norm1(tokens)) + two.attn(two.norm1(tokens))
        else:
            tokens = net.blocks(tokens)
        tokens = net.norm(tokens)
        return net.head(tokens.mean(1) if self.what != "max" else tokens.amax(1))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("stem", "does not make its tokens with one convolution"),
        ("columns", "tokens of this Odd are not its 4 x 4 patches row by row"),
        ("last", "the 17 tokens of this Odd are not its 4 x 4 patches row by row"),
        ("beside", "layers of attention lie side by side in this Odd"),
        ("max", "chefer has no rule for the operation 'amax'"),
    ],
)
def test_a_transformer_of_another_form_is_refused_by_name(what, message):
    with pytest.raises(ModelError, match=message):
        mapped(Odd(what).double().eval(), noise(2, 1, 8, 8))


class Undivided(VisionTransformerDistilled):
    """The sum of both heads, not their mean."""

    def forward_head(self, x, pre_logits=False):
        return 2 * super().forward_head(x, pre_logits)


def test_the_mean_of_two_heads_is_the_sum_of_heads_half_as_large():
    torch.manual_seed(0)
    sizes = {"img_size": (8, 12), "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 3}
    model = VisionTransformerDistilled(**sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    explicit_attention(model)
    model, x = model.double().eval(), noise(2, 3, 8, 12)
    twin = copy.deepcopy(model)
    twin.__class__ = Undivided
    with torch.no_grad():
        for parameter in (*twin.head.parameters(), *twin.head_dist.parameters()):
            parameter /= 2
    torch.testing.assert_close(twin(x), model(x))
    for options in ({}, {"layer_scale": "paper"}):
        found = mapped(model, x, **options)
        assert (found > 0).any()
        torch.testing.assert_close(found, mapped(twin, x, **options), rtol=1e-6, atol=1e-12)
    site = finder.input_site(x)
    torch.testing.assert_close(lrp(model, x, TARGET, [site])[site], lrp(twin, x, TARGET, [site])[site])
