"""Comparisons: what they find is what was measured, who competes, how they grow, and what is refused."""

import html
import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import sukashi
from cases import a_curve
from sukashi import data as datasets
from sukashi import models
from sukashi.core.errors import DataError, ModelError, UsageError
from sukashi.core.stats import crossed
from sukashi.criteria.plans import plan_of
from sukashi.experiments.compare.contenders import contenders, curve_of, name_of, sampling_of
from sukashi.experiments.compare.summary import CompareResult
from sukashi.experiments.workspace import Workspace
from sukashi.network import hooks
from sukashi.network import sites as finder
from sukashi.report.networks import timed

SPEC = "sukashi:digits_cnn"
COMPARED = ["random", "taylor", "cswap", "drift"]
SETTINGS = {"ratios": [0.3, 0.6, 0.9], "seeds": 2, "calibration": 8, "test_images": 100, "width": 8}
FEW = {**SETTINGS, "seeds": 1, "ratios": [0.3, 0.6]}
CUT = {"calibration": 8, "test_images": 50, "width": 8}


def compare(criteria, out, weights, **settings):
    return sukashi.compare(SPEC, "digits", criteria, out=out, weights=weights, **{**SETTINGS, **settings})


@pytest.fixture(scope="module")
def compared(cnn_weights, tmp_path_factory):
    return compare(COMPARED, tmp_path_factory.mktemp("whole") / "compared", cnn_weights)


def kept(result):
    """What results.json has of a result."""
    return {name: value for name, value in result.to_json().items() if name not in CompareResult.of_call}


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def trials(result):
    """{(contender, seed): record}."""
    return {
        (name_of(record.about["criterion"], sampling_of(record)), record.about["seed"]): record
        for record in Workspace(result.out).records()
    }


@pytest.mark.slow
def test_a_comparison_grows_by_criteria_and_seeds_as_if_they_had_been_asked_for_at_once(
    compared, cnn_weights, tmp_path
):
    out = tmp_path / "compared"
    compare(["random", "drift"], out, cnn_weights, seeds=1)
    before = {name: content for name, content in contents(out).items() if name.startswith("trials/")}
    assert len(before) == 6
    grown = compare(COMPARED, out, cnn_weights)
    assert kept(grown) == kept(compared)
    assert not grown.finished
    found, expected = contents(out), contents(Workspace(compared.out).folder)
    assert found.keys() == expected.keys()
    # The page shows times that were measured.
    assert {name for name in expected if found[name] != expected[name]} <= {
        *("log.jsonl", "report.html", "tables/costs.csv", "tables/costs.tex")
    }
    assert {name: found[name] for name in before} == before
    with pytest.raises(UsageError, match="seeds was 2, now 1"):
        compare(COMPARED, out, cnn_weights, seeds=1)
    with pytest.raises(UsageError, match=r"ratios was \[0.0,0.3,0.6,0.9\], now \[0.0,0.3,0.6,0.9,0.95\]"):
        compare(COMPARED, out, cnn_weights, ratios=[0.3, 0.6, 0.9, 0.95])
    # Options of what was compared already would change what is there.
    with pytest.raises(UsageError, match="options"):
        compare(COMPARED, out, cnn_weights, options={"cswap": {"alpha": 0.1}})
    assert {name: found[name] for name in before} == before
    # Memory that ran out is no other comparison.
    assert compare(COMPARED, out, cnn_weights, options={"cswap": {"budget": 0}}).finished


def test_what_a_comparison_returns_is_what_was_measured(compared, small):
    told = json.loads(json.dumps(compared.to_json(), allow_nan=False))
    assert told == compared.to_json()
    assert json.loads((Workspace(compared.out).folder / "results.json").read_text()) == kept(compared)
    assert (compared.model, compared.data, compared.n_images, compared.removes) == (SPEC, "digits", 100, "parameters")
    assert set(compared.contenders) == set(COMPARED)
    assert [compared.sauce[name]["mean"] for name in compared.contenders] == sorted(
        (compared.sauce[name]["mean"] for name in COMPARED), reverse=True
    )
    for part in ("sauce", "sauces", "seeds", "relative_sauce", "lossless", "accuracy_at", "curves", "passes"):
        assert list(told[part]) == compared.contenders
    assert compared.warnings == [
        "digits has no test split: 20% of each class held out by seed 0, 359 images; the weights come from elsewhere, "
        "so that these images may have been trained on: accuracy can flatter",
    ]
    (read,) = compared.notes
    assert read.startswith(
        "images are read as 8 x 8, mean 0, std 1, whole images resized, aspect ratio not kept (sukashi's "
    )
    case = small["cnn"]
    test = _test_images(case)
    with torch.no_grad():
        dense = float((case.model(test.x).argmax(1) == test.target).double().mean())
    assert compared.dense_accuracy == pytest.approx(dense)
    records, n_parameters = trials(compared), sum(p.numel() for p in case.model.parameters())
    for name in COMPARED:
        assert compared.seeds[name] == [0, 1]
        areas = []
        for seed, points, passes in zip((0, 1), compared.curves[name], compared.passes[name], strict=True):
            plan = plan_of(records[name, seed].arrays("plan"), case.sites)
            assert [p["removed"] for p in points] == sorted(p["removed"] for p in points)
            assert [p["removed"] for p in points] == [p["parameters_removed"] for p in points]
            for point, ratio in zip(points, [0, 0.3, 0.6, 0.9], strict=True):
                assert point["ratio_asked"] == ratio
                assert point["units_removed"] == plan.mask(ratio).n_removed / 32
                assert point["accuracy"] == pytest.approx(_masked_accuracy(case, plan.mask(ratio), test))
            assert points[0]["removed"] == 0
            half = compared.costs[name]["parameters"]
            assert 0 < half < n_parameters == compared.costs["dense"]["parameters"]
            assert len(passes) == len(plan.passes)
            for point, n_removed in zip(passes, plan.passes, strict=True):
                assert (point["ratio_asked"], point["units_removed"]) == (None, n_removed / 32)
                assert point["accuracy"] == pytest.approx(_masked_accuracy(case, plan.mask_of(n_removed), test))
            f, a = [p["removed"] for p in points] + [1.0], [p["accuracy"] for p in points] + [0.1]
            areas.append(100 * sum((f[i + 1] - f[i]) * (a[i] + a[i + 1]) / 2 for i in range(len(f) - 1)))
        assert compared.sauces[name] == pytest.approx(areas)
        sauce = compared.sauce[name]
        assert sauce["mean"] == pytest.approx(np.mean(areas))
        assert sauce["low"] < sauce["mean"] < sauce["high"]
        assert sauce["n"] == 2
        assert compared.relative_sauce[name]["mean"] == pytest.approx(np.mean(areas) / dense)
    assert [len(compared.pass_means[name]) for name in compared.pass_means] == [
        max(map(len, compared.passes[name])) for name in compared.contenders if any(compared.passes[name])
    ]


def test_every_pair_is_compared_once_the_better_first(compared):
    pairs = [(pair["first"], pair["second"]) for pair in compared.differences]
    names = compared.contenders
    assert pairs == [(one, other) for place, one in enumerate(names) for other in names[place + 1 :]]
    for pair in compared.differences:
        first, second = (np.array(compared.sauces[pair[side]]) for side in ("first", "second"))
        assert pair["mean"] == pytest.approx((first - second).mean(), abs=1e-12)
        assert pair["mean"] >= -1e-12
        assert pair["low"] <= pair["mean"] <= pair["high"]
        assert pair["n"] == 2
        assert pair["p"] <= pair["p_holm"] <= 1


def _test_images(case):
    return datasets.load("digits").test.limit(100).whole(case.loaded.preprocess)


def _masked_accuracy(case, mask, test):
    with torch.no_grad(), hooks.ablated(case.model, mask):
        return float((case.model(test.x).argmax(1) == test.target).double().mean())


def test_what_is_kept_of_a_trial(compared, digits_split):
    for record in trials(compared).values():
        found = record.result
        assert found["class_names"] == list("0123456789")
        assert found["chance"] == 0.1
        assert [said[:18] for said in found["notes"]] == ["images are read as"]
        curve = curve_of(record)
        assert np.bincount(curve.target).tolist() == digits_split.test.limit(100).counts.tolist()
        np.testing.assert_array_equal(curve.answer == curve.target, curve.correct)
        assert curve.flops[0] == found["cost"]["dense"]["flops"]
        assert found["cost"]["cut"]["parameters"] < found["cost"]["dense"]["parameters"]
        assert not (record.folder / "under_way").exists()


def test_a_curve_comes_back_as_it_was_kept(compared, tmp_path):
    from sukashi.core.experiment import Trial
    from sukashi.experiments.compare.contenders import save_curve

    rng = np.random.default_rng(0)
    curve = a_curve(
        rng.random((3, 13)) > 0.4,  # no whole number of bytes
        [0.0, 0.2, 0.6],
        ratio=[0.0, np.nan, 0.5],
        n_removed=[0, 2, 4],
        target=rng.integers(3, size=13),
        image_ids=[f"test/{i}é" for i in range(13)],
    )
    space, trial = Workspace(tmp_path / "out"), Trial({"seed": 0}, run=lambda desk: None)
    space.claim("compare", {}, [trial])
    with space.lease(trial) as desk:
        save_curve(desk, curve)
        desk.finish({})
    (record,) = space.records()
    back = curve_of(record)
    for name in ("ratio", "n_removed", "fraction", "flops", "answer", "target", "correct"):
        np.testing.assert_array_equal(getattr(back, name), getattr(curve, name))
    assert back.image_ids == curve.image_ids
    assert back.correct.dtype == bool
    path = record.folder / "curve.npz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"curve\.npz can't be read \(it was altered\)"):
        curve_of(record)


def test_the_table_has_a_row_for_each_measured_point_and_pass(compared):
    rows = compared.table()
    read = pq.read_table(Workspace(compared.out).folder / "results.parquet").to_pylist()
    assert read == rows
    for kind, points in (("ratio", compared.curves), ("pass", compared.passes)):
        for name in COMPARED:
            for place, seed in enumerate(compared.seeds[name]):
                of_seed = [r for r in rows if (r["point"], r["contender"], r["seed"]) == (kind, name, seed)]
                assert [r["accuracy"] for r in of_seed] == [p["accuracy"] for p in points[name][place]]
                assert [r["ratio_asked"] for r in of_seed] == [p["ratio_asked"] for p in points[name][place]]
                assert {r["sauce"] for r in of_seed} <= {compared.sauces[name][place]}
    first = next(row for row in rows if row["contender"] == "cswap" and row["point"] == "pass")
    point = compared.passes["cswap"][0][0]
    assert first == {
        "model": SPEC,
        "weights_sha256": Workspace(compared.out).identity["model"]["weights_sha256"],
        "data": "digits",
        "contender": "cswap",
        "criterion": "cswap",
        "sampling": "random",
        "repair": "none",
        "options": "{}",
        "calibration": 8,
        "mode": "cut",
        "seed": 0,
        "point": "pass",
        "pass": 1,
        "ratio_asked": None,
        "n_units_removed": round(32 * point["units_removed"]),
        "units_removed": point["units_removed"],
        "parameters_removed": point["parameters_removed"],
        "flops_removed": point["flops_removed"],
        "accuracy": point["accuracy"],
        "n_images": 100,
        "sauce": compared.sauces["cswap"][0],
    }


def test_a_frame_is_the_table(compared):
    pytest.importorskip("pandas")
    frame = compared.frame()
    assert list(frame.columns) == list(compared.columns)
    assert frame.attrs["sauce"] == compared.columns["sauce"][1]
    of_ratio = frame[frame.point == "ratio"]
    means = of_ratio.pivot_table(index="ratio_asked", columns="contender", values="accuracy")
    for name in COMPARED:
        expected = np.mean([[point["accuracy"] for point in points] for points in compared.curves[name]], axis=0)
        assert means[name].to_list() == pytest.approx(expected)
    zeroed = compared.model_copy(update={"curves": {}, "passes": {}, "contenders": []}).frame()
    assert zeroed["parameters_removed"].dtype == "float64"


def test_what_is_printed(compared):
    text = compared.text()
    assert repr(compared) == str(compared) == text
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.split()[:1]}
    for name in COMPARED:
        sauce = compared.sauce[name]
        each = [f"{compared.sauces[name][seed]:.1f}" for seed in range(2)]
        assert rows[name][1:4] == [f"{sauce['mean']:.1f}", f"{each[0]},", each[1]], "two seeds bound too little"
    assert "ratio, at most 1 point lower" in text
    for name in ("cswap", "random"):
        (asked,) = {record.result["n_evaluations"] for key, record in trials(compared).items() if key == (name, 0)}
        assert f"  {asked:,}" in next(line for line in text.splitlines() if line.startswith(name))
    assert f"dense accuracy {compared.dense_accuracy:.1%} on 100 test images" in text
    assert text.endswith(f"Report: {compared.report}")
    assert "can't be said with 100 test images" in text
    assert re.search(r"Give `margin=0\.\d+`, the least that 100 images can show", text)
    clocked = compared.model_copy(
        update={"latency": {"random": timed([{"dense_ms": [2.0] * 6, "cut_ms": [3.0] * 6}])}, "finished": True}
    )
    assert "warning: random: the cut network takes 1.50 (1.50 to 1.50) times as long as the dense one" in clocked.text()
    assert f"{compared.out} was finished already: nothing was done" in clocked.text()


def test_one_seed_has_an_interval_over_images(cnn_weights, tmp_path):
    result = compare(["magnitude"], tmp_path / "one", cnn_weights, **{**FEW, "ratios": [0.5]})
    found = crossed([contenders(Workspace(result.out))[0].areas()[0]], bounds=(0, 100))
    sauce = result.sauce["magnitude"]
    assert (sauce["mean"], sauce["low"], sauce["high"]) == pytest.approx((found.mean, found.low, found.high))
    assert found.low < found.mean
    json.dumps(result.to_json(), allow_nan=False)


def test_a_layer_that_is_excluded_is_in_no_plan(cnn_weights, tmp_path):
    result = compare(["magnitude"], tmp_path / "out", cnn_weights, seeds=1, exclude=["conv1"])
    (record,) = trials(result).values()
    assert record.about["exclude"] == ["conv1"]
    sites = sukashi.open(
        SPEC, "digits", weights=cnn_weights, **{k: v for k, v in SETTINGS.items() if k == "width"}
    ).sites
    left = [site for site in sites if site.layer != "conv1"]
    assert sum(site.n_units for site in left) == len(plan_of(record.arrays("plan"), left).unit)


def test_zeroed_units_are_counted_as_units_and_cost_nothing_less(cnn_weights, tmp_path):
    cut = compare(["taylor"], tmp_path / "cut", cnn_weights, **FEW)
    zero = compare(["taylor"], tmp_path / "zero", cnn_weights, mode="zero", **FEW)
    (of_cut,), (of_zero,) = cut.curves["taylor"], zero.curves["taylor"]
    assert [p["accuracy"] for p in of_zero] == [p["accuracy"] for p in of_cut]
    assert [p["removed"] for p in of_zero] == [p["units_removed"] for p in of_zero] == [0, 10 / 32, 19 / 32]
    assert [p["units_removed"] for p in of_cut] == [0, 10 / 32, 19 / 32]
    assert {p["parameters_removed"] for p in of_zero} == {None}
    assert (cut.removes, zero.removes) == ("parameters", "units")
    free = zero.lossless["taylor"]
    assert free["removed"] == free["units_removed"]
    assert free["parameters_removed"] is None
    assert cut.lossless["taylor"]["parameters_removed"] == cut.lossless["taylor"]["removed"]
    (record,) = Workspace(zero.out).records()
    assert "cost" not in record.result
    assert (zero.costs, zero.latency) == ({}, {})
    assert (set(cut.latency), set(cut.costs)) == ({"taylor"}, {"dense", "taylor"})
    pages = {name: (tmp_path / name / "report.html").read_text() for name in ("cut", "zero")}
    assert "Units were zeroed" in pages["zero"]
    assert "parameters removed" not in pages["zero"]
    assert "units zeroed" not in pages["cut"]
    with pytest.raises(UsageError, match=r"mode was \"cut\", now \"zero\""):
        compare(["taylor"], tmp_path / "cut", cnn_weights, mode="zero", **FEW)


def test_samplings_compete_and_what_looks_at_no_image_runs_once(cnn_weights, tmp_path):
    few = {**FEW, "ratios": [0.3], "mode": "zero"}
    sampling = ["random", "clustering"]
    result = compare(["taylor", "magnitude"], tmp_path / "sampled", cnn_weights, sampling=sampling, **few)
    assert set(result.contenders) == {"taylor", "taylor/clustering", "magnitude"}
    plain = compare(["taylor"], tmp_path / "plain", cnn_weights, **few)
    assert result.sauce["taylor"] == plain.sauce["taylor"]
    found, (alone,) = trials(result), Workspace(plain.out).records()
    assert found["taylor", 0].key == alone.key, "random sampling goes without saying"
    drawn = [plan_of(found[name, 0].arrays("plan")).unit.tolist() for name in ("taylor", "taylor/clustering")]
    assert drawn[0] != drawn[1]
    by_name = {one.name: (one.criterion, one.sampling) for one in contenders(Workspace(result.out))}
    assert by_name["taylor/clustering"] == ("taylor", "clustering")
    assert by_name["magnitude"] == ("magnitude", "random")
    sukashi.prune(
        SPEC, "digits", "taylor", 0.3, sampling="clustering", out=tmp_path / "cut", weights=cnn_weights, **CUT
    )
    assert (tmp_path / "cut" / "plan.npz").read_bytes() == found["taylor/clustering", 0].read("plan.npz")
    assert "taylor/clustering" in (tmp_path / "sampled" / "report.html").read_text()


@pytest.mark.parametrize("name", ["cswap", "random"])
def test_a_cut_removes_what_the_comparison_with_the_same_seed_planned(compared, cnn_weights, tmp_path, name):
    record = trials(compared)[name, 1]
    result = sukashi.prune(SPEC, "digits", name, 0.5, out=tmp_path / "cut", seed=1, weights=cnn_weights, **CUT)
    for figure in ("peak_bytes", "batch_size", "parameters", "bytes"):
        assert result.dense[figure] == compared.costs["dense"][figure], "of the same network, on as many images"
    assert (tmp_path / "cut" / "plan.npz").read_bytes() == record.read("plan.npz")


@pytest.mark.filterwarnings("ignore:.*has random weights")
def test_a_class_without_correct_images_is_refused_before_the_first_trial(tmp_path):
    with pytest.raises(DataError, match="no image in train that the model classifies correctly"):
        sukashi.compare(
            SPEC, "digits", ["magnitude", "taylor"], sampling="confidence", out=tmp_path / "out", **SETTINGS
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": {"cswap": {"alpha": 0.1}}}, "options were given for 'cswap', which is not compared"),
        ({"options": {"random": {"alpha": 0.1}}}, "random has no option 'alpha'"),
        ({"criteria": []}, "criteria must be"),
        ({"criteria": ["random", "random"]}, "criteria must be"),
        ({"criteria": ["swap"]}, "did you mean 'cswap'"),
        ({"seeds": 0}, "`seeds` must be at least 1, got 0"),
        ({"ratios": [0.5, 1.0]}, r"ratio must be in \[0, 1\), got 1.0"),
        ({"calibration": 1000}, "calibration"),
        ({"sampling": "randm"}, "unknown sampling 'randm': did you mean 'random'"),
        ({"sampling": []}, "sampling must be different names"),
        ({"sampling": ["random", "random"]}, "sampling must be different names"),
        ({"criteria": ["random", "wanda"]}, "wanda scores sites of kind weight, not 'channel'"),
        ({"mode": "mask"}, "`mode` must be cut or zero, got 'mask'"),
        ({"margin": 0.0}, r"`margin` must be in \(0, 1\), got 0.0"),
        ({"device": "tpu"}, "`device` must be auto, cpu or cuda, got 'tpu'"),
        ({"jobs": 0}, "jobs must be at least 1, got 0"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_comparison_without_meaning_is_refused_before_anything_is_written(cnn_weights, tmp_path, change, message):
    given = {"criteria": ["random"], **SETTINGS, "weights": cnn_weights, "out": tmp_path / "out", **change}
    with pytest.raises((UsageError, DataError), match=message):
        sukashi.compare(SPEC, "digits", **given)
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:.*has random weights")
def test_a_criterion_that_refuses_the_model_stops_everything_unless_it_may_be_left_out(tmp_path):
    given = {"mode": "zero", "calibration": 4, "test_images": 50, "seeds": 1, "ratios": [0.5]}
    named = ("sukashi:digits_vit", "digits", ["backtrace", "magnitude"])
    with pytest.raises(ModelError, match="backtrace has no rule for LayerNorm"):
        sukashi.compare(*named, out=tmp_path / "strict", **given)
    assert not (tmp_path / "strict").exists()
    result = sukashi.compare(*named, out=tmp_path / "left", skip_refused=True, **given)
    assert result.contenders == ["magnitude"]
    assert "no rule for LayerNorm" in result.refused["backtrace"]
    assert f"backtrace is left out, it refused the model: {result.refused['backtrace']}" in result.text()
    page = html.unescape(re.sub("<[^>]*>", "", Path(result.report).read_text()))
    for said in (result.text(), page):
        assert said.count(result.refused["backtrace"]) == 1
    with pytest.raises(
        ModelError, match=r"backtrace refuses the model: .*give `skip_refused=True` again, or another `out`"
    ):
        sukashi.compare(*named, out=tmp_path / "left", **given)


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
    assert result.dense_accuracy > 0.85
    (points,) = result.curves["magnitude"]
    assert points[0]["removed"] == 0
    assert points[1]["accuracy"] > points[3]["accuracy"], points
    (record,) = Workspace(result.out).records()
    assert plan_of(record.arrays("plan")).n_units == 448
    model = models.load("sukashi:cifar_resnet20", weights=real_weights / "resnet20-cifar10.safetensors").model
    assert len(finder.find(model, torch.randn(2, 3, 32, 32)).sites) == 12
