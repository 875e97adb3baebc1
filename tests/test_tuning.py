"""From names to a saved folder: what is in it, what a second call does, what is refused before anything is written."""

import json
import warnings
from pathlib import Path

import pytest
import torch

import sukashi
from sukashi import models
from sukashi.core.errors import ModelError, UsageError
from sukashi.data import Split
from sukashi.experiments.check import run as check
from sukashi.experiments.prune.run import prune
from sukashi.models import saved
from sukashi.training import checkpoint, loop

NET = "sukashi:digits_cnn"
SHORT = {"width": 8, "epochs": 2, "batch_size": 64, "optimizer": "adamw", "test_images": 100}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "trained"
    return sukashi.train(NET, "digits", out=out, **SHORT)


def test_a_trained_folder_is_a_saved_model(trained, digits_split):
    loaded = sukashi.load(trained["out"])
    test = digits_split.test.limit(100).whole(loaded.preprocess)
    with torch.no_grad():
        accuracy = (loaded.model(test.x).argmax(1) == test.target).float().mean()
    assert trained["accuracy"] == pytest.approx(float(accuracy))
    assert trained["n_images"] == 100
    assert (trained["finished"], trained["resumed"], trained["epochs"]) == (False, 0, 2)
    recipe = json.loads((Path(trained["out"]) / "recipe.json").read_bytes())
    assert recipe["provenance"]["run"]["training"]["epochs"] == 2
    assert len(recipe["figures"]["history"]) == 2
    assert not list(Path(trained["out"]).glob("checkpoint*"))
    assert loaded.class_names == tuple("0123456789")
    page = Path(trained["report"]).read_text()
    assert "Epoch by epoch" in page
    assert "no validation split" in page
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a saved folder does not count as untrained
        assert check.check(trained["out"], "digits", limit=0.0)["units"] == 32


def test_the_same_call_again_says_that_it_is_finished(trained, monkeypatch):
    monkeypatch.setattr(loop, "fit", None)
    again = sukashi.train(NET, "digits", out=trained["out"], **SHORT)
    assert again["finished"]
    assert {k: v for k, v in again.items() if k not in ("finished", "resumed")} == {
        k: v for k, v in trained.items() if k not in ("finished", "resumed")
    }
    with pytest.raises(UsageError, match=r"training.epochs was 2, now 3"):
        sukashi.train(NET, "digits", out=trained["out"], **SHORT | {"epochs": 3})


def test_a_finished_folder_holds_nothing_of_the_run_under_way(trained):
    out = Path(trained["out"])
    assert checkpoint.claim(out)
    assert (out / ".said").stat().st_mode & 0o777 == 0o644
    (out / checkpoint.FILE).write_bytes(b"left by a kill")
    assert sukashi.train(NET, "digits", out=out, **SHORT)["finished"]
    assert not (out / ".said").exists()
    assert not (out / checkpoint.FILE).exists()


def test_that_another_process_spoke_is_forgotten_when_the_run_is_finished(tmp_path, monkeypatch):
    fit = loop.fit
    monkeypatch.setattr(loop, "fit", lambda *a, out, **k: (fit(*a, out=out, **k), checkpoint.claim(out))[0])
    sukashi.train(NET, "digits", out=tmp_path / "run", **SHORT | {"epochs": 1})
    assert not (tmp_path / "run" / ".said").exists()


def test_notes_are_about_what_the_network_reads(trained, tmp_path):
    grey = "1797 image(s) of digits: greyscale: repeated where a model wants three channels"
    assert grey not in trained["notes"]
    colour = sukashi.train(
        "sukashi:cifar_resnet20", "digits", out=tmp_path / "run", size=8, epochs=1, test_images=20, validation=0.0
    )
    assert grey in colour["notes"]


def test_the_seed_draws_the_weights(trained, tmp_path):
    same = sukashi.train(NET, "digits", out=tmp_path / "same", **SHORT)
    other = sukashi.train(NET, "digits", out=tmp_path / "other", **SHORT, seed=1)
    weights = [models.load(run["out"]).weights_sha256 for run in (trained, same, other)]
    assert weights[0] == weights[1] != weights[2]


def test_fine_tuning_keeps_the_cut_and_improves_it(trained, tmp_path):
    prune(trained["out"], "digits", "random", 0.5, out=tmp_path / "cut", round_to=1, calibration=4)
    tuned = sukashi.finetune(
        str(tmp_path / "cut"), "digits", out=tmp_path / "tuned", epochs=2, optimizer="adamw", lr=3e-3
    )
    cut, loaded = sukashi.load(str(tmp_path / "cut")), sukashi.load(tuned["out"])
    assert loaded.cuts == cut.cuts
    shapes = [tensor.shape for tensor in loaded.model.state_dict().values()]
    assert shapes == [tensor.shape for tensor in cut.model.state_dict().values()]
    assert tuned["accuracy"] > tuned["accuracy_before"]


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
        sukashi.finetune(trained["out"], "digits", out=out, epochs=1, optimizer=optimizer)
        recipe = json.loads((out / "recipe.json").read_bytes())
        assert recipe["provenance"]["run"]["training"]["lr"] == pytest.approx(rate)


def test_a_size_of_ones_own(tmp_path):
    run = sukashi.train(NET, "shapes:n=60,size=24", out=tmp_path / "run", epochs=1, size=8, width=4, test_images=60)
    assert sukashi.load(run["out"]).preprocess.height == 8
    with pytest.raises(ModelError, match="patches of 2 x 2 pixels"):
        sukashi.train("sukashi:digits_vit", "digits", out=tmp_path / "other", **SHORT, size=9)
    with pytest.raises(ModelError, match=r"does not run on images of 12 x 12 pixels .*: leave --size out"):
        sukashi.train(NET, "digits", out=tmp_path / "other", **SHORT, size=12)  # its linear layer knows 8
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lr": -1.0}, r"lr must be greater than 0, got -1.0"),
        ({"augment": "mixup"}, r"augment must be none, .*, got 'mixup'"),
        ({"epoch": 3}, r"unknown setting 'epoch': did you mean 'epochs'"),
        ({"calibration": 3}, r"unknown setting 'calibration'"),
        ({"wieghts": "x"}, r"unknown setting 'wieghts': did you mean 'weights'"),
        ({"optimizer": ["sgd"]}, r"optimizer must be sgd or adamw, got \['sgd'\]"),
        ({"epochs": 2, "warmup": 2}, "warmup must be below epochs"),
        ({"memory": -1.0}, "memory must be at least 0"),
    ],
)
def test_bad_settings(tmp_path, settings, words):
    with pytest.raises(UsageError, match=words):
        sukashi.train(NET, "digits", out=tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_what_a_folder_is_given_with_and_folders_that_are_not_there(trained, tmp_path):
    out = {"data": "digits", "out": tmp_path / "run"}
    with pytest.raises(UsageError, match=r"brings its own weights: leave --weights out$"):
        sukashi.finetune(trained["out"], weights="x.safetensors", **out)
    with pytest.raises(UsageError, match=r"brings its own classes: leave --classes out$"):
        sukashi.finetune(trained["out"], n_classes=10, **out)
    with pytest.raises(UsageError, match=r"^no such folder 'runs/nope': "):
        sukashi.finetune("runs/nope", **out)


def test_fine_tuning_starts_from_weights(tmp_path):
    with pytest.raises(UsageError, match="fine-tuning starts from weights"):
        sukashi.finetune(NET, "digits", out=tmp_path / "run")


def test_a_model_that_was_not_trained_here_is_left_alone(trained, tmp_path):
    saved.save(tmp_path / "mine", sukashi.load(trained["out"]), provenance={}, figures={})
    with pytest.raises(UsageError, match="not trained here"):
        sukashi.train(NET, "digits", out=tmp_path / "mine", **SHORT)
