"""Chefer's attribution of a vision transformer, block by block with loops and dense matrices."""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import VisionTransformer as TorchvisionViT

from oracles import oracle
from sukashi.models.architectures import DigitsViT

TINY = 1e-9


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

    r_pooled = back_linear(head, pooled[None].detach(), F.one_hot(target, len(logits))[None].double())[0]
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


def side_of(model):
    """Pixels a side of a patch."""
    return next(module.kernel_size[0] for module in model.modules() if isinstance(module, nn.Conv2d))


@oracle("attributions", "chefer", rtol=1e-5, atol=1e-10)
def chefer(model, image, target, site, *, layer_scale="identity"):
    """Each patch's value evenly over its pixels and channels."""
    n_channels, height, width = image.shape
    p = side_of(model)
    patches = written_out(model, image[None], target, p, layer_scale == "paper").view(height // p, width // p)
    even = patches.repeat_interleave(p, 0).repeat_interleave(p, 1) / (p * p * n_channels)
    return even.flatten().expand(n_channels, -1)
