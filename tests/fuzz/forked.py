"""Calls in processes of their own, watched: how they ended, what they said, how long they took and what they held."""

from __future__ import annotations

import argparse
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

SECONDS, GIB = 60, 4


@dataclass(frozen=True)
class Ended:
    """How a call ended: its exit code (negative: by which signal), what it said, seconds, and GiB it held at most."""

    code: int
    said: str
    seconds: float
    gib: float
    left: tuple[str, ...] = ()
    """Files that it left where none should be."""

    @property
    def fault(self) -> str:
        """What no call may do, in a word; empty where it was done right."""
        if self.code == -signal.SIGKILL:
            at_work = re.search(r"\d+/\d+.* left$", self.said.strip())  # as was asked of it
            return "" if at_work else f"over {SECONDS} s"
        if "Traceback (most recent call last)" in self.said:
            return "traceback"
        if self.code not in (0, 2, 3, 4, 5, 130):
            return f"exit code {self.code}"
        if self.gib > GIB:
            return f"{self.gib:.1f} GiB"
        if self.left:
            return f"left {', '.join(self.left)}"
        return "" if len(self.said) < 20_000 else f"{len(self.said)} characters"


def watched(call: Callable[[], int | None], home: Path) -> Ended:
    """The call in a fork, with the folder `home` as its working directory: killed after SECONDS."""
    begun = time.monotonic()
    with tempfile.TemporaryFile() as said:
        pid = os.fork()
        if pid == 0:
            os._exit(_inside(call, home, said.fileno()))
        code, usage = _waited(pid, begun + SECONDS)
        said.seek(0)
        text = said.read().decode(errors="replace")
    return Ended(code, text, time.monotonic() - begun, usage.ru_maxrss / 2**20)


def _inside(call: Callable[[], int | None], home: Path, said: int) -> int:
    try:
        os.setsid()
        os.chdir(home)
        for stream in (1, 2):
            os.dup2(said, stream)
        return call() or 0
    except SystemExit as stopped:
        return stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        for file in (sys.stdout, sys.stderr):
            file.flush()


def _waited(pid: int, end: float) -> tuple[int, resource.struct_rusage]:
    while True:
        found, status, usage = os.wait4(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status), usage
        if time.monotonic() > end:
            os.killpg(pid, signal.SIGKILL)
            _, status, usage = os.wait4(pid, 0)
            return -signal.SIGKILL, usage
        time.sleep(0.005)


def fuzz(doc: str, tries: Callable[[random.Random, int, Path], Iterator[tuple[str, Ended]]]) -> int:
    """A script of N tries: each is what was tried and how it ended; what was not right is said. The exit code."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("n", type=int, help="tries in all")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    torch.set_num_threads(1)  # a fork of several would wait for those that it does not have
    codes, n_faults = Counter[int](), 0
    with tempfile.TemporaryDirectory() as name:
        for told, ended in tries(random.Random(asked.seed), asked.n, Path(name)):
            codes[ended.code] += 1
            if ended.fault:
                n_faults += 1
                last = " ".join(ended.said.strip().splitlines()[-1:])
                print(f"{told}: {ended.fault}: {last[:200]}", file=sys.stderr, flush=True)
    print(f"{asked.n} tries, exit codes {dict(sorted(codes.items()))}, {n_faults} not right")
    return 1 if n_faults else 0
