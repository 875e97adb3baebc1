"""Odd values of every option of every command: none ends in a traceback, hangs, or takes all memory.

    python tests/fuzz/options.py N [--seed S]     # N commands, and those that were not done right

Each command has small settings that work, and one of its options gets a value that people have given somewhere, or
might: empty, huge, negative, of another kind, a device, a name in another script, brackets a thousand deep. A command
may accept it and work, or refuse it by one sentence.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from forked import Ended, fuzz, watched

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
    "export": ["made"],
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
        if name != "options" and field.annotation is not bool and not option_of(field).argument
    ]
    flags = [flag for flag in flags if flag != "--out"]
    return [*flags, "--set"] if "options" in fields else flags


def run(kind: str, option: str, value: str, home: Path) -> Ended:
    given = [kind, *COMMANDS[kind], option, value]
    out = [] if "out" not in kinds()[kind].model_fields else ["--out", "out"]

    def call() -> None:
        sys.stdin = open(os.devnull)  # noqa: SIM115
        sys.argv = ["sukashi", *given, *out]
        main.main()

    before = set(home.iterdir())
    ended = watched(call, home)
    left = sorted(set(home.iterdir()) - before - {home / "out"})
    for path in (*left, home / "out"):
        shutil.rmtree(path, ignore_errors=True)
        path.unlink(missing_ok=True)
    return replace(ended, left=tuple(path.name for path in left))


def prepare(home: Path) -> None:
    """What some values are the names of."""
    os.mkfifo(home / "fifo")
    functions.train("sukashi:digits_cnn", "digits", width=8, epochs=1, test_images=20, out=home / "made")


def tries(draw: random.Random, n: int, home: Path) -> Iterator[tuple[str, Ended]]:
    cost.latency = lambda models, batch, **how: [[2.0] * 6, *([[1.0] * 6] * (len(models) - 1))]  # seconds each time
    prepare(home)
    for kind, option, value in cases(draw, n):
        shown = value if len(value) < 80 else f"{value[:40]}... ({len(value)} characters)"
        yield f"{kind} {option} {shown!r}", run(kind, option, value, home)


if __name__ == "__main__":
    sys.exit(fuzz(__doc__, tries))
