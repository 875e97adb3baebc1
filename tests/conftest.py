"""Fixtures every test file shares."""

import copy
import importlib
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cases import fitted

# One thread a process: make test runs one on each core, and what tests start inherits it.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real images; skips where there is none."""
    folder = Path(os.environ.get("SUKASHI_DATA", Path(__file__).parent.parent.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real images at {folder}: set SUKASHI_DATA")
    return folder


@pytest.fixture(scope="session")
def real_weights(real_data: Path) -> Path:
    """The folder of trained weights beside the real images."""
    return real_data.parent / "weights"


@pytest.fixture(scope="session")
def digits_split():
    from sukashi import data

    return data.load("digits")


@pytest.fixture(scope="session")
def trained_cnn(digits_split):
    """A small CNN that has learned the digits; tests must not change it."""
    from sukashi import models
    from sukashi.experiments import demo

    preprocess = models.load("sukashi:digits_cnn").preprocess
    return demo.train_digits("sukashi:digits_cnn", digits_split.train.whole(preprocess, 0), epochs=8)


@pytest.fixture(scope="session")
def randomised():
    """Gives a network statistics, affine parameters and scales far from those that hide a mistake."""
    from supported import randomised

    return randomised


@pytest.fixture(scope="session")
def small(digits_split):
    """Trained networks of 32 and 72 units, for oracles that ask about each in turn: {name: loaded, model, sites, data}.

    `data` are eight training digits a class, two of them mislabelled. "cnn weights" and "vit weights" are the same with
    sites of single weights. Tests must not change them.
    """
    from sukashi.network import sites

    found = {name: _small(f"sukashi:digits_{name}", digits_split) for name in ("cnn", "vit")}
    for name, case in list(found.items()):
        found[f"{name} weights"] = SimpleNamespace(**{**vars(case), "sites": sites.weights(case.model)})
    return found


@pytest.fixture(scope="session")
def cnn_weights(small, tmp_path_factory):
    """The weights of the small CNN, as a file."""
    import safetensors.torch

    path = tmp_path_factory.mktemp("weights") / "cnn.safetensors"
    safetensors.torch.save_file(small["cnn"].model.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def small64(small):
    """The same in float64, where two ways to compute one number never fall on two sides of a threshold."""
    from sukashi.core.types import Batch

    found = {}
    for name, case in small.items():
        data = Batch(case.data.x.double(), case.data.target, case.data.image_id)
        found[name] = SimpleNamespace(model=copy.deepcopy(case.model).double(), sites=case.sites, data=data)
    return found


@pytest.fixture(scope="session")
def sequence64(digits_split):
    """A trained sequence of layers of every sort that oracles of relevance know, in float64: model, sites, data."""
    from sukashi import models
    from sukashi.core.types import Batch
    from sukashi.network import sites

    preprocess = models.load("sukashi:digits_cnn").preprocess
    with torch.random.fork_rng():
        torch.manual_seed(0)
        body = (nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(6, 8, 3), nn.GELU())
        model = nn.Sequential(*body, nn.AvgPool2d(2, 1, 1), nn.Flatten(), nn.Linear(72, 9), nn.ReLU(), nn.Linear(9, 10))
        fitted(model, digits_split.train.whole(preprocess, 0), epochs=16, size=64, rate=1e-2)
    data = _mislabelled(digits_split, preprocess)
    found = sites.find(model, data.x[:2]).sites
    return SimpleNamespace(model=model.double(), sites=found, data=Batch(data.x.double(), data.target, data.image_id))


def _small(spec, digits):
    from sukashi import models
    from sukashi.network import sites

    with torch.random.fork_rng():
        torch.manual_seed(0)
        loaded = models.load(spec, width=8)
        fitted(loaded.model, digits.train.whole(loaded.preprocess, 0), epochs=16, size=64, rate=1e-2)
    data = _mislabelled(digits, loaded.preprocess)
    found = sites.find(loaded.model, data.x[:2]).sites
    return SimpleNamespace(loaded=loaded, model=loaded.model, sites=found, data=data)


def _mislabelled(digits, preprocess):
    """Eight training digits a class, two of them with each other's target."""
    data = digits.train.calibration(8, 0).whole(preprocess, 0).by_class()
    data.target[[0, 8]] = data.target[[8, 0]]
    return data.by_class()


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A working directory of its own, from which modules can be imported; what they register is gone afterwards.

    Called, it forgets them at once, as another process would not know them.
    """
    from sukashi.attributions import attributions
    from sukashi.criteria import criteria
    from sukashi.measures import measures

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place and place != os.getcwd()])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # a file is written twice in a second
    registered = [(table, dict(table)) for of in (attributions, criteria, measures) for table in (of._methods,)]

    def forget():
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", "")).startswith(str(tmp_path)):
                del sys.modules[name]
        importlib.invalidate_caches()
        for table, methods in registered:
            table.clear()
            table.update(methods)

    yield forget
    forget()
