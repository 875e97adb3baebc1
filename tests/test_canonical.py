"""The canonical form gives the model's own output, and is what the attribution methods take it for."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cases import noise
from sukashi.core.errors import ModelError
from sukashi.network.canonical import canonical, performs
from sukashi.network.functions import _FUNCTIONS, active
from supported import ZOO, build

# One of each kind of ZOO.
SPECS = [name for name in ZOO if not name.endswith(("deit3_base_patch16_224", "32", "44", "56", "small_vit"))]


def called(form):
    return [node.target for node in form.graph.nodes if node.op == "call_module"]


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS)
def test_the_form_is_the_model_with_one_plain_module_a_call(spec):
    model, shape = build(spec)
    model = model.double()
    x = noise(2, *shape)
    form = canonical(model, x)
    with torch.no_grad():
        expected, found = model(x), form(x)
    assert expected.abs().max() > 1e-3
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()
    names = called(form)
    assert len(set(names)) == len(names)
    assert not any(getattr(module, "inplace", False) for module in form.modules())
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in form.modules())
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            assert name in names
    others = [node for node in form.graph.nodes if node.op != "call_module" and active(node)]
    functions = {str(getattr(node.target, "__name__", node.target)) for node in others}
    moves = {"x", "flatten", "transpose", "cat", "reshape", "permute", "getitem", "output"}
    assert functions <= moves, "only what moves values stays a function"


class Functional(nn.Module):
    """Everything written as a function, and one ReLU for all."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.LayerNorm(4)
        self.gamma = nn.Parameter(torch.rand(4))
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x = self.relu(self.bn(self.conv(x)))
        y = self.relu(self.second(x))
        y += x
        x = F.relu(torch.add(y, x), inplace=True)
        x = F.max_pool2d(x, 2) * torch.sigmoid(F.adaptive_avg_pool2d(x, 1))
        x = F.group_norm(x, 2, self.gamma, eps=1e-3)
        x = F.dropout(F.avg_pool2d(F.silu(x), 2), 0.1, training=self.training)
        x = F.layer_norm(x.flatten(2).transpose(1, 2), (4,), self.gamma)
        x = F.gelu(self.norm(x), approximate="tanh") * self.gamma
        x = (x @ x.transpose(1, 2)).softmax(-1) @ x
        return self.head(x.mean(1))


def test_functions_become_modules_and_a_layer_called_twice_two(randomised):
    torch.manual_seed(0)
    model = randomised(Functional().double().eval())
    x = noise(2, 3, 14, 14)
    form = canonical(model, x)
    torch.testing.assert_close(form(x), model(x), rtol=1e-12, atol=1e-12)
    names = called(form)
    expected = {"conv", "bn", "relu_0", "relu_1", "second", "add", "add_1", "relu_2", "maxpool2d", "sigmoid"}
    expected |= {"adaptiveavgpool2d", "mul", "silu", "avgpool2d", "layernorm", "norm", "gelu", "scale", "softmax"}
    expected |= {"matmul", "matmul_1", "mean", "head", "groupnorm"}
    assert set(names) == expected, set(names) ^ expected
    assert isinstance(form.get_submodule("bn"), nn.Identity)
    assert form.get_submodule("gelu").approximate == "tanh"


def test_the_model_is_left_as_found_and_its_weights_are_not_copied():
    torch.manual_seed(0)
    model = Functional()
    model.head.training = False
    before = {key: value.clone() for key, value in model.state_dict().items()}
    form = canonical(model.train(), noise(2, 3, 14, 14, dtype=torch.float32))
    assert model.training
    assert model.relu.inplace
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in form.parameters())
    assert form.head.weight.data_ptr() == model.head.weight.data_ptr()
    assert form.conv.weight.data_ptr() != model.conv.weight.data_ptr()


def test_numbers_are_factors_and_differences_are_sums():
    model = Model(lambda x: (-(3 * x - x.relu() / 2) - 1).square().flatten(1))
    x = noise(2, 3, 4, 4)
    form = canonical(model, x)
    assert torch.equal(form(x), model(x))
    kinds = [type(form.get_submodule(name)).__name__ for name in called(form)]
    assert sorted(kinds) == ["Add", "Add", "Mul", "Quotient", "ReLU", "Scale", "Scale", "Scale"]


class Tied(nn.Module):
    """A layer whose weight is read twice: by its own call, and turned round by a function."""

    def __init__(self):
        super().__init__()
        self.layer, self.loose = nn.Linear(4, 4), nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        x = self.layer(x.flatten(1)).relu()
        return F.linear(F.linear(x, self.layer.weight), self.loose)


def test_only_weights_of_no_layer_are_given_to_a_new_one():
    """A layer that is cut would leave the new one whole."""
    form = canonical(Tied().double().eval(), noise(2, 1, 2, 2))
    assert called(form) == ["layer", "relu", "linear"]
    assert [node.target for node in form.graph.nodes if node.op == "call_function"] == [F.linear]


class Twice(nn.Module):
    """A convolution that a BatchNorm reads, and the sum after it."""

    def __init__(self):
        super().__init__()
        self.first = nn.BatchNorm2d(2)
        self.conv = nn.Conv2d(2, 2, 1)
        self.bn = nn.BatchNorm2d(2, affine=False)

    def forward(self, x):
        x = self.conv(self.first(x))
        return (x + self.bn(x)).flatten(1)


def test_a_batchnorm_that_cannot_be_folded_is_a_depthwise_convolution(randomised):
    model = randomised(Twice().double().eval())
    x = noise(2, 2, 3, 3)
    form = canonical(model, x)
    torch.testing.assert_close(form(x), model(x), rtol=1e-12, atol=1e-12)
    assert [type(form.get_submodule(name)) for name in ("first", "conv", "bn")] == [nn.Conv2d] * 3
    assert form.first.groups == form.bn.groups == 2


class Model(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def written_into(x):
    y = x + 1
    z = F.relu(y, inplace=True)
    return (z + y).flatten(1)


def assigned(x):
    y = x * 2
    y[:, 0] = 0
    return y.flatten(1)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: x if x.sum() > 0 else -x, "cannot trace this Model"),
        (lambda x: (x.flatten(1), x), "gives a tuple"),
        (written_into, "changed in place and read again"),
        (assigned, "does not support item assignment"),
        (lambda x: x.sin().exp_().flatten(1), "in place with exp_"),
    ],
)
def test_what_has_no_canonical_form_is_refused_by_name(function, words):
    with pytest.raises(ModelError, match=words):
        canonical(Model(function), noise(2, 3, 4, 4))


class ByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return torch.flatten(input=self.norm(input=self.conv(x)), start_dim=1)


def test_a_layer_called_by_keyword_is_refused_and_a_function_is_not():
    x = noise(2, 3, 4, 4)
    with pytest.raises(ModelError, match="layer 'norm' is called by keyword"):
        canonical(ByKeyword().double().eval(), x)
    model = Model(lambda x: torch.flatten(input=x.relu(), start_dim=1))
    torch.testing.assert_close(canonical(model, x)(x), model(x))


def test_images_are_left_alone_where_the_network_writes_into_them():
    x = noise(2, 3, 4, 4)
    kept = x.clone()
    form = canonical(nn.Sequential(nn.ReLU(inplace=True), nn.Flatten()).eval(), x)
    torch.testing.assert_close(form(x), kept.relu().flatten(1))
    with pytest.raises(ModelError, match="in place with exp_"):
        canonical(Model(lambda x: x.exp_().flatten(1)), x)
    assert torch.equal(x, kept)


def test_a_form_that_computes_something_else_is_refused(monkeypatch):
    monkeypatch.setitem(_FUNCTIONS, "relu", lambda: nn.ReLU6())
    model = Model(lambda x: (7 * x.abs()).relu().flatten(1))
    with pytest.raises(ModelError, match="gives other logits"):
        canonical(model, 5 * noise(2, 1, 4, 4))


def test_a_subclass_performs_only_what_it_leaves_alone():
    class Same(nn.Linear):
        pass

    class Other(nn.Linear):
        def forward(self, x):
            return -super().forward(x)

    assert performs(Same(1, 1), nn.Linear)
    assert not performs(Other(1, 1), nn.Linear)
    assert not performs(nn.ReLU(), nn.Linear)
    assert performs(nn.ReLU6(), nn.ReLU6)
