"""The golden run: every command on digits, and a hash of every result, so that a refactor can show it changed none.

    python tests/golden.py run OUT            # runs all commands into OUT and prints {what: hash} as JSON
    python tests/golden.py against REVISION   # the same by a checkout of REVISION and by this tree; what differs

Results are the numbers of `--json`, every tensor of every saved network and mask, every array of every npz, the rows
of every Parquet table and the pixels of every figure. They are gathered by command, file name and name inside the file,
and not by folder: a refactor may move files. Latencies, speeds, memory, versions, dates and paths are left out; so are
pages, which are words about these numbers. One thread, because sums in another order are other sums.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image
from safetensors.numpy import load_file

ROOT = Path(__file__).parent.parent
FEW = ["--data", "digits", "--calibration", "4", "--test-images", "100"]
SMALL = ["--data", "digits", "--test-images", "100"]
# What a clock, a machine or a folder decides.
UNSTABLE = {
    *("batch_size", "command", "device", "estimated_seconds", "flop_counter", "hardware", "images_per_second"),
    *("latency", "latency_ms", "out", "repeats", "report", "threads", "time", "unmeasured", "versions"),
    *("waiting", "notes", "warnings", "trial", "verdict", "verdicts", "texts"),
}
COMPARED = """
out = "studied"
data = "digits"
criteria = ["magnitude", "lrp"]
sampling = ["random", "clustering"]
ratios = [0.3, 0.6]
seeds = 1
calibration = 4
test_images = 100
pairs = [["lrp/clustering", "lrp"]]
[models.dense]
spec = "dense"
[models.random]
spec = "sukashi:digits_vit"
[options.lrp]
rule = "epsilon_plus"
"""
LEVELS = """
out = "study-levels"
data = "digits"
schedule = "lottery"
criteria = ["magnitude"]
scope = "global"
ratios = [0.5]
calibration = 4
test_images = 100
enforce_mask = [true, false]
[model]
spec = "sukashi:digits_cnn"
[training]
epochs = 2
"""
COMMANDS: dict[str, list[str]] = {
    "train": ["train", "sukashi:digits_cnn", *SMALL, "--epochs", "5", "--out", "dense"],
    "train-vit": [
        *("train", "sukashi:digits_vit", *SMALL, "--epochs", "2", "--optimizer", "adamw", "--lr", "0.003"),
        *("--ema", "0.9", "--augment", "affine", "--patience", "1", "--out", "vit"),
    ],
    "check": ["check", "dense", *FEW],
    "compare": [
        *("compare", "dense", *FEW, "--criteria", "random,magnitude,taylor,lrp,cbp,amp,cswap,drift"),
        *("--ratios", "0:0.9:0.3", "--seeds", "2", "--set", "cswap.alpha=0.1", "--out", "compared"),
    ],
    "compare-zero": [
        *("compare", "vit", *FEW, "--criteria", "taylor,conductance", "--ratios", "0.2,0.5", "--seeds", "1"),
        *("--mode", "zero", "--sampling", "clustering", "--out", "compared-zero"),
    ],
    "prune": ["prune", "dense", *FEW, "--criterion", "drift", "--ratio", "0.5", "--out", "cut"],
    "prune-exact": [
        *("prune", "vit", *FEW, "--criterion", "magnitude", "--ratio", "0.4", "--round-to", "1", "--out", "vit-cut"),
    ],
    "prune-zero": [
        "prune",
        "dense",
        *FEW,
        "--criterion",
        "taylor",
        "--ratio",
        "0.3",
        "--mode",
        "zero",
        "--out",
        "zero",
    ],
    "prune-weights": [
        *("prune", "dense", *FEW, "--criterion", "wanda", "--ratio", "0.5", "--scope", "row", "--exclude", "conv1"),
        *("--out", "sparse"),
    ],
    "prune-sequential": [
        *("prune", "vit", *FEW, "--criterion", "wanda", "--ratio", "0.6", "--scope", "layer", "--sequential"),
        *("--out", "vit-sparse"),
    ],
    "finetune": ["finetune", "cut", *SMALL, "--epochs", "2", "--augment", "crop_flip", "--out", "tuned"],
    "finetune-sparse": ["finetune", "sparse", *SMALL, "--epochs", "1", "--out", "tuned-sparse"],
    "schedule": [
        *("schedule", "dense", "iterative", *FEW, "--criteria", "magnitude,taylor", "--ratios", "0.3,0.6"),
        *("--epochs", "1", "--round-to", "4", "--out", "levels"),
    ],
    "schedule-oneshot": [
        *("schedule", "dense", "oneshot", *FEW, "--criteria", "magnitude,wanda", "--ratios", "0.5,0.7"),
        *("--scope", "layer", "--epochs", "1", "--seeds", "2", "--out", "levels-sparse"),
    ],
    "audit": [
        *("audit", "dense", "cut", "sparse", "tuned", "--data", "digits", "--test-images", "40"),
        *("--attributions", "saliency,lrp", "--out", "audited"),
    ],
    "audit-vit": [
        "audit",
        "vit",
        "vit-cut",
        "--data",
        "digits",
        "--test-images",
        "20",
        "--population",
        "all",
        "--out",
        "audited-vit",
    ],
    "study": ["study", "compared.toml"],
    "study-levels": ["study", "levels.toml"],
}


def run(out: Path, source: Path = ROOT / "src") -> dict[str, str]:
    """{what: hash} of all results, after running every command of the package in `source` in the new folder `out`."""
    out.mkdir(parents=True)
    (out / "compared.toml").write_text(COMPARED)
    (out / "levels.toml").write_text(LEVELS)
    variables = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    found: dict[str, str] = {}
    seen: set[Path] = set()
    for name, arguments in COMMANDS.items():
        start = time.perf_counter()
        code = "import torch; torch.set_num_threads(1); from sukashi.__main__ import main"
        command = [sys.executable, "-c", f"{code}; main()", *arguments, "--json"]
        done = subprocess.run(command, cwd=out, env=variables, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{name} ended with {done.returncode}: {done.stderr}")
        here: Counter[str] = Counter(of_json("json", json.loads(done.stdout.splitlines()[-1])))
        for path in sorted(set(out.rglob("*")) - seen):
            seen.add(path)
            if path.is_file():
                here.update(of_file(path))
        found |= {f"{name}: {what}": f"{n}" for what, n in sorted(here.items())}
        print(f"{name}: {len(here)} results, {time.perf_counter() - start:.1f} s", file=sys.stderr)
    return found


def of_file(path: Path) -> list[str]:
    """A line for each part of a file: what it is and the hash of its value."""
    match path.suffix:
        case ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return [of_array(f"npz {name}", arrays[name]) for name in arrays.files if name != "about"]
        case ".safetensors":
            return [of_array(f"{path.name} {name}", values) for name, values in load_file(path).items()]
        case ".parquet":
            rows = [{k: v for k, v in row.items() if k not in UNSTABLE} for row in pq.read_table(path).to_pylist()]
            return [f"parquet row {hashed(row)}" for row in rows]
        case ".png":
            return [of_array(f"figure {path.name}", np.asarray(Image.open(path)))]
        case _:
            return []


def of_array(name: str, values: np.ndarray[Any, Any]) -> str:
    values = np.ascontiguousarray(values)
    return f"{name} {hashlib.sha256(f'{values.dtype} {values.shape} '.encode() + values.tobytes()).hexdigest()[:16]}"


def of_json(name: str, value: Any) -> list[str]:
    """A line for each number or word in it."""
    if isinstance(value, dict):
        return [line for key, part in value.items() if key not in UNSTABLE for line in of_json(f"{name}.{key}", part)]
    if isinstance(value, list):
        return [line for part in value for line in of_json(name, part)]
    return [f"{name} {value!r}"]


def hashed(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def against(revision: str) -> int:
    """Print what differs between a revision and this tree; the number of differences."""
    with tempfile.TemporaryDirectory() as folder:
        there = Path(folder) / "revision"
        subprocess.run(["git", "worktree", "add", "--detach", there, revision], cwd=ROOT, check=True)
        try:
            before, now = run(Path(folder) / "before", there / "src"), run(Path(folder) / "now")
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", there], cwd=ROOT, check=True)
    return differences(before, now)


def differences(before: dict[str, str], now: dict[str, str]) -> int:
    different = sorted(what for what in {*before, *now} if before.get(what) != now.get(what))
    for what in different:
        print(f"{before.get(what, 0)} -> {now.get(what, 0)}: {what}")
    print(f"{len(different)} of {len({*before, *now})} results differ")
    return len(different)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["run", folder]:
            print(json.dumps(run(Path(folder)), indent=1))
        case ["against", revision]:
            sys.exit(bool(against(revision)))
        case _:
            sys.exit(__doc__)
