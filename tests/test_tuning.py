"""From names to a saved folder: what is in it, what a second call does, what is refused before anything is written."""

import json
import shutil
import warnings
from dataclasses import asdict
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

import sukashi
from sukashi import models
from sukashi.core import stats
from sukashi.core.errors import ModelError, UsageError
from sukashi.data import Split
from sukashi.experiments.workspace import TRIAL, UNDER_WAY, Record, Workspace
from sukashi.models import saved
from sukashi.training import checkpoint, loop

NET = "sukashi:digits_cnn"
SHORT = {"width": 8, "epochs": 2, "batch_size": 64, "optimizer": "adamw", "test_images": 100}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "trained"
    return sukashi.train(NET, "digits", out=out, **SHORT)


def test_a_trained_folder_is_a_saved_model(trained, digits_split):
    loaded = sukashi.load(trained.out)
    test = digits_split.test.limit(100).whole(loaded.preprocess)
    with torch.no_grad():
        right = loaded.model(test.x).argmax(1) == test.target
    assert trained.accuracy == pytest.approx(float(right.float().mean()))
    assert trained.n_images == 100
    for number, row in enumerate(trained.classes["rows"]):
        own = test.target == number
        found = stats.share(int(right[own].sum()), int(own.sum()))
        assert row["n"] == found.n
        assert row["trained"]["sensitivity"] == pytest.approx(asdict(found))
        assert "fell" not in row, "there was nothing before"
    assert (trained.accuracy_before, trained.weights_removed, trained.zeros_in_masked_layers) == (None, None, None)
    assert (trained.finished, trained.resumed, trained.epochs, trained.epoch) == (False, None, 2, 2)
    recipe = json.loads((Path(trained.out) / "recipe.json").read_bytes())
    assert recipe["provenance"]["epochs"] == 2
    assert recipe["provenance"]["trained"] is True
    assert loaded.class_names == tuple("0123456789")
    page = Path(trained.report).read_text()
    assert "Epoch by epoch" in page
    assert "no validation split" in page
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a saved folder does not count as untrained
        assert sukashi.check(trained.out, "digits", limit=0.0).units == 32


def test_what_is_found_is_in_the_folder_too(trained):
    out = Path(trained.out)
    kept = json.loads((out / "results.json").read_text())
    assert kept == {name: value for name, value in trained.to_json().items() if name not in trained.of_call}
    assert [entry["epoch"] for entry in kept["history"]] == [1, 2]
    assert not {"images_per_second", "waiting"} & {*kept, *kept["history"][0]}, "a clock decides these"
    assert trained.validation["loss"] == kept["history"][1]["val_loss"]
    assert pq.read_table(out / "results.parquet").to_pylist() == trained.table()
    assert [(row["epoch"], row["train_loss"]) for row in trained.table()] == [
        (entry["epoch"], entry["train_loss"]) for entry in kept["history"]
    ]
    record = Record(out)
    assert record.result["history"] == kept["history"]
    for name in ("model.safetensors", "recipe.json"):
        assert record.read(name) == (out / name).read_bytes()
    assert sukashi.results(out).to_json() == trained.to_json()


def test_what_a_clock_says_is_in_the_log(trained):
    (logged,) = Workspace(trained.out).logged("speed")
    assert [entry["epoch"] for entry in logged["epochs"]] == [1, 2]
    assert all(entry["images_per_second"] > 0 and 0 <= entry["waiting"] <= 1 for entry in logged["epochs"])
    # Of equally many images in each epoch: the harmonic mean.
    speeds = [entry["images_per_second"] for entry in logged["epochs"]]
    assert trained.images_per_second == pytest.approx(2 / sum(1 / speed for speed in speeds))
    assert f"images a second      {trained.images_per_second:,.0f}" in trained.text()


def test_the_same_call_again_says_that_it_is_finished(trained, monkeypatch):
    monkeypatch.setattr(loop, "fit", None)
    again = sukashi.train(NET, "digits", out=trained.out, **SHORT)
    assert again.finished
    assert again.model_copy(update={"finished": False}) == trained
    assert f"{trained.out} was finished already: nothing was done" in again.text()
    with pytest.raises(UsageError, match=r"epochs was 2, now 3"):
        sukashi.train(NET, "digits", out=trained.out, **SHORT | {"epochs": 3})


def test_a_finished_folder_holds_nothing_of_the_run_under_way(trained):
    out = Path(trained.out)
    assert not (out / UNDER_WAY).exists()
    (out / UNDER_WAY).mkdir()
    (out / UNDER_WAY / checkpoint.FILE).write_bytes(b"left by a kill")
    assert sukashi.train(NET, "digits", out=out, **SHORT).finished
    assert not (out / UNDER_WAY).exists()


def test_that_another_process_spoke_is_forgotten_when_the_run_is_finished(tmp_path, monkeypatch):
    fit = loop.fit
    monkeypatch.setattr(loop, "fit", lambda *a, out, **k: (fit(*a, out=out, **k), checkpoint.claim(out))[0])
    sukashi.train(NET, "digits", out=tmp_path / "run", **SHORT | {"epochs": 1})
    assert not list((tmp_path / "run").rglob(".said"))


def test_an_interrupted_training_goes_on_and_says_from_where(trained, tmp_path, monkeypatch):
    step = loop._Run._step

    def cutting(run, *given):
        if run.state.step == 25:  # of 41: the first epoch has ended with a checkpoint
            raise KeyboardInterrupt
        step(run, *given)

    monkeypatch.setattr(loop._Run, "_step", cutting)
    with pytest.raises(KeyboardInterrupt):
        sukashi.train(NET, "digits", out=tmp_path / "run", **SHORT)
    assert not (tmp_path / "run" / TRIAL).exists()
    with pytest.raises(UsageError, match="holds no finished network: give the same command again"):
        sukashi.results(tmp_path / "run")
    monkeypatch.setattr(loop._Run, "_step", step)
    found = sukashi.train(NET, "digits", out=tmp_path / "run", **SHORT)
    n_steps = -(-1294 // 64)
    assert found.resumed == n_steps
    assert f"Went on from step {n_steps}" in found.text()
    for name in ("model.safetensors", "trial.json", "results.json"):
        assert (tmp_path / "run" / name).read_bytes() == (Path(trained.out) / name).read_bytes()


def test_a_training_that_diverges_keeps_the_checkpoint_it_speaks_of(tmp_path):
    with pytest.raises(ModelError, match="the last checkpoint is kept"):
        sukashi.train(NET, "digits", out=tmp_path / "run", **SHORT | {"optimizer": "sgd", "lr": 1e18})
    assert checkpoint.facts(tmp_path / "run" / UNDER_WAY / checkpoint.FILE)["step"] == 0


def test_notes_are_about_what_the_network_reads(trained, tmp_path):
    grey = "1797 image(s) of digits: greyscale: repeated where a model wants three channels"
    assert grey not in trained.notes
    colour = sukashi.train(
        "sukashi:cifar_resnet20", "digits", out=tmp_path / "run", size=8, epochs=1, test_images=20, validation=0.0
    )
    assert grey in colour.notes


def test_the_seed_draws_the_weights(trained, tmp_path):
    same = sukashi.train(NET, "digits", out=tmp_path / "same", **SHORT)
    other = sukashi.train(NET, "digits", out=tmp_path / "other", **SHORT, seed=1)
    weights = [models.load(run.out).weights_sha256 for run in (trained, same, other)]
    assert weights[0] == weights[1] != weights[2]


def test_fine_tuning_keeps_the_cut_and_improves_it(trained, tmp_path):
    sukashi.prune(trained.out, "digits", "random", 0.5, out=tmp_path / "cut", round_to=1, calibration=4)
    tuned = sukashi.finetune(
        str(tmp_path / "cut"), "digits", out=tmp_path / "tuned", epochs=2, optimizer="adamw", lr=3e-3
    )
    cut, loaded = sukashi.load(str(tmp_path / "cut")), sukashi.load(tuned.out)
    assert loaded.cuts == cut.cuts
    shapes = [tensor.shape for tensor in loaded.model.state_dict().values()]
    assert shapes == [tensor.shape for tensor in cut.model.state_dict().values()]
    assert tuned.accuracy > tuned.accuracy_before
    assert f"{tuned.accuracy:.1%} (before: {tuned.accuracy_before:.1%})" in tuned.text()


def test_fine_tuning_keeps_the_mask(trained, tmp_path):
    sukashi.prune(trained.out, "digits", "magnitude", 0.5, scope="global", out=tmp_path / "sparse", calibration=4)
    settings = {"epochs": 1, "test_images": 100}
    tuned = sukashi.finetune(str(tmp_path / "sparse"), "digits", out=tmp_path / "tuned", **settings)
    assert tuned.weights_removed == tuned.zeros_in_masked_layers == pytest.approx(0.5, abs=1e-3)
    assert f"{tuned.zeros_in_masked_layers:.1%} of the masked layers' weights" in tuned.text()
    before, after = (sukashi.load(str(tmp_path / name)).mask.keep for name in ("sparse", "tuned"))
    assert all(torch.equal(before[site], after[site]) for site in before)
    leaky = sukashi.finetune(str(tmp_path / "sparse"), "digits", out=tmp_path / "leaky", enforce_mask=False, **settings)
    assert leaky.weights_removed == tuned.weights_removed
    assert leaky.zeros_in_masked_layers < 0.1
    assert any("the mask was not enforced" in note for note in leaky.notes)
    assert sukashi.load(leaky.out).mask is None


def test_the_test_split_is_read_once_at_the_end(tmp_path, monkeypatch):
    read, fitted = [], []
    batch, fit = Split._batch, loop.fit
    monkeypatch.setattr(
        Split, "_batch", lambda self, *given: read.append((self.name, len(fitted))) or batch(self, *given)
    )
    monkeypatch.setattr(loop, "fit", lambda *a, **k: (fit(*a, **k), fitted.append(1))[0])
    sukashi.train(NET, "digits", out=tmp_path / "run", **SHORT)
    assert {when for name, when in read if name == "test"} == {1}


def test_a_finetune_has_a_tenth_of_the_rate(trained, tmp_path):
    for optimizer, rate in (("sgd", 0.005), ("adamw", 1e-4)):
        out = tmp_path / optimizer
        sukashi.finetune(trained.out, "digits", out=out, epochs=1, optimizer=optimizer)
        assert Workspace(out).identity["lr"] == pytest.approx(rate)


def test_a_size_of_ones_own(tmp_path):
    run = sukashi.train(NET, "shapes:n=60,size=24", out=tmp_path / "run", epochs=1, size=8, width=4, test_images=60)
    assert sukashi.load(run.out).preprocess.height == 8
    with pytest.raises(ModelError, match="patches of 2 x 2 pixels"):
        sukashi.train("sukashi:digits_vit", "digits", out=tmp_path / "other", **SHORT, size=9)
    with pytest.raises(ModelError, match=r"does not run on images of 12 x 12 pixels .*: leave `size` out"):
        sukashi.train(NET, "digits", out=tmp_path / "other", **SHORT, size=12)  # its linear layer knows 8
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lr": -1.0}, r"`lr` must be greater than 0, got -1.0"),
        ({"augment": "mixup"}, r"`augment` must be none, .*, got 'mixup'"),
        ({"epoch": 3}, r"unknown setting 'epoch': did you mean 'epochs'"),
        ({"calibration": 3}, r"unknown setting 'calibration'"),
        ({"wieghts": "x"}, r"unknown setting 'wieghts': did you mean 'weights'"),
        ({"optimizer": ["sgd"]}, r"`optimizer` must be sgd or adamw, got \['sgd'\]"),
        ({"epochs": 2, "warmup": 2}, "warmup must be below epochs"),
        ({"memory": -1.0}, "`memory` must be at least 0"),
    ],
)
def test_bad_settings(tmp_path, settings, words):
    with pytest.raises(UsageError, match=words):
        sukashi.train(NET, "digits", out=tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_what_a_folder_is_given_with_and_folders_that_are_not_there(trained, tmp_path):
    out = {"data": "digits", "out": tmp_path / "run"}
    with pytest.raises(UsageError, match=r"brings its own: leave `weights` out$"):
        sukashi.finetune(trained.out, weights="x.safetensors", **out)
    with pytest.raises(UsageError, match=r"brings its own: leave `n_classes` out$"):
        sukashi.finetune(trained.out, n_classes=3, **out)
    with pytest.raises(UsageError, match=r"brings its own: leave `weights_key` out$"):
        sukashi.finetune(trained.out, weights_key="ema", **out)
    with pytest.raises(UsageError, match=r"^no such folder 'runs/nope': "):
        sukashi.finetune("runs/nope", **out)


def test_fine_tuning_starts_from_weights(tmp_path):
    with pytest.raises(UsageError, match="fine-tuning starts from weights"):
        sukashi.finetune(NET, "digits", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_training_and_fine_tuning_from_the_same_weights_are_two_things(trained, tmp_path):
    settings = {"epochs": 1, "lr": 0.01, "test_images": 100}
    sukashi.finetune(trained.out, "digits", out=tmp_path / "run", **settings)
    with pytest.raises(UsageError, match="fine_tuned was true, now false"):
        sukashi.train(trained.out, "digits", out=tmp_path / "run", **settings)


def test_a_model_that_was_not_trained_here_is_left_alone(trained, tmp_path):
    saved.save(tmp_path / "mine", sukashi.load(trained.out), provenance={})
    kept = {path.name: path.read_bytes() for path in (tmp_path / "mine").iterdir()}
    with pytest.raises(UsageError, match=r"is not empty \(model.safetensors\) and holds no experiment"):
        sukashi.train(NET, "digits", out=tmp_path / "mine", **SHORT)
    assert {path.name: path.read_bytes() for path in (tmp_path / "mine").iterdir()} == kept


def test_a_new_head_is_for_the_classes_of_the_data_and_all_else_is_kept(trained, tmp_path):
    few = {"data": "digits", "only": ["3", "5", "8"], "test_images": 30, "epochs": 1}
    unnamed = shutil.copy(Path(trained.out) / "model.safetensors", tmp_path / "unnamed.safetensors")
    with pytest.raises(ModelError, match=r"10 classes and the data 3.*new_head=True"):
        sukashi.finetune(NET, width=8, weights=unnamed, **few, out=tmp_path / "run")
    result = sukashi.finetune(trained.out, **few, new_head=True, lr=1e-12, weight_decay=0.0, out=tmp_path / "run")
    assert any("the classifier (fc2) is new, for 3 classes in place of 10" in note for note in result.notes)
    recipe = json.loads((tmp_path / "run" / "recipe.json").read_bytes())
    assert recipe["provenance"]["new_head"] is True
    assert recipe["model"]["n_classes"] == 3
    before, after = sukashi.load(trained.out), sukashi.load(str(tmp_path / "run"))
    assert after.class_names == ("3", "5", "8")
    assert after.model.fc2.weight.shape == (3, 16)
    assert torch.allclose(after.model.fc1.weight, before.model.fc1.weight, atol=1e-6)
    assert json.loads((Path(trained.out) / "recipe.json").read_bytes())["provenance"]["new_head"] is False


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": NET}, "has no weights that a new head could be put on"),
        ({"model": "DENSE", "n_classes": 3}, "a new head is for the classes of the data: leave `n_classes` out"),
    ],
)
def test_a_new_head_that_means_nothing(trained, tmp_path, settings, words):
    settings = {**settings, "model": settings["model"].replace("DENSE", trained.out)}
    with pytest.raises(UsageError, match=words):
        sukashi.train(data="digits", new_head=True, out=tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()
