"""Two processes against one: BatchNorm over both, the same weights, and a run that one of them leaves.

And experiments under torchrun: all processes go through the same trials, the first one alone writes.
"""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

import sukashi
from sukashi import models
from sukashi.core import progress
from sukashi.core.errors import UsageError
from sukashi.experiments.workspace import UNDER_WAY, Workspace
from sukashi.training import checkpoint, distributed
from sukashi.training.loop import Training, fit

pytestmark = pytest.mark.slow

RUN = """
import os, sys, torch, typer
from dataclasses import replace
from pathlib import Path
from sukashi import data, models
from sukashi.cli.console import working
from sukashi.training import loop as training

torch.set_num_threads(1)
digits = data.load("digits")
few = replace(digits, train=digits.train.limit(150), test=None)
torch.manual_seed(0)
start = models.load("sukashi:digits_cnn", width=8)
out, dies = Path(sys.argv[1]), int(sys.argv[2])
step = training._Run._step

def dying(run, *given):
    if run.state.step == dies and run.processes.rank == 1:
        os.kill(os.getpid(), 9)
    step(run, *given)

training._Run._step = dying
given = training.Training(epochs=2, batch_size=41, augment="affine", lr=0.02)
try:
    with working():
        training.fit(start, few, given, out=out, seconds=0)
except typer.Exit as stopped:
    sys.exit(stopped.exit_code)
"""


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 5), (5, 3, 4, 2)])
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_of_one_process_is_torchs(monkeypatch, shape, affine):
    monkeypatch.setattr(distributed, "_over_all", lambda values: values)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) + 2
    grad = torch.randn(shape, generator=generator)
    found = []
    for norm in (F.batch_norm, distributed._batch_norm):
        own = x.clone().requires_grad_()
        mean, var = torch.zeros(3), torch.ones(3)
        weight, bias = (torch.full((3,), v, requires_grad=True) for v in (1.5, 0.2)) if affine else (None, None)
        out = norm(own, mean, var, weight, bias, True, 0.3, 1e-3)
        out.backward(grad)
        found.append([out, own.grad, mean, var, *([weight.grad, bias.grad] if affine else [])])
    for ours, torchs in zip(*found, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-5)


def test_shares_are_consecutive_and_whole():
    rows = torch.arange(7)
    parts = [distributed.World(torch.device("cpu"), rank, 3).share(rows) for rank in range(3)]
    assert torch.equal(torch.cat(parts), rows)
    assert [len(part) for part in parts] == [3, 2, 2]


def test_restarts_that_are_left(monkeypatch):
    assert not distributed.starts_again()
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    assert distributed.starts_again()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not distributed.starts_again()


def test_one_process_speaks(monkeypatch):
    assert progress.first()
    monkeypatch.setenv("RANK", "1")
    assert not progress.first()


MEET = """
import os, signal, time, torch
from sukashi.training.distributed import from_first, world

attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
for count in range(3):
    with world(torch.device("cpu")) as processes:
        if (count, processes.rank, attempt) == (1, 1, "0"):
            os.kill(os.getpid(), signal.SIGKILL)
        found = processes.total(torch.ones(1))
        assert found == 2, found
        assert processes.first(torch.full((2,), float(processes.rank))).sum() == 0, "what the first one has"
    time.sleep(0.5 * (processes.rank == 0))  # the first one is busy alone, as between the levels of a schedule
    heard = from_first([attempt, count] if processes.rank == 0 else None)
    assert heard == [attempt, count], heard
"""


def torchrun(*arguments):
    """What two processes of torchrun leave and say."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_processes_meet_again_for_the_next_training_and_when_one_was_started_anew(tmp_path):
    script = tmp_path / "meet.py"
    script.write_text(MEET)
    done = torchrun("--max-restarts", "1", str(script))
    assert done.returncode == 0, done.stderr
    assert "-9" in done.stderr, "one was killed"


def two(script, *arguments, timeout=300):
    """Exit codes and stderr of two processes of one script that know each other, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    both = [
        subprocess.Popen(command, env=shared | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    said = [process.communicate(timeout=timeout)[1] for process in both]
    return [process.returncode for process in both], said


def test_two_processes_train_as_one_and_one_goes_on_from_what_they_left(digits_split, tmp_path):
    codes, both = two(RUN, tmp_path / "two", 5)
    said = "".join(both)
    lines = [line for line in said.splitlines() if line.startswith("sukashi: ") and "is gone" in line]
    assert len(lines) == 1, said
    kept = checkpoint.facts(tmp_path / "two" / checkpoint.FILE)["step"]
    assert kept in (4, 5)  # 4 steps are an epoch
    assert f"give the same command again, {tmp_path / 'two'} goes on from step {kept}" in lines[0]
    assert codes == [5, -9]
    left = safetensors.torch.load_file(tmp_path / "two" / checkpoint.FILE)

    few = replace(digits_split, train=digits_split.train.limit(150), test=None)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        start = models.load("sukashi:digits_cnn", width=8)
    given = Training(epochs=2, batch_size=41, augment="affine", lr=0.02)
    one = fit(start, few, given, out=tmp_path / "one")
    both = fit(start, few, given, out=tmp_path / "two")
    assert both.resumed == kept
    assert any(not torch.equal(left[f"model.{name}"], tensor) for name, tensor in start.model.state_dict().items())
    for name, tensor in one.loaded.model.state_dict().items():
        torch.testing.assert_close(both.loaded.model.state_dict()[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


# --- experiments


TRIALS = """
import json, os, sys, time
from pathlib import Path
from sukashi.core.experiment import Trial
from sukashi.experiments.executor import work
from sukashi.experiments.workspace import Workspace
from sukashi.training.distributed import from_first

space, named, second = Workspace(sys.argv[1]), json.loads(sys.argv[2]), os.environ["RANK"] == "1"
order, trials = [], {}

def run(name, needs, together, desk):
    order.append(name)
    for key in needs:
        order.append("reads " + desk.needed(key).read("weights").decode())
    if together:
        from_first(name)  # as in a training, none goes on without the other
    if not second:
        time.sleep(0.5)  # measures and writes, while the other one has nothing more to do with it
        desk.save("weights", name.encode())
    desk.finish({})

for name, needs, together in named:
    needs = tuple(trials[other].key for other in needs)
    trials[name] = Trial(
        {"name": name}, lambda desk, given=(name, needs, together): run(*given, desk), needs=needs, together=together
    )
if not second:
    time.sleep(1)  # the other one looks first
    space.claim("train", {}, list(trials.values()))
work(space, list(trials.values()))
Path(sys.argv[1], "order" + os.environ["RANK"]).write_text(json.dumps(order))
"""


def orders(folder):
    return [json.loads((folder / f"order{rank}").read_text()) for rank in range(2)]


def test_processes_do_the_same_trials_in_the_same_order_and_read_what_is_whole(tmp_path):
    named = [["a", [], True], ["alone", ["a"], False], ["b", ["a", "alone"], True]]
    codes, said = two(TRIALS, tmp_path, json.dumps(named))
    assert codes == [0, 0], said
    first, second = orders(tmp_path)
    assert first == ["a", "alone", "reads a", "b", "reads a", "reads alone"]
    assert second == ["a", "b", "reads a", "reads alone"], "what is not done together the first one does alone"
    assert len(Workspace(tmp_path).records()) == 3
    codes, said = two(TRIALS, tmp_path, json.dumps(named))
    assert codes == [0, 0], said
    assert orders(tmp_path) == [[], []], "all was finished"


OTHER = """
import sys, time
from sukashi.core.experiment import Trial
from sukashi.experiments.workspace import Workspace

a, b, c = (Trial({"name": name}, print) for name in "abc")
space = Workspace(sys.argv[1])
space.claim("train", {}, [a])
with space.lease(a) as desk:
    print("has a", flush=True)
    while not (space.folder / c.folder / "trial.json").exists():
        time.sleep(0.05)
    desk.save("weights", b"a")
    desk.finish({})
"""


def test_what_another_run_has_leased_no_process_does(tmp_path):
    """Only the first one knows of leases: the other would begin the first trial, and wait there for ever."""
    other = subprocess.Popen([sys.executable, "-c", OTHER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "has a\n"
    codes, said = two(TRIALS, tmp_path, json.dumps([["a", [], True], ["b", ["a"], True], ["c", [], True]]))
    assert codes == [0, 0], said
    assert other.wait(60) == 0
    assert orders(tmp_path) == [["c", "b", "reads a"], ["c", "b", "reads a"]]


LEFT = """
import os, sys
from sukashi.cli.console import working
from sukashi.training.distributed import from_first

import typer
try:
    with working():
        assert from_first({"said": 1} if os.environ["RANK"] == "0" else None) == {"said": 1}
        from_first("heard" if os.environ["RANK"] == "0" else None)
        if os.environ["RANK"] == "0":
            import time
            time.sleep(1)
            os.kill(os.getpid(), 9)
        from_first(None)
except typer.Exit as stopped:
    sys.exit(stopped.exit_code)
"""


def test_one_that_waits_for_a_first_process_that_is_gone_ends_too():
    codes, said = two(LEFT, timeout=60)
    assert codes == [-9, 5], said
    assert "Traceback" not in said[1]


def test_jobs_are_no_business_of_torchruns_processes(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="the 2 processes of torchrun train together: leave `jobs` out"):
        sukashi.schedule("sukashi:digits_cnn", "digits", "oneshot", ["random"], [0.5], out=tmp_path / "out", jobs=2)
    assert not (tmp_path / "out").exists()


STUDY = """
data = "digits"
out = "out"
test_images = 100
calibration = 2
epochs = 1
[experiments.levels]
kind = "schedule"
model = "sukashi:digits_cnn"
width = 8
how = "lottery"
criteria = ["magnitude"]
scope = "global"
ratios = RATIOS
seeds = SEEDS
[experiments.half]
kind = "prune"
model = "$OUT/levels/dense/0"
criterion = "drift"
ratio = 0.5
[experiments.tuned]
kind = "finetune"
model = "$OUT/half"
"""


def study(path, ratios, seeds):
    path.write_text(STUDY.replace("RATIOS", ratios).replace("SEEDS", seeds))
    return path


def test_a_study_under_torchrun_is_that_of_one_process(tmp_path):
    """Where one process has made the first levels: seeds and levels beside them start from what is on the disk."""
    whole = sukashi.study(study(tmp_path / "whole.toml", "[0.3, 0.6]", "2"), out=tmp_path / "one")
    sukashi.study(study(tmp_path / "part.toml", "[0.3]", "1"), out=tmp_path / "two")
    done = torchrun("-m", "sukashi", "study", str(tmp_path / "whole.toml"), "--out", str(tmp_path / "two"), "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)  # only one of them speaks
    assert told["experiments"].keys() == whole.experiments.keys() == {"levels", "half", "tuned"}
    assert [row["ratio_asked"] for row in told["experiments"]["levels"]["levels"]] == [0.3, 0.6]
    assert not [path for path in (tmp_path / "two").rglob("*") if path.name in (UNDER_WAY, ".leases", ".said")]
    recipes = sorted(path.parent.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("recipe.json"))
    assert len(recipes) == 2 * 3 + 2
    for place in recipes:
        ours, theirs = (models.load(str(tmp_path / name / place)) for name in ("one", "two"))
        assert theirs.cuts == ours.cuts
        for name, tensor in ours.model.state_dict().items():
            torch.testing.assert_close(theirs.model.state_dict()[name], tensor, rtol=1e-2, atol=1e-4, msg=name)
        if ours.mask is not None:
            assert all(torch.equal(keep, theirs.mask.keep[site]) for site, keep in ours.mask.keep.items())
