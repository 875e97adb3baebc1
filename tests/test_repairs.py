"""Repairs: each against a literal form in float64, and what must hold of any."""

import copy
import importlib
import threading

import numpy as np
import pytest
import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.std_conv import StdConv2d
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from oracles import ORACLES
from sukashi.core.errors import ModelError, UsageError
from sukashi.core.types import Batch, Mask
from sukashi.models.architectures import DigitsViT
from sukashi.network import sites as finder
from sukashi.network import surgery
from sukashi.network.branches import Branch
from sukashi.repairs import order, repairs, ridge
from sukashi.repairs.order import in_order, parts
from sukashi.repairs.rows import places, windows, written

N_IMAGES = 30


def images(*shape, n=N_IMAGES):
    x = torch.randn(n, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return Batch(x, torch.zeros(n, dtype=torch.long), tuple(map(str, range(n))))


def network(seed=0):
    """Convolutions with and without BatchNorm, a pooling and two linear layers."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        *(nn.Conv2d(2, 6, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(6, 5, 3, stride=2, bias=False), nn.BatchNorm2d(5), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(45, 7), nn.ReLU(), nn.Linear(7, 3)),
    )
    return with_norms_drawn(net)


def with_norms_drawn(net):
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight)
    return net.double().eval()


# Of the network: two channels of the first layer, one of the second (nine inputs of the linear layer), two units.
CUT = {
    "0": {"out": [0, 2, 3, 5]},
    "2": {"in": [0, 2, 3, 5], "out": [0, 1, 3, 4]},
    "3": {"out": [0, 1, 3, 4]},
    "6": {"in": [i for i in range(45) if i // 9 != 2], "out": [1, 2, 3, 5, 6]},
    "8": {"in": [1, 2, 3, 5, 6]},
}
LAST = {"6": {"zero in": list(range(18, 27))}}
ZERO = {"2": {"zero in": [1, 4]}, "6": {"zero in": list(range(18, 27))}, "8": {"zero in": [0, 4]}}


# Every third weight of a layer, and all of an output.
WEIGHTS = {
    "0": {"weights": [*range(0, 108, 3)]},
    "2": {"weights": [*range(0, 270, 3)]},
    "6": {"weights": [*range(45), *range(46, 315, 3)]},
}


def cut(dense, table):
    small = copy.deepcopy(dense)
    surgery.replay(small, {name: sides for name, sides in table.items() if "weights" not in sides})
    for name, sides in table.items():
        small.get_submodule(name).weight.data.view(-1)[sides.get("weights", [])] = 0
    return small


def repaired(name, dense, table, data, **options):
    small = cut(dense, table)
    with torch.no_grad():
        repairs[name](small, dense, table, data, **options)
    return small


def assert_close(found, expected):
    for a, b in zip(found.state_dict().values(), expected.state_dict().values(), strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=1e-8, atol=1e-8)  # damped by a millionth


@pytest.mark.parametrize("table", [CUT, WEIGHTS], ids=["units", "weights"])
@pytest.mark.parametrize("name", repairs.names())
def test_a_repair_is_its_oracle(name, table):
    dense, data, twin = network(), images(2, 8, 8), ORACLES["repairs", name]
    found, expected = repaired(name, dense, table, data), cut(dense, table)
    twin(expected, dense, table, data.x, {"2": "3"})
    before = cut(dense, table).state_dict()
    changed = [key for key, tensor in before.items() if not tensor.equal(found.state_dict()[key])]
    assert changed
    for (key, a), (_, b) in zip(found.state_dict().items(), expected.state_dict().items(), strict=True):
        torch.testing.assert_close(a, b, rtol=twin.rtol, atol=twin.atol, msg=key)


@pytest.mark.parametrize("name", repairs.names())
@pytest.mark.parametrize("batch_size", [1, 7, N_IMAGES])
def test_parts_add_up_to_the_whole(name, batch_size):
    dense, data = network(), images(2, 8, 8)
    whole = repaired(name, dense, CUT, data, batch_size=10 * N_IMAGES)
    assert_close(repaired(name, dense, CUT, data, batch_size=batch_size), whole)


@pytest.mark.parametrize("table", [CUT, ZERO, WEIGHTS], ids=["cut", "zero", "weights"])
def test_refit_comes_nearer_to_what_the_dense_network_says(table):
    dense, _data = network(), images(2, 8, 8)
    new = torch.randn(200, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        before, after = (
            (model(new) - dense(new)).square().mean()
            for model in (cut(dense, table), repaired("refit", dense, table, images(2, 8, 8, n=200)))
        )
    assert after < 0.7 * before


def test_what_was_silenced_stays_silent():
    dense = network()
    found = repaired("refit", dense, ZERO, images(2, 8, 8))
    for name, sides in ZERO.items():
        weight = found.get_submodule(name).weight
        assert not weight[:, sides["zero in"]].any()
        assert not torch.equal(weight, cut(dense, ZERO).get_submodule(name).weight)


def test_weights_that_are_zero_stay_zero(monkeypatch):
    dense = network()
    found = repaired("refit", dense, WEIGHTS, images(2, 8, 8))
    for name, sides in WEIGHTS.items():
        gone = torch.zeros_like(found.get_submodule(name).weight, dtype=torch.bool)
        gone.view(-1)[sides["weights"]] = True
        assert torch.equal(found.get_submodule(name).weight == 0, gone)
    monkeypatch.setattr(ridge, "_AT_ONCE", 1)  # one output at a time
    assert_close(repaired("refit", dense, WEIGHTS, images(2, 8, 8)), found)


def test_layers_that_are_not_linear_in_all_they_read_are_left_as_they_are():
    torch.manual_seed(0)
    dense = nn.Sequential(
        *(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU()),
        *(nn.ConvTranspose2d(6, 4, 2), nn.ReLU(), nn.Conv2d(4, 3, 1)),
    ).double()
    table = {"2": {"weights": [0, 9]}, "4": {"weights": [1, 2]}, "6": {"weights": [0, 5]}}
    before, found = cut(dense, table), repaired("refit", dense, table, images(2, 8, 8))
    changed = [key for key, tensor in before.state_dict().items() if not tensor.equal(found.state_dict()[key])]
    assert changed == ["6.weight", "6.bias"]


def test_a_cut_that_takes_nothing_changes_nothing():
    dense = network()
    table = {"2": {"in": [*range(6)]}, "6": {"in": [*range(45)]}, "8": {"in": [*range(7)]}}
    found = repaired("refit", dense, table, images(2, 8, 8))
    for a, b in zip(found.state_dict().values(), dense.state_dict().values(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_a_unit_that_others_make_up_for_is_not_missed():
    dense = network()
    with torch.no_grad():  # channel 1 of the first layer is twice channel 0: ReLU keeps that
        dense[0].weight[1], dense[0].bias[1] = 2 * dense[0].weight[0], 2 * dense[0].bias[0]
    table = {"0": {"out": [0, 2, 3, 4, 5]}, "2": {"in": [0, 2, 3, 4, 5]}}
    data = images(2, 8, 8, n=100)
    new = torch.randn(20, 2, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        off = [
            (model(new) - dense(new)).abs().max()
            for model in (cut(dense, table), repaired("refit", dense, table, data))
        ]
    assert off[1] < 1e-4 * off[0]


def test_norms_before_a_cut_are_left_alone():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
    dense = dense.append(nn.Linear(64, 2)).double().eval()
    table = {"2": {"out": [0, 1]}, "3": {"out": [0, 1]}, "5": {"in": [*range(32)]}}
    found = repaired("norm", dense, table, images(2, 8, 8))
    assert torch.equal(found[1].running_mean, dense[1].running_mean)
    assert not torch.equal(found[3].running_mean, dense[3].running_mean[:2])


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(5, 3), (5,)),
        (nn.Linear(5, 3), (6, 5)),
        (nn.Linear(5, 3), (4, 3, 5)),
        (nn.Conv1d(3, 4, 3, stride=2, padding=1, dilation=2), (3, 15)),
        (nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0)), (3, 9, 8)),
        (nn.Conv2d(3, 4, 3, padding="same"), (3, 6, 7)),
        (nn.Conv2d(3, 4, 3, padding=2, padding_mode="reflect"), (3, 6, 7)),
        (nn.Conv2d(3, 4, 3, dilation=2), (3, 9, 8)),
        (Conv2dSame(3, 4, 3, stride=2), (3, 7, 8)),
        (nn.Conv3d(2, 3, (1, 2, 3), padding=1), (2, 3, 4, 5)),
    ],
    ids=str,
)
def test_a_layer_is_linear_in_its_windows(layer, shape):
    layer, x = layer.double(), torch.randn(6, *shape, dtype=torch.float64)
    with torch.no_grad():
        y = layer(x)
        for n in (4, 10**6):
            at = places(layer, y, n, np.random.default_rng(0))
            made = windows(layer, x, at) @ layer.weight.flatten(1).T + layer.bias
            assert torch.allclose(made, written(layer, y, at), atol=1e-12)
            assert at.shape[1] <= n
            assert all(len(set(row)) == len(row) for row in at.tolist())


def test_places_of_an_image_do_not_depend_on_batches():
    layer, y = nn.Conv2d(1, 1, 1), torch.zeros(9, 1, 5, 5)
    draw = np.random.default_rng(3)
    parts = torch.cat([places(layer, part, 7, draw) for part in y.split(2)])
    assert torch.equal(parts, places(layer, y, 7, np.random.default_rng(3)))


def test_what_cannot_be_repaired_is_refused_by_name():
    dense = network()
    with pytest.raises(ModelError, match="nothing behind what was cut has weights to refit"):
        repairs["refit"](dense, dense, {"0": {"out": [0]}}, images(2, 8, 8))
    with pytest.raises(UsageError, match="at least 5 images"):
        repairs["refit"](cut(dense, CUT), dense, CUT, images(2, 8, 8, n=4))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.again = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.again(self.again(self.first(x)))


def test_a_layer_that_runs_twice_is_refused_by_name():
    model = Twice().double()
    with pytest.raises(ModelError, match="layer 'again' is called 2 times"):
        repairs["refit"](model, model, {"again": {"in": [*range(4)]}}, images(4))


def test_a_layer_that_runs_twice_and_reads_nothing_of_the_cut_is_left_as_it_is():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), Twice(), nn.Linear(4, 2)).double()
    table = {"0": {"out": [0, 1, 3, 4]}, "2": {"in": [0, 1, 3, 4]}}
    before, found = cut(dense, table).state_dict(), repaired("refit", dense, table, images(4))
    changed = {key.rsplit(".", 1)[0] for key, tensor in found.state_dict().items() if not tensor.equal(before[key])}
    assert {"2", "4.first"} <= changed <= {"2", "4.first", "5"}


def test_more_images_than_go_side_by_side_give_the_same(monkeypatch):
    dense, data = network(), images(2, 8, 8)
    whole = {name: repaired(name, dense, CUT, data, batch_size=7) for name in repairs.names()}
    monkeypatch.setattr(order, "_ABREAST", 0)
    for name, found in whole.items():
        assert_close(repaired(name, dense, CUT, data, batch_size=7), found)


class Fails(nn.Module):
    def forward(self, x):
        if len(x) == 3:
            raise ValueError("three images")
        return x


@pytest.mark.parametrize("where", [0, 5])
def test_what_fails_in_a_pass_is_raised_and_no_thread_is_left(where):
    dense = network()
    dense.insert(where, Fails())
    table = {f"{int(name) + (int(name) >= where)}": sides for name, sides in CUT.items()}
    before = threading.active_count()
    with pytest.raises(ValueError, match="three images"):
        in_order(dense, {"9": Branch()}, images(2, 8, 8).x.split(9), lambda *_: None, lambda name: None, what="test")
    with pytest.raises(ValueError, match="three images"):
        repaired("refit", dense, table, images(2, 8, 8), batch_size=9)
    assert threading.active_count() == before


def test_layers_in_another_order_for_other_images_are_refused():
    class Otherwise(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.a(self.b(x)) if len(x) == 3 else self.b(self.a(x))

    before = threading.active_count()
    with torch.no_grad(), pytest.raises(ModelError, match="layer 'a' runs in another order for other images"):
        in_order(
            Otherwise(), {"a": Branch(), "b": Branch()}, torch.zeros(6, 4).split(3), lambda *_: None, print, what="test"
        )
    assert threading.active_count() == before


def test_silenced_heads_and_units_stay_silent():
    torch.manual_seed(0)
    dense = DigitsViT(4, 16).double().eval()
    data = images(1, 8, 8, n=200)
    sites = finder.find(dense, data.x[:2]).sites
    gone = {"head": 1, "hidden": 5}
    mask = Mask({site: torch.arange(site.n_units) != gone[site.kind] for site in sites if site.kind in gone})
    small = copy.deepcopy(dense)
    table = surgery.zero(small, mask)
    before = copy.deepcopy(small.state_dict())
    with torch.no_grad():
        repairs["refit"](small, dense, table, data)
    for name, sides in table.items():
        layer = small.get_submodule(name)
        assert not layer.weight[sides.get("zero out", [])].any()
        assert not layer.bias[sides.get("zero out", [])].any()
        assert not layer.weight[:, sides.get("zero in", [])].any()
    assert any("zero out" in sides for sides in table.values())
    changed = {key for key, tensor in small.state_dict().items() if not tensor.equal(before[key])}
    assert {"blocks.0.attn.proj.weight", "blocks.1.fc1.weight"} <= changed


class Own(nn.Conv2d):
    def forward(self, x):
        return super().forward(nn.functional.pad(x, (1, 1, 1, 1)))


def test_layers_that_are_more_than_their_weights_are_left_as_they_are():
    torch.manual_seed(0)
    dense = nn.Sequential(
        *(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 1), nn.ReLU()),
        *(StdConv2d(5, 5, 1), nn.ReLU(), Own(5, 5, 3), nn.ReLU(), weight_norm(nn.Conv2d(5, 5, 1)), nn.ReLU()),
        *(nn.Conv2d(5, 5, 1), nn.ReLU(), nn.Conv2d(5, 5, 1), nn.ReLU(), nn.Conv2d(5, 5, 1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(180, 3)),
    ).double()
    dense[12].weight = dense[10].weight
    dense[14].register_forward_hook(lambda layer, args, output: output / 2)
    table = {"0": {"out": [0, 1, 3]}, "2": {"in": [0, 1, 3]}}
    before, found = cut(dense, table).state_dict(), repaired("refit", dense, table, images(2, 8, 8, n=60))
    changed = {key.split(".")[0] for key, tensor in found.state_dict().items() if not tensor.equal(before[key])}
    assert changed == {"2", "17"}


def test_windows_of_an_image_are_its_places():
    """Attention within windows reads them as rows: refitted as a layer that reads the image's tokens."""

    class Windows(nn.Module):
        def __init__(self, rows):
            super().__init__()
            self.rows, self.up, self.down = rows, nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x):
            y = self.down(torch.relu(self.up(x.reshape(-1, 3, 4) if self.rows else x)))
            return y.reshape(len(x), -1, 4)

    torch.manual_seed(0)
    apart, whole = Windows(True).double(), Windows(False).double()
    whole.load_state_dict(apart.state_dict())
    table = {"up": {"out": [0, 1, 3, 4, 6]}, "down": {"in": [0, 1, 3, 4, 6]}}
    found = [repaired("refit", dense, table, images(6, 4), batch_size=7).state_dict() for dense in (apart, whole)]
    for key, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][key])


def test_large_images_go_in_parts_whatever_is_asked():
    assert [len(part) for part in parts(torch.zeros(5, 3, 1024, 1024), 512)] == [2, 2, 1]
    assert [len(part) for part in parts(torch.zeros(5, 3, 8, 8), 3)] == [3, 2]
    assert len(parts(torch.zeros(2, 3, 4096, 4096), 512)) == 2


def test_a_cut_behind_every_norm_leaves_them_alone():
    dense, table = network(), {"6": {"out": [0, 1, 2]}, "8": {"in": [0, 1, 2]}}
    found = repaired("norm", dense, table, images(2, 8, 8)).state_dict()
    assert all(tensor.equal(found[name]) for name, tensor in cut(dense, table).state_dict().items())


@pytest.mark.parametrize("free", [0, 1])
@pytest.mark.parametrize("n_rows", [5, 12, 13, 40])
def test_few_rows_and_many_are_fitted_alike(n_rows, free):
    generator = torch.Generator().manual_seed(n_rows)
    x, r = (torch.randn(n_rows, n, dtype=torch.float64, generator=generator) for n in (12, 3))
    x = torch.cat([3 + x, x.new_ones(n_rows, free)], 1)
    root = (0.01 * x[:, :12].square().sum() / 12).sqrt() * torch.eye(12 + free, dtype=torch.float64)[:12]
    expected = torch.linalg.lstsq(torch.cat([x, root]), torch.cat([r, r.new_zeros(12, 3)]), driver="gelsd").solution
    for sizes in ([n_rows], [1, n_rows - 1], [n_rows - 2, 2]):
        whole, halves = ridge.Sums(), (ridge.Sums(), ridge.Sums())
        for place, part in enumerate(zip(x.split(sizes), r.split(sizes), strict=True)):
            whole.add(*part)
            halves[place].add(*part)
        for sums in (whole, *([halves[0] + halves[1]] if len(sizes) > 1 else [])):
            change = sums.change(0.01, free)
            torch.testing.assert_close(change, expected, rtol=1e-9, atol=1e-11)
            assert sums.error(change) == pytest.approx(float((x @ expected - r).square().sum()), rel=1e-9)


@pytest.mark.parametrize(
    ("table", "remedy"),
    [
        (LAST, "layer '6' reads 45 numbers of every image, .* give at most 20 calibration images or another repair"),
        (CUT, "layer '2' reads 36 numbers at 9 places of every image, .* at most 20: give another repair"),
        (WEIGHTS, "layer '2' reads 54 numbers at 9 places of every image, .* at most 20: give another repair"),
    ],
    ids=["few places", "many places", "weights"],
)
def test_what_does_not_fit_the_memory_is_refused_before_anything_changes(monkeypatch, table, remedy):
    monkeypatch.setattr(importlib.import_module("sukashi.repairs.refit"), "MOST_READ", 20)
    dense, data = network(), images(2, 8, 8)
    small = cut(dense, table)
    before = copy.deepcopy(small.state_dict())
    with pytest.raises(ModelError, match=remedy):
        repairs["refit"](small, dense, table, data)
    assert all(tensor.equal(small.state_dict()[key]) for key, tensor in before.items())
    if table is LAST:
        repaired("refit", dense, table, data[slice(0, 20)])
