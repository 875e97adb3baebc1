"""Studies from end to end: killed and resumed, cut and loaded again elsewhere, and what their results hold."""

import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import sukashi
from sukashi import data as datasets
from sukashi import models
from sukashi.core import progress
from sukashi.core.errors import DataError, UsageError
from sukashi.criteria import criteria, pruning
from sukashi.criteria.plans import read_plan
from sukashi.experiments import check, pages, study_file
from sukashi.experiments.compare import run as comparing
from sukashi.experiments.compare.store import Store
from sukashi.experiments.prune.run import prune
from sukashi.measures import accuracy
from sukashi.network import hooks
from sukashi.network import sites as finder

SPEC = "sukashi:digits_cnn"
COMPARED = ["random", "taylor", "cswap", "drift"]
SETTINGS = {"ratios": [0.3, 0.6, 0.9], "seeds": 2, "calibration": 8, "test_images": 100, "width": 8}


@pytest.fixture(scope="module")
def weights(small, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "cnn.safetensors"
    safetensors.torch.save_file(small["cnn"].model.state_dict(), path)
    return path


class Steps:
    """Counts what a run does, step by step, and kills the process at one of them."""

    def __init__(self, fatal=math.inf):
        self.n = 0
        self.fatal = fatal

    @contextmanager
    def __call__(self, title, total):
        # Reading the digits has as many steps as digits, and nothing to lose.
        yield self if not title.startswith("checking") else Steps()

    def advance(self, n=1, note=""):
        self.n += 1
        if self.n == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def undisturbed(weights, tmp_path_factory):
    """What a comparison returns, and the steps it took."""
    steps = Steps()
    with progress.listening(steps):
        result = comparing.compare(
            SPEC, "digits", COMPARED, out=tmp_path_factory.mktemp("whole") / "study", weights=weights, **SETTINGS
        )
    return result, steps.n


def _compared_until(fatal, out, weights):
    with progress.listening(Steps(fatal)):
        comparing.compare(SPEC, "digits", COMPARED, out=out, weights=weights, **SETTINGS)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_comparison_killed_three_times_ends_with_the_same_bytes(undisturbed, weights, tmp_path):
    result, n_steps = undisturbed
    whole, out = Path(result["out"]), tmp_path / "study"
    rng = np.random.default_rng(1)
    left_behind = []
    for _ in range(3):
        fatal = int(rng.integers(n_steps // 10, n_steps // 4))
        process = multiprocessing.get_context("fork").Process(target=_compared_until, args=(fatal, out, weights))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        left_behind.append(sorted(path.parent.name for path in out.glob("trials/*/journal.jsonl")))
        assert not (out / "report.html").exists()
    assert any(left_behind), "no kill came in the middle of a plan"
    resumed = comparing.compare(SPEC, "digits", COMPARED, out=out, weights=weights, **SETTINGS)
    assert {**resumed, "out": ""} == {**result, "out": ""}
    found, expected = contents(out), contents(whole)
    assert {name for name in expected if found.get(name) != expected[name]} <= {"log.jsonl", "report.html"}
    # The page shows times that were measured: from one log of them it has the same bytes too.
    shutil.copy(whole / "log.jsonl", out / "log.jsonl")
    pages.write(out)
    found, expected = contents(out), contents(whole)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    assert len(expected) == 39


def test_a_finished_comparison_computes_nothing_again(undisturbed, weights, monkeypatch):
    result, _ = undisturbed
    before = contents(Path(result["out"]))
    monkeypatch.setattr(comparing, "plan_for", None)
    monkeypatch.setattr(accuracy, "curve", None)
    assert comparing.compare(SPEC, "digits", COMPARED, out=result["out"], weights=weights, **SETTINGS) == result
    after = contents(Path(result["out"]))
    assert [name for name in after if after[name] != before.get(name)] == ["log.jsonl"]


def test_a_comparison_grows_by_criteria_and_seeds_as_if_they_had_been_asked_for_at_once(undisturbed, weights, tmp_path):
    result, _ = undisturbed
    out = tmp_path / "study"
    comparing.compare(SPEC, "digits", ["random", "drift"], out=out, weights=weights, **{**SETTINGS, "seeds": 1})
    kept = {name: content for name, content in contents(out).items() if name.startswith("trials/")}
    assert kept
    grown = comparing.compare(SPEC, "digits", COMPARED, out=out, weights=weights, **SETTINGS)
    assert {**grown, "out": ""} == {**result, "out": ""}
    found, expected = contents(out), contents(Path(result["out"]))
    assert {name for name in expected if found.get(name) != expected[name]} <= {"log.jsonl", "report.html"}
    assert {name: found[name] for name in kept} == kept
    with pytest.raises(UsageError, match="seeds was 2, now 1"):
        comparing.compare(SPEC, "digits", COMPARED, out=out, weights=weights, **{**SETTINGS, "seeds": 1})


def test_what_a_comparison_returns_is_what_was_measured(undisturbed, small):
    result, _ = undisturbed
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    parts = ("sauce", "lossless", "accuracy_at", "curves", "passes")
    assert set(result) == {*parts, "dense_accuracy", "notes", "refused", "out"}
    assert all(list(result[part]) == COMPARED for part in parts)
    assert result["notes"] == [
        "100 test images cannot show that accuracy is at most 1 points lower, not even with equal answers: that takes "
        "381 images or a larger --margin"
    ]
    store = Store(result["out"])
    case = small["cnn"]
    test = _test_images(case)
    with torch.no_grad():
        dense = float((case.model(test.x).argmax(1) == test.target).double().mean())
    assert result["dense_accuracy"] == pytest.approx(dense)
    for name in COMPARED:
        records = [record for record in store.finished() if record.trial.criterion == name]
        assert [record.trial.seed for record in records] == [0, 1]
        areas = []
        for points, passes, record in zip(result["curves"][name], result["passes"][name], records, strict=True):
            plan = record.plan(case.sites)
            assert [p["fraction"] for p in points] == sorted(p["fraction"] for p in points)
            for point, ratio in zip(points, [0, 0.3, 0.6, 0.9], strict=True):
                assert point["accuracy"] == pytest.approx(_masked_accuracy(case, plan.mask(ratio), test))
            assert len(passes) == len(plan.passes)
            for point, n_removed in zip(passes, plan.passes, strict=True):
                assert point["accuracy"] == pytest.approx(_masked_accuracy(case, plan.mask_of(n_removed), test))
            both = sorted(points + passes, key=lambda p: p["fraction"])
            f, a = [p["fraction"] for p in both] + [1.0], [p["accuracy"] for p in both] + [0.1]
            areas.append(100 * sum((f[i + 1] - f[i]) * (a[i] + a[i + 1]) / 2 for i in range(len(f) - 1)))
        sauce = result["sauce"][name]
        assert sauce["mean"] == pytest.approx(np.mean(areas))
        assert sauce["low"] < sauce["mean"] < sauce["high"]


def _test_images(case):
    from sukashi import data

    return data.load("digits").test.limit(100).whole(case.loaded.preprocess)


def _masked_accuracy(case, mask, test):
    with torch.no_grad(), hooks.ablated(case.model, mask):
        return float((case.model(test.x).argmax(1) == test.target).double().mean())


def test_what_is_kept_of_a_trial(undisturbed, digits_split):
    result, _ = undisturbed
    for record in Store(result["out"]).finished():
        kept = record.result
        assert kept["class_names"] == list("0123456789")
        assert kept["class_counts"] == digits_split.test.limit(100).counts.tolist()
        assert kept["chance"] == 0.1
        assert kept["notes"] == list(digits_split.read_in(1).notes)
        curve = record.curve()
        assert np.shape(kept["class_accuracy"]) == (len(curve.ratio), 10)
        weighted = np.array(kept["class_accuracy"]) @ kept["class_counts"] / 100
        np.testing.assert_allclose(weighted, curve.accuracy)
        assert kept["largest_fraction"] == curve.fraction.max()
        assert kept["cost"]["cut"]["parameters"] < kept["cost"]["dense"]["parameters"]


def test_one_seed_has_no_interval(weights, tmp_path):
    few = {**SETTINGS, "seeds": 1, "ratios": [0.5]}
    result = comparing.compare(SPEC, "digits", ["random"], out=tmp_path / "one", weights=weights, **few)
    assert (result["sauce"]["random"]["low"], result["sauce"]["random"]["high"]) == (None, None)
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("name", ["cswap", "random"])
def test_a_cut_removes_what_the_comparison_with_the_same_seed_planned(undisturbed, weights, tmp_path, name):
    result, _ = undisturbed
    (record,) = (r for r in Store(result["out"]).finished() if (r.trial.criterion, r.trial.seed) == (name, 1))
    out = tmp_path / "cut"
    prune(SPEC, "digits", name, 0.5, out=out, seed=1, calibration=8, test_images=50, weights=weights, width=8)
    assert (out / "plan.npz").read_bytes() == (record.folder / "plan.npz").read_bytes()


ELSEWHERE = """
import sys, torch, sukashi
folder, images, logits = sys.argv[1:]
loaded = sukashi.load(folder)
with torch.no_grad():
    torch.save(loaded.model(torch.load(images, weights_only=True)), logits)
"""


def test_a_cut_model_loaded_in_a_new_process_is_the_masked_model(small, weights, tmp_path):
    case, out = small["cnn"], tmp_path / "cut"
    result = sukashi.prune(SPEC, "digits", "drift", 0.5, out=out, round_to=4, calibration=4, weights=weights, width=8)
    torch.save(case.data.x, tmp_path / "images.pt")
    arguments = [str(out), str(tmp_path / "images.pt"), str(tmp_path / "logits.pt")]
    subprocess.run([sys.executable, "-c", ELSEWHERE, *arguments], check=True, timeout=100)
    found = torch.load(tmp_path / "logits.pt", weights_only=True)

    mask = pruning.round_mask(read_plan(out / "plan.npz", case.sites), 0.5, 4)
    with torch.no_grad(), hooks.ablated(case.model, mask):
        expected = case.model(case.data.x)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert 0.2 < result["ratio"] == mask.n_removed / 32 < 0.5
    assert result["cut"]["parameters"] < result["dense"]["parameters"]
    assert result["cut"]["accuracy"] == pytest.approx(_masked_accuracy(case, mask, _all_test_images(case)))
    assert Path(result["report"]).is_file()


def _all_test_images(case):
    from sukashi import data

    return data.load("digits").test.whole(case.loaded.preprocess)


def test_onnx_agrees_with_the_masked_model(small, weights, tmp_path):
    if missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]:
        pytest.skip(f"{', '.join(missing)} not installed: pip install 'sukashi[onnx]'")
    import onnxruntime

    case, out = small["cnn"], tmp_path / "cut"
    sukashi.prune(SPEC, "digits", "magnitude", 0.5, out=out, onnx=True, calibration=4, weights=weights, width=8)
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {"images": case.data.x.numpy()})
    mask = pruning.round_mask(read_plan(out / "plan.npz", case.sites), 0.5)
    with torch.no_grad(), hooks.ablated(case.model, mask):
        expected = case.model(case.data.x).numpy()
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_check_says_what_would_happen(weights, tmp_path, monkeypatch, digits_split):
    monkeypatch.chdir(tmp_path)
    found = sukashi.check(SPEC, "digits", weights=weights, width=8, calibration=8)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["model"] == SPEC
    assert found["sites"] == [
        {"layer": "conv1", "kind": "channel", "units": 8},
        {"layer": "conv3", "kind": "channel", "units": 8},
        {"layer": "fc1", "kind": "hidden", "units": 16},
    ]
    assert (found["units"], found["parameters"]) == (32, 3506)
    assert list(found["refused"]) == ["fc2"]
    assert found["class_names"] == list("0123456789")
    assert found["class_counts"] == {s.name: s.counts.tolist() for s in (digits_split.train, digits_split.test)}
    assert found["notes"] == list(digits_split.read_in(1).notes)
    # Every criterion has an estimate: one that asks about single units must be given its number of visits.
    assert set(found["estimated_seconds"]) == set(criteria.names())
    assert (found["unmeasured"], found["cannot"]) == ([], {})
    assert all(seconds >= 0 for seconds in found["estimated_seconds"].values())
    assert list(tmp_path.iterdir()) == []


def test_check_keeps_its_limit(weights):
    found = sukashi.check(SPEC, "digits", weights=weights, width=8, calibration=8, limit=0)
    assert found["estimated_seconds"] == {"random": 0.0, "magnitude": 0.0}
    assert set(found["unmeasured"]) == set(criteria.names()) - {"random", "magnitude"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": {"cswap": {"alpha": 0.1}}}, "options were given for 'cswap', which is not compared"),
        ({"options": {"random": {"alpha": 0.1}}}, "random has no option 'alpha'"),
        ({"criteria": []}, "criteria must be"),
        ({"criteria": ["random", "random"]}, "criteria must be"),
        ({"criteria": ["swap"]}, "did you mean 'cswap'"),
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"ratios": [0.5, 1.0]}, r"ratio must be in \[0, 1\), got 1.0"),
        ({"calibration": 1000}, "calibration"),
        ({"sampling": "randm"}, "unknown sampling 'randm': did you mean 'random'"),
        ({"sampling": []}, "sampling must be different names"),
        ({"sampling": ["random", "random"]}, "sampling must be different names"),
        ({"criteria": ["random", "wanda"]}, "wanda scores sites of kind weight, not 'channel'"),
        ({"mode": "mask"}, "mode must be cut or zero, got 'mask'"),
        ({"margin": 0.0}, r"margin must be in \(0, 1\), got 0.0"),
        ({"device": "tpu"}, "device must be auto, cpu or cuda, got 'tpu'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_comparison_without_meaning_is_refused_before_anything_is_written(weights, tmp_path, change, message):
    given = {"criteria": ["random"], **SETTINGS, "weights": weights, "out": tmp_path / "out", **change}
    with pytest.raises((UsageError, DataError), match=message):
        comparing.compare(SPEC, "digits", **given)
    assert not (tmp_path / "out").exists()


def test_public_names_are_those_of_their_files():
    assert sukashi.compare is comparing.compare
    assert sukashi.prune is prune
    assert sukashi.check is check.check
    assert sukashi.load is models.load
    assert sukashi.write_report is pages.write
    assert sukashi.study is study_file.run
    with pytest.raises(AttributeError, match="module 'sukashi' has no attribute 'prunes'"):
        _ = sukashi.prunes


@pytest.mark.realdata
def test_a_trained_network_on_real_images(real_data, real_weights, tmp_path):
    result = sukashi.compare(
        "sukashi:cifar_resnet20",
        str(real_data / "cifar10"),
        ["magnitude"],
        out=tmp_path / "cifar10",
        weights=real_weights / "resnet20-cifar10.safetensors",
        ratios=[0.02, 0.1, 0.5],
        seeds=1,
        test_images=500,
    )
    assert result["dense_accuracy"] > 0.85
    (points,) = result["curves"]["magnitude"]
    assert points[0]["fraction"] == 0
    assert points[1]["accuracy"] > points[3]["accuracy"], points
    (record,) = Store(result["out"]).finished()
    plan = record.plan()
    assert plan is not None
    assert plan.n_units == 448
    model = models.load("sukashi:cifar_resnet20", weights=real_weights / "resnet20-cifar10.safetensors").model
    assert len(finder.find(model, torch.randn(2, 3, 32, 32)).sites) == 12


def test_samplings_compete_and_what_looks_at_no_image_runs_once(weights, tmp_path):
    out, few = tmp_path / "sampled", {**SETTINGS, "seeds": 1, "ratios": [0.3]}
    result = comparing.compare(
        SPEC, "digits", ["taylor", "magnitude"], sampling=["random", "clustering"], out=out, weights=weights, **few
    )
    assert list(result["sauce"]) == ["taylor", "taylor/clustering", "magnitude"]
    plain = comparing.compare(SPEC, "digits", ["taylor"], out=tmp_path / "plain", weights=weights, **few)
    assert result["sauce"]["taylor"] == plain["sauce"]["taylor"]
    kept = {record.trial.contender: record for record in Store(out).finished()}
    (alone,) = Store(plain["out"]).finished()
    assert kept["taylor"].trial.key == alone.trial.key, "random sampling is in no hash: older results keep their names"
    drawn = [kept[name].plan().unit.tolist() for name in ("taylor", "taylor/clustering")]
    assert drawn[0] != drawn[1]
    prune(SPEC, "digits", "taylor", 0.3, sampling="clustering", out=tmp_path / "cut", weights=weights, **CUT)
    assert (tmp_path / "cut" / "plan.npz").read_bytes() == (kept["taylor/clustering"].folder / "plan.npz").read_bytes()
    page = (out / "report.html").read_text()
    assert "taylor/clustering" in page


@pytest.mark.filterwarnings("ignore:.*has random weights")
def test_a_class_without_correct_images_is_refused_before_the_first_trial(tmp_path):
    with pytest.raises(DataError, match="no image in train that the model classifies correctly"):
        comparing.compare(
            SPEC, "digits", ["magnitude", "taylor"], sampling="confidence", out=tmp_path / "out", **SETTINGS
        )
    assert not (tmp_path / "out").exists()


CUT = {"calibration": 8, "test_images": 50, "width": 8}


def test_a_sparse_model_has_the_figures_of_its_zeros(small, weights, tmp_path):
    case, out = small["cnn"], tmp_path / "sparse"
    scope = {"scope": "row", "exclude": ["conv1"], "sequential": True}
    result = sukashi.prune(SPEC, "digits", "wanda", 0.5, out=out, weights=weights, **scope, **CUT)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    back = models.load(str(out))
    kept = {name: layer for name, layer in case.model.named_modules() if hasattr(layer, "weight") and name != "conv1"}
    n_removed = n_weights = 0
    for row in result["layers"]:
        before, after = kept[row["layer"]].weight, back.model.get_submodule(row["layer"]).weight
        rows = before.flatten(1)
        assert row == {
            "layer": row["layer"],
            "shape": list(before.shape),
            "weights": before.numel(),
            "removed": len(rows) * (rows.shape[1] // 2),
        }
        assert ((after == 0).flatten(1).sum(1) == rows.shape[1] // 2).all()
        assert torch.equal(after, before * (after != 0))
        n_removed, n_weights = n_removed + row["removed"], n_weights + row["weights"]
    assert torch.equal(back.model.conv1.weight, case.model.conv1.weight)
    assert [site.layer for site in back.mask.keep] == [row["layer"] for row in result["layers"]]
    assert result["ratio"] == result["sparse"]["sparsity"] == n_removed / n_weights
    assert result["sparse"]["zeros"] == n_removed / 3506
    assert result["dense"]["zeros"] == 0
    assert [result["sparse"][name] for name in ("parameters", "bytes", "flops")] == [
        result["dense"][name] for name in ("parameters", "bytes", "flops")
    ]
    test = datasets.load("digits").test.limit(50).whole(back.preprocess)
    with torch.no_grad():
        right = (back.model(test.x).argmax(1) == test.target).double().mean().item()
    assert result["sparse"]["accuracy"] == pytest.approx(right)
    assert "Masked zeros are not compression" in (out / "report.html").read_text()
    read = {"calibration": 8, "test_images": 50}
    again = sukashi.prune(
        str(out), "digits", "magnitude", 0.7, scope="layer", exclude=["conv1"], out=tmp_path / "more", **read
    )
    assert again["sparse"]["sparsity"] == pytest.approx(0.7, abs=0.01)
    assert again["dense"]["zeros"] == result["sparse"]["zeros"]


def test_onnx_of_a_sparse_model(weights, tmp_path):
    sukashi.prune(
        SPEC,
        "digits",
        "magnitude",
        0.5,
        scope="2:4",
        exclude=["conv1"],
        onnx=True,
        out=tmp_path / "o",
        weights=weights,
        **CUT,
    )
    assert (tmp_path / "o" / "model.onnx").exists()


def test_a_layer_without_weights_is_said(weights, tmp_path):
    result = sukashi.prune(SPEC, "digits", "random", 0.999, scope="global", out=tmp_path / "o", weights=weights, **CUT)
    assert any("has no weight left" in warning for warning in result["warnings"])


def test_zeroed_units_are_counted_as_units_and_cost_nothing_less(small, weights, tmp_path):
    few = {**SETTINGS, "seeds": 1, "ratios": [0.3, 0.6]}
    cut = comparing.compare(SPEC, "digits", ["taylor"], out=tmp_path / "cut", weights=weights, **few)
    zero = comparing.compare(SPEC, "digits", ["taylor"], mode="zero", out=tmp_path / "zero", weights=weights, **few)
    (of_cut,), (of_zero,) = cut["curves"]["taylor"], zero["curves"]["taylor"]
    assert [p["accuracy"] for p in of_zero] == [p["accuracy"] for p in of_cut]
    assert [p["fraction"] for p in of_zero] == [0, 10 / 32, 19 / 32]
    assert zero["lossless"]["taylor"]["fraction"] == zero["lossless"]["taylor"]["ratio"]
    (record,) = Store(zero["out"]).finished()
    assert "cost" not in record.result
    pages = {name: (tmp_path / name / "report.html").read_text() for name in ("cut", "zero")}
    assert "Units were zeroed" in pages["zero"]
    assert "parameters removed" not in pages["zero"]
    assert "units zeroed" not in pages["cut"]
    with pytest.raises(UsageError, match=r"mode was \"cut\", now \"zero\""):
        comparing.compare(SPEC, "digits", ["taylor"], mode="zero", out=tmp_path / "cut", weights=weights, **few)


def test_a_zeroed_model_loads_as_a_dense_one_with_silent_units(small, weights, tmp_path):
    case, out = small["cnn"], tmp_path / "zeroed"
    result = sukashi.prune(SPEC, "digits", "taylor", 0.4, mode="zero", out=out, weights=weights, **CUT)
    back = models.load(str(out))
    mask = read_plan(out / "plan.npz", case.sites).mask(0.4)
    with torch.no_grad(), hooks.ablated(case.model, mask):
        expected = case.model(case.data.x)
    with torch.no_grad():
        found = back.model(case.data.x)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert [p.shape for p in back.model.parameters()] == [p.shape for p in case.model.parameters()]
    assert result["ratio"] == mask.n_removed / 32 == 13 / 32, "nothing is rounded"
    assert (result["cut"]["parameters"], result["cut"]["fraction"]) == (3506, 0)
    assert "Units were zeroed" in (out / "report.html").read_text()
    with pytest.raises(UsageError, match="round_to is for widths, and mode zero changes none, got 8"):
        sukashi.prune(SPEC, "digits", "taylor", 0.4, mode="zero", round_to=8, out=tmp_path / "no", weights=weights)
