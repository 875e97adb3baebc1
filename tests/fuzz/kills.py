"""Real commands of every kind, killed at random with SIGKILL and given again, end in the bytes of undisturbed ones.

    python tests/fuzz/kills.py N [--seed S]      # N kills in all, and what differed

Each kind is run undisturbed first, which says how long it takes. Then it is killed after a random part of that time,
again and again until it ends by itself, and its folder is compared with the undisturbed one: every file but the logs
and the pages, which tell times.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import torch

from sukashi.cli import main
from sukashi.experiments import functions  # noqa: F401 what a command imports at last, before it is forked
from sukashi.measures import cost

NET, DATA = "sukashi:digits_cnn", ["--data", "digits", "--test-images", "60"]
CALIBRATED = ["--width", "8", *DATA, "--calibration", "4"]
STUDY = """
out = "nowhere"
data = "digits"
test_images = 60
[experiments.dense]
kind = "train"
model = "sukashi:digits_cnn"
width = 8
epochs = 2
[experiments.cut]
kind = "prune"
model = "$OUT/dense"
criterion = "taylor"
ratio = 0.5
round_to = 1
calibration = 4
[experiments.audited]
kind = "audit"
models = ["$OUT/dense", "$OUT/cut"]
attributions = ["saliency"]
measures = ["gini", "ssim"]
population = "all"
"""
COMMANDS = {
    "train": ["train", NET, "--width", "8", *DATA, "--epochs", "6", "--augment", "affine"],
    "prune": ["prune", NET, *CALIBRATED, "--criterion", "drift", "--ratio", "0.5"],
    "finetune": ["finetune", "made/prune", *DATA, "--epochs", "4"],
    "compare": [
        "compare",
        NET,
        *CALIBRATED,
        "--criteria",
        "magnitude,amp,drift",
        "--ratios",
        "0.3,0.6",
        "--seeds",
        "2",
    ],
    "compare, 2 jobs": [
        *("compare", NET, *CALIBRATED, "--criteria", "magnitude,amp", "--ratios", "0.3,0.6", "--seeds", "2"),
        *("--jobs", "2"),
    ],
    "schedule": [
        *("schedule", NET, "iterative", *CALIBRATED, "--criteria", "magnitude,taylor", "--ratios", "0.3,0.6"),
        *("--epochs", "1", "--seeds", "1", "--round-to", "1"),
    ],
    "audit": [
        *("audit", "made/train", "made/prune", *DATA, "--population", "all", "--attributions", "saliency,lrp"),
        *("--measures", "gini,ssim,deletion", "--set", "deletion.step=16"),
    ],
    "study": ["study", "study.toml"],
}


def run(command: list[str], out: str, home: Path) -> None:
    """The command line in this very process, which leads a group of what it starts."""
    os.setsid()
    os.chdir(home)
    with open(home / "said", "w") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    sys.argv = ["sukashi", *command, "--out", out]
    main.main()


def start(command: list[str], out: str, home: Path) -> multiprocessing.Process:
    """A command at work; a fork, so that the seconds of importing torch are not those in which it is killed."""
    process = multiprocessing.get_context("fork").Process(target=run, args=(command, out, home))
    process.start()
    return process


def ended(process: multiprocessing.Process, home: Path) -> None:
    process.join()
    if process.exitcode:
        raise SystemExit(f"ended with {process.exitcode}: {(home / 'said').read_text()}")


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("log.jsonl", "report.html")
    }


def killed(command: list[str], home: Path, seconds: float, draw: random.Random, most: int) -> tuple[int, int]:
    """Kill a command until it ends by itself or was killed `most` times, and then let it end.

    Returns how many kills there were and how many of them left a folder behind, begun and not finished.
    """
    kills = amidst = 0
    while kills < most:
        process = start(command, "out", home)
        process.join(draw.uniform(0.05, 1.0) * seconds)
        if not process.is_alive():
            break
        with suppress(ProcessLookupError):  # it has just ended, or does not lead a group yet
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            kills += 1
            amidst += (home / "out" / "experiment.json").exists() and not (home / "out" / "results.json").exists()
    else:
        process = start(command, "out", home)
    ended(process, home)
    return kills, amidst


def fuzz() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("n", type=int, help="kills in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60.0, help="after which no command is begun")
    asked = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)  # sums in another order would be other bytes
    cost.latency = lambda models, batch, **how: [
        [2.0] * 6,
        *([[1.0] * 6] * (len(models) - 1)),
    ]  # a clock's, and seconds each time
    draw, end = random.Random(asked.seed), time.monotonic() + 60 * asked.minutes
    kills, amidst, rounds, faults = Counter[str](), Counter[str](), Counter[str](), []
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        (home / "study.toml").write_text(STUDY)
        took = {}
        for kind, command in COMMANDS.items():
            begun = time.monotonic()
            ended(start(command, "out", home), home)
            took[kind] = time.monotonic() - begun
            (home / "made").mkdir(exist_ok=True)
            shutil.move(home / "out", home / "made" / kind)  # made where the killed ones are: models are known by paths
        while kills.total() < asked.n and time.monotonic() < end:
            for kind, command in COMMANDS.items():
                left = asked.n - kills.total()
                if left <= 0 or time.monotonic() > end:
                    break
                n, within = killed(command, home, took[kind], draw, min(left, 6 if took[kind] < 10 else 2))
                kills[kind] += n
                amidst[kind] += within
                rounds[kind] += 1
                found, expected = contents(home / "out"), contents(home / "made" / kind)
                different = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
                faults += [f"{kind}: {name}" for name in different]
                shutil.rmtree(home / "out")
    for kind in COMMANDS:
        print(
            f"{kind}: {took[kind]:.1f} s undisturbed, {kills[kind]} kills ({amidst[kind]} of a begun experiment), "
            f"{rounds[kind]} folders compared"
        )
    print(f"{kills.total()} kills, {len(faults)} files that differ", *faults, sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(fuzz())
