"""Messages name settings as Python does, between backticks; the command line, and pages, name the options they are."""

import ast
import html
import re
import warnings
from pathlib import Path

import pytest

import sukashi
from sukashi.cli import main
from sukashi.core.errors import SukashiError
from sukashi.core.schema import flag_of
from sukashi.experiments.kinds import fields, kinds, spelled

SOURCE = Path(sukashi.__file__).parent
NET, DIGITS = "sukashi:digits_cnn", {"data": "digits"}
OPTION = re.compile(r"(?<![\w-])--[a-z]")
COMMAND = re.compile(rf"(?<![`.\w])sukashi (?:{'|'.join([*kinds(), 'study', 'report'])})\b")
# A setting as Python names it, where no word of English is meant: `seeds=5`, `max_drop`.
NAMED = re.compile(rf"\b(?:{'|'.join(fields())})=[^=\s]|\b(?:{'|'.join(n for n in fields() if '_' in n)})\b")
MARKED = re.compile(r"`([^`]*)`")
# What is called like a setting and is none: options in the name of data, a call that is told as one, parameters of
# somebody's function or of a method, what a file says.
OTHERS = (
    ("data/shapes.py", "^shapes: size={} and n={}"),
    ("experiments/compare/verdict.py", r"^(sukashi\.open\(|rank\(|, \w+=)"),
    ("models/adapted.py", "give it a parameter n_classes"),
    ("models/specs.py", "n_classes or num_classes"),
    ("models/onnx.py", "the shorter side to `shorter`"),
    ("criteria/attributed.py", "`reduce` over positions"),
)


def texts(node):
    """Each string of a tree that is no docstring, with {} for what is put into it."""
    match node:
        case ast.Expr(ast.Constant()):
            return
        case ast.Constant(str(text)):
            yield text
        case ast.JoinedStr(parts):
            yield "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in parts)
            for part in parts:
                yield from texts(part.value) if isinstance(part, ast.FormattedValue) else ()
        case _:
            for part in ast.iter_child_nodes(node):
                yield from texts(part)


FILES = {
    path.relative_to(SOURCE).as_posix(): path for path in sorted(SOURCE.rglob("*.py")) if path.parent.name != "cli"
}
MESSAGES = [
    (file, text)
    for file, path in FILES.items()
    for text in texts(ast.parse(path.read_text()))
    if " " in text and not any(file == other and re.search(told, text) for other, told in OTHERS)
]
MESSAGES += [(f"help of {kind.kind}", kind.__doc__) for kind in kinds().values()]


# What is written.


def test_no_message_of_the_library_names_an_option_or_a_command():
    assert len(MESSAGES) > 1000
    assert not [(file, text) for file, text in MESSAGES if OPTION.search(text) or COMMAND.search(text)]


def test_settings_are_named_between_backticks():
    assert not [(file, text) for file, text in MESSAGES if NAMED.search(MARKED.sub("", text))]


def test_what_is_named_between_backticks_has_a_name_at_the_command_line():
    for file, text in MESSAGES:
        for said in MARKED.findall(text):
            if re.fullmatch(r"\w+(=.*)?|sukashi\.\w+(\(.*\))?", said) and said != "sukashi.load":
                filled = said.replace("{}", "x")
                assert spelled(f"`{filled}`") != f"`{filled}`", (file, text)


# How it is said.


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("leave them out with `skip_bad=True`:", "leave them out with --skip-bad:"),
        ("`enforce_mask=False` is for", "--no-enforce-mask is for"),
        ("give `calibration=5` or more", "give --calibration 5 or more"),
        ("`test_images` must be at least 10", "--test-images must be at least 10"),
        ("`n_classes` is 3, not `n_classes=N`", "--classes is 3, not --classes N"),
        ("leave `jobs` out, or `jobs=1`", "leave --jobs out, or --jobs 1"),
        ("exclude both (`exclude=['a.*', 'b']`)", "exclude both (--exclude 'a.*' --exclude b)"),
        ("`only=['a,b', 'c']`, `ratios=[0.5, 0.9]`", r"--only 'a\,b,c', --ratios 0.5,0.9"),
        ("`weights='my runs/a'`, `scope='2:4'`", "--weights 'my runs/a', --scope 2:4"),
        ("`options={'drift': {'NAME': VALUE}}`", "--set drift.NAME=VALUE"),
        ("`class_map={'a': 0}` of the `model`", "--class-map FILE of the MODEL"),
        ("use `sukashi.train`", "use `sukashi train`"),
        ("`sukashi.finetune('a b', data='d', new_head=True)`", "`sukashi finetune 'a b' --data d --new-head`"),
        ("`sukashi.results('runs/x')` tells", "`sukashi report runs/x` tells"),
    ],
)
def test_a_command_names_settings_as_its_options(message, told):
    assert spelled(message) == told


@pytest.mark.parametrize(
    "message",
    [
        "as in `sukashi list criteria`, which `sukashi.load` rebuilds",
        "a calibration set of the weights, runs/test_images, 'test_images' and x.test_images=3",
        "call `model.half()`, `a size=3`, `label column`, ``, ` `, `size",
        "`size=` `size=1)` `size=a b` `options=3` `options={{}: 1}` `sukashi.train(` `sukashi.train(**x)` `mean=\0`",
    ],
)
def test_all_else_stays_as_it_is(message):
    assert spelled(message) == message


def test_what_was_cut_short_does_not_turn_marks_round():
    assert spelled("`weigh...more `test_images` or `mean`") == "`weigh...more --test-images or --mean"


def test_a_setting_is_the_same_option_of_every_command():
    for kind in kinds().values():
        for name, field in kind.model_fields.items():
            assert flag_of(name, field) == flag_of(name, fields()[name])


# What people see.


def argv(function, given, out):
    """The command line of a call."""
    flags = {name: flag_of(name, fields()[name]) for name in given if name not in ("model", "how")}
    words = [str(given[name]) for name in ("model", "how") if name in given]
    for name, flag in flags.items():
        words += [flag] if given[name] is True else [flag, str(given[name])]
    return ["sukashi", function, *words, *([] if function == "check" else ["--out", str(out)])]


CASES = [
    ("check", {}, "give `weights=FILE` or `pretrained=True`"),
    ("check", {"calibration": 1000}, "give `calibration="),
    ("check", {"test_images": 3}, "`test_images` must be at least 10"),
    ("check", {"device": "tpu"}, "`device` must be auto, cpu or cuda"),
    ("finetune", {}, "give `weights=FILE`, or use `sukashi.train`"),
    ("train", {"new_head": True}, "or leave `new_head` out"),
    ("train", {"size": 3}, "`size`"),
    ("prune", {"criterion": "random"}, "`ratio`, `target_flops`"),
    ("prune", {"criterion": "random", "ratio": 0.5, "scope": "row", "round_to": 8}, "`round_to` is for units"),
    ("prune", {"criterion": "random", "ratio": 0.5, "mode": "zero", "round_to": 8}, "`mode='zero'`"),
    ("prune", {"criterion": "wanda", "ratio": 0.5}, "`scope='row'`"),
    ("prune", {"criterion": "random", "max_drop": 0.0001}, "more `test_images`"),
]


def is_seen(text):
    """What a command says holds no setting as Python names it."""
    return not [said for said in MARKED.findall(text) if said in fields() or NAMED.match(said)] and not NAMED.search(
        MARKED.sub("", text)
    )


@pytest.mark.parametrize(("function", "given", "part"), CASES)
def test_each_face_has_its_own_names(monkeypatch, capsys, tmp_path, function, given, part):
    given = {"model": NET, **DIGITS, **given}
    out = {} if function == "check" else {"out": tmp_path / "out"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            getattr(sukashi, function)(**given, **out, **({"limit": 0} if function == "check" else {}))
            errors = []
        except SukashiError as error:
            errors = [str(error)]
    said = [*(str(warning.message) for warning in caught), *errors]
    assert any(part in message for message in said), said
    assert not any(OPTION.search(message) or COMMAND.search(message) for message in said)
    words = argv(function, given, tmp_path / "out")
    monkeypatch.setattr("sys.argv", [*words, *(["--limit", "0"] if function == "check" else [])])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main.main()
    told = capsys.readouterr()
    assert all(spelled(message) in told.err for message in said)
    assert is_seen(told.err)
    assert is_seen(told.out)


def test_a_result_is_told_by_each_face_and_its_page_as_by_the_command_line(monkeypatch, capsys, tmp_path):
    small = {"calibration": 2, "test_images": 60, "ratios": [0.5], "seeds": 1}
    with warnings.catch_warnings(action="ignore"):
        found = sukashi.compare(NET, "digits", ["random", "magnitude"], **small, out=tmp_path / "out")
    assert "`seeds=5` adds seeds to this folder" in found.text()
    assert "give `weights=FILE` or `pretrained=True`" in found.text()
    advice = found.advice["command"] if found.advice else ""
    assert not OPTION.search(found.text().replace(advice, "") + found._repr_html_().replace(html.escape(advice), ""))
    page = (tmp_path / "out" / "report.html").read_text()
    assert "--seeds 5 adds seeds to this folder" in page
    assert "give --weights FILE or --pretrained" in page
    for words in (["report", str(tmp_path / "out")], ["ls", str(tmp_path)]):
        monkeypatch.setattr("sys.argv", ["sukashi", *words])
        capsys.readouterr()
        with pytest.raises(SystemExit):
            main.main()
        told = capsys.readouterr().out
        assert is_seen(told.replace(advice, ""))
    assert is_seen(re.sub("<style>.*?</style>|<table.*?</table>|<pre>.*?</pre>|<[^>]*>", "", page, flags=re.DOTALL))


def test_a_study_names_the_keys_of_its_file(monkeypatch, capsys, tmp_path):
    file = tmp_path / "study.toml"
    file.write_text(
        f'data = "digits"\ncriteria = ["random"]\ncalibration = 1000\nout = "{tmp_path}/out"\n'
        f'[models.net]\nspec = "{NET}"\n'
    )
    monkeypatch.setattr("sys.argv", ["sukashi", "study", str(file)])
    with pytest.raises(SystemExit):
        main.main()
    assert "give `calibration=" in capsys.readouterr().err
    (tmp_path / "out").write_text("")
    with pytest.raises(SystemExit):
        main.main()
    assert "is a file: --out needs a folder" in capsys.readouterr().err
