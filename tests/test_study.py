"""Study files: read strictly, run experiment by experiment, resumed, and told on one page."""

import functools
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import safetensors.torch

import sukashi
from sukashi.core.errors import ModelError, SukashiError, UsageError
from sukashi.core.stats import holm
from sukashi.criteria import criteria
from sukashi.experiments.audit.summary import AuditResult
from sukashi.experiments.compare import run as comparing
from sukashi.experiments.compare.summary import CompareResult
from sukashi.experiments.prune import run as pruning
from sukashi.experiments.prune.summary import PruneResult
from sukashi.experiments.schedule.checks import check
from sukashi.experiments.schedule.settings import Scheduled
from sukashi.experiments.study.file import read
from sukashi.experiments.study.summary import StudyResult
from sukashi.experiments.train.summary import TrainResult
from sukashi.experiments.workspace import Workspace
from sukashi.training import loop

RESULTS = {kind.kind: kind for kind in (AuditResult, CompareResult, PruneResult, TrainResult)}
STUDY = """
title = "Two networks"
out = "results"
data = "digits"
criteria = ["magnitude", "taylor"]
sampling = ["random", "confidence"]
ratios = [0.0, 0.3, 0.8]
seeds = 2
calibration = 4
test_images = 60
mode = "zero"
margin = 0.2
pairs = [["taylor", "magnitude"], ["taylor/confidence", "taylor"]]

[models.cnn]
spec = "sukashi:digits_cnn"
weights = "$WEIGHTS/cnn.safetensors"
width = 8

[models.vit]
spec = "sukashi:digits_vit"
weights = "$WEIGHTS/vit.safetensors"
width = 8

[options.taylor]
batch_size = 32

[environment]
WEIGHTS = "weights"
"""


@pytest.fixture(scope="module")
def home(small, tmp_path_factory):
    """A folder with a study file and the weights it names."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "weights").mkdir()
    for name in ("cnn", "vit"):
        safetensors.torch.save_file(small[name].model.state_dict(), folder / "weights" / f"{name}.safetensors")
    (folder / "study.toml").write_text(STUDY)
    return folder


@pytest.fixture(scope="module")
def done(home):
    return sukashi.study(home / "study.toml")


def kept(result):
    """What results.json has of a result."""
    return {name: value for name, value in result.to_json().items() if name not in result.of_call}


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_each_model_is_compared_as_by_compare(home, done, tmp_path):
    assert json.loads((home / "results" / "results.json").read_text()) == kept(done)
    assert list(done.experiments) == ["cnn", "vit"]
    assert (done.title, done.finished) == ("Two networks", False)
    alone = sukashi.compare(
        "sukashi:digits_cnn",
        "digits",
        ["magnitude", "taylor"],
        sampling=["random", "confidence"],
        ratios=[0.0, 0.3, 0.8],
        seeds=2,
        calibration=4,
        test_images=60,
        mode="zero",
        margin=0.2,
        options={"taylor": {"batch_size": 32}},
        weights=home / "weights" / "cnn.safetensors",
        width=8,
        out=tmp_path / "alone",
    )
    assert done.experiments["cnn"] == {"kind": "compare", **kept(alone)}
    for path in sorted((tmp_path / "alone" / "trials").rglob("*")):
        if path.is_file():
            assert (home / "results" / "cnn" / path.relative_to(tmp_path / "alone")).read_bytes() == path.read_bytes()


def test_a_pair_is_the_difference_of_sauce(done):
    pairs = [(pair["model"], pair["first"], pair["second"]) for pair in done.pairs]
    assert pairs == [
        (model, *pair)
        for model in ("cnn", "vit")
        for pair in (("taylor", "magnitude"), ("taylor/confidence", "taylor"))
    ]
    found = done.experiments["cnn"]["sauce"]
    assert done.pairs[0]["mean"] == pytest.approx(found["taylor"]["mean"] - found["magnitude"]["mean"])
    assert all(pair["low"] <= pair["mean"] <= pair["high"] for pair in done.pairs)
    assert [pair["p_holm"] for pair in done.pairs] == holm([pair["p"] for pair in done.pairs]).tolist()
    (own,) = [
        pair
        for pair in done.experiments["cnn"]["differences"]
        if {pair["first"], pair["second"]} == {"taylor", "magnitude"}
    ]
    assert done.pairs[0]["p"] == own["p"], "a comparison's own page tests the same"


def test_the_page_shows_every_model_and_leads_to_its_own(home, done):
    page = Path(done.report).read_text()
    assert Path(done.report) == home / "results" / "report.html"
    for words in (
        "Two networks",
        "taylor/confidence",
        "units zeroed",
        'href="cnn/report.html"',
        'href="vit/report.html"',
    ):
        assert words in page
    assert (home / "results" / "cnn" / "report.html").exists()
    assert "http" not in page


def test_what_is_printed_and_the_table(home, done):
    text = done.text()
    for name in ("cnn", "vit"):
        assert f"\n{name}\n\n{sukashi.results(home / 'results' / name).text()}" in "\n" + text
    first = done.pairs[0]
    each = ", ".join(f"{of:+.1f}" for of in first["each"])
    assert f"cnn: taylor minus magnitude: {first['mean']:+.1f} of SAUCE, each seed {each}, p" in text
    assert text.endswith(f"Report: {done.report}")
    rows = [{"name": name, "kind": "compare", "verdict": done.experiments[name]["verdict"]} for name in ("cnn", "vit")]
    assert done.table() == rows == pq.read_table(home / "results" / "results.parquet").to_pylist()


def test_a_finished_study_computes_nothing_again_from_wherever_it_is_run(home, done, monkeypatch):
    before = {path: path.read_bytes() for path in (home / "results").rglob("*") if path.is_file()}
    monkeypatch.setattr(comparing, "plan_for", None)
    monkeypatch.chdir(home)
    again = sukashi.study("study.toml")
    assert again.finished
    assert again.to_json() == {**done.to_json(), "finished": True}
    assert {path.name for path, content in before.items() if path.read_bytes() != content} <= {
        *("log.jsonl", "report.html", "costs.csv", "costs.tex")
    }


@pytest.mark.slow
def test_a_study_grows_by_models_and_seeds(home, done, tmp_path, monkeypatch):
    monkeypatch.setenv("WEIGHTS", str(home / "weights"))
    (tmp_path / "small").mkdir()
    one = STUDY.replace("seeds = 2", "seeds = 1").replace("[models.vit]", "[ignored.vit]")
    without = one[: one.index("[ignored.vit]")] + one[one.index("[options.taylor]") :]
    (tmp_path / "small" / "study.toml").write_text(without)
    out = tmp_path / "out"
    first = sukashi.study(tmp_path / "small" / "study.toml", out=out)
    assert list(first.experiments) == ["cnn"]
    seen = {path: path.read_bytes() for path in (out / "cnn" / "trials").rglob("*") if path.is_file()}
    grown = sukashi.study(home / "study.toml", out=out)
    assert grown.experiments == done.experiments
    assert grown.pairs == done.pairs
    assert {path: path.read_bytes() for path in seen} == seen
    before = files_of(out)
    with pytest.raises(UsageError, match="cnn is an existing output folder of another trial: seeds was 2, now 1"):
        sukashi.study(tmp_path / "small" / "study.toml", out=out)
    (tmp_path / "small" / "study.toml").write_text(without.replace("seeds = 1", "seeds = 2"))
    with pytest.raises(UsageError, match=r"out is an existing output folder of another trial: experiments\.vit was"):
        sukashi.study(tmp_path / "small" / "study.toml", out=out)
    assert files_of(out) == before


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*has random weights")
def test_a_criterion_that_refuses_a_model_is_left_out_with_its_reason(home, tmp_path, monkeypatch):
    @functools.wraps(criteria["taylor"].fn)
    def refuse(*args, **options):
        raise ModelError("GELU is not handled: choose another")

    monkeypatch.setitem(criteria._methods, "taylor", replace(criteria["taylor"], fn=refuse))
    found = sukashi.study(home / "study.toml", out=tmp_path / "out")
    for model in found.experiments.values():
        assert list(model["sauce"]) == ["magnitude"]
        reason = "GELU is not handled: choose another"
        assert model["refused"] == {"taylor": reason, "taylor/confidence": reason}
    assert all(pair["mean"] is None for pair in found.pairs)
    assert "cnn: taylor minus magnitude: no seed in common" in found.text()
    pages = [(tmp_path / "out" / name / "report.html").read_text() for name in ("", "cnn")]
    for page, n_told in zip(pages, (len(found.experiments), 1), strict=True):
        assert page.count("taylor and taylor/confidence are left out, they refused the model: GELU") == n_told
        assert page.count("GELU is not handled") == n_told, "a reason is said once"
    assert pages[0].count("refused, as noted above") == 2 * len(found.experiments)
    assert "trials are finished" not in pages[1]
    vit = ("sukashi:digits_vit", "digits", ["taylor"])
    with pytest.raises(ModelError, match="GELU"):
        sukashi.compare(*vit, calibration=4, out=tmp_path / "strict")
    with pytest.raises(ModelError, match="refused by every criterion; first: GELU"):
        sukashi.compare(*vit, calibration=4, out=tmp_path / "none", skip_refused=True)
    with pytest.raises(ModelError, match="refused by every criterion; first: GELU"):
        sukashi.results(tmp_path / "none")


@pytest.mark.slow
def test_out_and_data_may_be_given_and_variables_come_from_the_environment(home, done, small, tmp_path, monkeypatch):
    monkeypatch.setenv("WEIGHTS", str(tmp_path))
    for name in ("cnn", "vit"):
        state = {
            key: 1.01 * value for key, value in small[name].model.state_dict().items() if value.is_floating_point()
        }
        safetensors.torch.save_file({**small[name].model.state_dict(), **state}, tmp_path / f"{name}.safetensors")
    sukashi.study(home / "study.toml", out=tmp_path / "out", data="digits")
    here, there = (Workspace(folder / "cnn").identity["model"] for folder in (tmp_path / "out", home / "results"))
    assert here["weights_sha256"] != there["weights_sha256"]
    assert {**here, "weights_sha256": ""} == {**there, "weights_sha256": ""}


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("seeds = 2", "sedes = 2", "unknown key 'sedes': did you mean 'seeds'?"),
        ("width = 8", "wdith = 8", "unknown key 'models.cnn.wdith': did you mean 'width'?"),
        ("seeds = 2", "seeds = 'two'", r"study.toml: seeds must be a whole number like 3, got 'two'"),
        ("seeds = 2", "seeds = ", "is no TOML"),
        ("[models.cnn]", '[models."../cnn"]', "letters, digits, _ or -: '../cnn'"),
        ('["taylor", "magnitude"]]', '["taylor", "drift"]]', "pairs 'drift', which it does not compare"),
        ('["taylor", "magnitude"],', '["taylor", "magnitude/confidence"],', "pairs 'magnitude/confidence'"),
        ('criteria = ["magnitude", "taylor"]', 'criteria = ["magnitude", "tailor"]', "unknown criterion 'tailor'"),
        ('WEIGHTS = "weights"', "", r"uses \$WEIGHTS, which is not set"),
        ("margin = 0.2", "margin = 2", "margin must be in"),
    ],
)
def test_a_file_that_breaks_a_rule_is_refused(home, tmp_path, old, new, words):
    text = STUDY.replace('["taylor/confidence", "taylor"]]', '["taylor", "magnitude"]]')
    assert old in text
    text = text.replace(old, new, 1).replace('WEIGHTS = "weights"', f'WEIGHTS = "{home / "weights"}"')
    (tmp_path / "study.toml").write_text(text)
    with pytest.raises(UsageError, match=words):
        sukashi.study(tmp_path / "study.toml")
    assert [path.name for path in tmp_path.iterdir()] == ["study.toml"]


def test_pairs_go_by_the_names_of_contenders_with_options_and_repairs(home, tmp_path):
    text = STUDY.replace('WEIGHTS = "weights"', f'WEIGHTS = "{home / "weights"}"')
    text = text.replace('criteria = ["magnitude", "taylor"]', 'criteria = ["taylor", "lrp[reduce=sum,classes=each]"]')
    pairs = '[["taylor/confidence+refit", "taylor"], ["lrp[reduce=sum,classes=each]+norm", "taylor+norm"]]'
    text = re.sub(r"(?m)^pairs = .*$", f'repair = ["none", "refit", "norm"]\npairs = {pairs}', text)
    (tmp_path / "study.toml").write_text(text)
    assert read(tmp_path / "study.toml").pairs == [
        ["taylor/confidence+refit", "taylor"],
        ["lrp[classes=each,reduce=sum]+norm", "taylor+norm"],
    ]
    (tmp_path / "study.toml").write_text(text.replace('"refit", "norm"', '"refit"'))
    with pytest.raises(UsageError, match=r"pairs 'lrp\[.*\]\+norm', which it does not compare"):
        read(tmp_path / "study.toml")


def test_a_later_model_that_cannot_be_loaded_is_refused_before_the_first_is_compared(home, tmp_path, monkeypatch):
    monkeypatch.setattr(comparing, "plan_for", None)
    (tmp_path / "study.toml").write_text(STUDY.replace("$WEIGHTS/vit", "$WEIGHTS/gone"))
    monkeypatch.setenv("WEIGHTS", str(home / "weights"))
    with pytest.raises(SukashiError, match=r"gone\.safetensors"):
        sukashi.study(tmp_path / "study.toml")
    assert [path.name for path in tmp_path.iterdir()] == ["study.toml"]


def test_how_images_are_read_is_said_by_the_file_and_a_call_goes_before_it(home, tmp_path, monkeypatch):
    monkeypatch.setenv("WEIGHTS", str(home / "weights"))
    (tmp_path / "study.toml").write_text('workers = 2\nonly = ["3", "5"]\nskip_bad = true\n' + STUDY)
    for given, expected in (({}, 2), ({"workers": 0}, 0)):
        found = read(tmp_path / "study.toml", **given)
        for settings in found.experiments.values():
            assert (settings["workers"], settings["only"], settings["skip_bad"]) == (expected, ["3", "5"], True)


def test_files_that_are_not_there_or_hold_no_model(tmp_path):
    os.mkfifo(tmp_path / "pipe.toml")
    with pytest.raises(UsageError, match=r"cannot read .*pipe.toml \(it is a device or a pipe, not a file\)"):
        sukashi.study(tmp_path / "pipe.toml")
    with pytest.raises(UsageError, match=r"cannot read .*nowhere.toml \(No such file"):
        sukashi.study(tmp_path / "nowhere.toml")
    (tmp_path / "empty.toml").write_text('out = "o"\ndata = "digits"\ncriteria = ["random"]\n[models]\n')
    with pytest.raises(UsageError, match="has no model"):
        sukashi.study(tmp_path / "empty.toml")


def test_keys_that_are_missing_or_of_another_kind_of_study(tmp_path):
    def refused(text, words):
        (tmp_path / "study.toml").write_text(text)
        with pytest.raises(UsageError, match=words):
            sukashi.study(tmp_path / "study.toml")

    levels_of = {"schedule": '"oneshot"', "criteria": '["magnitude"]', "ratios": "[0.5]", "out": '"o"', "data": '"x"'}
    model = '\n[model]\nspec = "sukashi:digits_cnn"\n'

    def course(tail=model, **changes):
        return "\n".join(f"{key} = {value}" for key, value in (levels_of | changes).items() if value) + tail

    # A name that is misspelt leaves another one missing, and is what can be put right.
    refused(course(ratios=None, ratio="[0.5]"), "study.toml has an unknown key 'ratio': did you mean 'ratios'?")
    refused(course(ratios=None), r"study.toml has no 'ratios': add ratios = \[0.3, 0.6, 0.9\]$")
    refused(course(data=None), r"has no 'data': add data = \"digits\", or give `data`$")
    refused(course(""), r"has no 'model': add \[model\] with spec = \"sukashi:digits_cnn\"$")
    refused(course("\n[model]\nwidth = 8"), r"has no 'spec' in \[model\]: add spec = \"sukashi:digits_cnn\"$")
    refused(
        course(model.replace("model", "models.a")), r"has a schedule, .*write \[model\] in place of \[models.NAME\]$"
    )
    refused(course(criteria='"magnitude"'), r"criteria must be a list like \[\"magnitude\"\], got 'magnitude'$")
    refused(course(seeds="1.5"), "seeds must be a whole number like 1, got 1.5$")
    refused(course(model + "[training]\nlr = 0\n"), "training.lr must be greater than 0, got 0$")
    refused(course(model + "[training]\nlr = 0.1\nepoch = 1\n"), "unknown key 'training.epoch': did you mean 'epochs'?")
    refused(course(schedule=None), r"has no schedule, .*write \[models.NAME\] in place of \[model\]")
    refused(course("", schedule=None), r"has no 'models': add \[models.NAME\] with spec = ")
    refused(STUDY.replace('["taylor", "magnitude"],', '["taylor"],'), "pairs.0 must have at least 2 items, not 1, got")


def test_data_and_out_need_not_be_in_the_file(home, done, tmp_path, monkeypatch):
    monkeypatch.setenv("WEIGHTS", str(home / "weights"))
    text = STUDY.replace('out = "results"', "").replace('data = "digits"', "")
    (tmp_path / "study.toml").write_text(text)
    again = sukashi.study(tmp_path / "study.toml", data="digits", out=home / "results")
    assert again.experiments == done.experiments


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parent.parent / "studies").glob("*.toml")), ids=lambda p: p.stem
)
def test_the_studies_that_come_along_keep_the_rules(path):
    found = read(path, out="out")
    if isinstance(found, Scheduled):
        check(found)
        assert found.model
    else:
        assert found.experiments
        for asked in found.experiments.values():
            named = [*asked.get("criteria", ()), *filter(None, [asked.get("criterion")])]
            assert set(named) <= set(criteria.names())


# Any experiments.

MIXED = """
out = "mixed"
title = "Dense, half, and what it did"
data = "digits"
test_images = 60
calibration = 4

[experiments.dense]
kind = "train"
model = "sukashi:digits_cnn"
width = 8
epochs = 2

[experiments.half]
kind = "prune"
model = "$OUT/dense"
criterion = "drift"
ratio = 0.5
round_to = 1

[experiments.tuned]
kind = "finetune"
model = "$OUT/half"
epochs = 1

[experiments.reasons]
kind = "audit"
models = ["$OUT/dense", "$OUT/half", "$OUT/tuned"]
attributions = ["saliency"]
measures = ["gini", "ssim"]
test_images = 20
population = "all"

[experiments.against]
kind = "compare"
model = "$OUT/dense"
criteria = ["magnitude", "random"]
ratios = [0.5, 0.9]
seeds = 1
mode = "zero"
"""


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A study of all sorts: its folder with the file, and what it returned."""
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "study.toml").write_text(MIXED)
    return folder, sukashi.study(folder / "study.toml", command="sukashi study study.toml")


def test_experiments_of_all_kinds_read_what_those_before_them_made(mixed):
    folder, result = mixed
    out = folder / "mixed"
    assert isinstance(result, StudyResult)
    kinds = {"dense": "train", "half": "prune", "tuned": "train", "reasons": "audit", "against": "compare"}
    assert {name: found["kind"] for name, found in result.experiments.items()} == kinds
    for name, kind in kinds.items():
        alone = sukashi.results(out / name)
        assert isinstance(alone, RESULTS[kind])
        assert result.experiments[name] == {"kind": kind, **kept(alone)}
        assert result.verdicts[name] == alone.verdict
    dense, half, tuned = (sukashi.load(str(out / name)) for name in ("dense", "half", "tuned"))
    assert (len(dense.cuts), len(half.cuts), len(tuned.cuts)) == (0, 1, 1)
    assert result.experiments["half"]["units_removed"] == 0.5
    weights = [Workspace(out / name).identity["model"]["weights_sha256"] for name in ("half", "against")]
    assert weights == [dense.weights_sha256] * 2
    accuracy = result.experiments["against"]["dense_accuracy"]
    assert result.experiments["half"]["dense"]["accuracy"] == pytest.approx(accuracy)
    records = Workspace(out).records()
    assert [record.kept["needs"] for record in records] == [[r.key for r in records[:n]] for n in range(len(records))]
    # What is shared holds for those that have it, and a table's own setting goes before it.
    assert {name: result.experiments[name]["n_images"] for name in ("dense", "half", "against")} == {
        "dense": 60,
        "half": 60,
        "against": 60,
    }
    assert Workspace(out / "reasons").identity["data"]["test_images"] == 20


def test_the_page_of_mixed_experiments(mixed):
    folder, result = mixed
    page = (folder / "mixed" / "report.html").read_text()
    assert "<h1>Dense, half, and what it did</h1>" in page
    for name in result.experiments:
        assert f'<a href="{name}/report.html">{name}</a>' in page
        assert (folder / "mixed" / name / "report.html").exists()
        assert result.verdicts[name] in re.sub("<[^>]*>", "", page).replace("&#39;", "'")
    assert "<pre>sukashi study study.toml</pre>" in page
    assert page.count('<th scope="col">contender</th>') == 1, "a table of contenders for the comparison alone"
    assert "units zeroed" in page


def test_what_a_clock_decides_is_in_no_result_of_a_study(mixed):
    folder, result = mixed
    told = json.loads((folder / "mixed" / "results.json").read_text())
    assert told == kept(result)
    assert not {"latency_ms", "verdict", "out", "report"} & set(told["experiments"]["half"])
    assert "latency" in result.verdicts["half"]
    rows = {row["name"]: row for row in pq.read_table(folder / "mixed" / "results.parquet").to_pylist()}
    assert list(rows) == list(result.experiments)
    assert rows["half"] == {"name": "half", "kind": "prune", "verdict": None}
    assert rows["against"]["verdict"] == result.verdicts["against"]


def test_finished_experiments_are_not_done_again_from_wherever_the_file_is_run(mixed, monkeypatch):
    folder, result = mixed
    before = files_of(folder)
    for owner, name in ((comparing, "plan_for"), (pruning, "plan_for"), (loop, "fit")):
        monkeypatch.setattr(owner, name, None)
    monkeypatch.chdir(folder)
    again = sukashi.study("study.toml", command="sukashi study study.toml")
    assert again.finished
    assert kept(again) == kept(result)
    after = files_of(folder)
    assert {str(name) for name in before if after[name] != before[name]} == {"mixed/log.jsonl"}
    # A folder that is given may be relative to where the command is.
    assert sukashi.study("study.toml", out="mixed").finished
    monkeypatch.chdir(folder.parent)
    assert sukashi.study(folder / "study.toml", out=f"{folder.name}/mixed").finished
    # What was cut short before the study knew of it is found finished from there too.
    (half,) = (r for r in Workspace(folder / "mixed").records() if r.result["name"] == "half")
    (half.folder / "trial.json").unlink()
    assert kept(sukashi.study(folder / "study.toml", out=f"{folder.name}/mixed")) == kept(result)


def test_a_folder_that_is_gone_is_told_with_what_makes_it_again(mixed, tmp_path):
    folder, result = mixed
    shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "mixed" / "dense")
    with pytest.raises(UsageError, match=r"dense is gone, which the study has finished: remove (\S+) too") as told:
        sukashi.study(tmp_path / "copy" / "study.toml")
    shutil.rmtree(re.search(r"remove (\S+) too", str(told.value)).group(1))
    assert kept(sukashi.study(tmp_path / "copy" / "study.toml")) == kept(result)


def test_an_experiment_that_fails_stops_those_after_it_and_the_study_goes_on_later(mixed, tmp_path, monkeypatch):
    folder, result = mixed
    (tmp_path / "study.toml").write_text(MIXED[: MIXED.index("[experiments.reasons]")])
    with monkeypatch.context() as patched:

        def refuse(*args, **options):
            raise ModelError("logits are not finite")

        patched.setattr(pruning, "plan_for", refuse)
        with pytest.raises(ModelError, match="logits are not finite"):
            sukashi.study(tmp_path / "study.toml")
    out = tmp_path / "mixed"
    assert (out / "dense" / "results.json").exists()
    assert not (out / "half").exists()
    assert not (out / "tuned").exists()
    with pytest.raises(UsageError, match="1 of 3 experiments finished: give the same command again"):
        sukashi.results(out)
    found = sukashi.study(tmp_path / "study.toml")
    # But for the folder that the networks lie in.
    text = json.dumps(found.experiments).replace(str(tmp_path), str(folder))
    assert json.loads(text) == {name: result.experiments[name] for name in found.experiments}
    assert list(found.experiments) == ["dense", "half", "tuned"]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('kind = "prune"', 'kind = "prun"', r"kind of \[experiments.half\] must be one: did you mean 'prune'"),
        ('kind = "prune"\n', "", r"kind of \[experiments.half\] must be one"),
        ('kind = "prune"', 'kind = "check"', r"kind of \[experiments.half\] must be one"),
        ('kind = "prune"', 'kind = "study"', r"kind of \[experiments.half\] must be one"),
        ("ratio = 0.5", "ratios = 0.5", r"\[experiments.half\] has an unknown key 'ratios': did you mean 'ratio'"),
        ("ratio = 0.5", "ratio = 1.5", r"\[experiments.half\]: ratio must be in \[0, 1\), got 1.5"),
        ("ratio = 0.5\n", "", r"\[experiments.half\]: how much goes is said by one of `ratio`, `target_flops`"),
        ("test_images = 60", "tset_images = 60", "has an unknown key 'tset_images': did you mean 'test_images'"),
        ("test_images = 60", "test_images = 'x'", r"test_images must be a whole number like 2000, got 'x'"),
        ("[experiments.half]", '[experiments."../half"]', "letters, digits, _ or -: '../half'"),
        ("[experiments.half]", "[experiments.trials]", "'trials' is a folder of the study's own: choose another name"),
        ('data = "digits"', 'data = "$NOWHERE/digits"', r"uses \$NOWHERE, which is not set"),
        ('out = "mixed"\n', "", "has no 'out': add out = .*, or give `out`"),
        ('"$OUT/tuned"]', '"$OUT/tuned"', "is no TOML"),
        ("epochs = 2", "epochs = 0", r"\[experiments.dense\]: epochs must be at least 1, got 0"),
    ],
)
def test_a_file_of_experiments_that_breaks_a_rule_is_refused_before_the_first(tmp_path, old, new, words):
    assert old in MIXED
    (tmp_path / "study.toml").write_text(MIXED.replace(old, new, 1))
    with pytest.raises(UsageError, match=words):
        sukashi.study(tmp_path / "study.toml")
    assert [path.name for path in tmp_path.iterdir()] == ["study.toml"]


def test_paths_of_experiments_are_those_of_the_file(tmp_path, monkeypatch):
    (tmp_path / "file").mkdir()
    (tmp_path / "nets").mkdir()
    monkeypatch.setenv("NETS", str(tmp_path / "nets"))
    monkeypatch.setenv("OUTSIDE", str(tmp_path / "nets"))
    text = """
out = "$BASE/runs"
data = "digits"
[environment]
BASE = "base"
[experiments.one]
kind = "prune"
model = "sukashi:digits_cnn"
weights = "weights.safetensors"
criterion = "magnitude"
ratio = 0.5
[experiments.two]
kind = "audit"
models = ["$OUT/one", "$NETS/other", "sukashi:digits_cnn"]
weights = "$BASE/w.safetensors"
[experiments.three]
kind = "prune"
model = "$OUTSIDE"
criterion = "magnitude"
ratio = 0.5
"""
    (tmp_path / "file" / "study.toml").write_text(text)
    found = read(tmp_path / "file" / "study.toml", workers=3)
    home = tmp_path / "file"
    assert found.out == str(home / "base" / "runs")
    assert found.experiments["one"]["weights"] == str(home / "weights.safetensors")
    assert found.experiments["one"]["model"] == "sukashi:digits_cnn"
    assert found.experiments["two"]["models"] == ["$OUT/one", str(tmp_path / "nets" / "other"), "sukashi:digits_cnn"]
    assert found.experiments["two"]["weights"] == str(home / "base" / "w.safetensors")
    assert found.experiments["three"]["model"] == str(tmp_path / "nets")
    assert {settings["workers"] for settings in found.experiments.values()} == {3}
    assert found.title == "study"
