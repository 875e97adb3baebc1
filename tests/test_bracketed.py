"""Options in the name of a method: what is read, the one name that they have, and two settings of one criterion."""

import re
from pathlib import Path

import pytest

import sukashi
from sukashi.cli.options import values
from sukashi.core.bracketed import folder_of, joined, parted, plain
from sukashi.core.errors import UsageError
from sukashi.criteria import criteria
from sukashi.experiments.compare.settings import Compare
from sukashi.experiments.methods import check_shared, codes, named
from sukashi.experiments.schedule.settings import Schedule
from sukashi.experiments.study.file import read
from sukashi.experiments.workspace import Workspace
from sukashi.report import figures

SPEC = "sukashi:digits_cnn"
FEW = {"calibration": 2, "test_images": 40, "width": 8, "ratios": [0.3], "seeds": 1}


@pytest.mark.parametrize(
    ("text", "method", "options", "name"),
    [
        ("drift", "drift", {}, "drift"),
        (" drift[ slack = 2 , share=0.20 ]", "drift", {"slack": 2, "share": 0.2}, "drift[share=0.2,slack=2]"),
        ("m:a[layers=[1,[2]],deep=true]", "m:a", {"layers": [1, [2]], "deep": True}, "m:a[deep=true,layers=[1,[2]]]"),
        ("a[word=2x]", "a", {"word": "2x"}, "a[word=2x]"),
        ("a[word=b/c:d]", "a", {"word": "b/c:d"}, "a[word=b/c:d]"),
        ('a[word="b, c]"]', "a", {"word": "b, c]"}, 'a[word="b, c]"]'),
        ('a[word="2"]', "a", {"word": "2"}, 'a[word="2"]'),
        ("a[none=null,rate=1e-3]", "a", {"none": None, "rate": 0.001}, "a[none=null,rate=0.001]"),
    ],
)
def test_a_name_with_options_is_read_and_has_one_form(text, method, options, name):
    assert parted(text) == (method, options)
    assert joined(method, options) == name
    assert parted(name) == (method, options)
    assert plain(name) == method


@pytest.mark.parametrize(
    "text", ["a[]", "a[2]", "a[b=]", "a[b=1", "a[b=1,]", "a[b=1,b=2]", "a[b=1;c=2]", "[b=1]", "a[b=1 2]"]
)
def test_brackets_with_anything_else_in_them_are_refused(text):
    with pytest.raises(UsageError, match=r"brackets that hold no options: write .*NAME=VALUE"):
        parted(text)


@pytest.mark.parametrize(("text", "behind"), [("a[b=1]c", "c"), ("cv[invert=true]+refit", r"\+refit")])
def test_what_stands_behind_brackets_is_told_from_what_is_in_them(text, behind):
    with pytest.raises(UsageError, match=f"goes on after its brackets: .* leave '{behind}' out"):
        parted(text)


def test_commas_in_brackets_part_no_names():
    text = r"drift,drift[share=0.2,layers=[1,2]], a\,b,c[d"
    assert values(Compare, {"criteria": text})["criteria"] == ["drift", "drift[share=0.2,layers=[1,2]]", "a,b", "c[d"]


def asked(**settings):
    return named(Compare.model_validate({"model": "m", "data": "d", "out": "o", **settings}))


def test_options_of_a_method_are_of_all_its_contenders_but_for_what_their_names_say():
    found = asked(
        criteria=["drift", "drift[share=0.20]", "random", "drift[slack=2]"],
        options={"drift": {"slack": 1.2, "scout": 2}},
    )
    assert found.criteria == ["drift", "drift[share=0.2]", "random", "drift[slack=2]"]
    assert found.options == {
        "drift": {"slack": 1.2, "scout": 2},
        "drift[share=0.2]": {"share": 0.2, "slack": 1.2, "scout": 2},
        "drift[slack=2]": {"slack": 2, "scout": 2},
    }
    assert codes(found).keys() == {"drift", "random"}
    check_shared(found)
    alone = asked(criteria=["drift[share=0.2]"], options={"drift": {"slack": 1.2}})
    assert alone.options == {"drift[share=0.2]": {"share": 0.2, "slack": 1.2}}


@pytest.mark.parametrize(
    ("given", "options"),
    [
        (["drift[share=0.2]", "drift[share=0.20]"], {}),
        (["drift", "drift[share=0.2]"], {"drift": {"share": 0.2}}),
        (["drift[share=0.2]", "drift[share=0.2,slack=2]"], {"drift": {"slack": 2}}),
    ],
)
def test_equal_options_are_no_two_contenders(given, options):
    with pytest.raises(UsageError, match="have the same options"):
        asked(criteria=given, options=options)


def test_options_of_a_name_that_has_them_stand_there():
    with pytest.raises(UsageError, match=r"options of drift\[share=0.2\] stand in its name"):
        asked(criteria=["drift[share=0.2]"], options={"drift[share=0.2]": {"slack": 2}})


def test_a_method_is_asked_for_with_options():
    method = criteria["drift[slack=2,share=0.2]"]
    assert (method.name, method.code) == (
        "drift[share=0.2,slack=2]",
        criteria["drift"].code,
    )
    assert (method.options["share"], method.options["scout"]) == (0.2, criteria["drift"].options["scout"])
    with pytest.raises(UsageError, match="drift has no option 'shar': did you mean 'share'"):
        criteria["drift[shar=0.2]"]
    with pytest.raises(UsageError, match="share of drift must be less than 1, got 2"):
        criteria["drift[share=2]"]
    bench = sukashi.open(SPEC, "digits", width=8, calibration=2)
    bracketed, given, usual = (
        bench.rank(name, **more).table()
        for name, more in (("drift[share=0.4]", {}), ("drift", {"share": 0.4}), ("drift", {}))
    )
    assert bracketed == given != usual


@pytest.mark.slow
def test_two_settings_of_one_criterion_are_compared(cnn_weights, tmp_path):
    names = ["drift", "drift[share=0.4]"]

    def ran(out, given, **more):
        return sukashi.compare(SPEC, "digits", given, out=tmp_path / out, weights=cnn_weights, **FEW, **more)

    plain_alone = ran("grown", ["drift"])
    before = {record.key for record in Workspace(plain_alone.out).records()}
    grown = ran("grown", names)
    assert {record.key for record in Workspace(grown.out).records()} > before
    assert set(grown.contenders) == set(names)
    set_alone = ran("set", ["drift"], options={"drift": {"share": 0.4}})
    assert grown.curves["drift[share=0.4]"] == set_alone.curves["drift"] != grown.curves["drift"]
    assert grown.methods["drift[share=0.4]"] == {
        "criterion": "drift",
        "sampling": "random",
        "repair": "none",
        "options": {"share": 0.4},
    }
    assert "drift[share=0.4]" in Path(grown.report).read_text()
    told = sukashi.results(grown.out, margin=0.9)
    first = told.advice["command"]
    assert "--criterion drift " in first
    assert ("--set share=0.4" in first) == (told.advice["contender"] == "drift[share=0.4]")
    rows = {(row["contender"], row["criterion"], row["options"]) for row in grown.table()}
    assert rows == {("drift", "drift", "{}"), ("drift[share=0.4]", "drift", '{"share": 0.4}')}


def test_a_cut_takes_the_name_of_a_contender(cnn_weights, tmp_path):
    given = {"weights": cnn_weights, **{name: FEW[name] for name in ("calibration", "test_images", "width")}}
    named_so = sukashi.prune(SPEC, "digits", "drift[share=0.4]", 0.3, out=tmp_path / "a", **given)
    again = sukashi.prune(SPEC, "digits", "drift", 0.3, out=tmp_path / "a", options={"share": 0.4}, **given)
    assert again.finished, "it is the same cut"
    assert (named_so.criterion, named_so.options) == ("drift", {"share": 0.4})


def test_a_schedule_takes_two_settings_of_one_criterion(cnn_weights, tmp_path):
    result = sukashi.schedule(
        *(SPEC, "digits", "oneshot", ["drift", "drift[share=0.4]"], [0.3]),
        **{"out": tmp_path / "out", "weights": cnn_weights, "epochs": 1, "width": 8, "round_to": 1},
        **{"calibration": 2, "test_images": 40},
    )
    assert set(result.contenders) == {"drift", "drift[share=0.4]"}
    assert (tmp_path / "out" / "drift-share=0.4" / "0" / "0.30" / "model.safetensors").exists()
    assert {(row["criterion"], row["options"]) for row in result.table()} == {
        ("drift", "{}"),
        ("drift", '{"share": 0.4}'),
    }


def test_a_study_pairs_them(tmp_path):
    text = """
out = "out"
data = "digits"
criteria = ["taylor", "conductance[steps=4]", "conductance"]
sampling = ["random", "clustering"]
pairs = [["conductance[ steps = 4 ]/clustering", "conductance[steps=4]"]]
[models.a]
spec = "sukashi:digits_cnn"
"""
    path = tmp_path / "study.toml"
    path.write_text(text)
    assert read(path).pairs == [["conductance[steps=4]/clustering", "conductance[steps=4]"]]
    path.write_text(text.replace("[ steps = 4 ]/", "[steps=5]/"))
    with pytest.raises(UsageError, match=r"pairs 'conductance\[steps=5\]/clustering', which it does not compare"):
        read(path)


def test_options_of_what_is_no_criterion_here_are_refused():
    given = {"model": "m", "data": "d", "out": "o", "how": "oneshot", "ratios": [0.5], "criteria": ["drift[share=0.2]"]}
    Schedule.model_validate(given).course(rewinds=False, given=True)
    with pytest.raises(UsageError, match="'taylor'"):
        Schedule.model_validate({**given, "options": {"taylor": {}}}).course(rewinds=False, given=True)


def test_lines_of_one_criterion_differ_by_their_dashes():
    found = figures.dashes(
        {
            "drift": ("drift", "-"),
            "drift/clustering": ("drift", "--"),
            "drift[share=0.2]": ("drift[share=0.2]", "-"),
            "drift[share=0.2]/clustering": ("drift[share=0.2]", "--"),
            "taylor[x=1]": ("taylor[x=1]", "-"),
        }
    )
    assert (found["drift"], found["drift/clustering"]) == ("-", "--")
    of_drift = [found[name] for name in found if name.startswith("drift")]
    assert len(set(map(str, of_drift))) == 4
    assert found["taylor[x=1]"] == figures.DASHES[0]


def test_a_folder_of_a_name_needs_no_quotes():
    names = (
        "drift",
        "magnitude/unenforced",
        "drift[share=0.2,slack=2]",
        "a[rate=1e-05,shift=-2]/random",
        "gallery-a[b=c]",
    )
    assert [folder_of(name) for name in names] == [
        "drift",
        "magnitude-unenforced",
        "drift-share=0.2-slack=2",
        "a-rate=1e-05-shift=-2-random",
        "gallery-a-b=c",
    ]


def test_names_that_differ_in_signs_that_folders_leave_out_have_two_folders():
    words = [
        "x y",
        "x-y",
        "x/y",
        "x  y",
        "-x",
        "x",
        ["x"],
        "[x]",
        ["x", "y"],
        "X\ny",
        "../x",
        "x.",
        "x" * 300,
        "x" * 301,
    ]
    words += [
        [1, 2],
        [1, -2],
        [12],
        -1,
        [-1],
        1,
        "1",
        1.0,
        None,
        "null",
        {"x": 1},
        "y/leaky",
        "y-leaky",
        "",
        "ü",
        "e-5",
        1e-05,
    ]
    names = [joined("a", {"word": word}) for word in words]
    names += [f"{name}/leaky" for name in names] + [joined("a", {"word": "x", "y": 1}), joined("a", {"word": "x,y=1"})]
    folders = {folder_of(name) for name in names}
    assert len(folders) == len(names)
    for folder in folders:
        assert re.fullmatch(r"[\w=][\w.=+-]*", folder), "no quotes, and no folder above"
        assert len(folder.encode()) < 200
