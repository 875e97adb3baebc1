"""The functions of the face as a newcomer calls them: what is wrong with a call is said in our words."""

import inspect
import sys
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

import sukashi
from sukashi.core.errors import DataError, ModelError, UsageError
from sukashi.core.schema import Settings, option
from sukashi.experiments import functions, kinds
from sukashi.experiments.compare.summary import CompareResult
from sukashi.experiments.workspace import Workspace
from sukashi.report.networks import slower, timed

NET = "sukashi:digits_cnn"


class Weigh(Settings):
    """Weigh a model."""

    kind: ClassVar[str] = "weigh"

    model: str = option(help="A model.")
    scale: float = option(1.0, help="Of the balance.")
    out: str = option(decides=False, help="A folder.")


@pytest.fixture
def weigh(monkeypatch):
    """The function of a kind that only a folder names; it gives the settings and the number of processes."""

    def use(**facts):
        kind = type("Weighing", (Weigh,), {"__annotations__": {}, "__doc__": Weigh.__doc__, **facts})
        for module in (functions, kinds):
            monkeypatch.setattr(module, "kinds", lambda: {"weigh": kind})
        monkeypatch.setattr(functions, "execute", lambda settings, *, command, jobs: (settings, command, jobs))
        return sukashi.weigh

    return use


def test_the_function_of_a_folder_is_called_by_its_name(weigh):
    function = weigh()
    assert (function.__name__, function.__qualname__) == ("weigh", "weigh")
    assert set(inspect.signature(function).parameters) == {"model", "scale", "out", "command"}
    assert "Weigh a model." in function.__doc__
    settings, command, jobs = function(model="m", scale=2.0)
    assert (settings.model, settings.scale, command, jobs) == ("m", 2.0, "sukashi.weigh(model='m', scale=2.0)", 1)
    assert {"weigh", "prune", "Preprocess"} <= set(dir(sukashi))


def test_arguments_of_a_folder_are_given_by_name(weigh):
    with pytest.raises(UsageError, match=r"sukashi.weigh takes every argument by its name: sukashi.weigh\(model=..., "):
        weigh()("m")


def test_jobs_are_for_kinds_that_are_shared(weigh):
    with pytest.raises(UsageError, match=r"^sukashi.weigh takes no jobs, .*: leave jobs out$"):
        weigh()(model="m", jobs=2)
    with pytest.raises(UsageError, match=r"^sukashi.prune takes no jobs"):
        sukashi.prune(NET, "digits", "drift", 0.5, jobs=2)
    assert weigh(shared=True)(model="m", jobs=2)[2] == 2


def test_an_option_that_an_attribution_has_not_is_refused():
    x, target = torch.zeros(1, 1, 8, 8), torch.zeros(1, dtype=torch.long)
    with pytest.raises(UsageError, match="lrp has no option 'rules'"):
        sukashi.attribute(NET, x, target, "lrp", rules="e")


def images(n, channels=1, first=0):
    return torch.rand(10 * n, channels, 8, 8), torch.arange(first, 10 + first).repeat(n)


def test_too_few_images_name_the_option():
    with pytest.raises(DataError, match=r"give `calibration=8` or add images$"):
        sukashi.check(NET, images(10))


def test_images_of_other_channels_are_said():
    said = r"give images of the model's size and channels \(it reads 1, these have 3\), or a model for 3$"
    with pytest.raises(ModelError, match=said):
        sukashi.check(NET, images(8, channels=3), calibration=2)


def test_labels_that_count_from_one_are_said():
    with pytest.raises(DataError, match=r"no image of '0': .*; labels count from 0, so where yours count from 1"):
        sukashi.check(NET, images(8, first=1))


def test_a_network_is_slower_only_beyond_a_clocks_noise():
    noise = np.random.default_rng(0).normal(1, 0.02, (2, 20))
    drift = np.linspace(1, 3, 20)  # the machine gets slower, for both alike

    def said(factor):
        times = {"dense_ms": list(0.49 * drift * noise[0]), "cut_ms": list(0.49 * factor * drift * noise[1])}
        return slower({"pruned": timed([times])})

    assert said(0.99) == said(1.0) == []
    assert "takes 1.07 (1.05 to 1.08) times as long" in said(1.06)[0]


def test_seconds_of_criteria_are_in_one_column():
    seconds = {"random": 1.0, "a_name_that_is_very_long": 2.0}
    given = {"model": "m", "reads": "", "parameters": 1, "sites": [], "units": 0, "refused": {}, "class_names": []}
    more = {"class_counts": {}, "n_right": None, "n_images": 0, "limit": 1.0, "cannot": {}, "unmeasured": []}
    text = functions.CheckResult(**given, **more, estimated_seconds=seconds).text()
    assert len({line.index(" about ") for line in text.splitlines() if " about " in line}) == 1


def test_a_cut_network_is_printed_in_a_line():
    bench = sukashi.open(NET, "digits", width=8, calibration=2)
    small = bench.rank("magnitude").cut(0.5, round_to=1)
    after = sum(p.numel() for p in small.model.parameters())
    said = f"the last cut removed 16 of 32 units and left {after:,} of 3,506 parameters"
    assert repr(small) == f"{NET}: 10 classes, {after:,} parameters; {said}"
    assert repr(bench.loaded) == f"{NET}: 10 classes, 3,506 parameters"


def test_a_page_says_the_call_from_python(tmp_path):
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
    few = {"ratios": [np.float32(0.3)], "seeds": 1, "calibration": 2, "test_images": 20}
    found = sukashi.compare(net, images(30), "magnitude", out=tmp_path / "out", **few)
    (run,) = Workspace(found.out).logged("run")
    assert run["command"] == (
        f"sukashi.compare(model=model, data=data, criteria=['magnitude'], out='{tmp_path / 'out'}', ratios=[0.3], "
        "seeds=1, calibration=2, test_images=20)"
    )


def test_a_frame_needs_pandas_and_says_how_to_have_it(monkeypatch):
    found = CompareResult.model_construct()
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UsageError, match="pip install pandas"):
        found.frame()


@pytest.mark.parametrize("call", [lambda: sukashi.load("m", weight="w"), lambda: sukashi.study("f", dat="d")])
def test_a_keyword_that_is_misspelt_is_refused_with_the_nearest(call):
    with pytest.raises(UsageError, match=r"has no keyword '\w+': did you mean '(weights|data)'"):
        call()
