"""Levels: networks pruned and trained to ratios of units or weights, kept as saved folders; what is said of them."""

import html
import json
import re
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

import sukashi
from sukashi import models
from sukashi.core import progress, stats
from sukashi.core.errors import SukashiError, UsageError
from sukashi.core.schema import checked
from sukashi.experiments.bench import Source
from sukashi.experiments.executor import execute
from sukashi.experiments.schedule import levels, page, run, summary
from sukashi.experiments.schedule.settings import Scheduled
from sukashi.experiments.schedule.summary import Outcome, ScheduleResult
from sukashi.experiments.workspace import TRIAL, UNDER_WAY, Record, Workspace
from sukashi.network import sites
from sukashi.training.settings import Training

SPEC = "sukashi:digits_cnn"
READING = {"width": 4, "calibration": 2, "test_images": 100}


SETTINGS = {"epochs": 2, "batch_size": 128, "lr": 0.1}


def course(trained=False, **changes):
    given = {"schedule": "lottery", "criteria": ["magnitude"], "ratios": [0.3, 0.6], "scope": "global", **changes}
    used = ([] if trained else ["training"]) + ([] if given["schedule"] == "lottery" else ["finetuning"])
    return {**dict.fromkeys(used, SETTINGS), **given}


def ran(chosen, out, **reading):
    """The levels of a course, in a folder."""
    given = {"model": SPEC, "data": "digits", "out": str(out), **READING, **reading, **chosen}
    return execute(checked(Scheduled, given), command="test")


def found_by(result):
    """What was found, whatever the call and the folder."""
    return {name: value for name, value in result.to_json().items() if name not in result.of_call}


@pytest.fixture(scope="module")
def lottery(tmp_path_factory):
    out = tmp_path_factory.mktemp("levels") / "study"
    chosen = course(seeds=2, enforce_mask=[True, False])
    return ran(chosen, out), out, chosen


@pytest.fixture(scope="module")
def weights(small, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "cnn.safetensors"
    safetensors.torch.save_file(small["cnn"].model.state_dict(), path)
    return path


def weights_of(loaded):
    return torch.cat([loaded.model.get_submodule(s.layer).weight.flatten() for s in sites.weights(loaded.model)])


def test_every_level_is_a_saved_model_with_its_share_of_zeros(lottery):
    result, out, _ = lottery
    assert [(row["contender"], row["ratio_asked"]) for row in result.levels] == [
        (name, ratio) for name in ("magnitude", "magnitude/unenforced") for ratio in (0.3, 0.6)
    ]
    for seed in "01":
        smaller = None
        for ratio in ("0.30", "0.60"):
            network = models.load(str(out / "magnitude" / seed / ratio))
            zeros = weights_of(network) == 0
            assert int(zeros.sum()) == int(len(zeros) * float(ratio))
            assert smaller is None or bool(zeros[smaller].all()), "what is gone stays gone"
            smaller = zeros
            leaky = models.load(str(out / "magnitude-unenforced" / seed / ratio))
            assert leaky.mask is None
            assert float((weights_of(leaky) == 0).float().mean()) < 0.5 * float(ratio)
    enforced, leaky = result.levels[1], result.levels[3]
    assert enforced["weights_removed"] == pytest.approx(0.6, abs=1e-3) == enforced["zeros_in_masked_layers"]
    assert leaky["weights_removed"] == pytest.approx(0.6, abs=1e-3)
    assert leaky["weights_removed"] != pytest.approx(leaky["zeros_in_masked_layers"], abs=0.2)
    for row in result.levels:
        assert row["units_removed"] is None, "of weights"
        assert row["parameters_removed"] == 0, "masked zeros are not compression"


def test_what_a_level_keeps_is_what_its_network_does(lottery, digits_split):
    _, out, _ = lottery
    for place in ("dense/1", "magnitude/1/0.60", "magnitude-unenforced/0/0.30"):
        network, record = models.load(str(out / place)), Record(out / place)
        test = digits_split.test.limit(100).whole(network.preprocess)
        with torch.no_grad():
            right = (network.model(test.x).argmax(1) == test.target).numpy()
        kept = record.arrays("correct")
        assert np.array_equal(np.unpackbits(kept["correct"], count=int(kept["n"])), right)
        assert record.result["accuracy"] == pytest.approx(right.mean())
        assert len(record.result["history"]) == 2


def test_figures_are_those_of_the_kept_networks(lottery):
    result, out, _ = lottery
    records = Workspace(out).records()
    assert len(records) == 2 * (1 + 2 * 2)
    assert all(record.result["n_images"] == 100 for record in records)

    def right(name, ratio):
        of = [r.result["accuracy"] for r in records if (r.about["contender"], r.about["ratio_asked"]) == (name, ratio)]
        assert len(of) == 2
        return np.mean(of)

    rows = {(r["contender"], r["ratio_asked"]): r for r in result.levels}
    for name in ("magnitude", "magnitude/unenforced"):
        for ratio in (0.3, 0.6):
            assert rows[name, ratio]["accuracy"]["mean"] == pytest.approx(right(name, ratio))
            change = right(name, ratio) - right("dense", 0)
            assert rows[name, ratio]["difference"]["mean"] == pytest.approx(change)
            assert rows[name, ratio]["difference"]["low"] <= change <= rows[name, ratio]["difference"]["high"]
    pair = next(p for p in result.pairs if p["ratio_asked"] == 0.6)
    assert pair["difference"]["mean"] == pytest.approx(
        rows["magnitude", 0.6]["accuracy"]["mean"] - rows["magnitude/unenforced", 0.6]["accuracy"]["mean"]
    )
    page = (out / "report.html").read_text()
    assert "Masked zeros" in page
    assert "magnitude/unenforced" in page


def test_a_study_goes_on_from_the_level_it_had_reached(lottery, tmp_path, monkeypatch):
    result, whole, chosen = lottery
    out = tmp_path / "study"
    shutil.copytree(whole, out)
    for gone in ("magnitude/1/0.60", "magnitude-unenforced/1"):
        shutil.rmtree(out / gone)
    again = ran(chosen, out)
    assert found_by(again) == found_by(result)
    assert not again.finished
    for path in sorted(whole.rglob("model.safetensors")):
        assert (out / path.relative_to(whole)).read_bytes() == path.read_bytes()
    monkeypatch.setattr(levels, "fit", None)
    assert ran(chosen, out) == again.model_copy(update={"finished": True})
    with pytest.raises(UsageError, match=r"rewind was 0, now 1"):
        ran(chosen | {"rewind": 1}, out)


def test_a_training_under_way_goes_on_where_it_was(lottery, tmp_path, monkeypatch):
    _, whole, chosen = lottery
    out, plain, resumed = tmp_path / "study", levels.fit, []

    def noted(*args, **options):
        fitted = plain(*args, **options)
        resumed.append((str(options["out"].relative_to(out)), fitted.resumed))
        if len(resumed) == 2:
            raise KeyboardInterrupt  # after the last step, before anything of the level is saved
        return fitted

    monkeypatch.setattr(levels, "fit", noted)
    with pytest.raises(KeyboardInterrupt):
        ran(chosen | {"seeds": 1, "ratios": [0.3]}, out)
    assert (out / "magnitude/0/0.30" / UNDER_WAY).is_dir()
    assert not (out / "magnitude/0/0.30" / TRIAL).exists()
    ran(chosen | {"seeds": 1, "ratios": [0.3]}, out)
    n_steps = 2 * -(-1294 // 128)
    assert resumed[:3] == [
        (f"dense/0/{UNDER_WAY}", 0),
        (f"magnitude/0/0.30/{UNDER_WAY}", 0),
        (f"magnitude/0/0.30/{UNDER_WAY}", n_steps),
    ]
    level = "magnitude/0/0.30/model.safetensors"
    assert (out / level).read_bytes() == (whole / level).read_bytes()


@pytest.mark.slow
def test_a_study_grows_as_if_all_had_been_asked_for_at_once(lottery, tmp_path, monkeypatch):
    result, whole, chosen = lottery
    first = chosen | {"seeds": 1, "ratios": [0.3], "enforce_mask": [True]}
    out = tmp_path / "study"
    out.mkdir()  # free like a folder that is not there
    ran(first, out)
    (out / "magnitude/0/0.30" / UNDER_WAY).mkdir()  # killed before it could remove this
    assert found_by(ran(chosen, out)) == found_by(result)
    for path in sorted(whole.rglob("model.safetensors")):
        assert (out / path.relative_to(whole)).read_bytes() == path.read_bytes()
    assert not list(out.rglob(UNDER_WAY))
    monkeypatch.setattr(levels, "fit", None)
    for less in ({"seeds": 1}, {"ratios": [0.3]}, {"ratios": [0.2, 0.3, 0.6]}, {"criteria": ["random"]}):
        with pytest.raises(UsageError, match="is an existing output folder of another trial"):
            ran(chosen | less, out)


def test_a_schedule_from_keywords_is_its_course(lottery, weights, tmp_path):
    result, _, _ = lottery
    keywords = {**READING, **SETTINGS, "scope": "global", "seeds": 2}
    found = sukashi.schedule(SPEC, "digits", "lottery", ["magnitude"], [0.3, 0.6], out=tmp_path / "lottery", **keywords)
    assert found.levels == [row for row in result.levels if row["contender"] == "magnitude"]
    given = {**READING, "width": 8, "weights": weights, "epochs": 1, "round_to": 4}
    out = tmp_path / "oneshot"
    sukashi.schedule(SPEC, "digits", "oneshot", ["random"], [0.5], out=out, **given)
    identity = Workspace(out).identity
    assert identity["training"] is None
    assert identity["finetuning"]["lr"] == pytest.approx(Training().lr / 10)
    assert identity["round_to"] == 4


def test_a_rewound_network_has_the_weights_it_started_with(tmp_path, monkeypatch):
    begun = {}
    plain = levels.fit

    def noted(loaded, *args, out, **options):
        begun[out.parent.name] = {name: t.clone() for name, t in loaded.model.state_dict().items()}
        return plain(loaded, *args, out=out, **options)

    monkeypatch.setattr(levels, "fit", noted)
    ran(course(ratios=[0.5]), tmp_path / "start")
    start, level = begun["0"], begun["0.50"]
    kept = level["conv2.weight"] != 0
    assert 0 < int(kept.sum()) < kept.numel()
    assert torch.equal(level["conv2.weight"][kept], start["conv2.weight"][kept])
    assert torch.equal(level["bn1.weight"], start["bn1.weight"])
    ran(course(ratios=[0.5], rewind=1), tmp_path / "early")
    level = begun["0.50"]
    kept = level["conv2.weight"] != 0
    assert not torch.equal(level["conv2.weight"][kept], start["conv2.weight"][kept])
    rewound = models.load(str(tmp_path / "early/dense/0-epoch-1")).model.state_dict()
    assert torch.equal(level["conv2.weight"][kept], rewound["conv2.weight"][kept])
    # The epochs gone through again are those of the dense network's training: it went through the same weights.
    early, dense = models.load(str(tmp_path / "early/dense/0")), models.load(str(tmp_path / "start/dense/0"))
    assert torch.equal(weights_of(early), weights_of(dense))


def test_a_layer_that_is_excluded_keeps_its_units_at_every_level(weights, tmp_path):
    chosen = course(True, schedule="iterative", scope=None, round_to=1, exclude=["conv1"])
    result = ran(chosen, tmp_path / "out", width=8, weights=str(weights))
    cut = [models.load(str(tmp_path / "out/magnitude/0" / ratio)).model for ratio in ("0.30", "0.60")]
    assert [model.conv1.out_channels for model in cut] == [8, 8]
    assert [row["units_removed"] for row in result.levels] == pytest.approx([0.3, 0.6], abs=0.04)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["oneshot", "iterative"])
def test_channels_go_for_real(schedule, weights, tmp_path):
    chosen = course(
        True, schedule=schedule, scope=None, round_to=1, ratios=[0.25, 0.5], criteria=["magnitude", "random"]
    )
    given = {"width": 8, "weights": str(weights)}
    result = ran(chosen, tmp_path / "out", **given)
    assert [row["units_removed"] for row in result.levels] == pytest.approx([0.25, 0.5, 0.25, 0.5], abs=0.04)
    assert [row["zeros_in_masked_layers"] for row in result.levels] == [0, 0, 0, 0]
    for name in ("magnitude", "random"):
        sizes = [
            sum(p.numel() for p in models.load(str(tmp_path / "out" / name / "0" / ratio)).model.parameters())
            for ratio in ("0.25", "0.50")
        ]
        assert sizes[1] < sizes[0]
    # The network that was given is the dense one, untrained.
    dense = models.load(str(tmp_path / "out/dense/0"))
    assert torch.equal(weights_of(dense), weights_of(models.load(SPEC, width=8, weights=weights)))


@pytest.fixture(scope="module")
def rounded(weights, tmp_path_factory):
    """Channels in widths of multiples of 4, of 8: what goes is not what was asked for, nor the same for both."""
    out = tmp_path_factory.mktemp("rounded") / "out"
    changes = {"schedule": "oneshot", "scope": None, "round_to": 4, "ratios": [0.3, 0.55]}
    chosen = course(True, criteria=["magnitude", "random"], **changes)
    return ran(chosen, out, width=8, weights=str(weights)), out, chosen


def test_what_was_removed_is_counted_in_the_networks_themselves(rounded):
    result, out, _ = rounded
    sizes = {}
    for name in ("dense", "magnitude", "random"):
        for folder in (out / name / "0").glob("**/recipe.json"):
            network = models.load(str(folder.parent)).model
            n_units = sum(site.n_units for site in sites.find(network, torch.zeros(2, 1, 8, 8)).sites)
            sizes[name, folder.parent.name] = n_units, sum(p.numel() for p in network.parameters())
    n_units, n_parameters = sizes["dense", "0"]
    for row in result.levels:
        units, parameters = sizes[row["contender"], f"{row['ratio_asked']:.2f}"]
        assert row["units_removed"] == pytest.approx(1 - units / n_units)
        assert row["weights_removed"] is None
        assert row["parameters_removed"] == pytest.approx(1 - parameters / n_parameters)
    assert result.removes == "units"
    assert any(abs(row["units_removed"] - row["ratio_asked"]) > 0.02 for row in result.levels)
    assert any("were asked for: widths are rounded up to multiples of 4" in said for said in result.warnings)
    for pair in result.pairs:
        rows = {row["contender"]: row for row in result.levels if row["ratio_asked"] == pair["ratio_asked"]}
        assert pair["removed"] == [rows["magnitude"]["units_removed"], rows["random"]["units_removed"]]


def told(rows, round_to=8, scope=None, n_images=400, n_seeds=1):
    """The summary of levels: {contender: [(asked for, removed, share right)]} on the same images in every seed."""
    ratios = [ratio for ratio, _, _ in next(iter(rows.values()))]
    identity = {"schedule": "iterative", "ratios": ratios, "seeds": n_seeds, "scope": scope, "round_to": round_to}
    right = np.arange(n_images)
    found = []
    for seed in range(n_seeds):
        figures = {"removed": 0.0, "parameters": 1000, "zeros_in_masked_layers": 0.0}
        found.append(Outcome("dense", seed, 0.0, right < 0.95 * n_images, figures))
        for name, of_name in rows.items():
            for ratio, removed, share in of_name:
                figures = {"removed": removed, "parameters": 1000 - 1000 * removed**2, "zeros_in_masked_layers": 0.0}
                found.append(Outcome(name, seed, ratio, right < share * n_images, figures))
    about = {"model": "net", "weights_sha256": "0" * 64, "data": "digits", "calibration": 32, "options": {}}
    return ScheduleResult(**about, **summary.of_outcomes(found, identity))


def test_the_words_are_about_what_was_removed():
    result = told(
        {"magnitude": [(0.3, 0.25, 0.95), (0.9, 0.75, 0.8)], "random": [(0.3, 0.295, 0.9), (0.9, 0.8125, 0.6)]}
    )
    assert result.verdict == "Accuracy is at most 2 points lower at 25.0% of the units removed (magnitude)"
    magnitude, random = result.lines
    assert magnitude.startswith("magnitude: at 25.0% of the units removed (30% asked for) accuracy is shown")
    assert "; at 75.0% (90% asked for) it is -15.0 points from the dense network's" in magnitude
    assert random.startswith("random: at no level accuracy is shown")
    assert result.warnings == [
        "magnitude: 25.0% and 75.0% of the units were removed, 30% and 90% were asked for: widths are rounded up to "
        "multiples of 8",
        "random: 81.2% of the units were removed, 90% were asked for: widths are rounded up to multiples of 8",
    ]
    assert [row["parameters_removed"] for row in result.levels] == pytest.approx(
        [0.25**2, 0.75**2, 0.295**2, 0.8125**2]
    )


def test_only_levels_of_one_size_are_called_better_or_worse():
    result = told(
        {
            "magnitude": [(0.1, 0.1, 0.9), (0.5, 0.5, 0.9), (0.9, 0.75, 0.8)],
            "random": [(0.1, 0.1, 0.9), (0.5, 0.491, 0.6), (0.9, 0.8125, 0.6)],
        }
    )
    assert [pair["so"] for pair in result.pairs] == ["not separated", "better", "not comparable"]
    assert result.pairs[2]["removed"] == [0.75, 0.8125]
    assert result.verdict == "At no level is accuracy shown to be at most 2 points lower"
    turned = [{**pair, "removed": pair["removed"][::-1]} for pair in result.pairs]
    assert [summary._so(pair) for pair in turned] == [pair["so"] for pair in result.pairs]


def test_levels_are_shown_in_their_order_up_to_the_first_that_is_not():
    rows = [(0.1, 0.1, 0.95), (0.3, 0.3, 0.95), (0.5, 0.5, 0.9), (0.7, 0.7, 0.96)]
    result = told({"magnitude": rows}, scope="global")
    assert result.verdict == "Accuracy is at most 2 points lower at 30.0% of the weights removed (magnitude)"
    assert result.lines[0].startswith("magnitude: at 10.0% and 30.0% of the weights removed accuracy is shown")
    assert [row["shown"] for row in result.levels] == [True, True, False, False]


def test_each_seed_is_tested_and_more_contenders_are_tested_more_strictly():
    identity = {"schedule": "oneshot", "scope": None, "round_to": 8, "ratios": [0.5], "seeds": 2}

    def shown(n_lost, names):
        found = []
        for seed in range(2):
            figures = {"removed": 0.0, "parameters": 10, "zeros_in_masked_layers": 0.0}
            found.append(Outcome("dense", seed, 0.0, np.ones(500, bool), figures))
            for name in names:
                found.append(Outcome(name, seed, 0.5, np.arange(500) >= n_lost[seed], figures))
        return summary.of_outcomes(found, identity)["levels"][0]["shown"]

    assert shown((0, 0), ["a"])
    assert not shown((0, 20), ["a"]), "in the mean 2 points exactly, of one network 4"
    most = next(n for n in range(20) if not shown((n, n), ["a"]))
    assert most > 0
    assert not shown((most - 1, most - 1), [f"c{i}" for i in range(9)])


def test_a_schedule_seldom_names_a_level_that_lost_more():
    """400 schedules of nine levels that all lose exactly two points: at most 2.5 %, and 3 standard errors (2.3 %)."""
    generator, claims = np.random.default_rng(0), 0
    ratios = [round(0.1 * i, 1) for i in range(1, 10)]
    identity = {"schedule": "oneshot", "scope": None, "round_to": 8, "ratios": ratios, "seeds": 1}
    figures = {"removed": 0.0, "parameters": 10, "zeros_in_masked_layers": 0.0}
    for _ in range(400):
        dense = generator.random(250) < 0.95
        found = [Outcome("dense", 0, 0.0, dense, figures)]
        for ratio in ratios:
            lost = generator.random(250) < 0.02 / 0.95
            found.append(Outcome("magnitude", 0, ratio, dense & ~lost, figures))
        claims += any(row["shown"] for row in summary.of_outcomes(found, identity)["levels"])
    assert claims / 400 <= 0.025 + 0.023


def test_equal_answers_to_few_images_show_nothing():
    rows = {"magnitude": [(0.3, 0.3, 0.95)]}
    least = stats.least_images(summary.LOST)
    enough = told(rows, n_images=least)
    assert "lower at 30.0%" in enough.verdict
    assert enough.warnings == []
    few = told(rows, n_images=least - 1)
    assert few.verdict == "At no level is accuracy shown to be at most 2 points lower"
    assert few.lines[0].startswith("magnitude: at no level")
    assert few.warnings == ["188 test images can't show that accuracy is at most 2 points lower, 189 are needed"]


def test_levels_as_asked_for_need_no_word_about_it():
    result = told({"magnitude": [(0.3, 0.3, 0.95), (0.6, 0.5999, 0.95)]}, scope="global")
    assert result.warnings == []
    assert result.verdict == "Accuracy is at most 2 points lower at 60.0% of the weights removed (magnitude)"
    assert "asked for" not in result.lines[0]


def test_the_figure_stands_where_it_was_measured(monkeypatch):
    result = told({"magnitude": [(0.3, 0.25, 0.95), (0.9, 0.75, 0.8)]})
    figures = []
    monkeypatch.setattr(page.figures, "drawn", figures.append)
    page.draw(result)
    (axes,) = figures[0].axes
    drawn = next(line for line in axes.lines if len(line.get_xdata()) == 2 and line.get_marker() == "o")
    assert drawn.get_xdata() == pytest.approx([0.25, 0.75])
    assert "units" in axes.get_xlabel()


def test_one_network_has_the_interval_of_its_training():
    one = told({"magnitude": [(0.5, 0.5, 0.9)]})
    found = stats.share(380, 400)
    bounds = {"mean": found.mean, "low": found.low, "high": found.high}
    assert one.dense_accuracy == {**bounds, "each": [0.95]}
    two = told({"magnitude": [(0.5, 0.5, 0.9)]}, n_seeds=2)
    assert two.dense_accuracy == {**bounds, "each": [0.95, 0.95]}, "both seeds give the same network"


def test_of_two_seeds_each_is_told_and_of_others_an_interval():
    one, two, three = (told({"magnitude": [(0.5, 0.5, 0.9)]}, n_seeds=n) for n in (1, 2, 3))
    each = ", ".join(f"{100 * of:.1f}" for of in two.levels[0]["accuracy"]["each"])
    assert f"  {each}  " in two.text()
    assert ("each seed" in two.text(), "95% interval" in two.text()) == (True, False)
    for other in (one, three):
        of = other.levels[0]["accuracy"]
        assert f"{100 * of['low']:.1f} to {100 * of['high']:.1f}" in other.text()
        assert "each seed" not in other.text()
    (row,) = two.model_copy(update={"options": {"magnitude": {}}}).table()
    assert (row["accuracy_mean"], "accuracy_each" in row) == (0.9, False)


def test_page_and_command_line_show_the_same(rounded):
    result, out, _ = rounded
    shown, page = result.text(), (out / "report.html").read_text()
    words = " ".join(html.unescape(re.sub("<[^>]*>", "", page)).split())
    assert result.verdict in words
    assert '<p class="title">oneshot: sukashi:digits_cnn' in page
    for row in result.levels:
        for figure in (row["units_removed"], row["ratio_asked"], row["parameters_removed"]):
            assert f"<td>{figure:.1%}</td>" in page
            assert f"{figure:.1%}" in shown
        assert f"{100 * row['accuracy']['low']:.1f} to" in shown
        assert f"<strong>{100 * row['accuracy']['mean']:.1f}</strong>" in page
    for said in (*result.lines, *result.warnings):
        assert said in shown
        assert said in words
    assert f"Report: {out}/report.html" in shown
    assert "nothing was done" not in shown
    again = result.model_copy(update={"finished": True})
    assert f"{out} was finished already: nothing was done" in again.text()


def test_the_table_has_a_row_for_each_level(rounded):
    result, out, _ = rounded
    table = result.table()
    assert pq.read_table(out / "results.parquet").to_pylist() == table
    assert len(table) == len(result.levels)
    for row, level in zip(table, result.levels, strict=True):
        assert (row["contender"], row["ratio_asked"]) == (level["contender"], level["ratio_asked"])
        assert row["units_removed"] == level["units_removed"]
        assert row["accuracy_mean"] == level["accuracy"]["mean"]
        assert row["difference_low"] == level["difference"]["low"]


def test_what_is_not_finished_is_not_summed_up(lottery, tmp_path):
    _, whole, _ = lottery
    out = tmp_path / "study"
    shutil.copytree(whole, out)
    assert found_by(sukashi.results(out)) == json.loads((whole / "results.json").read_text())
    shutil.rmtree(out / "magnitude/1/0.60")
    with pytest.raises(UsageError, match="9 of 10 networks finished: give the same command again"):
        sukashi.results(out)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratios": [0.5, 0.2]}, "ascend"),
        ({"ratios": [0.0, 0.2]}, "ascend"),
        ({"ratios": [0.5, 1.0]}, r"ratio must be in \[0, 1\)"),
        ({"ratios": []}, "ratios must be different values"),
        ({"criteria": ["magnitude", "magnitude"]}, "criteria must be different"),
        ({"criteria": ["drift"]}, "drift"),
        ({"criteria": ["wanda"], "scope": None}, "wanda"),
        ({"schedule": "lotery"}, "did you mean 'lottery'"),
        ({"scope": "2:4"}, "give `ratio=0.5`"),
        ({"scope": None, "enforce_mask": [False]}, "`enforce_mask=False` is for single weights"),
        ({"rewind": 2}, "rewind must be an epoch below 2"),
        ({"schedule": "oneshot", "rewind": 1}, "of a schedule that rewinds"),
        ({"seeds": 0}, "`seeds` must be at least 1"),
        ({"scope": None, "round_to": 0}, "`round_to` must be at least 1"),
        ({"options": {"wanda": {}}}, "options were given for 'wanda', which is not used"),
        ({"training": Training(enforce_mask=False)}, "take it out of the settings of training"),
        ({"finetuning": {}}, "finetuning would train nothing, lottery trains every level anew"),
        ({"schedule": "oneshot", "weights": "x"}, "training would train nothing, the model brings its weights"),
    ],
)
def test_a_course_without_meaning_is_refused_before_anything_is_loaded(tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(Source, "read", None)
    with pytest.raises(UsageError, match=message):
        ran(course(**changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "reading", "message"),
    [
        ({"exclude": ["fc9"]}, {}, "no convolution or linear layer 'fc9' to exclude"),
        ({"scope": None, "criteria": ["magnitude"], "exclude": ["fc9"]}, {}, "no site has a layer 'fc9' to exclude"),
        ({"scope": "2:4", "ratios": [0.5]}, {}, r"layer 'conv1' reads 9 inputs, which scope 2:4 cannot group"),
        ({}, {"calibration": 1000}, "a calibration set needs 1000 of every class"),
        ({"schedule": "oneshot", "finetuning": {"epochs": 2, "warmup": 2}}, {}, "warmup must be below epochs"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_dense_network_is_trained(
    tmp_path, monkeypatch, changes, reading, message
):
    monkeypatch.setattr(levels, "fit", None)
    with pytest.raises(SukashiError, match=message):
        ran(course(**changes), tmp_path / "out", **reading)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"criteria": 3}, r'^`criteria` must be a list like \["magnitude"\], got 3$'),
        ({"criteria": "magnitud"}, "unknown criterion 'magnitud': did you mean 'magnitude'"),
        ({"ratios": 0.5}, r"^`ratios` must be a list like \[0.3, 0.6, 0.9\], got 0.5$"),
        ({"ratios": (0.5, "0.6")}, r"^ratios.1 must be a number, got '0.6'$"),
        ({"how": "one"}, "unknown schedule 'one': did you mean 'oneshot'"),
        ({"scop": "global"}, "unknown setting 'scop': did you mean 'scope'"),
        ({"epoch": 3}, "unknown setting 'epoch': did you mean 'epochs'"),
        ({"memory": -1}, "`memory` must be at least 0, got -1"),
        ({"seeds": 1.5}, "`seeds` must be a whole number like 1, got 1.5"),
    ],
)
def test_wrong_keywords_are_refused_in_a_sentence(tmp_path, changes, message):
    given = {"how": "oneshot", "criteria": ["magnitude"], "ratios": (0.5,), "out": tmp_path / "out", **changes}
    with pytest.raises(UsageError, match=message):
        sukashi.schedule(SPEC, "digits", **given)
    assert not (tmp_path / "out").exists()


def test_the_folder_of_a_training_is_refused(tmp_path):
    sukashi.train(SPEC, "digits", out=tmp_path / "out", width=4, epochs=1, test_images=20)
    with pytest.raises(UsageError, match=r"output folder of another experiment \(train, now schedule\)"):
        ran(course(), tmp_path / "out")


def test_every_ratio_has_a_folder_of_its_own():
    assert [run.named(ratio) for ratio in (0.1, 0.3, 0.99, 0.995, 1 / 3)] == [
        *("0.10", "0.30", "0.99", "0.995", "0.3333333333333333")
    ]


def test_lottery_refuses_trained_weights(weights, tmp_path):
    with pytest.raises(UsageError, match="lottery goes back to weights before training"):
        ran(course(), tmp_path / "out", weights=str(weights), width=8)


@pytest.mark.slow
def test_a_study_file_holds_a_course(lottery, tmp_path):
    result, _, _ = lottery
    file = tmp_path / "lottery.toml"
    file.write_text(
        f"""
        out = "out"
        data = "digits"
        schedule = "lottery"
        criteria = ["magnitude"]
        scope = "global"
        ratios = [0.3, 0.6]
        seeds = 2
        enforce_mask = [true, false]
        calibration = {READING["calibration"]}
        test_images = {READING["test_images"]}
        [model]
        spec = "{SPEC}"
        width = {READING["width"]}
        [training]
        epochs = 2
        batch_size = 128
        lr = 0.1
        """
    )
    assert sukashi.study(file).levels == result.levels
    assert json.loads((tmp_path / "out" / "results.json").read_text())["levels"] == result.levels
    whole = file.read_text()
    for line, message in (("epoch = 3", "did you mean 'epochs'"), ("epochs = 0", "training.epochs")):
        file.write_text(whole.replace("epochs = 2", line, 1))
        with pytest.raises(UsageError, match=message):
            sukashi.study(file)


def test_progress_tells_the_level(tmp_path):
    notes = []

    class Shown:
        def __init__(self, title):
            self.title = title

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def advance(self, n=1, note=""):
            if self.title == "trials" and note:
                notes.append((note, n))

    with progress.listening(lambda title, total: Shown(title)):
        ran(course(ratios=[0.5]), tmp_path / "out")
    # Of each when it begins, and when it is there.
    assert notes == [(note, n) for note in ("dense, seed 0", "magnitude, seed 0, 50%") for n in (0, 1)]
