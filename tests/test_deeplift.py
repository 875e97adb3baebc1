"""DeepLIFT against its definition, completeness, and captum where captum is right."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cases import PIXELS, TARGET, explained, noise
from oracles.deeplift import written_out
from sukashi.attributions import attributions
from sukashi.attributions.deeplift import deeplift
from sukashi.core.errors import DataError, ModelError, UsageError
from sukashi.core.types import Member, Site
from sukashi.models.architectures import DigitsCNN, DigitsViT
from sukashi.network import sites
from sukashi.network.layers import AttentionCore


def difference(model, x, base, target=TARGET):
    with torch.no_grad():
        return (model(x) - model(base)).gather(1, target[:, None])[:, 0]


contributions = partial(explained, deeplift)


class Gated(nn.Module):
    """Squeeze and excitation, a scale, and a residual sum."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.gate = nn.Conv2d(3, 3, 1)
        self.gamma = nn.Parameter(torch.rand(3, 1, 1))

    def forward(self, x):
        y = F.silu(self.conv(x))
        return x + self.gamma * (y * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(y, 1))))


class Mixing(nn.Module):
    """Attention written with plain functions."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(3, elementwise_affine=False)

    def forward(self, x):
        tokens = self.norm(x.flatten(2).transpose(1, 2))
        mixed = torch.softmax(tokens @ tokens.transpose(1, 2), dim=-1) @ tokens
        return mixed.transpose(1, 2).reshape(x.shape)


class Windows(nn.Module):
    """Attention in the halves of an image, which are rows of one batch."""

    def forward(self, x):
        halves = x.unflatten(3, (2, -1)).permute(0, 3, 1, 2, 4).flatten(0, 1).flatten(2)
        mixed = torch.softmax(halves @ halves.transpose(1, 2), dim=-1) @ halves
        return mixed.unflatten(0, (-1, 2)).transpose(1, 2).flatten(2).reshape(x.shape)


class Tokens(nn.Module):
    """Attention with heads of unequal width."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(3)
        self.qkv = nn.Linear(3, 15)
        self.core = AttentionCore([2, 0, 3], 1.3)

    def forward(self, x):
        return self.core(self.qkv(self.norm(x.flatten(2).transpose(1, 2)))).transpose(1, 2).unsqueeze(3)


def network(*middle, n_outputs=3):
    """A convolution, the layers in question, and a head."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), *middle, nn.Flatten()).double()
    n = body(noise(1, 3, 8, 8)).shape[1]
    return nn.Sequential(*body, nn.Linear(n, n_outputs).double()).eval()


NETWORKS = {
    "relu, overlapping max-pool": lambda: network(nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
    "max-pool with ceil and dilation": lambda: network(nn.MaxPool2d(2, 3, dilation=2, ceil_mode=True), nn.ReLU()),
    "relu6": lambda: network(nn.ReLU6(), nn.Conv2d(3, 3, 3), nn.ReLU6()),
    **{
        str(act): (lambda act=act: network(act, nn.AvgPool2d(2)))
        for act in (nn.LeakyReLU(), nn.ELU(), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Tanh(), nn.Sigmoid())
    },
    "hard": lambda: network(nn.Hardswish(), nn.Hardsigmoid()),
    "layer norm": lambda: network(nn.LayerNorm((3, 8, 8)), nn.ReLU()),
    "softmax": lambda: network(nn.Softmax(1), nn.Softmax(3)),
    "gate": lambda: network(Gated()),
    "attention of functions": lambda: network(Mixing()),
    "attention": lambda: network(Tokens()),
    "inplace": lambda: network(nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Dropout()),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_contributions_sum_to_the_difference(name, scale):
    model = NETWORKS[name]()
    x, base = scale * noise(3, 3, 8, 8), scale * noise(3, 3, 8, 8, seed=1)
    # Pixels without difference take the slope instead of a quotient.
    base[:, :, :4] = x[:, :, :4]
    base[:, :, 4] = x[:, :, 4] + 1e-9
    expected = difference(model, x, base)
    found = contributions(model, x, baseline=base)
    assert found.shape == x.shape
    torch.testing.assert_close(found.flatten(1).sum(1), expected, rtol=1e-12, atol=1e-12)
    assert not found[:, :, :4].any()


@pytest.mark.parametrize(
    ("make", "reader", "width"),
    [(lambda: DigitsCNN(10, 6), "fc1", 96), (lambda: DigitsViT(10, 8, depth=2, n_heads=2), "head", 8)],
)
def test_a_complete_cut_inside_sums_to_the_difference(make, reader, width, randomised):
    torch.manual_seed(0)
    model = randomised(make().double().eval())
    x, base = noise(3, 1, 8, 8), noise(3, 1, 8, 8, seed=1)
    site = Site("", "pixel", 1), Site("cut", "hidden", width, -1, (whole_input(reader, width),))
    found = deeplift(model, x, TARGET, site, baseline=base)
    for values in found.values():
        expected = difference(model, x, base)
        torch.testing.assert_close(values.flatten(1).sum(1), expected, rtol=1e-12, atol=1e-12)


def whole_input(name, width):
    return Member(name, "in", tuple((u,) for u in range(width)), -1)


def test_a_linear_network_gives_weight_times_difference():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).double()
    x, base = noise(3, 3, 2, 2), noise(1, 3, 2, 2, seed=1)
    found = contributions(model, x, baseline=base)
    torch.testing.assert_close(found.flatten(1), model[1].weight[TARGET] * (x - base).flatten(1), rtol=1e-12, atol=0)


def test_multipliers_are_those_of_the_definition_written_in_matrices():
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)
    ).double()
    x, base = noise(3, 3, 2, 2), noise(3, 3, 2, 2, seed=1)
    hidden = Site("1", "hidden", 7, -1, (Member("1", "out", tuple((u,) for u in range(7)), -1), whole_input("3", 7)))
    found = deeplift(model, x, TARGET, [PIXELS, hidden], baseline=base)
    for row in range(3):
        expected = written_out(model, x[row], base[row], TARGET[row])
        torch.testing.assert_close(found[PIXELS][row], expected[0], rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(found[hidden][row], expected[3], rtol=1e-10, atol=1e-14)


def test_a_max_pool_gives_its_difference_to_the_larger_maximum():
    torch.manual_seed(0)
    model = nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.Flatten(), nn.Linear(3 * 9, 3)).double()
    x, base = noise(3, 3, 6, 6), noise(3, 3, 6, 6, seed=1)
    found = contributions(model, x, baseline=base)
    for row in range(3):
        expected = written_out(model, x[row], base[row], TARGET[row])[0]
        torch.testing.assert_close(found[row], expected, rtol=1e-12, atol=1e-13)


# captum.


def captum_deeplift(model, x, base, target=TARGET):
    captum = pytest.importorskip("captum.attr")
    with pytest.warns(UserWarning, match="hooks"):
        return captum.DeepLift(model).attribute(x.clone().requires_grad_(), base, target=target).detach()


def test_it_agrees_with_captum_where_captum_is_right():
    model = network(nn.ReLU(), nn.Conv2d(3, 4, 3), nn.Sigmoid(), nn.Conv2d(4, 4, 3), nn.Tanh())
    x, base = noise(3, 3, 8, 8), noise(3, 3, 8, 8, seed=1)
    expected = captum_deeplift(model, x, base)
    torch.testing.assert_close(contributions(model, x, baseline=base), expected, rtol=1e-9, atol=1e-12)


class FunctionalRelu(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4 * 36, 3)

    def forward(self, x):
        return self.head(F.relu(self.conv(x)).flatten(1))


@pytest.mark.parametrize(
    "make",
    [
        lambda: network(nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
        lambda: network(nn.ReLU6()),
        lambda: network(nn.GELU()),
        lambda: network(nn.LayerNorm((3, 8, 8))),
        lambda: FunctionalRelu().double().eval(),
    ],
)
def test_captum_is_not_complete_here_and_this_is(make):
    model = make()
    x, base = 4 * noise(3, 3, 8, 8), 4 * noise(3, 3, 8, 8, seed=1)
    expected = difference(model, x, base)
    theirs = captum_deeplift(model, x, base).flatten(1).sum(1)
    ours = contributions(model, x, baseline=base).flatten(1).sum(1)
    assert ((theirs - expected).abs() > 1e-3 * expected.abs()).any()
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


# Contract.


def test_one_pass_gives_what_one_pass_a_site_gives(small64):
    for case in (small64["cnn"], small64["vit"]):
        x, target = case.data.x[:5], case.data.target[:5]
        together = deeplift(case.model, x, target, case.sites, baseline="blur")
        assert list(together) == list(case.sites)
        for site in case.sites:
            assert torch.equal(contributions(case.model, x, target, site, baseline="blur"), together[site])
            assert together[site].shape[:2] == (5, site.n_units)


def test_images_and_batches_do_not_matter(small64):
    case = small64["vit"]
    x, target = case.data.x[:7], case.data.target[:7]
    for baseline in (0.5, "mean", "blur", noise(7, 1, 8, 8)):
        whole = deeplift(case.model, x, target, case.sites, baseline=baseline)
        parts = deeplift(case.model, x, target, case.sites, baseline=baseline, batch_size=3)
        for site in case.sites:
            torch.testing.assert_close(parts[site], whole[site], rtol=1e-10, atol=1e-13)


def test_one_baseline_stands_for_images_whose_parts_are_rows_of_a_batch():
    model, x = network(Windows()), noise(3, 3, 8, 8)
    found = contributions(model, x)
    alone = [contributions(model, x[i : i + 1], TARGET[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(found, torch.cat(alone), rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(found.flatten(1).sum(1), difference(model, x, torch.zeros_like(x)))


def test_baselines_are_what_they_are_called():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 3)).double()
    x = noise(3, 3, 8, 8) + 2
    weight = model[1].weight[TARGET].view(3, 3, 8, 8)
    base = x - contributions(model, x, baseline="mean") / weight
    torch.testing.assert_close(base, x.mean((2, 3), keepdim=True).expand_as(x))
    base = x - contributions(model, x, baseline="blur") / weight
    line = torch.exp(-(torch.arange(-7, 8, dtype=torch.float64) ** 2) / 2)
    kernel = (line[:, None] * line).expand(3, 1, 15, 15)
    blurred = F.conv2d(x, kernel, padding=7, groups=3) / F.conv2d(torch.ones_like(x), kernel, padding=7, groups=3)
    torch.testing.assert_close(base, blurred)
    for given in (0.25, torch.tensor(0.25), torch.full((3, 8, 8), 0.25), torch.full((3, 3, 8, 8), 0.25)):
        torch.testing.assert_close(x - contributions(model, x, baseline=given) / weight, torch.full_like(x, 0.25))


def test_what_it_cannot_do_is_refused():
    x = noise(3, 3, 8, 8)
    with pytest.raises(ModelError, match=r"deeplift has no rule for Hardshrink \(layer '1'\)"):
        contributions(network(nn.Hardshrink()), x)
    with pytest.raises(ModelError, match="no rule for the operation 'sin'"):
        contributions(network(Function(torch.sin)), x)
    with pytest.raises(ModelError, match=r"no rule for the operation 'truediv' \(in '1'\)"):
        contributions(network(Function(lambda x: 1 / x)), x)
    with pytest.raises(UsageError, match=r"baseline has shape \(5,\)"):
        contributions(network(), x, baseline=torch.zeros(5))
    with pytest.raises(DataError, match="one class number an image"):
        contributions(network(), x, torch.zeros(3, 8, 8, dtype=torch.long))
    with pytest.raises(DataError, match="target 4 is no class of a model with 3 logits"):
        contributions(network(), x, torch.tensor([0, 4, -1]))
    with pytest.raises(ModelError, match=r"the model gives \(3, 2, 8, 8\) for 3 images"):
        contributions(nn.Sequential(nn.Conv2d(3, 2, 1)).double(), x)


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class FirstOfTwo(nn.Module):
    def __init__(self):
        super().__init__()
        self.pool = nn.MaxPool2d(2, return_indices=True)

    def forward(self, x):
        return self.pool(x)[0].flatten(1)


@pytest.mark.parametrize("name", ["deeplift", "lrp", "backtrace"])
def test_a_pool_that_gives_two_tensors_has_no_rule(name):
    x = noise(2, 1, 4, 4)
    with pytest.raises(ModelError, match=f"{name} has no rule for MaxPool2d"):
        attributions[name](FirstOfTwo().eval(), x, torch.tensor([0, 1]), [sites.input_site(x)])
