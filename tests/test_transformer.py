"""Chefer's attribution against its rules written out with loops and dense matrices, its totals, what it refuses."""

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torchvision.models import VisionTransformer as TorchvisionViT

from sukashi.attributions import chefer as chefer_file
from sukashi.attributions.chefer import chefer
from sukashi.core.errors import DataError, ModelError, UsageError
from sukashi.core.types import Mask, Site
from sukashi.models.architectures import DigitsViT
from sukashi.network import sites as finder
from sukashi.network import surgery
from sukashi.network.canonical import Add, canonical
from sukashi.network.layers import explicit_attention

TARGET = torch.tensor([0, 2])
TINY = 1e-9


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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


# The method, written out.


def parts(model):
    """Blocks as (norm, attention, scale, norm, first, second, scale), what comes before and what after them."""
    one = torch.ones(())
    if isinstance(model, DigitsViT):
        blocks = [(b.norm1, b.attn, one, b.norm2, b.fc1, b.fc2, one) for b in model.blocks]
        return blocks, lambda x: model.patches(x).flatten(2).mT + model.position, model.norm, model.head, range(16)
    if isinstance(model, TorchvisionViT):
        blocks = [(b.ln_1, b.self_attention, one, b.ln_2, b.mlp[0], b.mlp[3], one) for b in model.encoder.layers]

        def embed(x):
            tokens = torch.cat([model.class_token.expand(len(x), -1, -1), model._process_input(x)], 1)
            return tokens + model.encoder.pos_embedding

        return blocks, embed, model.encoder.ln, model.heads.head, [0]
    gammas = [[getattr(scale, "gamma", one).detach() for scale in (b.ls1, b.ls2)] for b in model.blocks]
    blocks = [
        (b.norm1, b.attn, g, b.norm2, b.mlp.fc1, b.mlp.fc2, h) for b, (g, h) in zip(model.blocks, gammas, strict=True)
    ]
    read = range(model.num_prefix_tokens, 99) if model.global_pool == "avg" else [0]
    assert isinstance(model.norm, nn.Identity) or isinstance(model.fc_norm, nn.Identity)
    return blocks, lambda x: model._pos_embed(model.patch_embed(x)), model.norm, (model.fc_norm, model.head), read


def divided(r, z):
    """r / z entry by entry; nothing where nothing was added up."""
    return torch.where(z == 0, 0, r / (z + torch.where(z < 0, -TINY, TINY)))


def back_linear(layer, x, r):
    """R_i = sum_j (x_i w_ij)^+ / sum_i (x_i w_ij)^+ R_j, token by token."""
    found = torch.zeros_like(x)
    for t in range(len(x)):
        c = (x[t][:, None] * layer.weight.detach().T).clamp(min=0)
        found[t] = c @ divided(r[t], c.sum(0))
    return found


def back_sum(a, b, r):
    ra, rb = a * divided(r, a + b), b * divided(r, a + b)
    sa, sb = ra.sum(), rb.sum()
    part_a, part_b = (s.abs() / (sa.abs() + sb.abs()) * r.sum() for s in (sa, sb))
    return ra * part_a / sa, rb * part_b / sb


def back_product(a, b, r):
    """R of both factors of a @ b, half each, term by term in the sum over k."""
    ra, rb = torch.zeros_like(a), torch.zeros_like(b)
    s = divided(r, a @ b) / 2
    for k in range(a.shape[1]):
        terms = a[:, k][:, None] * b[k][None] * s
        ra[:, k] += terms.sum(1)
        rb[k] += terms.sum(0)
    return ra, rb


def scaled_back(gamma, r, paper):
    return r / (gamma + 1e-6) if paper and gamma.dim() else r


def written_out(model, x, target, patch, paper=False):
    """The values of the patches of one image (1, C, H, W)."""
    blocks, embed, norm, head, read = parts(model)
    final_norm, head = head if isinstance(head, tuple) else (nn.Identity(), head)
    n_heads = len(blocks[0][1].core.widths)
    seen, attentions = [], []
    tokens = embed(x)[0].detach()
    for norm1, attn, gamma, norm2, fc1, fc2, delta in blocks:
        normed = norm1(tokens)
        q, k, v = attn.qkv(normed).unflatten(1, (3, n_heads, -1)).permute(1, 2, 0, 3)
        a = (q @ k.mT * q.shape[2] ** -0.5).softmax(2)
        a = a if a.requires_grad else a.requires_grad_()
        mixed = (a @ v).transpose(0, 1).flatten(1)
        out = gamma * attn.proj(mixed)
        middle = tokens + out
        hidden = fc1(norm2(middle))
        second = delta * fc2(F.gelu(hidden))
        seen.append(
            [
                z.detach()
                for z in (tokens, normed, q, k, v, a, mixed, out, middle, norm2(middle), F.gelu(hidden), second)
            ]
        )
        attentions.append(a)
        tokens = middle + second
    read = [t for t in read if t < len(tokens)]
    normed = norm(tokens)
    pooled = final_norm(normed[read].mean(0))
    logits = head(pooled)
    torch.testing.assert_close(logits[None], model(x), rtol=1e-9, atol=1e-12)
    slopes = torch.autograd.grad(logits[target], attentions)

    r_pooled = back_linear(head, pooled[None].detach(), F.one_hot(target, 3)[None].double())[0]
    if len(read) > 1:
        r = torch.zeros_like(tokens)
        share = normed[read].detach() / len(read)
        r[read] = share * divided(r_pooled, share.sum(0))
    else:
        r = torch.zeros_like(tokens)
        r[read[0]] = r_pooled
    maps = []
    for block, values in reversed(list(zip(blocks, seen, strict=True))):
        _, attn, gamma, _, fc1, fc2, delta = block
        before, normed, q, k, v, a, mixed, out, middle, normed2, active, second = values
        r, branch = back_sum(middle, second, r)
        branch = back_linear(fc2, active, scaled_back(delta, branch, paper))
        r = r + back_linear(fc1, normed2, branch)
        r, branch = back_sum(before, out, r)
        branch = back_linear(attn.proj, mixed, scaled_back(gamma, branch, paper))
        r_a, r_qkv = torch.zeros_like(a), []
        for h, r_head in enumerate(branch.unflatten(1, (n_heads, -1)).transpose(0, 1)):
            r_a[h], r_v = back_product(a[h], v[h], r_head)
            r_q, r_k = back_product(q[h], k[h].T, r_a[h])
            r_qkv.append(torch.stack([r_q, r_k.T, r_v]))
        maps.append(r_a)
        r = r + back_linear(attn.qkv, normed, torch.stack(r_qkv).permute(2, 1, 0, 3).flatten(1))
    rollout = torch.eye(len(tokens), dtype=x.dtype)
    for slope, r_a in zip(slopes, maps[::-1], strict=True):
        rollout = (torch.eye(len(tokens), dtype=x.dtype) + (slope * r_a).clamp(min=0).mean(0)) @ rollout
    rollout -= torch.eye(len(tokens), dtype=x.dtype)
    n_patches = x[0, 0].numel() // patch**2
    return rollout[read].mean(0)[-n_patches:]


def patch_of(name):
    return 2 if name == "sukashi" else 4


def mapped(model, x, target=TARGET, **options):
    site = finder.input_site(x)
    return chefer(model, x, target, [site], **options)[site]


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("layer_scale", ["identity", "paper"])
def test_a_map_is_the_method_written_out_patch_by_patch(name, layer_scale, randomised):
    model, x = net(name, randomised)
    p = patch_of(name)
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
    with pytest.raises(ModelError, match="chefer explains by attention, and this Sequential has none"):
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
        ("beside", "layers lie side by side"),
        ("max", "chefer has no rule for the operation 'amax'"),
    ],
)
def test_a_transformer_of_another_form_is_refused_by_name(what, message):
    with pytest.raises(ModelError, match=message):
        mapped(Odd(what).double().eval(), noise(2, 1, 8, 8))
