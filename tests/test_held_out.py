"""Held out, or not: groups that stay together, and weights that may have seen what is measured on."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import sukashi
from pictures import encode, noise, write
from sukashi import data, models
from sukashi.core.errors import DataError, UsageError
from sukashi.data import grouping

NET = {"model": "sukashi:digits_cnn", "width": 8, "data": "digits"}
SEEN = "may have been trained on: accuracy can flatter"
PATIENT = r"p(\d+)_"
pytestmark = pytest.mark.filterwarnings("ignore:.*has random weights")


def patients(root: Path, *, classes="ab", n=10, each=3, split="", shift=0) -> Path:
    """`each` images of each of n patients in each class, told by their names."""
    for k, name in enumerate(classes):
        for p in range(n):
            for i in range(each):
                pixels = noise(10_000 * shift + 1000 * k + 10 * p + i)
                write(root / split / name / f"p{p + 100 * k + shift}_{i}.png", encode(pixels))
    return root


def of(split):
    return set(split.groups)


def test_a_patient_is_never_on_both_sides(tmp_path):
    root = patients(tmp_path)
    alone, found = data.load(root), data.load(root, groups=PATIENT)
    torn = {Path(i).name.split("_")[0] for i in alone.train.image_ids}
    assert torn & {Path(i).name.split("_")[0] for i in alone.test.image_ids}, "images by themselves tear patients apart"
    assert not of(found.train) & of(found.test)
    assert found.test.counts.tolist() == [6, 6]
    assert (
        f"{root.name} has no test split: 20% of each class held out by seed 0 in whole groups (4 of them), 12 images"
        in found.notes
    )
    assert found.sha256 != alone.sha256
    train, validation = found.train.validation(0.25)
    assert not of(train) & of(validation)
    assert validation.counts.tolist() == [6, 6]


def test_names_that_number_images_of_one_are_noticed(tmp_path):
    alone = data.load(patients(tmp_path / "alone"))
    said = "names such as 'p0_0.png' look like several images of one patient or scene: 60 of 60 images are of 20, and "
    remedy = f"`groups={grouping.GROUPS!r}` keeps them together where images are held out"
    assert alone.warnings == (f"{said}test images are held out one by one: accuracy can flatter; if so, {remedy}",)
    kept = data.load(tmp_path / "alone", groups=grouping.GROUPS)
    assert not of(kept.train) & of(kept.test)
    assert len(of(kept.train) | of(kept.test)) == 20
    assert kept.warnings == ()

    split = patients(patients(tmp_path / "split", split="train"), split="test", shift=5)
    (torn,) = (warning for warning in data.load(split).warnings if "look like" in warning)
    assert (
        "120 images are of 30, and 10 of these are in train (30 images) and in test (30 images): accuracy can" in torn
    )
    apart = data.load(patients(patients(tmp_path / "apart", split="train"), split="test", shift=50))
    assert not [warning for warning in apart.warnings if "look like" in warning]
    (noted,) = (note for note in apart.notes if "look like" in note)
    assert "accuracy can flatter" not in noted
    assert noted.endswith(remedy)


def test_names_that_say_nothing_of_patients_are_not_doubted(tmp_path):
    for k, name in enumerate(("n01_", "n02_")):
        for i in range(30):  # the number before the last is a class
            write(tmp_path / "classes" / name / f"{name}{i}.png", encode(noise(100 * k + i)))
            write(tmp_path / "counted" / name / f"img_{name[:3]}{i}.png", encode(noise(100 * k + i)))
    for place in ("classes", "counted"):
        found = data.load(tmp_path / place)
        assert not [said for said in (*found.warnings, *found.notes) if "look like" in said]


def test_a_smaller_part_of_whole_groups_is_in_a_larger_one_and_others_change_nothing(tmp_path):
    rng = np.random.default_rng(0)
    for k, name in enumerate("ab"):
        for p in range(30):
            for i in range(rng.integers(1, 9)):
                write(tmp_path / name / f"p{p}_{k}{i}.png", encode(rng.integers(0, 256, (8, 8)).astype(np.uint8)))
    train = data.load(tmp_path, groups=PATIENT).train
    parts = [set(train.validation(fraction)[1].image_ids) for fraction in (0.0, 0.05, 0.1, 0.2, 0.4)]
    assert all(small <= large for small, large in itertools.pairwise(parts))
    assert [len(part) / len(train) for part in parts] == pytest.approx([0, 0.05, 0.1, 0.2, 0.4], abs=0.1)
    order = np.random.default_rng(1).permutation(len(train))
    assert set(train.subset(order).validation(0.2)[1].image_ids) == parts[3]


def test_a_group_of_a_column(tmp_path):
    for i in range(24):
        write(tmp_path / "csv" / f"{i}.png", encode(noise(i)))
    rows = [f"{i}.png,{'ab'[i % 2]},{i // 4}" for i in range(24)]
    (tmp_path / "csv" / "labels.csv").write_text("\n".join(["file,label,patient", *rows]))
    listed = data.load(tmp_path / "csv", groups="patient")
    table = pa.table(
        {
            "image": [encode(noise(i)) for i in range(24)],
            "label": [i % 2 for i in range(24)],
            "patient": [i // 4 for i in range(24)],
        }
    )
    (tmp_path / "parquet").mkdir()
    pq.write_table(table, tmp_path / "parquet" / "train.parquet")
    stored = data.load(tmp_path / "parquet", groups="patient")
    for found in (listed, stored):
        assert of(found.train) | of(found.test) == set("012345")
        assert not of(found.train) & of(found.test)
    assert of(listed.test) == of(stored.test)
    by_name = data.load(tmp_path / "csv", groups=r"(\d)\.png")
    assert of(by_name.train) | of(by_name.test) == set("0123456789")


@pytest.mark.parametrize(
    ("groups", "error", "said"),
    [
        (r"p(10\d)_", DataError, r"15 of 30 images of \w+ have no group by .* \(a/p0_0.png, .*, \.\.\.\): every image"),
        ("patient", UsageError, "`groups='patient'` is no column of .* must have one group in brackets, this has 0"),
        (r"(p)(\d)", UsageError, "this has 2: give the name of a column"),
        ("p(", UsageError, "no column of .* and no pattern"),
        (r"(p)\d+_", DataError, "class 'a' in .* are of 1 group, and holding whole groups out leaves none"),
    ],
)
def test_groups_that_cannot_be_had_are_refused(tmp_path, groups, error, said):
    patients(tmp_path, n=5)
    with pytest.raises(error, match=said):
        data.load(tmp_path, groups=groups)


def test_images_without_a_value_in_the_column_are_refused(tmp_path):
    table = {"image": [encode(noise(i)) for i in range(8)], "label": [i % 2 for i in range(8)]}
    pq.write_table(pa.table(table | {"patient": ["x", None] * 4}), tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"4 of 8 images of \w+ have no group by 'patient' \(train/00001"):
        data.load(tmp_path, groups="patient")


def test_patients_that_the_data_have_on_both_sides_are_counted(tmp_path):
    patients(tmp_path, split="train", n=4)
    patients(tmp_path, split="test", n=4, shift=2)
    found = data.load(tmp_path, groups=PATIENT)
    (said,) = (said for said in found.warnings if "groups" in said)
    assert said == ("4 groups (102, 103, 2, ...) are in train (12 images) and in test (12): accuracy can flatter")
    (noticed,) = data.load(tmp_path).warnings
    assert "4 of these are in train (12 images) and in test (12 images): accuracy can flatter" in noticed


# What weights have seen.


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "trained"
    sukashi.train(**NET, epochs=1, test_images=20, out=out)
    return out


def warned(result, what=SEEN):
    return [said for said in result.warnings if what in said]


def test_a_cut_of_what_was_trained_here_on_the_same_images_needs_no_word(trained, tmp_path):
    cut = {"data": "digits", "criterion": "magnitude", "ratio": 0.5, "test_images": 20, "calibration": 2}
    result = sukashi.prune(trained, **cut, out=tmp_path / "half")
    assert not warned(result)
    assert any("held out by seed 0" in note for note in result.notes)
    assert not warned(sukashi.prune(tmp_path / "half", **cut, out=tmp_path / "quarter"))
    assert not warned(sukashi.prune(trained, **cut, only=list("0123456789"), out=tmp_path / "only"))
    recipe = json.loads((tmp_path / "half" / "recipe.json").read_bytes())
    assert recipe["trained_on"] == [{"splits": data.load("digits").splits_sha256, "validation": 0.1}]


def test_the_file_of_a_saved_folder_is_known_as_the_folder_is(trained, tmp_path):
    file = trained / "model.safetensors"
    assert models.load(NET["model"], weights=file).trained_on == models.load(str(trained)).trained_on
    assert not warned(sukashi.check(**NET, weights=file, limit=0, calibration=2))
    cut = sukashi.prune(
        **NET, weights=file, criterion="magnitude", ratio=0.5, test_images=20, calibration=2, out=tmp_path / "half"
    )
    again = models.load(NET["model"], weights=tmp_path / "half" / "model.safetensors")
    assert again.cuts == models.load(cut.out).cuts != ()
    assert not warned(cut)
    with pytest.raises(UsageError, match="is a saved folder and brings its own: leave `width` out"):
        sukashi.check(NET["model"], "digits", width=9, weights=file, limit=0, calibration=2)
    with pytest.raises(UsageError, match=f"{file} is a file of a saved folder: give the folder, {trained}$"):
        models.load(str(file))


@pytest.fixture(scope="module")
def elsewhere(trained, tmp_path_factory):
    """The same weights, of which nobody knows any more what they learned from."""
    return shutil.copy(trained / "model.safetensors", tmp_path_factory.mktemp("elsewhere"))


def test_weights_from_elsewhere_may_have_seen_what_is_held_out(elsewhere, tmp_path):
    found = sukashi.check(**NET, weights=elsewhere, limit=0, calibration=2)
    (said,) = warned(found)
    assert said.startswith("digits has no test split: 20% of each class held out by seed 0, 359 images; ")
    assert not any("held out" in note for note in found.notes)
    assert not warned(sukashi.check(**NET, limit=0, calibration=2)), "random weights have seen nothing"
    assert not warned(sukashi.check(NET["model"], "shapes:n=8,size=16", width=8, n_classes=6, limit=0, calibration=2))


def test_other_images_may_have_been_seen_too(trained, tmp_path):
    digits = data.load("digits").train.limit(40)
    for i, target in enumerate(digits.targets.tolist()):
        write(tmp_path / str(target) / f"{i}.png", encode(noise(i)[..., 0]))
    assert warned(sukashi.check(trained, tmp_path, limit=0, calibration=2))


def test_validation_images_may_have_been_seen_too(trained, elsewhere, tmp_path):
    short = {"data": "digits", "epochs": 1, "test_images": 20}
    seen = "trained on the validation images"
    assert not warned(sukashi.finetune(trained, **short, out=tmp_path / "same"), seen)
    assert warned(sukashi.finetune(trained, **short, validation=0.2, out=tmp_path / "more"), seen)
    tuned = sukashi.finetune(NET["model"], width=8, weights=elsewhere, **short, out=tmp_path / "elsewhere")
    assert warned(tuned, seen)
    assert warned(tuned)
    assert models.load(str(tmp_path / "elsewhere")).trained_on is None
    assert len(models.load(str(tmp_path / "more")).trained_on) == 2


def test_the_weights_of_the_demo_know_what_they_were_trained_on(trained, tmp_path):
    from safetensors.torch import load_file, save_file

    known = json.dumps([[data.load("digits").splits_sha256, 0.0]])
    save_file(load_file(trained / "model.safetensors"), tmp_path / "w.safetensors", {"trained_on": known})
    assert not warned(sukashi.check(**NET, weights=tmp_path / "w.safetensors", limit=0, calibration=2))


class Code:
    """Somebody's code, which draws its weights or loads them."""

    @staticmethod
    def drawn():
        from torch import nn

        from sukashi import Preprocess

        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
        net.preprocess = Preprocess(8, 8, 1, (0.0,), (1.0,))
        return net


drawn = Code.drawn


def kept():
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(5)
        return drawn()


def test_a_network_of_somebodys_code_is_trained_on_by_its_name(tmp_path):
    given = {"criterion": "magnitude", "ratio": 0.5, "test_images": 20, "calibration": 2}
    cut = sukashi.prune("test_held_out:drawn", "digits", **given, out=tmp_path / "cut")
    assert f"model='test_held_out:drawn', data='digits', weights='{cut.out}', " in cut.tuning
    eval(f"{cut.tuning[:-1]}, epochs=1)")
    assert (
        models.load("test_held_out:drawn", weights=f"{cut.out}-tuned").cuts
        == models.load("test_held_out:drawn", weights=cut.out).cuts
    )
    held = sukashi.prune(drawn(), "digits", **given, out=tmp_path / "held")
    assert (held.tuning, "Fine-tune" in held.text()) == ("", False)


def test_code_that_draws_its_weights_has_seen_nothing():
    assert models.load("test_held_out:drawn").trained_on == ()
    assert models.load("test_held_out:kept").trained_on is None
