"""Parquet as people write it: which column holds labels, what they are, how images are kept, hostile files."""

import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pictures import encode, noise, plain
from sukashi import data
from sukashi.core.errors import DataError

IMAGES = [encode(noise(i)) for i in range(6)]
pytestmark = pytest.mark.filterwarnings("ignore:.* are also in train")
LABELS = [i % 2 for i in range(6)]
TEXTS = ["dog", "cat"] * 3


def named(**classes) -> dict[str, str]:
    features = {column: {"_type": "ClassLabel", "names": names} for column, names in classes.items()}
    return {"huggingface": json.dumps({"info": {"features": features}})}


def written(root, columns, metadata=None, name="train.parquet"):
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    root.mkdir(exist_ok=True)
    pq.write_table(table.replace_schema_metadata(metadata), root / name)
    return root


def whole(found):
    """{id: class name} of every image."""
    return {
        image_id: split.class_names[target]
        for split in (found.train, found.test)
        for image_id, target in zip(split.image_ids, split.targets.tolist(), strict=True)
    }


@pytest.mark.parametrize("kind", ["text", "large", "categories", "yes or no"])
def test_labels_that_are_text_are_classes_in_sorted_order(tmp_path, kind):
    texts = {
        "text": pa.array(TEXTS),
        "large": pa.array(TEXTS, pa.large_string()),
        "categories": pa.array(TEXTS).dictionary_encode(),
        "yes or no": pa.array([text == "dog" for text in TEXTS]),
    }[kind]
    found = data.load(written(tmp_path, {"image": IMAGES, "label": texts}))
    names = ("false", "true") if kind == "yes or no" else ("cat", "dog")
    assert found.class_names == names
    assert list(dict(sorted(whole(found).items())).values()) == [names[text == "dog"] for text in TEXTS]
    assert "labels are text: classes are numbered by sorted label" in found.notes


def test_the_column_of_labels_can_be_named(tmp_path):
    columns = {"img": IMAGES, "fine_label": [0, 1, 2] * 2, "coarse_label": LABELS, "word": TEXTS}
    root = written(tmp_path, columns, named(fine_label=["x", "y", "z"], coarse_label=["p", "q"]))
    with pytest.raises(DataError, match="give `label` with one of fine_label, coarse_label"):
        data.load(root)
    assert data.load(root, label="fine_label").class_names == ("x", "y", "z")
    assert data.load(root, label="coarse_label").class_names == ("p", "q")
    assert data.load(root, label="word").class_names == ("cat", "dog")
    with pytest.raises(DataError, match="no column 'fine': did you mean 'fine_label'"):
        data.load(root, label="fine")
    with pytest.raises(DataError, match="labels of train are binary, not class numbers or names"):
        data.load(root, label="img")


def test_class_names_that_are_numbers_are_text(tmp_path):
    found = data.load(written(tmp_path, {"image": IMAGES, "label": LABELS}, named(label=[7, 8])))
    assert found.class_names == ("7", "8")
    data.check_classes(("7", "8"), found.class_names, 2)


def test_classes_of_one_name_are_refused(tmp_path):
    with pytest.raises(DataError, match="several classes called 'a'"):
        data.load(written(tmp_path, {"image": IMAGES, "label": LABELS}, named(label=["a", "a"])))


@pytest.mark.parametrize(
    "metadata",
    [named(label={"0": "a"}), named(label=[None, "a"]), {"huggingface": "[1]"}, {"huggingface": "[" * 10**5}],
)
def test_metadata_that_is_none_is_refused(tmp_path, metadata):
    with pytest.raises(DataError, match=r"the metadata of .*train.parquet is not as Hugging Face writes it"):
        data.load(written(tmp_path, {"image": IMAGES, "label": LABELS}, metadata))


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([0, 1, None, 1, 0, 1], "1 labels of train .* first is missing, row 2"),
        ([0, 1, 0, 1, 0, 10**12], r"first is 1000000000000, row 5"),
        (pa.array([0, 1, 0, 1, 0, 2**64 - 1], pa.uint64()), "first is 18446744073709551615"),
        (["a", None, "b", "a", "b", "a"], "1 labels of train are missing"),
        ([0.0, 1.0] * 3, "labels of train are double, not class numbers or names"),
        ([[0], [1]] * 3, "labels of train are list"),
        (pa.nulls(6), "labels of train are null"),
    ],
)
def test_labels_that_are_none_are_refused(tmp_path, labels, said):
    with pytest.raises(DataError, match=said):
        data.load(written(tmp_path, {"image": IMAGES, "label": labels}))


def test_text_in_one_file_and_numbers_in_another_are_refused(tmp_path):
    written(tmp_path, {"image": IMAGES, "label": TEXTS})
    written(tmp_path, {"image": IMAGES, "label": LABELS}, name="test.parquet")
    with pytest.raises(DataError, match="are int64 and string"):
        data.load(tmp_path)


@pytest.mark.parametrize(
    "images",
    [
        pa.array(IMAGES, pa.large_binary()),
        pa.array(IMAGES).dictionary_encode(),
        pa.array([{"bytes": image} for image in IMAGES]),
        pa.array([{"bytes": image, "path": None} for image in IMAGES]),
    ],
)
def test_images_are_the_same_however_they_are_kept(tmp_path, images):
    """In two files of a split, each in its own way."""
    written(tmp_path, {"image": images, "label": LABELS}, name="train-0.parquet")
    written(tmp_path, {"image": [{"bytes": i, "path": "x"} for i in IMAGES], "label": LABELS}, name="train-1.parquet")
    found = data.load(tmp_path)
    pixels = dict(zip(found.train.image_ids, found.train.whole(plain(8)).x, strict=True))
    for image_id, image in pixels.items():
        expected = noise(int(image_id[-5:]) % 6).transpose(2, 0, 1)
        np.testing.assert_array_equal(np.round(image.numpy() * 255), expected)


@pytest.mark.parametrize(
    ("images", "said"),
    [
        ([f"{i}.png" for i in range(6)], "image of .* is string, not encoded images: .*paths and pixels are not"),
        ([noise(i).tolist() for i in range(6)], "is list<.*>, not encoded images"),
        ([[{"bytes": image}] for image in IMAGES], "is list<.*>, not encoded images"),
        ([{"data": image} for image in IMAGES], "is struct<data: binary>, not encoded images"),
        ([{"bytes": None, "path": "x.png"}] * 6, "holds no bytes, at most paths"),
    ],
)
def test_images_that_are_no_encoded_bytes_are_refused(tmp_path, images, said):
    with pytest.raises(DataError, match=said):
        data.load(written(tmp_path, {"image": images, "label": LABELS}))


def test_one_column_twice_is_refused(tmp_path):
    table = pa.Table.from_arrays([pa.array(IMAGES), pa.array(LABELS), pa.array(LABELS)], ["image", "label", "label"])
    with pytest.raises(DataError, match="has 2 columns 'label'"):
        data.load(written(tmp_path, table))


def test_more_rows_than_bytes_are_refused_before_they_are_read(tmp_path, monkeypatch):
    n = 200_000
    images = pa.DictionaryArray.from_arrays(np.zeros(n, np.int32), IMAGES[:1])
    root = written(tmp_path, {"image": images, "label": pa.array(np.zeros(n, np.int8))})
    assert (root / "train.parquet").stat().st_size < n
    monkeypatch.setattr(pq.ParquetFile, "read", lambda *args, **options: pytest.fail("it was read"))
    with pytest.raises(DataError, match="claims 200,000 rows in"):
        data.load(root)


@pytest.mark.parametrize("what", ["pipe", "device"])
def test_what_is_no_file_is_never_opened(tmp_path, what):
    at = tmp_path / "train.parquet"
    os.mkfifo(at) if what == "pipe" else at.symlink_to("/dev/zero")
    for spec in (tmp_path, at):
        with pytest.raises(DataError, match=r"train.parquet is no readable Parquet \(it is a device or a pipe"):
            data.load(spec)


def test_hidden_files_are_none_of_the_data(tmp_path):
    root = written(tmp_path, {"image": IMAGES, "label": LABELS})
    (root / "._train.parquet").write_bytes(b"\0\5\26\7")
    assert len(data.load(root).train) == 4


@pytest.mark.parametrize("name", ["partial-train/0.parquet", "cifar10-train.parquet", "train.parquet/part-0.parquet"])
def test_a_split_is_a_word_of_the_name(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    assert data.load(written(tmp_path, {"image": IMAGES, "label": LABELS}, name=name)).class_names == ("0", "1")


def test_a_file_is_named_by_its_first_words_before_others(tmp_path):
    (tmp_path / "train").mkdir()
    written(tmp_path, {"image": IMAGES, "label": LABELS}, name="train/my_test_data.parquet")
    assert set(whole(data.load(tmp_path))) == {f"train/{i:05d}" for i in range(6)}


def test_files_that_differ_are_named_with_what_differs(tmp_path):
    written(tmp_path, {"image": IMAGES, "label": LABELS}, named(label=["a", "b"]))
    written(tmp_path, {"image": IMAGES, "label": LABELS}, name="test.parquet")
    with pytest.raises(DataError, match=r"test.parquet has .* no class names, .* has .* classes a, b: all files"):
        data.load(tmp_path)
