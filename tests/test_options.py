"""Settings as options of a command: lists of numbers and of ratios, and what `list` prints of a method."""

import os
import shlex
from typing import ClassVar

import pytest

from sukashi.cli import main
from sukashi.cli.options import parameters, values
from sukashi.core.errors import UsageError
from sukashi.core.schema import Ratio, Settings, command_of, keywords, option
from sukashi.experiments import functions
from sukashi.experiments.check.settings import Check
from sukashi.experiments.compare.settings import Compare
from sukashi.experiments.prune.settings import Prune


class Timed(Settings):
    kind: ClassVar[str] = "timed"

    sizes: list[int] = option(help="Sizes.")
    batch_sizes: list[int] = option([1, 8, 32], help="Batches.")
    once: list[float] | None = option([0.5], help="Seconds.")
    ratios: list[Ratio] = option([0.1, 0.2, 0.3], help="Removed.")
    uneven: list[Ratio] = option([0.1, 0.2, 0.5], help="Removed.")
    one: list[Ratio] = option([0.5], help="Removed.")
    none: list[Ratio] | None = option(None, help="Removed.")


def test_numbers_are_joined_by_commas_and_only_ratios_are_spans():
    found = values(Timed, {"sizes": "1,8,32", "once": "2,0.5", "ratios": "0:0.2:0.1"})
    assert found == {"sizes": [1, 8, 32], "once": [2.0, 0.5], "ratios": [0.0, 0.1, 0.2]}
    assert [type(n) for n in (*found["sizes"], *found["once"])] == [int] * 3 + [float] * 2
    keywords(Timed, found)


def test_a_comma_in_a_name_is_written_with_a_backslash():
    class Named(Settings):
        kind: ClassVar[str] = "named"

        only: list[str] = option(["a, b", "c"], joined=True, help="Classes.")

    (shown,) = parameters(Named)
    assert shown.default == r"a\, b,c"
    assert values(Named, {"only": shown.default}) == {"only": ["a, b", "c"]}
    assert values(Named, {"only": r" a ,, b\,,c\d "}) == {"only": ["a", "b,", r"c\d"]}


@pytest.mark.parametrize("what", ["pipe", "device", "large"])
def test_a_class_map_that_is_no_file_is_not_opened(tmp_path, what):
    at = tmp_path / "map.json"
    match what:
        case "pipe":
            os.mkfifo(at)
        case "device":
            at.symlink_to("/dev/zero")
        case _:
            with at.open("wb") as file:
                file.truncate(2**40)
    with pytest.raises(UsageError, match=r"cannot read .*map.json \(it (is a device or a pipe|has [\d,]+ bytes)"):
        values(Check, {"class_map": at})


def test_defaults_are_shown_as_they_are_given():
    shown = {p.name: p.default for p in parameters(Timed) if p.name != "sizes"}
    assert shown == {
        "batch_sizes": "1,8,32",
        "once": "0.5",
        "ratios": "0.1:0.3:0.1",
        "uneven": "0.1,0.2,0.5",
        "one": "0.5",
        "none": None,
    }
    told = {name: default for name, default in shown.items() if default is not None}
    assert keywords(Timed, {"sizes": [1], **values(Timed, told)}) == keywords(Timed, {"sizes": [1]})


@pytest.mark.parametrize(("name", "text"), [("batch_sizes", "1:32:7"), ("batch_sizes", "1.5"), ("batch_sizes", "")])
def test_what_is_no_number_is_refused_by_the_name_of_the_option(name, text):
    with pytest.raises(UsageError, match=rf"^--batch-sizes must be whole numbers joined by commas, got '{text}'"):
        values(Timed, {name: text})


def test_list_prints_brackets(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["sukashi", "list", "criteria"])
    with pytest.raises(SystemExit):
        main.main()
    assert "|W_m[u, j]|" in capsys.readouterr().out


@pytest.mark.parametrize(
    "settings",
    [
        Prune(
            model="my net:make",
            data="some images",
            weights="a b.pth",
            criterion="cswap",
            ratio=0.45,
            out="runs/x",
            round_to=1,
            exclude=["a", "b c"],
            only=["cat, grey", "dog"],
            skip_bad=True,
            n_classes=3,
            options={"alpha": 0.01, "order": "size"},
            seed=3,
            onnx=False,
        ),
        Compare(
            model="sukashi:digits_cnn",
            data="digits",
            criteria=["taylor", "cswap"],
            ratios=[0.1, 0.35],
            out="o",
            options={"cswap": {"alpha": 0.5}},
            margin=0.05,
        ),
    ],
)
def test_the_command_of_settings_has_these_settings(monkeypatch, settings):
    taken = []

    def execute(settings, **more):
        taken.append(settings)
        raise UsageError("taken")

    monkeypatch.setattr(functions, "execute", execute)
    monkeypatch.setattr("sys.argv", shlex.split(command_of(settings)))
    with pytest.raises(SystemExit):
        main.main()
    fields = type(settings).model_fields
    assert {name: getattr(taken[0], name) for name in fields} == {name: getattr(settings, name) for name in fields}
