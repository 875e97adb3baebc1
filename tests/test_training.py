"""The loop against one written by hand; killed and resumed; under masks; what it refuses."""

import collections
import copy
import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from sukashi import models
from sukashi.core.errors import ModelError, ResourceError, UsageError
from sukashi.core.objective import Classification
from sukashi.core.types import Mask, Preprocess
from sukashi.data.augment import derived
from sukashi.models import Loaded
from sukashi.network import sites
from sukashi.training import checkpoint, loop
from sukashi.training.loop import Training, fit


@pytest.fixture(scope="module")
def few(digits_split):
    """Some 200 digits, and no test split that could be looked at."""
    return replace(digits_split, train=digits_split.train.limit(220), test=None)


@pytest.fixture(scope="module")
def start():
    """A small CNN with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return models.load("sukashi:digits_cnn", width=8)


@pytest.fixture(scope="module")
def masked(start):
    """The same with half of the weights of every layer to go."""
    generator = torch.Generator().manual_seed(1)  # 0 has drawn the weights: their signs would decide
    found = sites.weights(start.model)
    shapes = {site: start.model.get_parameter(f"{site.layer}.weight").shape for site in found}
    return replace(start, mask=Mask({site: torch.rand(shapes[site], generator=generator) < 0.5 for site in found}))


class Dropping(nn.Module):
    """A network whose weights depend on the random numbers of every step."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3))
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        return self.head(self.body(x))


@pytest.fixture(scope="module")
def dropping():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Dropping().eval()
    return Loaded(model, "mynet:dropping", {}, Preprocess(8, 8, 1, (0.0,), (1.0,)), 10, None, models.digest(model))


def state(loaded):
    return loaded.model.state_dict()


# --- what it computes


def test_the_loop_is_the_one_anybody_would_write(start, few, tmp_path):
    given = Training(epochs=3, batch_size=50, lr=0.04, warmup=1, label_smoothing=0.1, weight_decay=1e-3, seed=5)
    found = fit(start, few, given, out=tmp_path / "run")

    train, validation = few.train.validation(0.1)
    images, held = train.whole(start.preprocess), validation.whole(start.preprocess)
    model = copy.deepcopy(start.model).train()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.04, momentum=0.9, weight_decay=1e-3)
    n_batches = -(-len(images) // 50)
    warm = torch.optim.lr_scheduler.LinearLR(optimiser, 1 / n_batches, 1.0, n_batches - 1)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 2 * n_batches)
    for epoch in range(3):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(derived(5, epoch, 0)))
        lost = 0.0
        for step, rows in enumerate(order.tensor_split(n_batches)):
            batch = images[rows]
            loss = F.cross_entropy(model(batch.x), batch.target, label_smoothing=0.1)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            lost += loss.item() * len(rows)
            if epoch == 0 and step < n_batches - 1:
                warm.step()
            elif epoch:
                cosine.step()
        with torch.no_grad():
            logits = model.eval()(held.x)
        entry = found.history[epoch]
        assert entry["train_loss"] == pytest.approx(lost / len(images), rel=1e-4)
        assert entry["val_loss"] == pytest.approx(float(F.cross_entropy(logits, held.target)), rel=1e-4)
        assert entry["val_accuracy"] == pytest.approx(float((logits.argmax(1) == held.target).float().mean()))
        model.train()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(state(found.loaded)[name], tensor, rtol=1e-3, atol=1e-5, msg=name)
    assert found.epoch == 3
    assert not any(torch.equal(state(start)[name], state(found.loaded)[name]) for name in state(start))


def test_the_objective_of_the_images_is_what_is_minimised_and_validated(start, few, tmp_path):
    class Doubled(Classification):
        def loss(self, output, target, *, label_smoothing=0.0):
            assert label_smoothing in (0.0, 0.1)
            return 2 * super().loss(output, target, label_smoothing=label_smoothing)

        def outcome(self, output, target):
            return 1 - super().outcome(output, target)

    given = Training(epochs=1, batch_size=50, lr=1e-9, patience=1, label_smoothing=0.1)
    plain = fit(start, few, given, out=tmp_path / "plain").history[0]
    doubled = replace(few, train=replace(few.train, objective=Doubled()))
    found = fit(start, doubled, given, out=tmp_path / "run").history[0]
    for name in ("train_loss", "val_loss"):
        assert found[name] == pytest.approx(2 * plain[name], rel=1e-6)
    assert found["val_accuracy"] == pytest.approx(1 - plain["val_accuracy"])


def test_every_image_is_met_once_an_epoch(start, few, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(loop._Run, "_step", lambda run, x, target, n, asked: seen.append((x, n)) or _advance(run))
    train = few.train.validation(0.1)[0]
    fit(start, few, Training(epochs=2, batch_size=64), out=tmp_path / "run")
    sizes = [len(x) for x, _ in seen]
    assert sizes == [n for _, n in seen]
    assert max(sizes) - min(sizes) <= 1
    for epoch in range(2):
        met = torch.cat([x for x, _ in seen[epoch * 4 : epoch * 4 + 4]]).flatten(1)
        expected = train.whole(start.preprocess).x.flatten(1)
        assert sorted(met.tolist()) == sorted(expected.tolist())
    assert not torch.equal(seen[0][0], seen[4][0])


def _advance(run):
    run.state.step += 1
    run.state.sums["loss"] = 1.0


def test_the_average_is_kept(start, few, tmp_path):
    given = Training(epochs=2, batch_size=50, ema=0.9)
    found = fit(start, few, given, out=tmp_path / "ema")
    last = fit(start, few, Training(epochs=2, batch_size=50), out=tmp_path / "last")
    kept = safetensors.torch.load_file(tmp_path / "ema" / checkpoint.FILE)
    for name, tensor in state(last.loaded).items():
        assert torch.equal(kept[f"model.{name}"], tensor)  # averaging changes nothing else
        assert torch.equal(kept[f"average.{name}"], state(found.loaded)[name])
    assert not torch.equal(state(found.loaded)["conv1.weight"], state(last.loaded)["conv1.weight"])


class Tied(nn.Module):
    """Two layers that share their weight."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.head(self.two(self.one(x.flatten(1)).relu()).relu())


def test_the_average_follows_by_its_decay_tied_weights_too(few, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Tied().eval()
    tied = Loaded(model, "mynet:tied", {}, Preprocess(8, 8, 1, (0.0,), (1.0,)), 10, None, models.digest(model))
    fit(tied, few, Training(epochs=1, batch_size=500, ema=0.9), out=tmp_path)
    kept = safetensors.torch.load_file(tmp_path / checkpoint.FILE)
    for name, before in state(tied).items():
        # One step, of decay (1 + 0) / (10 + 0).
        expected = 0.1 * before + 0.9 * kept[f"model.{name}"]
        torch.testing.assert_close(kept[f"average.{name}"], expected, rtol=0, atol=1e-6)
        assert not torch.allclose(before, expected, rtol=0, atol=1e-5)


def test_patience_keeps_the_best_epoch_on_validation_images(start, few, tmp_path):
    given = Training(epochs=30, batch_size=32, lr=0.3, weight_decay=0.0, patience=2)
    found = fit(start, few, given, out=tmp_path / "run")
    losses = [entry["val_loss"] for entry in found.history]
    assert found.epoch == losses.index(min(losses)) + 1
    assert len(losses) == found.epoch + 2 < 30
    held = few.train.validation(0.1)[1].whole(start.preprocess)
    with torch.no_grad():
        assert float(F.cross_entropy(found.loaded.model(held.x), held.target)) == pytest.approx(min(losses), rel=1e-5)


# --- masks


def test_a_mask_is_kept_to_the_last_bit(masked, few, tmp_path):
    found = fit(masked, few, Training(epochs=2, batch_size=50, ema=0.9, patience=1), out=tmp_path / "run")
    for site, keep in masked.mask.keep.items():
        weight = found.loaded.model.get_parameter(f"{site.layer}.weight")
        assert not weight[~keep].any()
        assert weight[keep].all()
        assert not torch.equal(weight[keep], masked.model.get_parameter(f"{site.layer}.weight")[keep])
    assert found.loaded.mask is masked.mask
    assert found.zeros == found.removed == pytest.approx(0.5, abs=0.05)


def test_without_enforcement_the_mask_leaks_and_it_is_said(masked, few, tmp_path):
    found = fit(masked, few, Training(epochs=1, batch_size=50, enforce_mask=False), out=tmp_path / "run")
    assert found.loaded.mask is None
    assert found.zeros < 0.1 < found.removed
    assert any("not enforced" in note for note in found.notes)


def test_the_mask_of_another_architecture_is_refused(masked, few, tmp_path):
    other = models.load("sukashi:digits_cnn", width=12)
    with pytest.raises(
        ModelError, match=r"another architecture: layer 'conv1' has shape \(8, 1, 3, 3\).*\(12, 1, 3, 3\)"
    ):
        fit(replace(other, mask=masked.mask), few, Training(epochs=1), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- interrupted and resumed

WHOLE = Training(epochs=3, batch_size=40, augment="affine", ema=0.8, patience=2, optimizer="adamw")


class Cut(Exception):
    pass


@pytest.fixture(scope="module")
def undisturbed(dropping, few, tmp_path_factory):
    return fit(dropping, few, WHOLE, out=tmp_path_factory.mktemp("runs") / "whole")


@pytest.mark.parametrize("stops", [(0,), (1,), (4,), (5,), (3, 11), (2, 4, 5, 9, 14)])
def test_a_run_that_was_cut_ends_in_the_same_bits(dropping, few, undisturbed, tmp_path, monkeypatch, stops):
    step = loop._Run._step
    monkeypatch.setattr(checkpoint, "_PAUSE", 0)  # else there is none for a while after each
    for stop in stops:

        def cutting(run, *given, stop=stop):
            if run.state.step == stop:
                raise Cut
            step(run, *given)

        monkeypatch.setattr(loop._Run, "_step", cutting)
        with pytest.raises(Cut):
            fit(dropping, few, WHOLE, out=tmp_path / "run", seconds=0)
    monkeypatch.setattr(loop._Run, "_step", step)
    found = fit(dropping, few, WHOLE, out=tmp_path / "run", seconds=0)
    assert found.resumed == stops[-1]
    for name, tensor in state(undisturbed.loaded).items():
        assert torch.equal(state(found.loaded)[name], tensor), name
    timed = ("images_per_second", "waiting")
    for one, other in zip(found.history, undisturbed.history, strict=True):
        assert {k: v for k, v in one.items() if k not in timed} == {k: v for k, v in other.items() if k not in timed}


def test_losses_may_wait_as_on_a_gpu(dropping, few, undisturbed, tmp_path, monkeypatch):
    monkeypatch.setitem(loop._SETTLE, "cpu", 3)
    found = fit(dropping, few, WHOLE, out=tmp_path / "run")
    for name, tensor in state(undisturbed.loaded).items():
        assert torch.equal(state(found.loaded)[name], tensor), name
    losses = [entry["train_loss"] for entry in found.history]
    assert losses == [entry["train_loss"] for entry in undisturbed.history]


def test_nothing_but_the_settings_decides(dropping, few, undisturbed, tmp_path):
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    found = fit(dropping, few, WHOLE, out=tmp_path / "run", memory=0, workers=2)
    assert models.digest(found.loaded.model) == models.digest(undisturbed.loaded.model)
    assert torch.equal(torch.random.get_rng_state(), before)
    other = fit(dropping, few, WHOLE.model_copy(update={"seed": 1}), out=tmp_path / "other")
    assert models.digest(other.loaded.model) != models.digest(found.loaded.model)


def test_ctrl_c_finishes_the_step_and_leaves_it(dropping, few, undisturbed, tmp_path, monkeypatch):
    step = loop._Run._step

    def pressing(run, *given):
        if run.state.step == 7:
            os.kill(os.getpid(), signal.SIGINT)
        step(run, *given)

    monkeypatch.setattr(loop._Run, "_step", pressing)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(dropping, few, WHOLE, out=tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is before
    kept = checkpoint.facts(tmp_path / "run" / checkpoint.FILE)["step"]
    assert kept in (8, 9)  # the wish is heard in the step it comes in or the next
    monkeypatch.setattr(loop._Run, "_step", step)
    found = fit(dropping, few, WHOLE, out=tmp_path / "run")
    assert found.resumed == kept
    assert models.digest(found.loaded.model) == models.digest(undisturbed.loaded.model)


SCRIPT = """
import sys, torch
from dataclasses import replace
from pathlib import Path
from sukashi import data, models
from sukashi.training.loop import Training, fit

torch.set_num_threads(1)
digits = data.load("digits")
few = replace(digits, train=digits.train.limit(220), test=None)
torch.manual_seed(0)
start = models.load("sukashi:digits_cnn", width=8)
given = Training(epochs=int(sys.argv[2]), batch_size=25, augment="affine")
fit(start, few, given, out=Path(sys.argv[1]), seconds=0)
"""


@pytest.mark.slow
def test_kill_9_changes_nothing(start, few, tmp_path):
    n_epochs = 40
    child = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path / "run"), str(n_epochs)])
    kept = tmp_path / "run" / checkpoint.FILE
    until = time.monotonic() + 300
    while time.monotonic() < until and not (kept.exists() and checkpoint.facts(kept)["step"] > 3):
        time.sleep(0.01)
    child.kill()
    assert child.wait() == -signal.SIGKILL
    given = Training(epochs=n_epochs, batch_size=25, augment="affine")
    found = fit(start, few, given, out=tmp_path / "run")
    assert 3 < found.resumed < n_epochs * 8
    whole = fit(start, few, given, out=tmp_path / "whole")
    assert models.digest(found.loaded.model) == models.digest(whole.loaded.model)


# --- what it refuses


def test_a_folder_of_another_run_is_refused_by_its_difference(start, few, tmp_path):
    fit(start, few, Training(epochs=1), out=tmp_path / "run")
    with pytest.raises(UsageError, match=r"training.lr was 0.05, now 0.1"):
        fit(start, few, Training(epochs=1, lr=0.1), out=tmp_path / "run")
    other = models.load("sukashi:digits_cnn", width=8)
    with pytest.raises(UsageError, match=r"model.weights was"):
        fit(other, few, Training(epochs=1), out=tmp_path / "run")
    with pytest.raises(UsageError, match="data has other contents"):
        fit(start, replace(few, sha256="0"), Training(epochs=1), out=tmp_path / "run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(UsageError, match=r"thesis.txt"):
        fit(start, few, Training(epochs=1), out=tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_damaged_checkpoint_is_refused(start, few, tmp_path):
    fit(start, few, Training(epochs=1), out=tmp_path / "run")
    kept = tmp_path / "run" / checkpoint.FILE
    kept.write_bytes(kept.read_bytes()[:-100])
    with pytest.raises(ModelError, match="is damaged"):
        fit(start, few, Training(epochs=1), out=tmp_path / "run")


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(start, few, tmp_path):
    with pytest.raises(ModelError, match=r"step \d+.*last checkpoint is kept.*lower `lr`.*another `out`"):
        fit(start, few, Training(epochs=3, lr=1e18), out=tmp_path / "run", seconds=0)
    kept = safetensors.torch.load_file(tmp_path / "run" / checkpoint.FILE)
    assert all(tensor.isfinite().all() for name, tensor in kept.items() if name.startswith("model."))


def test_a_full_disk_keeps_the_last_checkpoint(start, few, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_PAUSE", 0)
    put, n_done = os.replace, 0

    def full(*given):
        nonlocal n_done
        n_done += 1
        if n_done > 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        put(*given)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ResourceError, match="no space left"):
        fit(start, few, Training(epochs=3), out=tmp_path / "run", seconds=0)
    monkeypatch.setattr(os, "replace", put)
    assert not list((tmp_path / "run").glob("*.tmp"))
    found = fit(start, few, Training(epochs=3), out=tmp_path / "run")
    whole = fit(start, few, Training(epochs=3), out=tmp_path / "whole")
    assert found.resumed > 0
    assert models.digest(found.loaded.model) == models.digest(whole.loaded.model)


def test_a_refusal_is_said_whatever_an_earlier_run_has_left(start, few, tmp_path):
    run = tmp_path / "run"
    fit(start, few, Training(epochs=1), out=run)
    assert checkpoint.claim(run)
    assert not checkpoint.claim(run), "once a run"
    with pytest.raises(UsageError, match="another trial"), checkpoint.held(run, {}):
        pass
    assert checkpoint.claim(run)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UsageError, match="is a file"), checkpoint.held(file, {}):
        pass


def test_a_folder_in_use_is_refused(start, few, tmp_path):
    with checkpoint.held(tmp_path / "run", {}), pytest.raises(ResourceError, match="in use"):
        fit(start, few, Training(epochs=1), out=tmp_path / "run")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"epochs": 2, "warmup": 2}, "warmup must be below epochs"),
        ({"patience": 1, "validation": 0.0}, "patience needs validation images"),
    ],
)
def test_settings_that_contradict_each_other(start, few, tmp_path, settings, words):
    with pytest.raises(UsageError, match=words):
        fit(start, few, Training(**settings), out=tmp_path / "run")


class Twofold(nn.Module):
    """A network that gives something else, `made` of its logits, in train mode."""

    def __init__(self, made, batch_norm=False):
        super().__init__()
        self.preprocess = Preprocess(8, 8, 1, (0.0,), (1.0,))
        self.body = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64) if batch_norm else nn.Identity())
        self.head, self.made = nn.Linear(64, 10), made

    def forward(self, x):
        logits = self.head(self.body(x))
        return self.made(logits) if self.training else logits


Outputs = collections.namedtuple("Outputs", ["logits", "aux"])


def _small(logits):
    raise RuntimeError("Kernel size can't be greater than actual input size")


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda logits: (logits, logits), r"gives a tuple in train mode .* 'logits' of a named tuple"),
        (lambda logits: {"logits": logits}, "gives a dict in train mode"),
        (lambda logits: logits[:, :5], r"gives \(2, 5\) in train mode for 2 images, and logits \(2, 10\)"),
        (lambda logits: logits.detach(), "does not require grad"),
        (lambda logits: logits.exp_().exp().mul_(2), "cannot be trained on 2 images"),
        (_small, "cannot be trained on 2 images of 8 x 8 pixels .*Kernel size.*larger ones by `size`"),
    ],
)
def test_a_network_that_fails_in_train_mode_is_refused_before_anything_is_written(made, words, few, tmp_path):
    loaded = models.load(models.hold(Twofold(made)))
    with pytest.raises(ModelError, match=words):
        fit(loaded, few, Training(epochs=1), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_of_a_named_tuple_the_logits_are_trained_and_it_is_noted(few, tmp_path):
    plain, named = (Twofold(made) for made in (lambda logits: logits, lambda logits: Outputs(logits, logits + 1)))
    named.load_state_dict(plain.state_dict())
    one, other = (models.load(models.hold(net)) for net in (plain, named))
    training = Training(epochs=1)
    first, second = (fit(net, few, training, out=tmp_path / f"{net is one}") for net in (one, other))
    assert models.digest(first.loaded.model) == models.digest(second.loaded.model)
    assert not any("auxiliary" in note for note in first.notes)
    assert any("not by its auxiliary outputs" in note for note in second.notes)


@pytest.mark.parametrize(("n_images", "batch_size", "fine"), [(3, 2, False), (4, 1, False), (4, 2, True), (5, 4, True)])
def test_a_batch_of_one_image_is_refused_where_the_network_cannot_take_it(n_images, batch_size, fine, few, tmp_path):
    loaded = models.load(models.hold(Twofold(lambda logits: logits, batch_norm=True)))
    small = replace(few, train=few.train.subset(range(n_images)))
    training = Training(epochs=1, batch_size=batch_size, validation=0)
    if fine:
        assert fit(loaded, small, training, out=tmp_path / "run").epoch == 1
        return
    with pytest.raises(ModelError, match=r"cannot be trained on 1 image of .*another `batch_size`"):
        fit(loaded, small, training, out=tmp_path / "run")


def test_history_without_validation_images(start, few, tmp_path):
    found = fit(start, few, Training(epochs=1, validation=0.0), out=tmp_path / "run")
    assert found.history[0]["val_loss"] is None
    line = json.loads((tmp_path / "run" / checkpoint.HISTORY).read_text())
    assert line == found.history[0]


def test_tensorboard_gets_the_history(start, few, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = fit(start, few, Training(epochs=2), out=tmp_path / "run", tensorboard=tmp_path / "log")
    log = accumulator.EventAccumulator(str(tmp_path / "log")).Reload()
    logged = [(event.step, event.value) for event in log.Scalars("train_loss")]
    assert logged == [(entry["epoch"], pytest.approx(entry["train_loss"])) for entry in found.history]
