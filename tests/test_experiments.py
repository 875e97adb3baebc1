"""What holds for every kind of experiment: killed anywhere it ends in the same bytes, it is done once, no other folder
is touched, and what it found is told alike as an object, JSON, rows, words and a page.
"""

import csv
import json
import os
import re
import shutil
import sys
from html import escape
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest

import sukashi
from sukashi.cli import main
from sukashi.core.errors import UsageError
from sukashi.core.experiment import Result
from sukashi.core.files import FORMAT
from sukashi.core.schema import option_of
from sukashi.experiments.bench import Source
from sukashi.experiments.kinds import kinds, spelled
from sukashi.experiments.reading import Architecture, Pixels
from sukashi.experiments.workspace import Workspace
from sukashi.measures import cost

NET = "sukashi:digits_cnn"
ONE = {"model": NET, "width": 8, "data": "digits", "test_images": 20}
CUT = {**ONE, "calibration": 4, "criterion": "taylor", "ratio": 0.5}
TRAINED = {"epochs": 2, "batch_size": 256}
# What is asked of each kind, and what makes another experiment of it, with the words of the refusal.
# A new kind goes here too.
ASKED = {
    "compare": (
        {**ONE, "calibration": 4, "criteria": ["magnitude", "taylor"], "ratios": [0.5], "seeds": 2},
        {"mode": "zero"},
        'mode was "cut", now "zero"',
    ),
    "prune": (CUT, {"ratio": 0.25}, "ratio_asked was 0.5, now 0.25"),
    "train": ({**ONE, **TRAINED}, {"epochs": 1}, "epochs was 2, now 1"),
    "finetune": ({**ONE, **TRAINED, "model": "CUT", "width": None}, {"seed": 1}, "seed was 0, now 1"),
    "schedule": (
        {
            **{**ONE, "calibration": 4, "criteria": ["magnitude"], "ratios": [0.3, 0.6], "seeds": 1},
            **{"how": "iterative", "epochs": 1, "batch_size": 256},
        },
        {"how": "oneshot"},
        'schedule was "iterative", now "oneshot"',
    ),
    "audit": (
        {
            **{"models": [NET, "CUT"], "width": 8, "data": "digits", "test_images": 20, "population": "all"},
            **{"attributions": ["saliency"], "measures": ["gini", "ssim"]},
        },
        {"seed": 1},
        "seed was 0, now 1",
    ),
    "concepts": (
        {**ONE, "layer": "bn2", "of": "3", "subspaces": 2, "images": 12, "positions": 8, "trials": 1},
        {"explains": "margin"},
        'explains was "logit", now "margin"',
    ),
    "study": ({"criterion": "taylor"}, {"criterion": "magnitude"}, 'criterion was "taylor", now "magnitude"'),
}
STUDY = """
data = "digits"
test_images = 20
out = "nowhere"
[experiments.cut]
kind = "prune"
model = "sukashi:digits_cnn"
width = 8
calibration = 4
criterion = "CRITERION"
ratio = 0.5
[experiments.audited]
kind = "audit"
models = ["$OUT/cut", "CUT"]
attributions = ["saliency"]
measures = ["gini"]
population = "all"
"""
SNAPSHOTS = 5
pytestmark = pytest.mark.filterwarnings("ignore:.*has random weights")


def test_every_kind_with_a_folder_has_an_example_here():
    lasting = {name for name, kind in kinds().items() if "out" in kind.model_fields}
    assert set(ASKED) == lasting | {"study"}, "ASKED in this file holds settings for every kind that writes a folder"


@pytest.fixture(scope="module", autouse=True)
def clockless():
    """Latencies that no clock decides, so that pages are the same too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "latency", lambda models, batch, **how: [[2.0] * 6, *([[1.0] * 6] * (len(models) - 1))])
        yield


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "cut"
    sukashi.prune(**CUT, out=folder)
    return folder


@pytest.fixture(scope="module", params=ASKED)
def made(request, cut, tmp_path_factory):
    """An experiment done without disturbance: `.result`, a copy of its folder, and copies of that folder as a kill
    would have left it just before some of the times something was made durable or put in place.
    """
    home = tmp_path_factory.mktemp(request.param)
    one = SimpleNamespace(kind=request.param, home=home, cut=cut, out=home / "out", finished=home / "finished")
    really, left = {name: getattr(os, name) for name in ("fsync", "replace")}, []

    def photographed(name):
        def call(*args, **options):
            left.append(home / f"left-{len(left)}")
            if one.out.exists():
                shutil.copytree(one.out, left[-1])
            return really[name](*args, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in really:
            patch.setattr(os, name, photographed(name))
        one.result = perform(one)
    # The first and the last of them always, and one in the middle of a figure.
    chosen = {*np.linspace(0, len(left) - 1, SNAPSHOTS).astype(int).tolist()}
    drawing = [i for i, folder in enumerate(left) if list(folder.glob("figures/.*.tmp"))]
    one.left = [left[i] for i in sorted(chosen | {*drawing[:1]})]
    for draft in [path for folder in one.left for path in folder.rglob(".*.tmp")]:
        draft.rename(draft.with_name(draft.name.replace(f".{os.getpid()}.", ".1.")))  # another process's
    shutil.copytree(one.out, one.finished)
    return one


@pytest.fixture
def experiment(made):
    """The same with its folder as it was when it was finished."""
    put(made.finished, made.out)
    return made


def perform(one, *, kind="", changed=(), **more):
    """The call that makes the experiment, with other settings `changed`."""
    kind = kind or one.kind
    given = {**ASKED[kind][0], **dict(changed)}
    more = {"out": one.out, **more}
    if kind == "study":
        file = one.home / "study.toml"
        file.write_text(STUDY.replace("CRITERION", given["criterion"]).replace("CUT", str(one.cut)))
        return sukashi.study(file, **more)
    return getattr(sukashi, kind)(**with_cut(one, given), **more)


def with_cut(one, given):
    def filled(value):
        if isinstance(value, list):
            return [filled(part) for part in value]
        return str(one.cut) if value == "CUT" else value

    return {name: filled(value) for name, value in given.items()}


def put(source, folder):
    shutil.rmtree(folder, ignore_errors=True)
    if source.exists():
        shutil.copytree(source, folder)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def differing(folder, other):
    found, expected = contents(folder), contents(other)
    return {name for name in {*found, *expected} if found.get(name) != expected.get(name)}


def experiments(folder):
    """The folders of the experiments in it, its own last."""
    return sorted((path.parent for path in folder.rglob("experiment.json")), reverse=True)


def strict(text):
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def kept(result):
    """What of a result no clock and no call decides."""
    return {name: value for name, value in result.to_json().items() if name not in result.of_call}


# Kills.


CLOCKS = ("log.jsonl", "report.html", "costs.csv", "costs.tex")  # files that hold times


@pytest.mark.slow
def test_killed_anywhere_and_given_again_it_ends_in_the_same_bytes(made):
    assert len(made.left) in (SNAPSHOTS, SNAPSHOTS + 1)
    assert any(list(left.rglob(".*.tmp")) for left in made.left)
    for left in made.left:
        put(left, made.out)
        result = perform(made)
        assert kept(result) == kept(made.result), left.name
        clocks = {name for name in differing(made.out, made.finished) if name.endswith(CLOCKS)}
        assert differing(made.out, made.finished) == clocks, left.name
        # From one log of times and speeds pages have the same bytes too.
        for log in made.finished.rglob("log.jsonl"):
            shutil.copy(log, made.out / log.relative_to(made.finished))
        for folder in experiments(made.out):
            sukashi.results(folder)
        assert differing(made.out, made.finished) == set(), left.name


@pytest.mark.slow
@pytest.mark.parametrize("made", ["compare", "study"], indirect=True)
def test_processes_that_share_its_trials_end_in_the_same_bytes(made, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)  # one thread for each of two, as for one here
    put(made.home / "nowhere", made.out)
    assert kept(perform(made, jobs=2)) == kept(made.result)
    differ = {name for name in differing(made.out, made.finished) if not name.endswith(CLOCKS)}
    assert differ == set()


# Once and for all.


def test_a_second_call_does_nothing_and_says_so(experiment, monkeypatch):
    monkeypatch.setattr(Workspace, "lease", lambda *args: pytest.fail("a trial was done again"))
    again = perform(experiment)
    assert (experiment.result.finished, again.finished) == (False, True)
    assert kept(again) == kept(experiment.result)
    assert differing(experiment.out, experiment.finished) - {"report.html"} == {"log.jsonl"}


# Other folders.


@pytest.mark.parametrize("name", ["thesis.txt", "trial.json", "results.json", "recipe.json"])
def test_a_foreign_folder_is_refused_untouched(made, tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(UsageError, match=rf"is not empty \({name}\) and holds no experiment: choose another `out`"):
        perform(made, out=tmp_path)
    assert contents(tmp_path) == {name: b"{}"}
    with pytest.raises(UsageError, match=r"is a file: `out` needs a folder"):
        perform(made, out=tmp_path / name)
    assert contents(tmp_path) == {name: b"{}"}


@pytest.mark.parametrize("kind", ASKED)
def test_a_folder_of_something_else_is_refused_before_anything_is_read(kind, cut, tmp_path, monkeypatch):
    one = SimpleNamespace(kind=kind, home=tmp_path, cut=cut, out=tmp_path / "out")
    monkeypatch.setattr(Source, "read", lambda self: pytest.fail("the data are read"))
    monkeypatch.setattr(Source, "build", lambda *args, **more: pytest.fail("the model is loaded"))
    other = tmp_path / "other"
    shutil.copytree(cut, other)
    record = json.loads((other / "experiment.json").read_text())
    (other / "experiment.json").write_text(json.dumps({**record, "kind": "foreign"}))
    with pytest.raises(UsageError, match=r"of another experiment \(foreign, now"):
        perform(one, out=other)
    (other / "experiment.json").write_text(json.dumps({**record, "format": FORMAT + 1}))
    with pytest.raises(UsageError, match="use the version that made it, or another `out`"):
        perform(one, out=other)
    (one.out / "audited").mkdir(parents=True)
    (one.out / "audited" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not empty"):
        perform(one)


def test_a_folder_of_another_identity_is_refused_untouched_naming_the_difference(experiment):
    _, changed, words = ASKED[experiment.kind]
    with pytest.raises(UsageError, match=re.escape(words)):
        perform(experiment, changed=changed)
    assert differing(experiment.out, experiment.finished) == set()


@pytest.mark.parametrize("other", ["compare", "prune", "train"])
def test_a_folder_of_another_kind_is_refused_untouched(experiment, other):
    if (other, experiment.kind) in {("train", "finetune"), ("train", "train"), (experiment.kind, other)}:
        other = "schedule"
    room = {"finetune": "train"}.get(experiment.kind, experiment.kind)
    with pytest.raises(UsageError, match=rf"of another experiment \({room}, now {other}\): choose another `out`"):
        perform(experiment, kind=other)
    assert differing(experiment.out, experiment.finished) == set()


@pytest.mark.parametrize("n", [1, FORMAT + 1])
def test_a_folder_of_another_format_is_refused_untouched(experiment, n):
    path = experiment.out / "experiment.json"
    path.write_text(path.read_text().replace(f'"format": {FORMAT}', f'"format": {n}'))
    before = contents(experiment.out)
    for act in (lambda: perform(experiment), lambda: sukashi.results(experiment.out)):
        with pytest.raises(UsageError, match=f"has format {n}, this version reads {FORMAT}"):
            act()
    assert contents(experiment.out) == before


# What is told.


def test_report_writes_the_same_again(experiment, capsys, monkeypatch):
    for name in ("report.html", "results.json", "results.parquet"):
        (experiment.out / name).unlink()
    shutil.rmtree(experiment.out / "figures", ignore_errors=True)
    found = command(monkeypatch, capsys, "report", experiment.out)
    assert differing(experiment.out, experiment.finished) == set()
    assert found == spelled(sukashi.results(experiment.out).text()) + "\n"


def test_results_do_not_depend_on_the_log(experiment):
    for log in experiment.out.rglob("log.jsonl"):
        log.unlink()
    assert kept(sukashi.results(experiment.out)) == kept(experiment.result)
    differ = differing(experiment.out, experiment.finished)
    assert {name for name in differ if not name.endswith(("log.jsonl", "report.html"))} <= {
        *("tables/costs.csv", "tables/costs.tex", "tables/settings.csv", "tables/settings.tex")
    }


def test_all_that_decides_results_is_in_the_identity(experiment):
    if experiment.kind == "study":
        return  # whose experiments are trials, each with its own identity
    kind = kinds()[experiment.kind]
    # Of weights there is a hash, of how images are read what came of it; a ratio is never told without what it is.
    other = {"weights": "weights_sha256", "ratio": "ratio_asked", "how": "schedule", "size": "height"}
    other |= {"resize": "shorter"}
    of_networks = {"models"} if experiment.kind == "audit" else set()
    found = set(names_in(Workspace(experiment.out).identity))
    deciding = {name for name, field in kind.model_fields.items() if option_of(field).decides}
    asked = {other.get(name, name) for name in deciding - of_networks}
    if experiment.kind == "audit":
        asked -= {
            *Architecture.model_fields,
            *Pixels.model_fields,
            "weights_sha256",
            "height",
            "shorter",
        }  # of each model a digest
    assert asked <= found, asked - found


def names_in(value):
    if isinstance(value, dict):
        for name, inner in value.items():
            yield name
            yield from names_in(inner)


def test_an_option_that_a_summary_does_not_take_is_refused_before_anything_is_written(experiment):
    room = {"finetune": "train"}.get(experiment.kind, experiment.kind)
    (experiment.out / "report.html").unlink()
    name, remedy = ("margn", ": did you mean 'margin'") if room == "compare" else ("margin", ": leave it out")
    with pytest.raises(UsageError, match=f"holds the results of {room}, which have no option '{name}'{remedy}"):
        sukashi.results(experiment.out, **{name: 0.1})
    assert differing(experiment.out, experiment.finished) == {"report.html"}


def test_what_was_found_is_told_alike_in_every_way(experiment):
    result = experiment.result
    assert isinstance(result, Result)
    assert (result.out, result.report) == (str(experiment.out), str(experiment.out / "report.html"))
    told = strict(json.dumps(result.to_json(), allow_nan=False))
    assert told == result.to_json(), "plain dictionaries and lists, no tuples, no numbers of NumPy"
    assert strict((experiment.out / "results.json").read_text()) == kept(result)
    assert set(result.of_call) <= set(told)
    rows = result.table()
    assert rows
    assert {tuple(row) for row in rows} == {tuple(rows[0])}, "equal keys in equal order"
    assert list(rows[0]) == list(result.columns), "every column says what it holds"
    read = pq.read_table(experiment.out / "results.parquet")
    assert read.to_pylist() == rows
    assert described(read.schema) == {name: said for name, (_, said) in result.columns.items()}
    header, shown = result.overview()
    assert shown
    assert {len(row) for row in shown} == {len(header)}
    html = result._repr_html_()
    assert escape(result.verdict) in html
    assert escape(shown[0][0]) in html
    assert result.text().endswith(f"Report: {experiment.out / 'report.html'}")
    assert repr(result) == str(result) == result.text()
    page = (experiment.out / "report.html").read_text()
    assert result.verdict
    assert page.startswith("<!doctype html>")
    assert sorted(p.stem for p in experiment.out.glob("figures/*")) == sorted(
        p.stem for p in experiment.finished.glob("figures/*")
    )


def described(fields):
    """What each column of a file says it holds."""
    return {field.name: (field.metadata or {}).get(b"description", b"").decode() for field in fields}


def test_every_file_of_a_table_says_what_its_columns_hold(experiment):
    for path in experiment.out.rglob("*.parquet"):
        told = described(pq.read_schema(path))
        assert told, path
        assert not [name for name, said in told.items() if not said], path
    for path in experiment.out.rglob("*.csv"):
        assert path.parent.name == "tables", "one of a page, whose words its glossary explains"
        with path.open(newline="") as file:
            head = next(csv.reader(file))
        assert len(set(head)) == len(head), path
        assert not [name for name in head[1:] if not name.strip()], path


def test_its_page_is_for_narrow_screens_keyboards_and_ears_too(experiment):
    """What a browser need not be asked about; tests/test_report.py asks one, where there is one."""
    page = (experiment.out / "report.html").read_text()
    tables = re.findall("<table.*?</table>", page, re.DOTALL)
    assert tables
    for table in tables:
        assert len(re.search("<caption>(.*?)</caption>", table)[1]) > 5
        assert all("scope=" in head for head in re.findall(r"<th\b[^>]*>", table))
        assert re.search('<th scope="(row|rowgroup)"', table)
    for region in re.findall(r"<div[^>]*scroll[^>]*>", page):
        assert re.search('role="region" tabindex="0" aria-label=".', region)
    for picture in re.findall("<img[^>]*>", page):
        assert re.search(r'width="\d+" height="\d+" alt="[^"]*\d', picture), "an alternative text with values"
    assert page.count("<details") == page.count("<summary")
    anchors = re.findall(' id="(.*?)"', page)
    assert len(set(anchors)) == len(anchors)
    assert set(re.findall(' href="#(.*?)"', page)) <= set(anchors)
    contents = re.search("<nav.*?</nav>", page, re.DOTALL)[0]
    assert re.findall('<h2 id="(.*?)">', page) == re.findall('href="#(.*?)"', contents)
    beside = {href for href in re.findall(' href="([^#].*?)"', page) if href.startswith(("figures/", "tables/"))}
    assert beside == {
        str(path.relative_to(experiment.out))
        for name in ("figures", "tables")
        for path in (experiment.out / name).iterdir()
    }
    names = re.findall('data-name="(.*?)"', page)
    assert len(set(names)) == len(names) == len(tables)


def test_json_is_one_object(experiment, capsys, monkeypatch):
    given = with_cut(experiment, ASKED[experiment.kind][0])
    said = [experiment.home / "study.toml", "--out", experiment.out] if experiment.kind == "study" else line(given)
    if experiment.kind != "study":
        said += ["--out", experiment.out]
    printed = command(monkeypatch, capsys, experiment.kind, *said, "--json")
    assert printed.count("\n") == 1
    again = perform(experiment)
    assert strict(printed) == again.to_json()


def line(given):
    """Keywords as a command line says them."""
    named = [given.get("model"), *given.get("models", []), given.get("how")]
    said = [value for value in named if value is not None]
    for name, value in given.items():
        if name not in ("model", "models", "how") and value is not None:
            joined = ",".join(map(str, value)) if isinstance(value, list) else value
            said += [f"--{name.replace('_', '-')}", joined]
    return said


def command(monkeypatch, capsys, *args):
    """What a command prints, which ends well."""
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["sukashi", *map(str, args)])
    with pytest.raises(SystemExit) as stopped:
        main.main()
    printed, said = capsys.readouterr()
    assert not stopped.value.code, said
    return printed
