"""Branches that are added to something else: which are found, and that `refit` makes up for what the sum lost."""

from dataclasses import replace

import pytest
import timm
import torch
from timm.layers import LayerScale
from timm.layers.norm_act import BatchNormAct2d
from torch import nn

from oracles import ORACLES
from sukashi.network.branches import Branch, branches
from sukashi.network.insert import inserted
from sukashi.repairs import repairs
from test_repairs import assert_close, cut, images, repaired, with_norms_drawn


class Residual(nn.Module):
    """Two blocks: one of two convolutions with BatchNorm, one of a single convolution; then a linear layer."""

    def __init__(self, kind="plain"):
        super().__init__()
        self.kind = kind
        self.stem, self.stem_norm = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv1, self.norm1 = nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv3 = nn.Conv2d(6, 6, 1)
        self.skip, self.skip3 = nn.Identity(), nn.Identity()
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = torch.relu(self.stem_norm(self.stem(x)))
        y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        if self.kind == "in place":
            y += self.skip(x)
        elif self.kind == "read twice":
            y = y + self.skip(x) + y.mean()
        elif self.kind == "scaled":
            y = self.skip(x) + 2 * y
        elif self.kind == "twice as much":
            y = torch.add(self.skip(x), y, alpha=2)
        elif self.kind == "into the stream":
            s = self.skip(x).clone()
            s += y
            y = s
        else:
            y = y + self.skip(x)
        x = torch.relu(y)
        x = self.skip3(x) + self.conv3(x)
        return self.head(torch.relu(x).mean((2, 3)))


def network(kind="plain"):
    torch.manual_seed(0)
    return with_norms_drawn(Residual(kind))


HIDDEN = {
    "conv1": {"out": [0, 1, 4, 5, 7]},
    "norm1": {"out": [0, 1, 4, 5, 7]},
    "conv2": {"in": [0, 1, 4, 5, 7]},
}
KEPT = [0, 1, 3, 4]
STREAM = {
    "stem": {"out": KEPT},
    "stem_norm": {"out": KEPT},
    "conv1": {"in": KEPT},
    "conv2": {"out": KEPT},
    "norm2": {"out": KEPT},
    "conv3": {"in": KEPT, "out": KEPT},
    "head": {"in": KEPT},
}
NORMS = {"conv1": "norm1", "conv2": "norm2"}
SUMS = {"conv2": "skip", "conv3": "skip3"}


@pytest.mark.parametrize("kind", ["plain", "in place", "into the stream"])
@pytest.mark.parametrize("table", [HIDDEN, STREAM], ids=["hidden", "stream"])
def test_a_branch_makes_up_for_what_its_sum_lost(table, kind):
    dense, data = network(kind), images(2, 6, 6)
    found, expected = repaired("refit", dense, table, data), cut(dense, table)
    oracle = ORACLES["repairs", "refit"]
    oracle(expected, dense, table, data.x, NORMS, SUMS)
    for (key, a), (_, b) in zip(found.state_dict().items(), expected.state_dict().items(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8, msg=key)
    assert not torch.equal(found.conv3.weight, cut(dense, table).conv3.weight)


@pytest.mark.parametrize("batch_size", [1, 7])
@pytest.mark.parametrize("kind", ["plain", "in place", "into the stream"])
def test_parts_add_up_to_the_whole(kind, batch_size):
    dense, data = network(kind), images(2, 6, 6)
    assert_close(repaired("refit", dense, STREAM, data, batch_size=batch_size), repaired("refit", dense, STREAM, data))


@pytest.mark.parametrize(
    ("kind", "branch"),
    [
        *((kind, Branch(("norm2",), True)) for kind in ("plain", "in place", "into the stream")),
        *((kind, Branch(("norm2",), False)) for kind in ("read twice", "scaled", "twice as much")),
    ],
)
def test_a_branch_is_what_a_sum_alone_reads(kind, branch):
    model, x = network(kind), torch.randn(2, 2, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        found = branches(model, ["stem", "conv1", "conv2", "conv3", "head"], x)
    assert found == {
        "stem": Branch(("stem_norm",)),
        "conv1": Branch(("norm1",)),
        "conv2": branch,
        "conv3": Branch(joins=True),
        "head": Branch(),
    }


class Overwritten(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = self.first(x)
        y = self.second(x)
        x *= 2
        return x + y


def test_what_reads_something_that_is_overwritten_joins_nothing():
    with torch.no_grad():
        found = branches(Overwritten(), ["first", "second"], torch.randn(2, 4))
    assert found == {"first": Branch(), "second": Branch()}


class Both(nn.Module):
    """A branch and a shortcut that are both layers, and one that is scaled in place."""

    def __init__(self):
        super().__init__()
        self.branch, self.scale, self.shortcut = nn.Linear(4, 5), LayerScale(5, 0.5, inplace=True), nn.Linear(4, 5)
        self.position = nn.Parameter(torch.zeros(1, 5))

    def forward(self, x):
        y = self.scale(self.branch(x))
        return y + self.shortcut(x) + self.position


def test_of_two_layers_that_meet_the_later_makes_up_for_the_other():
    model = Both()
    with torch.no_grad():
        found = branches(model, ["branch", "shortcut"], torch.randn(2, 4))
    assert found == {"branch": Branch(("scale",)), "shortcut": Branch(joins=True)}


class Odd(nn.Module):
    """Links that are called twice, that end in an activation, that have a hook, and one along another axis."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third, self.fourth = (nn.Conv2d(4, 4, 1, bias=False) for _ in range(4))
        self.shared, self.active, self.hooked = nn.BatchNorm2d(4), BatchNormAct2d(4), nn.BatchNorm2d(4)
        self.tokens, self.across = nn.Linear(9, 9), nn.BatchNorm1d(4)
        self.hooked.register_forward_hook(lambda layer, args, output: output / 2)

    def forward(self, x):
        x = x + self.shared(self.first(x))
        x = x + self.shared(self.second(x))
        x = x + self.active(self.third(x))
        x = x + self.hooked(self.fourth(x))
        x = x.flatten(2)
        return x + self.across(self.tokens(x))


def test_what_is_no_line_of_each_output_is_no_link():
    with torch.no_grad():
        found = branches(Odd().eval(), ["first", "second", "third", "fourth", "tokens"], torch.randn(2, 4, 3, 3))
    others = dict.fromkeys(("first", "second", "fourth", "tokens"), Branch())
    assert found == {**others, "third": Branch(("active",))}


def test_an_output_that_hardly_counts_gets_no_large_weights():
    dense = network().float()
    with torch.no_grad():
        dense.norm2.weight[2] = 1e-42
    data = images(2, 6, 6)
    found = repaired("refit", dense, HIDDEN, replace(data, x=data.x.float()))
    assert torch.equal(found.conv2.weight[2], cut(dense, HIDDEN).conv2.weight[2])
    assert found.conv2.weight.abs().max() < 100


def test_what_is_inserted_is_not_refitted():
    dense = network()
    module = nn.Sequential(nn.Conv2d(6, 6, 1), nn.ReLU()).double()
    with inserted(dense, "skip3", module):
        small = cut(dense, HIDDEN)
        before = {key: tensor.clone() for key, tensor in small.state_dict().items()}
        with torch.no_grad():
            repairs["refit"](small, dense, HIDDEN, images(2, 6, 6))
        changed = [key for key, tensor in small.state_dict().items() if not tensor.equal(before[key])]
    assert changed
    assert not [key for key in changed if "inserted" in key]


@pytest.mark.parametrize(
    ("name", "n_joins", "links"),
    [
        ("resnet10t", 4, {("layer1.0.bn2",), ("layer2.0.downsample.2",)}),
        ("tf_efficientnet_lite0", 9, {("blocks.1.1.bn3",)}),
        ("vit_tiny_patch16_224", 24, {()}),
    ],
)
def test_branches_of_known_networks(name, n_joins, links):
    model = timm.create_model(name).eval()
    layers = [of for of, layer in model.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    with torch.no_grad():
        found = branches(model, layers, torch.randn(2, *model.default_cfg["input_size"]))
    joins = [branch for branch in found.values() if branch.joins]
    assert len(joins) == n_joins
    assert links <= {branch.links for branch in joins}
