"""Datasets: ids, splits, sampling, decoding rules, and every fault a folder of images can have."""

import io
import json
import re
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pictures import encode, folder, noise, parquet, plain, write
from sukashi import data
from sukashi.core.errors import DataError, ModelError, UsageError
from sukashi.core.types import Preprocess
from sukashi.data import downloads
from sukashi.data.shapes import CONCEPTS, SHAPES


def one(root: Path, encoded: bytes, suffix: str = ".png") -> tuple[torch.Tensor, data.Data]:
    """The pixels of the first training image where it is `encoded`, read at its own size, and the dataset."""
    write(folder(root) / "train" / "cat" / f"00{suffix}", encoded)
    if suffix != ".png":
        (root / "train" / "cat" / "00.png").unlink()
    found = data.load(root)
    row = found.train.image_ids.index(f"train/cat/00{suffix}")
    return found.train.subset([row]).whole(plain(8)).x[0], found


# --- digits, splits, samples ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digit_data() -> data.Data:
    return data.load("digits")


def test_digits_are_scikit_learns(digit_data):
    from sklearn.datasets import load_digits

    known = load_digits()
    batch = digit_data.test.whole(plain(8, 1))
    rows = [int(i.removeprefix("digits/")) for i in batch.image_id]
    np.testing.assert_array_equal(batch.x[:, 0].numpy(), (known.images[rows] / 16).astype(np.float32))
    assert batch.target.tolist() == known.target[rows].tolist()
    assert digit_data.class_names == tuple("0123456789")


def test_held_out_split_is_stratified_disjoint_and_said(digit_data):
    train, test = digit_data.train, digit_data.test
    assert not set(train.image_ids) & set(test.image_ids)
    assert len(train) + len(test) == 1797
    share = test.counts / (train.counts + test.counts)
    assert torch.all((share - 0.2).abs() < 0.005)
    assert any("held out by seed 0, 359 images" in note for note in digit_data.notes)
    assert data.load("digits").test.image_ids == test.image_ids
    assert data.load("digits", seed=1).test.image_ids != test.image_ids


def test_normalisation_is_x_minus_mean_over_std(digit_data):
    raw = digit_data.test.whole(plain(8, 1)).x
    x = digit_data.test.whole(Preprocess(8, 8, 1, (0.25,), (0.5,))).x
    torch.testing.assert_close(x, (raw - 0.25) / 0.5, rtol=0, atol=0)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 40), seed=st.integers(0, 1000))
def test_calibration_is_balanced_nested_and_independent_of_order(n, seed):
    train = data.load("shapes:size=16,n=40").train
    sample = train.calibration(n, seed)
    assert sample.counts.tolist() == [n] * 6
    assert set(sample.image_ids) <= set(train.calibration(min(n + 1, 40), seed).image_ids)
    backwards = train.subset(range(len(train) - 1, -1, -1)).calibration(n, seed)
    assert set(backwards.image_ids) == set(sample.image_ids)


def test_calibration_follows_its_seed(digit_data):
    assert digit_data.train.calibration(5, 0).image_ids == digit_data.train.calibration(5, 0).image_ids
    assert digit_data.train.calibration(5, 0).image_ids != digit_data.train.calibration(5, 1).image_ids


def test_highest_takes_each_class_s_own(digit_data):
    train = digit_data.train
    values = torch.rand(len(train), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values[3] = values[4] = 2.0
    sample = train.highest(values, 4)
    chosen = {image_id: float(values[i]) for i, image_id in enumerate(train.image_ids)}
    for number in range(10):
        of_class = [float(v) for v, t in zip(values, train.targets, strict=True) if int(t) == number]
        found = [chosen[i] for i, t in zip(sample.image_ids, sample.targets, strict=True) if int(t) == number]
        assert sorted(found) == sorted(of_class)[-4:]
    backwards = range(len(train) - 1, -1, -1)
    again = train.subset(backwards).highest(values.flip(0), 4)
    assert set(again.image_ids) == set(sample.image_ids)
    tied = train.highest(torch.zeros(len(train)), 2)
    assert set(tied.image_ids) == set(train.subset(backwards).highest(torch.zeros(len(train)), 2).image_ids)


def test_central_takes_the_image_nearest_to_each_centre(digit_data):
    """Three blobs a class, far apart: one image of each, the one nearest to the blob's mean."""
    train = digit_data.train
    generator = torch.Generator().manual_seed(1)
    blob = torch.arange(len(train)) % 3
    features = 100.0 * torch.nn.functional.one_hot(blob, 3) + torch.randn(len(train), 3, generator=generator)
    sample = train.central(features, 3, seed=5)
    row = {image_id: i for i, image_id in enumerate(train.image_ids)}
    expected = set()
    for number in range(10):
        for b in range(3):
            rows = ((train.targets == number) & (blob == b)).nonzero()[:, 0]
            distance = (features[rows] - features[rows].mean(0)).square().sum(1)
            expected.add(int(rows[distance.argmin()]))
    assert {row[i] for i in sample.image_ids} == expected
    backwards, spread = train.subset(range(len(train) - 1, -1, -1)), torch.randn(len(train), 3, generator=generator)
    assert set(backwards.central(spread.flip(0), 3, 5).image_ids) == set(train.central(spread, 3, 5).image_ids)
    assert train.central(spread, 3, 5).image_ids == train.central(spread, 3, 5).image_ids
    assert train.central(spread, 3, 5).image_ids != train.central(spread, 3, 6).image_ids


def test_central_takes_as_many_images_as_asked_where_features_coincide(digit_data):
    train = digit_data.train
    sample = train.central(torch.zeros(len(train), 2), 4, seed=0)
    assert sample.counts.tolist() == [4] * 10
    with pytest.raises(DataError, match="a calibration set needs 500"):
        train.central(torch.zeros(len(train), 2), 500, seed=0)


def test_calibration_keeps_ids_targets_and_pixels_together(digit_data):
    whole = digit_data.train.whole(plain(8, 1))
    sample = digit_data.train.calibration(3, 7).whole(plain(8, 1))
    rows = torch.tensor([whole.image_id.index(i) for i in sample.image_id])
    assert torch.equal(sample.x, whole.x[rows])
    assert torch.equal(sample.target, whole.target[rows])


def test_calibration_names_the_class_with_too_few(tmp_path):
    (folder(tmp_path, n=4) / "train" / "dog" / "03.png").unlink()
    train = data.load(tmp_path).train
    with pytest.raises(DataError, match=r"class 'dog' has 3 images in train, .* needs 4 .* give `calibration=3` "):
        train.calibration(4, 0)
    with pytest.raises(UsageError, match="at least 1, got 0"):
        train.calibration(0, 0)


def test_limit_is_balanced_nested_and_of_the_same_ids(digit_data):
    train = digit_data.train
    some = train.limit(25)
    assert len(some) == 25
    assert int(some.counts.max() - some.counts.min()) <= 1
    assert set(some.image_ids) < set(train.limit(30).image_ids)
    assert [i for i in train.image_ids if i in set(some.image_ids)] == list(some.image_ids)
    assert train.limit(10**6) is train
    assert train.limit(25, seed=1).image_ids != some.image_ids
    with pytest.raises(UsageError, match="at least 10, got 9"):
        train.limit(9)


def test_limit_fills_up_from_larger_classes(tmp_path):
    root = folder(tmp_path, n=6)
    for i in range(1, 6):
        (root / "train" / "dog" / f"{i:02d}.png").unlink()
    assert data.load(root).train.limit(5).counts.tolist() == [4, 1]


def test_subset_takes_positions_or_a_mask(digit_data):
    test = digit_data.test
    chosen = test.subset(test.targets == 3)
    assert set(chosen.targets.tolist()) == {3}
    assert chosen.image_ids == test.subset((test.targets == 3).nonzero()[:, 0]).image_ids
    assert test.subset([5, 2]).image_ids == (test.image_ids[5], test.image_ids[2])


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_are_the_same_for_any_workers_and_can_be_iterated_again(digit_data, workers):
    preprocess = Preprocess(11, 9, 3, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    whole = digit_data.test.whole(preprocess)
    batches = digit_data.test.batches(preprocess, 50, workers)
    assert len(batches) == 8
    for _ in range(2):
        got = list(batches)
        assert [len(b) for b in got] == [50] * 7 + [9]
        assert torch.equal(torch.cat([b.x for b in got]), whole.x)
        assert torch.equal(torch.cat([b.target for b in got]), whole.target)
        assert sum((b.image_id for b in got), ()) == digit_data.test.image_ids


def test_batches_stop_early_without_hanging(digit_data):
    first = next(iter(digit_data.test.batches(plain(8), 4, workers=2)))
    assert first.image_id == digit_data.test.image_ids[:4]


@pytest.mark.parametrize(
    ("channels", "size", "workers", "message"), [(4, 8, 0, "wants 4"), (3, 0, 0, "got 0"), (3, 8, -1, "got -1")]
)
def test_batches_refuse_what_they_cannot_do(digit_data, channels, size, workers, message):
    with pytest.raises(UsageError, match=message):
        digit_data.test.batches(plain(8, channels), size, workers)


# --- one image, one rule --------------------------------------------------------------------------------------------


def test_rgb_png_is_exact_and_unnoted(tmp_path):
    pixels = noise(7)
    x, found = one(tmp_path, encode(pixels))
    assert torch.equal(x, torch.from_numpy(pixels).permute(2, 0, 1).float() / 255)
    assert found.notes == ()


def test_grey_is_repeated(tmp_path):
    pixels = noise(7, 8, 8)
    x, found = one(tmp_path, encode(pixels))
    assert torch.equal(x, (torch.from_numpy(pixels).float() / 255).expand(3, -1, -1))
    assert found.train.notes == {"greyscale: repeated where a model wants three channels": 1}
    assert any("1 image(s) of train: greyscale" in note for note in found.notes)


def test_rgb_becomes_grey_by_the_luma_of_bt601(tmp_path):
    pixels = noise(7)
    _, found = one(tmp_path, encode(pixels))
    x = found.train.subset([0]).whole(plain(8, 1)).x[0, 0]
    luma = torch.from_numpy((pixels * [0.299, 0.587, 0.114]).sum(-1) / 255).float()
    torch.testing.assert_close(x, luma, rtol=0, atol=0.6 / 255)


def test_16_bit_grey_keeps_its_range(tmp_path):
    pixels = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    x, found = one(tmp_path, encode(pixels))
    torch.testing.assert_close(x[0], torch.from_numpy(pixels / 65535).float())
    assert found.train.notes == {"16-bit grey: divided by 65535": 1}


def test_16_bit_tiff_keeps_its_range(tmp_path):
    pixels = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    x, _ = one(tmp_path, encode(pixels, "TIFF"), ".tif")
    torch.testing.assert_close(x[0], torch.from_numpy(pixels / 65535).float())


def test_cmyk_becomes_rgb(tmp_path):
    image = Image.new("CMYK", (8, 8), (255, 0, 0, 0))  # all cyan
    x, found = one(tmp_path, encode(image, "JPEG", quality=100), ".jpg")
    torch.testing.assert_close(x.mean((1, 2)), torch.tensor([0.0, 1.0, 1.0]), rtol=0, atol=0.02)
    assert any("CMYK" in note for note in found.notes)


def test_transparency_is_laid_over_white(tmp_path):
    pixels = np.zeros((8, 8, 4), dtype=np.uint8)
    pixels[..., 0] = 200
    pixels[:, 4:, 3] = 255
    x, found = one(tmp_path, encode(pixels))
    assert torch.equal(x[:, :, :4], torch.ones(3, 8, 4))
    assert torch.equal(x[:, 0, 5], torch.tensor([200 / 255, 0, 0]))
    assert any("laid over white" in note for note in found.notes)


def test_palette_is_looked_up(tmp_path):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    x, found = one(tmp_path, encode(image))
    torch.testing.assert_close(x[:, 3, 3], torch.tensor([10.0, 20, 30]) / 255)
    assert any("palette" in note for note in found.notes)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_orientation_gives_the_upright_image(tmp_path, orientation, kind):
    """Quarter k of the upright picture has brightness k; the file stores it as its orientation tag says."""
    upright = np.kron(np.array([[0, 80], [160, 240]], dtype=np.uint8), np.ones((4, 4), dtype=np.uint8))
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    suffix = {"JPEG": ".jpg", "PNG": ".png"}[kind]
    x, found = one(tmp_path, encode(np.ascontiguousarray(stored), kind, exif=exif), suffix)
    torch.testing.assert_close(x[0], torch.from_numpy(upright).float() / 255, rtol=0, atol=0.02)
    assert any("EXIF" in note for note in found.notes) == (orientation != 1)


def test_several_frames_are_noted(tmp_path):
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    x, found = one(tmp_path, encode(first, "GIF", save_all=True, append_images=[second]), ".gif")
    assert torch.equal(x[:, 0, 0], torch.tensor([1.0, 0, 0]))
    assert any("first one used" in note for note in found.notes)


def test_resize_is_antialiased(tmp_path):
    """A pattern finer than the target averages out; plain bilinear sampling would keep one phase of it."""
    fine = np.zeros((64, 64), dtype=np.uint8)
    fine[::2, ::2] = 255
    x, _ = one(tmp_path, encode(fine))
    torch.testing.assert_close(x[:, 1:-1, 1:-1], torch.full((3, 6, 6), 0.25), rtol=0, atol=0.01)


# --- faults ---------------------------------------------------------------------------------------------------------


def jpeg() -> bytes:
    return encode(noise(7, 64, 64, 3), "JPEG")


BAD = {
    "truncated.jpg": (lambda: jpeg()[:-500], "truncated"),
    "header.jpg": (lambda: jpeg()[:600], "cannot be decoded"),
    "truncated.bmp": (lambda: encode(noise(7, 64, 64, 3), "BMP")[:-200], "truncated"),
    "truncated.png": (lambda: encode(noise(7, 64, 64, 3))[:-200], "cannot be decoded"),
    "flipped.png": (lambda: encode(noise(7))[:60] + b"\xff\xff" + encode(noise(7))[62:], "cannot be decoded"),
    "empty.png": (lambda: b"", "no bytes"),
    "text.png": (lambda: b"not a picture\n" * 20, "not an image"),
    "script.jpg": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "not an image"),
    "float.tif": (lambda: encode(np.ones((8, 8), dtype=np.float32), "TIFF"), "no fixed scale"),
}


def test_bad_images_are_all_listed(tmp_path):
    root = folder(tmp_path)
    for name, (encoded, _) in BAD.items():
        write(root / "train" / "cat" / name, encoded())
    with pytest.raises(DataError) as caught:
        data.load(root)
    assert caught.value.exit_code == 3
    for name, (_, reason) in BAD.items():
        assert any(f"train/cat/{name}: " in line and reason in line for line in str(caught.value).splitlines()), name
    assert "skip_bad" in str(caught.value)


def test_skipped_images_are_counted_and_the_rest_keep_their_ids(tmp_path):
    root = folder(tmp_path)
    clean = data.load(root)
    for name, (encoded, _) in BAD.items():
        write(root / "train" / "cat" / name, encoded())
    found = data.load(root, skip_bad=True)
    assert sorted(name for name, _ in found.bad) == sorted(f"train/cat/{name}" for name in BAD)
    assert found.train.bad == found.bad
    assert found.test.bad == ()
    assert any(f"{len(BAD)} unreadable image(s) of train left out" in said for said in found.warnings)
    assert found.train.image_ids == clean.train.image_ids
    assert torch.equal(found.train.whole(plain(8)).x, clean.train.whole(plain(8)).x)


def test_a_class_whose_images_are_all_bad_is_not_skipped_away(tmp_path):
    root = folder(tmp_path, n=1)
    write(root / "train" / "dog" / "00.png", b"")
    with pytest.raises(DataError, match="train has no image of 'dog'"):
        data.load(root, skip_bad=True)


def test_damage_found_late_is_fatal(tmp_path):
    root = folder(tmp_path)
    train = data.load(root).train
    write(root / "train" / "cat" / "00.png", b"gone")
    write(root / "train" / "dog" / "01.png", b"")
    with pytest.raises(
        DataError, match=r"(?s)2 image\(s\).*train/cat/00.png: not an image.*train/dog/01.png: no bytes"
    ):
        train.whole(plain(8))
    with pytest.raises(DataError, match=r"train/cat/00\.png"):
        list(train.batches(plain(8), 2, workers=2))


@pytest.mark.parametrize("skip_bad", [False, True])
def test_huge_image_is_fatal_and_the_cap_is_a_setting(tmp_path, skip_bad):
    root = folder(tmp_path)
    write(root / "train" / "cat" / "huge.png", encode(np.zeros((100, 100), dtype=np.uint8)))
    with pytest.raises(DataError, match=r"(?s)max_pixels.*train/cat/huge.png: 100 x 100 pixels"):
        data.load(root, max_pixels=9_999, skip_bad=skip_bad)
    assert len(data.load(root, max_pixels=10_000).train) == 9


def test_decompression_bomb_is_refused_before_decoding(tmp_path):
    root = folder(tmp_path)
    write(root / "train" / "cat" / "bomb.png", encode(Image.new("1", (14_000, 14_000))))
    with pytest.raises(DataError, match=r"train/cat/bomb.png"):
        data.load(root)
    with pytest.raises(UsageError, match="`max_pixels` must be in"):
        data.load(root, max_pixels=10**9)


def test_empty_class_is_refused_never_renumbered(tmp_path):
    root = folder(tmp_path, classes=("cat", "dog", "eel"))
    for file in (root / "train" / "dog").iterdir():
        file.unlink()
    with pytest.raises(DataError, match="train has no image of 'dog': classes are never renumbered"):
        data.load(root)
    (root / "train" / "dog").rmdir()
    with pytest.raises(DataError, match="no folder for dog"):
        data.load(root)


def test_class_with_one_image_is_noted(tmp_path):
    root = folder(tmp_path, n=1)
    found = data.load(folder(root, n=3, splits=("train",)))
    assert found.test.counts.tolist() == [1, 1]
    assert "one image only in test, left out of per-class statistics: cat, dog" in found.warnings
    assert not any("one image only in train" in said for said in found.warnings)


def test_same_image_in_two_splits_warns(tmp_path):
    root = folder(tmp_path)
    write(root / "test" / "dog" / "copy.png", (root / "train" / "cat" / "02.png").read_bytes())
    with pytest.warns(
        UserWarning, match=r"1 image\(s\) of test are also in train.*test/dog/copy.png = train/cat/02.png"
    ):
        found = data.load(root)
    assert any("also in train" in said for said in found.warnings)


def test_different_images_do_not_warn(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.load(folder(tmp_path))


def test_sha256_follows_pixels_targets_and_splits(tmp_path):
    root = folder(tmp_path)
    before = data.load(root).sha256
    assert data.load(root).sha256 == before
    assert data.load(root, class_map={"cat": 1, "dog": 0}).sha256 != before
    write(root / "test" / "dog" / "03.png", encode(noise(99)))
    assert data.load(root).sha256 != before


# --- folders --------------------------------------------------------------------------------------------------------


def test_folder_ids_are_paths_and_classes_sorted_names(tmp_path):
    root = folder(tmp_path, n=2, classes=("b", "a", "10"), splits=("train", "val", "test"))
    write(root / "train" / "a" / "deep" / "x.JPG", jpeg())
    found = data.load(root)
    assert found.class_names == ("10", "a", "b")
    assert found.train.image_ids[2:5] == ("train/a/00.png", "train/a/01.png", "train/a/deep/x.JPG")
    assert found.train.targets.tolist() == [0, 0, 1, 1, 1, 2, 2]
    assert found.val is not None
    assert found.val.image_ids[0] == "val/10/00.png"


def test_val_stands_in_for_a_missing_test_split(tmp_path):
    found = data.load(folder(tmp_path, splits=("train", "validation")))
    assert found.val is None
    assert found.test.image_ids[0] == "validation/cat/00.png"
    assert any("val is used as test" in note for note in found.notes)


@pytest.mark.parametrize("splits", [("",), ("train",)])
def test_unsplit_folder_is_split_the_same_whatever_else_is_in_it(tmp_path, splits):
    root = folder(tmp_path, n=20, splits=splits)
    before = data.load(root)
    assert before.test.counts.tolist() == [4, 4]
    assert before.train.counts.tolist() == [16, 16]
    write(root / splits[0] / "cat" / "new.png", encode(noise(5000)))
    after = data.load(root)
    dogs = [i for i in before.test.image_ids if "dog" in i]
    assert [i for i in after.test.image_ids if "dog" in i] == dogs


def test_a_class_of_two_holds_one_out(tmp_path):
    found = data.load(folder(tmp_path, n=2, splits=("",)))
    assert (found.train.counts.tolist(), found.test.counts.tolist()) == ([1, 1], [1, 1])


def test_unsplit_class_of_one_image_cannot_be_held_out(tmp_path):
    root = folder(tmp_path, n=1, classes=("eel",), splits=("",))
    folder(root, n=3, splits=("",))
    with pytest.raises(DataError, match="class 'eel' has one image"):
        data.load(root)


def test_other_files_are_ignored_and_said(tmp_path):
    root = folder(tmp_path)
    for name in ("cat/notes.txt", "cat/._00.png", "stray.png"):
        write(root / "train" / name, b"?")
    found = data.load(root)
    assert len(found.train) == 8
    assert any("3 file(s) of train ignored" in note for note in found.notes)


def test_splits_beside_classes_are_ambiguous(tmp_path):
    write(folder(tmp_path, splits=("",)) / "train" / "cat" / "0.png", encode(noise(9)))
    with pytest.raises(DataError, match="holds cat, dog, train"):
        data.load(tmp_path)


def test_folder_without_images_is_refused(tmp_path):
    with pytest.raises(DataError, match="neither Parquet files nor class folders"):
        data.load(tmp_path)


def test_test_split_alone_is_refused(tmp_path):
    with pytest.raises(DataError, match="only test: a train split is needed"):
        data.load(folder(tmp_path, splits=("test",)))


# --- Parquet --------------------------------------------------------------------------------------------------------


def rows(start: int, n: int = 4) -> list[tuple[bytes | None, int]]:
    return [(encode(noise(start + i)), i % 2) for i in range(n)]


def test_parquet_reads_names_ids_and_shards(tmp_path):
    parquet(tmp_path / "data" / "train-00000-of-00002.parquet", rows(0), ["cat", "dog"])
    parquet(tmp_path / "data" / "train-00001-of-00002.parquet", rows(10), ["cat", "dog"])
    parquet(tmp_path / "data" / "validation-00000-of-00001.parquet", rows(20), ["cat", "dog"])
    found = data.load(tmp_path)
    assert found.class_names == ("cat", "dog")
    assert found.train.image_ids == tuple(f"train/{i:05d}" for i in range(8))
    assert found.test.image_ids[0] == "val/00000"
    expected = np.stack([noise(i) for i in (0, 1, 2, 3, 10, 11, 12, 13)])
    x = found.train.whole(plain(8)).x
    assert torch.equal(x, torch.from_numpy(expected).permute(0, 3, 1, 2).float() / 255)
    assert found.train.targets.tolist() == [0, 1] * 4


def test_parquet_file_alone_is_held_out(tmp_path):
    parquet(tmp_path / "train.parquet", rows(0, 10), ["cat", "dog"])
    found = data.load(tmp_path / "train.parquet")
    assert found.name == "train"
    assert found.test.counts.tolist() == [1, 1]


def test_parquet_names_the_bad_row_and_its_path(tmp_path):
    bad = rows(0)
    bad[2] = (None, 0)
    bad[3] = (b"text", 1)
    parquet(tmp_path / "train.parquet", bad, ["cat", "dog"])
    parquet(tmp_path / "test.parquet", rows(10), ["cat", "dog"])
    with pytest.raises(DataError, match=r"(?s)train/00002 \(p2.png\): no bytes.*train/00003 \(p3.png\): not an image"):
        data.load(tmp_path)
    found = data.load(tmp_path, skip_bad=True)
    assert found.train.image_ids == ("train/00000", "train/00001")


@pytest.mark.parametrize(("label", "names"), [(2, ["cat", "dog"]), (-1, ["cat", "dog"]), (-1, None)])
def test_parquet_label_outside_the_classes_is_refused(tmp_path, label, names):
    parquet(tmp_path / "train.parquet", [*rows(0), (encode(noise(9)), label)], names)
    with pytest.raises(DataError, match=rf"1 labels of train .* first is {label}, row 4"):
        data.load(tmp_path)


def test_parquet_without_names_counts_its_classes(tmp_path):
    parquet(tmp_path / "train.parquet", rows(0))
    parquet(tmp_path / "test.parquet", rows(10))
    found = data.load(tmp_path)
    assert found.class_names == ("0", "1")
    assert any("called by their numbers" in note for note in found.notes)


def test_parquet_class_without_images_is_refused(tmp_path):
    parquet(tmp_path / "train.parquet", rows(0), ["cat", "dog", "eel"])
    parquet(tmp_path / "test.parquet", rows(10), ["cat", "dog", "eel"])
    with pytest.raises(DataError, match="train has no image of 'eel'"):
        data.load(tmp_path)


def test_parquet_splits_that_disagree_on_names_are_refused(tmp_path):
    parquet(tmp_path / "train.parquet", rows(0), ["cat", "dog"])
    parquet(tmp_path / "test.parquet", rows(10), ["dog", "cat"])
    with pytest.raises(DataError, match=r"classes dog, cat, .* and the classes cat, dog: all files"):
        data.load(tmp_path)


def test_parquet_of_no_split_or_no_parquet_is_refused(tmp_path):
    parquet(tmp_path / "stuff.parquet", rows(0))
    with pytest.raises(DataError, match=r"stuff.parquet belongs to no split"):
        data.load(tmp_path)
    write(tmp_path / "stuff.parquet", b"PAR1 no")
    with pytest.raises(DataError, match=r"stuff.parquet .* write it again"):
        data.load(tmp_path)


def test_parquet_without_an_image_column_is_refused(tmp_path):
    pq.write_table(pa.table({"picture": [b"x"], "label": [0]}), tmp_path / "train.parquet")
    with pytest.raises(DataError, match="has columns picture, label"):
        data.load(tmp_path)


# --- masks ----------------------------------------------------------------------------------------------------------


def segmented(root: Path, masks: list[np.ndarray], classes: tuple[str, ...] = ("sky", "road", "void"), **image) -> Path:
    for s, split in enumerate(("train", "test")):
        images = [encode(noise(100 * s + i, 8, 8, 3), **image) for i in range(len(masks))]
        table = pa.table(
            {
                "image": pa.array([{"bytes": b, "path": None} for b in images]),
                "mask": pa.array([{"bytes": encode(mask), "path": None} for mask in masks]),
            }
        ).replace_schema_metadata({"classes": json.dumps(classes)})
        pq.write_table(table, root / f"{split}.parquet")
    return root


def test_masks_are_targets_with_a_declared_void(tmp_path):
    mask = np.kron(np.array([[0, 1], [2, 1]], dtype=np.uint8), np.ones((4, 4), dtype=np.uint8))
    found = data.load(segmented(tmp_path, [mask] * 3))
    assert found.class_names == ("sky", "road")
    assert found.ignore_index == 2
    batch = found.train.whole(plain(4))
    assert batch.target.dtype == torch.int64
    assert batch.target[0].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 1, 1], [2, 2, 1, 1]]
    assert next(iter(found.train.batches(plain(8), 2, workers=1))).target.shape == (2, 8, 8)
    assert len(found.train.limit(2)) == 2
    with pytest.raises(UsageError, match="use limit"):
        found.train.calibration(1, 0)
    with pytest.raises(UsageError, match="a map of classes"):
        _ = found.train.targets
    with pytest.raises(UsageError, match="`class_map` is for one class an image"):
        data.load(tmp_path, class_map={"sky": 1, "road": 0})


def test_mask_resize_makes_no_new_class(tmp_path):
    mask = np.tile(np.array([0, 2], dtype=np.uint8), (8, 4))
    found = data.load(segmented(tmp_path, [mask]))
    assert set(found.train.whole(plain(5)).target.unique().tolist()) <= {0, 2}


def test_without_a_void_class_255_is_void(tmp_path):
    found = data.load(segmented(tmp_path, [np.full((8, 8), 255, dtype=np.uint8)], ("sky", "road")))
    assert found.ignore_index == 255
    assert found.class_names == ("sky", "road")


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (np.full((8, 8), 7, dtype=np.uint8), "mask holds 7"),
        (np.zeros((4, 8), dtype=np.uint8), "mask is 8 x 4 pixels, image 8 x 8"),
        (np.zeros((8, 8, 3), dtype=np.uint8), "mask has mode RGB"),
    ],
)
def test_bad_masks_are_named(tmp_path, mask, reason):
    with pytest.raises(DataError, match=rf"train/00000: {reason}"):
        data.load(segmented(tmp_path, [mask]))


def test_mask_beside_a_rotated_image_is_refused(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    with pytest.raises(DataError, match="which way up its mask is"):
        data.load(segmented(tmp_path, [np.zeros((8, 8), dtype=np.uint8)], exif=exif))


# --- shapes ---------------------------------------------------------------------------------------------------------


def test_shapes_truth_is_where_the_picture_is():
    """Shape, background and watermark share out the pixels; colour is seen on the shape and nowhere else."""
    found = data.load("shapes:watermark=0.5,n=20")
    batch = found.train.whole(plain(32))
    truth = found.ground_truth(batch.image_id, plain(32))
    assert tuple(truth) == CONCEPTS
    assert truth["shape"].shape == (120, 32, 32)
    assert torch.all(truth["shape"].int() + truth["background"].int() + truth["watermark"].int() == 1)
    assert torch.all(truth["texture"] <= truth["shape"])
    colourful = batch.x.amax(1) - batch.x.amin(1)
    assert colourful[truth["background"]].quantile(0.75) < 0.01  # only a shape's soft edge colours the background
    assert colourful[truth["shape"]].quantile(0.1) > 0.15
    assert batch.x.amin(1)[truth["watermark"]].min() > 0.8
    for k, image in enumerate(batch.x):
        plain_part = image[:, truth["shape"][k] & ~truth["texture"][k]].median(1).values
        assert plain_part.sum() > image[:, truth["texture"][k]].median(1).values.sum()


def test_shapes_facts_match_the_masks():
    found = data.load("shapes:n=20")
    truth = found.ground_truth(found.test.image_ids, plain(32))
    for fact, shape, target in zip(found.facts(found.test.image_ids), truth["shape"], found.test.targets, strict=True):
        assert fact["shape"] == SHAPES[int(target)]
        down, right = shape.nonzero().double().T + 0.5
        assert torch.hypot(down - fact["y"], right - fact["x"]).max() <= fact["radius"] + 0.01
        assert shape.sum() > 0.25 * fact["radius"] ** 2
        assert not fact["watermark"]


def test_shapes_watermark_goes_with_one_class_and_changes_nothing_else():
    marked, bare = data.load("shapes:watermark=0.9,n=200"), data.load("shapes")
    facts = marked.facts(marked.train.image_ids)
    share = [np.mean([f["watermark"] for f in facts if f["shape"] == shape]) for shape in SHAPES]
    assert share[0] == pytest.approx(0.9, abs=0.06)
    assert np.mean(share[1:]) == pytest.approx(0.1, abs=0.03)
    ids = marked.train.image_ids[:60]
    truth = marked.ground_truth(ids, plain(32))["watermark"]
    a, b = (d.train.subset(range(60)).whole(plain(32)).x for d in (marked, bare))
    assert torch.equal((a != b).any(1) & ~truth, torch.zeros_like(truth))
    assert truth.any()
    perfect = data.load("shapes:watermark,n=8")
    assert all(f["watermark"] == (f["shape"] == "circle") for f in perfect.facts(perfect.train.image_ids))


def test_shapes_class_is_told_by_nothing_but_the_shape():
    found = data.load("shapes")
    facts = found.facts(found.train.image_ids)
    for shape in SHAPES:
        mine = [f for f in facts if f["shape"] == shape]
        assert len({f["colour"] for f in mine}) == 6
        assert len({f["texture"] for f in mine}) == 3
        assert np.mean([f["x"] for f in mine]) == pytest.approx(16, abs=1)


def test_shapes_images_do_not_depend_on_their_number():
    few, many = data.load("shapes:n=4").train, data.load("shapes:n=8").train
    assert torch.equal(few.whole(plain(32)).x, many.subset(range(24)).whole(plain(32)).x)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("shapes:watermrk=1", "did you mean 'watermark'"),
        ("shapes:size=8", "at least 16, got 8"),
        ("shapes:n=2", "at least 4, got 2"),
        ("shapes:watermark=0.2", r"in \[0.5, 1\], got 0.2"),
        ("shapes:size=big", "must be a number, got 'big'"),
        ("shapes:size=" + "9" * 4000, "must be a number, got 4000 characters"),
        ("shapes:size=100000000", "at most 8 are kept in memory"),
        ("shapes:n=999999999", "size=32 and n=999999999 make 21,458 GiB"),
        ("digits:3", "digits takes no options, got '3'"),
    ],
)
def test_shapes_refuses_bad_options(spec, message):
    with pytest.raises(UsageError, match=message):
        data.load(spec)


def test_data_without_masks_say_how_to_give_some(digit_data):
    with pytest.raises(UsageError, match=r"digits has no masks .* folder masks .*, into a column .* `masks=FOLDER`"):
        digit_data.ground_truth(digit_data.test.image_ids[:1], plain(8))
    with pytest.raises(UsageError, match="no facts"):
        digit_data.facts(digit_data.test.image_ids[:1])
    with pytest.raises(UsageError, match="has no image 'digits/00001'"):
        data.load("shapes:n=4").facts(["digits/00001"])


# --- specs, classes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "digit",
            "unknown data 'digit', and no such folder: did you mean 'digits'. Known: digits, shapes, torchvision",
        ),
        ("/nowhere/at/all", "unknown data '/nowhere/at/all', and no such folder: Known"),
        ("torchvision:CIFAR1", "did you mean 'CIFAR10'"),
    ],
)
def test_unknown_spec_names_the_nearest(spec, message):
    with pytest.raises(UsageError, match=message.replace(". Known", r"\? Known")):
        data.load(spec)


def test_names_are_loadable_specs():
    known = data.names()
    assert {"digits", "shapes", "torchvision:CIFAR10"} <= set(known)
    assert all(known.values())


def test_class_map_renumbers_targets_and_names_together(tmp_path):
    root = folder(tmp_path, classes=("a", "b", "c"))
    before, after = data.load(root), data.load(root, class_map={"a": 2, "b": 0, "c": 1})
    assert after.class_names == after.train.class_names == ("b", "c", "a")
    named = [[d.class_names[t] for t in d.train.targets] for d in (before, after)]
    assert named[0] == named[1]
    assert after.train.targets.tolist() == [2] * 4 + [0] * 4 + [1] * 4


@pytest.mark.parametrize(
    ("class_map", "words"),
    [
        ({"cat": 0}, "its own number"),
        ({"cat": 0, "dog": 0}, "its own number"),
        ({"cat": 0, "dog": -1}, "its own number"),
        ({"cat": 0, "cow": 1}, "has 'cow', which is no class of the data"),
    ],
)
def test_class_map_must_be_one_to_one(tmp_path, class_map, words):
    with pytest.raises(DataError, match=words):
        data.load(folder(tmp_path), class_map=class_map)


def test_only_some_classes_are_numbered_as_asked(tmp_path):
    whole, some = (data.load(folder(tmp_path, classes=("a", "b", "c")), only=only) for only in (None, ["c", "a"]))
    assert some.class_names == some.train.class_names == some.test.class_names == ("c", "a")
    named = {
        split.image_ids[i]: split.class_names[split.targets[i]] for split in (whole.train,) for i in range(len(split))
    }
    expected = {image: name for image, name in named.items() if name != "b"}
    assert {i: some.class_names[t] for i, t in zip(some.train.image_ids, some.train.targets, strict=True)} == expected
    assert some.sha256 != whole.sha256 != whole.only(["a", "c"]).sha256 != some.sha256
    assert some.notes[-1].endswith("2 of the 3 classes of " + whole.name + ": c, a")


def test_notes_of_some_classes_count_these(digit_data):
    some = data.load("digits", only=["0", "1"])
    held_out = f"digits has no test split: 20% of each class held out by seed 0, {len(some.test)} images"
    assert held_out in some.notes
    assert len(some.test) < 100 < len(digit_data.test)
    assert some.notes == digit_data.only(["0", "1"]).notes
    again = some.only(["1", "0"])
    assert [note for note in again.notes if "held out" in note] == [held_out]


def test_no_other_note_is_taken_for_one_by_how_it_ends(digit_data):
    alike = ("somebody's images are greyscale: repeated where a model wants three channels", "no class, 359 images")
    noted = digit_data.noting(*alike)
    (grey,) = set(noted.notes) - set(noted.read_in(1).notes)
    assert grey.endswith("greyscale: repeated where a model wants three channels")
    assert grey not in alike
    assert noted.read_in(3).notes == noted.notes
    assert set(alike) < set(noted.only(["0", "1"]).notes)


def test_that_grey_is_repeated_is_said_where_it_is(digit_data):
    repeated = "1797 image(s) of digits: greyscale: repeated where a model wants three channels"
    assert repeated in digit_data.read_in(3).notes
    assert [note for note in digit_data.notes if note != repeated] == list(digit_data.read_in(1).notes)


@pytest.mark.parametrize(
    ("only", "message"),
    [(["cat", "cow"], "no class 'cow'"), (["cat", "cat"], "different classes"), (["dog"], "at least two")],
)
def test_only_names_classes_that_there_are(tmp_path, only, message):
    with pytest.raises(UsageError, match=message):
        data.load(folder(tmp_path), only=only)


def test_only_and_class_map_do_not_go_together(tmp_path):
    with pytest.raises(UsageError, match="choose one"):
        data.load(folder(tmp_path), only=["cat", "dog"], class_map={"cat": 1, "dog": 0})


def test_a_folder_may_be_called_memory(tmp_path, monkeypatch):
    folder(tmp_path / "memory")
    monkeypatch.chdir(tmp_path)
    assert data.load("memory").class_names == ("cat", "dog")


def test_check_classes():
    data.check_classes(None, ("cat", "dog"), 2)
    data.check_classes(("Cat", " dog"), ("cat", "dog"), 2)
    data.check_classes(("n01", "n02"), ("cat", "dog"), 2)
    data.check_classes(("Cat", "cat"), ("Cat", "cat"), 2)
    with pytest.raises(DataError, match="'Cat' is number 1 of the model and 0 of the data"):
        data.check_classes(("cat", "Cat"), ("Cat", "cat"), 2)
    with pytest.raises(ModelError, match="the model has 10 classes and the data 2") as caught:
        data.check_classes(None, ("cat", "dog"), 10)
    assert caught.value.exit_code == 4
    with pytest.raises(DataError, match="'cat' is number 1 of the model and 0 of the data") as order:
        data.check_classes(("dog", "cat"), ("cat", "dog"), 2)
    assert order.value.exit_code == 3


# --- torchvision ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "n_labels"), [("CIFAR10", 1), ("CIFAR100", 2)])
def test_cifar_archive_is_read_without_unpickling(tmp_path, name, n_labels):
    """Archives in the authors' layout: label bytes, then the red, green and blue plane of each image."""
    _, inside, train, test, names, _ = downloads._CIFAR[name]
    images = noise(1, 2, 32, 32, 3)

    def records(label: int) -> bytes:
        labels = [bytes([9] * (n_labels - 1) + [label + i]) for i in range(2)]
        return b"".join(k + image.transpose(2, 0, 1).tobytes() for k, image in zip(labels, images, strict=True))

    members = {**{part: records(0) for part in train}, test: records(1), names: b"ant\nbee\ncow\n\n"}
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        for member, content in members.items():
            info = tarfile.TarInfo(f"{inside}/{member}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    found = downloads.cifar_archive(name, tmp_path / "a.tar.gz")
    source, targets = found.splits["train"]
    assert found.class_names == ("ant", "bee", "cow")
    assert targets.tolist() == [0, 1] * len(train)
    assert found.splits["test"][1].tolist() == [1, 2]
    np.testing.assert_array_equal(np.asarray(source.image(1)), images[1])


@pytest.mark.parametrize("name", ["CIFAR10", "MNIST", "EuroSAT"])
def test_download_without_a_network_is_one_sentence(tmp_path, monkeypatch, name):
    def offline(*args, **kwargs):
        raise OSError("Network is unreachable")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", offline)
    with pytest.raises(DataError, match=rf"torchvision:{name} is not in .* and cannot be downloaded .*: connect"):
        data.load(f"torchvision:{name}")


# --- real data ------------------------------------------------------------------------------------------------------


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("name", "train", "test", "first", "n_classes"),
    [
        ("cifar10", 50_000, 10_000, "airplane", 10),
        ("tiny-imagenet-20", 10_000, 1_000, "basketball", 20),
        ("chest-xray", 899, 225, "Covid-19", 3),
        ("camvid", 367, 233, "sky", 11),
    ],
)
def test_real_data(real_data, name, train, test, first, n_classes):
    found = data.load(real_data / name)
    assert (len(found.train), len(found.test)) == (train, test)
    assert (found.class_names[0], found.n_classes) == (first, n_classes)
    assert found.bad == ()
    batch = found.test.limit(40).whole(plain(32), workers=2)
    assert batch.x.isfinite().all()
    assert 0.05 < batch.x.std() < 0.5
    assert (found.ignore_index, batch.target.ndim) == ((11, 3) if name == "camvid" else (None, 1))


@pytest.mark.realdata
def test_real_jpegs_decode_as_pillow_does(real_data):
    found = data.load(real_data / "chest-xray")
    table = pq.read_table(real_data / "chest-xray" / "test.parquet")
    batch = found.test.subset([3, 8]).whole(plain(224, 1))
    for row, x, target in zip((3, 8), batch.x, batch.target, strict=True):
        image = np.asarray(Image.open(io.BytesIO(table["image"][row].as_py()["bytes"])))
        np.testing.assert_array_equal(x[0].numpy(), image.astype(np.float32) / 255)
        assert int(target) == table["label"][row].as_py()


@pytest.mark.parametrize(("bits", "most"), [(12, 4095), (10, 900), (14, 4096), (8, 255), (16, 20000)])
def test_grey_of_fewer_than_16_bits_is_read_as_so_many(tmp_path, bits, most):
    for k, name in enumerate(("cat", "dog")):
        for i in range(3):
            pixels = np.linspace(0, most if (k, i) == (1, 2) else most // 3, 64).astype(np.uint16).reshape(8, 8)
            write(tmp_path / name / f"{i}.png", encode(np.roll(pixels, i + 3 * k)))
    found = data.load(tmp_path)
    x = torch.cat([split.whole(plain(8, 1)).x for split in (found.train, found.test)])
    assert float(x.max()) == pytest.approx(most / (2**bits - 1), abs=1e-6)
    assert float(x.flatten(1).amax(1).min()) == pytest.approx(most // 3 / (2**bits - 1), abs=1e-6), "all on one scale"
    said = [said for said in found.warnings if "16-bit" in said]
    assert [f"holds a value above {2**bits - 1:,}" in one for one in said] == ([] if bits == 16 else [True])
    assert any(note.startswith("6 image(s) of ") and f"divided by {2**bits - 1}" in note for note in found.notes)


def test_a_hidden_folder_is_no_near_name_and_a_name_of_ours_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (".git", "digit2", "photos"):
        (tmp_path / name).mkdir()
    with pytest.raises(UsageError, match=r"unknown data 'digit', and no such folder: did you mean 'digits'"):
        data.load("digit")
    with pytest.raises(UsageError, match=r"no such folder: did you mean photos\?"):
        data.load("photo")
    with pytest.raises(UsageError) as refused:
        data.load("gitt")
    assert ".git" not in str(refused.value)


@pytest.mark.parametrize("kind", ["folders", "parquet"])
def test_a_split_that_is_given_alone_is_told_of_those_beside_it_before_images_are_read(tmp_path, kind, monkeypatch):
    rows = [{"image": encode(Image.fromarray(np.full((8, 8), 20 * k, np.uint8))), "label": k % 2} for k in range(8)]
    for split in ("train", "test"):
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{split}.parquet")
        for k, row in enumerate(rows if kind == "folders" else ()):
            (tmp_path / split / str(row["label"])).mkdir(parents=True, exist_ok=True)
            (tmp_path / split / str(row["label"]) / f"{k}.png").write_bytes(row["image"])
    alone, other = ("train", "test") if kind == "folders" else ("train.parquet", "test.parquet")
    words = f"{alone} is read alone, and not {other} beside it: give the folder .*, `data='{tmp_path}'`"
    with pytest.warns(UserWarning, match=words):
        found = data.load(tmp_path / alone)
    assert any(re.match(words, told) for told in found.warnings)
    monkeypatch.setattr(data, "_read", lambda *given: (_ for _ in ()).throw(DataError("images are read")))
    with pytest.warns(UserWarning, match=words), pytest.raises(DataError, match="images are read"):
        data.load(tmp_path / alone)
    monkeypatch.undo()
    with warnings.catch_warnings(record=True) as caught:
        data.load(tmp_path)
    assert not [warning for warning in caught if "read alone" in str(warning.message)]
