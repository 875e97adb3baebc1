"""Two processes against one: BatchNorm over both, the same weights, and a run that one of them leaves."""

import os
import socket
import subprocess
import sys

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from sukashi import models
from sukashi.core import progress
from sukashi.training import checkpoint, distributed
from sukashi.training.loop import Training, fit

RUN = """
import os, sys, torch, typer
from dataclasses import replace
from pathlib import Path
from sukashi import data, models
from sukashi.cli import main as cli
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
    with cli._working():
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
from sukashi.training.distributed import world

for count in range(3):
    with world(torch.device("cpu")) as processes:
        if (count, processes.rank, os.environ["TORCHELASTIC_RESTART_COUNT"]) == (1, 1, "0"):
            os.kill(os.getpid(), signal.SIGKILL)
        found = processes.total(torch.ones(1))
        assert found == 2, found
        assert processes.first(torch.full((2,), float(processes.rank))).sum() == 0, "what the first one has"
    time.sleep(0.5 * (processes.rank == 0))  # the first one is busy alone, as between the levels of a schedule
"""


def test_processes_meet_again_for_the_next_training_and_when_one_was_started_anew(tmp_path):
    script = tmp_path / "meet.py"
    script.write_text(MEET)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "1", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "-9" in done.stderr, "one was killed"


def processes(out, dies):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-c", RUN, str(out), str(dies)]
    two = [
        subprocess.Popen(command, env=shared | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    said = [process.communicate(timeout=300)[1] for process in two]
    return [process.returncode for process in two], "".join(said)


def test_two_processes_train_as_one_and_one_goes_on_from_what_they_left(digits_split, tmp_path):
    from dataclasses import replace

    codes, said = processes(tmp_path / "two", 5)
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
