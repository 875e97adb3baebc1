"""Images whose labels are in a CSV: how files are named, where splits come from, what is refused."""

import os
from pathlib import Path

import pytest

from pictures import encode, noise, write
from sukashi import data
from sukashi.core.errors import DataError, UsageError


def listed(root: Path, tables: dict[str, str], folders: tuple[str, ...] = ("images",), n: int = 8) -> Path:
    for k, name in enumerate(folders):
        for i in range(n):
            write(root / name / f"{i}.png", encode(noise(100 * k + i)))
    for name, text in tables.items():
        write(root / name, text.encode())
    return root


def lines(name: str = "{}.png", head: str = "file,label", n: int = 8, start: int = 0) -> str:
    """Labels a, b in turn."""
    return "".join([f"{head}\n", *(f"{name.format(i)},{'ab'[i % 2]}\n" for i in range(start, n))])


@pytest.mark.parametrize(
    "text",
    [
        lines(),
        lines("images/{}.png"),
        lines("./images/{}.png"),
        lines("images\\{}.png"),
        lines("{}", "id,class"),
        lines(head="File , Label").replace(",", " , "),
        lines().replace(",", ";"),
        lines().replace(",", "\t"),
        "\ufeff" + lines(),
        lines('"{}.png"') + "\n",
        lines().replace("\n", "\r\n"),
    ],
)
def test_files_are_found_by_what_a_csv_calls_them(tmp_path, text):
    found = data.load(listed(tmp_path, {"labels.csv": text}))
    assert found.class_names == ("a", "b")
    targets = dict(zip(found.train.image_ids, found.train.targets.tolist(), strict=True))
    targets |= dict(zip(found.test.image_ids, found.test.targets.tolist(), strict=True))
    assert targets == {f"images/{i}.png": i % 2 for i in range(8)}
    assert "labels are those of labels.csv" in found.notes


@pytest.mark.parametrize(
    ("tables", "folders"),
    [
        ({"train.csv": lines(), "test.csv": lines()}, ("train", "test")),
        ({"Train_labels.csv": lines("{}"), "Test_labels.csv": lines("{}"), "sample.csv": lines()}, ("train", "test")),
        ({"train/metadata.csv": lines(), "test/metadata.csv": lines()}, ("train", "test")),
        ({"all.csv": lines("train/{}.png") + "".join(lines("test/{}.png").splitlines(True)[1:])}, ("train", "test")),
    ],
)
def test_splits_are_those_of_csv_files_and_folders(tmp_path, tables, folders):
    found = data.load(listed(tmp_path, tables, folders))
    assert found.train.image_ids == tuple(f"train/{i}.png" for i in range(8))
    assert found.test.image_ids == tuple(f"test/{i}.png" for i in range(8))
    assert found.test.targets.tolist() == [0, 1] * 4


def test_a_column_says_the_split(tmp_path):
    text = "file,label,split\n" + "".join(
        f"{i}.png,{'ab'[i % 2]},{'training' if i < 4 else 'Test'}\n" for i in range(8)
    )
    found = data.load(listed(tmp_path, {"labels.csv": text}))
    assert found.test.image_ids == tuple(f"images/{i}.png" for i in range(4, 8))
    write(tmp_path / "labels.csv", text.replace("Test", "7").encode())
    with pytest.raises(DataError, match=r"line 6 of .* has split '7': it must be train, test or val"):
        data.load(tmp_path)


def test_images_that_nobody_names_are_left_out_and_said(tmp_path):
    found = data.load(listed(tmp_path / "d", {"labels.csv": lines(n=6)}))
    assert len(found.train) + len(found.test) == 6
    assert "2 image(s) of d left out: no CSV names them" in found.warnings


def test_class_folders_win_unless_a_column_is_named(tmp_path):
    root = listed(tmp_path, {"labels.csv": "file,label\n" + "".join(f"cat/{i}.png,{i % 3}\n" for i in range(8))})
    root = listed(root, {}, ("cat", "dog"))
    (root / "images").rename(root / "cow")
    found = data.load(root)
    assert found.class_names == ("cat", "cow", "dog")
    assert any(note.startswith("labels.csv is not read: classes are the folders") for note in found.warnings)
    assert data.load(root, label="label").class_names == ("0", "1", "2")


def test_the_column_of_labels_can_be_named(tmp_path):
    text = "file,kind,label\n" + "".join(f"{i}.png,{'xyz'[i % 3]},{'ab'[i % 2]}\n" for i in range(8))
    root = listed(tmp_path, {"labels.csv": text})
    assert data.load(root, label="kind").class_names == ("x", "y", "z")
    with pytest.raises(DataError, match="no one column 'knd': did you mean 'kind'"):
        data.load(root, label="knd")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (lines("{}.jpg"), "line 2 of .* names '0.jpg', and no image under .* is called so"),
        (lines("../../{}.png"), "and no image under .* is called so"),
        (lines() + "3.png,a\n", "names images/3.png 2 times: an image has one label"),
        (lines() + "3.png,\n", "line 10 of .* has no label"),
        (lines() + "3.png\n", "line 10 of .* has no label or other columns"),
        (lines(head="file,what"), "has the columns file, what: one must be called label, .* or give `label=COLUMN`"),
        (lines(head="what,label"), "one must be called file, .*, id$"),
        ("", "has the columns none"),
        (lines() + '"', "can't be read as CSV in UTF-8"),
        ("file,label\n0.png,a\n1.png,a\n", "has one class, 'a'"),
    ],
)
def test_a_csv_that_breaks_a_rule_is_refused(tmp_path, text, said):
    with pytest.raises(DataError, match=said):
        data.load(listed(tmp_path, {"labels.csv": text}))


def test_one_name_of_two_images_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"names '0.png', and 2 images under"):
        data.load(listed(tmp_path, {"labels.csv": lines()}, ("x/one", "x/two")))


def test_some_images_of_a_split_and_some_of_none_are_refused(tmp_path):
    root = listed(tmp_path, {"labels.csv": lines("x/train/{}.png") + "x/9.png,a\n"}, ("x/train",))
    write(root / "x" / "9.png", encode(noise(9)))
    with pytest.raises(DataError, match=r"x/9.png belongs to no split and other images do"):
        data.load(root)


def test_a_csv_that_is_a_pipe_is_not_opened(tmp_path):
    os.mkfifo(listed(tmp_path, {}) / "labels.csv")
    with pytest.raises(DataError, match=r"labels.csv can't be read .*\(it is a device or a pipe, not a file\)"):
        data.load(tmp_path)


@pytest.mark.parametrize("spec", ["digits", "folder"])
def test_a_column_is_refused_where_there_are_none(tmp_path, spec):
    root = listed(tmp_path, {}, ("a", "b"))
    with pytest.raises(UsageError, match=r"`label='x'` is .* of"):
        data.load(root if spec == "folder" else spec, label="x")
