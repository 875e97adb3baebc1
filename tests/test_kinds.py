"""Settings of every kind: from Python, from the command line, as identity, in the docs."""

import importlib.util
import inspect
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import sukashi
from sukashi import data
from sukashi.cli.options import parameters, values
from sukashi.core.errors import UsageError
from sukashi.core.schema import checked, default_of, keywords, option_of
from sukashi.criteria import plans
from sukashi.experiments import catalogue
from sukashi.experiments.audit.settings import Audit
from sukashi.experiments.check.settings import Check
from sukashi.experiments.compare.settings import Compare
from sukashi.experiments.concepts.settings import Concepts
from sukashi.experiments.export.settings import Export
from sukashi.experiments.kinds import kinds
from sukashi.experiments.prune.settings import Prune
from sukashi.experiments.reading import Images
from sukashi.experiments.schedule.settings import Course, Schedule
from sukashi.experiments.study.settings import ComparisonFile
from sukashi.experiments.train.settings import Finetune, Train
from sukashi.training import loop

KINDS = list(kinds().values())
GIVEN = ["--data", "d", "--out", "o"]
ROOT = Path(__file__).parent.parent
COMPARED = {"model": "m", "data": "d", "criteria": ["drift"], "out": "o"}
# What must be given of each kind: a new one goes here too.
NEEDED = {
    Check: {"model": "m", "data": "d"},
    Prune: {"model": "m", "data": "d", "criterion": "drift", "ratio": 0.5, "out": "o"},
    Export: {"model": "m", "data": "d"},
    Compare: COMPARED,
    Train: {"model": "m", "data": "d", "out": "o"},
    Finetune: {"model": "m", "data": "d", "out": "o"},
    Schedule: {"model": "m", "data": "d", "how": "oneshot", "criteria": ["drift"], "ratios": [0.5], "out": "o"},
    Audit: {"models": ["m", "n"], "data": "d", "out": "o"},
    Concepts: {"model": "m", "data": "d", "layer": "l", "of": "c", "out": "o"},
}


def test_every_kind_has_an_example_here():
    assert set(NEEDED) == set(KINDS), "NEEDED in this file holds settings for every kind"
    assert {kind.kind for kind in KINDS if kind.shared} >= {"compare", "schedule", "audit"}


# From Python.


def test_python_may_give_paths_numbers_of_numpy_and_one_name_for_a_list():
    asked = keywords(
        Compare,
        {
            "model": Path("folder"),
            "data": Path("images"),
            "criteria": "drift",
            "out": Path("a") / "b",
            "ratios": np.array([0.3, 0.5], np.float32),
            "seeds": np.int64(2),
            "margin": np.float32(0.5),
            "sampling": ("random",),
            "only": (name for name in ["cat", "dog"]),
            "options": {"drift": {"share": np.float64(0.5)}},
        },
    )
    assert (asked.model, asked.data, asked.out, asked.criteria) == ("folder", "images", "a/b", ["drift"])
    assert (asked.ratios, asked.seeds, asked.margin) == ([0.3, 0.5], 2, 0.5)
    assert (asked.sampling, asked.only, asked.options) == (["random"], ["cat", "dog"], {"drift": {"share": 0.5}})
    assert [type(value) for value in (*asked.ratios, asked.seeds, asked.margin)] == [float, float, int, float]
    json.dumps(asked.identity())


def test_a_file_is_strict():
    given = {"data": "d", "out": "o", "models": {"a": {"spec": "s"}}, "criteria": ["drift"]}
    assert checked(ComparisonFile, given, file="f").seeds == 3
    for name, value, said in [
        ("criteria", "drift", r'f: criteria must be a list like \["magnitude"\], got \'drift\''),
        ("seeds", 2.0, "f: seeds must be a whole number like 3, got 2.0"),
        ("seeds", "2", "f: seeds must be a whole number"),
        ("out", Path("o"), "f: out must be a string"),
        ("ratios", [0.5, 1], r"f: ratio must be in \[0, 1\), got 1"),
    ]:
        with pytest.raises(UsageError, match=said):
            checked(ComparisonFile, {**given, name: value}, file="f")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("criteria", {"drift"}, "`criteria` must be a list"),  # a set has no order
        ("seeds", "3", "`seeds` must be a whole number like 3, got '3'"),
        ("seeds", [0, 1], r"`seeds` is how many there are, counted from 0, got \[0, 1\]: give `seeds=2`"),
        ("seeds", 10**6, "`seeds` must be at most 1000, got 1000000"),
        ("margin", float("nan"), "`margin` must be a finite number"),
        ("device", "gpu", "`device` must be auto, cpu or cuda, got 'gpu'"),
        ("weights", 3, "`weights` must be a string, got 3"),
        ("sede", 3, "unknown setting 'sede': did you mean 'seeds'"),
    ],
)
def test_what_python_gives_wrong_is_one_sentence(name, value, said):
    with pytest.raises(UsageError, match=f"^{said}") as found:
        keywords(Compare, {**COMPARED, name: value})
    assert "\n" not in str(found.value)


def test_numbers_that_no_network_reckons_with_are_refused():
    for value in (1e308, 3.5e38):
        with pytest.raises(UsageError, match=r"^`weight_decay` must be at most 3\.4e\+38, .* got "):
            keywords(Train, {**NEEDED[Train], "weight_decay": value})
    assert keywords(Train, {**NEEDED[Train], "weight_decay": 3e38}).weight_decay == 3e38


def test_what_is_missing_is_said():
    with pytest.raises(UsageError, match=r"^`data` must be given: `data='digits'`$"):
        keywords(Compare, {name: value for name, value in COMPARED.items() if name != "data"})


@pytest.mark.parametrize("kind", [Prune, Train, Audit])
def test_seeds_that_no_generator_takes_are_refused(kind):
    for seed in (-1, 2**32, 2**64):
        with pytest.raises(UsageError, match=r"^`seed` must be at (least 0|most 4294967295), got "):
            keywords(kind, {**NEEDED[kind], "seed": seed})


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
def test_help_of_a_function_tells_the_settings(kind):
    function = getattr(sukashi, kind.kind)
    told, said = inspect.signature(function).parameters, " ".join(function.__doc__.split())
    assert set(kind.model_fields) == set(told) - {"command", "jobs"}
    assert ("jobs" in told) == kind.shared
    for name, field in kind.model_fields.items():
        if not field.is_required():
            assert told[name].default == (... if name in ("lr", "weight_decay") else default_of(field))
            assert f" {name}: {field.description}" in said


# What decides results.


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
def test_what_does_not_decide_results_is_no_part_of_the_identity(kind):
    asked = keywords(kind, NEEDED[kind])
    free = {"device": "cpu", "workers": 3, "out": "p", "memory": 1.0, "tensorboard": True, "limit": 1.0}
    other = {name: value for name, value in free.items() if name in kind.model_fields}
    assert keywords(kind, {**NEEDED[kind], **other}).identity() == asked.identity()
    assert asked.identity() == json.loads(json.dumps(asked.identity()))
    for name, value in {"test_images": 77, "width": 3, "only": ["a"], "seed": 5, "ratio": 0.1, "epochs": 3}.items():
        if name in kind.model_fields:
            assert keywords(kind, {**NEEDED[kind], name: value}).identity() != asked.identity()


@pytest.mark.parametrize("kind", [*KINDS, Course])
def test_what_may_grow_is_a_setting(kind):
    assert kind.grows <= set(kind.model_fields)


# The command line.


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
def test_every_setting_can_be_given_on_the_command_line_as_its_default_is_shown(kind):
    taken = {p.name: p for p in parameters(kind)}
    assert set(taken) == set(kind.model_fields)
    for name, field in kind.model_fields.items():
        assert (taken[name].default is inspect.Parameter.empty) == field.is_required()
        default = default_of(field)
        if not field.is_required() and taken[name].default is not None:
            assert values(kind, {name: taken[name].default}) == {name: default}
        assert field.description
        assert option_of(field)


def run(*args, code="import sys; from sukashi.cli.main import main; main()"):
    ending = "\nimport sys; print(sorted({'torch', 'numpy', 'scipy'} & set(sys.modules)), file=sys.stderr)"
    wrapped = f"try:\n    {code}\nexcept SystemExit as stopped: print(stopped.code or 0, file=sys.stderr)"
    command = [sys.executable, "-c", f"import sys\n{wrapped}{ending}", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
def test_help_does_not_import_torch(kind):
    found = run(kind.kind, "--help")
    assert found.stderr == "0\n[]\n"
    assert "--data" in found.stdout


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (
            ["compare", "m", "--data", "d", "--criteria", "drift", "--out", "o", "--seeds", 10**6],
            "seeds must be at most",
        ),
        (["train", "m", "--data", "d", "--out", "o", "--seed", 2**64], "seed must be at most"),
        (
            ["train", "m", "--data", "d", "--out", "o", "--optimizer", "adam"],
            "optimizer must be sgd or adamw, got 'adam'",
        ),
        (["prune", "m", "--data", "d", "--out", "o", "--criterion", "drift", "--ratio", 1], "ratio must be in [0, 1)"),
        (["check", "m"], "Missing option '--data'"),
        (["audit", "m", "n", "--data", "d", "--out", "o", "--set", "x"], "--set must be NAME=VALUE"),
    ],
)
def test_errors_of_usage_do_not_import_torch(args, said):
    found = run(*args)
    line, code, heavy = found.stderr.splitlines()
    assert said in line
    assert (code, heavy, found.stdout) == ("2", "[]", "")


def test_settings_import_no_torch():
    source = ROOT / "src"
    files = [*source.glob("sukashi/**/*settings.py"), source / "sukashi/core/schema.py"]
    names = [".".join(path.relative_to(source).with_suffix("").parts) for path in files]
    assert len(names) >= 9
    found = run(code=f"import {', '.join(names)}; print('imported')")
    assert (found.stdout, found.stderr) == ("imported\n", "[]\n")


# What is told.


def test_every_listed_option_can_be_set_as_it_is_printed():
    seen = 0
    for what, registry in ((what, catalogue.registry_of(what)) for what in catalogue.METHODS):
        for method in registry:
            for option, text in catalogue.about(what, method.name)["options"].items():
                given = values(Audit, {"options": [f"{method.name}.{option}={text}"]})["options"][method.name]
                method.check_options(given)
                assert given[option] == json.loads(json.dumps(method.options[option]))
                seen += 1
    assert seen > 20


def test_defaults_are_those_of_the_functions_below():
    assert Images.model_fields["max_pixels"].default == data.MAX_PIXELS
    assert Schedule.model_fields["round_to"].default == plans.ROUND_TO
    assert option_of(Prune.model_fields["round_to"]).default == str(plans.ROUND_TO)
    assert Train.model_fields["memory"].default * 2**30 == loop.MEMORY


def test_tables_in_the_docs_are_those_of_the_settings():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    pages = {path.name: path.read_text() for path in (ROOT / "docs").glob("*.md")}
    told = [found[1:3] for page in pages.values() for found in tables.PAGE.findall(page)]
    assert {name for what, name in told if what == "settings"} == set(tables.KINDS)
    assert {name for what, name in told if what == "columns"} == set(tables.TABLES)
    for name, page in pages.items():
        assert tables.written(page) == page, f"docs/{name} is not up to date: python docs/tables.py"
