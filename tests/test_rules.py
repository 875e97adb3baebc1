"""What has a rule in LRP, DeepLIFT and DL-Backtrace: operations known by several names, layers that are two in one.

Between layers without biases the sums are known: of LRP and DL-Backtrace the logit, of DeepLIFT its difference.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, Conv2dSame, ScaledStdConv2d
from timm.layers.linear import Linear as TimmLinear
from timm.layers.norm_act import FrozenBatchNormAct2d, SyncBatchNormAct
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from cases import PIXELS, TARGET, explained, logit, noise
from sukashi.attributions import attributions
from sukashi.core.errors import ModelError
from sukashi.network.canonical import canonical
from sukashi.network.sites import place

METHODS = {
    "deeplift": ("deeplift", {}),
    "epsilon": ("lrp", {"rule": "epsilon", "epsilon": 1e-13}),
    "gamma": ("lrp", {"rule": "gamma", "epsilon": 1e-13}),
    "backtrace": ("backtrace", {}),
}


class Called(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Functional(nn.Module):
    """Layers of torch's as functions of weights that belong to no layer."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 2, 3, 3))
        self.matrix = nn.Parameter(torch.randn(4, 4))
        self.slope = nn.Parameter(torch.rand(4))

    def forward(self, x):
        x = F.prelu(F.conv2d(x, self.kernel, stride=2, padding=1, groups=2), self.slope)
        return F.linear(x.movedim(1, -1), self.matrix).movedim(-1, 1)


class Pyramid(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(4, 4, 3, 2, 1, bias=False)

    def forward(self, x):
        return x + F.interpolate(self.down(x), size=x.shape[-2:], mode="bilinear", align_corners=False)


class SelfPadded(nn.Conv2d):
    """A convolution of one's own that pads, as ports from TensorFlow have them."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.pad = nn.ZeroPad2d((0, 1, 0, 2))

    def forward(self, x):
        return F.conv2d(self.pad(x), self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class WithinTwice(nn.Module):
    """A block of functions that is called twice."""

    def __init__(self):
        super().__init__()
        self.block = Called(lambda x: F.leaky_relu(x, 0.3) / 2)

    def forward(self, x):
        return self.block(self.block(x))


OPERATIONS = {
    "x * 2": lambda x: x * 2,
    "0.5 * x": lambda x: 0.5 * x,
    "-x": lambda x: -x,
    "neg": torch.neg,
    "x / 3": lambda x: x / 3,
    "div": lambda x: x.div(3.0),
    "x - y": lambda x: x - F.relu(x),
    "sub alpha": lambda x: x.sub(F.relu(x), alpha=0.5),
    "add alpha": lambda x: torch.add(x, F.relu(x), alpha=2),
    "in place": lambda x: x.clone().sub_(F.relu(x)).div_(2).neg_(),
    "x + 0": lambda x: x + 0,
    "sum of list": lambda x: sum([x, F.relu(x)]),
    "x ** 2": lambda x: x**2,
    "square": torch.square,
    "constant of the input's shape": lambda x: x * torch.full_like(x, 2.0),
    "sum": lambda x: x.sum((2, 3), keepdim=True),
    "clamp(min=0)": lambda x: x.clamp(min=0),
    "clamp": lambda x: torch.clamp(x, 0, 6),
    "clamp_min": lambda x: torch.clamp_min(x, 0),
    "F.hardtanh": F.hardtanh,
    "F.leaky_relu": lambda x: F.leaky_relu(x, 0.2, True),
    "F.elu": F.elu,
    "F.celu": lambda x: F.celu(x, 2.0),
    "F.selu": F.selu,
    "F.mish": F.mish,
    "F.softsign": F.softsign,
    "F.softshrink": lambda x: F.softshrink(x, 0.1),
    "F.tanhshrink": F.tanhshrink,
    "F.rrelu": F.rrelu,
    "hardtanh": nn.Hardtanh(0, 6),
    "prelu": nn.PReLU(),
    "prelu of channels": nn.PReLU(4),
    "F.dropout2d": lambda x: F.dropout2d(x, 0.5, False),
    "F.alpha_dropout": F.alpha_dropout,
    "dropout3d": nn.Dropout3d(),
    "F.pad": lambda x: F.pad(x, (1, 2, 0, 1)),
    "F.pad reflect": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "F.pad -inf": lambda x: F.max_pool2d(F.pad(x, (1, 1, 1, 1), value=float("-inf")), 3, 2),
    "zeropad": nn.ZeroPad2d(1),
    "reflection": nn.ReflectionPad2d(1),
    "flip": lambda x: x.flip(3),
    "repeat": lambda x: x.repeat(1, 2, 1, 1)[:, 2:6],
    "repeat_interleave": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "mT": lambda x: x.mT,
    "nearest": nn.Upsample(scale_factor=2),
    "bilinear": nn.UpsamplingBilinear2d(scale_factor=2),
    "F.interpolate": lambda x: F.interpolate(x, scale_factor=2),
    "area": lambda x: F.interpolate(x, (4, 4), mode="area"),
    "pyramid": Pyramid(),
    "pixel shuffle": nn.Sequential(nn.PixelUnshuffle(2), nn.PixelShuffle(2)),
    "F.pixel_shuffle": lambda x: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2),
    "channel shuffle": nn.ChannelShuffle(2),
    "functional layers": Functional(),
    "padding of one's own": SelfPadded(4, 4, 3, bias=False),
    "timm's convolution": Conv2dSame(4, 4, 3, stride=2, bias=False),
    "weights that are computed": ScaledStdConv2d(4, 4, 3, bias=False),
    "timm's linear": nn.Sequential(nn.Flatten(2), TimmLinear(36, 36, bias=False), nn.Unflatten(2, (6, 6))),
    "a block twice": WithinTwice(),
}


def network(operation, *, bias=False):
    """An operation between a convolution and two layers; the same weights for each."""
    torch.manual_seed(0)
    middle = copy.deepcopy(operation) if isinstance(operation, nn.Module) else Called(operation)
    body = (nn.Conv2d(3, 4, 3, padding=1, bias=bias), middle, nn.Conv2d(4, 6, 1, bias=bias), nn.ReLU())
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3, bias=bias))
    return nn.Sequential(*body, *head).double().eval()


def relevance(name, model, x, **options):
    method, chosen = METHODS[name]
    return explained(attributions[method], model, x, **chosen, **options)


@pytest.mark.parametrize("name", OPERATIONS)
def test_sums_are_right_whatever_an_operation_is_called(name):
    model, x = network(OPERATIONS[name]), noise(3, 3, 6, 6)
    value = logit(model, x, TARGET)
    assert value.abs().min() > 1e-4
    for method in METHODS:
        found = relevance(method, model, x).flatten(1).sum(1)
        expected = value - logit(model, torch.zeros_like(x), TARGET) if method == "deeplift" else value
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12, msg=method)


@pytest.mark.parametrize("operation", [lambda x: x + 1, lambda x: 1 - x, lambda x: x - torch.ones(4, 1, 1).double()])
def test_a_constant_takes_its_share_as_a_bias_does(operation):
    model, x = network(operation), noise(3, 3, 6, 6)
    twin = network(nn.Conv2d(4, 4, 1))
    with torch.no_grad():
        shift = operation(torch.zeros(1, 4, 1, 1).double())
        twin[1].weight.copy_(torch.eye(4).view(4, 4, 1, 1) * (operation(torch.ones(1, 4, 1, 1).double()) - shift))
        twin[1].bias.copy_(shift.flatten())
    for method in ("deeplift", "epsilon", "backtrace"):
        torch.testing.assert_close(relevance(method, model, x), relevance(method, twin, x), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(
    ("operation", "refused", "words"),
    [
        (lambda x: x / F.relu(x + 9), METHODS, "'truediv'"),
        (lambda x: 1 / (x + 9), METHODS, "'truediv'"),
        (lambda x: x.detach() + x, METHODS, "'detach'"),
        (lambda x: F.dropout(x), METHODS, "gives other logits"),
        (nn.BatchNorm2d(4, track_running_stats=False), METHODS, "keeps no running statistics"),
        (nn.Hardtanh(1, 2), ("epsilon", "gamma"), r"a clamp to \[1, 2\], which is not 0 at 0"),
        (F.softplus, ("epsilon", "gamma"), "Softplus"),
        (nn.Upsample(scale_factor=2, mode="bicubic"), ("backtrace",), "bicubic"),
    ],
)
def test_what_has_no_rule_is_refused_by_name(operation, refused, words):
    model, x = network(operation), noise(3, 3, 6, 6)
    for method in METHODS:
        if method in refused:
            with pytest.raises(ModelError, match=words):
                relevance(method, model, x)
        else:
            assert relevance(method, model, x).isfinite().all()


# Layers that are two in one, beside the same network out of plain ones.


def norm(cls, n=4, **options):
    torch.manual_seed(1)
    made = cls(n, **options)
    for name, tensor in {"weight": torch.rand(n) + 0.5, "bias": torch.randn(n), "running_mean": torch.randn(n)}.items():
        getattr(made, name).data = tensor
    made.running_var.data = torch.rand(n) + 0.5
    return made


def synchronised():
    made = norm(SyncBatchNormAct)
    made.act, made.drop = nn.SiLU(), nn.Identity()
    return made


def padded_plain():
    torch.manual_seed(2)
    return nn.Sequential(nn.ZeroPad2d((0, 1, 0, 2)), nn.Conv2d(4, 4, 3))


def padding_itself():
    made = SelfPadded(4, 4, 3)
    made.load_state_dict(padded_plain()[1].state_dict())
    return made


COMPOUNDS = {
    "norm and ReLU": (lambda: norm(BatchNormAct2d), lambda: nn.Sequential(norm(nn.BatchNorm2d), nn.ReLU())),
    "frozen norm": (lambda: norm(FrozenBatchNorm2d), lambda: norm(nn.BatchNorm2d)),
    "frozen norm and SiLU": (
        lambda: norm(FrozenBatchNormAct2d, act_layer=nn.SiLU),
        lambda: nn.Sequential(norm(nn.BatchNorm2d), nn.SiLU()),
    ),
    "synchronised norm": (lambda: norm(nn.SyncBatchNorm), lambda: norm(nn.BatchNorm2d)),
    "synchronised norm and SiLU": (synchronised, lambda: nn.Sequential(norm(nn.BatchNorm2d), nn.SiLU())),
    "padding": (padding_itself, padded_plain),
}


@pytest.mark.parametrize("name", COMPOUNDS)
@pytest.mark.parametrize("between", [nn.Identity, nn.MaxPool2d], ids=["folded", "not folded"])
def test_a_layer_that_is_two_has_the_rules_of_both(name, between):
    x = noise(3, 3, 6, 6)
    models = [network(nn.Sequential(between(2), make()), bias=True) for make in COMPOUNDS[name]]
    torch.testing.assert_close(models[0](x), models[1](x))
    for method in METHODS:
        found, expected = (relevance(method, model, x) for model in models)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        assert expected.any()


def test_a_norm_with_an_activation_is_seen_after_it_and_before():
    model, x = network(norm(BatchNormAct2d)).eval(), noise(3, 3, 6, 6)
    plain = network(nn.Sequential(norm(nn.BatchNorm2d), nn.ReLU()))
    for side, layer in (("in", "1.0"), ("out", "1.1")):
        seen, twin = place(model, "1", x, side, axis=1), place(plain, layer, x, side, axis=1)
        for method in METHODS:
            found, expected = relevance(method, model, x, site=seen), relevance(method, plain, x, site=twin)
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


class Features(nn.Module):
    """BatchNorms of features, and of a sequence of them: behind a linear layer, a pool, a convolution."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 6), nn.Conv1d(2, 4, 1), nn.Linear(16, 3)
        self.one, self.two, self.three, self.four = norm(nn.BatchNorm1d), *(norm(nn.BatchNorm1d, n) for n in (6, 4, 2))

    def forward(self, x):
        x = self.two(self.a(self.one(x.mean((2, 3))).repeat_interleave(3, 1))).relu()
        x = self.four(x.unflatten(1, (2, 3)))
        x = self.three(self.b(F.pad(x, (0, 1)))).relu()
        return self.c(x.flatten(1))


def test_norms_of_features_fold_into_linear_layers_or_are_a_factor_and_a_shift():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Features()).double().eval()
    x = noise(3, 3, 6, 6)
    form = canonical(model, x)
    kinds = [type(form.get_submodule(f"1.{name}")).__name__ for name in ("one", "two", "three", "four")]
    assert kinds == ["Affine", "Identity", "Identity", "Conv1d"]
    torch.testing.assert_close(form(x), model(x), rtol=1e-12, atol=1e-12)
    found = relevance("deeplift", model, x).flatten(1).sum(1)
    expected = logit(model, x, TARGET) - logit(model, torch.zeros_like(x), TARGET)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", [*METHODS, "alpha1beta0", "contrastive"])
def test_a_norm_of_features_is_the_diagonal_layer(method):
    torch.manual_seed(0)
    make, x = (lambda last: nn.Sequential(nn.AvgPool2d(3), nn.Flatten(), last, nn.ReLU(), head)), noise(3, 3, 6, 6)
    head, folded = nn.Linear(12, 3), norm(nn.BatchNorm1d, 12)
    model = make(folded).double().eval()
    diagonal = nn.Linear(12, 12).double()
    with torch.no_grad():
        diagonal.bias.copy_(folded(torch.zeros(1, 12).double())[0])
        diagonal.weight.copy_(folded(torch.eye(12).double()) - diagonal.bias)
    chosen = {"alpha1beta0": ("lrp", {"rule": method}), "contrastive": ("backtrace", {"mode": method})}
    name, options = {**METHODS, **chosen}[method]
    found, expected = (explained(attributions[name], m, x, **options) for m in (model, make(diagonal)))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert PIXELS.n_units == found.shape[1]
