"""What is given is bounded: no input hangs, overflows or fills a screen."""

import io
import json
import os
import zipfile

import numpy as np
import pytest

from sukashi import models
from sukashi.cli.options import values
from sukashi.core.bounded import MAX_DEPTH, from_json, read
from sukashi.core.errors import DataError, ModelError, ResourceError, UsageError
from sukashi.core.files import Arrays, packed, read_json
from sukashi.core.schema import Settings, checked, keywords, option
from sukashi.core.types import MAX_NUMBERS, Preprocess
from sukashi.experiments.compare.settings import Compare
from sukashi.experiments.study.file import read as read_study


@pytest.mark.parametrize("error", [UsageError, DataError, ModelError, ResourceError])
def test_a_message_keeps_its_beginning_and_its_remedy(error):
    said = str(error(f"value {'x' * 100_000} is wrong: give another"))
    assert len(said) < 2100
    assert said.startswith("value xxx")
    assert "x...x" in said
    assert said.endswith("is wrong: give another")
    assert str(error("a" * 2000)) == "a" * 2000


@pytest.mark.parametrize("text", ["[" * 5000, '{"a":' * 5000, f"{'[' * MAX_DEPTH}1{']' * MAX_DEPTH}", "9" * 10_000])
def test_json_of_great_depth_or_length_is_none(text, tmp_path):
    with pytest.raises(ValueError, match=r"deep|digits"):
        from_json(text)
    (tmp_path / "trial.json").write_text(text)
    with pytest.raises(DataError, match=r"trial\.json can't be read"):
        read_json(tmp_path / "trial.json")


def test_json_within_the_bounds_is_read():
    deep = f"{'[' * (MAX_DEPTH - 1)}{']' * (MAX_DEPTH - 1)}"
    assert json.dumps(from_json(deep)) == deep
    assert from_json(b'{"a": [1, {"b": null}]}') == {"a": [1, {"b": None}]}


def test_only_a_regular_file_of_a_size_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(OSError, match="a device or a pipe, not a file"):
            read(tmp_path / path)
    with pytest.raises(IsADirectoryError):
        read(tmp_path)
    (tmp_path / "file").write_bytes(b"12345")
    assert read(tmp_path / "file", 5) == b"12345"
    with pytest.raises(OSError, match="5 bytes, 4 are allowed"):
        read(tmp_path / "file", 4)


def _npy(array):
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def _zip(names):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, text in names.items():
            archive.writestr(name, text)
    return content.getvalue()


NO_ARRAYS = {
    "another kind": _npy(np.zeros(3)),
    "pickled": packed(a=np.array([{}], dtype=object)),
    "text": b"hello",
    "nothing": b"",
    "an archive of something else": _zip({"a.txt": "hello"}),
    "a damaged array": _zip({"a.npy": _npy(np.zeros(30))[:-7]}),
    "no header": _zip({"a.npy": b"\x93NUMPY\x01\x00\x10\x00{'descr': [[[[[["}),
}


@pytest.mark.parametrize("content", NO_ARRAYS.values(), ids=NO_ARRAYS)
def test_a_file_without_plain_arrays_is_refused_in_our_words(content, tmp_path):
    with pytest.raises(DataError, match=r"correct\.npz can't be read .*: remove its folder") as refused:
        Arrays(tmp_path / "correct.npz", content)
    assert "allow_pickle" not in str(refused.value)


def test_an_array_that_is_not_there_is_named(tmp_path):
    arrays = Arrays(tmp_path / "correct.npz", packed(right=np.ones(3)))
    assert arrays["right"].tolist() == [1, 1, 1]
    with pytest.raises(DataError, match="it has no array 'correct'"):
        arrays["correct"]


@pytest.mark.parametrize("text", ["[" * 5000, "[[[[", "9" * 5000])
def test_an_option_that_is_no_json_is_a_text(text):
    assert values(Compare, {"criteria": "taylor", "options": [f"a={text}"]})["options"] == {"taylor": {"a": text}}


@pytest.mark.parametrize(
    "text",
    [
        f"a = {'[' * 5000}",
        f"a = {'9' * 10_000}",
        f"{'.'.join('a' * 100_000)} = 1",
        f"[{'.'.join('a' * 100_000)}]",
        f"a = {{{'.'.join('a' * 100_000)} = 1}}",
        "a = 1 # " + "x" * 2**20,
    ],
)
def test_a_study_file_out_of_bounds_is_refused(text, tmp_path):
    (tmp_path / "study.toml").write_text(text)
    with pytest.raises(UsageError, match=r"study\.toml"):
        read_study(tmp_path / "study.toml")


def test_a_study_file_that_is_no_file_is_refused():
    with pytest.raises(UsageError, match="a device or a pipe, not a file"):
        read_study("/dev/zero")


def test_a_number_too_long_to_write_is_told():
    class Kind(Settings):
        n: int = option(1, le=5, help="n")

    with pytest.raises(UsageError, match="`n` must be at most 5, got a number of thousands of digits"):
        keywords(Kind, {"n": 1 << 100_000})
    with pytest.raises(UsageError, match="`n` must be"):
        checked(Kind, {"n": [[[]]] * 3})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"height": -8}, "numbers, got -8 x 8 pixels"),
        ({"width": 0}, "got 8 x 0 pixels"),
        ({"height": 10**5, "width": 10**5}, "100000 x 100000"),
        ({"channels": MAX_NUMBERS, "mean": (0.0,), "std": (1.0,)}, "numbers, got"),
        ({"mean": (0.5, 0.5)}, "mean must be a finite number for each of 1 channels"),
        ({"std": (0.0,)}, "std must be above 0"),
        ({"std": (float("nan"),)}, "std must be a finite number"),
    ],
)
def test_what_no_image_can_be_is_refused_here_and_in_a_recipe(change, words, tmp_path):
    with pytest.raises(UsageError, match=words):
        Preprocess(**{"height": 8, "width": 8, "channels": 1, "mean": (0.5,), "std": (0.5,), **change})
    models.save(tmp_path / "saved", models.load("sukashi:digits_cnn", width=4), provenance={})
    recipe = json.loads((tmp_path / "saved" / "recipe.json").read_text())
    recipe["preprocess"] |= {k: list(v) if isinstance(v, tuple) else v for k, v in change.items()}
    (tmp_path / "saved" / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(ModelError, match=r"recipe\.json is no recipe: preprocess"):
        models.load(str(tmp_path / "saved"))


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("size", 64, "has no option size"),
        ("size", 10**9, r"model\.size"),
        ("n_classes", 10**9, r"model\.n_classes"),
        ("width", -1, r"model\.width"),
    ],
)
def test_options_of_a_recipe_have_the_bounds_of_settings(option, value, words, tmp_path):
    models.save(tmp_path / "saved", models.load("sukashi:digits_cnn", width=4), provenance={})
    recipe = json.loads((tmp_path / "saved" / "recipe.json").read_text())
    recipe["model"][option] = value
    (tmp_path / "saved" / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises((ModelError, UsageError), match=words):
        models.load(str(tmp_path / "saved"))


@pytest.mark.parametrize(
    ("spec", "width"), [("digits_cnn", 5000), ("cifar_resnet18", 2048), ("small_vit", 65_536), ("digits_vit", 60_000)]
)
def test_a_width_that_fills_the_memory_is_refused_at_once(spec, width):
    with pytest.raises(UsageError, match=rf"width {width} .* parameters"):
        models.load(f"sukashi:{spec}", width=width)
