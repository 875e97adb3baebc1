"""Folders of images as people have them: split names, links, one level too high, suffixes, what is no file."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sukashi
from pictures import encode, folder, noise, plain, write
from sukashi import data, models
from sukashi.core.errors import DataError, UsageError
from sukashi.core.schema import keywords
from sukashi.data.tree import files_in, split_of
from sukashi.experiments.audit.settings import Audit

pytestmark = pytest.mark.filterwarnings("ignore:.* are also in train")


def filled(root: Path, *folders: str, n: int = 3, suffix: str = ".png") -> Path:
    """n images in each of these folders, no two of them the same."""
    for k, name in enumerate(folders):
        for i in range(n):
            write(root / name / f"{i}{suffix}", encode(noise(100 * k + i)))
    return root


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("Train", "Test"),
        ("TRAIN", "VAL"),
        ("training", "testing"),
        ("train", "dev"),
        ("trainset", "eval"),
        ("train_images", "Test Images"),
        ("TrainData", "ValidationData"),
        ("train2017", "val2017"),
        ("seg_train", "seg_test"),
        ("seg_train/seg_train", "seg_test/seg_test"),
    ],
)
def test_splits_are_known_by_their_words(tmp_path, train, test):
    found = data.load(folder(tmp_path, splits=(train, test)))
    assert found.class_names == ("cat", "dog")
    assert (len(found.train), len(found.test)) == (8, 8)
    assert found.train.image_ids[0] == f"{train}/cat/00.png"


def test_a_name_that_says_two_splits_says_the_first_word_or_none():
    assert [split_of(name) for name in ("train_test", "old_train_test", "detrain", "contest", "cat")] == [
        "train",
        *[None] * 4,
    ]


@pytest.mark.parametrize("names", [("train_station", "test_tube", "dev_board"), ("training_shoe", "bus")])
def test_classes_that_only_start_like_a_split_are_classes(tmp_path, names):
    assert data.load(filled(tmp_path, *names)).class_names == tuple(sorted(names))


def test_a_train_among_vehicles_is_a_class_and_that_is_said(tmp_path):
    found = data.load(filled(tmp_path, "Bus", "Car", "Train"))
    assert found.class_names == ("Bus", "Car", "Train")
    assert "Train is a class like the 2 folders beside it, not a split" in found.notes
    with pytest.raises(DataError, match="holds masks, train: either splits"):
        data.load(filled(tmp_path / "two", "train", "masks"))


def test_splits_beside_what_is_none_are_refused(tmp_path):
    with pytest.raises(DataError, match="holds seg_pred, seg_test, seg_train: either splits"):
        data.load(filled(tmp_path, "seg_train/cat", "seg_train/dog", "seg_test/cat", "seg_test/dog", "seg_pred/x"))
    with pytest.raises(DataError, match="never both or two names of one split"):
        data.load(filled(tmp_path / "b", "train/cat", "train/dog", "val/cat", "val/dog", "valid/cat", "valid/dog"))


@pytest.mark.parametrize(
    ("folders", "said"),
    [
        (["data/train/a", "data/test/a"], r"one class, 'data', .* it holds test, train, so give .*/data$"),
        (["train/images/a", "test/images/b"], r"one class, 'images', .* so move these up into .*/t\w+$"),
        (["train/images", "test/images"], r"one class, 'images', .* a CSV beside the images, or from Parquet$"),
        (["a/train", "a/test", "b/train", "b/test"], "holds a, b with splits inside"),
    ],
)
def test_a_folder_of_another_level_is_refused_with_what_is_in_it(tmp_path, folders, said):
    with pytest.raises(DataError, match=said):
        data.load(filled(tmp_path, *folders))


def test_the_same_folders_in_every_class_are_noted(tmp_path):
    found = data.load(filled(tmp_path / "all", "a/x", "a/y", "b/x", "b/y"))
    assert "every class folder of all holds the folders x, y, read as parts of the class" in found.warnings
    assert not any("every class folder" in note for note in data.load(filled(tmp_path / "b", "a/x", "b/x")).warnings)


@pytest.mark.parametrize("place", ["", "train"])
@pytest.mark.parametrize("other", [None, "test/cat", "test"])
def test_images_that_lie_in_no_class_folder_are_told_so(tmp_path, place, other):
    filled(tmp_path, place)
    if other and place:
        filled(tmp_path, other)
    words = "holds 3 images and no class folders, .* into a CSV .* one class of several, give the folder"
    where = "(test|train)" if other == "test" and place else (tmp_path / place).name
    with pytest.raises(DataError, match=f"{where} {words}"):
        data.load(tmp_path)


def test_one_class_is_no_dataset_wherever_it_comes_from():
    import torch

    name = data.hold((torch.randn(6, 1, 8, 8), torch.zeros(6, dtype=torch.int64)))
    with pytest.raises(DataError, match="has one class, '0', and two are needed"):
        data.load(name)


def test_what_other_programs_leave_behind_is_no_class(tmp_path):
    root = filled(tmp_path, "a", "b", "__MACOSX", "__pycache__", "a/@eaDir")
    found = data.load(root)
    assert found.class_names == ("a", "b")
    assert len(found.train) + len(found.test) == 6
    assert any("9 file(s)" in note for note in found.notes)


# --- links ----------------------------------------------------------------------------------------------------------


def test_images_behind_links_are_images(tmp_path):
    more = filled(tmp_path / "more", "m")
    root = filled(tmp_path / "data", "a", "b")
    (root / "a" / "more").symlink_to(more / "m")
    (root / "c").symlink_to(more / "m")
    (root / "b" / "9.png").symlink_to(root / "b" / "0.png")
    found = data.load(root)
    ids = {*found.train.image_ids, *found.test.image_ids}
    assert ids == {f"{k}/{i}.png" for k in "abc" for i in range(3)} | {f"a/more/{i}.png" for i in range(3)} | {
        "b/9.png"
    }
    assert not any("ignored" in note for note in found.notes)


def test_links_that_lead_back_or_twice_to_one_folder_are_followed_once(tmp_path):
    root = filled(tmp_path / "data", "a", "b", "a/own")
    (root / "a" / "home").symlink_to(root)
    (root / "a" / "self").symlink_to(root / "a")
    (root / "a" / "first").symlink_to(root / "a" / "own")
    found = data.load(root)
    assert {i for i in (*found.train.image_ids, *found.test.image_ids) if i.startswith("a/")} == {
        f"a/{inside}{i}.png" for inside in ("", "own/") for i in range(3)
    }
    assert any("3 file(s) of data ignored (3 without a suffix)" in note for note in found.notes)


def test_links_among_links_take_no_longer_than_there_are_folders(tmp_path):
    for i in range(30):
        (tmp_path / str(i)).mkdir()
        for name in "xy":
            (tmp_path / str(i) / name).symlink_to(tmp_path / str(i + 1))
    (tmp_path / "30").mkdir()
    assert len(files_in(tmp_path / "0")) == 30


def test_links_that_lead_nowhere_are_said(tmp_path):
    root = filled(tmp_path / "data", "a", "b")
    (root / "a" / "gone.png").symlink_to(tmp_path / "gone")
    (root / "b" / "more").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match=r"(?s)b/more is a link that leads nowhere"):
        data.load(root)
    (root / "b" / "more").unlink()
    with pytest.raises(DataError, match=r"a/gone.png: a link that leads nowhere"):
        data.load(root)
    assert len(data.load(root, skip_bad=True).bad) == 1
    (root / "c").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match=r"data/c is a link that leads nowhere"):
        data.load(root)


def test_a_folder_that_cannot_be_looked_into_is_refused(tmp_path, monkeypatch):
    root, scan = filled(tmp_path, "a", "b", ".hidden"), os.scandir

    def scandir(path):
        if Path(path).name in ("more", ".hidden"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert data.load(root).class_names == ("a", "b")
    filled(root, "b/more")
    with pytest.raises(DataError, match=r"b/more can't be looked into \(Permission denied\)"):
        data.load(root)


# --- files ----------------------------------------------------------------------------------------------------------


def test_jfif_is_jpeg(tmp_path):
    root = folder(tmp_path)
    write(root / "train" / "cat" / "x.JFIF", encode(noise(7), "JPEG"))
    assert "train/cat/x.JFIF" in data.load(root).train.image_ids


def test_suffixes_that_are_not_read_are_said(tmp_path):
    root = filled(tmp_path, "a", suffix=".avif")
    filled(root, "b")
    write(root / "a" / "scan", b"?")
    with pytest.raises(DataError, match=r"holds no image by its suffix, but 3 .avif, 1 without a suffix: 3 .avif f"):
        data.load(root)
    filled(root, "a")
    assert any("4 file(s) of" in note and "(3 .avif, 1 without a suffix)" in note for note in data.load(root).notes)


@pytest.mark.parametrize("what", ["pipe", "device"])
def test_what_is_no_file_is_never_opened(tmp_path, what):
    root = filled(tmp_path, "a", "b")
    at = root / "a" / "x.png"
    os.mkfifo(at) if what == "pipe" else at.symlink_to("/dev/zero")
    with pytest.raises(DataError, match=r"a/x\.png: it is a device or a pipe, not a file"):
        data.load(root)
    assert len(data.load(root, skip_bad=True).bad) == 1
    with pytest.raises(UsageError, match="it is no folder"):
        data.load(at)


def test_a_file_larger_than_its_pixels_can_be_is_not_read(tmp_path):
    root = filled(tmp_path, "a", "b")
    with (root / "a" / "x.png").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(DataError, match=r"(?s)above the cap on pixels.*a/x.png: it has [\d,]+ bytes, .* are allowed"):
        data.load(root)


def test_an_orientation_without_a_meaning_is_not_applied(tmp_path):
    for number in (0, 9, 200):
        exif = Image.Exif()
        exif[0x0112] = number
        root = folder(tmp_path / str(number))
        write(root / "train" / "cat" / "x.png", encode(noise(7), exif=exif))
        found = data.load(root)
        assert not any("EXIF" in note for note in found.notes)
        at = found.train.image_ids.index("train/cat/x.png")
        pixels = found.train.subset([at]).whole(plain(8)).x[0]
        np.testing.assert_array_equal(np.round(pixels.numpy() * 255), noise(7).transpose(2, 0, 1))


def test_names_that_are_no_text_are_refused(tmp_path):
    root = filled(tmp_path, "a", "b")
    os.rename(root / "a", os.fsencode(root) + b"/\xff")
    with pytest.raises(DataError, match="names that are no UTF-8"):
        data.load(root)


def test_numbers_sorted_as_text_are_noted(tmp_path):
    notes = data.load(filled(tmp_path / "a", "1", "2", "10")).notes
    assert "classes are numbered by their names as text: 1, 10, 2; a `class_map` gives them other numbers" in notes
    for names in (("01", "02", "10"), ("a1", "a10", "a2"), ("7", "8")):
        assert not any("as text" in note for note in data.load(filled(tmp_path / names[1], *names)).notes)


def test_formats_that_are_not_read_are_named_with_what_to_do(tmp_path):
    filled(tmp_path, "a", "b")
    for name in ("a/1.dcm", "a/2.DCM", "b/scan.nii.gz", "b/x.heic"):
        write(tmp_path / name, b"?")
    found = data.load(tmp_path)
    assert [said.partition(", ")[0] for said in found.warnings if "is not read" in said] == [
        "2 .dcm files: DICOM is not read",
        "1 .heic file: HEIC is not read",
        "1 .nii.gz file: a volume is not read",
    ]
    assert "convert to PNG with dcm2pnm (DCMTK) or pydicom" in found.warnings[0]


def test_a_mistyped_folder_is_looked_for_beside_it(tmp_path):
    filled(tmp_path / "photo", "a", "b")
    with pytest.raises(UsageError, match=r"no such folder: did you mean \S+/photo\?$"):
        data.load(tmp_path / "photos")
    with pytest.raises(UsageError, match="no such folder: Known: digits"):
        data.load(tmp_path / "nothing like it")


def test_no_data_are_not_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(filled(tmp_path, "a", "b"))
    with pytest.raises(UsageError, match="`data` must not be empty: give a path or a name"):
        sukashi.check("sukashi:digits_cnn", "")
    with pytest.raises(UsageError, match="data must not be empty: give a folder"):
        data.load("")


def test_the_home_folder_is_found_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    filled(tmp_path / "images", "a", "b")
    assert data.load("~/images").name == "images"
    asked = keywords(
        Audit, {"models": ["~/net", "zoo:net=~/w"], "data": "~/images", "weights": "~/w.pt", "out": "~/out"}
    )
    home = str(tmp_path)
    assert asked.models == [f"{home}/net", f"zoo:net={home}/w"]
    assert (asked.data, asked.weights, asked.out) == (f"{home}/images", f"{home}/w.pt", f"{home}/out")
    models.save(tmp_path / "net", models.load("sukashi:digits_cnn", width=4), provenance={})
    assert sukashi.load("~/net").n_classes == sukashi.load(Path("~/net")).n_classes == 10
    with pytest.raises(UsageError, match=f"{home}/out holds no experiment"):
        sukashi.results("~/out")
