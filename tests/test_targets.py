"""Targets in place of a ratio: what is found is the smallest cut that meets one, or the largest that is shown to."""

import copy
import html
import json
import re
from dataclasses import replace

import numpy as np
import pytest

import sukashi
from sukashi import data as datasets
from sukashi.core import stats
from sukashi.core.errors import UsageError
from sukashi.core.files import Journal
from sukashi.criteria import plans, pruning
from sukashi.criteria.plans import plan_of
from sukashi.experiments.bench import Source
from sukashi.experiments.prune import run, targets
from sukashi.experiments.prune.page import page
from sukashi.experiments.prune.settings import TARGETS, Prune
from sukashi.experiments.workspace import Workspace
from sukashi.measures import accuracy, cost
from sukashi.network import surgery
from sukashi.report.networks import layer_rows
from sukashi.report.page import write

SPEC = "sukashi:digits_cnn"
GIVEN = {"model": SPEC, "data": "digits", "criterion": "magnitude", "out": "o"}
CUT = {"calibration": 8, "test_images": 300, "width": 8}


def prune(out, weights, criterion="taylor", **settings):
    return sukashi.prune(SPEC, "digits", criterion, out=out, weights=weights, **{**CUT, "round_to": 1, **settings})


def left(case, plan, n_removed, round_to, figure):
    """A figure of the network without the first units of a plan, the slow way."""
    model = copy.deepcopy(case.model)
    surgery.cut(model, plans.round_mask(plan, n_removed / plan.n_units, round_to))
    return figure(model)


FIGURES = {
    "target_flops": lambda x: lambda model: cost.flops(model, x),
    "target_params": lambda x: cost.n_parameters,
    "target_size": lambda x: cost.n_bytes,
}


@pytest.mark.parametrize("round_to", [1, 4])
@pytest.mark.parametrize(
    ("name", "asked"), [("target_flops", 0.5), ("target_params", 0.35), ("target_size", "9.5kB"), ("target_flops", 0.9)]
)
def test_it_is_the_smallest_cut_that_meets_the_target(small, cnn_weights, tmp_path, name, asked, round_to):
    case = small["cnn"]
    result = prune(tmp_path / "o", cnn_weights, round_to=round_to, **{name: asked})
    plan = plan_of(Workspace(tmp_path / "o").records()[0].arrays("plan"), case.sites)
    figure = FIGURES[name](case.data.x)
    every = [left(case, plan, n, round_to, figure) for n in range(plan.n_removable + 1)]
    limit = 9500 if name == "target_size" else asked * every[0]
    first = next(n for n, found in enumerate(every) if found <= limit)
    assert result.ratio == first / plan.n_units
    assert result.ratio_asked is None
    reached = every[first] if name == "target_size" else every[first] / every[0]
    assert result.target == {"name": name, "asked": limit if name == "target_size" else asked, "reached": reached}
    of = {"target_flops": "flops", "target_params": "parameters", "target_size": "bytes"}[name]
    assert result.pruned[of] == every[first], "what is saved is what was found"
    assert result.units_removed == plans.round_mask(plan, result.ratio, round_to).n_removed / plan.n_units


def test_what_rounding_gives_back_is_told(cnn_weights, tmp_path):
    result = prune(tmp_path / "o", cnn_weights, target_params=0.7, round_to=4)
    asked, gone = round(result.ratio * 32), sum(of["removed"] for of in result.layers)
    assert gone < asked
    assert f"of the plan, {asked} of 32 units, {gone} once widths are rounded." in result.text()


def test_what_was_reached_is_told_everywhere(cnn_weights, tmp_path):
    result = prune(tmp_path / "o", cnn_weights, target_flops=0.5)
    said = f"FLOPs: {100 * result.target['reached']:.1f}% of the dense network's (asked: at most 50.0%)"
    n = sum(of["removed"] for of in result.layers)
    said += f"; at ratio {result.ratio:.4f} of the plan, {n} of 32 units."
    assert said in result.text()
    assert said in html.unescape(re.sub("<[^>]*>", "", (tmp_path / "o" / "report.html").read_text()))
    assert json.loads((tmp_path / "o" / "results.json").read_text())["target"] == result.target
    provenance = json.loads((tmp_path / "o" / "recipe.json").read_text())["provenance"]
    assert (provenance["ratio"], provenance["target"]) == (result.ratio, result.target)
    assert provenance["target_flops"] == 0.5
    assert not any("were asked for" in note for note in result.notes)
    assert prune(tmp_path / "o", cnn_weights, target_flops=0.5).finished
    with pytest.raises(UsageError, match=r"target_flops was 0\.5, now 0\.4"):
        prune(tmp_path / "o", cnn_weights, target_flops=0.4)
    with pytest.raises(UsageError, match="another trial"):
        prune(tmp_path / "o", cnn_weights, ratio=result.ratio)


# Accuracy.


def test_a_drop_is_shown_on_images_that_neither_calibrate_nor_test(small, cnn_weights, tmp_path):
    """The grid by hand: the last ratio before the first that is not shown."""
    case = small["cnn"]
    result = prune(tmp_path / "o", cnn_weights, max_drop=0.03)
    plan = plan_of(Workspace(tmp_path / "o").records()[0].arrays("plan"), case.sites)
    train = datasets.load("digits").train
    calibrated = set(train.calibration(8, 0).image_ids)
    rest = train.subset([row for row, name in enumerate(train.image_ids) if name not in calibrated])
    held_out = rest.validation(300 / len(rest))[1]
    batch = held_out.whole(case.loaded.preprocess)
    dense, _ = accuracy.evaluate(case.model, batch)
    expected = None
    for step in range(1, 50):
        model = copy.deepcopy(case.model)
        surgery.cut(model, plan.mask(step / 50))
        right, _ = accuracy.evaluate(model, batch)
        gained, lost = int(((right == 1) & (dense == 0)).sum()), int(((right == 0) & (dense == 1)).sum())
        if not stats.not_lower(gained, lost, len(batch), 0.03):
            break
        expected = (plan.mask(step / 50).n_removed, gained, lost)
    n_removed, gained, lost = expected
    assert result.units_removed == n_removed / plan.n_units
    assert 0 < n_removed < plan.n_removable
    assert result.target == {
        **{"name": "max_drop", "asked": 0.03, "reached": (lost - gained) / len(batch), "images": "train"},
        **{"n_images": len(batch), "gained": gained, "lost": lost},
    }
    assert f"on {len(batch):,} train images that neither calibrated nor are reported on" in result.text()
    assert any("of the training split" in said for said in result.warnings)


def test_the_first_images_of_a_drop_are_those_that_training_holds_out(cnn_weights):
    settings = Prune(**{**GIVEN, **CUT, "weights": str(cnn_weights), "max_drop": 0.1, "test_images": 60})
    setting = Source.of(settings).open()
    found = run._search(setting, settings).held_out()
    assert set(found.image_ids) <= set(setting.data.train.validation(0.1)[1].image_ids)
    val = setting.data.train.validation(0.5)[1]
    of_val = replace(setting, data=replace(setting.data, val=val))
    assert set(run._search(of_val, settings).held_out().image_ids) <= set(val.image_ids)


def test_a_drop_that_so_few_images_can_not_show_is_refused_before_a_criterion_works(cnn_weights, tmp_path, monkeypatch):
    monkeypatch.setattr("sukashi.experiments.prune.run.plan_for", None)
    with pytest.raises(UsageError, match=r"`max_drop=0\.01` can't be shown on 299 images.*: 381 are needed"):
        prune(tmp_path / "o", cnn_weights, max_drop=0.01)
    assert not (tmp_path / "o").exists()


def test_a_drop_that_no_ratio_is_shown_to_keep_is_refused(small, cnn_weights, tmp_path, monkeypatch):
    real, answers = accuracy.evaluate, []

    def worse(model, batch):
        answers.append(model)
        right, ids = real(model, batch)
        return (right if len(answers) == 1 else np.zeros_like(right)), ids

    monkeypatch.setattr(accuracy, "evaluate", worse)
    with pytest.raises(UsageError, match=r"`max_drop=0\.03` is not shown at any ratio: without 2\.0% of its units"):
        prune(tmp_path / "o", cnn_weights, criterion="magnitude", max_drop=0.03)
    assert len(answers) == 2, "it stops at the first that fails"
    assert not (tmp_path / "o").exists()


def test_a_drop_of_silent_units_is_that_of_cut_ones(cnn_weights, tmp_path):
    cut = prune(tmp_path / "cut", cnn_weights, max_drop=0.03)
    zero = prune(tmp_path / "zero", cnn_weights, max_drop=0.03, mode="zero", round_to=None)
    assert zero.target == cut.target
    assert zero.ratio == cut.ratio


# A clock.


def times(*n_parameters, noise=0.1):
    """What networks take, as long as they have parameters: now a little less and now a little more."""
    around = np.linspace(1 - noise, 1 + noise, 20)
    return [list(n * around[:: 1 if row else -1]) for row, n in enumerate(n_parameters)]


class Clock:
    def __init__(self):
        self.n_looks = 0

    def __call__(self, models, batch, **how):
        self.n_looks += 1
        return times(*map(cost.n_parameters, models))


def test_latency_is_shown_by_the_upper_bound_and_searched_with_few_looks(small, cnn_weights, tmp_path, monkeypatch):
    clock, case = Clock(), small["cnn"]
    monkeypatch.setattr(cost, "latency", clock)
    result = prune(tmp_path / "o", cnn_weights, target_latency=0.5)
    assert clock.n_looks - 2 <= 6, "beside the largest cut, and what came out"
    plan = plan_of(Workspace(tmp_path / "o").records()[0].arrays("plan"), case.sites)

    def high(ratio):
        now = left(case, plan, plan.mask(ratio).n_removed, 1, cost.n_parameters)
        return stats.ratio(*times(cost.n_parameters(case.model), now)).high

    assert result.ratio == next(step / 50 for step in range(1, 50) if high(step / 50) <= 0.5)
    of = result.target
    assert of["low"] < of["reached"] < of["high"] == high(result.ratio) <= 0.5
    assert of["batch_size"] == 32
    assert [*result.latency] == ["1", "32"]
    assert f"Latency: {100 * of['reached']:.1f}% ({100 * of['low']:.1f}% to {100 * of['high']:.1f}%)" in result.text()


def test_a_latency_may_be_that_of_as_many_images_as_are_asked_for(cnn_weights, tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr(
        cost, "latency", lambda models, batch, **how: sizes.append(len(batch)) or ([2.0] * 6, [0.9] * 6)
    )
    result = prune(tmp_path / "o", cnn_weights, target_latency=0.5, target_batch=4)
    assert (result.target["batch_size"], set(sizes[:-3]), sizes[-3:]) == (4, {4}, [1, 4, 32])
    assert "4 images at once (asked: at most 50.0%)" in result.text()
    assert "latency -55% for one image, -55% for 4 images at once, -55% for 32 images at once." in result.verdict
    with pytest.raises(UsageError, match="`target_batch` is about the time of `target_latency`: give that too"):
        prune(tmp_path / "p", cnn_weights, target_flops=0.5, target_batch=4)


def test_a_search_that_was_killed_goes_on_with_what_the_clock_said(small, cnn_weights, tmp_path, monkeypatch):
    settings = Prune(**{**GIVEN, **CUT, "weights": str(cnn_weights), "target_latency": 0.5, "round_to": 1})
    setting = Source.of(settings).open()
    search = run._search(setting, settings)
    plan = setting.rank("magnitude").plan
    clock = Clock()
    monkeypatch.setattr(cost, "latency", clock)
    journal = Journal(tmp_path / "journal.jsonl")
    found, looks = search.ratio(plan, journal), clock.n_looks
    assert search.ratio(plan, Journal(tmp_path / "journal.jsonl")) == found
    assert clock.n_looks == looks


# What can't be reached, and what means nothing.


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"target_params": 0.001},
            r"`target_params=0\.001` can't be reached: the largest cut \(one unit of each layer ",
        ),
        (
            {"target_flops": 0.2, "round_to": 8},
            r"\(each layer keeps 8 units or all\) leaves 0\.\d+ of .* `round_to=1`",
        ),
        ({"target_size": "1kB"}, r"`target_size='1 kB'` can't be reached: .* leaves \d\.\d+ kB"),
        ({"target_size": "5MB"}, r"`target_size='5 MB'` is met by the dense network \(file size: \d+(\.\d)? kB\)"),
        (
            {"target_latency": 0.001},
            r"`target_latency=0\.001` can't be reached: .* takes 0\.\d\d \(0\.\d\d to 0\.\d\d\)",
        ),
    ],
)
def test_what_no_plan_reaches_is_refused_before_a_criterion_works(cnn_weights, tmp_path, monkeypatch, asked, message):
    monkeypatch.setattr(cost, "latency", Clock())
    monkeypatch.setattr("sukashi.experiments.prune.run.plan_for", None)
    with pytest.raises(UsageError, match=message):
        prune(tmp_path / "o", cnn_weights, **asked)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "how much goes is said by one of `ratio`, `target_flops`, .*, got nothing that says it: give one"),
        ({"ratio": 0.5, "max_drop": 0.1}, "got `ratio` and `max_drop`: give one"),
        ({"target_flops": 0.5, "target_size": "5MB"}, "got `target_flops` and `target_size`: give one"),
        ({"target_flops": 1.0}, r"`target_flops` must be in \(0, 1\), got 1"),
        ({"target_params": 35.0}, r"`target_params` must be in \(0, 1\), got 35"),
        ({"max_drop": 0.0}, r"`max_drop` must be in \(0, 1\), got 0"),
        ({"target_size": "5"}, "`target_size` must be a size in B, kB, MB or GB like 5MB"),
        ({"target_size": "0MB"}, "`target_size` must be a size"),
        ({"target_size": "5MiB"}, "`target_size` must be a size"),
        (
            {"target_params": 0.5, "scope": "row"},
            "`target_params` is for units, and `scope='row'` removes single weights",
        ),
        ({"max_drop": 0.5, "scope": "global"}, "`max_drop` is for units"),
        (
            {"target_flops": 0.5, "mode": "zero"},
            "`mode='zero'` keeps the network's shape, so `target_flops` never changes",
        ),
    ],
    ids=str,
)
def test_what_means_nothing_is_refused_before_anything_is_loaded(tmp_path, monkeypatch, given, message):
    monkeypatch.setattr(datasets, "load", None)
    with pytest.raises(UsageError, match=message):
        sukashi.prune(SPEC, "digits", "magnitude", out=tmp_path / "o", **given)
    assert list(tmp_path.iterdir()) == []


def test_every_target_is_searched_for():
    assert list(TARGETS) == list(targets.BY_SETTING)
    settings = [Prune(**GIVEN, **{name: "5 MB" if name == "target_size" else 0.5}) for name in TARGETS]
    assert [one.target for one in settings] == [(n, 5_000_000 if n == "target_size" else 0.5) for n in TARGETS]


# What is left of each layer.


def test_layers_are_counted_from_input_to_output(small, cnn_weights, tmp_path):
    result = prune(tmp_path / "o", cnn_weights, ratio=0.5)
    model = sukashi.load(tmp_path / "o").model
    assert [(row["layer"], row["with"]) for row in result.layers] == [("conv1", ["conv2"]), ("conv3", []), ("fc1", [])]
    for row in result.layers:
        for of, units, parameters in ((small["cnn"].model, "units", "parameters"), (model, "kept", "parameters_kept")):
            layers = [of.get_submodule(name) for name in (row["layer"], *row["with"])]
            assert {len(layer.weight) for layer in layers} == {row[units]}
            assert sum(p.numel() for layer in layers for p in layer.parameters()) == row[parameters]
        assert row["removed"] == row["units"] - row["kept"]
    assert sum(row["removed"] for row in result.layers) / 32 == result.units_removed
    shown = (tmp_path / "o" / "report.html").read_text()
    told = "; ".join(f"{row['layer']} {row['kept']} of {row['units']}" for row in result.layers)
    assert f'alt="Units kept: {told}"' in shown
    assert '<details class="fold"><summary>What is left of each layer' not in shown
    for row in result.layers:
        assert f"<td>{row['kept']}</td><td>{100 * row['kept'] / row['units']:.1f}%</td>" in shown
    (line,) = (line for line in result.text().splitlines() if line.startswith("conv1 (+ 1 coupled) "))
    assert line.split()[4:7] == ["channel", "8", str(result.layers[0]["kept"])]
    many = page(result.model_copy(update={"layers": result.layers * 5}), Workspace(tmp_path / "o"))
    write(tmp_path / "many", many, str)
    assert "What is left of each layer: 15 " in (tmp_path / "many" / "report.html").read_text()


@pytest.mark.filterwarnings("ignore:.*has random weights")
def test_layers_that_lose_units_together_are_one_row():
    settings = Prune(**{**GIVEN, "model": "sukashi:cifar_resnet20", "data": "shapes", "calibration": 1, "ratio": 0.5})
    setting = Source.of(settings).open()
    mask = setting.rank("magnitude").plan.mask(0.5)
    layers = run._layers(setting, mask, pruning.cut(setting.loaded, mask))
    rows = {row["layer"]: row for row in layers}
    assert rows["conv1"]["with"] == ["layer1.0.conv2", "layer1.1.conv2", "layer1.2.conv2"]
    assert rows["layer1.0.conv1"]["with"] == []
    assert [*rows] == sorted(rows), "conv1, layer1, layer2, ..."
    assert "conv1 (+ 3 coupled)" in layer_rows(layers)[1][0]


def test_a_drop_is_refused_where_rounding_leaves_nothing_to_remove(cnn_weights, tmp_path):
    with pytest.raises(UsageError, match="no ratio removes a unit; give a smaller `round_to`"):
        prune(tmp_path / "out", cnn_weights, round_to=64, max_drop=0.5)


def test_a_group_that_calibrates_is_judged_by_none_of_its_images(cnn_weights):
    asked = {**GIVEN, **CUT, "weights": str(cnn_weights), "max_drop": 0.2, "groups": r"(\d*)\d$", "calibration": 2}
    settings = Prune(**asked)
    setting = Source.of(settings).open()
    train = setting.data.train
    own = dict(zip(train.image_ids, train.groups, strict=True))
    assert 100 < len(set(own.values())) < len(train)
    used = {own[name] for name in setting.calibration(0, "random").image_id}
    found = run._search(setting, settings).held_out()
    assert len(found) > 50
    assert not used & {own[name] for name in found.image_ids}


def test_a_cut_far_faster_than_asked_is_doubted():
    latency = targets.BY_SETTING["target_latency"]
    (told,) = latency.doubts({"name": "target_latency", "asked": 0.75, "reached": 0.65}, "train")
    assert told.startswith("the cut takes 65.0% of the dense network's time where 75.0% would do: no smaller one was")
    assert not latency.doubts({"name": "target_latency", "asked": 0.75, "reached": 0.7}, "train")
