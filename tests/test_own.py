"""Methods of one's own, in files, notebooks and packages; a method whose code has changed is measured again."""

import importlib
import io
import json
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import sukashi
from sukashi.attributions import attributions
from sukashi.cli.main import app
from sukashi.core import code
from sukashi.core.errors import UsageError
from sukashi.core.imported import imported
from sukashi.core.registry import Registry
from sukashi.criteria import criteria
from sukashi.experiments import catalogue, executor
from sukashi.experiments.audit.settings import Audit
from sukashi.experiments.compare.settings import Compare
from sukashi.experiments.study.file import read
from sukashi.experiments.workspace import Workspace
from sukashi.measures import cost, measures

HEAD = """
from sukashi.core.types import Scores
from sukashi.criteria import criteria
from helping import sign
"""
BODY = '''
def {name}(model, sites, data, *, generator, power=1.0):
    """By the number of a unit, last first."""
    return Scores({{s: sign * power * -s.axis * order(s.n_units) for s in sites}}, 0, "{name}")


def order(n):
    import torch

    return torch.arange(n, dtype=torch.float64)
'''
PLAIN = HEAD + BODY.format(name="last")
REGISTERED = HEAD + '@criteria.register("last", source="a test", needs_data=False)' + BODY.format(name="last")
ASKED = {"data": "digits", "calibration": 2, "test_images": 20, "width": 8}
NET = "sukashi:digits_cnn"
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*has random weights"),
    pytest.mark.usefixtures("alone"),
]


@pytest.fixture(autouse=True)
def clockless(monkeypatch):
    monkeypatch.setattr(cost, "latency", lambda models, batch, **how: [[2.0] * 6, *([[1.0] * 6] * (len(models) - 1))])


@pytest.fixture
def mine(alone):
    """Writes mine.py and what it imports, and forgets what was imported before."""

    def write(source=PLAIN, helping="sign = 1"):
        Path("mine.py").write_text(source)
        Path("helping.py").write_text(helping)
        alone()

    write()
    return write


def compared(out="out", **changes):
    given = {**ASKED, "criteria": ["mine:last", "magnitude"], "seeds": 1, "ratios": [0.5], **changes}
    return sukashi.compare(NET, out=out, **given)


def order_of(folder="out"):
    """The first unit to go, by the trial of a comparison's criterion `last`."""
    (record,) = (r for r in Workspace(folder).records() if r.about["criterion"] == "last")
    return record.arrays("plan")["unit"][0]


# Found.


def test_files_of_a_room_are_found_by_themselves_in_the_order_of_their_names(tmp_path):
    room = tmp_path / "room"
    room.mkdir()
    (room / "__init__.py").write_text(
        "from sukashi.core.registry import fill\nfound = []\nfill(__name__, __path__)\n",
    )
    for name in ("second", "first", "_private"):
        (room / f"{name}.py").write_text("import room\nroom.found.append(__name__)\n")
    assert imported("room:found") == ["room.first", "room.second"]


@pytest.mark.slow
@pytest.mark.parametrize("source", [PLAIN, REGISTERED], ids=["plain", "registered"])
def test_a_criterion_in_a_file_goes_by_its_name_everywhere(mine, source, capsys):
    mine(source)
    command = ["compare", NET, "--criteria", "mine:last,magnitude", "--ratios", "0.5", "--seeds", "1", "--out", "out"]
    command += ["--data", "digits", "--calibration", "2", "--test-images", "20", "--width", "8"]
    assert app([*command, "--set", "last.power=2"], standalone_mode=False) in (None, 0)
    identity = Workspace("out").identity
    assert (identity["criteria"], identity["options"]) == (
        ["last", "magnitude"],
        {"last": {"power": 2}, "magnitude": {}},
    )
    assert re.search(r"^last +\d", capsys.readouterr().out, re.MULTILINE)
    again = compared(criteria=["last", "magnitude"], options={"mine:last": {"power": 2}})
    assert again.finished
    assert set(again.contenders) == {"last", "magnitude"}
    bench = sukashi.open(NET, "digits", width=8)
    assert bench.rank("mine:last", power=2.0).plan.method == "last"
    assert app([*command, "--set", "mine:last.power=x"], standalone_mode=False) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "power of last must be a valid number, got 'x': its default is 1.0" in said
    with pytest.raises(UsageError, match="last has no option 'powr': did you mean 'power'"):
        compared(options={"last": {"powr": 1.0}})
    with pytest.raises(UsageError, match="options of last were given under two names"):
        compared(options={"last": {"power": 1.0}, "mine:last": {"power": 1.0}})
    assert catalogue.about("criteria", "mine:last")["options"] == {"power": "1.0"}


def test_prune_and_schedule_take_it_too(mine):
    pruned = sukashi.prune(NET, criterion="mine:last", ratio=0.5, round_to=1, out="half", **ASKED)
    assert pruned.to_json()["units_removed"] > 0
    assert Workspace("half").identity["criterion"] == "last"
    given = {"ratios": [0.5], "epochs": 1, "round_to": 1, "batch_size": 512, "options": {"last": {"power": 2.0}}}
    levels = sukashi.schedule(NET, how="oneshot", criteria="mine:last", out="levels", **given, **ASKED)
    assert {row["contender"] for row in levels.levels} == {"last"}
    assert Path("levels/last/0/0.50/recipe.json").exists()
    more = sukashi.schedule(NET, how="oneshot", criteria=["mine:last", "magnitude"], out="levels", **given, **ASKED)
    assert {row["contender"] for row in more.levels} == {"last", "magnitude"}
    mine(PLAIN.replace("-s.axis", "s.axis"))
    with pytest.raises(UsageError, match="levels has networks that were made while the code of last was another"):
        sukashi.schedule(NET, how="oneshot", criteria=["mine:last", "magnitude"], out="levels", **given, **ASKED)


@pytest.mark.slow
def test_a_study_file_takes_it_with_its_pairs(mine):
    Path("study.toml").write_text(
        """
        out = "studied"
        data = "digits"
        criteria = ["mine:last", "magnitude"]
        ratios = [0.5]
        seeds = 1
        calibration = 2
        test_images = 20
        pairs = [["mine:last", "magnitude"]]
        [options.last]
        power = 2
        [models.net]
        spec = "sukashi:digits_cnn"
        width = 8
        """
    )
    (pair,) = sukashi.study("study.toml").pairs
    assert (pair["first"], pair["second"]) == ("last", "magnitude")
    assert sukashi.study("study.toml").finished
    mine(PLAIN.replace("-s.axis", "s.axis"))
    with pytest.warns(
        UserWarning, match="the code of last is not what it was: 1 finished trial of .*net is done again"
    ):
        assert not sukashi.study("study.toml").finished


def test_an_attribution_and_a_measure_in_a_file_are_audited_and_reported_without_the_file(mine, alone):
    mine(
        """
from sukashi.core.types import Maps, Measurement

def shine(model, x, target, sites, objective, *, gain: float = 1.0):
    "The pixels themselves, as they are read."
    return {site: gain * x.reshape(len(x), site.n_units, *x.shape[2:]) for site in sites}

def peak(maps: Maps, *, power=1.0):
    "The largest value of each map."
    return Measurement(maps.values.flatten(1).amax(1) ** power, maps.image_id, "share")

def near(maps: Maps, reference_maps: Maps):
    "How near two maps are."
    return Measurement(-(maps.values - reference_maps.values).flatten(1).norm(dim=1), maps.image_id, "distance")
"""
    )
    sukashi.prune(NET, criterion="magnitude", ratio=0.5, out="half", **ASKED)
    given = {"data": "digits", "width": 8, "test_images": 20, "population": "all", "out": "audited"}
    asked = {"attributions": ["mine:shine"], "measures": ["mine:peak", "mine:near"], "options": {"peak": {"power": 2}}}
    found = sukashi.audit([NET, "half"], **given, **asked).saliency
    assert (found["attributions"], found["measures"]) == (["shine"], ["peak"])
    assert {row["measure"] for row in found["similarities"]} == {"near"}
    told = {row["measure"]: row for row in sukashi.results("audited").table()}
    assert {name: row["better"] for name, row in told.items()} == {"peak": None, "near": None}
    assert told["near"]["low"] <= told["near"]["mean"] <= told["near"]["high"]
    alone()
    assert "peak" not in measures
    Path("mine.py").unlink()
    assert sukashi.results("audited").saliency == found


def test_contenders_that_differ_in_signs_that_no_folder_has_have_files_of_their_own(mine):
    mine(PLAIN.replace("power=1.0", "power=1.0, of='x'"))
    both = ['mine:last[of="x y"]', 'mine:last[of="x, y"]']
    given = {"ratios": [0.5], "epochs": 1, "round_to": 1, "batch_size": 512}
    levels = sukashi.schedule(NET, how="oneshot", criteria=both, out="levels", **given, **ASKED)
    assert set(levels.contenders) == {'last[of="x y"]', 'last[of="x, y"]'}
    assert len(list(Path("levels").glob("last*/0/0.50/recipe.json"))) == 2


def test_figures_of_an_attribution_with_a_path_in_its_options_are_files_that_the_page_links_to(mine):
    mine(
        """
def shine(model, x, target, sites, objective, *, of="x"):
    return {site: x.reshape(len(x), site.n_units, *x.shape[2:]) for site in sites}
"""
    )
    given = {"data": "digits", "width": 8, "test_images": 20, "population": "all", "measures": ["gini"]}
    both = ['mine:shine[of="../a/b"]', 'mine:shine[of="../a b"]']
    found = sukashi.audit([NET, NET], attributions=both, out="audited", **given)
    linked = re.findall(r'href="(figures/gallery-[^"]*)"', Path(found.report).read_text())
    drawn = {f"figures/{path.name}" for path in Path("audited/figures").glob("gallery-*")}
    assert len(drawn) == 4
    assert set(linked) == drawn
    assert not [name for name in drawn if set(name) & set(" []\"'%")], "links as they stand"


def test_an_attribution_of_units_is_a_criterion_too(mine):
    mine(
        """
from sukashi.attributions import attributions
from sukashi.network import hooks

@attributions.register("writes", source="a test", signed=False)
def writes(model, x, target, sites, objective, *, gain: float = 1.0):
    "What is there, that and no more."
    with hooks.recorded(model, sites) as seen:
        model(x)
    return {site: gain * hooks.gather(site, seen[site]).detach().abs() for site in sites}
"""
    )
    assert compared(criteria=["mine:writes"]).contenders == ["writes"]
    assert criteria["writes"].options == {"classes": "true", "normalise": "none", "batch_size": 64, "gain": 1.0}
    assert criteria["writes"].code != criteria["saliency"].code


def test_the_working_directory_comes_after_what_is_installed(alone):
    Path("colorsys.py").write_text("mine = True")
    Path("netto.py").write_text("raise SystemExit('nothing to do')")
    with pytest.raises(UsageError, match="cannot import colorsys:mine"):
        imported("colorsys:mine")
    with pytest.raises(
        UsageError, match=r"cannot import netto:a \(SystemExit: nothing to do\): .*netto.py, line 1 raised"
    ):
        imported("netto:a")


@pytest.mark.parametrize(
    ("source", "asked", "words"),
    [
        ("last = 3", "mine:last", "mine:last is of type int, and a criterion is a function"),
        (
            "def last(model, x): ...",
            "mine:last",
            r"'last' of mine takes \(model, x\), and must begin with \(model, sit",
        ),
        ("def last(model, sites, data): ...", "mine:last", r"must begin with \(model, sites, data, \*, generator\)"),
        (
            "def other(model, sites, data, *, generator): ...\nlast = other",
            "mine:last",
            "'last' is a function called 'other'",
        ),
        (
            "from __future__ import annotations\ndef last(model, sites, data: Batches, *, generator): ...",
            "mine:last",
            "annotations of .* mean nothing .*Batches",
        ),
        ("def lost(): ...", "mine:last", r"cannot import mine:last \(AttributeError: .*no attribute 'last'"),
        (
            "import nowhere_at_all",
            "mine:last",
            "cannot import mine:last .*No module named 'nowhere.*mine.py, line 1 raised",
        ),
        ("\n1 / 0", "mine:last", r"cannot import mine:last \(ZeroDivision.*\): .*mine.py, line 2 raised it, put that"),
        ("import torch\ntorch.ones(2, 'x')", "mine:last", r"cannot import mine:last .*mine.py, line 2 raised it"),
        ("def last(", "mine:last", r"cannot import mine:last \(SyntaxError.*mine.py, line 1 raised it"),
        ("", "nowhere_at_all:last", "cannot import nowhere_at_all:last .*: check the name, and that its folder is"),
        ("", "lost", r"unknown criterion 'lost'.*; or package\.module:function"),
        (
            BODY.format(name="magnitude"),
            "mine:magnitude",
            "'magnitude' of mine has the name of that of sukashi.criteria.magnitude",
        ),
    ],
)
def test_what_is_no_criterion_is_refused_before_anything_is_loaded(mine, source, asked, words):
    mine(source)
    with pytest.raises(UsageError, match=words):
        compared(criteria=[asked])
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("gives", "words"),
    [
        ("{}", r"last returned a value of type dict, and a criterion returns Scores\(.*'last'\) or a Plan"),
        ("Scores({}, 0, 'last')", "last says nothing of site 'conv1'"),
        (
            "Scores({s: [1.0] * s.n_units for s in sites}, 0, 'last')",
            r"at 'conv1' are list, and must be a tensor \(8,\)",
        ),
        ("Scores({s: torch.ones(3) for s in sites}, 0, 'last')", r"at 'conv1' are \(3,\), and must be a tensor \(8,\)"),
        ("Scores({s: torch.ones(s.n_units) / 0 for s in sites}, 0, 'last')", "at 'conv1' hold NaN or Inf"),
    ],
)
def test_what_a_criterion_may_not_return_is_refused_in_words(mine, gives, words):
    mine(f"import torch\n{HEAD}\ndef last(model, sites, data, *, generator):\n    return {gives}")
    with pytest.raises(UsageError, match=words):
        compared()


def test_what_attributions_and_measures_may_not_return_is_refused_in_words(mine):
    mine(
        "def flat(model, x, target, sites, objective):\n    return {s: x.sum() for s in sites}\n\n"
        "def one(maps):\n    return 1.0"
    )
    x = torch.zeros(2, 1, 8, 8)
    with pytest.raises(
        UsageError, match=r"what flat gives at 'the input' is \(\), and must be a tensor \(images, units"
    ):
        sukashi.attribute(NET, x, torch.zeros(2, dtype=torch.long), "mine:flat")
    with pytest.raises(UsageError, match="one returned a value of type float, and a measure returns Measurement"):
        sukashi.audit([NET, NET], "digits", width=8, test_images=20, population="all", measures=["mine:one"])


SPOILS = """
    import random, numpy
    layer = next(m for m in model.modules() if isinstance(m, torch.nn.Linear))
    layer.weight.data[::2] = 0
    layer.register_forward_hook(lambda layer, x, y: y * 0)
    model.train().requires_grad_(False)
    torch.set_grad_enabled(False)
    torch.rand(3), numpy.random.rand(3), random.random()
    data.x.zero_(), data.target.zero_()
"""


def test_what_a_criterion_does_to_the_network_stays_its_own(mine):
    mine("import torch\n" + PLAIN.replace("    return Scores", f"{SPOILS}\n    return Scores", 1))
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    found = compared(criteria=["mine:last", "taylor"])
    alone = compared("other", criteria=["taylor"])
    assert found.dense_accuracy == alone.dense_accuracy
    assert found.sauces["taylor"] == alone.sauces["taylor"]
    bench = sukashi.open(NET, "digits", width=8)
    kept = {name: value.clone() for name, value in bench.loaded.model.state_dict().items()}
    bench.rank("mine:last")
    assert all(torch.equal(value, kept[name]) for name, value in bench.loaded.model.state_dict().items())
    assert all(parameter.requires_grad for parameter in bench.loaded.model.parameters())
    assert not any(module.training or module._forward_hooks for module in bench.loaded.model.modules())
    assert torch.is_grad_enabled()
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_attributions_and_measures_of_ones_own_spoil_nothing_for_others(mine):
    mine(
        """
import torch
from sukashi.core.types import Measurement

def shine(model, x, target, sites, objective):
    found = {site: x.reshape(len(x), site.n_units, *x.shape[2:]).clone() for site in sites}
    next(model.parameters()).data.zero_()
    x.zero_()
    return found

def peak(model, batch, maps, generator):
    found = maps.values.flatten(1).amax(1)
    next(model.parameters()).data.zero_()
    batch.x.zero_()
    maps.values.zero_()
    torch.rand(1, generator=generator)
    return Measurement(found, maps.image_id, "share")
"""
    )
    given = {"data": "digits", "width": 8, "test_images": 20, "population": "all"}
    both = sukashi.audit(
        [NET, NET],
        attributions=["mine:shine", "saliency"],
        measures=["mine:peak", "gini", "deletion"],
        out="a",
        **given,
    )
    alone = sukashi.audit([NET, NET], attributions=["saliency"], measures=["gini", "deletion"], out="b", **given)
    for measure in ("gini", "deletion"):
        assert both.saliency["models"][0]["means"]["saliency"][measure] == pytest.approx(
            alone.saliency["models"][0]["means"]["saliency"][measure], abs=0
        )


def test_random_numbers_that_nobody_passes_on_are_those_of_the_seed(mine):
    mine(
        """
import random
import numpy as np
import torch
from sukashi.core.types import Scores

def last(model, sites, data, *, generator):
    drawn = lambda n: torch.rand(n) + torch.tensor(np.random.rand(n)) + random.random()
    return Scores({site: drawn(site.n_units).double() for site in sites}, 0, "last")
"""
    )
    bench = sukashi.open(NET, "digits", width=8)
    first, again, other = (bench.rank("mine:last", seed=seed).table() for seed in (0, 0, 1))
    assert first == again != other


def test_a_criterion_that_says_it_needs_no_data_is_given_no_images(mine):
    mine(
        REGISTERED.replace(
            "    return Scores", "    assert data.x.shape[1:] == (1, 8, 8) and not len(data)\n    return Scores", 1
        )
    )
    assert sukashi.open(NET, "digits", width=8).rank("mine:last").plan.method == "last"


def test_an_error_of_a_method_is_one_sentence_with_its_name_and_line(mine):
    mine(
        "import torch\nfrom sukashi.core.types import Measurement\n\n"
        "def last(model, sites, data, *, generator):\n    return torch.ones(2) @ torch.ones(3)\n\n"
        "def mean(maps):\n    return Measurement(maps.values.mean().view(1), maps.image_id, 'share')\n\n"
        "def first(maps):\n    return Measurement(maps.values.amax((1, 2))[:1], maps.image_id[:1], 'share')\n"
    )
    with pytest.raises(
        UsageError, match=r"^last failed in .*mine.py, line 5 \(RuntimeError: .*\): put that right"
    ) as error:
        sukashi.open(NET, "digits", width=8).rank("mine:last")
    assert isinstance(error.value.__cause__, RuntimeError)
    given = {"data": "digits", "width": 8, "test_images": 20, "population": "all"}
    with pytest.raises(
        UsageError, match=r"^mean failed in .*line 8 \(AssertionError: a Measurement has a value for each"
    ):
        sukashi.audit([NET, NET], measures=["mine:mean"], **given)
    with pytest.raises(
        UsageError, match=r"^first was given 2 images and returned values of 1: a measure returns a value of each"
    ):
        sukashi.audit([NET, NET], measures=["mine:first"], **given)


def test_what_nobody_cites_comes_from_where_it_is(mine):
    mine(REGISTERED.replace('source="a test", ', ""))
    assert criteria["mine:last"].source == "mine:last"


def test_a_function_in_place_of_its_name_is_refused_with_the_name(mine):
    with pytest.raises(
        UsageError, match=r"must be a string.*, got <function .*: give 'last' where .* or 'module:last'"
    ):
        compared(criteria=[imported("mine:last")])


# Registered again.


def test_a_method_that_is_registered_again_takes_its_own_place_and_no_other():
    registry, provided = Registry("spice", "spices"), []

    def cell(text, module):
        session = {"registry": registry, "__name__": module, "provided": provided}
        exec(f"@registry.register('mint', source='')\ndef mint():\n    return {text!r}", session)

    cell("a", "__main__")
    cell("b", "__main__")
    assert (registry["mint"].fn(), registry.names()) == ("b", ["mint"])
    with pytest.raises(UsageError, match="spice 'mint' of garden has the name of that of __main__: give yours another"):
        cell("c", "garden")
    assert registry["mint"].fn() == "b"


# Entry points.


def test_what_packages_offer_is_loaded_when_it_is_asked_for(tmp_path, mine, monkeypatch):
    mine(REGISTERED)
    info = tmp_path / "spare-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: spare\nVersion: 1.0\n")
    offered = "last = mine:last\nbroken = nowhere_at_all:broken\nbound = mine:bound\n"
    (info / "entry_points.txt").write_text(f"[sukashi.criteria]\n{offered}")
    monkeypatch.syspath_prepend(str(tmp_path))
    rows = {row["name"]: row for row in catalogue.rows("criteria")}
    assert (rows["last"]["summary"], rows["last"]["source"]) == ("Of the package spare.", "mine:last")
    assert "mine" not in sys.modules
    assert "last" not in criteria.names()
    assert compared(criteria=["last"], jobs=1).contenders == ["last"]
    assert criteria.is_found("last")
    with pytest.raises(
        UsageError,
        match=r"'broken' is nowhere_at_all:broken of spare, which can't be imported \(ModuleNotFoundError.*put that",
    ):
        compared(criteria=["broken"])
    with pytest.raises(UsageError, match=r"'bound' is mine:bound of spare, which can't be imported \(AttributeError"):
        criteria["bound"]
    with pytest.raises(UsageError, match="unknown criterion 'brokn': did you mean 'broken'"):
        criteria["brokn"]
    other = tmp_path / "other-1.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (other / "entry_points.txt").write_text("[sukashi.criteria]\nbroken = mine:broken\n")
    importlib.invalidate_caches()
    with pytest.raises(UsageError, match=r"'broken' is offered by .* of (spare|other) and by .*: remove one"):
        criteria["broken"]


# Changed.


def test_a_comparison_measures_what_has_changed_again_and_nothing_else(mine, recwarn):
    before = compared()
    first, keys = order_of(), {record.key for record in Workspace("out").records()}
    recwarn.clear()
    mine(
        "# a comment\n"
        + PLAIN.replace("By the number", "Said  otherwise")
        .replace("axis * order", "axis  *  (order)")
        .replace("(order)(", "order(")
    )
    assert compared().finished
    assert not [w for w in recwarn if "is not what it was" in str(w.message)]
    mine(PLAIN.replace("-s.axis", "s.axis"))
    with pytest.warns(UserWarning, match="the code of last is not what it was: 1 finished trial of out is done again"):
        after = compared()
    assert not after.finished
    assert order_of() != first, "the figures are those of the method as it is"
    assert after.sauce["magnitude"] == before.sauce["magnitude"]
    records = Workspace("out").records()
    assert len(records) == 2 == len({record.key for record in records} - keys) + 1, "the old trial is in no summary"
    assert len(list(Path("out/trials").iterdir())) == 3, "and stays, for the code may be as it was again"
    assert len(Workspace("out").logged("latency")) == 3, "its network is another, and was timed"
    assert compared().finished
    mine()
    assert order_of("out") != first
    assert compared().finished
    assert order_of() == first


@pytest.mark.parametrize("change", ["helping", "nested", "package"])
def test_what_a_method_imports_of_its_own_is_its_code(mine, change):
    if change == "package":
        Path("pack").mkdir()
        Path("pack/__init__.py").touch()
        Path("pack/signs.py").write_text("sign = 1")
        mine(PLAIN.replace("from helping", "from pack.signs"))
    elif change == "nested":
        mine(
            PLAIN.replace("from helping import sign", "").replace(
                "    return", "    from helping import sign\n\n    return", 1
            )
        )
    before = criteria["mine:last"].code
    assert criteria["mine:last"].code == before
    if change == "package":
        Path("pack/signs.py").write_text("sign = -1")
        mine(PLAIN.replace("from helping", "from pack.signs"))
    else:
        mine(Path("mine.py").read_text(), "sign = -1")
    assert criteria["mine:last"].code != before


@pytest.mark.parametrize("raised", ["RuntimeError('no')", "SystemExit('no')", "KeyboardInterrupt"])
@pytest.mark.parametrize(
    "line", ["from pack.signs import sign", "import pack.deep.signs", "from pack.deep import signs"]
)
def test_what_a_method_may_import_is_read_and_not_run(mine, line, raised):
    Path("pack/deep").mkdir(parents=True)
    Path("pack/__init__.py").write_text(f"raise {raised}")
    signs = Path("pack/signs.py" if "deep" not in line else "pack/deep/signs.py")
    mine(PLAIN.replace("    return", f"    if power > 9:\n        {line}\n\n    return", 1))
    codes = set()
    for sign in (1, -1):
        signs.write_text(f"raise {raised}\nsign = {sign}")
        codes.add(criteria["mine:last"].code)
    assert len(codes) == 2
    assert "pack" not in sys.modules


def test_code_is_that_which_runs_until_it_is_loaded_anew(mine):
    before = criteria["mine:last"].code
    Path("mine.py").write_text(PLAIN.replace("-s.axis", "s.axis"))
    assert criteria["mine:last"].code == before, "what runs is what was imported"
    importlib.reload(sys.modules["mine"])
    assert criteria["mine:last"].code != before


def test_an_edit_of_sukashi_changes_the_methods_that_read_it_and_no_other(monkeypatch):
    before = {method.name: method.code for method in criteria}
    edited(monkeypatch, "sukashi.criteria.engine")
    changed = {method.name for method in criteria if method.code != before[method.name]}
    assert {"cswap", "cbp", "amp", "drift"} <= changed
    assert not changed & {"magnitude", "random", "taylor", "wanda", "lrp"}


def edited(monkeypatch, module):
    """A module of sukashi whose code is another from now on."""
    sources = code.sources(module)
    known = code._read_before[module]
    monkeypatch.setitem(code._read_before, module, code._Source(known.spec, "edited", known.imports))
    assert code.sources(module) != sources


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "done_again"),
    [
        ("sukashi.network.perturbed", {"saliency, dense", "saliency, randomised", "saliency, gallery"}),
        (
            "sukashi.attributions.maps",
            {"saliency, dense", "saliency, randomised", "saliency, gallery", "saliency, half"},
        ),
    ],
)
def test_an_audit_measures_again_what_an_edit_of_sukashi_changes(monkeypatch, module, done_again):
    for name in ("dense", "half"):
        sukashi.prune(NET, criterion="magnitude", ratio=0.5, out=name, **ASKED)
    given = {"data": "digits", "test_images": 20, "population": "all", "out": "audited", "sanity": True}
    asked = Audit(models=["dense", "half"], attributions=["saliency"], measures=["gini", "rank_correlation"], **given)

    def labels():
        return {trial.key: trial.label for trial in executor.prepare_of(asked).trials}

    before = labels()
    edited(monkeypatch, module)
    after = labels()
    assert {after[key] for key in after.keys() - before.keys()} == done_again
    assert len(after) == 5


@pytest.mark.parametrize(("asked", "named"), [({"target_flops": 0.9}, "target_flops"), ({"ratio": 0.5}, None)])
def test_a_ratio_that_was_searched_for_by_other_code_is_not_taken_for_that_of_this(monkeypatch, asked, named):
    def prune():
        return sukashi.prune(NET, criterion="magnitude", out="out", round_to=1, **asked, **ASKED)

    assert not prune().finished
    edited(monkeypatch, "sukashi.experiments.prune.targets")
    if named is None:
        assert prune().finished
    else:
        with pytest.raises(UsageError, match=f"out has networks that were made while the code of {named} was another"):
            prune()


def test_a_study_asks_anew_of_what_it_has_yet_to_make_where_its_code_is_another(monkeypatch):
    Path("study.toml").write_text(
        """
        data = "digits"
        test_images = 20
        out = "studied"
        [experiments.cut]
        kind = "prune"
        model = "sukashi:digits_cnn"
        width = 8
        calibration = 2
        criterion = "magnitude"
        ratio = 0.5
        [experiments.smaller]
        kind = "prune"
        model = "$OUT/cut"
        calibration = 2
        criterion = "magnitude"
        target_flops = 0.9
        [experiments.compared]
        kind = "compare"
        model = "$OUT/cut"
        criteria = ["magnitude"]
        [experiments.audited]
        kind = "audit"
        models = ["$OUT/cut", "$OUT/cut"]
        """
    )

    def codes():
        return {trial.label: trial.about.get("code") for trial in executor.prepare_of(read("study.toml")).trials}

    before = codes()
    told = {"cut": None, "smaller": {"magnitude", "target_flops"}, "compared": {"magnitude", "curves"}}
    assert {name: of and set(of) for name, of in before.items() if name != "audited"} == told
    assert set(before["audited"]) > {"saliency", "chefer", "gini", "deletion", "maps", "rounding", "randomisation"}
    edited(monkeypatch, "sukashi.experiments.prune.targets")
    assert {name for name, of in codes().items() if of != before[name]} == {"smaller"}


def test_each_method_has_code_of_its_own():
    for registry in (criteria, attributions, measures):
        found = [method.code for method in registry]
        assert len(set(found)) == len(found)
    assert set(code.sources("sukashi.criteria.drift")) >= {"sukashi.criteria.engine", "sukashi.network.hooks"}
    assert not [name for name in code.sources("sukashi.criteria.drift") if not name.startswith("sukashi.")]


def test_an_audit_measures_again_what_a_changed_measure_reads(mine):
    source = "from sukashi.core.types import Measurement\n\ndef peak(maps):\n"
    source += "    return Measurement(maps.values.flatten(1).amax(1), maps.image_id, 'share')\n"
    mine(source)
    given = {"data": "digits", "width": 8, "test_images": 20, "population": "all", "out": "audited"}
    asked = {"attributions": ["saliency"], "measures": ["mine:peak"]}
    before = sukashi.audit([NET, NET], **given, **asked)
    mine(source.replace("amax", "amin"))
    with pytest.warns(
        UserWarning, match="the code of peak is not what it was: 2 finished trials of audited are done again"
    ):
        after = sukashi.audit([NET, NET], **given, **asked)
    assert after.saliency["models"][0]["means"] != before.saliency["models"][0]["means"]


def test_a_saved_network_is_not_replaced_by_other_code(mine):
    def prune():
        return sukashi.prune(NET, criterion="mine:last", ratio=0.5, out="half", **ASKED)

    prune()
    kept = {path: path.read_bytes() for path in sorted(Path("half").rglob("*")) if path.is_file()}
    mine(PLAIN.replace("-s.axis", "s.axis"))
    words = (
        r"half has networks that were made while the code of last was another, and what is saved is not replaced: cho"
    )
    with pytest.raises(UsageError, match=words):
        prune()
    assert {path: path.read_bytes() for path in sorted(Path("half").rglob("*")) if path.is_file()} == kept
    mine()
    assert prune().finished


def test_a_process_that_shares_a_run_and_finds_other_code_says_so(mine, monkeypatch, capsys):
    compared()
    settings = Compare(model=NET, criteria=["mine:last"], out="out", seeds=1, ratios=[0.5], **ASKED)
    mine(PLAIN.replace("-s.axis", "s.axis"))
    given = json.dumps(["compare", "Compare", settings.model_dump(mode="json", exclude_unset=True)])
    monkeypatch.setattr(sys, "stdin", io.StringIO(given))
    assert executor._child("out") == 2
    assert "the code has changed since this run began: give the same command again" in capsys.readouterr().err


# Notebooks.


def cell(text, **session):
    """What the function `f` of a cell does, as a hash."""
    session = {"__name__": "__main__", "torch": torch, **session}
    exec(text, session)
    return code.code_of(session["f"])


CELL = """
def helper(x):
    return x + 1

def f(x, *, k=2):
    'Adds.'
    return [helper(x) * k for _ in 'ab'] + [shift]
"""


def test_a_function_of_a_notebook_is_what_it_runs_and_reads():
    before = cell(CELL, shift=torch.ones(2))
    assert cell(CELL.replace("'Adds.'", "'Sums up.'  # so\n"), shift=torch.ones(2)) == before
    assert cell(CELL, shift=torch.ones(2), unread=object()) == before
    for old, new in (
        ("x + 1", "x - 1"),
        ("k=2", "k=3"),
        ("* k", "/ k"),
        ("'ab'", "'abc'"),
        ("helper(x) *", "abs(x) *"),
    ):
        assert cell(CELL.replace(old, new), shift=torch.ones(2)) != before, new
    assert cell(CELL, shift=torch.zeros(2)) != before
    assert cell(CELL, shift=1.5) != cell(CELL, shift=2.5)
    assert cell(CELL, shift=torch.abs) == cell(CELL, shift=torch.abs) != cell(CELL, shift=torch.exp)
    assert cell(CELL.replace("def f", "@torch.no_grad()\ndef f"), shift=1.5) != cell(CELL, shift=1.5)
    with pytest.raises(
        UsageError,
        match=r"f reads a value of type object of its session, of which nobody can tell .* make it an option",
    ):
        cell(CELL, shift=object())


@pytest.mark.parametrize(
    ("session", "old", "new"),
    [
        ("class Of:\n    power = 1\n    def by(self): return 2\nread = Of", "return 2", "return 3"),
        ("class Of:\n    powers = [1]\nread = Of", "[1]", "[2]"),
        ("class Base:\n    power = 1\nclass Of(Base): pass\nread = Of", "power = 1", "power = 2"),
        ("class Of:\n    @property\n    def power(self): return 1\nread = Of", "return 1", "return 2"),
        ("class Of:\n    @staticmethod\n    def power(): return 1\nread = Of", "return 1", "return 2"),
        ("class Of:\n    def __init__(self, n): self.n = n\nread = Of(1)", "Of(1)", "Of(2)"),
        (
            "class Of:\n    def __init__(self, n): self.n = n\n    def by(self): return self\nread = Of(1).by",
            "(1)",
            "(2)",
        ),
        ("class Of(nn.Module):\n    def forward(self, x): return x + 1\nread = Of", "x + 1", "x + 2"),
        ("@dataclass\nclass Of:\n    n: int = 1\n    of: list = field(default_factory=list)\nread = Of", "= 1", "= 2"),
        ("@dataclass\nclass Of:\n    n: int\nread = Of(1)", "Of(1)", "Of(2)"),
        ("@dataclass(frozen=True)\nclass Of:\n    n: int\nread = {'a': [Of(1)]}", "Of(1)", "Of(2)"),
        ("class Of(Enum):\n    A = 1\n    B = 2\nread = Of", "B = 2", "B = 3"),
        ("class Of(Enum):\n    A = 1\n    B = 2\nread = Of.A", "= Of.A", "= Of.B"),
        ("read = partial(pow, 2)", "2", "3"),
        ("read = lambda x: x + 1", "+ 1", "+ 2"),
        (
            "def make(n):\n    def inner(m): return n if m else inner(n)\n    return inner\nread = make(1)",
            "make(1)",
            "make(2)",
        ),
        ("from pathlib import Path\nread = Path('a')", "'a'", "'b'"),
        ("read = torch.ones(2, dtype=torch.bfloat16)", "ones", "zeros"),
        ("read = np.arange(3)", "3", "4"),
        ("read = np.float32(1)", "1", "2"),
    ],
)
def test_what_a_notebook_keeps_in_classes_objects_and_closures_is_code_too(session, old, new):
    head = "from dataclasses import dataclass, field\nfrom enum import Enum\nfrom functools import partial\n"
    text = f"{head}import numpy as np\nfrom torch import nn\n{session}\ndef f():\n    return read, np, nn\n"
    assert cell(text) == cell(text)
    assert cell(text.replace(old, new)) != cell(text)


def test_a_criterion_of_a_notebook_is_measured_again_when_its_cell_changes():
    text = (
        HEAD.replace("from helping import sign", "sign = 1")
        + '@criteria.register("last", source="")'
        + BODY.format(name="last")
    )

    def run(text):
        exec(text, {"__name__": "__main__"})
        return compared(criteria=["last"])

    assert not run(text).finished
    first = order_of()
    assert run(text).finished
    with pytest.warns(UserWarning, match="the code of last is not what it was"):
        assert not run(text.replace("sign = 1", "sign = -1")).finished
    assert order_of() != first
    with pytest.raises(
        UsageError, match=r"criterion 'last' was registered in this process, and others don't know it: "
    ):
        compared(criteria=["last"], jobs=2)
