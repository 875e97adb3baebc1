"""LRP against its rules written out over dense matrices, its conservation laws, and zennit."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from cases import PIXELS, TARGET, explained, logit, noise
from oracles.lrp import shares, written_out
from oracles.matrices import dense
from sukashi.attributions.lrp import lrp
from sukashi.core.errors import ModelError, UsageError
from sukashi.core.types import Member, Site
from sukashi.models.architectures import CifarResNet, DigitsViT
from sukashi.network import sites as finder
from sukashi.network.layers import AttentionCore

RULES = ("epsilon_plus", "epsilon", "gamma", "alpha1beta0")


relevance = partial(explained, lrp)


# Rules over dense matrices.


def convolutional(bias=True):
    torch.manual_seed(0)
    body = (nn.Conv2d(3, 4, 3, padding=1, bias=bias), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    body += (nn.Conv2d(4, 4, 3, stride=2, groups=2, bias=bias), nn.ReLU6(), nn.Conv2d(4, 6, 1, bias=bias), nn.GELU())
    return nn.Sequential(*body, nn.AvgPool2d(2, 1), nn.Flatten(), nn.Linear(6, 3, bias=bias)).double().eval()


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_is_its_formula_at_every_layer(rule):
    model, x = convolutional(), 3 * noise(3, 3, 10, 10)
    with torch.no_grad():
        model[9].bias[1] = -9.0  # a negative logit too
    sites = (PIXELS, *(Site(layer, "channel", width) for layer, width in {"0": 4, "3": 4, "5": 6, "7": 6}.items()))
    found = lrp(model, x, TARGET, sites, rule=rule)
    for row in range(3):
        expected = written_out(rule, model, x[row], TARGET[row])
        for site in sites:
            at = int(site.layer or -1) + 1
            torch.testing.assert_close(found[site][row], expected[at], rtol=1e-9, atol=1e-12)


def test_biases_can_be_left_out_of_alpha1beta0():
    model, x = convolutional(), 3 * noise(3, 3, 10, 10)
    found = relevance(model, x, rule="alpha1beta0", bias=False)
    for row in range(3):
        expected = written_out("alpha1beta0", model, x[row], TARGET[row], bias_counts=False)
        torch.testing.assert_close(found[row], expected[0], rtol=1e-9, atol=1e-12)
    assert (found - relevance(model, x, rule="alpha1beta0")).abs().max() > 1e-3


# Laws.


def test_a_small_epsilon_gives_gradient_times_input(randomised):
    torch.manual_seed(0)
    model = randomised(CifarResNet(20, 10).double().eval())
    x = noise(3, 3, 32, 32).requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).gather(1, TARGET[:, None]).sum(), x)
    found = relevance(model, x, rule="epsilon", epsilon=1e-13)
    torch.testing.assert_close(found, gradient * x.detach(), rtol=1e-6, atol=1e-9)


def residual(depth=5):
    """Blocks x + conv(relu(x)): sums that do not share relevance would double it in each."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            return F.relu(x + self.conv(x))

    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(depth)), nn.Flatten(), nn.Linear(3 * 36, 3)).double().eval()


def without_biases(model):
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or name == "position":
            nn.init.zeros_(parameter)
    return model


@pytest.mark.parametrize("make", [lambda: without_biases(residual()), lambda: CifarResNet(20, 3).double().eval()])
def test_alpha1beta0_without_biases_gives_all_of_the_logit_out(make, randomised):
    model = randomised(make())
    x = noise(3, 3, 32, 32) if isinstance(model, CifarResNet) else noise(3, 3, 6, 6).abs()
    target = model(x).argmax(1)
    assert (logit(model, x, target) > 1e-3).all()
    found = relevance(model, x, target, rule="alpha1beta0", bias=False, epsilon=1e-12)
    torch.testing.assert_close(found.flatten(1).sum(1), logit(model, x, target), rtol=1e-4, atol=0)


def test_cp_lrp_conserves_relevance_and_attnlrp_does_not():
    torch.manual_seed(0)
    model = without_biases(DigitsViT(3, 8, depth=3, n_heads=2).double().eval())
    x = 3 * noise(3, 1, 8, 8)
    heads = Site("blocks.1.attn.qkv", "head", 8, -1, (core("blocks.1.attn", 8),))
    pixels = Site("", "pixel", 1)
    for rule in ("epsilon", "gamma"):
        # A denominator of gamma vanishes nowhere here, and of epsilon only with the relevance.
        found = lrp(model, x, TARGET, [pixels, heads], rule=rule, attention="cp", epsilon=1e-30)
        torch.testing.assert_close(found[pixels].flatten(1).sum(1), logit(model, x, TARGET), rtol=1e-12, atol=1e-12)
        assert not found[heads].unflatten(2, (3, 16))[:, :, :2].any(), "q and k get nothing"
    total = relevance(model, x, site=pixels, rule="epsilon", epsilon=1e-30).flatten(1).sum(1)
    assert ((total / logit(model, x, TARGET) - 1).abs() > 1e-2).all()


def core(name, inner):
    return Member(f"{name}.core", "in", tuple((c, inner + c, 2 * inner + c) for c in range(inner)), -1)


# Transformers.


class OneAttention(nn.Module):
    """An attention core and a head."""

    def __init__(self):
        super().__init__()
        self.core = AttentionCore([2, 3], 0.7)
        self.head = nn.Linear(5 * 4, 3, bias=False)

    def forward(self, x):
        return self.head(self.core(x[:, 0]).flatten(1))


@pytest.mark.parametrize("attention", ["cp", "attn"])
def test_attention_is_its_formulas(attention):
    torch.manual_seed(0)
    model = OneAttention().double().eval()
    x = noise(3, 1, 4, 15)
    found = relevance(model, x, site=Site("", "pixel", 1), rule="epsilon", attention=attention, epsilon=1e-30)
    for row in range(3):
        weight = model.head.weight[TARGET[row]].view(4, 5).detach()
        q, k, v = x[row, 0].split(5, 1)
        expected = torch.zeros(4, 15, dtype=torch.float64)
        for dims in (range(2), range(2, 5)):
            s = 0.7 * torch.stack(
                [torch.stack([sum(q[t, d] * k[u, d] for d in dims) for u in range(4)]) for t in range(4)]
            )
            a = s.softmax(1)
            r_a = torch.zeros(4, 4, dtype=torch.float64)
            for d in dims:
                for t in range(4):
                    o = (a[t] * v[:, d]).sum()
                    for u in range(4):
                        # R of the product's term a_tu v_ud, by its share of o_td; the factors share it.
                        part = a[t, u] * v[u, d] / o * (o * weight[t, d])
                        expected[u, 10 + d] += part if attention == "cp" else part / 2
                        r_a[t, u] += part / 2
            if attention == "cp":
                continue
            # Softmax: R_i = s_i (R_i - a_i sum_k R_k); then the product of q and k, by shares, half each.
            r_s = s * (r_a - a * r_a.sum(1, keepdim=True))
            for t in range(4):
                for u in range(4):
                    for d in dims:
                        part = 0.7 * q[t, d] * k[u, d] / s[t, u] * r_s[t, u] / 2
                        expected[t, d] += part
                        expected[u, 5 + d] += part
        torch.testing.assert_close(found[row, 0], expected, rtol=1e-9, atol=1e-12)


def test_layernorm_divides_by_a_constant_and_gelu_and_layerscale_pass_relevance_on():
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(6)
            self.gamma = nn.Parameter(torch.rand(6) - 0.5)
            self.head = nn.Linear(6, 3, bias=False)

        def forward(self, x):
            return self.head(F.gelu(self.norm(x[:, 0, 0])) * self.gamma)

    torch.manual_seed(0)
    model = Parts().double().eval()
    nn.init.normal_(model.norm.weight)
    nn.init.normal_(model.norm.bias)
    x = noise(3, 1, 1, 6)
    found = relevance(model, x, site=Site("", "pixel", 1), rule="epsilon", epsilon=1e-30)[:, 0, 0]
    for row in range(3):
        values = x[row, 0, 0]
        y = model.norm(values).detach()
        r = F.gelu(y) * model.gamma.detach() * model.head.weight[TARGET[row]].detach()
        weight = (
            (torch.eye(6, dtype=x.dtype) - 1 / 6)
            / (values.var(unbiased=False) + 1e-5).sqrt()
            * model.norm.weight.detach()
        )
        expected = (values[:, None] * weight / y) @ r
        torch.testing.assert_close(found[row], expected, rtol=1e-9, atol=1e-12)


# zennit.


def zennit_relevance(model, x, composite, layer):
    attribution = pytest.importorskip("zennit.attribution")
    kept = []

    def keep(module, inputs, output):
        output.retain_grad()
        kept.append(output)

    with attribution.Gradient(model, composite) as attributor:
        handle = model.get_submodule(layer).register_forward_hook(keep)
        x = x.clone().requires_grad_()
        _, found = attributor(x, lambda out: out.detach() * F.one_hot(TARGET, out.shape[1]))
        handle.remove()
    return found.detach(), kept[0].grad


def zennit_composite(rule, canonizers):
    composites = pytest.importorskip("zennit.composites")
    from zennit import rules
    from zennit.types import Convolution

    if rule == "epsilon_plus":
        return composites.EpsilonPlus(canonizers=canonizers)
    made = {"epsilon": rules.Epsilon, "gamma": rules.Gamma, "alpha1beta0": lambda: rules.AlphaBeta(alpha=1, beta=0)}
    # Without the base, sums would not share relevance.
    layers = [(Convolution, made[rule]()), (nn.Linear, made[rule]())]
    return composites.LayerMapComposite(composites.layer_map_base() + layers, canonizers=canonizers)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["resnet", "vgg"])
def test_it_agrees_with_zennit_on_canonised_networks(rule, name, randomised):
    canonizers = pytest.importorskip("zennit.torchvision")
    torch.manual_seed(0)
    if name == "resnet":
        model = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=3)
        layer, canonizer = "layer2.0.conv1", canonizers.ResNetCanonizer()
    else:
        features = torchvision.models.vgg.make_layers([8, "M", 16, "M", 16, 16, "M"], batch_norm=True)
        model = nn.Sequential(features, nn.Flatten(), nn.Linear(16 * 16, 12), nn.ReLU(), nn.Dropout(), nn.Linear(12, 3))
        layer, canonizer = "0.4", canonizers.SequentialMergeBatchNorm()
    model = randomised(model.double().eval())
    x = noise(3, 3, 32, 32)
    site = finder.place(model, layer, x)
    ours = lrp(model, x, TARGET, [PIXELS, site], rule=rule)
    theirs = zennit_relevance(copy.deepcopy(model), x, zennit_composite(rule, [canonizer]), layer)
    for mine, other in zip(ours.values(), theirs, strict=True):
        # Their sums and averages have a stabiliser of 1e-6 of their own.
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))


# Contract.


@pytest.mark.parametrize("rule", RULES)
def test_one_pass_gives_what_one_pass_a_site_gives_and_batches_do_not_matter(small64, rule):
    for case in (small64["cnn"], small64["vit"]):
        x, target = case.data.x[:5], case.data.target[:5]
        together = lrp(case.model, x, target, case.sites, rule=rule)
        parts = lrp(case.model, x, target, case.sites, rule=rule, batch_size=2)
        for site in case.sites:
            assert torch.equal(relevance(case.model, x, target, site, rule=rule), together[site])
            assert together[site].shape[:2] == (5, site.n_units)
            torch.testing.assert_close(parts[site], together[site], rtol=1e-9, atol=1e-12)


class Gated(nn.Module):
    def __init__(self, gate):
        super().__init__()
        self.squeeze, self.excite, self.gate = nn.Linear(4, 2), nn.Linear(2, 4), gate
        self.head = nn.Linear(4 * 9, 3)

    def forward(self, x):
        s = self.excite(F.relu(self.squeeze(x.mean((2, 3)))))
        return self.head((x * self.gate(s)[:, :, None, None]).flatten(1))


@pytest.mark.parametrize("gate", [nn.Sigmoid(), nn.Hardsigmoid()])
def test_a_gate_is_its_formulas(gate):
    torch.manual_seed(0)
    model = Gated(gate).double().eval()
    x = noise(3, 4, 3, 3)
    found = relevance(model, x, site=Site("", "pixel", 4), rule="epsilon")
    for row in range(3):
        with torch.no_grad():
            mean = x[row].mean((1, 2))
            h = F.relu(model.squeeze(mean))
            s = model.excite(h)
            g = gate(s)
            z = x[row] * g[:, None, None]
            logits = model.head(z.flatten()[None])[0]
        r = shares("epsilon", z.flatten(), *dense(model.head, (36,)))[:, TARGET[row]] * logits[TARGET[row]]
        half = r.view(4, 3, 3) / 2
        slope = torch.tensor([float(torch.func.grad(gate)(one)) for one in s], dtype=torch.float64)
        r_s = s * slope / g * half.sum((1, 2))
        r_h = shares("epsilon", h, *dense(model.excite, (2,))) @ r_s
        r_mean = shares("epsilon", mean, *dense(model.squeeze, (4,))) @ r_h
        spread = x[row] / x[row].sum((1, 2), keepdim=True) * r_mean[:, None, None]
        torch.testing.assert_close(found[row], half + spread, rtol=1e-9, atol=1e-12)


def test_what_it_cannot_do_is_refused():
    x = noise(3, 4, 3, 3)
    for name in ("Mul", "Sigmoid"):
        model = Gated(nn.Sigmoid() if name == "Sigmoid" else nn.ReLU()).double()
        with pytest.raises(ModelError, match=rf"lrp has no rule for {name} \(layer '"):
            relevance(model, x, site=Site("", "pixel", 4), attention="cp")
    with pytest.raises(ModelError, match=r"lrp has no rule for Softmax \(layer '0'\)"):
        relevance(nn.Sequential(nn.Softmax(1), nn.Flatten()), x, site=Site("", "pixel", 4))
    x = noise(3, 3, 4, 4)
    for rule in ("epsilon", "gamma", "epsilon_plus"):
        with pytest.raises(UsageError, match="bias=False"):
            relevance(convolutional(), x, rule=rule, bias=False)
