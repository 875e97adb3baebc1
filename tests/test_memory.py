"""Networks and images that are objects: a name for each that says what it is, and all that was said of it kept."""

import copy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import sukashi
from sukashi import data, models
from sukashi.core.errors import ModelError, UsageError

GREY = sukashi.Preprocess(8, 8, 1, (0.0,), (1.0,))


class Net(nn.Module):
    preprocess = GREY

    def __init__(self, act=None, scale=1.0, table=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.act, self.fc = nn.Conv2d(1, 4, 3), act or nn.ReLU(), nn.Linear(4, 10)
        self.scale = scale
        self.register_buffer("table", torch.full((1,), table), persistent=False)

    def forward(self, x):
        return self.fc(self.act(self.conv(x)).mean((2, 3))) * self.scale + self.table


class Twice(Net):
    def forward(self, x):
        return super().forward(x) * 2


class Branching(Net):
    """What torch.fx cannot trace."""

    def forward(self, x):
        return super().forward(x) * (2 if x.sum() > 1e9 else 1)


def named(forward):
    return type("Net", (Net,), {"forward": forward, "__module__": __name__, "__qualname__": "Net"})()


def hooked(n):
    net = Net()
    net.act.register_forward_hook(lambda module, given, output: output * n)
    return net


def other_preprocess():
    net = Net()
    net.preprocess = replace(GREY, mean=(0.5,))
    return net


@pytest.mark.parametrize(
    "make",
    [
        lambda: Net(nn.Tanh()),
        lambda: Net(nn.LeakyReLU(0.2)),
        lambda: Net(scale=2.0),
        lambda: Net(table=1.0),
        lambda: named(Twice.forward),
        lambda: named(lambda self, x: Net.forward(self, x) + 1),
        lambda: named(lambda self, x: Net.forward(self, x) + (1 if x.sum() > 1e9 else 2)),
        lambda: named(lambda self, x: Net.forward(self, x) + (1 if x.sum() > 1e9 else 3)),
        lambda: hooked(2),
        lambda: hooked(3),
        other_preprocess,
    ],
)
def test_networks_of_the_same_weights_have_names_of_their_own(make):
    name, other = models.hold(Net()), models.hold(make())
    assert name != other
    assert name == models.hold(Net())
    assert other == models.hold(make())


@pytest.mark.slow
def test_a_name_is_the_same_in_another_process():
    code = """
import sys
sys.path.insert(0, "tests")
from test_memory import *
print(models.hold(Net()), models.hold(Branching()))"""
    root = Path(__file__).parent.parent
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout.split() == [models.hold(Net()), models.hold(Branching())]


def test_what_cannot_be_told_apart_is_refused():
    class Secret:
        def __init__(self, value):
            self.value = value

    def net(value):
        made = Branching()
        made.secret = Secret(value)
        made.act.register_forward_hook(lambda module, given, output: output * made.secret.value)
        return made

    models.hold(net(1.0))
    models.hold(net(1.0))
    with pytest.raises(ModelError, match="still compute different things"):
        models.hold(net(2.0))


def test_an_audit_sees_another_activation(tmp_path):
    found = sukashi.audit(
        [Net(), Net(nn.Tanh())], "digits", out=tmp_path / "a", test_images=20, attributions=["saliency"]
    )
    assert len({model["label"] for model in found.to_json()["models"]}) == 2
    settings = {"criteria": ["magnitude"], "test_images": 20, "calibration": 2, "seeds": 1, "out": tmp_path / "b"}
    sukashi.compare(Net(), "digits", **settings)
    sukashi.compare(Net(), "digits", **settings)
    with pytest.raises(UsageError, match="another"):
        sukashi.compare(Net(nn.Tanh()), "digits", **settings)


def test_images_are_told_apart_by_shape_and_class_names():
    x, target = torch.rand(20, 1, 8, 8), torch.arange(20) % 2
    named = TensorDataset(x, target)
    named.classes = ["cat", "dog"]
    turned = copy.copy(named)
    turned.classes = ["dog", "cat"]
    names = [data.hold(part) for part in ((x, target), (x.reshape(20, 1, 4, 16), target), named, turned)]
    assert len({*names}) == 4
    assert data.load(names[2]).class_names == ("cat", "dog")


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    out = tmp_path_factory.mktemp("memory") / "sparse"
    settings = {"width": 8, "scope": "layer", "test_images": 40, "calibration": 2}
    with pytest.warns(UserWarning, match="random weights"):
        sukashi.prune("sukashi:digits_cnn", "digits", "magnitude", 0.5, out=out, **settings)
    return out


def test_a_loaded_network_keeps_mask_and_class_names(sparse, tmp_path):
    loaded = sukashi.load(sparse)
    again = sukashi.load(loaded)
    assert (again.spec, again.class_names, again.cuts) == (loaded.spec, tuple("0123456789"), loaded.cuts)
    assert again.mask is not None
    settings = {"epochs": 1, "test_images": 40}
    found = [
        sukashi.finetune(given, "digits", out=tmp_path / name, **settings)
        for name, given in (("object", loaded), ("folder", sparse))
    ]
    assert found[0].weights_removed == found[1].weights_removed == pytest.approx(0.5, abs=1e-2)
    assert found[0].accuracy == found[1].accuracy
    # Rebuilt from its recipe, as what was made from the folder is.
    assert sukashi.load(tmp_path / "object").mask is not None
    small = sukashi.prune(loaded, "digits", "magnitude", 0.25, out=tmp_path / "cut", test_images=40, calibration=2)
    assert sukashi.load(small.out).mask is not None
    denser = sukashi.prune(loaded, "digits", "magnitude", 0.6, scope="layer", out=tmp_path / "more", test_images=40)
    assert sukashi.load(denser.out).mask.n_removed > loaded.mask.n_removed


def test_a_loaded_network_brings_its_own(sparse):
    loaded = sukashi.load(sparse)
    with pytest.raises(UsageError, match="leave `width` out"):
        sukashi.load(loaded, width=4)
    with pytest.raises(UsageError, match="leave `weights` out"):
        sukashi.load(loaded, weights=sparse / "masks.safetensors")
    for weights in (sparse, sparse / "model.safetensors"):
        assert sukashi.load(loaded, weights=weights).weights_sha256 == loaded.weights_sha256
    with torch.no_grad():
        next(loaded.model.parameters()).add_(1)
    with pytest.raises(ModelError, match="its mask removes are not zero"):
        sukashi.load(loaded)


def test_a_loaded_network_that_was_changed_is_not_rebuilt_without_the_change(sparse, tmp_path):
    loaded = sukashi.load(sparse)
    changed = replace(loaded, model=copy.deepcopy(loaded.model))
    changed.model.bn1.eps = 1.0
    held = sukashi.load(changed)
    assert held.spec.startswith("memory:")
    assert held.mask is not None
    small = sukashi.prune(changed, "digits", "magnitude", 0.25, out=tmp_path / "cut", test_images=40, calibration=2)
    assert sukashi.load(changed, weights=small.out).model.bn1.eps == 1.0
