"""Odd values of every option of every command: none ends in a traceback, hangs, or takes all memory.

    python tests/fuzz/options.py N [--seed S]     # N commands, and those that were not done right

Each command has small settings that work, and one of its options gets a value that people have given somewhere, or
might: empty, huge, negative, of another kind, a device, a name in another script, brackets a thousand deep. A command
may accept it and work, or refuse it by one sentence.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
from forked import Ended, watched

from sukashi.cli import main
from sukashi.core.schema import option_of
from sukashi.experiments import functions
from sukashi.experiments.kinds import kinds
from sukashi.measures import cost

NET = ["--data", "digits", "--test-images", "20", "--width", "8"]
FEW = [*NET, "--calibration", "4"]
COMMANDS = {
    "train": ["sukashi:digits_cnn", *NET, "--epochs", "1"],
    "finetune": ["made", "--data", "digits", "--test-images", "20", "--epochs", "1"],
    "check": ["sukashi:digits_cnn", *FEW, "--limit", "1"],
    "prune": ["sukashi:digits_cnn", *FEW, "--criterion", "taylor", "--ratio", "0.5"],
    "compare": ["sukashi:digits_cnn", *FEW, "--criteria", "magnitude,taylor", "--ratios", "0.5", "--seeds", "1"],
    "schedule": [
        *("sukashi:digits_cnn", "oneshot", *FEW, "--criteria", "magnitude", "--ratios", "0.5"),
        *("--epochs", "1", "--seeds", "1"),
    ],
    "audit": [
        *("sukashi:digits_cnn", "made", *NET, "--population", "all"),
        *("--attributions", "saliency", "--measures", "gini"),
    ],
}
DEEP = "[" * 1000
VALUES = [
    *("", " ", "-", "--", "-1", "0", "1", "2", "0.5", "1.0", "1e-320", "1e308", "1e999", "nan", "inf", "-inf", "NaN"),
    *("4294967295", "4294967296", "18446744073709551616", "9" * 10_000, "1_000", "0x10", "١٢", "1,5", "1;5", "½"),
    *("true", "True", "yes", "null", "None", "[]", "{}", "[1, 2]", '{"a": 1}', DEEP, "{" * 1000, '{"a": ' * 1000),
    *(
        "/dev/zero",
        "/dev/null",
        "/dev/stdin",
        "/proc/self/mem",
        "/",
        ".",
        "..",
        "~",
        "made",
        "made/recipe.json",
        "fifo",
    ),
    *("a" * 5_000, "ä", "日本語", "🙂", "a b", "a,b", ",", ",,", "a=b", "a.b=[", "taylor.batch_size=0", "x.y=1"),
    *("$", "$x$", "[/b]", "[red]", "<script>", "%s", "{0}", "\\", "'", '"', "\n", "\x1b[31m", "..\\..", "CON"),
    *("magnitude", "taylor", "drift,drift", "random,cswap", "saliency", "global", "2:4", "0:4", "4:2", "1:1000000"),
    *("0.1,0.2", "0.2,0.1", "0.5,0.5", "1", "0.999999", "-0.1", "1000000", "100000000", "2147483648", "5000"),
    *("digits", "shapes", "shapes:size=100000000", "shapes:n=999999999", "torchvision:CIFAR10", "sukashi:", "timm:x"),
]


def cases(draw: random.Random, n: int) -> list[tuple[str, str, str]]:
    """(command, option, value), every option before any comes again."""
    options = [(kind, option) for kind in COMMANDS for option in _options(kind)]
    found: list[tuple[str, str, str]] = []
    while len(found) < n:
        draw.shuffle(options)
        found += [(kind, option, draw.choice(VALUES)) for kind, option in options]
    return found[:n]


def _options(kind: str) -> list[str]:
    """Flags of a command that take a value, but its folder."""
    fields = kinds()[kind].model_fields
    flags = [
        option_of(field).flag or f"--{name.replace('_', '-')}"
        for name, field in fields.items()
        if name not in ("out", "options") and field.annotation is not bool and not option_of(field).argument
    ]
    return [*flags, "--set"] if "options" in fields else flags


def run(kind: str, option: str, value: str, home: Path) -> Ended:
    given = [kind, *COMMANDS[kind], option, value]
    out = [] if "out" not in kinds()[kind].model_fields else ["--out", "out"]

    def call() -> None:
        sys.stdin = open(os.devnull)  # noqa: SIM115
        sys.argv = ["sukashi", *given, *out]
        main.main()

    try:
        return watched(call, home)
    finally:
        shutil.rmtree(home / "out", ignore_errors=True)


def prepare(home: Path) -> None:
    """What some values are the names of."""
    os.mkfifo(home / "fifo")
    functions.train("sukashi:digits_cnn", "digits", width=8, epochs=1, test_images=20, out=home / "made")


def fuzz() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("n", type=int, help="commands in all")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    cost.latency = lambda models, batch, **how: ([2.0, 2.1], [1.0, 1.1])  # seconds each time
    codes, faults = Counter[int](), []
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        prepare(home)
        before = sorted(path.name for path in home.iterdir())
        for kind, option, value in cases(random.Random(asked.seed), asked.n):
            ended = run(kind, option, value, home)
            codes[ended.code] += 1
            left = sorted(path.name for path in home.iterdir() if path.name not in before)
            fault = ended.fault or (f"left {', '.join(left)}" if left else "")
            for path in left:
                shutil.rmtree(home / path, ignore_errors=True)
            if fault:
                shown = value if len(value) < 80 else f"{value[:40]}... ({len(value)} characters)"
                last = ended.said.strip().splitlines()[-1:]
                faults.append(f"{kind} {option} {shown!r}: {fault}: {' '.join(last)[:200]}")
                print(faults[-1], file=sys.stderr, flush=True)
    print(f"{asked.n} commands, exit codes {dict(sorted(codes.items()))}, {len(faults)} not right")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(fuzz())
